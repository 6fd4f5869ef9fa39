"""A lane: a fixed group of shards whose rows one worker merges and commits. Knows Redis, not Bytewax or Kafka."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, compress, islice, pairwise, product
from operator import ne
from queue import SimpleQueue
from threading import Thread
from types import MappingProxyType
from typing import Any
from weakref import finalize

import msgspec
import numpy as np
import pyarrow as pa
import redis
from numpy.typing import NDArray

from features.kernel import SLACK_MS, Events, Merged, add, merge
from features.layout import Bundle, families_of, slots_of
from features.plan import Plan
from features.rows import Index, Rows
from store.codec import encode
from store.commit import CommitRecord, Position, RowWrite, ShardCommit, Writer
from store.filling import Batch
from store.forgotten import FOR_EVER_MS, Forgotten, Times, count_orders, decode_forgotten, encode_forgotten, orders
from store.keys import Keyspace, expire_at_ms, shard_of
from store.layouts import Layouts
from store.read import read_rows
from streams.chunk import FILL_S, Happened, Ints, Part, Partition

IDLE_COMMIT_S = 1.0
"""A shard without events has its offsets committed this often."""
_CACHED_OVERHEAD_BYTES = 180
"""Of a kept row, besides its bytes: key, entry, two objects."""
_KEPT_S = 60.0
_AHEAD_MS = 10_000
"""A row is forgotten so long before it expires in Redis: as far as Redis's clock may be ahead of the worker's."""
Commit = Callable[[Sequence[ShardCommit]], None]
_Todo = SimpleQueue[tuple[Sequence[ShardCommit], Callable[[], None], Future[None]] | None]


class GapError(RuntimeError):
    """A chunk does not follow on what the shards have: records would be lost by going on."""


@dataclass(frozen=True)
class Written:
    """What a write did: rows committed, and buckets evicted to keep a declared bound, by view and feature."""

    rows: int
    evicted: Mapping[tuple[str, str], int]


@dataclass
class _Shard:
    key: bytes
    """Of its commit record."""
    record: CommitRecord
    before: CommitRecord
    """While a commit is on its way, the record that it replaces: Redis may still have that one."""
    committed_at_s: float
    forgotten: Times
    mine: bool = False
    """Whether the record holds only what the lane itself has received."""


class Lane:
    """The shards `s` of every entity with `s % lanes == lane`.

    Making one claims its shards: from then on no other writer can commit to them, so rows that were read or written
    once can be kept and need not be read again: up to `cache_bytes_max` bytes of them.

    Commits are sent by `writer`, on the thread of `committer`; by default a writer and a thread of the lane's own. A
    consumer is not told that a topic was made anew, and reads on in the new one: so `confirm` is asked whether topics
    still are those with the ids of the parts, and a commit waits for what it gives.
    """

    def __init__(  # noqa: PLR0913  # the last five are for tests, and for what knows Kafka
        self,
        plan: Plan,
        lane: int,
        lanes: int,
        client: redis.Redis,
        clock: Callable[[], float] = time.time,
        *,
        layouts: Layouts | None = None,
        cache_bytes_max: int = 0,
        writer: Writer | None = None,
        committer: Callable[[Commit], Committer] | None = None,
        confirm: Callable[[Mapping[str, str]], Callable[[], None]] = lambda _: lambda: None,
    ) -> None:
        self._redis: Any = client
        self._clock = clock
        self._keyspace, self._layouts = Keyspace.of(plan), layouts or Layouts(plan)
        self._writer = writer or Writer(client, self._keyspace, time_s=clock)
        families = [family for view in plan.views for family in families_of(plan, view)]
        by_entity = {entity.name: [each for each in families if each.entity == entity.name] for entity in plan.entities}
        self._bundles = [Bundle(tuple(own)) for own in by_entity.values() if own]
        self._kept_ms = {bundle.entity: _kept_ms(bundle) for bundle in self._bundles}
        self._aggregations = {bundle.entity: _aggregations(plan, bundle) for bundle in self._bundles}
        self._numbers = range(lane, plan.shards, lanes)
        self._shards: dict[tuple[str, int], _Shard] = {}
        fills = {view.entities[0] for view in plan.views if view.filling}
        self._filling = [bundle for bundle in self._bundles if bundle.entity in fills]
        self._filled_at_s = 0.0
        for name in product((bundle.entity for bundle in self._bundles), self._numbers):
            record = self._writer.claim(*name, plan.number, plan.needs, fills=name[0] in fills)
            self._shards[name] = _Shard(self._keyspace.commit_record(*name), record, record, clock(), {})
        # All shards of a lane are to have one record: none was taken later than the last of them.
        self._plan_number = plan.number
        every = sorted(pair for shard in self._shards.values() for pair in shard.record.taken)
        self._taken = tuple(dict(every).items())
        self._forgotten = Forgotten()
        told = self._read(self._shards.values(), [self._keyspace.forgotten(*name) for name in self._shards])
        for ((entity, _), shard), data in zip(self._shards.items(), told, strict=True):
            shard.forgotten = decode_forgotten(data)
            self._forgotten.add(entity, shard.forgotten)
        # Fewer than a shard knows of, if Redis came back without the last of them.
        known = [shard.record.orders or 0 for shard in self._shards.values()]
        self._orders = min([*known, count_orders(client, plan.project)])
        self._ordered_at_s = 0.0
        self._claimed: dict[tuple[str, Partition], Ints] = {}
        self._received: dict[Partition, Position] = {}
        self._topics: dict[str, str] = {}
        # Before a row that is not used expires in Redis, it is gone from here.
        kept_s = min(family.retention_ms for bundle in self._bundles for family in bundle.families) / 2000
        self._cache = RowCache(cache_bytes_max, min(kept_s, _KEPT_S), clock())
        self._committer = (committer or Committer)(self._writer.commit)
        self._confirm = confirm
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
            for shard in self._shards.values():
                shard.before = shard.record
            self._cache.settled(self._clock())

    def start(self, parts: Sequence[Part]) -> Written:
        """As `write`, but returns while Redis still works on the commit: the next call, or `settle`, waits for it.

        A commit that failed raises there, and then so does every later one: what follows on it must never be written.
        """
        if not 0 <= self._clock() - self._ordered_at_s < IDLE_COMMIT_S:
            self._forget()
        if self._filling and not 0 <= self._clock() - self._filled_at_s < FILL_S:
            # While nothing else is to be done, all that is there.
            while self._fill() and not any(part.events for part in parts):
                pass
        of_topics = (part for part in parts if part.topic_id and part.end > part.start)
        confirmed = self._confirm({part.partition.topic: part.topic_id for part in of_topics})
        known = [self._receive(part) for part in parts]
        latest_ms = max((part.record_ms_max for part in parts), default=-1)
        clock_ms = int(self._clock() * 1000)
        now_ms = min(clock_ms, latest_ms) - SLACK_MS
        work: list[_Work] = []
        for bundle in self._bundles:
            every = (each for part, at in zip(parts, known, strict=True) for each in self._new(bundle.entity, part, at))
            forgotten_ms = clock_ms - self._kept_ms[bundle.entity]
            read = [each for each in every if each.contract in bundle.events]
            # What Redis would not keep must not count by being merged together with what it does.
            late = (each.take(each.times_ms > forgotten_ms) for each in read)
            counted = (each.take(self._forgotten.counts(bundle.entity, each.ids, each.times_ms)) for each in late)
            happened = [each for each in counted if len(each.ids)]
            if happened:
                work.append(_Arrived(self._keyspace, bundle, happened, forgotten_ms, now_ms))
        return self._do(work, confirmed)

    def _forget(self) -> None:
        """Carries out the orders to forget that were given since it last looked."""
        clock_s = self._clock()
        self._ordered_at_s = clock_s
        given = orders(self._redis, self._keyspace.project, self._orders)
        self._orders += len(given)
        work: list[_Ordered] = []
        for bundle in self._bundles:
            known, ids = self._forgotten.get(bundle.entity, {}), dict[bytes, int]()
            for each in given:
                if each.entity == bundle.entity:
                    mine = (one for one in each.ids if shard_of(one, self._keyspace.shards) in self._numbers)
                    ids |= {one: each.at_ms for one in mine if known.get(one, -1) < each.at_ms}
            if ids:
                families = self._layouts.families(bundle.entity)
                of_shards = {number: self._shards[bundle.entity, number].forgotten for number in self._numbers}
                work.append(_Ordered(self._keyspace, bundle, ids, int(clock_s * 1000), families, of_shards))
        if work:
            self._do(work)
            for done in work:
                self._forgotten.add(done.bundle.entity, done.times)

    def _fill(self) -> bool:
        """Adds its next batch of history to each shard that there is one for; whether there was any."""
        clock_ms = int(self._clock() * 1000)
        keys = {
            name: self._keyspace.filling(*name, self._plan_number, filled)
            for name, shard in self._shards.items()
            if isinstance(filled := shard.record.filled, int)
        }
        found: dict[tuple[str, int], bytes] = {
            name: data for name, data in zip(keys, self._redis.mget(list(keys.values())), strict=True) if data
        }
        work = []
        for bundle in self._filling:
            if mine := {shard: data for (entity, shard), data in found.items() if entity == bundle.entity}:
                forgotten_ms, known = clock_ms - self._kept_ms[bundle.entity], self._forgotten.get(bundle.entity, {})
                work.append(_Filled(self._keyspace, bundle, mine, forgotten_ms, self._layouts, known))
        self._filled_at_s = 0.0 if found else self._clock()
        if found:
            self._do(work, filled={name: keys[name] for name in found})
        return bool(found)

    def _do(
        self,
        work: Sequence[_Work],
        confirmed: Callable[[], None] = lambda: None,
        filled: Mapping[tuple[str, int], bytes] = MappingProxyType({}),
    ) -> Written:
        """Commits work; and of shards whose next batch of history it is, under these keys, that they have it."""
        writes: dict[tuple[str, int], list[RowWrite]] = {}
        kept: list[tuple[list[bytes], list[bytes]]] = []
        evicted: Counter[tuple[str, str]] = Counter()
        concerned = [
            self._shards[each.bundle.entity, shard] for each in work for shard in np.unique(each.shards).tolist()
        ]
        found = iter(self._cache.read([key for each in work for key in each.keys], partial(self._read, concerned)))
        for each in work:
            of_tables = self._merge(each, list(islice(found, len(each.keys))), writes, kept)
            for table in np.flatnonzero(of_tables).tolist():
                for aggregation in self._aggregations[each.bundle.entity][table]:
                    evicted[aggregation] += int(of_tables[table])
            for shard, besides in each.besides().items():
                writes[each.bundle.entity, shard] = [*writes.get((each.bundle.entity, shard), []), *besides]
        for name, key in filled.items():
            writes[name] = [*writes.get(name, []), RowWrite(key, b"", 0)]
        self._commit(writes, confirmed, filled)
        for keys, rows in kept:
            self._cache.keep(keys, rows)
        return Written(sum(len(rows) for rows in writes.values()), evicted)

    def _read(self, shards: Collection[_Shard], keys: list[bytes]) -> list[bytes | None]:
        """The values of keys, together with the records of their shards: both must be what this writer wrote.

        To compare when committing is not enough: if Redis loses its last writes and then has them again (a lagging
        replica is promoted, dies, and the old master is back), a row read in between is older than its record.
        """
        found: list[bytes | None] = self._redis.mget([*keys, *(shard.key for shard in shards)])
        for shard, stored in zip(shards, found[len(keys) :], strict=True):
            if stored not in (shard.record.encode(), shard.before.encode()):
                # A commit on its way may never be done: a successor need not have it.
                raise self._writer.fenced(shard.key, shard.before)
        return found[: len(keys)]

    def _receive(self, part: Part) -> int:
        """Checks that the part's range follows on what the lane has; returns before which offset it has everything."""
        known = self._received.get(part.partition)
        if known is None:
            self._same_topic(part)
            positions = [shard.record.position(*part.partition) for shard in self._shards.values()]
            # A shard that has read nothing needs all there is: the reader may have started when Redis said otherwise.
            first = part.start if part.low is None else part.low
            at = min((first if position is None else position.next for position in positions), default=part.start)
        else:
            at = known.next
        if part.start > at:
            msg = (
                f"{part.partition}: a chunk starts at offset {part.start}, but the shards have "
                f"only what comes before {at}; the stream must start again from there"
            )
            raise GapError(msg)
        self._received[part.partition] = Position(max(at, part.end), part.horizon)
        return at

    def _same_topic(self, part: Part) -> None:
        """A part must be of the topic that the shards know, which is another one once it was accepted."""
        topic = part.partition.topic
        for shard in self._shards.values():
            if other := shard.record.of_other_topic(topic, part.topic_id):
                msg = f"a chunk of {topic} is of the topic {part.topic_id}, but the shards are of {other}"
                raise GapError(msg)
        if part.topic_id:
            self._topics[topic] = part.topic_id

    def _new(self, entity: str, part: Part, at: int) -> Iterable[Happened]:
        """The part's events of an entity that neither the lane nor, when it was claimed, their shard had."""
        happened = part.events.get(entity)
        if happened is None:
            return ()
        claimed = self._claimed.get((entity, part.partition))
        if claimed is None:
            claimed = self._claimed[entity, part.partition] = np.zeros(self._keyspace.shards, np.int64)
            for number in self._numbers:
                position = self._shards[entity, number].record.position(*part.partition)
                claimed[number] = position.next if position else 0
        if part.start >= max(at, claimed.max()):
            return happened
        return [each.take(each.offsets >= np.maximum(claimed[each.shards], at)) for each in happened]

    def _merge(
        self,
        work: _Work,
        old: list[bytes | None],
        writes: dict[tuple[str, int], list[RowWrite]],
        kept: list[tuple[list[bytes], list[bytes]]],
    ) -> Ints:
        """Adds the rows to write to `writes`, and all to `kept`; returns how many buckets each table has evicted."""
        bundle, keys, places = work.bundle, work.keys, work.places
        blobs = _spread(old, places, len(bundle.families) * len(work.shards))

        def key_at(place: int) -> bytes:
            return keys[int(np.searchsorted(places, place))]

        rows = read_rows(bundle, blobs, key_at, self._layouts)
        if len(gone := work.forgotten(rows)):
            without = set(gone.tolist())
            left = [None if at in without else each for at, each in enumerate(blobs)]
            rows = read_rows(bundle, left, key_at, self._layouts)
        merged = work.merge(rows)
        every = encode(bundle, merged.rows)
        new = [every[place] for place in places.tolist()]
        every_expire = [expire_at_ms(*each) for each in zip(bundle.families, merged.rows.latest_ms, strict=True)]
        expires = np.concatenate(every_expire)[places].tolist()
        kept.append((keys, new))
        # Plain tuples: making half a million a second of anything better takes a tenth of the time.
        writable: list[Any] = list(zip(keys, new, expires, strict=True))
        changed = np.fromiter(map(ne, new, (blob or b"" for blob in old)), bool, len(new))
        of_row = work.shards[places % len(work.shards)]
        # By shard: 16 bits are sorted by counting.
        order = np.argsort(of_row, kind="stable")
        order = order[changed[order]]
        bounds = np.flatnonzero(np.diff(of_row[order], prepend=-1, append=-1)).tolist()
        ordered = [writable[place] for place in order.tolist()]
        for first, last in pairwise(bounds):
            writes[bundle.entity, int(of_row[order[first]])] = ordered[first:last]
        return merged.evicted

    def _commit(
        self,
        writes: Mapping[tuple[str, int], list[RowWrite]],
        confirmed: Callable[[], None],
        filled: Collection[tuple[str, int]],
    ) -> None:
        """Commits shards that have rows to write, and idle ones now and then."""
        now_s = self._clock()
        received = {str(partition): position for partition, position in self._received.items()}
        whole = CommitRecord(self._writer.token, received, self._topics.copy(), self._plan_number, self._taken)
        whole = msgspec.structs.replace(whole, orders=self._orders or msgspec.UNSET)
        commits: dict[tuple[str, int], ShardCommit] = {}
        for name, shard in self._shards.items():
            rows = writes.get(name, [])
            # A clock that was set back must not keep a shard from committing.
            if not rows and 0 <= now_s - shard.committed_at_s < IDLE_COMMIT_S:
                continue
            # All shards of a lane have what it received, so they share one record; but for what others wrote before.
            new = whole if shard.mine else _advanced(shard.record, whole)
            shard.mine = shard.mine or new == whole
            if isinstance(shard.record.filled, int):
                new = msgspec.structs.replace(new, filled=shard.record.filled + (name in filled))
            shard.committed_at_s = now_s
            # Also one that changes nothing: only so does an idle writer notice that it was superseded, or that Redis
            # came back with less.
            commits[name] = ShardCommit(shard.key, shard.record, new, rows)
        self.settle()
        self._pending = self._committer.submit(list(commits.values()), confirmed)
        # As if it were done: if it isn't, nothing of what follows will be either.
        for name, commit in commits.items():
            self._shards[name].record = commit.new


class Committer:
    """Commits one after the other, in a thread that its process does not wait for at its end, as it would for an
    executor's: what is not committed then is read again, and Redis may be away for long.
    """

    def __init__(self, commit: Commit) -> None:
        self._todo: _Todo = SimpleQueue()
        Thread(target=_commit_all, args=(commit, self._todo), name="commit", daemon=True).start()
        finalize(self, self._todo.put, None).atexit = False  # The thread goes when the lane does.

    def submit(self, commits: Sequence[ShardCommit], confirmed: Callable[[], None] = lambda: None) -> Future[None]:
        """Returns at once; commits once `confirmed` has returned. What either raises, the future does."""
        done: Future[None] = Future()
        self._todo.put((commits, confirmed, done))
        return done


def _commit_all(commit: Commit, todo: _Todo) -> None:
    while (next_one := todo.get()) is not None:
        commits, confirmed, done = next_one
        try:
            confirmed()
            commit(commits)
        except BaseException as error:  # noqa: BLE001  # raised where it is waited for
            done.set_exception(error)
        else:
            done.set_result(None)


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


class _Work:
    """What is to go into rows of one kind of entity.

    Attributes:
        shards: int16[entities].
        places: int64[rows], which rows it concerns, among all of the first family, all of the next …
        keys: theirs.
    """

    bundle: Bundle
    shards: NDArray[np.int16]
    places: Ints
    keys: list[bytes]

    def __init__(
        self, keyspace: Keyspace, bundle: Bundle, ids: list[bytes], touched: NDArray[np.bool_], forgotten_ms: int
    ) -> None:
        self.bundle, self.forgotten_ms = bundle, forgotten_ms
        self.keys = []
        for family, mine in zip(bundle.families, touched.tolist(), strict=True):
            self.keys += keyspace.rows(family, compress(ids, mine))
        self.places = np.flatnonzero(touched)

    def merge(self, rows: Rows) -> Merged:
        """The rows with it."""
        raise NotImplementedError

    def forgotten(self, rows: Rows) -> Index:
        """The places of rows that are there and must count as absent."""
        return np.flatnonzero((rows.latest_ms >= 0) & (rows.latest_ms <= self.forgotten_ms))

    def besides(self) -> dict[int, list[RowWrite]]:
        """What else is to be written by shard, once it was merged."""
        return {}


class _Arrived(_Work):
    """Events."""

    def __init__(
        self, keyspace: Keyspace, bundle: Bundle, happened: list[Happened], forgotten_ms: int, now_ms: int
    ) -> None:
        encoded = pa.concat_arrays([each.ids for each in happened]).dictionary_encode()
        ids = [text.encode() for text in encoded.dictionary.to_pylist()]
        index = np.asarray(encoded.indices).astype(np.intp)
        self._now_ms = now_ms
        bounds = pairwise([0, *accumulate(len(each.ids) for each in happened)])
        self._events = _by_contract(bundle, happened, [index[begin:end] for begin, end in bounds])
        self.shards = np.empty(len(ids), np.int16)
        self.shards[index] = np.concatenate([each.shards for each in happened])
        touched = np.zeros((len(bundle.families), len(ids)), bool)
        for family, mine in zip(bundle.families, touched, strict=True):
            for name in family.events:
                if name in self._events:
                    mine[self._events[name].rows] = True
        super().__init__(keyspace, bundle, ids, touched, forgotten_ms)

    def merge(self, rows: Rows) -> Merged:
        """The rows with the events."""
        return merge(self.bundle, rows, self._events, self._now_ms)


class _Ordered(_Work):
    """Orders to forget: by id, when it was said."""

    def __init__(
        self,
        keyspace: Keyspace,
        bundle: Bundle,
        ordered_ms: Mapping[bytes, int],
        clock_ms: int,
        families: Collection[str],
        of_shards: Mapping[int, Times],
    ) -> None:
        self._keyspace, self._of_shards = keyspace, of_shards
        self._others = sorted(set(families) - {family.name for family in bundle.families})
        self._ids, self._at_ms = list(ordered_ms), np.maximum(list(ordered_ms.values()), clock_ms)
        self.shards = np.array([shard_of(each, keyspace.shards) for each in self._ids], np.int16)
        touched = np.ones((len(bundle.families), len(self._ids)), bool)
        super().__init__(keyspace, bundle, self._ids, touched, forgotten_ms=0)

    def forgotten(self, rows: Rows) -> Index:
        """All. Whatever they have is of before it, also by a clock that is behind the broker's."""
        self._at_ms = np.maximum(self._at_ms, rows.latest_ms.max(axis=0))
        return np.flatnonzero(rows.latest_ms >= 0)

    def merge(self, rows: Rows) -> Merged:
        """The rows, which are empty."""
        return Merged(rows, np.zeros(len(self.bundle.tables), np.int64))

    @property
    def times(self) -> Times:
        """Since when each is forgotten."""
        return dict(zip(self._ids, self._at_ms.tolist(), strict=True))

    def besides(self) -> dict[int, list[RowWrite]]:
        """Who is forgotten; and rows that only other plans have go, too."""
        entity, keyspace = self.bundle.entity, self._keyspace
        found: dict[int, list[RowWrite]] = {}
        for (each, at_ms), shard in zip(self.times.items(), self.shards.tolist(), strict=True):
            self._of_shards[shard][each] = at_ms
            rows = keyspace.rows_of(self._others, entity, each)
            found.setdefault(shard, []).extend(RowWrite(key, b"", 0) for key in rows)
        for shard, writes in found.items():
            times = encode_forgotten(self._of_shards[shard])
            writes.append(RowWrite(keyspace.forgotten(entity, shard), times, FOR_EVER_MS))
        return found


class _Filled(_Work):
    """A batch of history of each of some shards."""

    def __init__(
        self,
        keyspace: Keyspace,
        bundle: Bundle,
        batches: Mapping[int, bytes],
        forgotten_ms: int,
        layouts: Layouts,
        known: Mapping[bytes, int],
    ) -> None:
        found = {shard: Batch.decode(data) for shard, data in batches.items()}
        ids = [entity_id for batch in found.values() for entity_id in batch.ids]
        blobs: list[bytes | None] = []
        for family in bundle.families:
            for batch in found.values():
                blobs += batch.rows.get(family.name) or [b""] * len(batch.ids)
        self.shards = np.repeat(list(found), [len(batch.ids) for batch in found.values()]).astype(np.int16)
        self._history = read_rows(bundle, blobs, lambda place: ids[place % len(ids)], layouts)
        touched = self._history.latest_ms > forgotten_ms
        if known:  # Of whom was forgotten after the batch was made, nothing of it counts.
            told = {each: at_ms for batch in found.values() for each, at_ms in batch.forgotten.items()}
            touched &= np.array([known.get(each) == told.get(each) for each in ids], bool)
        if not touched.all():
            kept = [blob if mine else b"" for blob, mine in zip(blobs, touched.ravel().tolist(), strict=True)]
            self._history = read_rows(bundle, kept, lambda place: ids[place % len(ids)], layouts)
        super().__init__(keyspace, bundle, ids, touched, forgotten_ms)

    def merge(self, rows: Rows) -> Merged:
        """The rows with their history, as old as it is."""
        return add(self.bundle, rows, self._history, 0)


def _kept_ms(bundle: Bundle) -> int:
    """How long after its time an event counts, and a row after its last: see docs/decisions/0011-forgetting.md.

    As long as the longest of an entity: in rows that Redis keeps for less, all is out of every window by then.
    """
    retention_ms = max(family.retention_ms for family in bundle.families)
    return retention_ms - min(_AHEAD_MS, retention_ms // 10)


def _by_contract(bundle: Bundle, happened: list[Happened], rows: list[Index]) -> dict[str, Events]:
    """The events of each contract as one batch, with the fields that the bundle reads."""
    found: dict[str, Events] = {}
    for name in dict.fromkeys(each.contract for each in happened):
        mine = [(each, row) for each, row in zip(happened, rows, strict=True) if each.contract == name]
        columns = {}
        for field in bundle.fields[name]:
            parts = [each.fields[field] for each, _ in mine]
            columns[field] = pa.concat_arrays(parts) if isinstance(parts[0], pa.Array) else np.concatenate(parts)
        found[name] = Events(
            np.concatenate([row for _, row in mine]), np.concatenate([each.times_ms for each, _ in mine]), columns
        )
    return found


def _aggregations(plan: Plan, bundle: Bundle) -> list[set[tuple[str, str]]]:
    """View and name of the aggregations that each table of a bundle is for."""
    found: list[set[tuple[str, str]]] = [set() for _ in bundle.tables]
    firsts = accumulate((len(family.tables) for family in bundle.families), initial=0)
    first_of = dict(zip(bundle.families, firsts, strict=False))
    for full_name, (family, slots) in slots_of(plan).items():
        feature = plan.features[full_name]
        for table, _ in slots if family in first_of else ():
            found[first_of[family] + table].add((feature.view, feature.spec.name))
    return found


def _advanced(record: CommitRecord, received: CommitRecord) -> CommitRecord:
    """The record with what was received; offsets never go back."""
    positions = dict(received.positions)
    for partition, position in positions.items():
        known = record.positions.get(partition)
        if known and known.next > position.next:
            positions[partition] = Position(known.next, position.horizon)
    advanced = record.advanced(received.writer, positions, received.topics)
    return msgspec.structs.replace(advanced, taken=received.taken, orders=received.orders)


def _spread(found: list[bytes | None], places: Ints, size: int) -> list[bytes | None]:
    """What was found at its places among so many; None elsewhere."""
    if len(found) == size:
        return found
    spread: list[bytes | None] = [None] * size
    for place, each in zip(places.tolist(), found, strict=True):
        spread[place] = each
    return spread
