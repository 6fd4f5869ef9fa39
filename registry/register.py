"""The catalogue: Feast's registry holds a plan's objects, and the plan for readers by Feast's SDK."""

from __future__ import annotations

from typing import Any

from feast import FeatureStore, OnDemandFeatureView
from feast.errors import FeastObjectNotFoundException

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


def register(store: FeatureStore, plan: Plan, settings: Settings) -> None:
    """Makes Feast's registry hold the plan and its objects, and nothing else of this project."""
    made = list(compile_to_feast(plan, settings).values())
    names = {(_kind(each), each.name) for each in made}
    registry, project = store.registry, store.project
    there: list[Any] = [
        *registry.list_feature_services(project),
        *registry.list_on_demand_feature_views(project),
        *registry.list_stream_feature_views(project),
        *registry.list_data_sources(project),
        *registry.list_entities(project),
    ]
    gone = [each for each in there if each.name != "__dummy" and (_kind(each), each.name) not in names]
    archives = {f"{spec.topic}_archive" for spec in plan.events}
    store.apply(made, objects_to_delete=[each for each in gone if each.name not in archives], partial=not gone)


def _kind(made: Any) -> str:
    """What Feast's registry reads an object back as."""
    return "OnDemandFeatureView" if isinstance(made, OnDemandFeatureView) else type(made).__name__
