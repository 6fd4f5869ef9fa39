"""The catalogue: Feast's registry holds a plan's objects, and the plan for readers by Feast's SDK."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from feast import FeatureStore, KafkaSource, OnDemandFeatureView, StreamFeatureView
from feast.errors import FeastObjectNotFoundException

from config.settings import Settings
from features.plan import Plan
from registry.compile import compile_to_feast
from registry.plans import PLAN_TAG, registered_plan


def register(store: FeatureStore, plan: Plan, settings: Settings) -> bool:
    """Makes Feast's registry hold the plan and its objects; returns False if it did.

    Of what is there besides, only what the plan before had made goes: the rest is other people's.
    """
    made, before = _named(compile_to_feast(plan, settings)), registered_plan(store.registry, store.project)
    there = _registered(store)
    gone = _named(compile_to_feast(before, settings)) if before else {}
    deleted = [there[name] for name in gone if name in there and name not in made]
    if not deleted and all(there.get(name) == each for name, each in made.items()):
        return False
    for name, view in made.items():
        if name in there and hasattr(view, "enabled"):
            view.enabled = there[name].enabled  # What was disabled stays so.
    store.apply([*made.values(), *_freed(store)], objects_to_delete=deleted, partial=not deleted)
    return True


def _freed(store: FeatureStore) -> list[Any]:
    """The project without the plan, if that is in its tags, where it once was."""
    with suppress(FeastObjectNotFoundException):
        project = store.registry.get_project(store.project, allow_cache=False)
        if project.tags.pop(PLAN_TAG, None) is not None:
            return [project]
    return []


def _named(objects: dict[str, Any]) -> dict[tuple[type, str], Any]:
    """Feast's objects by what the registry reads them back as, and name; with the archives that sources name."""
    found = [*objects.values(), *(each.batch_source for each in objects.values() if isinstance(each, KafkaSource))]
    return {(_kind(each), each.name): each for each in found}


def _registered(store: FeatureStore) -> dict[tuple[type, str], Any]:
    """What of the kinds of objects that a plan makes is in the registry."""
    registry, project = store.registry, store.project
    with suppress(FeastObjectNotFoundException):
        found: list[Any] = [
            *registry.list_feature_services(project),
            *registry.list_on_demand_feature_views(project),
            *registry.list_stream_feature_views(project),
            *registry.list_data_sources(project),
            *registry.list_entities(project),
        ]
        return {(_kind(each), each.name): each for each in found}
    return {}


def _kind(made: Any) -> type:
    kinds = (OnDemandFeatureView, StreamFeatureView)
    return next((kind for kind in kinds if isinstance(made, kind)), type(made))
