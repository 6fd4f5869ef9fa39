"""From what modules declare to a plan."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any

import msgspec

from features.checks import mistake
from features.events import Event
from features.language import VIEWS, Entity, Service, View
from features.plan import (
    At,
    Contains,
    Derived,
    EntitySpec,
    EventSpec,
    Feature,
    Plan,
    arguments,
    contract_fingerprint,
    contract_schema,
)
from features.source import Source
from features.values import Type


def compile_plan(namespaces: Iterable[Mapping[str, Any]], project: str, shards: int) -> Plan:
    """The plan of all services and views found among the values of the namespaces (module dictionaries), and of all
    views that these take features from.

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
    _check_topics(events.values())
    plan = Plan(
        project=project,
        shards=shards,
        entities=tuple(_entity_spec(entities[name], events.values()) for name in sorted(entities)),
        events=tuple(event_spec(events[name]) for name in sorted(events)),
        views=tuple(sorted((view.spec for view in views.values()), key=lambda spec: (len(spec.entities), spec.name))),
        services=tuple(services[name].spec for name in sorted(services)),
    )
    for feature in plan.features.values():
        _check_arguments(plan, feature)
    return plan


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


def _check_topics(events: Iterable[type[Event]]) -> None:
    """No record may be of two contracts."""
    for one, other in combinations(events, 2):
        for topic in set(one.topics()) & set(other.topics()):
            if not one.declared_source.excludes(other.declared_source):
                wrong = f"{one.__name__} and {other.__name__} are both read from it, and a record could be both's"
                right = 'tell them apart by one place: when={"type": "click"} and when={"type": "like"}'
                raise mistake(f"topic {topic}", wrong, right)


def _entity_spec(entity: Entity, events: Iterable[type[Event]]) -> EntitySpec:
    kinds = {event.kinds()[entity.key] for event in events if entity.key in event.kinds()}
    return msgspec.structs.replace(entity.spec, id_type="int" if kinds == {"int"} else msgspec.UNSET)


def event_spec(event: type[Event]) -> EventSpec:
    """A contract as plain data."""
    return EventSpec(
        name=event.__name__,
        topic=event.topic,
        fields=dict(event.kinds()),
        code=f"{event.__module__}:{event.__qualname__}",
        fingerprint=contract_fingerprint(event),
        schema=contract_schema(event),
        doc=inspect.cleandoc(event.__doc__ or ""),
        expect=event.expectations or msgspec.UNSET,
        source=event.declared_source if event.declared_source != Source() else msgspec.UNSET,
    )


def _check_arguments(plan: Plan, feature: Feature) -> None:
    for name in arguments(feature.spec):
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
                yield argument, ("int", "float", "bool")
            case At():
                yield argument.of, ("map[str, float]",)
                yield argument.key, ("str",)
            case Contains():
                yield argument.of, ("list[str]",)
            case _:
                pass
