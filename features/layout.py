"""From a view to the shape of its rows: which tables a row has, and which columns a table has.

A view's state is one row an entity; a list (`last_k`) or a sketch (`distinct`), which can be many times as long, has a
row of its own, so that a service that does not name it does not read it. Each is a *family*.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from features.aggregations.base import Aggregation, Measure, Slot, Table
from features.partials import AnyPartial, LatestText, Physical, Seen
from features.plan import Plan, ViewSpec, digest, features_of
from features.times import MINUTE_MS, duration_ms, hop_ms


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
    def recency(self) -> tuple[int, ...]:
        """The columns that say when a bucket was seen."""
        return tuple(index for index, kind in enumerate(self.physical) if kind in ("time", "tick"))


@dataclass(frozen=True)
class Family:
    """The rows of one view, or of one long aggregation of it."""

    name: str
    entity: str
    key: str
    tables: tuple[TableLayout, ...]
    retention_ms: int

    @cached_property
    def measures(self) -> tuple[Measure, ...]:
        """Everything that goes into its rows."""
        return tuple(dict.fromkeys(measure for layout in self.tables for _, measure in layout.partials))

    @cached_property
    def events(self) -> tuple[str, ...]:
        """Names of the contracts that it reads."""
        return tuple(dict.fromkeys(measure.event for measure in self.measures))

    @cached_property
    def text_fields(self) -> tuple[tuple[str, str], ...]:
        """(contract, field) of every text that its rows keep."""
        found: dict[tuple[str, str], None] = {}
        for layout in self.tables:
            for partial, measure in layout.partials:
                if layout.table.bucket == "text":
                    found[measure.event, str(layout.table.by)] = None
                if isinstance(partial, LatestText):
                    found[measure.event, str(measure.field)] = None
        return tuple(found)

    @cached_property
    def tag(self) -> int:
        """Sixteen bits that a row carries, so that one of another layout is never misread."""
        return int(digest(repr((self.name, self.tables)).encode())[:4], 16)


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
        Family(
            name=family_name(view.name, row),
            entity=entity.name,
            key=entity.key,
            tables=tuple(
                TableLayout(table, _with_recency(table, tuple(partials))) for table, partials in tables.items()
            ),
            retention_ms=max(_retention_ms(spec, forget_ms) for spec in view.aggregations if _row_of(spec) == row),
        )
        for row, tables in rows.items()
    )


def family_name(view: str, row: str) -> str:
    """The name of a view's family: the view's own, or with the long aggregation's after a dot."""
    return f"{view}.{row}" if row else view


def slots_of(plan: Plan) -> dict[str, tuple[Family, list[tuple[int, int]]]]:
    """For each feature that keeps state, by full name: its family, and (table, partial) of each of its slots."""
    found = {}
    for view in plan.views:
        families = {family.name: family for family in families_of(plan, view)}
        for feature in features_of(view):
            if isinstance(feature.spec, Aggregation):
                family = families[family_name(view.name, _row_of(feature.spec))]
                found[feature.full_name] = (family, [_locate(family, slot) for slot in feature.spec.slots()])
    return found


def _row_of(spec: Aggregation) -> str:
    return spec.slots()[0].table.row


def _locate(family: Family, slot: Slot) -> tuple[int, int]:
    index = next(index for index, layout in enumerate(family.tables) if layout.table == slot.table)
    return index, family.tables[index].partials.index((slot.partial, slot.measure))


def _with_recency(
    table: Table, partials: tuple[tuple[AnyPartial, Measure], ...]
) -> tuple[tuple[AnyPartial, Measure], ...]:
    """Buckets without tiles need a time, to tell which were seen latest."""
    if table.bound is None:
        return partials
    timed = {measure for partial, measure in partials if {"time", "tick"} & set(partial.physical)}
    untimed = dict.fromkeys(measure for _, measure in partials if measure not in timed)
    return (*partials, *((Seen(), measure) for measure in untimed))


def _retention_ms(spec: Aggregation, forget_ms: int) -> int:
    longest = spec.windows[-1]
    return forget_ms if longest.unbounded else longest.width_ms + hop_ms(longest.width_ms) + MINUTE_MS
