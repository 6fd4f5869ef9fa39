"""`backfill`: two plans, with history added in between; and `rebuild`: one, whose rows were all made before."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import structlog

from config.settings import Settings, project_of
from features.aggregations import Aggregation
from features.changes import when
from features.definitions import compile_definitions
from features.evolve import as_declared, backfilled, backfilling, rebuilt, span_ms
from features.plan import History, Plan, contracts_of, stateful
from registry.apply import create_topics, put
from store.archive import table_names, tables_of
from store.completeness import Completeness, look
from store.plans import ApplyError, applied_plan, load_plan, next_generation
from training.backfill import BackfillError, SeamError, fill
from training.history import count_batches
from training.rebuild import discard_others, follow, writers_of
from training.rebuild import rebuild as make_all
from training.run import Progress

_ATTEMPTS = 3
_TAKEN_UP_S = 180.0
_GRACE_S = 10.0
"""Servers take up a plan sooner than this."""

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
    may_lose: bool = False,
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
        may_lose: whether features may lose what is from before the archive and Kafka begin.
        on_progress: is told how far it is.
        clock: seconds since the epoch.

    Raises:
        BackfillError: if a feature would lose what it has, or no stream runs.
        NotAppliedPlanError: if nothing is applied.
    """
    plan = load_plan(settings, client)
    if plan.history is None:
        now_ms, lacking = int(clock() * 1000), set(_lacking(client, plan, plan.features, clock))
        names = stateful(plan, lacking if full_names is None else full_names)
        if not names:
            return Backfilled(plan, (), {})
        if not may_lose:
            _must_lose_nothing(settings, plan, names, lacking, since_ms, now_ms)
        history = History(count_batches(settings, plan, contracts_of(plan, names)), since_ms)
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
    return Backfilled(whole, tuple(names), _lacking(client, whole, names, clock))


def rebuild(
    settings: Settings,
    client: Any,
    *,
    since_ms: int = 0,
    on_progress: Progress = lambda _step, _done, _of: None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Backfilled:
    """Makes all rows anew, from the archive and Kafka: after a loss, or for another number of shards.

    Until they are there, streams and servers go on with those there are, if there are any. Stopped before, it has
    changed nothing.

    Args:
        settings: the settings; `shards` may be another number than before.
        client: Redis.
        since_ms: no event before counts.
        on_progress: is told how far it is.
        clock: seconds since the epoch.
        sleep: waits so many.

    Raises:
        ApplyError: if what is declared is not what is applied, or something else was applied meanwhile.
    """
    project = project_of(settings.repo)
    declared, before = (
        compile_definitions(settings.definitions, project, settings.shards),
        applied_plan(client, project),
    )
    number = before.number + 1 if before else 0
    if before and msgspec.structs.replace(as_declared(before), shards=declared.shards) != declared:
        msg = "what is declared is not what is applied: run `headrace apply` first, or with the definitions that are"
        raise ApplyError(msg)
    generation = next_generation(client, project)
    plan = rebuilt(declared, number, generation, {})
    create_topics(settings, plan)
    every = {name for name, feature in plan.features.items() if isinstance(feature.spec, Aggregation)}
    history = History(count_batches(settings, plan, contracts_of(plan, every)), since_ms)
    lead_ms = make_all(settings, plan, history, client, before=before, on_progress=on_progress, clock=clock)
    plan = rebuilt(declared, number, generation, lead_ms)
    follow(settings, plan, client, clock)
    writers = writers_of(client, plan)
    put(settings, client, plan, int(clock() * 1000))
    until_s = clock() + _TAKEN_UP_S
    while writers & writers_of(client, plan) and clock() < until_s:
        on_progress("streams", 0, 1)
        sleep(0.1)
    if clock() < until_s:
        on_progress("streams", 1, 1)
        sleep(_GRACE_S if before else 0)
        discard_others(client, plan)
    else:
        log.warning("rows_are_kept", reason="no stream has taken the new ones up; those before expire by themselves")
    return Backfilled(plan, tuple(sorted(every)), _lacking(client, plan, every, clock))


def _lacking(client: Any, plan: Plan, names: Iterable[str], clock: Callable[[], float]) -> Mapping[str, int | None]:
    now_ms, completeness = int(clock() * 1000), Completeness(plan)
    look(completeness, client, now_ms)
    return completeness.incomplete(names, now_ms)


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
    for feature in plan.features.values():
        if feature.full_name in lacking or (feature.view, feature.spec.name) not in views:
            continue
        assert isinstance(feature.spec, Aggregation)  # noqa: S101  # for the type checker: as `stateful` gives them
        events = {each.event for each in feature.spec.measures}
        names = [name for event in events for name in table_names(plan.event(event))]
        begins_ms = max(since_ms, *(tables[name].since_ms for name in names))
        span = span_ms(feature)
        if begins_ms and (span is None or begins_ms > now_ms - span):
            msg = (
                f"{feature.full_name} is complete, and would lose what it knows from before {when(begins_ms)}, where "
                f"the history begins that {feature.spec.name} would get for all its windows: wait until that is out of "
                "its window, or leave this feature out (--feature names those that are wanted)"
            )
            raise BackfillError(msg)
