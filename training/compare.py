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
from numpy.typing import NDArray

from config.settings import Settings
from features.plan import Feature, Plan, contracts_of, stateful
from features.texts import decimal_texts
from store.archive import table_names
from store.forgotten import Forgotten
from store.served import PLAN_COLUMN, about, read
from training.point_in_time import LAG, UNSETTLED
from training.run import TIME_COLUMN, Known, Progress, TableLabels, training_set

SETTLE_MS: Final = 2_000
TOLERANCE: Final = 1e-6
"""The relative difference up to which numbers are equal."""
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
    undecided: int = 0
    """Rows besides: an event was on its way, and what was served is none of what was tried."""
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
        unknown: how many were not, as their plan can't be read any more.
        forgotten: how many were not, as somebody that they are about was forgotten since.
    """

    features: list[Compared] = field(default_factory=list)
    rows: int = 0
    unknown: int = 0
    forgotten: int = 0

    @property
    def mismatches(self) -> int:
        """In all features."""
        return sum(each.mismatches for each in self.features)

    @property
    def undecided(self) -> float:
        """The share of values of which nobody can say it."""
        undecided = sum(each.undecided for each in self.features)
        return undecided / max(undecided + sum(each.rows for each in self.features), 1)


def compare(
    settings: Settings,
    plan_of: Callable[[int], Plan | None],
    since_ms: int,
    *,
    services: Sequence[str] = (),
    settle_ms: int = SETTLE_MS,
    on_progress: Progress = lambda _step, _done, _of: None,
) -> Comparison:
    """Computes again what was kept of what was served since a time.

    Args:
        settings: where it was kept, and where the archive and Kafka are.
        plan_of: the plan of a number.
        since_ms: ms since the epoch.
        services: only these; by default all.
        settle_ms: an event that reached the broker within so many ms of the answer may be in it or not.
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
    known_of: dict[int, Known] = {}  # Kafka's tail is read once a plan, whatever the number of services.
    for service, table in kept:
        features: dict[str, Compared] = {}
        for number in pc.unique(table[PLAN_COLUMN]).to_pylist():
            mine = table.filter(pc.equal(table[PLAN_COLUMN], number)).drop_columns(PLAN_COLUMN)
            plan = plan_of(number)
            if plan is None:
                found.unknown += len(mine)
                continue
            known = known_of[number] = known_of.get(number) or Known.of(settings, plan)
            n_kept, mine = len(mine), _not_forgotten(known.forgotten, plan, mine, settle_ms)
            found.forgotten += n_kept - len(mine)
            found.rows += len(mine)
            if not len(mine):
                continue
            given: Any = {"settle_ms": settle_ms, "known": known, "on_progress": on_progress}
            worst: list[tuple[Feature, Example]] = []
            for name, closest in _closest(settings, plan, mine, **given).items():
                into = features.setdefault(name, Compared(service, name))
                examples = _add(into, closest, mine, [each.key for each in plan.entities])
                worst += [(plan.features[name], example) for example in examples]
            _add_events(known, plan, worst)
        found.features += features.values()
    return found


def _not_forgotten(forgotten: Forgotten, plan: Plan, served: pa.Table, settle_ms: int) -> pa.Table:
    times_ms = np.asarray(served[TIME_COLUMN].combine_chunks().view(pa.int64()))
    for entity in plan.entities:
        if entity.key in served.column_names:
            counts = forgotten.counts(entity.name, served[entity.key].combine_chunks(), times_ms - settle_ms)
            if counts is not None:
                served, times_ms = served.filter(pa.array(counts)), times_ms[counts]
    return served


@dataclass
class _Closest:
    """Of one feature's rows, what is closest to what was served of all that may be right.

    Attributes:
        computed: the values.
        differences: float64[n], relative; infinite between what can't be subtracted.
        settled: bool[n], whether nothing that it follows from was on its way: then all is the same.
        asked: bool[n], whether the answer was about the feature's entities; else nothing of it was served.
    """

    computed: pa.Array
    differences: NDArray[np.float64]
    settled: NDArray[np.bool_]
    asked: NDArray[np.bool_]


def _closest(
    settings: Settings, plan: Plan, served: pa.Table, *, settle_ms: int, **options: Any
) -> dict[str, _Closest]:
    """By feature. What was on its way to rows may have been merged or not: first all or nothing of it is tried.

    For rows that this does not explain it is tried how long it took, more and more finely.
    """
    names = [name for name in served.column_names if name in plan.features]
    labels = served.rename_columns([f"{_SERVED}{name}" if name in names else name for name in served.column_names])
    found: dict[str, _Closest] = {}
    open_ = np.arange(len(served))
    finer = sorted({-settle_ms >> shift for shift in range(settle_ms.bit_length())} | {0})
    for lags_ms in ([-settle_ms, settle_ms], finer[1:]):
        each_lag = labels.take(pa.array(np.repeat(open_, len(lags_ms))))
        each_lag = TableLabels(each_lag.append_column(LAG, pa.array(np.tile(lags_ms, len(open_)))))
        given: Any = {"settle_ms": settle_ms, **options}
        table = pa.Table.from_batches(training_set(settings, plan, names, each_lag, **given)).combine_chunks()
        is_open = np.zeros(len(open_), bool)
        for name in names:
            asked = about(served, [plan.entity(entity).key for entity in plan.features[name].entities])
            differences = _differences(table[f"{_SERVED}{name}"], table[name]).reshape(len(open_), -1)
            differences[~asked[open_]] = 0
            best = differences.argmin(axis=1)
            rows = np.arange(len(open_))
            computed = table[name].take(pa.array(rows * len(lags_ms) + best)).combine_chunks()
            differences = differences[rows, best]
            if name in found:
                known = found[name]
                better = differences < known.differences[open_]
                of_both = np.arange(len(served))
                of_both[open_[better]] = len(served) + rows[better]
                known.computed = pa.concat_arrays([known.computed, computed]).take(pa.array(of_both))
                known.differences[open_[better]] = differences[better]
            else:
                on_way = [np.asarray(table[f"{UNSETTLED}{each}"]) for each in plan.features[name].entities]
                settled = ~np.any(on_way, axis=0)[:: len(lags_ms)]
                found[name] = _Closest(computed, differences, settled, asked)
                is_open |= ~settled & (differences > TOLERANCE)
        open_ = open_[is_open]
        if not len(open_):
            break
    return found


def _add(into: Compared, closest: _Closest, served: pa.Table, keys: list[str]) -> list[Example]:
    """Adds what differs in a feature; returns which of its worst examples are of these rows."""
    differ = closest.differences > TOLERANCE
    decided = closest.asked & (closest.settled | ~differ)
    into.rows += int(decided.sum())
    into.undecided += int((closest.asked & ~decided).sum())
    differences = np.where(decided, closest.differences, 0)
    into.mismatches += int((differences > TOLERANCE).sum())
    values = served[into.feature]
    into.null_differences += int(
        (decided & (np.asarray(values.is_null()) != np.asarray(closest.computed.is_null()))).sum()
    )
    finite = differences[np.isfinite(differences)]
    into.largest = max(into.largest, float(finite.max(initial=0)))
    into.total += float(finite.sum())
    found = []
    for at in np.argsort(-differences, kind="stable")[:EXAMPLES].tolist():
        if differences[at] > TOLERANCE:
            ids = {key: served[key][at].as_py() for key in keys if key in served.column_names}
            both = values[at].as_py(), closest.computed[at].as_py()
            found.append(Example(ids, served[TIME_COLUMN][at].value, *both, float(differences[at])))
    into.examples = sorted([*into.examples, *found], key=lambda each: -each.difference)[:EXAMPLES]
    return [example for example in found if example in into.examples]


def _differences(served: pa.ChunkedArray, computed: pa.ChunkedArray) -> NDArray[np.float64]:
    """float64[n]: of numbers relative to the larger; infinite between null and a value, and between others."""
    if served.type != computed.type:
        served = served.cast(computed.type)
    null, other_null = (np.asarray(each.is_null()) for each in (served, computed))
    if pa.types.is_floating(computed.type) or pa.types.is_integer(computed.type):
        one, other = (np.asarray(pc.fill_null(each.cast(pa.float64()), 0.0)) for each in (served, computed))
        size = np.maximum(np.maximum(np.abs(one), np.abs(other)), np.finfo(np.float64).tiny)
        differences: NDArray[np.float64] = np.abs(one - other) / size
        differences[null | other_null] = 0
        differences[null != other_null] = np.inf
        return differences
    pairs = zip(served.to_pylist(), computed.to_pylist(), strict=True)
    return np.array([0.0 if _same(*pair) else np.inf for pair in pairs])


def _same(served: Any, computed: Any) -> bool:
    if not isinstance(computed, list) or not computed or not isinstance(computed[0], tuple):
        return bool(served == computed)
    one, other = dict(served or ()), dict(computed)  # Maps.
    return one.keys() == other.keys() and all(
        abs(one[key] - other[key]) <= TOLERANCE * max(abs(one[key]), abs(other[key])) for key in one
    )


def _add_events(known: Known, plan: Plan, worst: Sequence[tuple[Feature, Example]]) -> None:
    """Adds to each example the last events before it that its feature of its entities follows from."""
    contracts = [contracts_of(plan, stateful(plan, [feature.full_name])) for feature, _ in worst]
    every = set[str]().union(*contracts)

    def add(contract: str, events: pa.RecordBatch) -> None:
        for (feature, example), wanted in zip(worst, contracts, strict=True):
            if contract in wanted:
                example.events += _events_about(plan, feature, example, contract, events)

    for spec in plan.events:
        for name in table_names(spec) if spec.name in every else ():
            for events in known.tables[name].scan(spec.fields):
                add(spec.name, events)
    for contract, events in known.tail:
        add(contract, events)
    for _, example in worst:
        example.events = sorted(example.events, key=lambda each: each["t"])[-_EVENTS_MAX:]


def _events_about(
    plan: Plan, feature: Feature, example: Example, contract: str, events: pa.RecordBatch
) -> list[dict[str, Any]]:
    """Those of an example's entities before its time."""
    ids = {key: example.ids.get(key) for key in (plan.entity(entity).key for entity in feature.entities)}
    whose = [
        pc.equal(decimal_texts(events[key]), value)
        for key, value in ids.items()
        if value is not None and key in events.schema.names
    ]
    mask = pc.less(events["_t"], example.at_ms)
    if whose:
        mask = pc.and_kleene(mask, reduce(pc.or_kleene, whose))
    return [
        {"contract": contract, "t": row["_t"]} | {key: value for key, value in row.items() if not key.startswith("_")}
        for row in events.filter(mask).to_pylist()
    ]
