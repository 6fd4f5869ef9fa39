"""Kafka as the stream sees it: where to start in a partition, chunks of raw records, dead letters. Knows no Bytewax."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import redis
import structlog
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

from config.brokers import PASSING, is_embedded, topics_there
from config.settings import DEAD_LETTER_BYTES_MAX, DEAD_LETTER_SUFFIX, Settings
from features.plan import Plan
from store.commit import CommitRecord, Position, Writer, read_record
from store.keys import Keyspace
from streams.chunk import FILL_S, Chunk, DeadLetter, Ints, Partition
from streams.metrics import METRICS

IDLE_S = 1.0
"""A partition without records says so this often, so that its shards' offsets move on."""
LOOK_S = 30.0
"""A worker looks this often whether a topic has gained partitions."""
_LOOK_TIMEOUT_S = 0.5
"""No record is read meanwhile. A broker that takes longer is asked again the next time."""
_PATIENT = {"fetch.wait.max.ms": 100, "fetch.min.bytes": 100_000}
_LAG_S = 1.0
_KAFKA_TIMEOUT_S = 15.0
_IDS_TIMEOUT_S = 3.0
_NO_ID = "A" * 22
"""How a broker of before 2.8 is understood."""
_LETTER_VALUE_BYTES_MAX = DEAD_LETTER_BYTES_MAX - 65_536
"""What is longer is cut, with its length in a header: a letter that can't be written would stop the stream for good."""

log = structlog.get_logger()

Records = Callable[[], Sequence[CommitRecord]]
"""What there is of the log already, in every place that it goes to."""


class LogLostError(RuntimeError):
    """A topic ends before what was already committed from it."""


class TopicChangedError(RuntimeError):
    """A topic is not the one that was read before, but was made anew under its name."""

    def __init__(self, topic: str, known: str, found: str) -> None:
        super().__init__(
            f"topic {topic} was made anew: what was read is of the topic with id {known}, and there is {found} now. If "
            f"that is as meant, run `headrace accept-topic {topic}`: the stream then reads it from its beginning, and "
            "features keep what they have of the old one"
        )


class DeadLettersError(RuntimeError):
    """A dead letter could not be written, so the chunk that it is from must not be committed."""


def partitions_of(settings: Settings, topics: Iterable[str]) -> list[Partition]:
    """All partitions of the topics.

    Raises:
        KafkaException: if the broker can't be reached, does not let us in, or a topic isn't there.
    """
    found = []
    for topic, metadata in topics_there(settings, _KAFKA_TIMEOUT_S, topics).items():
        if metadata.error is not None:
            raise KafkaException(metadata.error)
        found += [Partition(topic, number) for number in sorted(metadata.partitions)]
    return found


class Start(NamedTuple):
    """Where to start in a partition: read from `at`, count from `fresh` on; `lost` offsets are gone from the broker."""

    at: int
    fresh: int
    lost: tuple[int, int] | None


def start_of(partition: Partition, positions: Sequence[Position | None], low: int, high: int) -> Start:
    """Where to start, by the positions of all shards (None: it has read nothing of it) and what the broker has.

    Raises:
        LogLostError: if the partition ends before an offset that was committed.
    """
    known = [position for position in positions if position is not None]
    ahead = max((position.next for position in known), default=low)
    if ahead > high:
        msg = (
            f"{partition} ends at offset {high}, but offsets up to {ahead} were committed from it: "
            "the broker came back with less, or the topic was made anew under its old name"
        )
        raise LogLostError(msg)
    behind = min((position.next for position in known), default=low)
    # A shard that has read nothing needs all there is, however far the others are.
    fresh = low if len(known) < len(positions) else max(behind, low)
    horizon = min((position.horizon for position in known), default=low)
    return Start(min(max(horizon, low), fresh), fresh, (behind, low) if behind < low else None)


class TopicIds:
    """The ids that Kafka gives topics: each once, so that one which was made anew has another.

    Attributes:
        known: id by topic, as they were at first; none at all if the broker gives none (before 2.8; the embedded one).

    Raises:
        KafkaException: if the broker can't be reached, or a topic is not there.
    """

    def __init__(self, settings: Settings, topics: Iterable[str]) -> None:
        self._settings = settings
        self._client = AdminClient(settings.librdkafka())
        self._topics = TopicCollection(list(topics))
        self.known: dict[str, str] = {}
        if not is_embedded(self._client, _KAFKA_TIMEOUT_S):
            self.known = {topic: found for topic, found in self._wait(self._ask()).items() if found != _NO_ID}
        if not self.known:
            log.warning("topic_ids_unknown", reason="the broker gives none: a topic made anew may go unnoticed")
        self._asked = self._ask() if self.known else None

    def look(self) -> None:
        """Raises TopicChangedError once topics are known to be others than at first; never waits."""
        if self._asked is not None and not wait(self._asked.values(), 0).not_done:
            _check(self.known, self._answer(self._asked) or {})
            self._asked = self._ask()

    def ask(self, expected: Mapping[str, str]) -> Callable[[], None]:
        """Asks whether topics are the ones with these ids. What it gives waits for the answer.

        Raises, when it is waited for:
            TopicChangedError: if one is another.
            KafkaException: if one is gone.
        """
        if not expected:
            return lambda: None
        asked = self._ask()
        return lambda: _check(expected, self._wait(asked))

    def _ask(self) -> dict[str, Future[Any]]:
        asked: dict[str, Future[Any]] = self._client.describe_topics(self._topics, request_timeout=_IDS_TIMEOUT_S)
        return asked

    def _wait(self, asked: dict[str, Future[Any]]) -> dict[str, str]:
        """The ids by topic, however long the broker is away."""
        while (ids := self._answer(asked)) is None:
            asked = self._ask()
        return ids

    def _answer(self, asked: dict[str, Future[Any]]) -> dict[str, str] | None:
        """The ids by topic; None if it has to be asked again."""
        try:
            return {topic: str(each.result(2 * _IDS_TIMEOUT_S).topic_id) for topic, each in asked.items()}
        except KafkaException as error:
            # Who asked later may find that the client went because of who asked first.
            if error.args[0].code() not in (*PASSING, KafkaError._DESTROY):
                raise
            log.warning("topics_unconfirmed", error=str(error))
        except TimeoutError:
            log.warning("topics_unconfirmed", error="no answer in time")
        # It asks the controller alone, and goes on to wait for one that is gone; a new client learns of another.
        self._client = AdminClient(self._settings.librdkafka())
        return None


def _check(expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    for topic, known in expected.items():
        if found.get(topic, known) != known:
            raise TopicChangedError(topic, known, found[topic])


class PartitionReader:
    """Reads one partition from where its shards are, by their `records`, in chunks.

    It starts at the lowest committed offset of all shards, or before it at the offset where the dedupe horizon begins,
    but not below what the broker still has. What retention took away, before or while it reads, is reported as lost,
    and passed over by an empty range, so that the shards move on.

    Raises:
        LogLostError: if the topic ends before the committed offset.
        NotAppliedError: if a commit record is missing.
        TopicChangedError: if what was committed is of another topic than `topic_id`.
    """

    def __init__(
        self,
        settings: Settings,
        partition: Partition,
        records: Records,
        clock: Callable[[], float] = time.monotonic,
        consumer: Any = None,
        topic_id: str = "",
        speak_s: float = IDLE_S,
        *,
        with_headers: bool = False,
    ) -> None:
        self._partition, self._topic_id, self._speak_s = partition, topic_id, speak_s
        self._with_headers = with_headers
        self._chunk_events = settings.chunk_events
        self._clock = clock
        self._spoken_s = clock()
        self._consumer = consumer or consumer_of(settings)
        self._fresh = self._read_ms = 0
        self._held = False
        committed = records()
        for record in committed:
            if other := record.of_other_topic(partition.topic, topic_id):
                raise TopicChangedError(partition.topic, other, topic_id)
        self._begin([record.position(*partition) for record in committed])

    def _begin(self, positions: Sequence[Position | None]) -> None:
        low, high = self._consumer.get_watermark_offsets(TopicPartition(*self._partition), timeout=_KAFKA_TIMEOUT_S)
        start = start_of(self._partition, positions, low, high)
        self._lost, self._fresh, self._at = start.lost, max(start.fresh, self._fresh), start.at
        self._low = low
        if start.lost:
            first, last = start.lost[0], start.lost[1] - 1
            log.error("records_lost", partition=str(self._partition), first=first, last=last, reason="retention")
            METRICS.lost(self._partition, last + 1 - first)
        self._consumer.assign([TopicPartition(*self._partition, start.at)])

    @property
    def is_behind(self) -> bool:
        """Whether it still reads what was committed before; not if that does not come, as it is gone by now."""
        return self._at < self._fresh and self._clock() - self._spoken_s < IDLE_S

    def hold(self, *, held: bool) -> None:
        """Reads nothing while it is held, and then goes on where it was."""
        if held != self._held:
            self._held = held
            here = [TopicPartition(*self._partition, self._at)]
            self._consumer.unassign() if held else self._consumer.assign(here)

    def next_chunk(self) -> Chunk | None:
        """The next records, an empty range now and then when there are none, otherwise None. Never blocks."""
        if self._held:
            return None
        if self._lost:
            (start, end), self._lost = self._lost, None
            return Chunk(self._partition, start, end, start, low=self._low, topic_id=self._topic_id)
        came: list[Any] = self._consumer.consume(self._chunk_events, timeout=0)
        messages = [each for each in came if _usable(each)]
        start, self._at = self._at, messages[-1].offset() + 1 if messages else self._at
        given = (*columns_of(messages), self._low, self._topic_id)
        headers = headers_of(messages) if self._with_headers else []
        chunk = Chunk(self._partition, start, self._at, self._fresh, *given, headers)
        if len(messages) < len(came) and any(map(is_out_of_range, came)):
            # As at the start, with what was read so far.
            self._begin([Position(max(self._at, self._fresh), self._at)])
        elif not messages and self._clock() - self._spoken_s < self._speak_s:
            return None
        self._spoken_s = self._clock()
        if messages:
            self._read_ms = messages[-1].timestamp()[1]
        return chunk

    def say_lag(self, now_ms: int) -> None:
        """Brings the partition's lag up to date, by what the broker said with the last records that it sent."""
        _, high = self._consumer.get_watermark_offsets(TopicPartition(*self._partition), cached=True)
        records = max(high - self._at, 0)
        METRICS.behind(self._partition, records, max(now_ms - self._read_ms, 0) / 1000 if records else 0.0)


class WorkerReader:
    """Reads many partitions through one consumer: the broker answers one fetch, and one poll finds what is there.

    It reads those partitions of the plan's topics that `is_mine`, also those that are added while it reads. First it
    reads of all what was committed before, for duplicates; only then does it give what is new, of any. So whoever
    writes now may do so until then. Who is `patient` is sent a lot at once, if it comes within a tenth of a second.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        is_mine: Callable[[Partition], bool],
        records: Records,
        clock: Callable[[], float] = time.time,
        *,
        patient: bool = False,
    ) -> None:
        self._settings, self._plan, self._is_mine, self._records = settings, plan, is_mine, records
        self._clock = clock
        self._looked_s = self._said_s = clock()
        there = partitions_of(settings, self._topics)
        self._ids = TopicIds(settings, self._topics)
        self._shared = _Shared(settings, _PATIENT if patient else {})
        self._readers: dict[Partition, PartitionReader] = {}
        self._read(there)
        self._catches_up = True
        log.info("partitions_read", partitions=list(map(str, self._readers)))

    def next_chunks(self, wait_s: float = 0.0) -> list[Chunk]:
        """The next chunk of every partition that has one; at most `chunk_events` records in all.

        Waits up to `wait_s` for the first of them.
        """
        now_s = self._clock()
        if not 0 <= now_s - self._looked_s < LOOK_S:
            self._looked_s = now_s
            self._look()
        if self._catches_up:
            self._hold_those_ahead()
        self._shared.poll(wait_s)
        chunks = [chunk for reader in self._readers.values() if (chunk := reader.next_chunk())]
        if not 0 <= now_s - self._said_s < _LAG_S:
            self._said_s = now_s
            self._ids.look()
            for reader in self._readers.values():
                reader.say_lag(int(now_s * 1000))
        return chunks

    def _hold_those_ahead(self) -> None:
        behind = {partition for partition, reader in self._readers.items() if reader.is_behind}
        for partition, reader in self._readers.items():
            reader.hold(held=bool(behind) and partition not in behind)
        self._catches_up = bool(behind)

    def close(self) -> None:
        """Leaves all partitions."""
        self._shared.consumer.close()

    @property
    def _topics(self) -> list[str]:
        return list(self._plan.topics)

    def _look(self) -> None:
        """Finds partitions that topics have gained."""
        try:
            for topic in self._topics:
                there = self._shared.consumer.list_topics(topic, timeout=_LOOK_TIMEOUT_S).topics[topic].partitions
                # One that is made just now may have no leader, and to ask it would take long.
                self._read(Partition(topic, number) for number in sorted(there) if there[number].leader >= 0)
        except KafkaException as error:
            log.warning("partitions_unknown", error=str(error), again_in_s=LOOK_S)

    def _read(self, there: Iterable[Partition]) -> None:
        new = [each for each in there if each not in self._readers and self._is_mine(each)]
        records = self._records() if new else ()
        for each in new:
            if each not in self._readers:
                self._readers[each] = PartitionReader(
                    self._settings,
                    each,
                    lambda: records,
                    consumer=_OfPartition(self._shared, each),
                    topic_id=self._ids.known.get(each.topic, ""),
                    # Lanes look for history when they are spoken to, by one.
                    speak_s=IDLE_S if self._readers or not self._plan.history else FILL_S,
                    with_headers=need_headers(self._plan, each.topic),
                )


class _Shared:
    """One consumer, and what it has read of each partition."""

    def __init__(self, settings: Settings, options: Mapping[str, Any]) -> None:
        self.consumer = consumer_of(settings, **options)
        self.read: dict[Partition, list[Any]] = {}
        self._chunk_events = settings.chunk_events

    def poll(self, wait_s: float) -> None:
        """Reads what is there, or what comes first."""
        first = self.consumer.poll(wait_s) if wait_s else None
        messages: list[Any] = self.consumer.consume(self._chunk_events, timeout=0)
        for message in [first, *messages] if first else messages:
            found = self.read.get(Partition(message.topic(), message.partition()))
            if found is not None:
                found.append(message)
            else:
                _usable(message)  # An error of no partition.


class _OfPartition:
    """A partition's share of a consumer, as `PartitionReader` uses it."""

    def __init__(self, shared: _Shared, partition: Partition) -> None:
        self._shared, self._partition = shared, partition
        self.get_watermark_offsets = shared.consumer.get_watermark_offsets

    def assign(self, partitions: list[TopicPartition]) -> None:
        if self._partition in self._shared.read:
            self._shared.consumer.incremental_unassign(partitions)
        self._shared.read[self._partition] = []
        self._shared.consumer.incremental_assign(partitions)

    def unassign(self) -> None:
        self._shared.consumer.incremental_unassign([TopicPartition(*self._partition)])
        del self._shared.read[self._partition]

    def consume(self, _count: int, timeout: float) -> list[Any]:
        found, self._shared.read[self._partition] = self._shared.read[self._partition], []
        return found


class DeadLetters:
    """Writes what contracts refuse to `<topic>.dead-letter`, before the rest of its chunk goes on.

    The record's key is topic/partition/offset, so that a log-compacted topic keeps each once although it may be written
    again after a restart. Value and key are the original bytes; reason and origin are headers.
    """

    def __init__(self, settings: Settings) -> None:
        self._producer = Producer(
            settings.librdkafka(
                **{
                    "acks": "all",
                    "linger.ms": 1,
                    "message.max.bytes": DEAD_LETTER_BYTES_MAX,
                    "message.timeout.ms": 15_000,
                }
            )
        )
        self._failed: list[str] = []

    def write(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Returns when the broker has them all.

        Raises:
            DeadLettersError: if it doesn't in 15 seconds.
        """
        for letter in dead_letters:
            origin = f"{letter.partition}/{letter.offset}"
            value = letter.value
            if value is not None and len(value) > _LETTER_VALUE_BYTES_MAX:
                origin_length, value = len(value), value[:_LETTER_VALUE_BYTES_MAX]
                log.warning("dead_letter_cut", origin=origin, bytes=origin_length, kept=len(value))
            headers: Any = {
                "reason": letter.reason.encode(errors="backslashreplace"),
                "origin": origin.encode(),
                "original-bytes": str(len(letter.value or b"")).encode(),
                "original-key": letter.key,
            }
            self._produce(letter.partition.topic + DEAD_LETTER_SUFFIX, origin, value, headers)
        if dead_letters and (self._producer.flush(_KAFKA_TIMEOUT_S) or self._failed):
            msg = f"dead letters could not be written: {self._failed[:3] or 'the broker did not answer'}"
            raise DeadLettersError(msg)

    def _produce(self, topic: str, key: str, value: bytes | None, headers: Any) -> None:
        while True:
            try:
                self._producer.produce(topic, key=key, value=value, headers=headers, on_delivery=self._delivered)
            except BufferError:
                self._producer.poll(0.1)
            else:
                return

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self._failed.append(f"{message.topic()}: {error}")


def _usable(message: Any) -> bool:
    """Whether this is a record; says what passes by itself, and raises what does not."""
    error = message.error()
    if error is None:
        return True
    if is_out_of_range(message):
        return False
    if error.fatal() or error.code() not in PASSING:
        raise KafkaException(error)
    log.warning("kafka_unavailable", error=str(error))
    return False


def is_out_of_range(message: Any) -> bool:
    """Whether this says that the broker does not have the offset that was to be read next."""
    error = message.error()
    # By this name a consumer says so that was told not to go elsewhere by itself (auto.offset.reset).
    return error is not None and error.code() == KafkaError._AUTO_OFFSET_RESET


def accept_topic(settings: Settings, plan: Plan, client: redis.Redis, topic: str) -> int:
    """Has the stream read a topic that was made anew from its beginning; returns how many shards were of the old one.

    Raises:
        ValueError: if the broker gives no ids.
        KafkaException: if the broker can't be reached, or the topic is not there.
        NotAppliedError: if a commit record is missing.
    """
    topic_id = TopicIds(settings, [topic]).known.get(topic)
    if topic_id is None:
        msg = (
            f"the broker at {settings.kafka} gives topics no ids, as Kafka does since 2.8: {topic} can't be told apart"
        )
        raise ValueError(msg)
    writer = Writer(client, Keyspace.of(plan))
    shards = product(plan.stored_entities, range(plan.shards))
    return sum(writer.accept_topic(*shard, topic, topic_id) for shard in shards)


def columns_of(messages: list[Any]) -> tuple[list[bytes | None], list[bytes | None], Ints, Ints]:
    """Values, keys, offsets and record timestamps."""
    return (
        [message.value() for message in messages],
        [message.key() for message in messages],
        np.array([message.offset() for message in messages], np.int64),
        np.array([message.timestamp()[1] for message in messages], np.int64),
    )


def need_headers(plan: Plan, topic: str) -> bool:
    """Whether a contract looks at the headers of a topic's records."""
    return any(spec.reads.needs_headers for spec in plan.topics[topic])


def headers_of(messages: list[Any]) -> list[Any]:
    """The headers of each."""
    return [message.headers() or () for message in messages]


def consumer_of(settings: Settings, **options: Any) -> Consumer:
    """A consumer of no group, which starts where it is told."""
    return Consumer(
        settings.librdkafka(
            **{
                # Required by librdkafka; offsets live in Redis, and no group is ever joined.
                "group.id": "headrace",
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
                "fetch.wait.max.ms": 5,
                "fetch.error.backoff.ms": 50,
                "queued.max.messages.kbytes": 32_768,
                "log_level": 4,
                **options,
            }
        )
    )


def records_of(plan: Plan, client: redis.Redis) -> Sequence[CommitRecord]:
    """The commit records of all shards."""
    keys = Keyspace.of(plan).commit_records(plan.stored_entities)
    return [read_record(client, key) for key in keys]
