"""What was served against the same, computed again from the events: see docs/decisions/0021-comparison.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from config.settings import Settings
from features.plan import Feature, Plan, contracts_of, stateful
from store.archive import tables_of
from store.served import PLAN_COLUMN, about, read
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
            worst: list[tuple[Feature, Example]] = []
            for name in names:
                into = features.setdefault(name, Compared(service, name))
                own = [plan.entity(entity).key for entity in plan.features[name].entities]
                examples = _compare(into, about(settled, own), keys, name, tolerance)
                worst += [(plan.features[name], example) for example in examples]
            _add_events(settings, plan, worst)
        found.features += features.values()
    return found


def _compare(into: Compared, table: pa.Table, keys: list[str], name: str, tolerance: float) -> list[Example]:
    """Adds what differs in a feature; returns which of its worst examples are of these rows."""
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
    found = []
    for at in np.argsort(-differences, kind="stable")[:EXAMPLES].tolist():
        if differences[at] > 0:
            ids = {key: table[key][at].as_py() for key in keys}
            values = (served[at].as_py(), computed[at].as_py(), float(differences[at]))
            found.append(Example(ids, table[TIME_COLUMN][at].value, *values))
    into.examples = sorted([*into.examples, *found], key=lambda each: -each.difference)[:EXAMPLES]
    return [example for example in found if example in into.examples]


def _same(served: Any, computed: Any, tolerance: float) -> bool:
    if not isinstance(computed, list) or not computed or not isinstance(computed[0], tuple):
        return bool(served == computed)
    one, other = dict(served or ()), dict(computed)  # Maps.
    return one.keys() == other.keys() and all(
        abs(one[key] - other[key]) <= tolerance * max(abs(one[key]), abs(other[key])) for key in one
    )


def _add_events(settings: Settings, plan: Plan, worst: Sequence[tuple[Feature, Example]]) -> None:
    """Adds to each example the last events before it that its feature of its entities follows from."""
    contracts = [contracts_of(plan, stateful(plan, [feature.full_name])) for feature, _ in worst]
    tables = tables_of(settings, plan)
    archived = [(spec, tables[spec.topic]) for spec in plan.events if any(spec.name in each for each in contracts)]
    if not archived:
        return

    def add(contract: str, events: pa.RecordBatch) -> None:
        for (feature, example), wanted in zip(worst, contracts, strict=True):
            if contract in wanted:
                example.events += _events_about(plan, feature, example, contract, events)

    for spec, table in archived:
        for events in table.scan(spec.fields):
            add(spec.name, events)
    with tail_of(settings, plan, [table for _, table in archived]) as tail:
        for contract, events in events_of_tail(tail, lambda spec: spec.fields, 0):
            add(contract, events)
    for _, example in worst:
        example.events = sorted(example.events, key=lambda each: each["t"])[-_EVENTS_MAX:]


def _events_about(
    plan: Plan, feature: Feature, example: Example, contract: str, events: pa.RecordBatch
) -> list[dict[str, Any]]:
    """Those of an example's entities before its time."""
    ids = {key: example.ids.get(key) for key in (plan.entity(entity).key for entity in feature.entities)}
    whose = [
        pc.equal(events[key], value) for key, value in ids.items() if value is not None and key in events.schema.names
    ]
    mask = pc.less(events["_t"], example.at_ms)
    if whose:
        mask = pc.and_kleene(mask, reduce(pc.or_kleene, whose))
    return [
        {"contract": contract, "t": row["_t"]} | {key: value for key, value in row.items() if not key.startswith("_")}
        for row in events.filter(mask).to_pylist()
    ]
