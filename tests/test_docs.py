"""README.md is true: its settings table is that of the code, and every block runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from config.settings import Settings
from headrace.embedded import EmbeddedRedis, free_port
from tests.support.kafka import RealKafka
from tests.support.stack import commands_of, project_copy, run_shell, wait_for

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DEMO_SECONDS = 6


def settings_table() -> str:
    """The table as it should be."""
    rows = ["| variable | default | what |", "| --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = field.default.get_secret_value() if name == "redis_url" else field.default
        rows.append(f"| `HEADRACE_{name.upper()}` | `{default}` | {field.description} |")
    return "\n".join(rows)


def test_the_settings_table_is_that_of_the_code() -> None:
    """Run `python -m tests.test_docs` to write it anew."""
    written = re.search(r"<!-- settings -->\n(.*)\n<!-- /settings -->", README, re.DOTALL)
    assert written is not None
    assert written[1] == settings_table()


def test_links_in_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def blocks() -> Iterator[tuple[str, str]]:
    """(language, text) of every code block, in order."""
    yield from re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def test_every_block_of_the_readme_runs(tmp_path: Path, real_kafka: RealKafka) -> None:
    """In order, in a fresh copy, as a newcomer would; only addresses are those of this test's servers."""
    with EmbeddedRedis() as redis, project_copy(tmp_path) as folder:
        port = free_port()
        places = {
            "127.0.0.1:9092": real_kafka.bootstrap_servers,
            "redis://127.0.0.1:6379/0": redis.url,
            "8000": str(port),
        }
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(folder)}
        environment.pop("HEADRACE_REPO", None)
        background: list[subprocess.Popen[bytes]] = []
        ran = 0
        try:
            for language, text in blocks():
                for place, ours in places.items():
                    text = text.replace(place, ours)  # noqa: PLW2901  # the block as it runs here
                if language == "python":
                    run_python(text, folder, environment)
                else:
                    assert language == "console", language
                    run_console(text, folder, environment, background, port)
                ran += 1
            assert ran == len(re.findall("^```\\w", README, re.MULTILINE)) > 5
        finally:
            for process in background:
                process.terminate()
            for process in background:
                process.wait(30)


def run_python(text: str, folder: Path, environment: dict[str, str]) -> None:
    """A Python block, as a file of its own; one that reads waits until the stream has caught up."""
    file = folder / "block.py"
    file.write_text(text)
    run_shell(f".venv/bin/python {file.name}", environment, folder)
    file.unlink()


def run_console(
    text: str, folder: Path, environment: dict[str, str], background: list[subprocess.Popen[bytes]], port: int
) -> None:
    """A console block, line by line."""
    for command in commands_of(text):
        if command.startswith("export "):
            environment |= dict(pair.split("=", 1) for pair in command.removeprefix("export ").split())
        elif command.endswith("&"):
            background.append(
                subprocess.Popen(["bash", "-c", f"exec {command.removesuffix('&')}"], cwd=folder, env=environment)
            )
            if "serve" in command:
                wait_for("the server is ready", lambda: answers(f"http://127.0.0.1:{port}/readyz"))
        elif command == "make demo":
            # What make would install is already here; it is tried from a bare clone in CI.
            run_shell(f".venv/bin/headrace demo --seconds {DEMO_SECONDS}", environment, folder)
        elif command == "make test":
            run_shell(".venv/bin/pytest --collect-only -q tests/test_docs.py", environment, folder)
        else:
            if "entities/user/u1" in command:
                wait_for("the stream has caught up", lambda: clicks(port) == 1)
            run_shell(command, environment, folder)


def answers(url: str) -> bool:
    """Whether the server is there and ready."""
    try:
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def clicks(port: int) -> int:
    """How many clicks of u1 are served."""
    time.sleep(0.05)
    found: int = httpx.get(f"http://127.0.0.1:{port}/v1/entities/user/u1", timeout=5).json()["features"][
        "user_activity__clicks_1h"
    ]
    return found


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(
        re.sub(r"(<!-- settings -->\n).*(\n<!-- /settings -->)", rf"\1{settings_table()}\2", README, flags=re.DOTALL)
    )
    print("written", file=sys.stderr)
