"""`stream`: events a second from Kafka, where they lie already, into Redis, with everything on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import msgspec
from confluent_kafka import Consumer, TopicPartition

from benchmarks import population
from benchmarks.harness import Benchmark, Options, Report, Series, alternate, main
from benchmarks.project import ROOT, Project, redis_server
from benchmarks.stream_formats import NAMES, formats, topics_of
from benchmarks.stream_peers import Lap, Work
from benchmarks.traffic import SHARES, TOPICS, Traffic
from headrace.embedded import end, free_port, spawn, wait_until_ready
from store.commit import Position, initialise, read_record
from store.keys import Keyspace
from tests.support.kafka import RealKafka

T = TypeVar("T")

PARTITIONS: Final = 4
PROCESSES: Final = 2
PEERS: Final = {"builtin()": (1, 3600), "per_key()": (2, 10), "per_key(pipelined=False)": (2, 10)}
"""Processes and seconds an epoch, as each does best. At the end of an epoch Bytewax copies the state of every window
that was touched, recovery store or not, which takes four fifths of the time at its default of 10 s."""
SETTINGS: Final = {"partitions": PARTITIONS, "shards": 8, "chunk_events": 60_000, "row_cache_mb": 1_000}
"""Few shards make few commits; all rows fit the cache."""
SPAN_MS: Final = 6 * 3_600_000
DEADLINE_S: Final = 600.0


def run(options: Options, report: Report) -> None:
    """Measures the stream and its peers in turn."""
    events = options.pick(1_000_000, 60_000)
    users, items = options.pick((100_000, 50_000), (5_000, 2_000))
    with RealKafka() as kafka, Project(kafka.bootstrap_servers, **SETTINGS) as project:
        there = population.fill(project.client, project.plan, users, items)
        report.note(f"in Redis before each run of ours: {there.describe()}; the peers' Redis is empty")
        project.client.save()
        report.note(fill_topics(kafka.bootstrap_servers, Traffic(users, items), events))
        ends = ends_of(kafka.bootstrap_servers)
        sides: dict[str, Callable[[], float]] = {"stream": lambda: measure_stream(restored(project), ends)}
        few = dict(zip(PEERS, options.pick((10_000, 200_000, 50_000), (1_000, 20_000, 5_000)), strict=True))
        for name, n in few.items():
            sides[name] = partial(measure_dataflow, name, kafka, _share(ends, n))
        sides["loop"] = lambda: measure_loop(restored(project), kafka, ends)
        now_ms = time.time_ns() // 1_000_000
        of_formats = (events // 2, (users, items), (now_ms - SPAN_MS, now_ms), SETTINGS)
        with formats(kafka.bootstrap_servers, *of_formats) as projects:
            for name, written in projects.items():
                own = ends_of(kafka.bootstrap_servers, topics_of(name))
                sides[name] = partial(_measure_written, written, own)
            rounds = alternate(sides, options)
    report.note(
        "peers on Bytewax, with garbage collection off: "
        + "; ".join(f"{name} in {PEERS[name][0]} process(es), the first {n:,} events" for name, n in few.items())
    )
    ours, loop = Series.of(rounds["stream"]), Series.of(rounds["loop"])
    builtin, per_key, unpipelined = (Series.of(rounds[name]) for name in PEERS)
    report.add("the stream, all shipped views", ours, "events/s", key="events_per_s", at_least=40_000)
    report.add("Bytewax's sliding windows", builtin, "events/s")
    report.add("minute tiles a key, HSETs in a pipeline", per_key, "events/s")
    report.add("minute tiles a key, each HSET by itself", unpipelined, "events/s")
    report.add("a loop around our own kernel", loop, "events/s")
    report.add("against Bytewax's sliding windows", ours / builtin, "times", key="ratio_builtin")
    report.add("against minute tiles a key", ours / per_key, "times", key="ratio_per_key", at_least=10)
    report.add("against minute tiles a key, each HSET by itself", ours / unpipelined, "times")
    report.add("against the loop", ours / loop, "times", key="ratio_loop", at_least=0.5)
    plain, nested, avro = (Series.of(rounds[name]) for name in NAMES)
    report.add("of 40 features, in plain JSON", plain, "events/s")
    report.add(
        "time an event, one nested field of another name against plain",
        plain / nested,
        "times",
        key="nested",
        at_most=1.3,
    )
    report.add(
        "time an event, Avro by a schema registry against plain JSON", plain / avro, "times", key="avro", at_most=1.5
    )


def fill_topics(bootstrap_servers: str, traffic: Traffic, events: int) -> str:
    """Puts events of the last hours into Kafka; says what."""
    now_ms = time.time_ns() // 1_000_000
    size = traffic.fill(bootstrap_servers, events, now_ms - SPAN_MS, now_ms)
    mix = ", ".join(f"{share:.0%} {topic}" for share, topic in zip(SHARES, TOPICS, strict=True))
    return (
        f"in Kafka: {events:,} events of {size / events:.0f} bytes ({mix}), "
        f"{SPAN_MS // 3_600_000} hours of event time, {PARTITIONS} partitions a topic"
    )


def ends_of(bootstrap_servers: str, topics: Iterable[str] = TOPICS) -> dict[str, int]:
    """The offset after the last record of every partition, by `topic/number`."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "bench"})
    try:
        return {
            f"{topic}/{number}": consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)[1]
            for topic in topics
            for number in range(PARTITIONS)
        }
    finally:
        consumer.close()


def _measure_written(project: Project, ends: Mapping[str, int]) -> float:
    """As `measure_stream`, from the beginning."""
    return measure_stream(restored(project), ends)


def measure_stream(project: Project, ends: Mapping[str, int], processes: int = PROCESSES) -> float:
    """Events a second of `headrace stream`, over whatever is in the project's Redis.

    From when the first chunk has been committed, which leaves out starting and compiling, until every shard has
    committed everything; the first chunk's events are left out too.
    """
    with streaming(project, processes) as worker:
        progress = _Progress(project, ends)
        before = worker.wait(lambda: progress.slowest(lanes=processes))
        began_s = time.monotonic()
        worker.wait(progress.is_done)
        return (sum(ends.values()) - before) / (time.monotonic() - began_s)


class Streaming(NamedTuple):
    """A running `headrace stream`."""

    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, condition: Callable[[], T]) -> T:
        """Asks every few milliseconds until the condition gives something; returns it.

        Raises:
            ServerError: if the stream ends before, or takes too long.
        """
        found: list[T] = []

        def there() -> bool:
            found.append(condition())
            return bool(found[-1])

        wait_until_ready(self.process, there, name="headrace stream", log=self.log, timeout_s=DEADLINE_S)
        return found[-1]


@contextmanager
def streaming(project: Project, processes: int = 1) -> Iterator[Streaming]:
    """`headrace stream`, for the length of a `with` block."""
    log = project.folder / "stream.log"
    argv = [sys.executable, "-m", "headrace", "stream", "--processes", str(processes)]
    process = spawn(argv, log=log, env=project.environment())
    try:
        yield Streaming(process, log)
    finally:
        end(process)


class _Progress:
    """How far the stream's commits are, from their records in Redis."""

    def __init__(self, project: Project, ends: Mapping[str, int]) -> None:
        self._client = project.client
        self._keys = _keyspace(project).commit_records(project.plan.stored_entities)
        self._ends = ends
        self._behind = list(self._keys)

    def slowest(self, lanes: int) -> int:
        """How many events the slowest lane has committed, by one shard of each."""
        return min(sum(self._positions(self._keys[lane]).values()) for lane in range(lanes))

    def is_done(self) -> bool:
        """Whether every shard has committed everything. Reads only the first that has not, so as not to disturb."""
        while self._behind and self._positions(self._behind[0]) == self._ends:
            self._behind.pop(0)
        return not self._behind

    def _positions(self, key: bytes) -> dict[str, int]:
        positions: Mapping[str, Position] = read_record(self._client, key).positions
        return {name: positions[name].next for name in self._ends if name in positions}


def restored(project: Project) -> Project:
    """The project with its Redis as it was saved: the population's rows, and commit records that have read nothing."""
    project.redis.stop()
    project.redis.start()
    return project


def rewound(project: Project) -> Project:
    """The project with commit records that have read nothing; its rows stay as they are."""
    keyspace, entities = _keyspace(project), project.plan.stored_entities
    project.client.delete(*keyspace.commit_records(entities))
    initialise(project.client, keyspace, entities)
    return project


def _keyspace(project: Project) -> Keyspace:
    return Keyspace.of(project.plan)


def measure_loop(project: Project, kafka: RealKafka, counts: Mapping[str, int]) -> float:
    """Events a second of the plain loop, over whatever is in the project's Redis, from its first commit to its last."""
    argv = [sys.executable, "-m", "benchmarks.stream_peers"]
    return _measure([argv], kafka, project.redis.url, counts, project.environment())


def measure_dataflow(name: str, kafka: RealKafka, counts: Mapping[str, int]) -> float:
    """Events a second of a peer on Bytewax, from its first chunk until its last result is in an empty Redis."""
    processes, epoch_s = PEERS[name]
    with redis_server() as redis:
        addresses = ";".join(f"127.0.0.1:{free_port()}" for _ in range(processes))
        cluster = [["-i", str(number), "-a", addresses] if processes > 1 else [] for number in range(processes)]
        argv = [sys.executable, "-m", "bytewax.run", "-s", str(epoch_s), f"benchmarks.stream_peers:{name}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return _measure([[*argv, *more] for more in cluster], kafka, redis.url, counts, environment)


def _measure(
    commands: list[list[str]],
    kafka: RealKafka,
    redis_url: str,
    counts: Mapping[str, int],
    environment: Mapping[str, str],
) -> float:
    """Events a second of a peer's processes, from the first event that any has until the last is done with."""
    with tempfile.TemporaryDirectory(prefix="headrace-bench-") as folder:
        work = Work(kafka.bootstrap_servers, redis_url, folder, dict(counts))
        log = Path(folder, "peer.log")
        processes = [spawn(argv, log=log, env={**environment, **work.environment()}) for argv in commands]
        try:
            for process in processes:
                if process.wait(DEADLINE_S) != 0:
                    msg = f"{commands[0]} ended with status {process.returncode}:\n{log.read_text()[-4000:]}"
                    raise RuntimeError(msg)
        finally:
            for process in processes:
                end(process)
        laps = [msgspec.json.decode(path.read_bytes(), type=Lap) for path in Path(folder).glob("*.lap")]
    events = work.events - sum(lap.before for lap in laps)
    return events / (max(lap.ended_s for lap in laps) - min(lap.began_s for lap in laps))


def _share(ends: Mapping[str, int], events: int) -> dict[str, int]:
    """About so many events, of every partition as large a part."""
    total = sum(ends.values())
    return {name: end * events // total for name, end in ends.items()}


BENCHMARK = Benchmark(
    "stream",
    work="events from real Apache Kafka, already filled, into Redis: all shipped views, two cores for everything",
    peer="the same counts by Bytewax's windows, by tiles a key in Python; a plain loop around our kernel",
    keys=("events_per_s", "ratio_builtin", "ratio_per_key", "ratio_loop", "nested", "avro"),
    run=run,
)

if __name__ == "__main__":
    main(BENCHMARK)
