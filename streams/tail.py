"""The tail of the log: what Kafka has and the archive not yet, read once up to its end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from config.brokers import PASSING
from config.settings import Settings
from features.plan import Plan
from store.commit import CommitRecord
from streams.archive import ArchivePart, part_of
from streams.chunk import Chunk, Partition
from streams.decode import Decoder
from streams.kafka import TopicChangedError, TopicIds, columns_of, consumer_of, partitions_of, start_of

_TIMEOUT_S = 30.0


def tail(
    settings: Settings, plan: Plan, record: CommitRecord, clock: Callable[[], float] = time.monotonic
) -> Iterator[ArchivePart]:
    """The accepted events that come after a record's positions, up to where each partition ends now.

    Raises:
        KafkaException: if the broker can't be reached.
        TopicChangedError: if a topic is another than the record's.
        TimeoutError: if the broker answers no more.
    """
    topics = [spec.topic for spec in plan.events]
    known = TopicIds(settings, topics).known
    for topic, topic_id in known.items():
        if other := record.of_other_topic(topic, topic_id):
            raise TopicChangedError(topic, other, topic_id)
    decoder = Decoder(plan, 1, settings.dedupe_s * 1000)
    consumer = consumer_of(settings, **{"enable.partition.eof": True})
    try:
        # By partition: the offset that is next, and from which on records are new.
        at: dict[Partition, int] = {}
        fresh: dict[Partition, int] = {}
        for each in partitions_of(settings, topics):
            low, high = consumer.get_watermark_offsets(TopicPartition(*each), timeout=_TIMEOUT_S)
            start = start_of(each, [record.position(*each)], low, high)
            if start.fresh < high:
                at[each], fresh[each] = start.at, start.fresh
        consumer.assign([TopicPartition(*each, offset) for each, offset in at.items()])
        while at:
            for each, (messages, ended) in _next(consumer, settings, clock).items():
                if messages and each in at:
                    start_at, at[each] = at[each], messages[-1].offset() + 1
                    chunk = Chunk(each, start_at, at[each], fresh[each], *columns_of(messages))
                    yield part_of(decoder.check_all([chunk])[0])
                if ended:
                    at.pop(each, None)
    finally:
        consumer.close()


_Heard = dict[Partition, tuple[list[Any], bool]]


def _next(consumer: Consumer, settings: Settings, clock: Callable[[], float]) -> _Heard:
    """The next records of some partitions, and whether these are their last."""
    until_s = clock() + _TIMEOUT_S
    while clock() < until_s:
        found: _Heard = {}
        for message in consumer.consume(settings.chunk_events, timeout=0.5):
            error, each = message.error(), Partition(str(message.topic()), int(message.partition() or 0))
            messages, ended = found.get(each, ([], False))
            if error is None:
                messages.append(message)
            elif error.code() == KafkaError._PARTITION_EOF:
                ended = True
            elif error.fatal() or error.code() not in PASSING:
                raise KafkaException(error)
            found[each] = messages, ended
        if found:
            return found
    msg = f"Kafka at {settings.kafka} has said nothing for {_TIMEOUT_S:g} s: is it up? `headrace doctor` looks"
    raise TimeoutError(msg)
