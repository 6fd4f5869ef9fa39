"""`backfill`: two plans, with history added in between."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from config.settings import Settings
from features.aggregations import Aggregation
from features.changes import when
from features.evolve import backfilled, backfilling, complete_from_ms, span_ms
from features.plan import History, Plan, arguments, features_of
from registry.apply import put
from store.archive import tables_of
from store.commit import read_records, taken_by_all
from store.keys import Keyspace
from store.plans import load_plan
from training.backfill import BackfillError, SeamError, count_batches, fill
from training.run import Progress

_ATTEMPTS = 3

log = structlog.get_logger()


@dataclass(frozen=True)
class Backfilled:
    """What a backfill did.

    Attributes:
        plan: the one that runs now.
        features: full names of those whose history was added.
        incomplete: those of them that still lack something, and until when (ms since the epoch; None for ever): the
            archive and Kafka do not go further back.
    """

    plan: Plan
    features: tuple[str, ...]
    incomplete: Mapping[str, int | None]


def backfill(
    settings: Settings,
    client: Any,
    full_names: Collection[str] | None = None,
    *,
    since_ms: int = 0,
    on_progress: Progress = lambda _step, _done, _of: None,
    clock: Callable[[], float] = time.time,
) -> Backfilled:
    """Gives features the history that they lack, from the archive and Kafka, while streams and servers go on.

    One that was begun is finished first, whatever is asked for: its plan says what it is.

    Args:
        settings: the settings.
        client: Redis.
        full_names: of features; by default all that lack something now.
        since_ms: no event before counts.
        on_progress: is told how far it is.
        clock: seconds since the epoch.

    Raises:
        BackfillError: if a feature would lose what it has, or no stream runs.
        NotAppliedPlanError: if nothing is applied.
    """
    plan = load_plan(settings, client)
    if plan.history is None:
        now_ms, complete_ms = int(clock() * 1000), _complete_ms(client, plan)
        lacking = {name for name, at_ms in complete_ms.items() if at_ms is None or at_ms > now_ms}
        names = _stateful(plan, lacking if full_names is None else full_names)
        if not names:
            return Backfilled(plan, (), {})
        _must_lose_nothing(settings, plan, names, lacking, since_ms, now_ms)
        history = History(count_batches(settings, plan, _contracts(plan, names)), since_ms)
        plan = backfilling(plan, names, history)
        put(settings, client, plan, now_ms)
    for attempts_left in reversed(range(_ATTEMPTS)):
        try:
            lead_ms = fill(settings, plan, client, on_progress=on_progress)
            break
        except SeamError as error:
            if not attempts_left:
                raise
            log.warning("backfill_begins_again", reason=str(error))
            assert plan.history is not None  # noqa: S101  # for the type checker: it was made so above
            plan = backfilling(plan, _filling(plan), plan.history)
            put(settings, client, plan, int(clock() * 1000))
    whole, names = backfilled(plan, lead_ms), _filling(plan)
    put(settings, client, whole, int(clock() * 1000))
    now_ms, complete_ms = int(clock() * 1000), _complete_ms(client, whole)
    lacking_still = {name: at_ms for name, at_ms in complete_ms.items() if at_ms is None or at_ms > now_ms}
    return Backfilled(whole, tuple(names), {name: at_ms for name, at_ms in lacking_still.items() if name in names})


def _complete_ms(client: Any, plan: Plan) -> dict[str, int | None]:
    records = read_records(client, Keyspace.of(plan).commit_records(plan.stored_entities))
    return complete_from_ms(plan, taken_by_all(records, plan.needs))


def _stateful(plan: Plan, full_names: Iterable[str]) -> list[str]:
    """The features that keep state for these."""
    found: dict[str, None] = {}
    for name in full_names:
        if isinstance(plan.features[name].spec, Aggregation):
            found[name] = None
        else:
            found |= dict.fromkeys(_stateful(plan, arguments(plan.features[name].spec)))
    return list(found)


def _contracts(plan: Plan, full_names: Iterable[str]) -> set[str]:
    specs = (plan.features[name].spec for name in full_names)
    return {measure.event for spec in specs if isinstance(spec, Aggregation) for measure in spec.measures}


def _filling(plan: Plan) -> list[str]:
    """Full names of what a plan is filled with."""
    names = {(view.name, spec.name) for view in plan.views for spec in view.filling}
    return [each.full_name for each in plan.features.values() if (each.view, each.spec.name) in names]


def _must_lose_nothing(
    settings: Settings, plan: Plan, full_names: Iterable[str], lacking: set[str], since_ms: int, now_ms: int
) -> None:
    """Raises BackfillError if a feature is complete that history can't give all it has: all windows of an aggregation
    begin anew.
    """
    tables = tables_of(settings, plan)
    views = {(plan.features[name].view, plan.features[name].spec.name) for name in full_names}
    for feature in (each for view in plan.views for each in features_of(view) if (each.view, each.spec.name) in views):
        if feature.full_name in lacking:
            continue
        assert isinstance(feature.spec, Aggregation)  # noqa: S101  # for the type checker: as `_stateful` gives them
        begins_ms = max(since_ms, *(tables[plan.event(each.event).topic].since_ms for each in feature.spec.measures))
        span = span_ms(feature)
        if begins_ms and (span is None or begins_ms > now_ms - span):
            msg = (
                f"{feature.full_name} is complete, and would lose what it knows from before {when(begins_ms)}, where "
                f"the history begins that {feature.spec.name} would get for all its windows: wait until that is out of "
                "its window, or leave this feature out (--feature names those that are wanted)"
            )
            raise BackfillError(msg)
