"""The point-in-time join: every feature of each label's entities, as of its time, from the events strictly before.

Nothing is computed here. Events are sorted to the entities that labels name (`training.split`); of each entity the rows
are made that the stream would have made until each time (`make_rows`, by `features.history`); and features are
evaluated of them as the server does (`evaluate`). Each step works on parts that know nothing of each other, and hands
the next one files; so memory does not grow with events and labels, and parts can be done anywhere that sees the same
folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features.events import NEWEST_MS
from features.given import GivenRows
from features.history import Arrived, rows_at
from features.layout import Bundle
from features.plan import NOBODY, Plan
from features.program import Asked, Program
from features.rows import Events, Rows
from features.totals import Totals
from features.values import to_arrow
from store.codec import decode, encode
from store.forgotten import Forgotten
from training.split import Chosen, Spill, events_of_rows, write_file

Ints = NDArray[np.int64]

CHUNK_ROWS: Final = 8192
"""So many labels are evaluated at once."""
_FINER: Final = {"us": 1_000, "ns": 1_000_000}
"""Units of time in a millisecond."""
LAG: Final = "_lag"
"""The column of labels that says until how long after its time, ms, what arrived counts: see `Job`."""
UNSETTLED: Final = "_unsettled:"
"""Before an entity, the column that says for which labels it is unsettled: see `Job`."""
OVERRIDE: Final = "__"
"""Between the entity and the field in the name of a column that overrides what an entity's row knows."""


class LabelsError(ValueError):
    """The table of labels lacks a column, or has one that can't be used."""


@dataclass(frozen=True)
class Job:
    """What is to be joined: everything that its steps need to know.

    Attributes:
        plan: the plan.
        full_names: of the features.
        time_column: of the labels.
        partitions: among how many entities are divided.
        folder: where the steps leave files for each other.
        until_ms: no label is later.
        since_ms: no event before it is read.
        settle_ms: if it is given, rows are as the stream made them, of what had arrived by a label's time and its
            `LAG`. An entity is unsettled for a label if something about it arrived within so many ms of its time.
        forgotten: whose events, until when, do not count.
    """

    plan: Plan
    full_names: tuple[str, ...]
    time_column: str
    partitions: int
    folder: Path
    since_ms: int
    until_ms: int
    settle_ms: int | None = None
    forgotten: Forgotten = dataclasses.field(default_factory=Forgotten)

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what is made of it: that is made again where it is needed."""
        return Job, tuple(getattr(self, each.name) for each in fields(self))

    @cached_property
    def program(self) -> Program:
        """The features, ready to be evaluated."""
        return Program(self.plan, self.full_names)

    @cached_property
    def bundles(self) -> dict[str, Bundle]:
        """By entity, the rows that are read."""
        return {bundle.entity: bundle for bundle in self.program.bundles}

    @cached_property
    def spill(self) -> Spill:
        """Where events are sorted to entities."""
        keys = {entity: self.key(entity) for entity in self.bundles}
        return Spill(self.folder, self.bundles, keys, self.partitions, self.forgotten)

    def key(self, entity: str) -> str:
        """The column with an entity's ids."""
        return self.plan.entity(entity).key


@dataclass(frozen=True)
class Questions:
    """What a chunk of labels asks of one entity.

    Attributes:
        ids: text[m], each once at each time; the empty one, of no entity, for null.
        times_ms: int64[m].
        lags_ms: int64[m], see `LAG`.
        rows: intp[labels], which of them each label asks.
    """

    ids: pa.StringArray
    times_ms: Ints
    lags_ms: Ints
    rows: NDArray[np.intp]


def questions(job: Job, labels: pa.RecordBatch) -> dict[str, Questions]:
    """By entity, what a chunk of labels asks."""
    times_ms = times_of(labels, job.time_column)
    lags_ms = np.zeros(len(labels), np.int64) if job.settle_ms is None else np.asarray(labels[LAG])
    found = {}
    for entity in job.program.entities:
        encoded = _ids(job, entity, labels).fill_null("").dictionary_encode()
        codes = np.asarray(encoded.indices)
        if _overrides(labels.schema, entity):
            first, rows = np.arange(len(codes)), np.arange(len(codes))
        else:
            order = np.lexsort((lags_ms, times_ms, codes))
            is_new = np.ones(len(order), bool)
            is_new[1:] = np.any([np.diff(each[order]) != 0 for each in (codes, times_ms, lags_ms)], axis=0)
            first, rows = order[is_new], np.empty(len(order), np.intp)
            rows[order] = np.cumsum(is_new) - 1
        ids = encoded.dictionary.take(encoded.indices.take(pa.array(first)))
        found[entity] = Questions(ids, times_ms[first], lags_ms[first], rows)
    return found


def times_of(labels: pa.RecordBatch, column: str) -> Ints:
    """int64[n]: the time of each label, ms; a part of a millisecond counts as a whole one.

    Raises:
        LabelsError: if a label has none.
    """
    times = labels[column]
    if times.null_count:
        msg = f"{column}: {times.null_count} labels have no time; leave them out"
        raise LabelsError(msg)
    if not pa.types.is_timestamp(times.type):
        msg = f"{column}: {times.type} is no time; make it a timestamp (UTC if it has no zone)"
        raise LabelsError(msg)
    values = np.asarray(times.view(pa.int64()))
    if times.type.unit in _FINER:
        return -(-values // _FINER[times.type.unit])
    return values * (1000 if times.type.unit == "s" else 1)


class Entities:
    """Every entity of one kind that labels name, numbered, and all that is asked of each.

    Args:
        asked: the questions of each chunk of labels, in order.
    """

    def __init__(self, asked: Sequence[Questions]) -> None:
        ids = pa.chunked_array([each.ids for each in asked], pa.string())
        self.ids = pc.unique(ids)
        self.numbers = self.find(ids)
        self.times_ms = np.concatenate([each.times_ms for each in asked])
        self.until_ms = self.times_ms + np.concatenate([each.lags_ms for each in asked])
        counts = [len(each.times_ms) for each in asked]
        self.chunks = np.repeat(np.arange(len(counts)), counts)
        self.places = np.concatenate([np.arange(count) for count in counts])

    def find(self, ids: pa.Array | pa.ChunkedArray) -> Ints:
        """int64[n]: the number of each entity, -1 of those that nobody asks for."""
        return np.asarray(pc.index_in(ids, self.ids).fill_null(-1)).astype(np.int64)

    def chosen(self, ids: pa.Array, partitions: int) -> Chosen:
        """Which events of these entities anybody asks for."""
        numbers = self.find(ids)
        places = np.flatnonzero(numbers >= 0)
        return Chosen(places, numbers[places] % partitions, pa.array(numbers[places]))


def make_rows(job: Job, entity: str, of: Entities, partition: int) -> None:
    """Writes the rows of a partition's entities as they were at the times asked for, by chunk of labels."""
    job.spill.must_be_seen()
    bundle = job.bundles[entity]
    mine = np.flatnonzero(of.numbers % job.partitions == partition)
    mine = mine[np.lexsort((of.until_ms[mine], of.numbers[mine]))]
    if not len(mine):
        return
    tables = {name: job.spill.read(entity, name, partition) for name in bundle.events}
    happened = {
        name: events_of_rows(table, np.asarray(table["_entity"]), bundle.fields[name])
        for name, table in tables.items()
        if table is not None
    }
    rows, times_ms = of.numbers[mine], of.times_ms[mine]
    columns: dict[str, Any] = {}
    arrived = None
    if job.settle_ms is not None:
        events_ms = {name: np.asarray(table["_recorded"]) for name, table in tables.items() if table is not None}
        arrived = Arrived(events_ms, of.until_ms[mine])
        columns[UNSETTLED] = _unsettled(happened, events_ms, rows, times_ms, job.settle_ms)
    for family in bundle.families:
        blobs: list[bytes] = []
        for _, state in rows_at(family, happened, rows, times_ms, arrived=arrived):
            blobs += encode(family, state)
        columns[family.name] = pa.array(blobs, pa.binary())
    by_chunk = np.argsort(of.chunks[mine], kind="stable")
    chunks = of.chunks[mine][by_chunk]
    table = pa.table({"_place": of.places[mine], **columns}).take(pa.array(by_chunk))
    for begin, end in pairwise([*np.flatnonzero(np.diff(chunks, prepend=-1)).tolist(), len(chunks)]):
        folder = job.folder / "rows" / entity / str(chunks[begin])
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / f"{partition}.arrow", table.slice(begin, end - begin))


def _unsettled(
    events: Mapping[str, Events], arrived_ms: Mapping[str, Ints], rows: Ints, times_ms: Ints, settle_ms: int
) -> NDArray[np.bool_]:
    """bool[n]: for which entities at which times something arrived within `settle_ms`."""
    whose = np.concatenate([np.zeros(0, np.int64), *(each.rows for each in events.values())])
    arrived = np.concatenate([np.zeros(0, np.int64), *arrived_ms.values()])
    first_ms = min(arrived.min(initial=NEWEST_MS), times_ms.min(initial=NEWEST_MS)) - settle_ms
    # Entity and time as one number, in order.
    span = max(arrived.max(initial=0), times_ms.max(initial=0)) + 2 * settle_ms - first_ms
    sorted_ = np.sort(whose * span + arrived - first_ms)
    asked = rows * span + times_ms - first_ms
    found = np.searchsorted(sorted_, asked + settle_ms, "right") > np.searchsorted(sorted_, asked - settle_ms)
    unsettled: NDArray[np.bool_] = found
    return unsettled


def evaluate(job: Job, labels: pa.RecordBatch, chunk: int) -> pa.RecordBatch:
    """A chunk of labels with every feature added."""
    job.spill.must_be_seen()
    asked = questions(job, labels)
    states: dict[str, Rows | Totals | GivenRows] = {
        bundle.name: decode(bundle, _blobs(job, bundle, asked[bundle.entity], chunk)) for bundle in job.bundles.values()
    }
    for view in job.program.given:
        rows = labels[view.name]
        if len(view.target) == 1:  # A question's is that of any label that asks it.
            of = np.zeros(len(asked[view.target[0]].times_ms), np.intp)
            of[asked[view.target[0]].rows] = np.arange(len(labels))
            rows = rows.take(pa.array(of))
        states[view.name] = GivenRows(view.fields, rows.to_pylist())
    labels = labels.drop_columns([view.name for view in job.program.given])
    overrides = {
        entity: {field: _override(job, entity, field, labels[column]) for field, column in found.items()}
        for entity in asked
        if (found := _overrides(labels.schema, entity))
    }
    pairs = {entity: each.rows for entity, each in asked.items()}
    frame = job.program.evaluate(
        states,
        Asked({entity: each.ids.to_pylist() for entity, each in asked.items()}, pairs, overrides),
        {entity: each.times_ms for entity, each in asked.items()},
    )
    for feature in job.program.features:
        column = to_arrow(frame.values[feature.full_name], feature.value_type)
        if len(feature.entities) == 1:
            column = column.take(pa.array(pairs[feature.entities[0]]))
        labels = labels.append_column(feature.full_name, column)
    if job.settle_ms is not None:
        for entity, each in asked.items():
            flags = _flags(job, entity, len(each.times_ms), chunk)[each.rows]
            labels = labels.append_column(f"{UNSETTLED}{entity}", pa.array(flags))
    return labels


def check(job: Job, schema: pa.Schema) -> None:
    """Raises LabelsError if labels of this schema can't be joined."""
    for column, what in [
        (job.time_column, "the time of each label"),
        *((job.key(each), f"the key of {each}") for each in job.program.entities if each != NOBODY.name),
        *((view.name, f"rows of {view.view}: let Feast join them") for view in job.program.given),
    ]:
        if column not in schema.names:
            msg = f"labels have no column {column!r}, {what}; they have: {', '.join(schema.names) or 'none'}"
            raise LabelsError(msg)
    for entity in job.program.entities:
        for field, column in _overrides(schema, entity).items():
            if (entity, field) not in job.program.overridable:
                known = ", ".join(f"{each}{OVERRIDE}{name}" for each, name in sorted(job.program.overridable)) or "none"
                msg = f"{column}: no feature here is the last {field!r} of {entity}; what can be overridden: {known}"
                raise LabelsError(msg)
    if taken := [name for name in job.full_names if name in schema.names]:
        msg = f"{', '.join(taken)}: a column of the labels has the name of a feature; rename it"
        raise LabelsError(msg)


def _overrides(schema: pa.Schema, entity: str) -> dict[str, str]:
    """By field, the columns that stand in for what an entity's row knows: `item__price`."""
    prefix = f"{entity}{OVERRIDE}"
    return {name.removeprefix(prefix): name for name in schema.names if name.startswith(prefix)}


def _override(job: Job, entity: str, field: str, column: pa.Array) -> Any:
    """The values of a column that overrides, a list, as the field has them."""
    if job.program.overridable[entity, field] == "str":
        return _texts(column).to_pylist()
    try:
        return column.cast(pa.float64()).to_pylist()
    except pa.ArrowInvalid as error:
        msg = f"{entity}{OVERRIDE}{field}: {error}; it stands in for a number"
        raise LabelsError(msg) from error


def _flags(job: Job, entity: str, n: int, chunk: int) -> NDArray[np.bool_]:
    """Which of a chunk's questions about an entity are unsettled."""
    flags = np.zeros(n, bool)
    for table in _row_tables(job, entity, chunk):
        flags[np.asarray(table["_place"])] = np.asarray(table[UNSETTLED])
    return flags


def _row_tables(job: Job, entity: str, chunk: int) -> Iterator[pa.Table]:
    folder = job.folder / "rows" / entity / str(chunk)
    for path in folder.iterdir() if folder.exists() else ():
        with pa.ipc.open_stream(str(path)) as file:
            yield file.read_all()


def _blobs(job: Job, bundle: Bundle, asked: Questions, chunk: int) -> list[bytes | None]:
    """The rows of a chunk's entities, family by family, as the store has them."""
    n = len(asked.times_ms)
    blobs: list[bytes | None] = [None] * (n * len(bundle.families))
    for table in _row_tables(job, bundle.entity, chunk):
        places = table["_place"].to_pylist()
        for at, family in enumerate(bundle.families):
            for place, blob in zip(places, table[family.name].to_pylist(), strict=True):
                blobs[at * n + place] = blob or None
    return blobs


def _ids(job: Job, entity: str, labels: pa.RecordBatch) -> pa.StringArray:
    """Of whom an entity's features are, for each label."""
    return pa.nulls(len(labels), pa.string()) if entity == NOBODY.name else _texts(labels[job.key(entity)])


def _texts(column: pa.Array) -> pa.StringArray:
    """Ids as text."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pa.string())
