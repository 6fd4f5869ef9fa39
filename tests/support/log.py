"""A Kafka log that a test holds in its hands, and the clock beside it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from streams.chunk import Partition


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self, now_ms: int) -> None:
        self.now_ms = now_ms

    def __call__(self) -> float:
        return self.now_ms / 1000


class Message:
    """A record as confluent_kafka gives it."""

    def __init__(self, offset: int, value: bytes | None, ms: int) -> None:
        self._offset, self._value, self.ms = offset, value, ms

    def error(self) -> None:
        return None

    def offset(self) -> int:
        return self._offset

    def value(self) -> bytes | None:
        return self._value

    def key(self) -> bytes | None:
        return None

    def timestamp(self) -> tuple[int, int]:
        return 2, self.ms


class Log:
    """A broker with the partitions' records; `low` is what retention has left of each."""

    def __init__(self, records: Mapping[Partition, Sequence[Message]]) -> None:
        self.records = records
        self.low: dict[Partition, int] = dict.fromkeys(records, 0)
        self.high = {partition: many[-1].offset() + 1 if many else 0 for partition, many in records.items()}
        self.rng = random.Random(0)

    def consumer(self) -> Consumer:
        return Consumer(self)


class Consumer:
    """confluent_kafka's, as far as `PartitionReader` uses it; answers with less than was asked for, or nothing."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._partition = Partition("", 0)
        self._at = 0

    def get_watermark_offsets(self, partition: Any, timeout: float) -> tuple[int, int]:
        at = Partition(partition.topic, partition.partition)
        return self._log.low[at], self._log.high[at]

    def assign(self, partitions: list[Any]) -> None:
        (partition,) = partitions
        self._partition, self._at = Partition(partition.topic, partition.partition), partition.offset

    def consume(self, count: int, timeout: float) -> list[Message]:
        wanted = self._log.rng.randint(0, count)
        floor = max(self._at, self._log.low[self._partition])
        high = self._log.high[self._partition]
        there = (message for message in self._log.records[self._partition] if floor <= message.offset() < high)
        found = list(islice(there, wanted))
        if found:
            self._at = found[-1].offset() + 1
        return found

    def close(self) -> None:
        pass
