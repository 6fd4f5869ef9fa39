"""The language: Entity, view, cross, derived, service, and handles to what they declare.

A declaration is checked when its view is made, so that a mistake is an error at import that names the view, the
feature, the bad value and what would be right.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from numpy.typing import NDArray

from features.aggregations import Distinct, Last, LastK, TopK
from features.aggregations.base import Aggregation
from features.events import Event, Kind
from features.expressions import values_of
from features.plan import (
    At,
    Contains,
    Derived,
    EntitySpec,
    EventSpec,
    FeatureSpec,
    Plan,
    ServiceSpec,
    ViewSpec,
    arguments,
    contract_fingerprint,
    digest,
    features_of,
)
from features.times import Window, duration_ms, hop_ms
from features.types import Array, BoolArray

T = TypeVar("T")

_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")


class DeclarationError(ValueError):
    """A declaration that can't be right: says where, what, and what would be."""


@dataclass(frozen=True)
class Entity:
    """What features describe: `Entity("user", key="user_id", forget_after="90d")`.

    `key` is the field of events that holds the entity's id. `forget_after` says how long after its last event an entity
    keeps features that have no window (`last_k`, `decayed`, `all`, …); without it there can be none of these.
    """

    name: str
    key: str
    forget_after: str | None = None
    doc: str = ""

    def __post_init__(self) -> None:
        for what, value in (("name", self.name), ("key", self.key)):
            _check_name(f"Entity {what}", value)
        if self.forget_after is not None:
            _or_error(f"Entity {self.name!r}: forget_after", duration_ms, self.forget_after)

    @property
    def spec(self) -> EntitySpec:
        """The entity as plain data."""
        return EntitySpec(self.name, self.key, self.forget_after, self.doc)


class Operand:
    """A feature that a derived one may take as an argument."""

    def resolve(self) -> str | At | Contains:
        """What the plan calls it."""
        raise NotImplementedError

    def at(self, key: Operand, doc: str = "") -> Lookup:
        """The value of this map (`by=`) feature in the bucket that the text feature `key` names."""
        return Lookup(self, key, doc)

    def contains(self, entity: Entity, doc: str = "") -> Lookup:
        """Whether this list feature holds the id of `entity`, as 1.0 or 0.0."""
        return Lookup(self, entity, doc)


class Handle(Operand):
    """Something declared under a name in a view; knows its place once the class is made."""

    def __init__(self) -> None:
        self.view = ""
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def resolve(self) -> str | At | Contains:
        """See `Operand.resolve`."""
        return f"{self.view}__{self.name}"


class Declared(Handle):
    """A declared aggregation; index it by a window to name one of its features: `clicks["1h"]`."""

    def __init__(self, kind: type[Aggregation], event: type[Event], options: dict[str, Any]) -> None:
        super().__init__()
        self.kind = kind
        self.event = event
        self.options = options
        self.over: tuple[str, ...] = options["over"]

    def __getitem__(self, window: str) -> Windowed:
        feature = Windowed(self, window)
        if self.view:
            feature.resolve()
        return feature

    def resolve(self) -> str | At | Contains:
        """See `Operand.resolve`."""
        if self.over:
            raise _error(self._place, "is declared over windows", f'name one of them: {self.name}["{self.over[0]}"]')
        return super().resolve()

    @property
    def _place(self) -> str:
        return f"{self.view}.{self.name}"

    def spec(self) -> Aggregation:
        """The aggregation as plain data, checked against its contract."""
        place, kinds = self._place, self.event.kinds()
        options = {name: value for name, value in self.options.items() if value is not None}
        field = options.get("field")
        if self.kind is Last:
            options["kind"] = _field(place, self.event, "field", field)
        elif self.kind in (LastK, TopK):
            _field(place, self.event, "field", field, "str")
        elif field is not None:
            _field(place, self.event, "field", field, *(() if self.kind is Distinct else ("int", "float", "bool")))
        if "by" in options:
            _field(place, self.event, "by", options["by"], "str")
        for name, event in (("where", self.event), ("of_where", self.options.get("of"))):
            if name in options and event is not None:
                _check_condition(place, event, options[name])
        if "of" in options:
            options["of"] = options["of"].__name__
        for window in self.over:
            _or_error(f"{place}: over", Window.parse, window)
        if len(set(self.over)) < len(self.over):
            raise _error(place, f"over={list(self.over)} names a window twice", "name each once")
        if "half_life" in options:
            _or_error(f"{place}: half_life", duration_ms, options["half_life"])
        for name in ("k", "buckets"):
            if name in options and not 1 <= options[name] <= 1000:  # noqa: PLR2004  # the bound that the message gives
                raise _error(place, f"{name}={options[name]!r} is out of range", "use 1 to 1000")
        if "strength" in options and not (options["strength"] > 0 and 0 <= options["prior"] <= 1):
            raise _error(
                place,
                f"prior={options['prior']!r}, strength={options['strength']!r}",
                "use a prior from 0 to 1 and a strength above 0",
            )
        if "default" in options and isinstance(options["default"], str) != (options.get("kind") == "str"):
            raise _error(
                place,
                f"default={options['default']!r} is not of the feature's type",
                f"use {'text' if options.get('kind') == 'str' else 'a number'}",
            )
        for name in ("prior", "strength", "default"):
            if isinstance(options.get(name), int):
                options[name] = float(options[name])
        return self.kind(name=self.name, event=self.event.__name__, **options)

    @property
    def events(self) -> tuple[type[Event], ...]:
        """The contracts that it reads."""
        other = self.options.get("of")
        return (self.event,) if other is None else (self.event, other)


class Windowed(Operand):
    """One window of a declared aggregation."""

    def __init__(self, of: Declared, window: str) -> None:
        self.of = of
        self.window = window

    def resolve(self) -> str | At | Contains:
        """See `Operand.resolve`."""
        if self.window not in self.of.over:
            declared = ", ".join(self.of.over) or "no window"
            raise _error(f"{self.of.view}.{self.of.name}", f"has no window {self.window!r}", f"declared: {declared}")
        return f"{self.of.view}__{self.of.name}_{self.window}"


class Lookup(Handle):
    """`map.at(text)` or `list.contains(entity)`: an argument of a derived feature, or a feature of a cross view itself."""

    def __init__(self, of: Operand, key: Operand | Entity, doc: str) -> None:
        super().__init__()
        self.of = of
        self.key = key
        self.doc = doc

    def resolve(self) -> str | At | Contains:
        """See `Operand.resolve`."""
        return f"{self.view}__{self.name}" if self.view else self.spec()

    def spec(self) -> At | Contains:
        """The lookup as plain data."""
        of = self.of.resolve()
        if isinstance(self.key, Entity):
            return Contains(str(of), self.key.name, self.name, self.doc)
        return At(str(of), str(self.key.resolve()), self.name, self.doc)


class DerivedFeature(Handle):
    """A numpy function of other features."""

    def __init__(
        self, function: Callable[..., Any], args: tuple[Operand, ...], default: float | None, doc: str
    ) -> None:
        super().__init__()
        self.function = function
        self.args = args
        self.default = default
        self.doc = doc or inspect.getdoc(function) or ""
        self.fingerprint = digest(_code_of(function).encode())

    def spec(self) -> Derived:
        """The feature as plain data."""
        place = f"{self.view}.{self.name}"
        takes = len(inspect.signature(self.function).parameters)
        if takes != len(self.args):
            raise _error(
                place,
                f"the function takes {takes} arrays",
                f"@derived names {len(self.args)} features: give one a parameter",
            )
        returns = typing.get_type_hints(self.function).get("return")
        if returns not in (Array, BoolArray):
            raise _error(
                place, f"returns {returns}", "annotate it `-> Array` (numbers) or `-> BoolArray`, from headrace.types"
            )
        return Derived(
            name=self.name,
            args=tuple(arg.resolve() for arg in self.args),
            code=f"{self.function.__module__}:{self.function.__qualname__}",
            fingerprint=self.fingerprint,
            value_type="bool" if returns == BoolArray else "float",
            default=self.default,
            doc=self.doc,
        )


class View:
    """What `@view` and `@cross` know of a class; kept beside it, so that the class stays as the user wrote it."""

    def __init__(self, declared: type, entities: tuple[Entity, ...], owner: str, tags: Mapping[str, str]) -> None:
        self.entities = entities
        self.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", declared.__name__).lower()
        _check_name("view", self.name)
        self.handles: dict[str, Handle] = {
            name: value for name, value in vars(declared).items() if isinstance(value, Handle)
        }
        if not self.handles:
            raise _error(self.name, "declares no feature", 'add one, such as clicks = agg.count(Click, over="1h")')
        for handle in self.handles.values():
            handle.view = self.name
        self.events = {
            event.__name__: event
            for handle in self.handles.values()
            if isinstance(handle, Declared)
            for event in handle.events
        }
        self.spec = ViewSpec(
            name=self.name,
            entities=tuple(entity.name for entity in entities),
            features=tuple(self._spec(handle) for handle in self.handles.values()),
            owner=owner,
            tags=dict(tags),
            doc=inspect.cleandoc(declared.__doc__ or ""),
        )
        self._check()

    def _spec(self, handle: Handle) -> FeatureSpec:
        _check_name(f"{self.name}: feature", handle.name)
        if isinstance(handle, Declared) and len(self.entities) > 1:
            raise _error(
                f"{self.name}.{handle.name}",
                "is an aggregation in a cross view",
                "declare it in a view of one entity and use it here",
            )
        assert isinstance(handle, Declared | DerivedFeature | Lookup)  # noqa: S101  # for the type checker: these are all handles
        return handle.spec()  # type: ignore[return-value]  # every Aggregation subclass is one of AnyAggregation

    def _check(self) -> None:
        names = [feature.name for feature in features_of(self.spec)]
        for name in names:
            if names.count(name) > 1:
                raise _error(self.name, f"has two features called {name}", "rename one")
        if len(self.entities) > 1:
            return
        (entity,) = self.entities
        for event in self.events.values():
            if entity.key not in event.kinds():
                raise _error(
                    self.name,
                    f"reads {event.__name__}, which has no field {entity.key!r}, the key of {entity.name}",
                    "add the field to the contract, or use another entity",
                )
        for spec in self.spec.aggregations:
            if entity.forget_after is None and spec.windows[-1].unbounded:
                raise _error(
                    f"{self.name}.{spec.name}",
                    "has no window, so its row would never expire",
                    f'declare Entity("{entity.name}", …, forget_after="90d")',
                )
            for window in spec.windows:
                if (
                    not window.unbounded
                    and entity.forget_after is not None
                    and duration_ms(entity.forget_after) < window.width_ms + hop_ms(window.width_ms)
                ):
                    raise _error(
                        f"{self.name}.{spec.name}",
                        f"window {window.name} is longer than {entity.name} is kept",
                        f"raise forget_after={entity.forget_after!r}",
                    )


_VIEWS: Final[dict[type, View]] = {}


def view(entity: Entity, *, owner: str = "", tags: Mapping[str, str] | None = None) -> Callable[[type[T]], type[T]]:
    """Class decorator: the class's attributes are features of `entity`; the view's name is the class's in snake case."""
    return _view((entity,), owner, tags)


def cross(
    first: Entity, second: Entity, *, owner: str = "", tags: Mapping[str, str] | None = None
) -> Callable[[type[T]], type[T]]:
    """Class decorator: features of a pair of entities, computed for every pair of a request at once."""
    return _view((first, second), owner, tags)


def _view(entities: tuple[Entity, ...], owner: str, tags: Mapping[str, str] | None) -> Callable[[type[T]], type[T]]:
    def decorate(declared: type[T]) -> type[T]:
        _VIEWS[declared] = View(declared, entities, owner, tags or {})
        return declared

    return decorate


def derived(
    *args: Operand, default: float | None = None, doc: str = ""
) -> Callable[[Callable[..., NDArray[Any]]], DerivedFeature]:
    """Decorator: a feature that is a numpy function of others, given as arrays of one value a row, NaN for null."""
    return lambda function: DerivedFeature(function, args, default, doc)


@dataclass(frozen=True)
class Service:
    """The list of features that one model reads."""

    spec: ServiceSpec
    views: tuple[View, ...]


def service(
    name: str,
    *members: type | Operand,
    without: Iterable[Operand] = (),
    owner: str = "",
    tags: Mapping[str, str] | None = None,
    doc: str = "",
) -> Service:
    """The features that one model reads, in order: whole views, or single features of them, less those in `without`."""
    _check_name("service", name)
    full_names: list[str] = []
    for member in members:
        full_names += _members(name, member)
    left_out = {full_name for operand in without for full_name in _members(name, operand)}
    kept = tuple(dict.fromkeys(full_name for full_name in full_names if full_name not in left_out))
    by_name = {known.name: known for known in _VIEWS.values()}
    views = tuple(by_name[view_name] for view_name in dict.fromkeys(full_name.split("__")[0] for full_name in kept))
    return Service(ServiceSpec(name, kept, owner, dict(tags or {}), doc), views)


def _members(service_name: str, member: type | Operand) -> list[str]:
    if isinstance(member, Declared) and member.over:
        return [str(member[window].resolve()) for window in member.over]
    if isinstance(member, Operand):
        return [str(member.resolve())]
    if member not in _VIEWS:
        raise _error(
            f"service {service_name}",
            f"{member!r} is no view",
            "decorate the class with @view or @cross, or name its features",
        )
    return [feature.full_name for feature in features_of(_VIEWS[member].spec)]


def compile_plan(namespaces: Iterable[Mapping[str, Any]], project: str, shards: int) -> Plan:
    """The plan of all views and services found among the values of the namespaces (module dictionaries)."""
    found = [value for namespace in namespaces for value in namespace.values()]
    services = list({value.spec.name: value for value in found if isinstance(value, Service)}.values())
    declared = [_VIEWS[value] for value in found if isinstance(value, type) and value in _VIEWS]
    views = {known.name: known for known in (*declared, *(known for each in services for known in each.views))}
    views |= {name: known for name, known in _arguments(views).items() if name not in views}
    entities = {entity.name: entity for known in views.values() for entity in known.entities}
    events = {name: event for known in views.values() for name, event in known.events.items()}
    plan = Plan(
        project=project,
        shards=shards,
        entities=tuple(entity.spec for entity in sorted(entities.values(), key=lambda entity: entity.name)),
        events=tuple(_event_spec(events[name]) for name in sorted(events)),
        views=tuple(sorted((known.spec for known in views.values()), key=lambda spec: (len(spec.entities), spec.name))),
        services=tuple(sorted((each.spec for each in services), key=lambda spec: spec.name)),
    )
    _check_arguments(plan)
    return plan


def _arguments(views: Mapping[str, View]) -> dict[str, View]:
    """Views that others take arguments from."""
    by_name = {known.name: known for known in _VIEWS.values()}
    needed = {
        name.split("__")[0] for known in views.values() for spec in known.spec.features for name in arguments(spec)
    }
    return {name: by_name[name] for name in sorted(needed) if name in by_name}


def _check_arguments(plan: Plan) -> None:
    for feature in plan.features.values():
        spec = feature.spec
        lookups = [arg for arg in spec.args if not isinstance(arg, str)] if isinstance(spec, Derived) else [spec]
        wanted: list[tuple[str, tuple[str, ...]]] = []
        for lookup in lookups:
            if isinstance(lookup, At):
                wanted += [(lookup.of, ("map[str, float]",)), (lookup.key, ("str",))]
            elif isinstance(lookup, Contains):
                wanted += [(lookup.of, ("list[str]",))]
        if isinstance(spec, Derived):
            wanted += [(arg, ("int", "float", "bool")) for arg in spec.args if isinstance(arg, str)]
        for name in arguments(spec):
            if not set(plan.features[name].entities) <= set(feature.entities):
                wrong = f"takes {name}, a feature of {' and '.join(plan.features[name].entities)}"
                raise _error(feature.full_name, wrong, "declare it in a @cross view of those entities")
        for name, types in wanted:
            if plan.features[name].value_type not in types:
                raise _error(
                    feature.full_name,
                    f"takes {name}, a {plan.features[name].value_type}",
                    f"it needs {' or '.join(types)}",
                )


def _event_spec(event: type[Event]) -> EventSpec:
    return EventSpec(
        name=event.__name__,
        topic=event.topic,
        fields=dict(event.kinds()),
        code=f"{event.__module__}:{event.__qualname__}",
        fingerprint=contract_fingerprint(event),
        doc=inspect.cleandoc(event.__doc__ or ""),
    )


def _code_of(function: Callable[..., Any]) -> str:
    """The function's code without decorators, comments and layout."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (definition,) = tree.body
    assert isinstance(definition, ast.FunctionDef)  # noqa: S101  # for the type checker: @derived decorates a def
    definition.decorator_list = []
    return ast.unparse(definition)


def _field(place: str, event: type[Event], option: str, name: object, *kinds: Kind) -> Kind:
    known = event.kinds()
    if name not in known:
        raise _error(place, f"{option}={name!r} is no field of {event.__name__}", f"it has: {', '.join(known)}")
    kind = known[str(name)]
    if kinds and kind not in kinds:
        raise _error(place, f"{option}={name!r} is {kind}", f"it needs a field of type {' or '.join(kinds)}")
    return kind


def _check_condition(place: str, event: type[Event], condition: Any) -> None:
    if not hasattr(condition, "fields"):
        raise _error(place, f"where={condition!r} is no condition", 'write where=col("surface") == "search"')
    for name in condition.fields():
        _field(place, event, "where", name)
    for name, value in values_of(condition):
        if (event.kinds()[name] == "str") != isinstance(value, str):
            raise _error(place, f"where compares {name!r} with {value!r}", f"the field is {event.kinds()[name]}")


def _check_name(what: str, name: str) -> None:
    if _NAME.fullmatch(name) is None or "__" in name:
        raise _error(
            what, f"{name!r} is no name", "use small letters, digits and single underscores, a letter first, at most 64"
        )


def _or_error(place: str, parse: Callable[[str], Any], text: str) -> None:
    try:
        parse(text)
    except ValueError as error:
        raise DeclarationError(f"{place}: {error}") from None  # noqa: EM102  # the text is the error's own


def _error(place: str, wrong: str, right: str) -> DeclarationError:
    return DeclarationError(f"{place}: {wrong}; {right}")
