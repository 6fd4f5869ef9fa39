"""The tail of the log: what Kafka has and the archive not yet, read once up to its end."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from config.brokers import PASSING
from config.settings import DEAD_LETTER_SUFFIX, Settings
from features.plan import Plan
from store.commit import CommitRecord, Position
from streams.archive import ArchivePart, parts_of
from streams.chunk import Chunk, Partition
from streams.decode import Decoder
from streams.kafka import (
    TopicChangedError,
    TopicIds,
    columns_of,
    consumer_of,
    headers_of,
    is_out_of_range,
    need_headers,
    partitions_of,
    start_of,
)
from streams.schemas import Schemas

_TIMEOUT_S = 30.0
_TEXTS = re.compile(rb'"((?:[^"\\]|\\.)*)"', re.DOTALL)
log = structlog.get_logger()


@dataclass
class _Heard:
    """Of a partition: records, and whether they are its last, or the next that was asked for is not there."""

    messages: list[Any] = field(default_factory=list)
    ended: bool = False
    out_of_range: bool = False


class Tail:
    """The accepted events of topics after a record's positions, up to where each partition ends now. Once, by `with`.

    What retention took before the archive had it is said, as the stream says it. `has` says of a contract and a
    partition before which offset its events are there already, where that is beyond the record's.

    Attributes:
        n_records: about how many records it will read.
        gaps: topics of which records before those it reads are nowhere any more.
        ends: the offset after the last record that it reads, of partitions that have any to read.
        record: what the archive and all that was read include.
        recorded_ms: when the broker had the last that was read.

    Raises:
        KafkaException: if the broker can't be reached.
        LogLostError: if a topic ends before the record's position.
        TopicChangedError: if a topic is another than the record's.
        TimeoutError: if the broker answers no more.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        topics: Sequence[str],
        record: CommitRecord,
        has: Mapping[tuple[str, str], int] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._plan, self._clock, self._has = settings, plan, clock, has
        known = TopicIds(settings, topics).known
        for topic, topic_id in known.items():
            if other := record.of_other_topic(topic, topic_id):
                raise TopicChangedError(topic, other, topic_id)
        self._decoder = Decoder(plan, 1, settings.dedupe_s * 1000, Schemas(settings))
        self._at: dict[Partition, int] = {}
        self._fresh: dict[Partition, int] = {}
        self.ends: dict[Partition, int] = {}
        self.n_records, self.recorded_ms, self.gaps, self.record = 0, 0, set[str](), record.advanced("", {}, known)
        self._consumer = consumer_of(settings, **{"enable.partition.eof": True})
        try:
            for each in partitions_of(settings, topics):
                low, high = self._consumer.get_watermark_offsets(TopicPartition(*each), timeout=_TIMEOUT_S)
                start = start_of(each, [record.position(*each)], low, high)
                if record.position(*each) is None and low:
                    self.gaps.add(each.topic)
                if start.lost:
                    self._lost(each, *start.lost)
                if start.fresh < high:
                    self._at[each], self._fresh[each], self.ends[each] = start.at, start.fresh, high
                    self.n_records += high - start.at
        except BaseException:
            self._consumer.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._consumer.close()

    def __iter__(self) -> Iterator[ArchivePart]:
        for each, messages in read_to(self._consumer, self._settings, self._at, self.ends, self._passed, self._clock):
            start_at, end_at = self._at[each], messages[-1].offset() + 1
            self._at[each] = end_at
            headers = headers_of(messages) if need_headers(self._plan, each.topic) else []
            chunk = Chunk(each, start_at, end_at, self._fresh[each], *columns_of(messages), headers=headers)
            parts = parts_of(self._decoder.check_all([chunk])[0])
            self.recorded_ms = max(self.recorded_ms, parts[0].record_ms_max)
            self.record = self.record.advanced("", {str(each): Position(parts[0].end, parts[0].horizon)})
            for part in parts:
                yield part.without(self._has.get((part.spec.name, str(each)), 0))

    def _passed(self, each: Partition, low: int) -> None:
        """The broker has nothing before an offset any more: it was deleted while what came before was read."""
        begin = max(self._at[each], self._fresh[each])
        if low > begin:
            self._lost(each, begin, low)
        self._at[each] = max(self._at[each], low)

    def _lost(self, each: Partition, begin: int, end: int) -> None:
        self.gaps.add(each.topic)
        log.error("records_lost", partition=str(each), first=begin, last=end - 1, reason="retention")


def read_to(
    consumer: Consumer,
    settings: Settings,
    starts: Mapping[Partition, int],
    ends: Mapping[Partition, int],
    passed: Callable[[Partition, int], object] = lambda _partition, _low: None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[tuple[Partition, list[Any]]]:
    """The records of partitions from their starts up to their ends, as they come.

    Args:
        consumer: says where a partition ends (`enable.partition.eof`).
        settings: the settings.
        starts: the first offset of each.
        ends: the offset after the last of each.
        passed: is told of a partition of which records were deleted before they were read, and what it has from.
        clock: seconds.

    Raises:
        KafkaException: if the broker does not give them.
        TimeoutError: if it answers no more.
    """
    open_ = set(starts)
    consumer.incremental_assign([TopicPartition(*each, offset) for each, offset in starts.items()])
    while open_:
        for each, heard in _next(consumer, settings, clock).items():
            if each not in open_:
                continue  # What was on its way.
            messages = heard.messages
            if messages:
                yield each, messages
            # Where records keep coming, there never is an end.
            if heard.ended or (messages and messages[-1].offset() + 1 >= ends[each]):
                open_.discard(each)
                consumer.incremental_unassign([TopicPartition(*each)])
            elif heard.out_of_range:
                low, _ = consumer.get_watermark_offsets(TopicPartition(*each), timeout=_TIMEOUT_S)
                passed(each, low)
                consumer.incremental_unassign([TopicPartition(*each)])
                consumer.incremental_assign([TopicPartition(*each, low)])


def _next(consumer: Consumer, settings: Settings, clock: Callable[[], float]) -> dict[Partition, _Heard]:
    """The next that is heard of some partitions."""
    until_s = clock() + _TIMEOUT_S
    while clock() < until_s:
        found: dict[Partition, _Heard] = {}
        for message in consumer.consume(settings.chunk_events, timeout=0.5):
            error, each = message.error(), Partition(str(message.topic()), int(message.partition() or 0))
            if error is None:
                found.setdefault(each, _Heard()).messages.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                found.setdefault(each, _Heard()).ended = True
            elif is_out_of_range(message):
                found.setdefault(each, _Heard()).out_of_range = True
            elif error.fatal() or error.code() not in PASSING:
                raise KafkaException(error)
        if found:
            return found
    msg = f"Kafka at {settings.kafka} has said nothing for {_TIMEOUT_S:g} s: is it up? `headrace doctor` looks"
    raise TimeoutError(msg)


def letters_about(settings: Settings, topics: Iterable[str], ids: Iterable[str]) -> Iterator[str]:
    """Which dead letters have one of these ids as a text, in whatever field: where each is, and why it was refused."""
    named = {json.dumps(each, ensure_ascii=ascii_)[1:-1].encode() for each in ids for ascii_ in (True, False)}
    consumer = consumer_of(settings, **{"enable.partition.eof": True})
    try:
        starts, ends = {}, {}
        for each in partitions_of(settings, [topic + DEAD_LETTER_SUFFIX for topic in topics]):
            low, high = consumer.get_watermark_offsets(TopicPartition(*each), timeout=_TIMEOUT_S)
            if low < high:
                starts[each], ends[each] = low, high
        for each, messages in read_to(consumer, settings, starts, ends):
            for message in messages:
                if not named.isdisjoint(_TEXTS.findall(message.value() or b"")):
                    headers = {name: value.decode(errors="replace") for name, value in message.headers() or () if value}
                    why = headers.get("reason", "")
                    yield f"{each}/{message.offset()}, of {headers.get('origin', 'an unknown record')}: {why}"
    finally:
        consumer.close()
