"""History for what is new: rows of the events before the stream took a plan up, for the plan's shards to add.

Nothing is written but batches that a shard's writer adds and deletes, in a commit that counts them: see
`store.filling`. A batch has some entities with all that happened before the seam, so that who was stopped makes the
same batches again, and goes on where each shard is.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from config.settings import Settings
from features.evolve import columns_from, filling_alone, move
from features.history import without_forgotten
from features.kernel import SLACK_MS, Events, Rows, merge
from features.layout import Bundle, Family, families_of, family_of
from features.plan import EventSpec, History, Plan
from store.archive import ArchiveTable, tables_of
from store.codec import encode
from store.commit import read_records, taken_by_all
from store.filling import KEPT_MS, Batch, decode_seam
from store.keys import Keyspace, shards_of
from training.run import Progress, events_of_tail, in_threads, shares_of, tail_of
from training.split import PARTITION_EVENTS, Chosen, Spill, Splitter, events_of_rows

Ints = NDArray[np.int64]
Shard = tuple[str, int]
"""An entity and a number."""
Seams = Mapping[Shard, Mapping[str, int]]
"""Of each shard, by `topic/partition`, the first offset that is no history."""

_AHEAD: Final = 2
"""So many batches of a shard wait to be added."""
_PATIENCE_S: Final = 60.0
"""A stream that adds nothing for so long is taken for one that does not run."""
_LOOK_S: Final = 0.05


class BackfillError(RuntimeError):
    """History can't be added: the message says what to do."""


class SeamError(BackfillError):
    """Where a shard's history ends can't be known: it takes another plan."""


@dataclass(frozen=True)
class Job:
    """What is to be added.

    Attributes:
        plan: with views that are `filling`.
        folder: for files in between.
    """

    plan: Plan
    folder: Path

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what is made of it."""
        return Job, tuple(getattr(self, field.name) for field in fields(self))

    @cached_property
    def alone(self) -> Plan:
        """What is filled and nothing else."""
        return filling_alone(self.plan)

    @cached_property
    def bundles(self) -> dict[str, Bundle]:
        """By entity, the rows of what is filled alone."""
        return bundles_of(self.alone)

    @cached_property
    def spill(self) -> Spill:
        """Where events are sorted to batches."""
        keys = {entity: self.plan.entity(entity).key for entity in self.bundles}
        return Spill(self.folder, self.bundles, keys, self.batches)

    @property
    def batches(self) -> int:
        """How many a shard gets."""
        return self._history.batches

    @property
    def since_ms(self) -> int:
        """No event before it is read."""
        return self._history.since_ms

    @property
    def _history(self) -> History:
        assert self.plan.history is not None  # noqa: S101  # for the type checker: there is one where anything is filled
        return self.plan.history

    def choose(self, entity: str, _: str, events: pa.RecordBatch) -> Chosen:
        """All events of an entity, by batch."""
        ids = events[self.spill.keys[entity]]
        places = np.flatnonzero(np.asarray(ids.is_valid()))
        ids = ids.take(pa.array(places))
        return Chosen(places, shards_of(ids, self.plan.shards * self.batches) // self.plan.shards, ids)


def bundles_of(alone: Plan) -> dict[str, Bundle]:
    """By entity, its families."""
    found: dict[str, list[Family]] = {}
    for view in alone.views:
        found.setdefault(view.entities[0], []).extend(families_of(alone, view))
    return {entity: Bundle(tuple(families)) for entity, families in found.items()}


def make_batch(job: Job, seams: Seams, now_ms: int, entity: str, number: int) -> dict[Shard, bytes]:
    """A batch of each shard of an entity, with rows as of `now_ms`: see `store.filling.Batch`."""
    bundle, n_shards = job.bundles[entity], job.plan.shards
    tables = {name: table for name in bundle.events if (table := job.spill.read(entity, name, number)) is not None}
    columns = [chunk for table in tables.values() for chunk in table["_entity"].chunks]
    encoded = (
        pa.concat_arrays(columns).dictionary_encode() if columns else pa.array([], pa.string()).dictionary_encode()
    )
    numbers, ids = np.asarray(encoded.indices).astype(np.intp), encoded.dictionary
    shards, names = shards_of(ids, n_shards), [text.encode() for text in ids.to_pylist()]
    happened = {}
    bounds = pairwise(accumulate(map(len, tables.values()), initial=0))
    for (name, table), (begin, end) in zip(tables.items(), bounds, strict=True):
        mine = numbers[begin:end]
        limits = _limits(seams, entity, job.plan.event(name).topic, n_shards)
        before = np.asarray(table["_offset"]) < limits[shards[mine], np.asarray(table["_partition"])]
        if not before.all():
            tables[name], mine = table.filter(pa.array(before)).combine_chunks(), mine[before]
        happened[name] = events_of_rows(tables[name], mine, bundle.fields[name])
    rows = {family.name: _rows(job, family, happened, len(ids), now_ms) for family in bundle.families}
    order = np.argsort(shards, kind="stable")
    ends = np.searchsorted(shards[order], np.arange(n_shards + 1)).tolist()
    found = {}
    for shard, (begin, end) in enumerate(pairwise(ends)):
        mine = order[begin:end].tolist()
        blobs = {family: [every[at] for at in mine] for family, every in rows.items()}
        found[entity, shard] = Batch([names[at] for at in mine], blobs).encode()
    return found


def _limits(seams: Seams, entity: str, topic: str, n_shards: int) -> Ints:
    """int64[shards, partitions]: where a topic's history ends."""
    of = [seams[entity, shard] for shard in range(n_shards)]
    partitions = 1 + max((int(name.rpartition("/")[2]) for seam in of for name in seam), default=0)
    return np.array([[seam.get(f"{topic}/{number}", 0) for number in range(partitions)] for seam in of], np.int64)


def _rows(job: Job, family: Family, happened: Mapping[str, Events], n: int, now_ms: int) -> list[bytes]:
    """The rows of a family as the plan has them, from all their events."""
    own = family_of(job.plan, family.name)
    assert own is not None  # noqa: S101  # for the type checker: the plan has all that it is filled with
    rows = merge(family, Rows.empty(family, n), without_forgotten(family, happened), now_ms).rows
    return encode(own, move(rows, family, own, columns_from(job.alone, job.plan, family.name)))


def fill(
    settings: Settings,
    plan: Plan,
    client: Any,
    *,
    folder: Path | None = None,
    on_progress: Progress = lambda _step, _done, _of: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, int]:
    """Adds the history of a plan that is filled to all shards; returns once they have it.

    Args:
        settings: where the archive and Kafka are.
        plan: the plan, which a stream runs.
        client: Redis.
        folder: for files in between, by default one that is gone afterwards.
        on_progress: is told how far it is.
        clock: seconds.
        sleep: waits so many.

    Returns:
        Of each contract of which the history does not have all events, how long before the stream took the plan up it
        begins: see `features.evolve.backfilled`.

    Raises:
        SeamError: if where the history ends can't be known.
        BackfillError: if no stream adds it.
    """
    shards = _Shards(plan, client, clock, sleep)
    first = shards.begun()
    with tempfile.TemporaryDirectory(prefix="headrace-backfill-", dir=folder) as spill:
        job = Job(plan, Path(spill))
        tables = tables_of(settings, plan)
        read = [(spec, tables[spec.topic]) for spec in plan.events if job.spill.fields_of(spec)]
        pieces = [(job, spec, table, share) for spec, table in read for share in shares_of(table)]
        # The archive meanwhile: it takes the stream some seconds to take the plan up.
        for done, _ in enumerate(in_threads(_split, pieces if first < job.batches else ()), 1):
            on_progress("archive", done, len(pieces))
        seams = shards.seams()
        _check_seams(job, seams, read)
        with tail_of(settings, plan, [table for _, table in read]) as tail:
            gaps = tail.gaps
            with Splitter(job.spill, job.choose, "tail") as splitter:
                on_progress("Kafka", 0, 1)
                for contract, events in events_of_tail(tail, job.spill.fields_of, job.since_ms):
                    splitter.add(contract, events)
                on_progress("Kafka", 1, 1)
        # The stream is further: no later query is to be earlier.
        now_ms = max((at.recorded_ms for _, table in read for at in table.complete().values()), default=0) - SLACK_MS
        numbers = range(first, job.batches)
        todo = [(job, seams, now_ms, entity, number) for number in numbers for entity in job.bundles]
        for (*_, number), batches in zip(todo, in_threads(make_batch, todo), strict=True):
            on_progress("rows", shards.wait(number - _AHEAD), job.batches)
            shards.put(number, batches)
        while (done := shards.added()) < job.batches:
            on_progress("rows", shards.wait(done + 1), job.batches)
    taken_ms = shards.taken_ms()
    begins = {spec.name: max(job.since_ms, table.since_ms) for spec, table in read}
    lead_ms = {name: max(taken_ms - at_ms, 0) for name, at_ms in begins.items() if at_ms}
    return lead_ms | {spec.name: 0 for spec, _ in read if spec.topic in gaps}


def _split(job: Job, spec: EventSpec, table: ArchiveTable, share: tuple[int, int]) -> None:
    with Splitter(job.spill, job.choose, f"archive-{share[0]}") as splitter:
        for events in table.scan(job.spill.fields_of(spec), job.since_ms, share=share):
            splitter.add(spec.name, events)


def _check_seams(job: Job, seams: Seams, read: Iterable[tuple[EventSpec, ArchiveTable]]) -> None:
    """Raises SeamError where a shard had not read yet what the archive has: its seam says nothing of it."""
    for _, table in read:
        for partition in table.complete():
            name = f"{table.topic}/{partition}"
            if any(name not in seam for seam in seams.values()):
                msg = f"the stream had not read {name} yet when it took up plan {job.plan.number}"
                raise SeamError(msg)


class _Shards:
    """The shards of a plan that is filled: what their writers say, and what is left for them."""

    def __init__(self, plan: Plan, client: Any, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._plan, self._redis, self._clock, self._sleep = plan, client, clock, sleep
        self._keyspace = Keyspace.of(plan)
        entities = sorted({view.entities[0] for view in plan.views if view.filling})
        self._names = [(entity, shard) for entity in entities for shard in range(plan.shards)]
        self._records = self._keyspace.commit_records(entities)

    def begun(self) -> int:
        """How many batches all of them have, whether or not their writers have taken the plan up."""
        records = read_records(self._redis, self._records)
        mine = [each.filled for each in records if each is not None and each.plan == self._plan.number]
        return min(each if isinstance(each, int) else 0 for each in mine) if len(mine) == len(records) else 0

    def seams(self) -> dict[Shard, dict[str, int]]:
        """Where the history of each ends, once its writer has taken the plan up."""
        keys = [self._keyspace.seam(*name, self._plan.number) for name in self._names]
        found = self._until(lambda: _all_there(self._redis.mget(keys)), lambda found: found is not None)
        seams = {}
        for name, data in zip(self._names, found or (), strict=True):
            seam = decode_seam(data)
            if seam is None:
                msg = f"an older plan ran on shard {name[1]} of {name[0]} after plan {self._plan.number}"
                raise SeamError(msg)
            seams[name] = seam
        return seams

    def added(self) -> int:
        """How many batches all of them have."""
        found = []
        for record in read_records(self._redis, self._records):
            if record is None or record.plan != self._plan.number or not isinstance(record.filled, int):
                msg = (
                    f"the stream runs plan {record.plan if record else 'none'}, no longer plan {self._plan.number}, "
                    "which history is added to; see `headrace history`, then run `headrace backfill` again"
                )
                raise BackfillError(msg)
            found.append(record.filled)
        return min(found)

    def wait(self, n: int) -> int:
        """Returns once all have so many batches; says how many they have."""
        added: int = self._until(self.added, lambda added: added >= n)
        return added

    def put(self, number: int, batches: Mapping[Shard, bytes]) -> None:
        """Leaves a batch for each."""
        pipeline = self._redis.pipeline(transaction=False)
        for name, data in batches.items():
            pipeline.set(self._keyspace.filling(*name, self._plan.number, number), data, px=KEPT_MS)
        pipeline.execute()

    def taken_ms(self) -> int:
        """When the last of them took the plan up."""
        return taken_by_all(read_records(self._redis, self._records), [self._plan.number])[self._plan.number]

    def _until(self, look: Callable[[], Any], enough: Callable[[Any], bool]) -> Any:
        """What a look finds once it is enough; while it finds ever more, there is hope."""
        found, since_s = look(), self._clock()
        while not enough(found):
            self._sleep(_LOOK_S)
            now_s, before, found = self._clock(), found, look()
            if found != before:
                since_s = now_s
            elif now_s - since_s > _PATIENCE_S:
                msg = (
                    f"no stream has taken up plan {self._plan.number}, or added any history, for {_PATIENCE_S:g} s: "
                    "does `headrace stream` run? Then run `headrace backfill` again: it goes on where it was"
                )
                raise BackfillError(msg)
        return found


def _all_there(found: Sequence[bytes | None]) -> list[bytes] | None:
    there = [each for each in found if each is not None]
    return there if len(there) == len(found) else None


def count_batches(settings: Settings, plan: Plan, contracts: Iterable[str]) -> int:
    """In how many batches the history of some contracts is added."""
    tables = tables_of(settings, plan)
    read = [tables[plan.event(name).topic] for name in contracts]
    with tail_of(settings, plan, read) as tail:
        return 1 + (sum(table.n_rows for table in read) + tail.n_records) // PARTITION_EVENTS
