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
from itertools import accumulate, pairwise, starmap
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features.aggregations.base import Aggregation, Measure
from features.formulas import Numeric, formulas
from features.layout import Bundle, Family
from features.partials import any_event
from features.plan import Feature
from features.rows import Entries, Events, Ints, Rows
from features.texts import NO_TEXTS, decimal_texts, hash64, unify
from features.tiles import latest, merge_tables
from features.times import Window
from features.totals import Totals
from features.values import Maps, Texts, Values

__all__ = ["SLACK_MS", "Entries", "Evaluator", "Events", "Merged", "Rows", "add", "evaluate", "merge"]

SLACK_MS = 10_000
"""How far `merge`'s now stays behind the clock, so that a query at a slightly earlier `as_of` is still exact."""
_NONE: Final = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Merged:
    """What `merge` answers: the new rows, and how many buckets of each table were evicted to keep a declared bound."""

    rows: Rows
    evicted: Ints


def merge(rows_of: Family | Bundle, rows: Rows, events: Mapping[str, Events], now_ms: int) -> Merged:
    """Adds events to rows.

    Args:
        rows_of: what the rows are.
        rows: the state of n entities.
        events: by contract, the events that concern these rows; those of contracts that are not read are ignored.
        now_ms: no later query is to be earlier than this: the smaller of the wall clock and the batch's largest record
            timestamp, less `SLACK_MS`. Too small only keeps finer tiles; too large gives wrong answers.
    """
    bundle = rows_of.alone if isinstance(rows_of, Family) else rows_of
    events = {name: events[name] for name in bundle.events if name in events}
    batch = Batch(bundle, events, rows.texts)
    state = (rows.pool, rows.sizes, np.append(batch.recode, -1), rows.n)
    measured = (batch.takes, batch.values, batch.buckets, batch.has_bucket)
    given: Any = (*state, now_ms, *bundle.merging, batch.rows, batch.times_ms, *measured)
    pool, sizes, evicted = merge_tables(*given)
    latest_ms = latest(rows.latest_ms, bundle.reads, batch.contracts, batch.rows, batch.times_ms)
    return Merged(Rows.of_pool(bundle, latest_ms, pool, sizes, batch.texts), evicted)


def add(rows_of: Family | Bundle, rows: Rows, others: Rows, now_ms: int) -> Merged:
    """Adds rows to rows of the same n entities that other events went into: as if all had gone into one.

    Args:
        rows_of: what the rows are.
        rows: the state of n entities.
        others: that of the same, from other events, of whatever time.
        now_ms: as of `merge`.
    """
    bundle = rows_of.alone if isinstance(rows_of, Family) else rows_of
    texts, codes = unify([rows.texts, others.texts])
    parts = [_NONE]
    for table, layout in enumerate(bundle.tables):
        lines = np.concatenate([each.lines(table) for each in (rows, others)], axis=1)
        ends = np.split(lines, [int(rows.sizes[table])], axis=1)
        for line in layout.text_lines:
            for own, recode in zip(ends, codes, strict=True):
                own[line] = np.append(recode, -1)[own[line]]
        parts.append(lines.ravel())
    latest_ms = np.maximum(rows.latest_ms, others.latest_ms)
    whole = Rows.of_pool(bundle, latest_ms, np.concatenate(parts), rows.sizes + others.sizes, texts)
    return merge(bundle, whole, {}, now_ms)


class Batch:
    """The events of all contracts, side by side: as `features.tiles.merge_tables` takes them.

    An event with a list that tables have buckets by stands here once more for each element, and goes into these tables
    only so.

    Attributes:
        texts: what codes of texts stand for, those of the rows too.
        recode: the rows' codes as they are among these.
        sources: intp[…], which of the events each is.
    """

    def __init__(self, bundle: Bundle, events: Mapping[str, Events], known: pa.StringArray = NO_TEXTS) -> None:
        self._events = events
        fields = [key for key in bundle.text_fields if key[0] in events]
        columns = [_Texts.of(events[name].fields[field]) for name, field in fields]
        self.texts, (self.recode, *codes) = unify([known, *(each.texts for each in columns)])
        self._codes = dict(zip(fields, codes, strict=True))
        lengths = [len(events[name].rows) if name in events else 0 for name in bundle.events]
        n = sum(lengths)
        self._spans = dict(zip(bundle.events, starmap(slice, pairwise([0, *accumulate(lengths)])), strict=True))
        more = {key: self._spans[key[0]].start + each.events for key, each in zip(fields, columns, strict=True)
                if each.events is not None}  # fmt: skip
        self.sources = np.concatenate([np.arange(n), *more.values()])
        self.contracts = np.repeat(np.arange(len(lengths)), lengths)[self.sources]
        self.rows = np.concatenate([_NONE, *(each.rows for each in events.values())])[self.sources]
        self.times_ms = np.concatenate([_NONE, *(each.times_ms for each in events.values())])[self.sources]
        self.takes = np.zeros((len(bundle.measures), n), bool)
        self.values = np.zeros((len(bundle.measures), n), np.int64)
        for measure, number in bundle.measures.items():
            if measure.event in events:
                self._measure(measure, number)
        self.takes, self.values = self.takes[:, self.sources], self.values[:, self.sources]
        # One more: tables without buckets take all that are there once.
        self.buckets = np.zeros((len(bundle.bucketed) + 1, len(self.sources)), np.int64)
        self.has_bucket = np.zeros((len(bundle.bucketed) + 1, len(self.sources)), bool)
        self.has_bucket[-1, :n] = True
        for (by, kind), number in bundle.bucketed.items():
            end = n
            for key, own in more.items():
                begin, end = end, end + len(own)
                if key[1] == by and kind == "text":
                    self.buckets[number, begin:end], self.has_bucket[number, begin:end] = self._codes[key], True
            for name in events:
                if (name, by) not in more:
                    self._bucket(name, by, kind, number)

    def _measure(self, measure: Measure, number: int) -> None:
        """Which events count, and what of each."""
        span, fields = self._spans[measure.event], self._events[measure.event].fields
        takes, values = self.takes[number, span], self.values[number, span]
        takes[:] = True if measure.where is None else measure.where.holds(fields)
        if measure.field is None:
            values.view(np.float64)[:] = 1.0
        elif not isinstance(column := fields[measure.field], pa.Array):
            takes &= ~np.isnan(column)
            values.view(np.float64)[:] = column + 0.0  # -0.0 stands for no event.
        else:
            takes &= ~np.asarray(pc.is_null(column))
            values[:] = self._codes.get((measure.event, measure.field), 0)

    def _bucket(self, name: str, by: str, kind: str, number: int) -> None:
        """The bucket of each event of a contract, and whether it has one."""
        span, column = self._spans[name], self._events[name].fields.get(by)
        buckets, has_bucket = self.buckets[number, span], self.has_bucket[number, span]
        if kind == "text" and (name, by) in self._codes:
            buckets[:] = self._codes[name, by]
            has_bucket[:] = buckets >= 0
        elif kind == "hash" and column is not None:
            texts = column if isinstance(column, pa.Array) else _as_texts(column)
            buckets[:] = hash64(texts.fill_null("")).view(np.int64)
            has_bucket[:] = ~np.asarray(pc.is_null(texts))


class _Texts(NamedTuple):
    """The texts of a column; of lists the distinct elements of each, and which event each is of (intp[texts])."""

    texts: pa.StringArray
    events: NDArray[np.intp] | None = None

    @classmethod
    def of(cls, column: Any) -> _Texts:
        if not (isinstance(column, pa.Array) and pa.types.is_list(column.type)):
            return cls(decimal_texts(column))
        elements = column.flatten().dictionary_encode()
        events = np.asarray(pc.list_parent_indices(column)).astype(np.intp)
        codes = np.asarray(elements.indices).astype(np.intp)
        once = np.unique(events * max(len(elements.dictionary), 1) + codes, return_index=True)[1]
        return cls(elements.dictionary.take(pa.array(codes[once])), events[once])


def _as_texts(numbers: NDArray[np.float64]) -> pa.StringArray:
    return pc.cast(pa.array(numbers + 0.0, from_pandas=True), pa.string())


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
                    self._maps[name] = formulas([number._replace(default=None)])
            elif spec.value_type == "int":
                counted.append(name)
        self.names = (*numbers, *counted)
        self._counted = tuple(counted)
        self._row_of = {name: row for row, name in enumerate(self.names)}
        self._formulas = formulas(numbers.values())

    def fold(self, state: Rows | Totals, now_ms: Ints) -> Totals:
        """The totals at `now_ms` (int64[1 or n]): not before the `now_ms` of any merge that made the rows."""
        return Totals.of(self._bundle, state, now_ms, self.wanted) if isinstance(state, Rows) else state

    def write(self, totals: Totals, now_ms: Ints, block: NDArray[np.float64]) -> int:
        """Writes the numbers at `now_ms` into the block; returns how many are null as float64 has no such number."""
        beyond = totals.finish(self._formulas, now_ms, block[: len(self.names) - len(self._counted)])
        for name in self._counted:
            spec, window, slots = self._features[name]
            parts = tuple(totals.slot(*slot) for slot in slots)
            counts = fill_default(spec.values(parts, now_ms)[window], spec.default)
            block[self._row_of[name]] = counts  # type: ignore[assignment]  # of an aggregation whose type is int
        return beyond

    def value(self, name: str, totals: Totals, now_ms: Ints, block: NDArray[np.float64]) -> Values:
        """The values of one feature."""
        spec, window, slots = self._features[name]
        if name in self._row_of:
            row: NDArray[np.float64] = block[self._row_of[name]]
            if spec.value_type != "str":
                return row
            return fill_default(Texts(np.where(np.isnan(row), -1, row).astype(np.int64), totals.texts), spec.default)
        if name not in self._maps:
            return spec.values(tuple(totals.slot(*slot) for slot in slots), now_ms)[window]
        return self._map(totals, now_ms, self._maps[name], slots)

    def _map(self, totals: Totals, now_ms: Ints, formula: tuple[Ints, Any], slots: list[tuple[int, int]]) -> Maps:
        """The buckets with an event in the window, but for those whose number is null."""
        part = totals.slot(*slots[0])
        (numbers,) = numbers_of = np.empty((1, len(part.rows)))
        totals.finish(formula, now_ms, numbers_of, part.rows)
        window = formula[0][0, 5]
        happened = np.zeros(len(numbers), bool)
        for table, partial in slots:
            of = self._bundle.tables[table].partials[partial][0]
            happened |= any_event(of, totals.slot(table, partial).totals[-1, window])
        kept = np.flatnonzero(happened & ~np.isnan(numbers))
        return Maps(part.rows[kept], part.n_rows, part.buckets[kept], part.texts, numbers[kept])


def numeric(bundle: Bundle, spec: Aggregation, window: Window, slots: list[tuple[int, int]]) -> Numeric:
    """A feature of the bundle as formulas have it."""
    assert spec.formula is not None  # noqa: S101  # for the type checker: asked of those that have one only
    columns = [(table, bundle.tables[table].slices[partial].start) for table, partial in slots]
    windows = bundle.tables[columns[0][0]].table.windows
    index = windows.index(window) if bundle.tables[columns[0][0]].table.starts else 0
    default = None if spec.default is None or spec.value_type == "str" else float(spec.default)
    return Numeric(spec.formula, columns[0], columns[-1], index, window, spec.constants, default)


def evaluate(family: Family, state: Rows | Totals, features: Iterable[Wanted], now_ms: int | Ints) -> dict[str, Values]:
    """The values of features at `now_ms`, by full name: see `Evaluator`, which does it again and again.

    Args:
        family: what the rows are.
        state: the rows, or their totals as of `now_ms`.
        features: which.
        now_ms: query time, not before the `now_ms` of any merge that made the rows: one for all, or int64[n].
    """
    features, now_ms = list(features), np.atleast_1d(np.asarray(now_ms, np.int64))
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
