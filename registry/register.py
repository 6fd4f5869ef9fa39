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

from config.settings import Settings
from features.plan import NOBODY, Plan
from registry.compile import CrossFeatureView, compile_to_feast, topics_of
from registry.plans import PLAN_TAG, registered_plan

_Name = tuple[type, str]
_Objects = dict[_Name, Any]


def register(store: FeatureStore, plan: Plan, settings: Settings, objects: Sequence[Any] = ()) -> bool:
    """Makes Feast's registry hold the plan and its objects; returns False if it did.

    Of what is there besides, only what the plan before had made goes: the rest is other people's.

    Args:
        store: Feast's store.
        plan: the plan.
        settings: the settings.
        objects: what is declared in Feast's words: see `registry.ordinary`.
    """
    made, there, deleted = _compared(store, plan, settings, objects)
    if not deleted and all(_same(there.get(name), each) for name, each in made.items()):
        return False
    for name, view in made.items():
        if name in there and hasattr(view, "enabled"):
            view.enabled = there[name].enabled  # What was disabled stays so.
    every = [*made.values(), *_freed(store)]
    store.apply(every, objects_to_delete=[there[name] for name in deleted], partial=not deleted)
    return True


def drift(store: FeatureStore, plan: Plan, settings: Settings, objects: Sequence[Any] = ()) -> list[str]:
    """What `register` would do, an object a line: it is added, changed or deleted. Nothing is done."""
    made, there, deleted = _compared(store, plan, settings, objects)
    differ = [name for name, each in made.items() if not _same(there.get(name), each)]
    said = {name: "changes" if name in there else "adds" for name in differ}
    said |= dict.fromkeys(deleted, "deletes")
    return [f"{does} {kind.__name__} {name}" for (kind, name), does in said.items()]


def _compared(
    store: FeatureStore, plan: Plan, settings: Settings, objects: Sequence[Any]
) -> tuple[_Objects, _Objects, list[_Name]]:
    """What the plan makes, what there is, and what of that the plan before had made and this one does not."""
    made, there = _named(compile_to_feast(plan, settings, objects)), _registered(store)
    for name, each in made.items():
        if isinstance(each, StreamFeatureView) and name in there:
            _arrange(there[name], each)
        elif isinstance(each, FeatureView) and name in there:  # What Feast has found out, and done.
            each.entity_columns = each.entity_columns or there[name].entity_columns
            each.materialization_intervals = there[name].materialization_intervals
    before = registered_plan(store.registry, store.project)
    gone = _made_by(before) if before else ()
    return made, there, [name for name in gone if name in there and name not in made]


def _same(there: Any, made: Any) -> bool:
    """Whether the registry has an object. A user's function is never equal to what is read back of it: its text is."""
    both = isinstance(made, OnDemandFeatureView) and isinstance(there, OnDemandFeatureView)
    if both and not isinstance(made, CrossFeatureView):
        return _said_of(there) == _said_of(made)
    return bool(there == made)


def _said_of(view: OnDemandFeatureView) -> tuple[Any, ...]:
    """What a user declares of an on-demand view."""
    transformation: Any = view.feature_transformation
    projections = view.source_feature_view_projections.values()
    taken = sorted((each.name, sorted(field.name for field in each.features)) for each in projections)
    requested = sorted((name, sorted(map(str, each.schema))) for name, each in view.source_request_sources.items())
    described = (view.description, view.owner, view.tags, view.mode, view.write_to_online_store)
    return sorted(map(str, view.features)), transformation.udf_string, taken, requested, *described


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


def _made_by(plan: Plan) -> Iterator[_Name]:
    """What a plan made, by what the registry reads it back as, and name."""
    yield from ((Entity, spec.name) for spec in plan.entities if spec != NOBODY)
    for topics in {*(spec.topic for spec in plan.events), *(topics_of(plan, view) for view in plan.views)}:
        yield KafkaSource, topics
        yield FileSource, f"{topics}_archive"
    for view in plan.views:
        computed = OnDemandFeatureView if len(view.entities) > 1 else StreamFeatureView
        yield FeatureView if view.given else computed, view.name
    yield from ((FeatureService, spec.name) for spec in plan.services)


def _named(objects: dict[str, Any]) -> _Objects:
    """Feast's objects by what the registry reads them back as, and name; with the archives that sources name."""
    found = list(objects.values())
    for each in objects.values():
        found += [source for name in ("batch_source", "stream_source") if (source := getattr(each, name, None))]
    return {(_kind(each), each.name): each for each in found}


def _registered(store: FeatureStore) -> _Objects:
    """What of the kinds of objects that a plan makes is in the registry."""
    registry, project = store.registry, store.project
    with suppress(FeastObjectNotFoundException):
        found: list[Any] = [
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
