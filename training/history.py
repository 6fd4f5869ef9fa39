"""Rows of all that happened to some entities: to be added to what is new, or to be all that there is.

Events of the archive and of Kafka's tail are sorted to batches by their entities; each batch is made by itself. Which
events count, positions of the log say, shard by shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from config.settings import Settings
from features.evolve import columns_from, move
from features.history import without_forgotten
from features.kernel import SLACK_MS, Rows, merge
from features.layout import Bundle, Family, families_of, family_of
from features.plan import EventSpec, History, Plan
from features.texts import decimal_texts
from store.archive import ArchiveTable, table_names, tables_of
from store.codec import encode
from store.commit import CommitRecord
from store.forgotten import Forgotten
from store.keys import shards_of
from training.run import Progress, events_of_tail, in_threads, shares_of, tail_of
from training.split import PARTITION_EVENTS, Chosen, Spill, Splitter, events_of_rows

Ints = NDArray[np.int64]
Shard = tuple[str, int]
"""An entity and a number."""
Seams = Mapping[Shard, Mapping[str, int]]
"""Of each shard, by `topic/partition`, the first offset that is no history."""


@dataclass(frozen=True)
class Job:
    """What rows are made of, and which.

    Attributes:
        plan: by whose layouts.
        alone: the plan with only those views and aggregations that get history.
        history: since when, in how many batches.
        folder: for files in between.
        forgotten: whose events, until when, do not count.
    """

    plan: Plan
    alone: Plan
    history: History
    folder: Path
    forgotten: Forgotten

    @cached_property
    def bundles(self) -> dict[str, Bundle]:
        """By entity, the rows that are made."""
        found: dict[str, list[Family]] = {}
        for view in self.alone.views:
            if families := families_of(self.alone, view):
                found.setdefault(view.entities[0], []).extend(families)
        return {entity: Bundle(tuple(families)) for entity, families in found.items()}

    @cached_property
    def spill(self) -> Spill:
        """Where events are sorted to batches."""
        keys = {entity: self.plan.entity(entity).key for entity in self.bundles}
        return Spill(self.folder, self.bundles, keys, self.history.batches, self.forgotten)

    def choose(self, entity: str, _: str, events: pa.RecordBatch) -> Chosen:
        """All events of an entity, by batch."""
        ids = decimal_texts(events[self.spill.keys[entity]])
        places = np.flatnonzero(np.asarray(ids.is_valid()))
        ids = ids.take(pa.array(places))
        return Chosen(places, shards_of(ids, self.plan.shards * self.history.batches) // self.plan.shards, ids)


class Past:
    """All that is known of the past, for a job: the archive as it is now, then Kafka's tail.

    Attributes:
        record: what of the log it includes, once the tail was read.
        now_ms: no later query is to be earlier, in ms since the epoch; likewise.
    """

    def __init__(self, settings: Settings, job: Job, on_progress: Progress) -> None:
        self._settings, self._job, self._on_progress = settings, job, on_progress
        tables = tables_of(settings, job.plan)
        specs = [spec for spec in job.plan.events if job.spill.fields_of(spec)]
        self._read = [(spec, tables[name]) for spec in specs for name in table_names(spec)]
        self._gaps: set[str] = set()
        self.record = CommitRecord("")
        self.now_ms = 0

    @property
    def archived(self) -> list[str]:
        """Every `topic/partition` that the archive has anything of."""
        names = (f"{table.topic}/{number}" for _, table in self._read for number in table.complete())
        return list(dict.fromkeys(names))

    def sort_archive(self) -> None:
        """Sorts the events of the archive."""
        pieces = [(self._job, spec, table, share) for spec, table in self._read for share in shares_of(table)]
        for done, _ in enumerate(in_threads(_split, pieces), 1):
            self._on_progress("archive", done, len(pieces))

    def sort_tail(self) -> None:
        """Sorts what the archive has not yet."""
        job, tables = self._job, [table for _, table in self._read]
        recorded_ms = [at.recorded_ms for table in tables for at in table.complete().values()]
        self._on_progress("Kafka", 0, 1)
        with (
            tail_of(self._settings, job.plan, tables) as tail,
            Splitter(job.spill, job.choose, "tail") as splitter,
        ):
            for contract, events in events_of_tail(tail, job.spill.fields_of, job.history.since_ms):
                splitter.add(contract, events)
            self._gaps, self.record = tail.gaps, tail.record
        self.now_ms = max([*recorded_ms, tail.recorded_ms]) - SLACK_MS
        self._on_progress("Kafka", 1, 1)

    def lead_ms(self, at_ms: int) -> dict[str, int]:
        """Of each contract of which not all events are known, how long before a time what is known begins."""
        begins_ms = {spec.name: self._job.history.since_ms for spec, _ in self._read}
        for spec, table in self._read:
            begins_ms[spec.name] = max(begins_ms[spec.name], table.since_ms)
        lead_ms = {name: max(at_ms - begin_ms, 0) for name, begin_ms in begins_ms.items() if begin_ms}
        return lead_ms | {spec.name: 0 for spec, table in self._read if table.topic in self._gaps}


def _split(job: Job, spec: EventSpec, table: ArchiveTable, share: tuple[int, int]) -> None:
    with Splitter(job.spill, job.choose, f"archive-{share[0]}") as splitter:
        for events in table.scan(job.spill.fields_of(spec), job.history.since_ms, share=share):
            splitter.add(spec.name, events)


class Made(NamedTuple):
    """The rows of some entities: their ids, in UTF-8, their shards, and by family each one's row and last event."""

    ids: list[bytes]
    shards: Ints
    rows: dict[str, list[bytes]]
    latest_ms: dict[str, Ints]

    def by_shard(self, shards: int) -> list[list[int]]:
        """The places of each shard's."""
        order = np.argsort(self.shards, kind="stable")
        ends = np.searchsorted(self.shards[order], np.arange(shards + 1)).tolist()
        return [order[begin:end].tolist() for begin, end in pairwise(ends)]


def make_rows(job: Job, seams: Seams, now_ms: int, entity: str, number: int) -> Made:
    """The rows of a batch, as of `now_ms`: see `features.kernel.merge`."""
    bundle, n_shards = job.bundles[entity], job.plan.shards
    tables = {name: table for name in bundle.events if (table := job.spill.read(entity, name, number)) is not None}
    columns = [chunk for table in tables.values() for chunk in table["_entity"].chunks]
    encoded = pa.chunked_array(columns, pa.string()).combine_chunks().dictionary_encode()
    numbers, ids = np.asarray(encoded.indices).astype(np.intp), encoded.dictionary
    shards = shards_of(ids, n_shards)
    happened = {}
    bounds = pairwise(accumulate(map(len, tables.values()), initial=0))
    for (name, table), (begin, end) in zip(tables.items(), bounds, strict=True):
        limits = _limits(seams, entity, job.plan.event(name).topics, n_shards)
        mine = numbers[begin:end]
        limit = limits[np.asarray(table["_topic"]), shards[mine], np.asarray(table["_partition"])]
        before = np.asarray(table["_offset"]) < limit
        happened[name] = events_of_rows(table, mine, bundle.fields[name]).take(before)
    rows, latest_ms = {}, {}
    for family in bundle.families:
        events = without_forgotten(family, happened)
        state = merge(family, Rows.empty(family, len(ids)), events, now_ms).rows
        own = family_of(job.plan, family.name)
        assert own is not None  # noqa: S101  # for the type checker: the plan has all that the other has
        if own != family:
            state = move(state, family, own, columns_from(job.alone, job.plan, family.name))
        rows[family.name], latest_ms[family.name] = encode(own, state), state.last_event_ms
    return Made([text.encode() for text in ids.to_pylist()], shards, rows, latest_ms)


def _limits(seams: Seams, entity: str, topics: Sequence[str], n_shards: int) -> Ints:
    """int64[topics, shards, partitions]: where a topic's history ends."""
    of = [seams[entity, shard] for shard in range(n_shards)]
    partitions = 1 + max((int(name.rpartition("/")[2]) for seam in of for name in seam), default=0)
    numbers = range(partitions)
    return np.array([[[seam.get(f"{topic}/{n}", 0) for n in numbers] for seam in of] for topic in topics], np.int64)


def count_batches(settings: Settings, plan: Plan, contracts: Iterable[str]) -> int:
    """In how many batches the history of some contracts is made."""
    tables = tables_of(settings, plan)
    read = [tables[table] for name in contracts for table in table_names(plan.event(name))]
    with tail_of(settings, plan, read) as tail:
        return 1 + (sum(table.n_rows for table in read) + tail.n_records) // PARTITION_EVENTS
