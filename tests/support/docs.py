"""Documents that run: the blocks of a Markdown file, as who reads it would type them; and the same as a notebook.

A block of `console` has commands, one of `text` after it what they print. One of another language whose first line is
`# name.py` is that file, and of `# name.py, at its end` more of it; any other `python` block is run.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from headrace.embedded import end, spawn
from tests.support.stack import commands_of, run_shell, wait_for

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"# (\S+\.\w+)(, at its end)?\n")
_OF_THE_RUN = re.compile(r"\b\d+(\.\d+)?(?= ?s\b)|\d{4}-\d\d-\d\dT[\d:]+Z|(?<=plan )[0-9a-f]{12}\b")
"""How long something took, when it was, and fingerprints of plans: they change with how plans are written."""


class Block(NamedTuple):
    """A code block, and the output that the document says it has."""

    language: str
    text: str
    output: str | None


def blocks(document: str) -> list[Block]:
    """Every block, in order."""
    found = [Block(language, text, output) for language, text, output in _BLOCK.findall(document)]
    assert "text" not in {block.language for block in found}, "an output without its block"
    return found


def with_outputs(document: str, outputs: list[str]) -> str:
    """The document, each block's output replaced by what it was; one that says the same already is left alone."""
    given = iter(outputs)

    def written(found: re.Match[str]) -> str:
        output = next(given)
        language, text, before = found.groups()
        assert before is not None or not output, f"this prints something, and no block of text says so: {text}"
        if before is None or same(before, output):
            return found[0]
        return f"```{language}\n{text}```\n\n```text\n{output}```\n"

    return _BLOCK.sub(written, document)


def same(one: str, other: str) -> bool:
    """Whether outputs are equal, but for what is another at every run."""
    return _OF_THE_RUN.sub("", one) == _OF_THE_RUN.sub("", other)


class Reader:
    """Does what blocks say, one after the other, in a folder; what was started ends with the `with` block.

    Args:
        folder: where.
        environment: variables of the commands; `export` adds to them.
        places: addresses in the document, and what they are here.
        before: is told of each command first, and may wait for something, or return another one.
    """

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        places: Mapping[str, str],
        before: Callable[[str], str] = lambda command: command,
    ) -> None:
        self._folder, self._places, self._before = folder, places, before
        self.environment = dict(environment)
        self._background: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._background:
            process.terminate()
        for process in self._background:
            end(process, timeout_s=30)
        if error is not None:
            for log in sorted(self._folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")

    def run(self, block: Block) -> str:
        """What a block prints on standard output."""
        text = block.text
        for place, here in self._places.items():
            text = text.replace(place, here)
        if block.language == "console":
            said = "".join(self._command(command) for command in commands_of(text))
        elif file := _FILE.match(text):
            with (self._folder / file[1]).open("a" if file[2] else "w") as out:
                out.write(text[file.end() :] if file[2] else text)
            said = ""
        else:
            assert block.language == "python", block.language
            script = self._folder / "block.py"
            script.write_text(text)
            said = run_shell(f"python {script.name}", self.environment, self._folder)
            script.unlink()
        for place, here in self._places.items():
            said = said.replace(here, place)
        return said

    def _command(self, command: str) -> str:
        if command.startswith("export "):
            self.environment |= dict(pair.split("=", 1) for pair in command.removeprefix("export ").split())
            return ""
        if command.endswith("&"):
            argv = ["bash", "-c", f"cd {self._folder} && exec {command.removesuffix('&')}"]
            self._background.append(spawn(argv, log=self._folder / "background.log", env=self.environment))
            if port := re.search(r" serve --port (\d+)", command):
                url = f"http://127.0.0.1:{port[1]}/readyz"
                wait_for(
                    "the server is ready", lambda: httpx.get(url, timeout=5).is_success, passing=(httpx.HTTPError,)
                )
            return ""
        return run_shell(self._before(command), self.environment, self._folder)


def notebook(document: str) -> str:
    """The document as a Jupyter notebook, with its outputs."""
    # Jupyter has every command print as to a terminal, with bars and colours.
    cells = [_cell("%env FORCE_COLOR=")]
    at = 0
    for found in _BLOCK.finditer(document):
        cells += _prose(document[at : found.start()])
        cells += _code(Block(*found.groups()))
        at = found.end()
    cells += _prose(document[at:])
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _prose(text: str) -> list[dict[str, Any]]:
    return [{"cell_type": "markdown", "metadata": {}, "source": _lines(text.strip())}] if text.strip() else []


def _code(block: Block) -> list[dict[str, Any]]:
    """Variables, each process that goes on, and other commands are cells of their own; the last has the output."""
    if block.language == "console":
        sources: list[str] = []
        for command in commands_of(block.text):
            if command.startswith("export "):
                sources += [f"%env {pair}" for pair in command.removeprefix("export ").split()]
            elif command.endswith("&"):
                sources.append(f"%%bash --bg\nexec {command.removesuffix('&').strip()}")
            elif sources and sources[-1].startswith("%%bash\n"):
                sources[-1] += f"\n{command}"
            else:
                sources.append(f"%%bash\n{command}")
    else:
        file = _FILE.match(block.text)
        assert file is not None, "a notebook's Python blocks are files"
        more = block.text[file.end() :] if file[2] else block.text
        sources = [f"%%writefile {'-a ' if file[2] else ''}{file[1]}\n{more.rstrip()}"]
    cells = [_cell(source) for source in sources]
    if block.output:
        cells[-1]["outputs"] = [{"name": "stdout", "output_type": "stream", "text": _lines(block.output)}]
    return cells


def _cell(source: str) -> dict[str, Any]:
    return {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": _lines(source)}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)
