"""From a view to the shape of its rows: which tables a row has, and which columns a table has.

A view's state is one row an entity; a list (`last_k`) or a sketch (`distinct`), which can be many times as long, has a
row of its own, so that a service that does not name it does not read it. Each is a *family*.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.aggregations.base import Aggregation, Measure, Slot, Table
from features.fold import operations
from features.partials import DTYPES, AnyPartial, Earliest, EarliestText, GreatestText, LatestText, Physical, Seen
from features.plan import Plan, ViewSpec, digest, features_of
from features.times import MINUTE_MS, duration_ms

_ROW_FORMAT: Final = 2
"""Of what `store.codec` writes: whoever changes that counts on."""


@dataclass(frozen=True)
class TableLayout:
    """A table and its partials, each with the events that go in."""

    table: Table
    partials: tuple[tuple[AnyPartial, Measure], ...]

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each partial's columns are among the table's."""
        ends = [0]
        for partial, _ in self.partials:
            ends.append(ends[-1] + len(partial.physical))
        return tuple(slice(start, end) for start, end in pairwise(ends))

    @cached_property
    def physical(self) -> tuple[Physical, ...]:
        """How each column is packed."""
        return tuple(kind for partial, _ in self.partials for kind in partial.physical)

    @cached_property
    def dtypes(self) -> tuple[type[np.generic], ...]:
        """The dtype of each column."""
        return tuple(DTYPES[kind] for kind in self.physical)

    @cached_property
    def n_lines(self) -> int:
        """How many numbers an entry is in memory: its row, its start and bucket where it has them, and its columns."""
        return 1 + self.table.starts + (self.table.bucket is not None) + len(self.physical)

    @cached_property
    def totals_shape(self) -> tuple[int, int]:
        """Columns, and windows: one where entries are no tiles."""
        return len(self.physical), len(self.table.windows) if self.table.starts else 1

    @cached_property
    def shape(self) -> NDArray[np.int64]:
        """int64[6]: lines, whether there are starts, whether there are buckets, columns, windows, partials."""
        buckets = self.table.bucket is not None
        return np.array([self.n_lines, self.table.starts, buckets, *self.totals_shape, len(self.partials)], np.int64)

    @cached_property
    def operations(self) -> NDArray[np.int64]:
        """How its partials are folded: see `features.fold.operations`."""
        return operations(tuple(partial for partial, _ in self.partials))

    @cached_property
    def empty(self) -> NDArray[np.int64]:
        """int64[columns]: the identity of each column, of floats the bits."""
        values = [value for partial, _ in self.partials for value in partial.empty]
        bits = [np.array(value, dtype).view(np.int64) for value, dtype in zip(values, self.dtypes, strict=True)]
        return np.array(bits, np.int64)

    @cached_property
    def is_float(self) -> NDArray[np.bool_]:
        """bool[columns]: which hold the bits of a float64."""
        return np.array([dtype is np.float64 for dtype in self.dtypes], bool)

    @cached_property
    def recency(self) -> NDArray[np.int64]:
        """int64[…]: the columns that say when a bucket was seen; those that say when first as their complement."""
        times = [
            ~place.start if isinstance(partial, Earliest) else place.start
            for (partial, _), place in zip(self.partials, self.slices, strict=True)
            if partial.physical[0] in ("time", "tick")
        ]
        return np.array(times, np.int64)

    @cached_property
    def ageing(self) -> NDArray[np.int64]:
        """int64[windows, 3]: how its entries age, see `features.tiles.meet`."""
        windows = self.table.windows
        if not self.table.starts:
            windows = windows[-1:] if len(self.recency) and not windows[-1].unbounded else ()
        ageing = [(each.width_ms, each.hop_ms, each.hop_ticks) for each in windows]
        return np.array(ageing, np.int64).reshape(-1, 3)

    @cached_property
    def text_lines(self) -> tuple[int, ...]:
        """The lines that hold codes of texts."""
        first = self.n_lines - len(self.physical)
        columns = tuple(first + index for index, kind in enumerate(self.physical) if kind == "text")
        return (first - 1, *columns) if self.table.bucket == "text" else columns


class Folding(NamedTuple):
    """Plain arrays, one after the other for all tables: see `features.fold.fold_tables`."""

    shapes: NDArray[np.int64]
    operations: NDArray[np.int64]
    empty: NDArray[np.int64]
    is_float: NDArray[np.bool_]
    windows: NDArray[np.int64]


class Merging(NamedTuple):
    """Plain arrays, one after the other for all tables: see `features.tiles.merge_tables`."""

    shapes: NDArray[np.int64]
    operations: NDArray[np.int64]
    empty: NDArray[np.int64]
    measures: NDArray[np.int64]
    kinds: NDArray[np.int64]
    ageing: NDArray[np.int64]
    recency: NDArray[np.int64]
    is_text: NDArray[np.bool_]


@dataclass(frozen=True)
class Family:
    """The rows of one view, or of one long aggregation of it."""

    name: str
    entity: str
    key: str
    tables: tuple[TableLayout, ...]
    retention_ms: int

    def __hash__(self) -> int:
        return hash(self.tag)

    @cached_property
    def alone(self) -> Bundle:
        """The bundle of just this family."""
        return Bundle((self,))

    @cached_property
    def has_buckets(self) -> bool:
        """Whether any of its tables has."""
        return any(layout.table.bucket is not None for layout in self.tables)

    @cached_property
    def events(self) -> tuple[str, ...]:
        """Names of the contracts that it reads."""
        return tuple(dict.fromkeys(measure.event for layout in self.tables for _, measure in layout.partials))

    @cached_property
    def tag(self) -> bytes:
        """Four bytes that a row carries, so that one of another layout is never misread."""
        return bytes.fromhex(digest(repr((_ROW_FORMAT, self.name, self.tables)).encode())[:8])


@dataclass(frozen=True)
class Bundle:
    """Families of one entity that are read together: a row of a bundle is a row of each."""

    families: tuple[Family, ...]

    def __hash__(self) -> int:
        return hash(self.families)

    @cached_property
    def name(self) -> str:
        """The names of its families."""
        return "+".join(family.name for family in self.families)

    @property
    def entity(self) -> str:
        """The entity that they are about."""
        return self.families[0].entity

    @cached_property
    def tables(self) -> tuple[TableLayout, ...]:
        """The tables of all families."""
        return tuple(layout for family in self.families for layout in family.tables)

    @cached_property
    def events(self) -> tuple[str, ...]:
        """Names of the contracts that its families read."""
        return tuple(dict.fromkeys(name for family in self.families for name in family.events))

    @cached_property
    def fields(self) -> dict[str, tuple[str, ...]]:
        """Of each contract, the fields that its families read."""
        found: dict[str, dict[str, None]] = {name: {} for name in self.events}
        for layout in self.tables:
            for _, measure in layout.partials:
                conditions = () if measure.where is None else measure.where.fields()
                names = (measure.field, *(layout.table.by or "").split("+"), *sorted(conditions))
                found[measure.event].update(dict.fromkeys(name for name in names if name))
        return {name: tuple(fields) for name, fields in found.items()}

    @cached_property
    def measures(self) -> dict[Measure, int]:
        """Everything that goes into its rows, numbered."""
        every = dict.fromkeys(measure for layout in self.tables for _, measure in layout.partials)
        return {measure: number for number, measure in enumerate(every)}

    @cached_property
    def bucketed(self) -> dict[tuple[str, str], int]:
        """Every field that tables have buckets by, but for cells that are spilled, numbered."""
        kinds = ((str(each.table.by), str(each.table.bucket)) for each in self.tables)
        every = dict.fromkeys((by, kind) for by, kind in kinds if kind in ("text", "hash", "log", "event"))
        return {by_kind: number for number, by_kind in enumerate(every)}

    @cached_property
    def reads(self) -> NDArray[np.bool_]:
        """bool[families, contracts]: which family reads which of `events`."""
        return np.array([[name in family.events for name in self.events] for family in self.families])

    @cached_property
    def text_fields(self) -> tuple[tuple[str, str], ...]:
        """(contract, field) of every text that its rows keep."""
        found: dict[tuple[str, str], None] = {}
        for layout in self.tables:
            for partial, measure in layout.partials:
                if layout.table.bucket == "text":
                    found[measure.event, str(layout.table.by)] = None
                if isinstance(partial, LatestText | EarliestText | GreatestText):
                    found[measure.event, str(measure.field)] = None
        return tuple(found)

    @cached_property
    def n_totals(self) -> NDArray[np.int64]:
        """int64[tables]: how many totals a group of each has."""
        return np.array([columns * windows for columns, windows in (each.totals_shape for each in self.tables)])

    @cached_property
    def folding(self) -> Folding:
        """Its tables as `features.fold.fold_tables` takes them."""
        layouts = self.tables
        return Folding(
            np.array([each.shape for each in layouts]),
            np.concatenate([each.operations for each in layouts]),
            np.concatenate([each.empty for each in layouts]),
            np.concatenate([each.is_float for each in layouts]),
            np.array(
                [
                    (window.width_ms, window.hop_ms)
                    for each in layouts
                    for window in each.table.windows[: each.totals_shape[1]]
                ],
                np.int64,
            ),
        )

    @cached_property
    def merging(self) -> Merging:
        """Its tables as `features.tiles.merge_tables` takes them."""
        layouts, folding = self.tables, self.folding
        is_text = [line in each.text_lines for each in layouts for line in range(each.n_lines)]
        return Merging(
            folding.shapes,
            folding.operations,
            folding.empty,
            np.array([self.measures[measure] for each in layouts for _, measure in each.partials], np.int64),
            np.array([self._kind(each) for each in layouts], np.int64),
            np.concatenate([each.ageing for each in layouts]),
            np.concatenate([each.recency for each in layouts]),
            np.array(is_text, bool),
        )

    def _kind(self, layout: TableLayout) -> tuple[int, ...]:
        table = layout.table
        return (
            self.bucketed.get((str(table.by), str(table.bucket)), -1),
            table.bound or 0,
            table.bucket == "hash",
            # What falls out of a last_k is no loss, so only shared buckets count.
            table.bucket != "hash" and table.row == "",
            len(layout.ageing),
            len(layout.recency),
            table.bucket == "event",
        )


def families_of(plan: Plan, view: ViewSpec) -> tuple[Family, ...]:
    """The families of a view; a cross view has none."""
    if len(view.entities) > 1:
        return ()
    entity = plan.entity(view.entities[0])
    rows: dict[str, dict[Table, dict[tuple[AnyPartial, Measure], None]]] = {}
    for spec in view.aggregations:
        for slot in spec.slots():
            rows.setdefault(slot.table.row, {}).setdefault(slot.table, {})[slot.partial, slot.measure] = None
    forget_ms = duration_ms(entity.forget_after) if entity.forget_after else 0
    return tuple(
        _only(
            Family(
                name=family_name(view.name, row),
                entity=entity.name,
                key=entity.key,
                tables=tuple(
                    TableLayout(table, _with_recency(table, tuple(partials))) for table, partials in tables.items()
                ),
                retention_ms=max(_retention_ms(spec, forget_ms) for spec in view.aggregations if _row_of(spec) == row),
            )
        )
        for row, tables in rows.items()
    )


@lru_cache(maxsize=4096)
def _only(family: Family) -> Family:
    """The one object of all equal families: who keeps something by family then compares no tables to find it again."""
    return family


def family_name(view: str, row: str) -> str:
    """The name of a view's family: the view's own, or with the long aggregation's after a dot."""
    return f"{view}.{row}" if row else view


def view_of(plan: Plan, family: str) -> ViewSpec | None:
    """The view that a family is of, by its name; None where the plan has no such view."""
    name = family.partition(".")[0]
    return next((view for view in plan.views if view.name == name), None)


def family_of(plan: Plan, name: str) -> Family | None:
    """The family of this name; None where the plan has no such."""
    view = view_of(plan, name)
    return next((each for each in families_of(plan, view) if each.name == name), None) if view else None


def slots_of(plan: Plan) -> dict[str, tuple[Family, list[tuple[int, int]]]]:
    """For each feature that keeps state, by full name: its family, and (table, partial) of each of its slots."""
    found = {}
    for view in plan.views:
        families = {family.name: family for family in families_of(plan, view)}
        for feature in features_of(view):
            if isinstance(feature.spec, Aggregation):
                family = families[family_name(view.name, _row_of(feature.spec))]
                found[feature.full_name] = (family, [locate(family, slot) for slot in feature.spec.slots()])
    return found


def _row_of(spec: Aggregation) -> str:
    return spec.slots()[0].table.row


def locate(family: Family, slot: Slot) -> tuple[int, int]:
    """A slot's place in its family: the table, and which of the table's partials."""
    index = next(index for index, layout in enumerate(family.tables) if layout.table == slot.table)
    return index, family.tables[index].partials.index((slot.partial, slot.measure))


def _with_recency(
    table: Table, partials: tuple[tuple[AnyPartial, Measure], ...]
) -> tuple[tuple[AnyPartial, Measure], ...]:
    """Buckets without tiles need a time, to tell which were seen latest."""
    if table.bound is None or table.bucket == "event":
        return partials
    timed = {measure for partial, measure in partials if {"time", "tick"} & set(partial.physical)}
    untimed = dict.fromkeys(measure for _, measure in partials if measure not in timed)
    return (*partials, *((Seen(), measure) for measure in untimed))


def _retention_ms(spec: Aggregation, forget_ms: int) -> int:
    longest = spec.reach(spec.windows[-1])
    return forget_ms if longest.unbounded else longest.width_ms + longest.hop_ms + MINUTE_MS
