"""The language: Entity, view, cross, derived, service, and handles to what they declare.

A declaration is checked when its view is made, so that a mistake is an error at import.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from numpy.typing import NDArray

from features.aggregations.base import Aggregation
from features.checks import (
    TEXTS_A_ROW_MAX,
    DeclarationError,
    check_duration,
    check_event,
    check_name,
    checked_default,
    checked_options,
    mistake,
)
from features.events import Event
from features.plan import At, Contains, Derived, EntitySpec, FeatureSpec, ServiceSpec, ViewSpec, digest, features_of
from features.times import duration_ms, hop_ms
from features.types import Array, BoolArray

__all__ = ["DeclarationError", "Entity", "View", "cross", "derived", "service", "view"]

T = TypeVar("T")


@dataclass(frozen=True)
class Entity:
    """What features describe: `Entity("user", key="user_id", forget_after="90d")`.

    `key` is the field of events that holds the entity's id. `forget_after` says how long after its last event an entity
    keeps features that have no window (`last_k`, `decayed`, `all`, …); without it there can be none of these. An event
    that is older when the stream merges it is left out.
    """

    name: str
    key: str
    forget_after: str | None = None
    doc: str = ""

    def __post_init__(self) -> None:
        for what, value in (("name", self.name), ("key", self.key)):
            check_name(f"Entity {what}", value)
        if self.forget_after is not None:
            check_duration(f"Entity {self.name!r}: forget_after", duration_ms, self.forget_after)

    @property
    def spec(self) -> EntitySpec:
        """The entity as plain data."""
        return EntitySpec(self.name, self.key, self.forget_after, self.doc)


class Operand:
    """A feature that a derived one may take as an argument."""

    def resolve(self) -> str | At | Contains:
        """What the plan calls it."""
        raise NotImplementedError

    def views(self) -> Iterator[View]:
        """The views that it needs."""
        raise NotImplementedError

    def at(self, key: Operand, doc: str = "") -> Lookup:
        """The value of this map (`by=`) feature in the bucket that the text feature `key` names."""
        return Lookup(self, key, doc)

    def contains(self, entity: Entity, doc: str = "") -> Lookup:
        """Whether this list feature holds the id of `entity`, as 1.0 or 0.0."""
        return Lookup(self, entity, doc)


class Handle(Operand):
    """Something declared under a name in a view; knows its place once the view is made."""

    def __init__(self) -> None:
        self.view: View | None = None
        self.name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @property
    def place(self) -> str:
        """Where it is declared, for messages."""
        return f"{self.view.name if self.view else '?'}.{self.name or '?'}"

    def resolve(self) -> str | At | Contains:
        """See `Operand.resolve`."""
        if self.view is None:
            raise mistake(
                self.place, "is a feature of no view", "declare it as an attribute of a class with @view or @cross"
            )
        return f"{self.view.name}__{self.name}"

    def views(self) -> Iterator[View]:
        """See `Operand.views`."""
        if self.view is not None:
            yield self.view

    def spec(self) -> FeatureSpec:
        """The feature as plain data."""
        raise NotImplementedError


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
        if self.view is not None:
            feature.resolve()
        return feature

    def resolve(self) -> str | At | Contains:
        """See `Operand.resolve`."""
        if self.over:
            raise mistake(self.place, "is declared over windows", f'name one of them: {self.name}["{self.over[0]}"]')
        return super().resolve()

    def spec(self) -> FeatureSpec:
        """The aggregation as plain data, checked against its contract."""
        check_event(self.place, self.event)
        options = checked_options(self.place, self.kind, self.event, self.options)
        return self.kind(name=self.name, event=self.event.__name__, **options)  # type: ignore[return-value]  # every kind is in the union

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
            declared = ", ".join(map(str, self.of.over)) or "no window"
            raise mistake(self.of.place, f"has no window {self.window!r}", f"declared: {declared}")
        return f"{Handle.resolve(self.of)}_{self.window}"

    def views(self) -> Iterator[View]:
        """See `Operand.views`."""
        return self.of.views()


class Lookup(Handle):
    """`map.at(text)` or `list.contains(entity)`: an argument of a derived feature, or itself a cross view's feature."""

    def __init__(self, of: Operand, key: Operand | Entity, doc: str) -> None:
        super().__init__()
        self.of = of
        self.key = key
        self.doc = doc

    def resolve(self) -> str | At | Contains:
        """See `Operand.resolve`."""
        return self.spec() if self.view is None else super().resolve()

    def views(self) -> Iterator[View]:
        """See `Operand.views`."""
        yield from super().views()
        yield from self.of.views()
        if isinstance(self.key, Operand):
            yield from self.key.views()

    def spec(self) -> At | Contains:
        """The lookup as plain data."""
        if isinstance(self.key, Entity):
            return Contains(str(_resolved(self.place, self.of)), self.key.name, self.name, self.doc)
        return At(str(_resolved(self.place, self.of)), str(_resolved(self.place, self.key)), self.name, self.doc)


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

    def views(self) -> Iterator[View]:
        """See `Operand.views`."""
        yield from super().views()
        for arg in self.args:
            yield from arg.views()

    def spec(self) -> Derived:
        """The feature as plain data."""
        takes = len(inspect.signature(self.function).parameters)
        if takes != len(self.args):
            right = f"@derived names {len(self.args)} features: give one a parameter"
            raise mistake(self.place, f"the function takes {takes} arrays", right)
        right = "annotate it `-> Array` (numbers) or `-> BoolArray`, from headrace.types"
        try:
            returns = typing.get_type_hints(self.function).get("return")
        except (NameError, TypeError) as error:
            raise mistake(self.place, f"an annotation can't be resolved ({error})", right) from error
        if returns not in (Array, BoolArray):
            raise mistake(self.place, f"returns {returns}", right)
        return Derived(
            name=self.name,
            args=tuple(_resolved(self.place, arg) for arg in self.args),
            code=f"{self.function.__module__}:{self.function.__qualname__}",
            fingerprint=self.fingerprint,
            value_type="bool" if returns == BoolArray else "float",
            default=None if self.default is None else float(checked_default(self.place, self.default)),
            doc=self.doc,
        )


def _resolved(place: str, operand: object) -> str | At | Contains:
    if not isinstance(operand, Operand):
        raise mistake(place, f"takes {operand!r}, which is no feature", 'name declared ones, such as clicks["1h"]')
    return operand.resolve()


class View:
    """What `@view` and `@cross` know of a class; kept beside it, so that the class stays as the user wrote it."""

    def __init__(self, declared: type, entities: tuple[Entity, ...], owner: str, tags: Mapping[str, str]) -> None:
        self.entities = entities
        self.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", declared.__name__).lower()
        check_name("view", self.name)
        if len(set(entities)) < len(entities):
            raise mistake(
                self.name,
                f"crosses {entities[0].name} with itself",
                "name two entities; features of one go into a @view",
            )
        self.handles = [value for value in vars(declared).values() if isinstance(value, Handle)]
        if not self.handles:
            raise mistake(self.name, "declares no feature", 'add one, such as clicks = agg.count(Click, over="1h")')
        for handle in self.handles:
            handle.view = self
        self.spec = ViewSpec(
            name=self.name,
            entities=tuple(entity.name for entity in entities),
            features=tuple(self._spec(handle) for handle in self.handles),
            owner=owner,
            tags=dict(tags),
            doc=inspect.cleandoc(declared.__doc__ or ""),
        )
        self._check_names()
        if len(entities) == 1:
            self._check_entity(entities[0])

    @property
    def events(self) -> list[type[Event]]:
        """The contracts that it reads."""
        return list(
            dict.fromkeys(event for handle in self.handles if isinstance(handle, Declared) for event in handle.events)
        )

    @property
    def needs(self) -> list[View]:
        """The views that its features take arguments from."""
        return [other for handle in self.handles for other in handle.views() if other is not self]

    def _spec(self, handle: Handle) -> FeatureSpec:
        check_name(f"{self.name}: feature", handle.name)
        if isinstance(handle, Declared) and len(self.entities) > 1:
            right = "declare it in a view of one entity and use it here"
            raise mistake(handle.place, "is an aggregation in a cross view", right)
        if isinstance(handle, Lookup) and isinstance(handle.key, Entity) and handle.key not in self.entities:
            names = " and ".join(entity.name for entity in self.entities)
            raise mistake(
                handle.place, f"contains({handle.key.name}) in a view of {names}", "name one of these entities"
            )
        return handle.spec()

    def _check_names(self) -> None:
        names = [feature.name for feature in features_of(self.spec)]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise mistake(f"{self.name}.{twice}", "is the name of two features", "rename one")
        # Feast takes a column of this name for the id, and then misses the feature.
        for entity in self.entities:
            if entity.key in names:
                raise mistake(f"{self.name}.{entity.key}", f"is also the key of {entity.name}", "rename the feature")

    def _check_entity(self, entity: Entity) -> None:
        for event in self.events:
            if entity.key not in event.kinds():
                wrong = f"reads {event.__name__}, which has no field {entity.key!r}, the key of {entity.name}"
                raise mistake(self.name, wrong, "add the field to the contract, or use another entity")
            if event.kinds()[entity.key] not in ("str", "int"):
                wrong = f"reads {event.__name__}, whose {entity.key!r} is {event.kinds()[entity.key]}"
                raise mistake(self.name, wrong, f"an id is a text or a whole number: declare {entity.key}: str")
        tables = {slot.table for spec in self.spec.aggregations for slot in spec.slots()}
        texts = sum(table.bound or 0 for table in tables if table.bucket == "text") + len(self.handles)
        if texts > TEXTS_A_ROW_MAX:
            wrong = f"keeps up to {texts:,} texts a row, more than the {TEXTS_A_ROW_MAX:,} that a row can number"
            raise mistake(self.name, wrong, "lower buckets= or k=, or split the view")
        kept_ms = duration_ms(entity.forget_after) if entity.forget_after else None
        for spec in self.spec.aggregations:
            place = f"{self.name}.{spec.name}"
            if kept_ms is None and spec.windows[-1].unbounded:
                right = f'declare Entity("{entity.name}", …, forget_after="90d")'
                raise mistake(place, "has no window, so its row would never expire", right)
            for window in spec.windows:
                if kept_ms is not None and not window.unbounded and kept_ms < window.width_ms + hop_ms(window.width_ms):
                    wrong = f"window {window.name} is longer than {entity.name} is kept"
                    raise mistake(place, wrong, f"raise forget_after={entity.forget_after!r}")


VIEWS: Final[dict[type, View]] = {}
"""Every view made, by its class."""


def view(entity: Entity, *, owner: str = "", tags: Mapping[str, str] | None = None) -> Callable[[type[T]], type[T]]:
    """Class decorator: the class's attributes are features of `entity`; the view's name is its own in snake case."""
    return _view("@view", (entity,), owner, tags)


def cross(
    first: Entity, second: Entity, *, owner: str = "", tags: Mapping[str, str] | None = None
) -> Callable[[type[T]], type[T]]:
    """Class decorator: features of a pair of entities, computed for every pair of a request at once."""
    return _view("@cross", (first, second), owner, tags)


def _view(
    decorator: str, entities: tuple[Entity, ...], owner: str, tags: Mapping[str, str] | None
) -> Callable[[type[T]], type[T]]:
    for entity in entities:
        if not isinstance(entity, Entity):
            raise mistake(decorator, f"{entity!r} is no Entity", f"write {decorator}(user, …) above the class")

    def decorate(declared: type[T]) -> type[T]:
        VIEWS[declared] = View(declared, entities, owner, tags or {})
        return declared

    return decorate


def derived(
    *args: Operand, default: float | None = None, doc: str = ""
) -> Callable[[Callable[..., NDArray[Any]]], DerivedFeature]:
    """Decorator: a feature that is a numpy function of others, given as arrays of one value a row, NaN for null."""
    for arg in args:
        if not isinstance(arg, Operand):
            raise mistake(
                "@derived", f"{arg!r} is no feature", 'name declared ones: @derived(clicks["10m"], clicks["1h"])'
            )
    if not args:
        raise mistake("@derived", "names no feature", 'name those that the function takes: @derived(clicks["1h"])')
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
    check_name("service", name)
    place = f"service {name}"
    named = dict.fromkeys(full_name for member in members for full_name in _members(place, member))
    views = dict.fromkeys(view for member in members for view in _views_of(member))
    for operand in without:
        for full_name in _members(place, operand):
            if full_name not in named:
                raise mistake(
                    place, f"without={full_name}, which is not in it", f"it has: {', '.join(named) or 'nothing'}"
                )
            del named[full_name]
    if not named:
        raise mistake(place, "has no feature", "name views or features: service('ranking_v1', UserActivity)")
    return Service(ServiceSpec(name, tuple(named), owner, dict(tags or {}), doc), tuple(views))


def _members(place: str, member: object) -> list[str]:
    if isinstance(member, Operand):
        if next(iter(member.views()), None) is None:
            right = "declare it as an attribute of a class with @view or @cross"
            raise mistake(place, "is given a feature of no view", right)
        if isinstance(member, Declared) and member.over:
            return [str(member[window].resolve()) for window in member.over]
        return [str(member.resolve())]
    if not isinstance(member, type) or member not in VIEWS:
        right = "name a class decorated with @view or @cross, or features of one"
        raise mistake(place, f"{member!r} is no view and no feature", right)
    return [feature.full_name for feature in features_of(VIEWS[member].spec)]


def _views_of(member: type | Operand) -> Iterable[View]:
    return member.views() if isinstance(member, Operand) else [VIEWS[member]]


def _code_of(function: Callable[..., Any]) -> str:
    """The function's code without decorators, comments and layout."""
    name = getattr(function, "__qualname__", repr(function))
    right = "decorate a plain function (def), written in a file"
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise mistake("@derived", f"{name} has no source that can be read", right) from error
    definition = tree.body[0] if len(tree.body) == 1 else None
    if not isinstance(definition, ast.FunctionDef):
        raise mistake("@derived", f"{name} is no plain function", right)
    definition.decorator_list = []
    return ast.unparse(definition)
