"""What was served against the same, computed again from the events: see docs/decisions/0021-comparison.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from config.settings import Settings
from features.aggregations import Aggregation
from features.plan import Feature, Plan, arguments
from store.archive import tables_of
from store.served import PLAN_COLUMN, read
from training.point_in_time import UNSETTLED
from training.run import TIME_COLUMN, Progress, TableLabels, events_of_tail, tail_of, training_set

SETTLE_MS: Final = 2_000
TOLERANCE: Final = 1e-6
EXAMPLES: Final = 3
_SERVED: Final = "_served:"
_EVENTS_MAX: Final = 10


class Example(msgspec.Struct):
    """A value that differs: whose, when, what was served, what is right, and the last events that it follows from."""

    ids: dict[str, str | None]
    at_ms: int
    served: Any
    computed: Any
    difference: float
    events: list[dict[str, Any]] = []


class Compared(msgspec.Struct):
    """One feature of one service."""

    service: str
    feature: str
    rows: int = 0
    mismatches: int = 0
    null_differences: int = 0
    largest: float = 0.0
    """Of the relative differences, among numbers."""
    total: float = 0.0
    examples: list[Example] = []

    @property
    def mean(self) -> float:
        """The mean relative difference."""
        return self.total / self.rows if self.rows else 0.0


@dataclass
class Comparison:
    """What was found.

    Attributes:
        features: one a service and feature.
        rows: how many rows were compared.
        unsettled: how many were not, as an event was on its way.
        unknown: how many were not, as their plan can't be read any more.
    """

    features: list[Compared] = field(default_factory=list)
    rows: int = 0
    unsettled: int = 0
    unknown: int = 0

    @property
    def mismatches(self) -> int:
        """In all features."""
        return sum(each.mismatches for each in self.features)


def compare(
    settings: Settings,
    plan_of: Callable[[int], Plan | None],
    since_ms: int,
    *,
    services: Sequence[str] = (),
    settle_ms: int = SETTLE_MS,
    tolerance: float = TOLERANCE,
    on_progress: Progress = lambda _step, _done, _of: None,
) -> Comparison:
    """Computes again what was kept of what was served since a time.

    Args:
        settings: where it was kept, and where the archive and Kafka are.
        plan_of: the plan of a number.
        since_ms: ms since the epoch.
        services: only these; by default all.
        settle_ms: rows are left out for which an event reached the broker within so many ms of the answer.
        tolerance: the relative difference up to which numbers are equal.
        on_progress: is told how far it is.

    Raises:
        LookupError: if nothing was kept.
    """
    found = Comparison()
    kept = [each for each in read(settings.sample_path(), since_ms, services) if len(each[1])]
    if not kept:
        msg = (
            f"nothing that was served since then is in {settings.sample_path()}: have servers keep some by "
            'HEADRACE_SAMPLE, such as {"ranking_v1": 0.01}'
        )
        raise LookupError(msg)
    for service, table in kept:
        features: dict[str, Compared] = {}
        for number in pc.unique(table[PLAN_COLUMN]).to_pylist():
            mine = table.filter(pc.equal(table[PLAN_COLUMN], number)).drop_columns(PLAN_COLUMN)
            plan = plan_of(number)
            if plan is None:
                found.unknown += len(mine)
                continue
            names = [name for name in mine.column_names if name in plan.features]
            labels = mine.rename_columns([f"{_SERVED}{name}" if name in names else name for name in mine.column_names])
            given: Any = {"settle_ms": settle_ms, "on_progress": on_progress}
            batches = list(training_set(settings, plan, names, TableLabels(labels), **given))
            whole = pa.Table.from_batches(batches).combine_chunks()
            settled = whole.filter(pc.invert(whole[UNSETTLED]))
            found.rows += len(settled)
            found.unsettled += len(whole) - len(settled)
            keys = [each.key for each in plan.entities if each.key in mine.column_names]
            for name in names:
                _compare(features.setdefault(name, Compared(service, name)), settled, keys, name, tolerance)
            for each in features.values():
                for example in each.examples:
                    if not example.events:
                        example.events = _events(settings, plan, plan.features[each.feature], example)
        found.features += features.values()
    return found


def _compare(into: Compared, table: pa.Table, keys: list[str], name: str, tolerance: float) -> None:
    """Adds what differs in a feature."""
    served, computed = table[f"{_SERVED}{name}"], table[name]
    if served.type != computed.type:
        served = served.cast(computed.type)
    null, other_null = (np.asarray(each.is_null()) for each in (served, computed))
    into.rows += len(table)
    into.null_differences += int((null != other_null).sum())
    if pa.types.is_floating(computed.type) or pa.types.is_integer(computed.type):
        one, other = (np.asarray(pc.fill_null(each.cast(pa.float64()), 0.0)) for each in (served, computed))
        size = np.maximum(np.maximum(np.abs(one), np.abs(other)), np.finfo(np.float64).tiny)
        differences = np.where(null | other_null, 0.0, np.abs(one - other) / size)
        into.largest = max(into.largest, float(differences.max(initial=0)))
        into.total += float(differences.sum())
        differences = np.where(null != other_null, np.inf, np.where(differences > tolerance, differences, 0.0))
    else:
        pairs = zip(served.to_pylist(), computed.to_pylist(), strict=True)
        differences = np.array([0.0 if _same(*pair, tolerance) else np.inf for pair in pairs])
    into.mismatches += int((differences > 0).sum())
    for at in np.argsort(-differences, kind="stable")[:EXAMPLES].tolist():
        if differences[at] > 0:
            ids = {key: table[key][at].as_py() for key in keys}
            at_ms = table[TIME_COLUMN][at].value
            values = (served[at].as_py(), computed[at].as_py(), float(differences[at]))
            into.examples = sorted([*into.examples, Example(ids, at_ms, *values)], key=lambda each: -each.difference)
    into.examples = into.examples[:EXAMPLES]


def _same(served: Any, computed: Any, tolerance: float) -> bool:
    if not isinstance(computed, list) or not computed or not isinstance(computed[0], tuple):
        return bool(served == computed)
    one, other = dict(served or ()), dict(computed)  # Maps.
    return one.keys() == other.keys() and all(
        abs(one[key] - other[key]) <= tolerance * max(abs(one[key]), abs(other[key])) for key in one
    )


def _events(settings: Settings, plan: Plan, feature: Feature, example: Example) -> list[dict[str, Any]]:
    """The last events before a time that a feature of some entities follows from."""
    specs = [plan.features[name].spec for name in _stateful(plan, feature.full_name)]
    contracts = {measure.event for spec in specs if isinstance(spec, Aggregation) for measure in spec.measures}
    found: list[dict[str, Any]] = []
    tables = tables_of(settings, plan)
    archived = [(spec, tables[spec.topic]) for spec in plan.events if spec.name in contracts]

    def add(contract: str, events: pa.RecordBatch) -> None:
        whose = [
            pc.equal(events[key], value)
            for key, value in example.ids.items()
            if value is not None
            and key in events.schema.names
            and plan.entity(_entity_of(plan, key)).name in feature.entities
        ]
        mask = pc.less(events["_t"], example.at_ms)
        if whose:
            any_of = whose[0]
            for each in whose[1:]:
                any_of = pc.or_kleene(any_of, each)
            mask = pc.and_kleene(mask, any_of)
        for row in events.filter(mask).to_pylist():
            plain = {name: value for name, value in row.items() if not name.startswith("_")}
            found.append({"contract": contract, "t": row["_t"], **plain})

    for spec, table in archived:
        for events in table.scan(spec.fields):
            add(spec.name, events)
    with tail_of(settings, plan, [table for _, table in archived]) as tail:
        for contract, events in events_of_tail(tail, lambda spec: spec.fields, 0):
            add(contract, events)
    return sorted(found, key=lambda each: each["t"])[-_EVENTS_MAX:]


def _entity_of(plan: Plan, key: str) -> str:
    return next(each.name for each in plan.entities if each.key == key)


def _stateful(plan: Plan, full_name: str) -> Iterator[str]:
    spec = plan.features[full_name].spec
    if isinstance(spec, Aggregation):
        yield full_name
    for name in arguments(spec):
        yield from _stateful(plan, name)
