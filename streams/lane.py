"""A lane: a fixed group of shards whose rows one worker merges and commits. Knows Redis, not Bytewax or Kafka."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import redis

from features.kernel import SLACK_MS, Events, merge
from features.layout import Family, families_of
from features.plan import Plan
from store.codec import encode
from store.commit import CommitRecord, Position, RowWrite, ShardCommit, Writer
from store.keys import Keyspace, expire_at_ms
from store.read import Request
from streams.chunk import Happened, Part, Partition

IDLE_COMMIT_S = 1.0
"""A shard without events has its offsets committed this often."""
_CACHED_OVERHEAD_BYTES = 180
"""Of a kept row, besides its bytes: key, entry, two objects."""
_KEPT_S = 60.0


class GapError(RuntimeError):
    """A chunk does not follow on what the shards have: records would be lost by going on."""


@dataclass(frozen=True)
class Written:
    """What a write did: rows committed, and buckets evicted to keep a declared bound."""

    rows: int
    evicted: int


@dataclass
class _Shard:
    record: CommitRecord
    committed_at_s: float


class Lane:
    """The shards `s` of every entity with `s % lanes == lane`.

    Making one claims its shards: from then on no other writer can commit to them, so rows that were read or written
    once can be kept and need not be read again: up to `cache_bytes_max` bytes of them.
    """

    def __init__(
        self,
        plan: Plan,
        lane: int,
        lanes: int,
        client: redis.Redis,
        clock: Callable[[], float] = time.time,
        *,
        cache_bytes_max: int = 0,
    ) -> None:
        self._redis: Any = client
        self._clock = clock
        self._keyspace = Keyspace(plan.project, plan.shards)
        self._writer = Writer(client, self._keyspace)
        families = [family for view in plan.views for family in families_of(plan, view)]
        self._families = {
            entity.name: [family for family in families if family.entity == entity.name] for entity in plan.entities
        }
        self._families = {entity: own for entity, own in self._families.items() if own}
        self._numbers = range(lane, plan.shards, lanes)
        self._shards = {
            (entity, shard): _Shard(self._writer.claim(entity, shard), clock())
            for entity in self._families
            for shard in self._numbers
        }
        self._received: dict[Partition, Position] = {}
        # Before a row that is not used expires in Redis, it is gone from here.
        kept_s = min(family.retention_ms for own in self._families.values() for family in own) / 2000
        self._cache = RowCache(cache_bytes_max, min(kept_s, _KEPT_S), clock())
        self._committer = ThreadPoolExecutor(1, f"commit-{lane}")
        self._pending: Future[None] | None = None

    def write(self, parts: Sequence[Part]) -> Written:
        """Merges the parts' events into their rows and commits them.

        Raises:
            GapError: if a part does not follow on what was received before.
            FencedError: if another writer has claimed a shard, or Redis holds other data.
        """
        written = self.start(parts)
        self.settle()
        return written

    def settle(self) -> None:
        """Returns once the last commit is done; raises what it raised."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None
            self._cache.settled(self._clock())

    def start(self, parts: Sequence[Part]) -> Written:
        """As `write`, but returns while Redis still works on the commit: the next call, or `settle`, waits for it.

        A commit that failed raises there, and then so does every later one: what follows on it must never be written.
        """
        for part in parts:
            self._receive(part)
        latest_ms = max((part.record_ms_max for part in parts), default=-1)
        now_ms = min(int(self._clock() * 1000), latest_ms) - SLACK_MS
        writes: dict[tuple[str, int], list[RowWrite]] = {}
        kept: list[tuple[list[bytes], list[bytes]]] = []
        evicted = 0
        for entity, families in self._families.items():
            happened = [
                new for part in parts if entity in part.events and len((new := self._new_to_shards(entity, part)).ids)
            ]
            if happened:
                evicted += self._merge(entity, families, happened, now_ms, writes, kept)
        self._commit(writes)
        for keys, rows in kept:
            self._cache.keep(keys, rows)
        return Written(sum(len(rows) for rows in writes.values()), evicted)

    def _receive(self, part: Part) -> None:
        """Checks that the part's range follows on what the lane has."""
        known = self._received.get(part.partition)
        if known is None:
            positions = [shard.record.position(*part.partition) for shard in self._shards.values()]
            # A shard that has read nothing takes whatever comes first.
            at = min((part.start if position is None else position.next for position in positions), default=part.start)
        else:
            at = known.next
        if part.start > at:
            msg = (
                f"{part.partition}: a chunk starts at offset {part.start}, but the shards have "
                f"only what comes before {at}; the stream must start again from there"
            )
            raise GapError(msg)
        self._received[part.partition] = Position(max(at, part.end), part.horizon)

    def _new_to_shards(self, entity: str, part: Part) -> Happened:
        """The part's events of an entity that their shards haven't committed yet."""
        happened = part.events[entity]
        committed = np.zeros(self._keyspace.shards, np.int64)
        for number in self._numbers:
            position = self._shards[entity, number].record.position(*part.partition)
            if position is not None:
                committed[number] = position.next
        return happened.take(happened.offsets >= committed[happened.shards])

    def _merge(
        self,
        entity: str,
        families: list[Family],
        happened: list[Happened],
        now_ms: int,
        writes: dict[tuple[str, int], list[RowWrite]],
        kept: list[tuple[list[bytes], list[bytes]]],
    ) -> int:
        """Adds the rows to write to `writes`, and all to `kept`; returns how many buckets were evicted."""
        encoded = pa.concat_arrays([each.ids for each in happened]).dictionary_encode()
        ids = [text.encode() for text in encoded.dictionary.to_pylist()]
        index = np.asarray(encoded.indices).astype(np.intp)
        events = _by_contract(happened, np.split(index, np.cumsum([len(each.ids) for each in happened])[:-1]))
        touched = {}
        for family in families:
            mine = [events[name].rows for name in family.events if name in events]
            if mine:
                touched[family.name] = np.unique(np.concatenate(mine))
        wanted = tuple(
            (family.alone, [ids[row] for row in touched[family.name].tolist()])
            for family in families
            if family.name in touched
        )
        request = Request(self._keyspace, wanted)
        blobs = self._cache.read(request.keys, self._redis.mget)
        rows = request.rows(blobs)
        shards = np.empty(len(ids), np.int64)
        shards[index] = np.concatenate([each.shards for each in happened])
        at = evicted = 0
        for (family,), family_ids in ((bundle.families, own) for bundle, own in wanted):
            renumbered = {
                name: Events(np.searchsorted(touched[family.name], each.rows), each.times_ms, each.fields)
                for name, each in events.items()
                if name in family.events
            }
            merged = merge(family, rows[family.name], renumbered, now_ms)
            evicted += merged.evicted
            end = at + len(family_ids)
            new = encode(family, merged.rows)
            expires = expire_at_ms(family, merged.rows.last_event_ms).tolist()
            changed = [
                place for place, (row, old) in enumerate(zip(new, blobs[at:end], strict=True)) if row != (old or b"")
            ]
            # Plain tuples: making half a million a second of anything better takes a tenth of the time.
            every: list[Any] = list(zip(request.keys[at:end], new, expires, strict=True))
            of_shard = shards[touched[family.name][changed]]
            order = np.argsort(of_shard, kind="stable")
            bounds = np.flatnonzero(np.diff(of_shard[order], prepend=-1, append=-1)).tolist()
            for first, last in pairwise(bounds):
                rows_of_shard = [every[changed[place]] for place in order[first:last].tolist()]
                writes.setdefault((entity, int(of_shard[order[first]])), []).extend(rows_of_shard)
            kept.append((request.keys[at:end], new))
            at = end
        return evicted

    def _commit(self, writes: Mapping[tuple[str, int], list[RowWrite]]) -> None:
        """Commits shards that have rows to write, and idle ones now and then."""
        now_s = self._clock()
        commits: dict[tuple[str, int], ShardCommit] = {}
        for name, shard in self._shards.items():
            rows = writes.get(name, [])
            if not rows and now_s - shard.committed_at_s < IDLE_COMMIT_S:
                continue
            positions = {}
            for partition, position in self._received.items():
                known = shard.record.position(*partition)
                reached = max(position.next, known.next if known else 0)
                positions[str(partition)] = Position(reached, position.horizon)
            new = shard.record.advanced(self._writer.token, positions)
            shard.committed_at_s = now_s
            # Also one that changes nothing: only so does an idle writer notice that it was superseded, or that Redis
            # came back with less.
            commits[name] = ShardCommit(self._keyspace.commit_record(*name), shard.record, new, rows)
        self.settle()
        self._pending = self._committer.submit(self._writer.commit, list(commits.values()))
        # As if it were done: if it isn't, nothing of what follows will be either.
        for name, commit in commits.items():
            self._shards[name].record = commit.new


class RowCache:
    """Bytes of rows by key, up to a total size; those used least lately go first. All of the last commit are there,
    however many, until it is settled: before that Redis may still answer with what they were.

    Two generations: what is written goes to the young one, and when that is half of all, or `kept_s` old, the old one
    is dropped for it.
    """

    def __init__(self, bytes_max: int, kept_s: float, now_s: float) -> None:
        self._bytes_max, self._kept_s = bytes_max, kept_s
        self._young: dict[bytes, bytes] = {}
        self._old: dict[bytes, bytes] = {}
        self._young_bytes, self._since_s = 0, now_s

    def read(self, keys: list[bytes], mget: Callable[[list[bytes]], list[bytes | None]]) -> list[bytes | None]:
        """The rows of keys: those that are not kept by one `mget`. An empty one is one that is not there."""
        blobs = list(map(self._young.get, keys))
        missing = [at for at, blob in enumerate(blobs) if blob is None]
        for at in missing:
            blobs[at] = self._old.get(keys[at])
        missing = [at for at in missing if blobs[at] is None]
        if missing:
            for at, blob in zip(missing, mget([keys[at] for at in missing]), strict=True):
                blobs[at] = blob
        return blobs

    def keep(self, keys: list[bytes], rows: list[bytes]) -> None:
        """Keeps rows as they will be once their commit is done."""
        self._young.update(zip(keys, rows, strict=True))
        self._young_bytes += sum(map(len, rows)) + len(keys) * _CACHED_OVERHEAD_BYTES

    def settled(self, now_s: float) -> None:
        """The commit of all that was kept is done: Redis has it."""
        if self._young_bytes > self._bytes_max // 2 or not 0 <= now_s - self._since_s < self._kept_s:
            self._old, self._young = self._young, {}
            self._young_bytes, self._since_s = 0, now_s
        if not self._bytes_max:
            self._old = {}


def _by_contract(happened: list[Happened], rows: list[Any]) -> dict[str, Events]:
    """The events of each contract as one batch."""
    found: dict[str, Events] = {}
    for name in dict.fromkeys(each.contract for each in happened):
        mine = [(each, row) for each, row in zip(happened, rows, strict=True) if each.contract == name]
        columns = {}
        for field in mine[0][0].fields:
            parts = [each.fields[field] for each, _ in mine]
            columns[field] = pa.concat_arrays(parts) if isinstance(parts[0], pa.Array) else np.concatenate(parts)
        found[name] = Events(
            np.concatenate([row for _, row in mine]), np.concatenate([each.times_ms for each, _ in mine]), columns
        )
    return found
