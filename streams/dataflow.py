"""The dataflows, for `streams.worker` or `python -m bytewax.run streams.dataflow:flow -s 1`: all that knows Bytewax.

    partitions of all topics ──> decode ──────────────────> lanes
      a chunk of raw records     contract, dead letters,     merge(rows, events)
                                 duplicates, split by lane   commit = rows + offsets

    partitions of all topics ──> check ───────────────────> tables
      a chunk of raw records     contract, duplicates        commit = events + offsets

State is in Redis alone, or in the archive: there is no recovery store, and a worker that stops for any reason is
started again.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from types import FrameType
from typing import Any, NamedTuple

import bytewax.operators as op
import redis
import structlog
from bytewax._bytewax import cli_main
from bytewax.dataflow import Dataflow
from bytewax.inputs import DynamicSource, StatelessSourcePartition
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from confluent_kafka import KafkaException
from redis.exceptions import AuthenticationError, ClusterDownError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from config.brokers import PASSING
from config.imports import keep_pandas_out
from config.logs import set_up_logs
from config.settings import Settings
from features.plan import Plan
from store.commit import FencedError
from store.connect import connect
from store.plans import layouts_of, load_plan
from streams.chunk import Chunk, Part, Partition
from streams.decode import Decoder
from streams.kafka import DeadLetters, Records, TopicIds, WorkerReader, records_of
from streams.lane import Lane
from streams.metrics import METRICS
from streams.schemas import Schemas
from streams.supervise import SUPERSEDED_STATUS, WAITING_STATUS

_WAIT_S = 0.002
"""An idle worker waits for records, and wakes with the first; other workers' parts wait for it no longer than this."""
DRAIN_S = 7
"""A worker that is told to stop takes no longer than this for its last commits; Redis or another worker may be away."""

_EPOCH = timedelta(seconds=1)
_PAUSE = timedelta(seconds=0.1)
"""Who is patient takes records so often, while few come."""
_FEW = 1_000

_stopping: list[int] = []

log = structlog.get_logger()


def flow(number: int | None = None, on_claimed: Callable[[Plan], object] = lambda _: None) -> Dataflow:
    """The stream's dataflow of an applied plan, by default the newest, with settings from HEADRACE_* variables.

    SIGTERM or SIGINT ends it once what was read is committed. `on_claimed` is called for each lane whose shards it has.
    """
    settings, plan, client = _begin(number)
    dataflow = Dataflow("headrace")
    chunks = op.input("kafka", dataflow, ChunkSource(settings, plan, partial(records_of, plan, client)))
    parts = op.flat_map_batch("decode", chunks, DecodeStep(settings, plan))
    op.output("lanes", parts, Sink(settings.lanes, Lanes(settings, plan, on_claimed)))
    return dataflow


def archive_flow(number: int | None = None, on_claimed: Callable[[Plan], object] = lambda _: None) -> Dataflow:
    """As `flow`, the archive's: what is claimed are the tables of a lane."""
    from streams.archive import Archiver, archived, parts_of

    settings, plan, client = _begin(number)
    decoder, topics = Decoder(plan, 1, settings.dedupe_s * 1000, Schemas(settings)), list(plan.topics)
    lane_of = {topic: at % settings.lanes for at, topic in enumerate(topics)}

    def check(chunks: list[Chunk]) -> list[tuple[str, Any]]:
        with _failures_said():
            return [
                (_lane_key(lane_of[checked.chunk.partition.topic]), part)
                for checked in decoder.check_all(chunks)
                if not checked.chunk.start < checked.chunk.end <= checked.chunk.fresh
                for part in parts_of(checked)
            ]

    def make(number: int) -> Target:
        mine = [topic for topic in topics if lane_of[topic] == number]
        archiver = Archiver(settings, plan, mine, client, confirm=TopicIds(settings, mine).ask)
        log.info("tables_claimed", topics=mine, plan=plan.fingerprint)
        # To lanes of no topic no part ever comes: the first speaks for them.
        for _ in range(1 if number else 1 + max(0, settings.lanes - len(topics))):
            on_claimed(plan)
        return Target(archiver.start, archiver.settle)

    dataflow = Dataflow("headrace_archive")
    chunks = op.input(
        "kafka", dataflow, ChunkSource(settings, plan, partial(archived, settings, plan, client), patient=True)
    )
    parts = op.flat_map_batch("check", chunks, check)
    op.output("tables", parts, Sink(settings.lanes, make))
    return dataflow


def _begin(number: int | None) -> tuple[Settings, Plan, redis.Redis]:
    """What every dataflow needs."""
    keep_pandas_out()
    settings = Settings()
    set_up_logs(as_json=settings.log_json)
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    with _failures_said():
        plan = load_plan(settings, number=number)
    # A chunk makes a hundred thousand objects, none of them in a cycle: looking for cycles took a tenth of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    # The commit's thread waits for the interpreter as long as this, before it sends what is ready: 5 ms by default.
    sys.setswitchinterval(0.0005)
    return settings, plan, connect(settings.redis_url.get_secret_value(), settings.redis_timeout_s)


def run(dataflow: Dataflow, number: int | None, addresses: list[str] | None) -> None:
    """Runs the dataflow to its end, as one process, or as one of those at some addresses."""
    cli_main(dataflow, process_id=number, addresses=addresses, epoch_interval=_EPOCH)  # type: ignore[no-untyped-call]  # it has no types


def _stop(number: int, _frame: FrameType | None) -> None:
    if not _stopping:
        # By the kernel, whatever this process waits for then: all that matters is in Redis.
        signal.alarm(DRAIN_S)
    _stopping.append(number)


class ChunkSource(DynamicSource[Chunk]):
    """All partitions of all topics of the plan; each worker reads a share of them."""

    def __init__(self, settings: Settings, plan: Plan, records: Records, *, patient: bool = False) -> None:
        self._settings = settings
        self._plan = plan
        self._records = records
        self._patient = patient

    def build(self, step_id: str, worker_index: int, worker_count: int) -> StatelessSourcePartition[Chunk]:
        topics = list(self._plan.topics)

        def is_mine(partition: Partition) -> bool:
            # By the partition alone: workers that don't see the same ones yet still agree on who reads which.
            return (topics.index(partition.topic) + partition.number) % worker_count == worker_index

        with _failures_said():
            reader = WorkerReader(self._settings, self._plan, is_mine, self._records, patient=self._patient)
            return _WorkerChunks(reader, _PAUSE if self._patient else timedelta())


class _WorkerChunks(StatelessSourcePartition[Chunk]):
    def __init__(self, reader: WorkerReader, pause: timedelta, clock: Callable[..., datetime] = datetime.now) -> None:
        self._reader = reader
        self._pause = pause
        self._clock = clock
        self._n_records = 0

    def next_batch(self) -> Iterable[Chunk]:
        if _stopping:
            raise StopIteration
        with _failures_said():
            chunks = self._reader.next_chunks(0.0 if self._n_records or self._pause else _WAIT_S)
        self._n_records = sum(len(chunk.values) for chunk in chunks)
        return chunks

    def next_awake(self) -> datetime | None:
        return self._clock(UTC) + (self._pause if self._n_records < _FEW else timedelta())

    def close(self) -> None:
        self._reader.close()


class DecodeStep:
    """Chunks to lane parts; a chunk goes on once its dead letters are written."""

    def __init__(self, settings: Settings, plan: Plan) -> None:
        self._settings = settings
        self._decoder = Decoder(plan, settings.lanes, settings.dedupe_s * 1000, Schemas(settings))
        self._dead_letters: DeadLetters | None = None

    def __call__(self, chunks: list[Chunk]) -> list[tuple[str, Part]]:
        with _failures_said():
            return self._decoded(chunks)

    def _decoded(self, chunks: list[Chunk]) -> list[tuple[str, Part]]:
        out: list[tuple[str, Part]] = []
        for chunk, decoded in zip(chunks, self._decoder.decode_all(chunks), strict=True):
            if decoded.dead_letters:
                self._dead_letters = self._dead_letters or DeadLetters(self._settings)
                self._dead_letters.write(decoded.dead_letters)
            METRICS.decoded(chunk.partition.topic, decoded)
            if not chunk.start < chunk.end <= chunk.fresh:  # What all shards have would only have lanes claim them.
                out += [(_lane_key(lane), part) for lane, part in enumerate(decoded.parts)]
        return out


class Sink(FixedPartitionedSink[Any, None]):
    """A partition a lane, made with its first part: until then, who has what it claims writes on."""

    def __init__(self, lanes: int, make: Callable[[int], Target]) -> None:
        self._lanes, self._make = lanes, make

    def list_parts(self) -> list[str]:
        return [_lane_key(lane) for lane in range(self._lanes)]

    def part_fn(self, item_key: str) -> int:
        return int(item_key)

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> StatefulSinkPartition[Any, None]:
        return _SinkPartition(partial(self._make, int(for_part)))


class _SinkPartition(StatefulSinkPartition[Any, None]):
    def __init__(self, make: Callable[[], Target]) -> None:
        self._make = make
        self._made: Target | None = None

    def write_batch(self, items: list[Any]) -> None:
        with _failures_said():
            self._made = self._made or self._make()
            self._made.start(items)

    def close(self) -> None:
        if self._made is not None:
            with _failures_said():
                self._made.settle()

    def snapshot(self) -> None:
        return None


class Target(NamedTuple):
    """What writes the parts of a lane, and what returns once they are written."""

    start: Callable[[list[Any]], object]
    settle: Callable[[], None]


class Lanes:
    """Makes the stream's lanes, each once it is to claim its shards."""

    def __init__(self, settings: Settings, plan: Plan, on_claimed: Callable[[Plan], object]) -> None:
        self._settings, self._plan, self._on_claimed = settings, plan, on_claimed
        self._ids: TopicIds | None = None

    def __call__(self, number: int) -> Target:
        settings, plan = self._settings, self._plan
        client = connect(settings.redis_url.get_secret_value(), settings.redis_timeout_s)
        cache_bytes_max = settings.row_cache_mb * 1_000_000 // settings.lanes
        self._ids = self._ids or TopicIds(settings, plan.topics)
        lane = Lane(
            plan,
            number,
            settings.lanes,
            client,
            layouts=layouts_of(client, plan),
            cache_bytes_max=cache_bytes_max,
            confirm=self._ids.ask,
        )
        log.info("lane_claimed", lane=number, plan=plan.fingerprint)
        self._on_claimed(plan)

        def start(parts: list[Part]) -> None:
            written = lane.start(parts)
            METRICS.committed(written.rows, written.evicted)

        return Target(start, lane.settle)


@contextmanager
def _failures_said() -> Iterator[None]:
    """Logs what ends this worker: of several, Bytewax often says only that another one has gone."""
    try:
        yield
    except FencedError as error:
        log.critical("writer_stops", reason=str(error))
        # At once, with a status that the supervisor knows: all that matters is in Redis.
        os._exit(SUPERSEDED_STATUS if error.superseded else 1)
    except Exception as error:  # noqa: BLE001  # whatever it is, there is nobody else to say it
        what = f"{type(error).__name__}: {error}"
        if _heals(error):
            log.warning("worker_stops", error=what, reason="it will pass: others start when it has")
            os._exit(WAITING_STATUS)
        # A panic of Bytewax's would say all this three times over.
        log.critical("worker_fails", error=what, trace=traceback.format_exc())
        os._exit(1)


def _heals(error: Exception) -> bool:
    """Whether what failed goes by itself: Redis or Kafka are away, loading, or somebody else's just now."""
    if isinstance(error, KafkaException):
        return error.args[0].code() in PASSING or error.args[0].retriable()
    return isinstance(
        error, OSError | RedisConnectionError | RedisTimeoutError | ReadOnlyError | ClusterDownError
    ) and (not isinstance(error, AuthenticationError))


def _lane_key(lane: int) -> str:
    """Sorts as the numbers do: Bytewax orders partitions by name."""
    return f"{lane:04d}"
