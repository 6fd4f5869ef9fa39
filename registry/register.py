"""The catalogue: Feast's registry holds a plan's objects, and the plan for readers by Feast's SDK."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

from feast import (
    Entity,
    FeatureService,
    FeatureStore,
    FeatureView,
    FileSource,
    KafkaSource,
    OnDemandFeatureView,
    StreamFeatureView,
)
from feast.errors import FeastObjectNotFoundException
from feast.project import Project

from config.settings import Settings
from features.plan import Plan
from registry.compile import compile_to_feast
from registry.plans import PLAN_TAG


def registered_plan(store: FeatureStore) -> Plan | None:
    """The plan in the registry, or None."""
    try:
        project = store.registry.get_project(store.project, allow_cache=False)
    except FeastObjectNotFoundException:
        return None
    text = project.tags.get(PLAN_TAG)
    return Plan.decode(text) if text else None


def register(store: FeatureStore, plan: Plan, settings: Settings, objects: Sequence[Any] = ()) -> bool:
    """Makes Feast's registry hold the plan and its objects; returns False if it did.

    Of what is there besides, only what the plan before had made goes: the rest is other people's.

    Args:
        store: Feast's store.
        plan: the plan.
        settings: the settings.
        objects: what is declared in Feast's words: see `registry.ordinary`.
    """
    made, before = _named(compile_to_feast(plan, settings, objects)), registered_plan(store)
    there = _registered(store)
    deleted = [there[name] for name in _made_by(before) if name in there and name not in made] if before else []
    # What the registry has of a project is its times, too.
    same = (there.get(name) == each for name, each in made.items() if not isinstance(each, Project))
    if before == plan and not deleted and all(same):
        return False
    for name, view in made.items():
        if name in there and hasattr(view, "enabled"):
            view.enabled = there[name].enabled  # What was disabled stays so.
    store.apply(list(made.values()), objects_to_delete=deleted, partial=not deleted)
    return True


def _made_by(plan: Plan) -> Iterator[tuple[type, str]]:
    """What a plan made, by what the registry reads it back as, and name."""
    yield from ((Entity, spec.name) for spec in plan.entities)
    for spec in plan.events:
        yield KafkaSource, spec.topic
        yield FileSource, f"{spec.topic}_archive"
    for view in plan.views:
        computed = OnDemandFeatureView if len(view.entities) > 1 else StreamFeatureView
        yield FeatureView if view.given else computed, view.name
    yield from ((FeatureService, spec.name) for spec in plan.services)


def _named(objects: dict[str, Any]) -> dict[tuple[type, str], Any]:
    """Feast's objects by what the registry reads them back as, and name; with the archives that sources name."""
    found = list(objects.values())
    for each in objects.values():
        found += [source for name in ("batch_source", "stream_source") if (source := getattr(each, name, None))]
    return {(_kind(each), each.name): each for each in found}


def _registered(store: FeatureStore) -> dict[tuple[type, str], Any]:
    """What of the kinds of objects that a plan makes is in the registry."""
    registry, project = store.registry, store.project
    with suppress(FeastObjectNotFoundException):
        found: list[Any] = [
            registry.get_project(project, allow_cache=False),
            *registry.list_feature_services(project),
            *registry.list_feature_views(project),
            *registry.list_permissions(project),
            *registry.list_on_demand_feature_views(project),
            *registry.list_stream_feature_views(project),
            *registry.list_data_sources(project),
            *registry.list_entities(project),
        ]
        return {(_kind(each), each.name): each for each in found}
    return {}


def _kind(made: Any) -> type:
    kinds = (OnDemandFeatureView, StreamFeatureView, FeatureView)
    return next((kind for kind in kinds if isinstance(made, kind)), type(made))
