"""What flows through the stream: chunks of records from a partition, and their parts for each lane."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.rows import taken

Ints = NDArray[np.int64]

FILL_S = 0.05
"""While a plan is filled, it is looked for history this often; at once again where there was any."""


class Partition(NamedTuple):
    """A topic partition."""

    topic: str
    number: int

    def __str__(self) -> str:
        return f"{self.topic}/{self.number}"


@dataclass(frozen=True)
class Chunk:
    """Raw records of a partition: all there are in the offsets `[start, end)`, which may have holes or be empty.

    Records below `fresh` were read and committed before, and are here only to tell duplicates apart. `low` is
    where the partition began when its reader started, if that is known; `topic_id` is Kafka's, if it gives any.
    `headers` are there where a contract looks at them.
    """

    partition: Partition
    start: int
    end: int
    fresh: int = 0
    values: list[bytes | None] = field(default_factory=list)
    keys: list[bytes | None] = field(default_factory=list)
    offsets: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    record_ms: Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    low: int | None = None
    topic_id: str = ""
    headers: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class Happened:
    """Events of one contract as they concern one kind of entity: its ids, their shards, and the events' columns."""

    contract: str
    ids: pa.StringArray
    shards: Ints
    offsets: Ints
    times_ms: Ints
    fields: Mapping[str, Any]

    def take(self, mask: NDArray[np.bool_] | None) -> Happened:
        """The events under the mask; without one all."""
        if mask is None or mask.all():
            return self
        return Happened(
            self.contract,
            self.ids.filter(pa.array(mask)),
            self.shards[mask],
            self.offsets[mask],
            self.times_ms[mask],
            taken(self.fields, mask),
        )


@dataclass(frozen=True)
class Part:
    """A chunk's share of one lane: its range, also where it holds no event of the lane, and by entity the events of
    each contract.

    The range leaves out what is below the chunk's `fresh`, of which there are no events here. `horizon` is the offset
    from which duplicates must be told apart when the stream starts again at `end`; the rest is the chunk's.
    """

    partition: Partition
    start: int
    end: int
    horizon: int
    record_ms_max: int
    events: Mapping[str, tuple[Happened, ...]]
    low: int | None = None
    topic_id: str = ""


@dataclass(frozen=True)
class DeadLetter:
    """A record that its contract refuses, with the reason."""

    partition: Partition
    offset: int
    key: bytes | None
    value: bytes | None
    reason: str
