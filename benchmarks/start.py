"""`python -m benchmarks.start`: what it takes to start a command, a server and a worker.

Each stands beside a Python that does no more than `import numpy, pyarrow, fastapi, uvicorn`, in the same round. Times
are the processor's, of all processes that it takes: a server counts until `GET /readyz` answers 200, a worker, with the
process that watches over it, until it has claimed the shards of its lane.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.harness import Benchmark, Options, Report, Series, alternate, main
from benchmarks.project import START_TIMEOUT_S, Project, answers
from headrace.embedded import EmbeddedBroker, end, free_port, spawn, wait_until_ready

REFERENCE: Final = "import numpy, pyarrow, fastapi, uvicorn"
LIMITS: Final = {"help": 0.5, "show": 2.0, "doctor": 2.0, "server": 3.0, "worker": 3.0}
_TICK_S: Final = 1 / os.sysconf("SC_CLK_TCK")


class Took(NamedTuple):
    """Seconds of the processor and of the clock."""

    processor_s: float
    wall_s: float


def run(options: Options, report: Report) -> None:
    """Measures all of them in turn, each against a project with Redis, a broker and the shipped catalogue applied."""
    with EmbeddedBroker() as broker, Project(kafka=broker.bootstrap_servers, topics="auto") as project:
        command = [sys.executable, "-m", "headrace"]
        env = project.environment()
        port = free_port()
        sides: dict[str, Callable[[], Took]] = {
            "reference": partial(to_its_end, [sys.executable, "-c", REFERENCE], env),
            "help": partial(to_its_end, [*command, "--help"], env),
            "show": partial(to_its_end, [*command, "show", "user", "u1"], env),
            "doctor": partial(to_its_end, [*command, "doctor"], env),
            "server": partial(
                until_ready,
                [*command, "serve", "--port", str(port)],
                env,
                project.folder,
                lambda _: answers(f"http://127.0.0.1:{port}/readyz"),
            ),
            "worker": partial(until_ready, [*command, "stream"], env, project.folder, _has_claimed),
        }
        for (
            start
        ) in sides.values():  # Files that were never read, and loops that were never compiled, are not measured.
            start()
        found = alternate(sides, options)
    processor = {name: Series.of(took.processor_s for took in rounds) for name, rounds in found.items()}
    report.add(f'python -c "{REFERENCE}"', processor["reference"], "s")
    for name, limit in LIMITS.items():
        what = {"help": "headrace --help", "server": "server until ready", "worker": "worker until it has claimed"}
        label = what.get(name, f"headrace {name}")
        report.add(label, processor[name], "s")
        report.add(f"{label}, by the clock", Series.of(took.wall_s for took in found[name]), "s")
        ratio = processor[name] / processor["reference"]
        report.add(f"{label} / reference", ratio, "times", key=f"{name}_ratio", at_most=limit)


def to_its_end(argv: list[str], env: Mapping[str, str]) -> Took:
    """Runs a command to its end.

    Raises:
        RuntimeError: if it fails; `doctor` may have something to say.
    """
    began_s = time.monotonic()
    process = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = process.stdout.read() if process.stdout else b""
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and argv[-1] != "doctor":
        msg = f"{' '.join(argv)} ended with status {process.returncode}:\n{output.decode()[-4000:]}"
        raise RuntimeError(msg)
    return Took(used.ru_utime + used.ru_stime, time.monotonic() - began_s)


def until_ready(argv: list[str], env: Mapping[str, str], folder: Path, ready: Callable[[Path], bool]) -> Took:
    """Starts a command, stops it when it is ready, and says what it took until then."""
    log = folder / f"{argv[3]}.log"
    log.unlink(missing_ok=True)
    began_s = time.monotonic()
    process = spawn(argv, log=log, env=env)
    try:
        wait_until_ready(process, lambda: ready(log), name=argv[3], log=log, timeout_s=START_TIMEOUT_S)
        return Took(_processor_s(process.pid), time.monotonic() - began_s)
    finally:
        end(process)


def _has_claimed(log: Path) -> bool:
    return b"lane_claimed" in log.read_bytes()


def _processor_s(pid: int) -> float:
    """What a process and all that it has started have used, also those that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return sum(map(int, fields[11:15])) * _TICK_S + sum(_processor_s(int(child)) for child in children)


BENCHMARK: Final = Benchmark(
    name="start",
    work="processor time of starting: a command, a server until it is ready, a worker until it has claimed its shards",
    peer=f'python -c "{REFERENCE}"',
    keys=tuple(f"{name}_ratio" for name in LIMITS),
    run=run,
)

if __name__ == "__main__":
    main(BENCHMARK)
