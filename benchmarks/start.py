"""`python -m benchmarks.start`: what it takes to start a command, a server and a worker.

And what it takes to go on: from a worker's death until an event that was sent after it is served, and how long nothing
is committed while a new plan is taken up, both under 500 events/s.

Each start stands beside a Python that does no more than `import numpy, pyarrow, fastapi, uvicorn`, in the same round.
Times are the processor's, of all processes that it takes: a server counts until `GET /readyz` answers 200, a worker,
with the process that watches over it, until it has claimed the shards of its lane.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

from benchmarks.background import background
from benchmarks.freshness import Prober, prober
from benchmarks.harness import Benchmark, Options, Report, Series, alternate, main, say
from benchmarks.project import START_TIMEOUT_S, Project, answers
from benchmarks.stream import streaming
from features.evolve import as_declared, succeed
from headrace.embedded import EmbeddedBroker, end, free_port, spawn, wait_until_ready
from store.commit import decoded_records
from store.keys import Keyspace
from store.plans import append_plan, applied_plan
from tests.support.kafka import RealKafka
from tests.support.served import with_windows

REFERENCE: Final = "import numpy, pyarrow, fastapi, uvicorn"
LIMITS: Final = {"help": 0.5, "show": 2.0, "doctor": 2.0, "server": 3.0, "worker": 3.0}
EVENTS_A_SECOND: Final = 500
KILLS: Final = 10
WINDOWS: Final = ("2h", "3h", "5h", "12h", "2d")
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
        # Files that were never read, and loops that were never compiled, are not measured.
        for start in () if options.quick else sides.values():
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
    going_on(options, report)


def going_on(options: Options, report: Report) -> None:
    """Kills workers and applies plans, under a stream of events, and measures until it goes on."""
    with RealKafka() as kafka, Project(kafka.bootstrap_servers) as project:
        events = {"kafka": kafka.bootstrap_servers, "rate": EVENTS_A_SECOND, "users": 10_000, "items": 5_000}
        with (
            project.serve() as address,
            streaming(project) as stream,
            prober(kafka.bootstrap_servers, address) as probing,
            background("events", project.folder, project.environment(), **events),
        ):
            probing.probe()
            recovered = [_recovery_s(stream.process.pid, probing, options) for _ in range(options.pick(KILLS, 1))]
            paused = [_pause_s(project, window, options) for window in options.pick(WINDOWS, WINDOWS[:1])]
    what = f"kill -9 of the worker, under {EVENTS_A_SECOND} events/s, until an event sent after it is served"
    report.add(what, Series.of(recovered), "s", key="recovery_s", at_most=2)
    report.add("no commit while a plan is taken up", Series.of(paused), "s", key="apply_pause_s", at_most=2)


def _recovery_s(supervisor: int, probing: Prober, options: Options) -> float:
    say("a worker is killed")
    time.sleep(options.pick(8.0, 0.5))  # Until another stands ready, as five kills in a minute leave time for.
    worker = int(Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()[0])
    began_s = time.monotonic()
    os.kill(worker, signal.SIGKILL)
    probing.probe()
    return time.monotonic() - began_s


def _pause_s(project: Project, window: str, options: Options) -> float:
    """The longest time without a commit, from when a plan is applied until a while after it was taken up."""
    say(f"a plan with windows of {window} is applied")
    time.sleep(options.pick(8.0, 0.5))
    client, before = project.client, applied_plan(project.client, project.plan.project)
    if before is None:
        msg = "nothing is applied"
        raise RuntimeError(msg)
    plan = succeed(before, with_windows(as_declared(before), window), now_ms=int(time.time() * 1000))
    keys = Keyspace.of(plan).commit_records(plan.stored_entities)
    append_plan(client, plan, int(time.time() * 1000))
    began_s = last_s = time.monotonic()
    seen, longest_s, taken_s = client.mget(keys), 0.0, None
    while taken_s is None or time.monotonic() < taken_s + 3:
        stored = client.mget(keys)
        now_s = time.monotonic()
        if stored != seen:
            longest_s, last_s, seen = max(longest_s, now_s - last_s), now_s, stored
        if taken_s is None and all(record and record.plan == plan.number for record in decoded_records(keys, stored)):
            taken_s = now_s
        if now_s - began_s > START_TIMEOUT_S:
            msg = f"plan {plan.number} was not taken up in {START_TIMEOUT_S:g} s"
            raise RuntimeError(msg)
        time.sleep(0.005)
    return longest_s


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
    keys=(*(f"{name}_ratio" for name in LIMITS), "recovery_s", "apply_pause_s"),
    run=run,
)

if __name__ == "__main__":
    main(BENCHMARK)
