"""`python -m benchmarks.backfill`: history for all features, by `headrace backfill`, beside a stream that is idle.

The same events, of some days, lie in Kafka and in the archive. First the stream reads them, as it would live; then all
its features get them again, as history. Both rates are of whole events, whatever number of rows each goes into. A
backfill's time is from the plan that it fills to the one that serves what was filled.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Final, NamedTuple

from benchmarks import population
from benchmarks.harness import Benchmark, Options, Report, Series, main, say
from benchmarks.project import Project
from benchmarks.stream import PARTITIONS, PROCESSES, SETTINGS, Streaming, ends_of, measure_stream, restored, streaming
from benchmarks.traffic import Traffic
from features.times import DAY_MS
from headrace.embedded import end, spawn
from store.archive import tables_of
from store.commit import read_records
from store.keys import Keyspace
from store.plans import applied_plans
from tests.support.kafka import RealKafka

DAYS: Final = 5


class Rates(NamedTuple):
    """Events a second."""

    stream: float
    backfill: float


def run(options: Options, report: Report) -> None:
    """Measures the stream, and a backfill of the same events after it."""
    events = options.pick(4_000_000, 60_000)
    users, items = options.pick((100_000, 50_000), (5_000, 2_000))
    # Kafka was filled just now: a worker that starts would read all again for duplicates, with the usual 10 minutes.
    settings = {**SETTINGS, "dedupe_s": 5}
    with RealKafka() as kafka, Project(kafka.bootstrap_servers, **settings) as project:
        project.settings.archive = str(project.folder / "archive")
        now_ms = time.time_ns() // 1_000_000
        Traffic(users, items).fill(kafka.bootstrap_servers, events, now_ms - DAYS * DAY_MS, now_ms)
        report.note(f"in Kafka and archived: {events:,} events of {DAYS} days, {PARTITIONS} partitions a topic")
        archive(project, events)
        there = population.fill(project.client, project.plan, users, items)
        report.note(f"in Redis before each run: {there.describe()}")
        project.client.save()
        rounds = []
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}")
            live = measure_stream(restored(project), ends_of(kafka.bootstrap_servers))
            rounds.append(Rates(live, events / backfill(project)))
    stream, ours = (Series.of(getattr(each, name) for each in rounds) for name in Rates._fields)
    report.add("the stream, all shipped views", stream, "events/s")
    report.add("headrace backfill of all of them", ours, "events/s", key="events_per_s")
    report.add("against the stream", ours / stream, "times", key="ratio_stream", at_least=3)


def archive(project: Project, events: int) -> None:
    """Has everything archived."""
    log = project.folder / "archive.log"
    process = spawn([sys.executable, "-m", "headrace", "archive"], log=log, env=project.environment())
    try:
        Streaming(process, log).wait(lambda: _archived(project) >= events)
    finally:
        end(process)


def _archived(project: Project) -> int:
    tables = tables_of(project.settings, project.plan).values()
    return sum(at.next for table in tables for at in table.complete().values())


def backfill(project: Project) -> float:
    """How many seconds it takes, beside an idle stream."""
    plan = project.plan
    argv = [sys.executable, "-m", "headrace", "backfill"]
    for view in plan.views:
        argv += ["--view", view.name] if view.aggregations else []
    keys = Keyspace.of(plan).commit_records(plan.stored_entities)
    with streaming(project, PROCESSES) as worker:
        before = {record.writer for record in read_records(project.client, keys) if record}
        worker.wait(lambda: not before & {record.writer for record in read_records(project.client, keys) if record})
        subprocess.run(argv, cwd=project.folder, env=project.environment(), check=True, stdout=sys.stderr)
    filled, served = applied_plans(project.client, plan.project)[-2:]
    return (served.at_ms - filled.at_ms) / 1000


BENCHMARK = Benchmark(
    "backfill",
    work="the history of all shipped features, from the archive, into the rows of a running stream",
    peer="the stream reading the same events",
    keys=("events_per_s", "ratio_stream"),
    run=run,
)

if __name__ == "__main__":
    main(BENCHMARK)
