"""Every Redis key and its lifetime, built here and nowhere else.

    {headrace}:plans                      all applied plans, the newest last
    {headrace}:forget                     all orders to forget, the newest last
    {headrace:user:7}:commit              the commit record of shard 7 of the users
    {headrace:user:7}:forgotten           which of them are forgotten, and since when
    {headrace:user:7}:user_activity:u42   the row of user u42 in the family user_activity
    {headrace:user:7}:seam:3              where the history ends that plan 3 is filled with, and
    {headrace:user:7}:filling:3:0         a batch of it
    {headrace~2:user:7}:commit            the commit record of shard 7 of the users, after a second rebuild
    {headrace@item_profile:7}:i3          what the ordinary view item_profile has of item i3, and
    {headrace}:given                      by tag, the fields that such rows have: see `store.given`

All keys of a shard share the hash tag in braces, so that one commit stays on one node of a Redis Cluster. The tag is
the key's first pair of braces and an id stands last: so no id, whatever it holds, can reach into another
key's place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final
from zlib import crc32

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.layout import Family
from features.loops import compiled
from features.plan import Plan
from features.texts import buffers
from store.resp import Arguments, joined


def shard_of(entity_id: bytes, shards: int) -> int:
    """The shard of an entity by its id in UTF-8. Stored keys depend on it: never change it."""
    return crc32(entity_id) % shards


def shards_of(ids: pa.StringArray, shards: int) -> NDArray[np.int64]:
    """int64[n]: the shard of each entity, that of an empty id for null; as `shard_of`, for many."""
    found: NDArray[np.int64] = _shards(*buffers(ids), shards, _CRC_TABLE)
    return found


def _crc_table() -> NDArray[np.uint32]:
    """What CRC-32 does to each byte."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & np.uint32(1), table >> np.uint32(1) ^ np.uint32(0xEDB88320), table >> np.uint32(1))
    return table


_CRC_TABLE: Final = _crc_table()


@compiled
def _shards(
    offsets: NDArray[np.int32], data: NDArray[np.uint8], shards: int, table: NDArray[np.uint32]
) -> NDArray[np.int64]:
    found = np.empty(len(offsets) - 1, np.int64)
    for text in range(len(found)):
        crc = np.uint32(0xFFFFFFFF)
        for at in range(offsets[text], offsets[text + 1]):
            crc = table[(crc ^ data[at]) & np.uint32(0xFF)] ^ (crc >> np.uint32(8))
        found[text] = np.int64(crc ^ np.uint32(0xFFFFFFFF)) % shards
    return found


def plans_key(project: str) -> bytes:
    """The key of a project's applied plans."""
    return f"{{{project}}}:plans".encode()


def generation_key(project: str) -> bytes:
    """The key of how many generations of a project's rows were begun after the first."""
    return f"{{{project}}}:generation".encode()


def orders_key(project: str) -> bytes:
    """The key of a project's orders to forget."""
    return f"{{{project}}}:forget".encode()


def given_fields_key(project: str) -> bytes:
    """The key of the fields that rows of given features have, by tag."""
    return f"{{{project}}}:given".encode()


_GIVEN_TAGS: Final = 1024
"""Over so many hash tags the rows of an ordinary view are spread. Stored keys depend on it: never change it."""


def given_key(project: str, view: str, entity_id: bytes) -> bytes:
    """The key of what an ordinary view has of an entity."""
    return _given_prefixes(project, view)[shard_of(entity_id, _GIVEN_TAGS)] + entity_id


def given_keys(project: str, view: str, ids: pa.StringArray) -> Arguments:
    """As `given_key`, of many, packed to be sent."""
    texts = buffers(ids)
    if len(ids) == 0:
        return Arguments.of(())
    return joined(_packed_given_prefixes(project, view), 1, _shards(*texts, _GIVEN_TAGS, _CRC_TABLE), texts)


def given_pattern(project: str, view: str) -> bytes:
    """What the keys of an ordinary view match, and no others."""
    return f"{{{project}@{view}:*".encode()


@lru_cache(maxsize=1024)
def _given_prefixes(project: str, view: str) -> tuple[bytes, ...]:
    return tuple(f"{{{project}@{view}:{number}}}:".encode() for number in range(_GIVEN_TAGS))


@lru_cache(maxsize=1024)
def _packed_given_prefixes(project: str, view: str) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    return _packed(_given_prefixes(project, view))


def _packed(prefixes: Sequence[bytes]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    return np.cumsum([0, *map(len, prefixes)], dtype=np.int32), np.frombuffer(b"".join(prefixes), np.uint8)


@dataclass(frozen=True)
class Keyspace:
    """The keys of one project, and one generation of its rows: see `features.plan.Plan`."""

    project: str
    shards: int
    generation: int = 0

    @classmethod
    def of(cls, plan: Plan) -> Keyspace:
        """Those of an applied plan."""
        return cls(plan.project, plan.shards, plan.generation)

    @property
    def prefix(self) -> str:
        """What all of its keys begin with, and no other generation's: not with a name's first letters alone."""
        return f"{{{self.project}{f'~{self.generation}' if self.generation else ''}:"

    def tag(self, entity: str, shard: int) -> str:
        """What all keys of a shard begin with."""
        return f"{self.prefix}{entity}:{shard}}}:"

    def commit_record(self, entity: str, shard: int) -> bytes:
        """The key of a shard's commit record."""
        return f"{self.tag(entity, shard)}commit".encode()

    def forgotten(self, entity: str, shard: int) -> bytes:
        """The key that says who of a shard is forgotten: see `store.forgotten`."""
        return f"{self.tag(entity, shard)}forgotten".encode()

    def seam(self, entity: str, shard: int, plan: int) -> bytes:
        """The key that says where the history of a shard ends, for a plan that is filled: see `store.filling`."""
        return f"{self.tag(entity, shard)}seam:{plan}".encode()

    def filling(self, entity: str, shard: int, plan: int, number: int) -> bytes:
        """The key of a batch of a shard's history."""
        return f"{self.tag(entity, shard)}filling:{plan}:{number}".encode()

    def commit_records(self, entities: Iterable[str]) -> list[bytes]:
        """The keys of the commit records of all shards of each kind of entity."""
        return [self.commit_record(entity, shard) for entity in entities for shard in range(self.shards)]

    def rows_of(self, family_names: Iterable[str], entity: str, entity_id: bytes) -> list[bytes]:
        """The keys of an entity's rows in families by name, also such as no plan has any more."""
        tag = self.tag(entity, shard_of(entity_id, self.shards))
        return [f"{tag}{name}:".encode() + entity_id for name in family_names]

    def rows(self, family: Family, ids: Iterable[bytes]) -> list[bytes]:
        """The keys of a family's rows, by the entities' ids in UTF-8."""
        shards, prefixes = self.shards, _prefixes(self, family.entity, family.name)
        return [prefixes[crc32(entity_id) % shards] + entity_id for entity_id in ids]

    def arguments(self, families: Sequence[Family], ids: pa.StringArray) -> Arguments:
        """The keys of an entity's families, by the entities' ids: as `rows` of each family, packed to be sent."""
        if len(ids) == 0:
            return Arguments.of(())
        prefixes = _packed_prefixes(self, tuple(families))
        texts = buffers(ids)
        return joined(prefixes, len(families), _shards(*texts, self.shards, _CRC_TABLE), texts)

    def row_of(self, key: bytes) -> tuple[str, bytes]:
        """The inverse of `rows`: the name of the family and the entity's id."""
        name, entity_id = key[key.index(b"}:") + 2 :].split(b":", 1)
        return name.decode(), entity_id


@lru_cache(maxsize=1024)
def _prefixes(keyspace: Keyspace, entity: str, family: str) -> tuple[bytes, ...]:
    return tuple(f"{keyspace.tag(entity, shard)}{family}:".encode() for shard in range(keyspace.shards))


@lru_cache(maxsize=1024)
def _packed_prefixes(keyspace: Keyspace, families: tuple[Family, ...]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    return _packed([prefix for family in families for prefix in _prefixes(keyspace, family.entity, family.name)])


def expire_at_ms(family: Family, last_event_ms: NDArray[np.int64]) -> NDArray[np.int64]:
    """When a row can go: once every window has passed its last event, or once its entity is to be forgotten."""
    return last_event_ms + family.retention_ms
