"""The kernel: `merge` and `evaluate`, over thousands of rows at once. No I/O, no clock of its own.

A row is a few tables of entries. An entry of a windowed table is a tile: the partial aggregate of all events from its
start up to the next hop. Tiles age: when merged, one that every finer window has already left is rounded down to the
next hop that any remaining window uses, and tiles that meet are added. The value of a window is the sum of the tiles
with `start >= tail(window)`, and as all later tails are multiples of the hops still in use, rounding can't change it
for any query at or after that merge's `now`. See docs/decisions/0001-one-table-structure.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features import sketch
from features.aggregations.base import Aggregation
from features.layout import Family, TableLayout
from features.partials import DTYPES, Columns, Groups
from features.plan import Feature
from features.texts import NO_TEXTS, hash64, unify
from features.times import TICK_MS, Window
from features.values import Maps, Texts, Values, offsets_of

Ints = NDArray[np.int64]
Index = NDArray[np.intp]

SLACK_MS = 10_000
"""How far `merge`'s now stays behind the clock, so that a query at a slightly earlier `as_of` is still exact."""


@dataclass(frozen=True)
class Events:
    """Events of one contract: of which row (intp[n]), when (int64[n], ms), and their fields by name.

    A text field is a `pa.StringArray`, any other float64[n] with NaN for null.
    """

    rows: Index
    times_ms: Ints
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Entries:
    """One table of many rows, sorted by row, bucket and start; `columns` are as the layout's `physical` says."""

    rows: Index
    buckets: NDArray[Any] | None
    starts: Ints | None
    columns: Columns

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: NDArray[Any]) -> Entries:
        """The entries at an index or under a mask."""
        return Entries(
            self.rows[index],
            None if self.buckets is None else self.buckets[index],
            None if self.starts is None else self.starts[index],
            tuple(column[index] for column in self.columns),
        )


@dataclass(frozen=True)
class Rows:
    """All state of `n` entities in one family. Text columns and buckets are codes: positions in `texts`."""

    n: int
    last_event_ms: Ints
    tables: tuple[Entries, ...]
    texts: pa.StringArray

    @classmethod
    def empty(cls, family: Family, n: int) -> Rows:
        """Rows of entities never seen."""
        return cls(n, np.full(n, -1, np.int64), tuple(_no_entries(layout) for layout in family.tables), NO_TEXTS)


@dataclass(frozen=True)
class Merged:
    """What `merge` answers: the new rows, and how many buckets were evicted to keep the declared bounds."""

    rows: Rows
    evicted: int


def merge(family: Family, rows: Rows, events: Mapping[str, Events], now_ms: int) -> Merged:
    """Adds events to rows.

    Args:
        family: what the rows are.
        rows: the state of n entities.
        events: by contract, the events that concern these rows; those of contracts unknown to the family are ignored.
        now_ms: no later query is to be earlier than this: the smaller of the wall clock and the batch's largest record
            timestamp, less `SLACK_MS`. Too small only keeps finer tiles; too large gives wrong answers.
    """
    relevant = {name: events[name] for name in family.events if name in events}
    texts, codes = _unify(family, rows, relevant)
    fresh = _Fresh(relevant, codes)
    tables: list[Entries] = []
    evicted = 0
    spilled: Entries | None = None
    for layout, state in zip(family.tables, rows.tables, strict=True):
        arrived = fresh.entries(layout) if spilled is None else spilled
        merged = _reduce(layout, _concat(_recode(layout, state, codes[None]), arrived), now_ms)
        kept, out = _enforce_bound(layout, merged)
        spilled = None
        if layout.table.bucket == "hash":
            spilled = replace(out, buckets=sketch.cells(np.asarray(out.buckets, np.uint64)))
        elif layout.table.row == "":
            # What falls out of a last_k is no loss, so only shared buckets count as evicted.
            evicted += _runs(out)
        tables.append(kept)
    last_event_ms = rows.last_event_ms.copy()
    for each in relevant.values():
        np.maximum.at(last_event_ms, each.rows, each.times_ms)
    return Merged(Rows(rows.n, last_event_ms, tuple(tables), texts), evicted)


def evaluate(
    family: Family, rows: Rows, features: Iterable[tuple[Feature, list[tuple[int, int]]]], now_ms: int
) -> dict[str, Values]:
    """The values of features at `now_ms`, by full name.

    Args:
        family: what the rows are.
        rows: the state of n entities.
        features: which, each with the (table, partial) of its slots: see `features.layout.slots_of`.
        now_ms: query time, not before the `now_ms` of any merge that made the rows.
    """
    tables = [
        _TableState(layout, entries, rows, now_ms) for layout, entries in zip(family.tables, rows.tables, strict=True)
    ]
    values: dict[str, Values] = {}
    for feature, slots in features:
        spec, window = feature.spec, feature.window
        assert isinstance(spec, Aggregation)  # noqa: S101  # for the type checker: slots_of has no others
        assert window is not None  # noqa: S101  # as above
        parts = tuple(_Slice(tables[table], partial) for table, partial in slots)
        value = spec.value(window, parts, now_ms)
        if spec.by is not None:
            value = _by_bucket(parts[0], np.asarray(value), spec.without_events)
        values[feature.full_name] = fill_default(value, feature.default)
    return values


def fill_default(values: Values, default: float | str | None) -> Values:
    """The values, with `default` where they are null."""
    if default is None:
        return values
    if isinstance(values, np.ndarray):
        return np.where(np.isnan(values), float(default), values)
    if isinstance(values, Texts):
        texts = pa.concat_arrays([values.texts, pa.array([default], pa.string())])
        return Texts(np.where(values.codes < 0, len(values.texts), values.codes), texts)
    return values


class _Fresh:
    """Events on their way into tables; what several tables need of them is computed once."""

    def __init__(self, events: Mapping[str, Events], codes: Mapping[Any, Ints]) -> None:
        self._events = events
        self._codes = codes
        self._where: dict[Any, NDArray[np.bool_]] = {}
        self._hashes: dict[tuple[str, str], NDArray[np.uint64]] = {}

    def entries(self, layout: TableLayout) -> Entries:
        """One entry an event that any of the table's partials takes."""
        found = [
            self._of_contract(layout, name)
            for name in dict.fromkeys(measure.event for _, measure in layout.partials)
            if name in self._events
        ]
        return _concat(*found) if found else _no_entries(layout)

    def _of_contract(self, layout: TableLayout, name: str) -> Entries:
        table, events = layout.table, self._events[name]
        taken = np.zeros(len(events.rows), bool)
        columns: list[NDArray[Any]] = []
        for partial, measure in layout.partials:
            takes = self._takes(name, measure) if measure.event == name else np.zeros(len(taken), bool)
            taken |= takes
            values = self._values(name, measure.field) if measure.field and takes.any() else np.ones(len(taken))
            # Where the partial takes no part, its identity: it must not matter what the event holds there.
            of = partial.of(events.times_ms, np.where(takes, values, 0))
            columns += [
                np.where(takes, column, empty).astype(DTYPES[kind])
                for column, empty, kind in zip(of, partial.empty, partial.physical, strict=True)
            ]
        buckets = None
        if table.bucket is not None:
            by = str(table.by)
            buckets = self._codes[name, by] if table.bucket == "text" else self._hash(name, by)
            taken &= ~self._null(name, by)
        starts = events.times_ms // TICK_MS if table.starts else None
        return Entries(events.rows, buckets, starts, tuple(columns)).take(taken)

    def _takes(self, name: str, measure: Any) -> NDArray[np.bool_]:
        if measure not in self._where:
            fields = self._events[name].fields
            takes = (
                np.ones(len(self._events[name].rows), bool) if measure.where is None else measure.where.holds(fields)
            )
            self._where[measure] = takes & ~self._null(name, measure.field) if measure.field else takes
        return self._where[measure]

    def _null(self, name: str, field: str) -> NDArray[np.bool_]:
        column = self._events[name].fields[field]
        return np.asarray(pc.is_null(column)) if isinstance(column, pa.Array) else np.isnan(column)

    def _values(self, name: str, field: str) -> NDArray[Any]:
        column = self._events[name].fields[field]
        return (
            self._codes.get((name, field), np.zeros(len(column)))
            if isinstance(column, pa.Array)
            else np.asarray(column)
        )

    def _hash(self, name: str, field: str) -> NDArray[np.uint64]:
        if (name, field) not in self._hashes:
            column = self._events[name].fields[field]
            texts = (
                column
                if isinstance(column, pa.Array)
                else pc.cast(pa.array(column + 0.0, from_pandas=True), pa.string())
            )
            self._hashes[name, field] = hash64(texts.fill_null(""))
        return self._hashes[name, field]


def _unify(family: Family, rows: Rows, events: Mapping[str, Events]) -> tuple[pa.StringArray, dict[Any, Ints]]:
    """All texts of the rows (key None) and events (key (contract, field)) as codes into one sorted array."""
    keys: list[Any] = [None, *(key for key in family.text_fields if key[0] in events)]
    texts, codes = unify([rows.texts, *(events[name].fields[field] for name, field in keys[1:])])
    return texts, dict(zip(keys, codes, strict=True))


def _recode(layout: TableLayout, entries: Entries, codes: Ints) -> Entries:
    """The entries with their texts in the unified code."""
    if layout.table.bucket != "text" and "text" not in layout.physical:
        return entries
    lookup = np.append(codes, -1)
    return Entries(
        entries.rows,
        lookup[entries.buckets] if layout.table.bucket == "text" else entries.buckets,
        entries.starts,
        tuple(
            lookup[column] if kind == "text" else column
            for column, kind in zip(entries.columns, layout.physical, strict=True)
        ),
    )


def _concat(*parts: Entries) -> Entries:
    if len(parts) == 1:
        return parts[0]
    return Entries(
        np.concatenate([part.rows for part in parts]),
        None if parts[0].buckets is None else np.concatenate([part.buckets for part in parts]),
        None if parts[0].starts is None else np.concatenate([part.starts for part in parts]),
        tuple(np.concatenate(columns) for columns in zip(*(part.columns for part in parts), strict=True)),
    )


def _reduce(layout: TableLayout, entries: Entries, now_ms: int) -> Entries:
    """Ages tiles, drops what every window has left, and combines entries of one key."""
    table = layout.table
    if entries.starts is not None:
        entries = _age(table.windows, entries, now_ms)
    elif layout.recency and not table.windows[-1].unbounded:
        entries = entries.take(entries.columns[0] >= table.windows[-1].tail_ticks(now_ms))
    if len(entries) == 0:
        return entries
    entries = entries.take(_order(entries))
    first = np.flatnonzero(_new_key(entries))
    if len(first) == len(entries):
        return entries
    groups = Groups(first, len(entries))
    columns = tuple(
        column
        for (partial, _), where in zip(layout.partials, layout.slices, strict=True)
        for column in partial.combine(entries.columns[where], groups)
    )
    return replace(entries.take(first), columns=columns)


def _age(windows: tuple[Window, ...], entries: Entries, now_ms: int) -> Entries:
    tails = np.array([window.tail_ticks(now_ms) for window in windows])
    hops = np.array([window.hop_ticks for window in windows])
    starts = np.asarray(entries.starts)
    # Longer windows have earlier tails, so the windows that still hold a tile are the last ones.
    finest = len(tails) - np.searchsorted(tails[::-1], starts, side="right")
    if finest.max(initial=0) == len(tails):
        held = finest < len(tails)
        entries, starts, finest = entries.take(held), starts[held], finest[held]
    return replace(entries, starts=starts - starts % hops[finest])


def _order(entries: Entries) -> Index:
    if entries.buckets is not None:
        return np.lexsort(
            (entries.buckets, entries.rows)
            if entries.starts is None
            else (entries.starts, entries.buckets, entries.rows)
        )
    if entries.starts is None:
        return np.argsort(entries.rows, kind="stable")
    # One 64-bit key: ticks fit 32 bits until the year 2650. State is sorted already, which a stable sort profits from.
    return np.argsort((entries.rows << 32) | entries.starts, kind="stable")


def _new_key(entries: Entries) -> NDArray[np.bool_]:
    """bool[entries]: where the key differs from the entry's before it."""
    new = np.ones(len(entries), bool)
    new[1:] = entries.rows[1:] != entries.rows[:-1]
    for key in (entries.buckets, entries.starts):
        if key is not None:
            new[1:] |= key[1:] != key[:-1]
    return new


def _runs(entries: Entries) -> int:
    """How many (row, bucket) pairs there are."""
    return int(np.count_nonzero(_new_key(replace(entries, starts=None))))


def _enforce_bound(layout: TableLayout, entries: Entries) -> tuple[Entries, Entries]:
    """The entries of the `bound` buckets a row that were seen latest, and the others."""
    bound, none = layout.table.bound, entries.take(np.zeros(0, np.intp))
    if bound is None or len(entries) == 0:
        return entries, none
    first = np.flatnonzero(_new_key(replace(entries, starts=None)))
    rows = entries.rows[first]
    if np.bincount(rows).max() <= bound:
        return entries, none
    groups = Groups(first, len(entries))
    times = [entries.columns[index] for index in layout.recency]
    seen = np.maximum.reduceat(np.maximum.reduce(times), first)
    assert entries.buckets is not None  # noqa: S101  # for the type checker: only tables with buckets have a bound
    latest_last = np.lexsort((entries.buckets[first], seen, rows))
    ends = np.searchsorted(rows, rows, side="right")
    kept = np.zeros(len(first), bool)
    kept[latest_last] = ends[latest_last] - np.arange(len(first)) <= bound
    of_entry = kept[groups.ids]
    return entries.take(of_entry), entries.take(~of_entry)


def _no_entries(layout: TableLayout) -> Entries:
    buckets = {
        "text": np.zeros(0, np.int64),
        "cell": np.zeros(0, np.int64),
        "hash": np.zeros(0, np.uint64),
        None: None,
    }[layout.table.bucket]
    starts = np.zeros(0, np.int64) if layout.table.starts else None
    return Entries(np.zeros(0, np.intp), buckets, starts, tuple(np.zeros(0, DTYPES[kind]) for kind in layout.physical))


class _TableState:
    """A table of many rows at query time: its groups, and which entries each window selects."""

    def __init__(self, layout: TableLayout, entries: Entries, rows: Rows, now_ms: int) -> None:
        self.layout = layout
        self.entries = entries
        self.n_rows = rows.n
        self.texts = rows.texts
        self._now_ms = now_ms
        self._windows: dict[Window, tuple[NDArray[Any], Groups, Index]] = {}
        self._values: dict[tuple[Window, int], Columns] = {}

    @cached_property
    def _first(self) -> Index:
        """The first entry of each (row, bucket) run."""
        return np.flatnonzero(_new_key(replace(self.entries, starts=None)))

    @cached_property
    def rows(self) -> Index:
        """The row of each group."""
        return np.arange(self.n_rows) if self.entries.buckets is None else self.entries.rows[self._first]

    @cached_property
    def buckets(self) -> NDArray[Any]:
        """The bucket of each group."""
        assert self.entries.buckets is not None  # noqa: S101  # for the type checker: asked of tables with buckets only
        return self.entries.buckets[self._first]

    @cached_property
    def _group(self) -> Index:
        """The group of each entry."""
        return self.entries.rows if self.entries.buckets is None else Groups(self._first, len(self.entries)).ids

    def _selection(self, window: Window) -> tuple[NDArray[Any], Groups, Index]:
        """The window's entries, their runs of equal group, and the group of each run."""
        if window not in self._windows:
            starts = self.entries.starts
            if starts is None:
                inside = np.arange(len(self.entries))
            else:
                # Of the future, only the tile that holds now has begun.
                inside = np.flatnonzero(
                    (starts >= window.tail_ticks(self._now_ms)) & (starts <= self._now_ms // TICK_MS)
                )
            group = self._group[inside]
            first = np.flatnonzero(np.diff(group, prepend=-1))
            self._windows[window] = inside, Groups(first, len(group)), group[first]
        return self._windows[window]

    def over(self, window: Window, partial_index: int) -> Columns:
        """The combined partial of each group over the window."""
        if (window, partial_index) not in self._values:
            partial = self.layout.partials[partial_index][0]
            inside, groups, present = self._selection(window)
            result = tuple(
                np.full(len(self.rows), empty, DTYPES[kind])
                for empty, kind in zip(partial.empty, partial.physical, strict=True)
            )
            if len(inside):
                columns = tuple(column[inside] for column in self.entries.columns[self.layout.slices[partial_index]])
                for column, combined in zip(result, partial.combine(columns, groups), strict=True):
                    column[present] = combined
            self._values[window, partial_index] = result
        return self._values[window, partial_index]


@dataclass(frozen=True)
class _Slice:
    """One slot of a table: the kernel's side of `features.aggregations.base.Part`."""

    table: _TableState
    partial: int

    @property
    def n_rows(self) -> int:
        return self.table.n_rows

    @property
    def rows(self) -> Index:
        return self.table.rows

    @property
    def buckets(self) -> NDArray[Any]:
        return self.table.buckets

    @property
    def texts(self) -> pa.StringArray:
        return self.table.texts

    def over(self, window: Window) -> Columns:
        return self.table.over(window, self.partial)


def _by_bucket(part: _Slice, values: NDArray[np.float64], nothing: float) -> Maps:
    some = np.flatnonzero(~np.isnan(values) & (values != nothing))
    rows = part.rows[some]
    return Maps(offsets_of(rows, part.n_rows), part.buckets[some], part.texts, values[some], nothing)
