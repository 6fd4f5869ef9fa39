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

_Name = tuple[type, str]
_Objects = dict[_Name, Any]


def register(store: FeatureStore, plan: Plan, settings: Settings) -> bool:
    """Makes Feast's registry hold the plan and its objects; returns False if it did.

    Of what is there besides, only what the plan before had made goes: the rest is other people's.
    """
    made, there, deleted = _compared(store, plan, settings)
    if not deleted and all(there.get(name) == each for name, each in made.items()):
        return False
    for name, view in made.items():
        if name in there and hasattr(view, "enabled"):
            view.enabled = there[name].enabled  # What was disabled stays so.
    objects = [*made.values(), *_freed(store)]
    store.apply(objects, objects_to_delete=[there[name] for name in deleted], partial=not deleted)
    return True


def drift(store: FeatureStore, plan: Plan, settings: Settings) -> list[str]:
    """What `register` would do, an object a line: it is added, changed or deleted. Nothing is done."""
    made, there, deleted = _compared(store, plan, settings)
    said = {name: "changes" if name in there else "adds" for name, each in made.items() if there.get(name) != each}
    said |= dict.fromkeys(deleted, "deletes")
    return [f"{does} {kind.__name__} {name}" for (kind, name), does in said.items()]


def _compared(store: FeatureStore, plan: Plan, settings: Settings) -> tuple[_Objects, _Objects, list[_Name]]:
    """What the plan makes, what there is, and what of that the plan before had made and this one does not."""
    made, there = _named(compile_to_feast(plan, settings)), _registered(store)
    for name, each in made.items():
        if isinstance(each, StreamFeatureView) and name in there:
            _arrange(there[name], each)
    before = registered_plan(store.registry, store.project)
    gone = _named(compile_to_feast(before, settings)) if before else {}
    return made, there, [name for name in gone if name in there and name not in made]


def _arrange(view: StreamFeatureView, like: StreamFeatureView) -> None:
    """A view's features as another has them: from Feast's registry server they come in any order, with the keys."""
    places = {field.name: at for at, field in enumerate(like.features)}
    keys = {column.name for column in view.entity_columns} - places.keys()
    own = (field for field in view.features if field.name not in keys)
    view.features = view.projection.features = sorted(own, key=lambda field: places.get(field.name, len(places)))


def _freed(store: FeatureStore) -> list[Any]:
    """The project without the plan, if that is in its tags, where it once was."""
    with suppress(FeastObjectNotFoundException):
        project = store.registry.get_project(store.project, allow_cache=False)
        if project.tags.pop(PLAN_TAG, None) is not None:
            return [project]
    return []


def _named(objects: dict[str, Any]) -> _Objects:
    """Feast's objects by what the registry reads them back as, and name; with the archives that sources name."""
    found = [*objects.values(), *(each.batch_source for each in objects.values() if isinstance(each, KafkaSource))]
    return {(_kind(each), each.name): each for each in found}


def _registered(store: FeatureStore) -> _Objects:
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
