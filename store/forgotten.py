"""Entities that are to be forgotten: nothing of them counts that happened until then, whoever makes rows of it.

Orders stand in a list, in the order in which they were given. A shard's writer carries out those of its entities: in
one commit their rows go, it is written since when each is forgotten, and the commit record says how many orders it
knows.
See docs/decisions/0023-forget.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.texts import decimal_texts
from features.times import DAY_MS
from store.keys import Keyspace, orders_key, shard_of

Times = dict[bytes, int]
"""By id, in UTF-8, since when it is forgotten: ms since the epoch."""
FOR_EVER_MS: Final = 1_000_000 * DAY_MS
"""When what must not expire does."""
_IDS_MAX: Final = 1_000


class Order(msgspec.Struct, frozen=True, array_like=True):
    """Entities of one kind that are to be forgotten, and when this was said, ms since the epoch."""

    entity: str
    ids: list[bytes]
    at_ms: int


class Forgotten(dict[str, Times]):
    """By kind of entity, who is forgotten."""

    def add(self, entity: str, times: Mapping[bytes, int]) -> None:
        """Takes in who is forgotten, too; of two times the later counts."""
        known = self.setdefault(entity, {})
        for each, at_ms in times.items():
            known[each] = max(at_ms, known.get(each, at_ms))

    def counts(self, entity: str, ids: pa.StringArray, times_ms: NDArray[np.int64]) -> NDArray[np.bool_] | None:
        """bool[n]: which events of these entities, at these times, count; None if all do."""
        times = self.get(entity)
        if not times:
            return None
        encoded = ids.dictionary_encode()
        until_ms = [-1 if each is None else times.get(each.encode(), -1) for each in encoded.dictionary.to_pylist()]
        of_each = np.array([*until_ms, -1])[np.asarray(encoded.indices.fill_null(-1))]
        counts: NDArray[np.bool_] = times_ms > of_each
        return counts

    def counted(self, entity: str, key: str, events: pa.RecordBatch) -> pa.RecordBatch:
        """Those events, as `store.archive.events_of` gives them, that count for who is named by `key`."""
        counts = self.counts(entity, decimal_texts(events[key]), np.asarray(events["_t"]))
        return events if counts is None else events.filter(pa.array(counts))


def order(client: Any, project: str, entity: str, ids: Sequence[str], now_ms: int) -> None:
    """Orders that entities be forgotten: whoever writes to their shards does it, within seconds.

    Args:
        client: Redis.
        project: whose.
        entity: what they are.
        ids: theirs.
        now_ms: ms since the epoch; what happens later counts.
    """
    encoded = [each.encode() for each in ids]
    for begin in range(0, len(encoded), _IDS_MAX):
        one = Order(entity, encoded[begin : begin + _IDS_MAX], now_ms)
        client.execute_command("RPUSH", orders_key(project), msgspec.msgpack.encode(one))


def orders(client: Any, project: str, first: int) -> list[Order]:
    """The orders from a number on."""
    found = client.execute_command("LRANGE", orders_key(project), first, -1)
    return [msgspec.msgpack.decode(each, type=Order) for each in found]


def count_orders(client: Any, project: str) -> int:
    """How many orders were given."""
    return int(client.execute_command("LLEN", orders_key(project)))


def encode_forgotten(times: Times) -> bytes:
    """Who of a shard is forgotten, as Redis keeps it."""
    return msgspec.msgpack.encode(times)


def decode_forgotten(data: bytes | None) -> Times:
    """The inverse of `encode_forgotten`; of no bytes nobody."""
    return msgspec.msgpack.decode(data, type=Times) if data else {}


def read_forgotten(client: Any, keyspace: Keyspace, entities: Iterable[str]) -> Forgotten:
    """Who is forgotten, as the writers of all shards have it."""
    found = Forgotten()
    for entity in entities:
        for data in client.mget([keyspace.forgotten(entity, shard) for shard in range(keyspace.shards)]):
            found.add(entity, decode_forgotten(data))
    return found


def write_forgotten(client: Any, keyspace: Keyspace, found: Forgotten) -> None:
    """Has shards that nobody writes to know who is forgotten."""
    pipeline = client.pipeline(transaction=False)
    for entity, times in found.items():
        shards: dict[int, Times] = {}
        for each, at_ms in times.items():
            shards.setdefault(shard_of(each, keyspace.shards), {})[each] = at_ms
        for shard, own in shards.items():
            pipeline.execute_command("SET", keyspace.forgotten(entity, shard), encode_forgotten(own))
    pipeline.execute()
