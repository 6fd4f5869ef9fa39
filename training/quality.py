"""Is what is served, and what producers send, as it should be? See docs/decisions/0022-quality.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, write_to_textfile
from prometheus_client.core import GaugeMetricFamily

from config.settings import Settings
from features.events import Kind
from features.expectations import Expectation
from features.plan import CodeChangedError, EventSpec, Feature, Plan
from features.program import Asked, Program
from features.rows import Rows
from features.values import arrow_type, to_arrow
from store.archive import ArchiveTable, table_names, tables_of
from store.served import PLAN_COLUMN, TIME_COLUMN, about, read
from training.distribution import is_empty, is_nested, numbers_of, quantiles, stability_index
from training.run import Progress, events_of_tail, in_threads, shares_of, tail_of
from training.split import events_of_rows

_ANY_FIELD: Final = "occurred_at"


class FeatureQuality(msgspec.Struct):
    """One feature of one service, as it was served. Shares are from 0 to 1."""

    service: str
    feature: str
    rows: int
    """Each of these counts once: the feature's own entities at the time of an answer."""
    null: float
    """The share of nulls; of lists and maps, also of empty ones."""
    default: float
    """The share of values that are as those of entities never seen."""
    quantiles: dict[str, float]
    """By share: see `training.distribution.quantiles`; of lists and maps, those of their lengths."""
    psi: float | None = None
    """See `training.distribution.stability_index`; None without a reference that has the feature."""


class Checked(msgspec.Struct):
    """An expectation of a contract: what it is about, in shares from 0 to 1 or events a second, and whether it is met.

    The value is None for the share of no events, which is a breach of nothing.
    """

    contract: str
    check: str
    events: int
    value: float | None
    breached: bool


class Quality(msgspec.Struct):
    """What was found; `unknown` is how many rows were left out, as their plan or its code can't be read any more."""

    features: list[FeatureQuality] = []
    checks: list[Checked] = []
    unknown: int = 0

    def breaches(self, psi_max: float | None = None) -> list[str]:
        """What is not as it should be, a line each."""
        found = [f"{each.contract}: {each.check}, it is {each.value:.4g}" for each in self.checks if each.breached]
        moved = [each for each in self.features if None not in (psi_max, each.psi) and each.psi > psi_max]  # type: ignore[operator]  # neither is None
        return found + [f"{each.service}: {each.feature} has a psi of {each.psi:.4g}" for each in moved]


def quality(
    settings: Settings,
    plan: Plan,
    plan_of: Callable[[int], Plan | None],
    since_ms: int,
    until_ms: int,
    *,
    services: Sequence[str] = (),
    reference: Path | None = None,
    on_progress: Progress = lambda _step, _done, _of: None,
) -> Quality:
    """Looks at what was kept of what was served, and at the events of contracts that expect something, of a time.

    Args:
        settings: where answers were kept, and where the archive and Kafka are.
        plan: the one that runs, whose expectations count.
        plan_of: the plan of a number.
        since_ms: ms since the epoch, like the next.
        until_ms: the end of the time.
        services: only these; by default all.
        reference: a Parquet file of what values should be like, by features' full names; `headrace train` makes it.
        on_progress: is told how far it is.

    Raises:
        LookupError: if nothing is known, neither answers nor events, or the reference has none of the features.
        ValueError: if the reference has a feature under another type.
    """
    kept = [each for each in read(settings.sample_path(), since_ms, services) if len(each[1])]
    found = Quality()
    against = None if reference is None else _Reference(reference)
    for done, (service, table) in enumerate(kept, 1):
        _add_features(found, service, table, plan_of, against)
        on_progress("served", done, len(kept))
    if against is not None and found.features and all(each.psi is None for each in found.features):
        msg = (
            f"{reference} has no column of the features served, such as {found.features[0].feature}: make it with "
            f"`headrace train … --service {found.features[0].service} --out {reference}`"
        )
        raise LookupError(msg)
    found.checks = list(_checked(settings, plan, since_ms, until_ms, on_progress))
    # That events come no more is news; that there never were any is not.
    archived = bool(found.checks) and any(table.exists for table in tables_of(settings, plan).values())
    if not (kept or archived or any(each.events for each in found.checks)):
        msg = (
            f"nothing that was served since then is in {settings.sample_path()}, and no event of a contract that "
            f"expects anything in the archive at {settings.archive_url()} or in Kafka: have servers keep some by "
            'HEADRACE_SAMPLE, such as {"ranking_v1": 0.01}, or declare expect=[share_null("category") < 0.05] '
            "beside a contract, and run `headrace apply`"
        )
        raise LookupError(msg)
    return found


# Features


class _Reference:
    """Columns of a Parquet file, one at a time: it may have more of them than memory can hold."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._names = set(pq.read_schema(path).names)
        except pa.ArrowInvalid as error:
            msg = f"{path}: {error}; the reference is a Parquet file, as `headrace train` writes it"
            raise ValueError(msg) from error
        self._rows: dict[tuple[str, ...], pa.Array] = {}

    def column(self, feature: Feature, keys: Sequence[str]) -> pa.Array | None:
        """The values of a feature, each once, if they are there.

        Raises:
            ValueError: if they are of another type.
        """
        name, kind = feature.full_name, arrow_type(feature.value_type)
        if name not in self._names:
            return None
        columns = (*keys, TIME_COLUMN)
        if columns not in self._rows and {*columns} <= self._names:
            self._rows[columns] = _once(_numbered(pq.read_table(self._path, columns=list(columns))), columns)
        column = pq.read_table(self._path, columns=[name])[name].combine_chunks()
        column = column if columns not in self._rows else column.take(self._rows[columns])
        if is_nested(kind) and is_nested(column.type):
            return column
        try:
            return column.cast(pa.float64() if pa.types.is_integer(kind) else kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            msg = f"{self._path}: {name} is {column.type}, the feature {feature.value_type}; `headrace train` makes one"
            raise ValueError(msg) from error


class _Served:
    """What one plan served, of a table of what was; and one value each of entities never seen."""

    def __init__(self, table: pa.Table, plan: Plan, unseen: Mapping[str, pa.Array]) -> None:
        self._table, self._plan, self._unseen = table, plan, unseen
        self.features = plan.features
        self._rows: dict[tuple[str, ...], pa.Array] = {}

    def keys(self, name: str) -> list[str]:
        """The columns with ids of what a feature is about."""
        return [self._plan.entity(entity).key for entity in self.features[name].entities]

    def column(self, name: str) -> tuple[pa.Array, NDArray[np.bool_]]:
        """The values of a feature, each once, and which of them are those of entities never seen."""
        keys = self.keys(name)
        columns = (*keys, TIME_COLUMN)
        if columns not in self._rows:
            numbered = _numbered(self._table.select([*columns, PLAN_COLUMN]))
            own = numbered.filter(pc.equal(numbered[PLAN_COLUMN], self._plan.number))
            self._rows[columns] = _once(own.filter(pa.array(about(own, keys))), columns)
        column = self._table[name].take(self._rows[columns]).combine_chunks()
        unseen = self._unseen[name]
        if unseen.null_count or is_nested(column.type):
            return column, is_empty(column)
        return column, np.asarray(pc.fill_null(pc.equal(column, unseen.cast(column.type)[0]), fill_value=False))


def _numbered(table: pa.Table) -> pa.Table:
    return table.append_column("_row", pa.array(np.arange(len(table))))


def _once(numbered: pa.Table, columns: Sequence[str]) -> pa.Array:
    """The first row's number of each that have the same values in some columns."""
    firsts = numbered.group_by(list(columns), use_threads=False).aggregate([("_row", "min")])
    return firsts["_row_min"].combine_chunks()


def _add_features(
    found: Quality,
    service: str,
    table: pa.Table,
    plan_of: Callable[[int], Plan | None],
    reference: _Reference | None,
) -> None:
    """Adds those of a service."""
    every: list[_Served] = []
    for each in sorted(pc.value_counts(table[PLAN_COLUMN]).to_pylist(), key=lambda each: each["values"]):
        plan = plan_of(each["values"])
        unseen = None if plan is None else _unseen(plan, [name for name in table.column_names if name in plan.features])
        if plan is None or unseen is None:
            found.unknown += each["counts"]
        else:
            every.append(_Served(table, plan, unseen))
    for name in table.column_names:
        by_plan = [served for served in every if name in served.features]
        columns, defaults = zip(*(served.column(name) for served in by_plan), strict=True) if by_plan else ((), ())
        if not any(map(len, columns)):
            continue
        column = pa.concat_arrays(columns)
        numbers, newest = numbers_of(column), by_plan[-1]
        before = None if reference is None else reference.column(newest.features[name], newest.keys(name))
        found.features.append(
            FeatureQuality(
                service,
                name,
                rows=len(column),
                null=float(is_empty(column).mean()),
                default=float(np.concatenate(defaults).mean()),
                quantiles={} if numbers is None else quantiles(numbers),
                psi=None if before is None else stability_index(before, column),
            )
        )


def _unseen(plan: Plan, names: Sequence[str]) -> Mapping[str, pa.Array] | None:
    """By name, the one value of each feature of entities that no event was ever about; None if its code is gone."""
    try:
        program = Program(plan, names)
    except CodeChangedError:
        return None
    one = {entity: np.zeros(1, np.intp) for entity in program.entities}
    rows = {bundle.name: Rows.empty(bundle, 1) for bundle in program.bundles}
    frame = program.evaluate(rows, Asked({entity: ["?"] for entity in one}, one, {}), 0)
    return {each.full_name: to_arrow(frame.values[each.full_name], each.value_type) for each in program.features}


# Events


def _checked(settings: Settings, plan: Plan, since_ms: int, until_ms: int, on_progress: Progress) -> Iterator[Checked]:
    """What contracts expect of events with `since_ms <= t < until_ms`, of the archive and what Kafka has beyond."""
    specs = [spec for spec in plan.events if spec.expect]
    if not specs:
        return
    tables = tables_of(settings, plan)
    asked = [(spec, tables[name]) for spec in specs for name in table_names(spec)]
    counts = {spec.name: np.zeros(1 + len(_expected(spec)), np.int64) for spec in specs}
    pieces = [(spec, table, share, since_ms, until_ms) for spec, table in asked for share in shares_of(table)]
    for done, (name, counted) in enumerate(in_threads(_count_archived, pieces), 1):
        counts[name] += counted
        on_progress("archive", done, len(pieces))
    on_progress("Kafka", 0, 1)
    with tail_of(settings, plan, [table for _, table in asked]) as tail:
        for name, events in events_of_tail(tail, _wanted, since_ms):
            counts[name] += _count(plan.event(name), [events], until_ms)
    on_progress("Kafka", 1, 1)
    for spec in specs:
        n_events, *counted = counts[spec.name].tolist()
        for each, n in zip(_expected(spec), counted, strict=True):
            value = each.value(n_events, n, (until_ms - since_ms) / 1000)
            yield Checked(spec.name, str(each), n_events, value, not each.is_met(value))


def _expected(spec: EventSpec) -> Sequence[Expectation]:
    return spec.expect or ()


def _fields(spec: EventSpec) -> tuple[str, ...]:
    """The fields that a contract's expectations are about."""
    return tuple(sorted({name for each in _expected(spec) for name in each.fields()}))


def _wanted(spec: EventSpec) -> Mapping[str, Kind]:
    """Which are read: some one even where expectations are about none, and none where there are no expectations."""
    return {name: spec.fields[name] for name in _fields(spec) or ([_ANY_FIELD] if spec.expect else [])}


def _count_archived(
    spec: EventSpec, table: ArchiveTable, share: tuple[int, int], since_ms: int, until_ms: int
) -> tuple[str, NDArray[np.int64]]:
    return spec.name, _count(spec, table.scan(_wanted(spec), since_ms, until_ms, share), until_ms)


def _count(spec: EventSpec, batches: Iterable[pa.RecordBatch], until_ms: int) -> NDArray[np.int64]:
    """int64[1 + expectations]: how many events there are before a time, and how many of them each counts."""
    expected, names = _expected(spec), _fields(spec)
    counts = np.zeros(1 + len(expected), np.int64)
    for batch in batches:
        events = events_of_rows(pa.Table.from_batches([batch]), np.zeros(len(batch), np.intp), names)
        inside = events.times_ms < until_ms
        counts[0] += inside.sum()
        counts[1:] += [int((each.counted(events.fields, len(batch)) & inside).sum()) for each in expected]
    return counts


# Metrics

_OF_FEATURES: Final[dict[str, tuple[str, Callable[[FeatureQuality], Any]]]] = {
    "rows": ("Values that were looked at", lambda each: each.rows),
    "null_ratio": ("Share of nulls, or of empty lists and maps", lambda each: each.null),
    "default_ratio": ("Share of values as those of entities never seen", lambda each: each.default),
    "psi": ("Population stability index against the reference", lambda each: each.psi),
}
_OF_CHECKS: Final[dict[str, tuple[str, Callable[[Checked], Any]]]] = {
    "check_value": ("What the check compares: a ratio, or events a second", lambda each: each.value),
    "breach": ("1 if the check is breached, else 0", lambda each: float(each.breached)),
}


class _Collected:
    """As Prometheus collects it."""

    def __init__(self, found: Quality) -> None:
        self._found = found

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield from _gauges(_OF_FEATURES, self._found.features, ["service", "feature"])
        doc = "Quantiles of numbers, and of the lengths of lists and maps"
        family = GaugeMetricFamily("headrace_quality_value", doc, labels=["service", "feature", "quantile"])
        for feature in self._found.features:
            for quantile, value in feature.quantiles.items():
                family.add_metric([feature.service, feature.feature, quantile], value)
        yield family
        yield from _gauges(_OF_CHECKS, self._found.checks, ["contract", "check"])


def _gauges(
    of: Mapping[str, tuple[str, Callable[[Any], Any]]], found: Sequence[Any], labels: Sequence[str]
) -> Iterator[GaugeMetricFamily]:
    """What is known of each that was found, under its attributes for labels."""
    for name, (doc, value_of) in of.items():
        family = GaugeMetricFamily(f"headrace_quality_{name}", doc, labels=labels)
        for each in found:
            if (value := value_of(each)) is not None:
                family.add_metric([getattr(each, label) for label in labels], value)
        yield family


def write_metrics(found: Quality, path: Path) -> None:
    """Writes Prometheus's text format, for node_exporter's textfile collector: the file is there once it is whole."""
    registry = CollectorRegistry()
    registry.register(_Collected(found))
    write_to_textfile(str(path), registry)
