"""The kernel: `merge` and `evaluate`, over thousands of rows at once. No I/O, no clock of its own.

A row is a few tables of entries. An entry of a windowed table is a tile: the partial aggregate of all events from its
start up to the next hop. Tiles age: when merged, one that every finer window has already left is rounded down to the
next hop that any remaining window uses, and tiles that meet are added. The value of a window is the sum of the tiles
with `start >= tail(window)`, and as all later tails are multiples of the hops still in use, rounding can't change it
for any query at or after that merge's `now`. See docs/decisions/0001-one-table-structure.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features import sketch
from features.aggregations.base import Aggregation
from features.fold import fold_runs
from features.formulas import Numeric, formulas
from features.layout import Bundle, Family, TableLayout
from features.partials import DTYPES
from features.plan import Feature
from features.rows import Entries, Events, Index, Ints, Rows
from features.texts import hash64, unify
from features.times import TICK_MS, Window
from features.totals import Totals
from features.values import Maps, Texts, Values

__all__ = ["SLACK_MS", "Entries", "Evaluator", "Events", "Merged", "Rows", "evaluate", "merge"]

SLACK_MS = 10_000
"""How far `merge`'s now stays behind the clock, so that a query at a slightly earlier `as_of` is still exact."""


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
        kept, out, buckets_out = _enforce_bound(layout, merged)
        spilled = None
        if layout.table.bucket == "hash":
            # The next table is that of the sketch.
            out = out or merged.take(np.zeros(0, np.intp))
            cells = sketch.cells(np.asarray(out.buckets, np.uint64))
            spilled = Entries.of_table(out.rows, cells, out.starts, out.table, out.dtypes)
        elif layout.table.row == "":
            # What falls out of a last_k is no loss, so only shared buckets count as evicted.
            evicted += buckets_out
        tables.append(kept)
    last_event_ms = rows.last_event_ms.copy()
    for each in relevant.values():
        np.maximum.at(last_event_ms, each.rows, each.times_ms)
    return Merged(Rows(rows.n, last_event_ms, tuple(tables), texts), evicted)


Wanted = tuple[Feature, list[tuple[int, int]]]
"""A feature with the (table, partial) of its slots: see `features.layout.slots_of`."""


class Evaluator:
    """Features of one bundle, ready to be evaluated for any rows.

    Numbers of rows, and codes of texts, are written into a block: float64[len(names), n]. The others (lists, maps) are
    made from the totals when they are asked for.

    Attributes:
        names: the full names of the features in the block, in order.
        wanted: bool[tables], the tables that are read.
    """

    def __init__(self, bundle: Bundle, features: Iterable[Wanted]) -> None:
        self.wanted = np.zeros(len(bundle.tables), bool)
        self._bundle = bundle
        self._features: dict[str, tuple[Aggregation, int, list[tuple[int, int]]]] = {}
        self._maps: dict[str, tuple[Any, Any]] = {}
        numbers: dict[str, Numeric] = {}
        counted: list[str] = []
        for feature, slots in features:
            spec, name = feature.spec, feature.full_name
            assert isinstance(spec, Aggregation)  # noqa: S101  # for the type checker: slots_of has no others
            assert feature.window is not None  # noqa: S101  # as above
            self.wanted[[table for table, _ in slots]] = True
            self._features[name] = spec, spec.windows.index(feature.window), slots
            if spec.formula is not None:
                number = numeric(bundle, spec, feature.window, slots)
                if spec.by is None:
                    numbers[name] = number
                else:
                    self._maps[name] = formulas([number])
            elif spec.value_type == "int":
                counted.append(name)
        self.names = (*numbers, *counted)
        self._counted = tuple(counted)
        self._row_of = {name: row for row, name in enumerate(self.names)}
        self._formulas = formulas(numbers.values())

    def fold(self, state: Rows | Totals, now_ms: int) -> Totals:
        """The totals at `now_ms`: not before the `now_ms` of any merge that made the rows."""
        return Totals.of(self._bundle, state, now_ms, self.wanted) if isinstance(state, Rows) else state

    def write(self, totals: Totals, now_ms: int, block: NDArray[np.float64]) -> None:
        """Writes the numbers at `now_ms` into the block."""
        totals.finish(self._formulas, now_ms, block[: len(self.names) - len(self._counted)])
        for name in self._counted:
            spec, window, slots = self._features[name]
            parts = tuple(totals.slot(*slot) for slot in slots)
            counts = fill_default(spec.values(parts, now_ms)[window], spec.default)
            block[self._row_of[name]] = counts  # type: ignore[assignment]  # of an aggregation whose type is int

    def value(self, name: str, totals: Totals, now_ms: int, block: NDArray[np.float64]) -> Values:
        """The values of one feature."""
        spec, window, slots = self._features[name]
        if name in self._row_of:
            row: NDArray[np.float64] = block[self._row_of[name]]
            if spec.value_type != "str":
                return row
            return fill_default(Texts(np.where(np.isnan(row), -1, row).astype(np.int64), totals.texts), spec.default)
        if name not in self._maps:
            return spec.values(tuple(totals.slot(*slot) for slot in slots), now_ms)[window]
        part = totals.slot(*slots[0])
        numbers = np.empty((1, len(part.rows)))
        totals.finish(self._maps[name], now_ms, numbers)
        return Maps(part.rows, part.n_rows, part.buckets, part.texts, numbers[0], spec.without_events)


def numeric(bundle: Bundle, spec: Aggregation, window: Window, slots: list[tuple[int, int]]) -> Numeric:
    """A feature of the bundle as formulas have it."""
    assert spec.formula is not None  # noqa: S101  # for the type checker: asked of those that have one only
    columns = [(table, bundle.tables[table].slices[partial].start) for table, partial in slots]
    windows = bundle.tables[columns[0][0]].table.windows
    index = windows.index(window) if bundle.tables[columns[0][0]].table.starts else 0
    default = None if spec.default is None or spec.value_type == "str" else float(spec.default)
    return Numeric(spec.formula, columns[0], columns[-1], index, window, spec.constants, default)


def evaluate(family: Family, state: Rows | Totals, features: Iterable[Wanted], now_ms: int) -> dict[str, Values]:
    """The values of features at `now_ms`, by full name: see `Evaluator`, which does it again and again.

    Args:
        family: what the rows are.
        state: the rows, or their totals as of `now_ms`.
        features: which.
        now_ms: query time, not before the `now_ms` of any merge that made the rows.
    """
    features = list(features)
    evaluator = Evaluator(family.alone, features)
    totals = evaluator.fold(state, now_ms)
    block = np.empty((len(evaluator.names), totals.n))
    evaluator.write(totals, now_ms, block)
    return {each.full_name: evaluator.value(each.full_name, totals, now_ms, block) for each, _ in features}


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
        return _concat(*found) if found else Entries.of_lines(layout, np.zeros((layout.n_lines, 0), np.int64))

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
    table = entries.table.copy()
    for column, kind in zip(table, layout.physical, strict=True):
        if kind == "text":
            column[:] = lookup[column]
    buckets = lookup[entries.buckets] if layout.table.bucket == "text" else entries.buckets
    return Entries.of_table(entries.rows, buckets, entries.starts, table, layout.dtypes)


def _concat(*parts: Entries) -> Entries:
    if len(parts) == 1:
        return parts[0]
    return Entries.of_table(
        np.concatenate([part.rows for part in parts]),
        None if parts[0].buckets is None else np.concatenate([part.buckets for part in parts]),
        None if parts[0].starts is None else np.concatenate([part.starts for part in parts]),
        np.concatenate([part.table for part in parts], axis=1),
        parts[0].dtypes,
    )


def _reduce(layout: TableLayout, entries: Entries, now_ms: int) -> Entries:
    """Ages tiles, drops what every window has left, and folds entries of one key."""
    table = layout.table
    if entries.starts is not None:
        entries = _age(table.windows, entries, now_ms)
    elif layout.recency and not table.windows[-1].unbounded:
        entries = entries.take(entries.columns[0] >= table.windows[-1].tail_ticks(now_ms))
    if len(entries) == 0:
        return entries
    order = _order(entries)
    new = _new_key(entries, order)
    first = order[new]
    runs = np.empty(len(entries), np.int64)
    runs[order] = np.cumsum(new) - 1
    return Entries.of_table(
        entries.rows[first],
        None if entries.buckets is None else entries.buckets[first],
        None if entries.starts is None else entries.starts[first],
        fold_runs(layout.operations, layout.empty, entries.table, runs, len(first)),
        layout.dtypes,
    )


def _age(windows: tuple[Window, ...], entries: Entries, now_ms: int) -> Entries:
    tails = np.array([window.tail_ticks(now_ms) for window in windows])
    hops = np.array([window.hop_ticks for window in windows])
    starts = np.asarray(entries.starts)
    # Longer windows have earlier tails, so the windows that still hold a tile are the last ones.
    finest = len(tails) - np.searchsorted(tails[::-1], starts, side="right")
    if finest.max(initial=0) == len(tails):
        held = finest < len(tails)
        entries, starts, finest = entries.take(held), starts[held], finest[held]
    return Entries.of_table(
        entries.rows, entries.buckets, starts - starts % hops[finest], entries.table, entries.dtypes
    )


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


def _new_key(entries: Entries, order: Index | slice = slice(None), *, of_tiles: bool = True) -> NDArray[np.bool_]:
    """bool[entries]: where, in that order, the key (without `of_tiles`: row and bucket) differs from the one before."""
    new = np.ones(len(entries), bool)
    new[1:] = False
    for key in (entries.rows, entries.buckets, entries.starts if of_tiles else None):
        if key is not None:
            ordered = key[order]
            new[1:] |= ordered[1:] != ordered[:-1]
    return new


def _enforce_bound(layout: TableLayout, entries: Entries) -> tuple[Entries, Entries | None, int]:
    """The entries of the `bound` buckets a row that were seen latest, the others, and how many buckets these are."""
    bound = layout.table.bound
    if bound is None or len(entries) == 0:
        return entries, None, 0
    first = np.flatnonzero(_new_key(entries, of_tiles=False))
    rows = entries.rows[first]
    if np.bincount(rows).max() <= bound:
        return entries, None, 0
    times = [entries.columns[index] for index in layout.recency]
    seen = np.maximum.reduceat(np.maximum.reduce(times), first)
    assert entries.buckets is not None  # noqa: S101  # for the type checker: only tables with buckets have a bound
    latest_last = np.lexsort((entries.buckets[first], seen, rows))
    ends = np.searchsorted(rows, rows, side="right")
    kept = np.zeros(len(first), bool)
    kept[latest_last] = ends[latest_last] - np.arange(len(first)) <= bound
    of_entry = np.repeat(kept, np.diff(first, append=len(entries)))
    return entries.take(of_entry), entries.take(~of_entry), len(first) - int(kept.sum())
