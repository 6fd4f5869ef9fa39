"""From what modules declare to a plan."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import msgspec

from features.checks import mistake
from features.events import Event
from features.language import VIEWS, Service, View
from features.plan import (
    EVERY,
    NOBODY,
    At,
    Contains,
    Derived,
    EventSpec,
    Feature,
    Given,
    Plan,
    ServiceSpec,
    ViewSpec,
    arguments,
    contract_fingerprint,
    contract_schema,
)
from features.values import Type

_DTYPES: Final[dict[Type, str]] = {
    "int": "Float64",
    "str": "String",
    "list[str]": "Array(String)",
    "map[str, float]": "Map",
}
"""By the first type that somebody takes, one of Feast's that is such."""


def compile_plan(
    namespaces: Iterable[Mapping[str, Any]], project: str, shards: int, ordinary: Plan | None = None
) -> Plan:
    """The plan of all services and views found among the values of the namespaces (module dictionaries), and of all
    views that these take features from.

    Args:
        namespaces: where to look.
        project: the project's name.
        shards: how many each entity has.
        ordinary: a plan whose ordinary views this one has, too; without any they are made up, of the types that those
            who name them want.

    Raises:
        DeclarationError: if two different things have one name, or a feature takes another that it can't.
    """
    found = [value for namespace in namespaces for value in namespace.values()]
    services = _by_name("service", ((value.spec.name, value) for value in found if isinstance(value, Service)))
    declared = [VIEWS[value] for value in found if isinstance(value, type) and value in VIEWS]
    views = _by_name(
        "view",
        (
            (view.name, view)
            for view in _closure([*declared, *(view for each in services.values() for view in each.views)])
        ),
    )
    entities = _by_name("entity", ((entity.name, entity) for view in views.values() for entity in view.entities))
    events = _by_name("contract", ((event.__name__, event) for view in views.values() for event in view.events))
    _by_name("topic", ((event.topic, event) for event in events.values()))
    plan = Plan(
        project=project,
        shards=shards,
        entities=tuple(entities[name].spec for name in sorted(entities)),
        events=tuple(_event_spec(events[name]) for name in sorted(events)),
        views=tuple(view.spec for view in views.values()),
        services=tuple(services[name].spec for name in sorted(services)),
    )
    plan = _with_ordinary(plan, ordinary or _made_up(plan), made_up=ordinary is None)
    for feature in plan.features.values():
        _check_arguments(plan, feature)
    return plan


def _with_ordinary(plan: Plan, ordinary: Plan, *, made_up: bool) -> Plan:
    """A plan with the ordinary views of another, and services that have all features of some with these by name."""
    given = [view for view in ordinary.views if view.given]
    views = _by_name("view", ((view.name, view) for view in (*plan.views, *given)))
    named = {name for view in given for name in view.entities}
    keys = {each.name: each.key for each in plan.entities}
    for view in given:
        if unknown := [
            name for name in view.entities if name not in {*keys, *(each.name for each in ordinary.entities)}
        ]:
            right = "give it a name in a module of the definitions"
            raise mistake(f"FeatureView {view.name}", f"is of {unknown[0]}, a feast.Entity that is not found", right)
    for other in (each for each in ordinary.entities if each.name in named):
        if keys.get(other.name, other.key) != other.key:
            wrong = f"is named by {keys[other.name]}, but in ordinary views by {other.key}"
            raise mistake(f"entity {other.name}", wrong, "give both the same key, or one of them another name")
    more = (each for each in ordinary.entities if each.name in named and each.name not in keys)
    features = {name: [f"{name}__{spec.name}" for spec in view.given] for name, view in views.items() if view.given}

    def members(service: ServiceSpec) -> Iterator[str]:
        for name in service.features:
            view, _, feature = name.partition("__")
            if feature != EVERY:
                yield name
            elif view in features:
                yield from features[view]
            elif not made_up:
                raise _no_ordinary(f"service {service.name}", view, ordinary)

    plan = msgspec.structs.replace(
        plan,
        entities=tuple(sorted((*plan.entities, *more), key=lambda spec: spec.name)),
        views=tuple(sorted(views.values(), key=lambda spec: (len(spec.entities), spec.name))),
        services=tuple(
            msgspec.structs.replace(each, features=tuple(dict.fromkeys(members(each)))) for each in plan.services
        ),
    )
    for service in plan.services:
        if unknown := [name for name in service.features if name not in plan.features]:
            raise _no_ordinary(f"service {service.name}", unknown[0], ordinary)
    return plan


def _no_ordinary(place: str, name: str, ordinary: Plan) -> Exception:
    there = ", ".join(view.name for view in ordinary.views if view.given) or "none"
    wrong = f"names {name.replace('__', ':', 1)}, which no ordinary view has (there are: {there})"
    return mistake(place, wrong, "declare a feast.FeatureView with it in a module of the definitions")


def _made_up(plan: Plan) -> Plan:
    """Ordinary views as those who name their features want them."""
    wanted: dict[str, tuple[tuple[str, ...], str]] = {}
    for feature in sorted(plan.features.values(), key=lambda each: len(each.entities)):
        for name, types in _wanted(feature):
            wanted.setdefault(name, (feature.entities, _DTYPES[types[0]]))
    for name in (name for service in plan.services for name in service.features):
        wanted.setdefault(name, ((NOBODY.name,), "Json"))
    views: dict[str, ViewSpec] = {}
    for name, (entities, dtype) in wanted.items():
        view, _, feature_name = name.partition("__")
        if name not in plan.features and feature_name != EVERY:
            known = views.get(view) or ViewSpec(view, entities, ())
            views[view] = msgspec.structs.replace(known, features=(*known.features, Given(feature_name, dtype)))
    return msgspec.structs.replace(plan, entities=(*plan.entities, NOBODY), views=tuple(views.values()))


def _by_name(what: str, named: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in named:
        if found.setdefault(name, value) != value:
            raise mistake(f"{what} {name}", f"is declared twice, as {found[name]!r} and {value!r}", "rename one")
    return found


def _closure(views: Iterable[View]) -> Iterator[View]:
    """The views and all that they need, each once."""
    seen: dict[View, None] = {}
    waiting = list(views)
    while waiting:
        view = waiting.pop(0)
        if view not in seen:
            seen[view] = None
            waiting += view.needs
    return iter(seen)


def _event_spec(event: type[Event]) -> EventSpec:
    return EventSpec(
        name=event.__name__,
        topic=event.topic,
        fields=dict(event.kinds()),
        code=f"{event.__module__}:{event.__qualname__}",
        fingerprint=contract_fingerprint(event),
        schema=contract_schema(event),
        doc=inspect.cleandoc(event.__doc__ or ""),
        expect=event.expectations or msgspec.UNSET,
    )


def _check_arguments(plan: Plan, feature: Feature) -> None:
    for name in arguments(feature.spec):
        if name not in plan.features:
            raise _no_ordinary(feature.full_name, name, plan)
        if not set(plan.features[name].entities) <= set(feature.entities):
            wrong = f"takes {name}, a feature of {' and '.join(plan.features[name].entities)}"
            raise mistake(feature.full_name, wrong, "declare it in a @cross view of those entities")
    for name, types in _wanted(feature):
        if plan.features[name].value_type not in types:
            raise mistake(
                feature.full_name, f"takes {name}, a {plan.features[name].value_type}", f"it needs {' or '.join(types)}"
            )


def _wanted(feature: Feature) -> Iterator[tuple[str, tuple[Type, ...]]]:
    """The arguments of a feature, and the types that they may have."""
    spec = feature.spec
    for argument in spec.args if isinstance(spec, Derived) else (spec,):
        match argument:
            case str():
                yield argument, ("int", "float", "bool", "list[float]", "list[int]")
            case At():
                yield argument.of, ("map[str, float]",)
                yield argument.key, ("str",)
            case Contains():
                yield argument.of, ("list[str]",)
            case _:
                pass
