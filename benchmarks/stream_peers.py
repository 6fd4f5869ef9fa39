"""What a user would build instead of the stream: three peers that read the same topics and write to the same Redis.

`builtin` and `per_key` are Bytewax dataflows, run as `python -m bytewax.run benchmarks.stream_peers:builtin`; `loop` is
a plain loop around our own decoder and lane, run as `python -m benchmarks.stream_peers`. All end by themselves after
`Work.events` events, and leave a `Lap` for each process in `Work.folder`.

`builtin` and `per_key` do less than the stream does: they only count impressions, clicks and likes, for each user, item
and seller, over 10m, 1h, 24h and 7d. They check no contract, see no duplicates, write no dead letters, keep no offsets,
and lose their state when they stop.
"""

from __future__ import annotations

import atexit
import gc
import os
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, TypeVar

import bytewax.operators as op
import bytewax.operators.windowing as win
import msgspec
import redis
from bytewax.dataflow import Dataflow
from bytewax.inputs import FixedPartitionedSource, StatefulSourcePartition
from bytewax.operators import KeyedStream, StatefulBatchLogic
from bytewax.outputs import DynamicSink, StatelessSinkPartition
from confluent_kafka import Consumer, TopicPartition

from benchmarks.traffic import TOPICS

T = TypeVar("T")

VARIABLE: Final = "HEADRACE_BENCH_WORK"
MINUTES: Final = {"10m": (10, 1), "1h": (60, 5), "24h": (1440, 60), "7d": (10080, 360)}
"""Windows and their hops, in minutes: what the window rule of the catalogue gives."""
LATE: Final = timedelta(minutes=30)
"""How long `builtin` waits for late events: partitions are not read in step."""
_EMPTY_S: Final = 0.002


class Work(msgspec.Struct, frozen=True):
    """What a peer is to do; passed to its processes as JSON in the variable `VARIABLE`."""

    kafka: str
    redis_url: str
    folder: str
    counts: dict[str, int]
    """How many events to read of each partition, by `topic/number`."""
    chunk: int = 10_000
    """How many events to read at once, over all partitions."""

    @property
    def events(self) -> int:
        """How many events there are to read."""
        return sum(self.counts.values())

    def environment(self) -> dict[str, str]:
        """The variable that a peer's process needs."""
        return {VARIABLE: msgspec.json.encode(self).decode()}

    @classmethod
    def read(cls) -> Work:
        """The work of this process."""
        return msgspec.json.decode(os.environ[VARIABLE], type=cls)


class Lap(msgspec.Struct):
    """When a process had its first events and when it was done with its last, in seconds of `time.monotonic`.

    `before` events were dealt with before, and don't count.
    """

    began_s: float = 0.0
    ended_s: float = 0.0
    before: int = 0

    def begin(self) -> None:
        """The first events are here."""
        self.began_s = self.began_s or time.monotonic()

    def end(self) -> None:
        """All events so far are done with."""
        self.ended_s = time.monotonic()

    def save(self, folder: str) -> None:
        """Leaves the lap for the benchmark to read."""
        if self.began_s:
            Path(folder, f"{os.getpid()}.lap").write_bytes(msgspec.json.encode(self))


class Seen(msgspec.Struct, gc=False):
    """The fields of an event that counting needs; msgspec passes over the others."""

    user_id: str
    item_id: str
    occurred_at: int
    seller_id: str | None = None


Batch = tuple[int, list[bytes]]
"""Records of one topic (its position in `TOPICS`)."""


class Batches(FixedPartitionedSource[Batch, None]):
    """Chunks of raw records: three times as fast as Bytewax's own KafkaSource, which makes an object of every message.

    A partition's share of a chunk is its share of the events: otherwise the partitions with few events would run ahead
    in event time, and make those of the others late.
    """

    def __init__(self, work: Work, lap: Lap) -> None:
        self._work = work
        self._lap = lap

    def list_parts(self) -> list[str]:
        """See `FixedPartitionedSource`."""
        return [name for name, count in self._work.counts.items() if count]

    def build_part(self, step_id: str, for_part: str, resume_state: None) -> StatefulSourcePartition[Batch, None]:
        """See `FixedPartitionedSource`."""
        return _Batches(self._work, self._lap, for_part)


class _Batches(StatefulSourcePartition[Batch, None]):
    def __init__(self, work: Work, lap: Lap, name: str) -> None:
        topic, _, number = name.rpartition("/")
        self._topic = TOPICS.index(topic)
        self._left = work.counts[name]
        self._share = max(1, work.chunk * self._left // work.events)
        self._lap = lap
        self._consumer = Consumer(
            {
                "bootstrap.servers": work.kafka,
                "group.id": "peer",
                "enable.auto.commit": False,
                "fetch.wait.max.ms": 5,
                "queued.max.messages.kbytes": 32_768,
            }
        )
        self._consumer.assign([TopicPartition(topic, int(number), 0)])
        self._empty = False

    def next_batch(self) -> Iterable[Batch]:
        if not self._left:
            raise StopIteration
        messages = self._consumer.consume(min(self._share, self._left), timeout=0)
        self._empty = not messages
        if self._empty:
            return []
        self._lap.begin()
        self._left -= len(messages)
        return [(self._topic, [message.value() or b"" for message in messages])]

    def next_awake(self) -> datetime | None:
        return datetime.now(UTC) + timedelta(seconds=_EMPTY_S) if self._empty else None

    def snapshot(self) -> None:
        return None

    def close(self) -> None:
        self._consumer.close()


class Hashes(DynamicSink[Any]):
    """One HSET a result; all that are waiting in one pipeline, unless each is to be sent by itself."""

    def __init__(self, work: Work, lap: Lap, *, pipelined: bool = True) -> None:
        self._work = work
        self._lap = lap
        self._pipelined = pipelined

    def build(self, step_id: str, worker_index: int, worker_count: int) -> StatelessSinkPartition[Any]:
        """See `DynamicSink`."""
        return _Hashes(self._work, self._lap, self._pipelined)


class _Hashes(StatelessSinkPartition[tuple[str, tuple[Any, ...]]]):
    def __init__(self, work: Work, lap: Lap, pipelined: bool) -> None:
        self._redis: Any = redis.Redis.from_url(work.redis_url)
        self._lap = lap
        self._pipelined = pipelined

    def write_batch(self, items: list[tuple[str, tuple[Any, ...]]]) -> None:
        # execute_command, as hset(mapping=) would build one more dictionary and list a call.
        to = self._redis.pipeline(transaction=False) if self._pipelined else self._redis
        for key, fields in items:
            to.execute_command("HSET", key, *fields)
        if self._pipelined:
            to.execute()
        self._lap.end()


def _start(name: str) -> tuple[Dataflow, Work, Lap]:
    work, lap = Work.read(), Lap()
    atexit.register(lap.save, work.folder)
    # Nothing here makes cycles, and looking for them among a million objects takes a third of the time.
    gc.disable()
    return Dataflow(name), work, lap


def _by_key(when: Callable[[int], T]) -> Callable[[list[Batch]], list[tuple[str, tuple[int, T]]]]:
    """Decodes batches: for each event (topic, `when` of its time) by user, item and seller."""
    decoder = msgspec.json.Decoder(Seen)

    def decode(batches: list[Batch]) -> list[tuple[str, tuple[int, T]]]:
        found = []
        for topic, values in batches:
            for value in values:
                event = decoder.decode(value)
                seen = (topic, when(event.occurred_at))
                found.append(("user:" + event.user_id, seen))
                found.append(("item:" + event.item_id, seen))
                if event.seller_id is not None:
                    found.append(("seller:" + event.seller_id, seen))
        return found

    return decode


# --- (1) Bytewax's built-in sliding windows -----------------------------------------------------------------------


def builtin() -> Dataflow:
    """The counts by `fold_window` over `SlidingWindower`s: a window's counts are written when it closes.

    One keyed stream for users, items and sellers and one fold of three counts a window are the fewest operators that do
    it. Windows that are open when the input ends are left so: they would close in time.
    """
    flow, work, lap = _start("builtin")
    batches = op.input("kafka", flow, Batches(work, lap))
    seen: KeyedStream[tuple[int, datetime]] = op.flat_map_batch(
        "decode", batches, _by_key(lambda ms: datetime.fromtimestamp(ms / 1000, UTC))
    )
    for name, (minutes, hop) in MINUTES.items():
        folded = win.fold_window(
            f"fold_{name}",
            seen,
            # As for when windows close, Bytewax's default would wake the worker all the time in event time's past.
            _LastClock(itemgetter(1), LATE, to_system_utc=lambda _: None, work=work, lap=lap),
            win.SlidingWindower(
                timedelta(minutes=minutes), timedelta(minutes=hop), align_to=datetime(2020, 1, 1, tzinfo=UTC)
            ),
            lambda: [0, 0, 0],
            _count,
            lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
            ordered=False,
        )
        fields = tuple(f"{topic}_{name}" for topic in TOPICS)
        written = op.map(f"fields_{name}", folded.down, _fields(fields))
        op.output(f"redis_{name}", written, Hashes(work, lap))
    return flow


def _count(counts: list[int], seen: tuple[int, datetime]) -> list[int]:
    counts[seen[0]] += 1
    return counts


def _fields(names: tuple[str, ...]) -> Any:
    def of(result: tuple[str, tuple[int, list[int]]]) -> tuple[str, tuple[Any, ...]]:
        key, (_, counts) = result
        return key, (names[0], counts[0], names[1], counts[1], names[2], counts[2])

    return of


@dataclass
class _LastClock(win.EventClock[Any]):
    """An EventClock for which the end of the input is the end of the process: a stream would not close its windows."""

    work: Work | None = None
    lap: Lap | None = None

    def build(self, resume_state: Any) -> Any:
        """See `Clock.build`."""
        logic = super().build(resume_state)
        work, lap = self.work, self.lap

        def on_eof() -> datetime:
            # The first key to hear of the end does so when all events have been folded.
            if work and lap:
                lap.end()
                lap.save(work.folder)
            os._exit(0)

        logic.on_eof = on_eof  # type: ignore[method-assign]  # bytewax's class is private: there is none to derive from
        return logic


# --- (2) minute tiles a key ------------------------------------------------------------------------------------------


def per_key(*, pipelined: bool = True) -> Dataflow:
    """Minute tiles of each key in Python, with running totals of the windows; a key is written once a batch."""
    flow, work, lap = _start("per_key")
    batches = op.input("kafka", flow, Batches(work, lap))
    seen: KeyedStream[tuple[int, int]] = op.flat_map_batch("decode", batches, _by_key(lambda ms: ms // 60_000))
    counted = op.stateful_batch("tiles", seen, lambda _: Tiles())
    op.output("redis", counted, Hashes(work, lap, pipelined=pipelined))
    return flow


_NAMES: Final = tuple(f"{topic}_{window}" for window in MINUTES for topic in TOPICS)
_WINDOWS: Final = tuple(enumerate(MINUTES.values()))


class Tiles(StatefulBatchLogic[tuple[int, int], tuple[Any, ...], None]):
    """One key's counts: a sorted list of minutes with three counts each, and what every window holds of them.

    A window's total changes by what comes in and by the tiles that it leaves behind, so that the work for a batch does
    not depend on how many tiles there are. The end of the key's windows is its latest event.
    """

    __slots__ = ("_counts", "_first", "_minutes", "_totals")

    def __init__(self) -> None:
        self._minutes: list[int] = []
        self._counts: list[list[int]] = []
        self._first = [0] * len(_WINDOWS)
        """The first tile inside each window."""
        self._totals = [0] * (3 * len(_WINDOWS))

    def on_batch(self, values: list[tuple[int, int]]) -> tuple[Iterable[tuple[Any, ...]], bool]:
        """Takes (topic, minute) pairs in; gives the fields of an HSET."""
        for topic, minute in values:
            self._add(topic, minute)
        minutes, counts, first, totals = self._minutes, self._counts, self._first, self._totals
        now = minutes[-1]
        for number, (width, hop) in _WINDOWS:
            tail = (now - width) // hop * hop
            at = first[number]
            while minutes[at] < tail:
                for topic in range(3):
                    totals[3 * number + topic] -= counts[at][topic]
                at += 1
            first[number] = at
        if first[-1] > 1000:
            gone = first[-1]
            del minutes[:gone], counts[:gone]
            self._first = [at - gone for at in first]
        fields = [None] * 24
        fields[::2] = _NAMES  # type: ignore[assignment]  # names and numbers in turn
        fields[1::2] = totals  # type: ignore[assignment]  # as above
        return (tuple(fields),), StatefulBatchLogic.RETAIN

    def snapshot(self) -> None:
        """Without a recovery store nothing asks for it."""

    def _add(self, topic: int, minute: int) -> None:
        minutes, first, totals = self._minutes, self._first, self._totals
        if not minutes or minute > minutes[-1]:
            minutes.append(minute)
            self._counts.append([0, 0, 0])
            at = len(minutes) - 1
        else:
            at = bisect_left(minutes, minute)
            if minutes[at] != minute:
                minutes.insert(at, minute)
                self._counts.insert(at, [0, 0, 0])
                # A tile before a window's first is outside; any other is inside until `on_batch` leaves it behind.
                self._first = first = [tile + (at < tile) for tile in first]
        self._counts[at][topic] += 1
        for number, tile in enumerate(first):
            if at >= tile:
                totals[3 * number + topic] += 1


# --- (3) a plain loop around our own kernel --------------------------------------------------------------------------


def loop() -> None:
    """Reads, decodes, merges and commits until all is committed, without Bytewax; settings are HEADRACE_* variables."""
    from config.settings import Settings
    from store.connect import connect
    from store.plans import load_plan
    from streams.decode import Decoder
    from streams.kafka import WorkerReader, records_of
    from streams.lane import Lane

    settings, work, lap = Settings(), Work.read(), Lap()
    plan = load_plan(settings)
    client = connect(settings.redis_url.get_secret_value(), settings.redis_timeout_s)
    decoder = Decoder(plan, 1, settings.dedupe_s * 1000)
    lane = Lane(plan, 0, 1, client, cache_bytes_max=settings.row_cache_mb * 1_000_000)
    reader = WorkerReader(
        settings, plan, lambda partition: str(partition) in work.counts, partial(records_of, plan, client)
    )
    left = work.events
    while left:
        parts = []
        chunks = reader.next_chunks()
        for chunk, decoded in zip(chunks, decoder.decode_all(chunks), strict=True):
            if decoded.dead_letters:
                msg = f"the benchmark sends good events only, and one was refused: {decoded.dead_letters[0].reason}"
                raise ValueError(msg)
            left -= len(chunk.values)
            parts += decoded.parts
        if not parts:
            time.sleep(_EMPTY_S)
            continue
        lane.start(parts)
        if not lap.began_s and left < work.events:
            # As the stream is measured: what has to be compiled has been, once the first events are committed.
            lane.settle()
            lap.begin()
            lap.before = work.events - left
    lane.settle()
    lap.end()
    reader.close()
    lap.save(work.folder)


if __name__ == "__main__":
    loop()
