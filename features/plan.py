"""The plan: everything that was declared, as plain data.

`apply` writes it into the registry; streams and servers read it from there and run it. It holds no code: derived
functions and contracts are named, found again by import, and checked by fingerprint.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, Literal, TypeVar

import msgspec

from features.aggregations import AnyAggregation
from features.aggregations.base import Aggregation
from features.events import Event, Kind
from features.expectations import Expectation
from features.source import Source
from features.times import Window
from features.values import Type

VERSION = 1


class EntitySpec(msgspec.Struct, frozen=True):
    """What features describe."""

    name: str
    key: str
    forget_after: str | None = None
    doc: str = ""
    id_type: Literal["int"] | msgspec.UnsetType = msgspec.UNSET
    """Of ids that all contracts have as whole numbers: in Feast they stay so; elsewhere an id is text."""


class EventSpec(msgspec.Struct, frozen=True):
    """A contract: its topic, its fields, where its code is (`module:qualified.name`), and its JSON schema."""

    name: str
    topic: str
    fields: dict[str, Kind]
    code: str
    fingerprint: str
    schema: dict[str, Any] = {}
    doc: str = ""
    expect: tuple[Expectation, ...] | msgspec.UnsetType = msgspec.UNSET
    """What its events shall be like as a whole. Without any, the plan reads as those that knew of none."""
    source: Source | msgspec.UnsetType = msgspec.UNSET
    """Likewise: what else it says of its records."""

    @property
    def reads(self) -> Source:
        """What it says of its records, besides its fields."""
        return self.source or Source()

    @property
    def topics(self) -> tuple[str, ...]:
        """All its topics."""
        return self.reads.topics or (self.topic,)


class At(msgspec.Struct, frozen=True, tag_field="is", tag="at"):
    """A lookup in a map feature, at the value of a text feature."""

    of: str
    key: str
    name: str = ""
    doc: str = ""


class Contains(msgspec.Struct, frozen=True, tag_field="is", tag="contains"):
    """Whether a list feature holds the id of an entity."""

    of: str
    entity: str
    name: str = ""
    doc: str = ""


class Derived(msgspec.Struct, frozen=True, tag_field="is", tag="derived"):
    """A numpy function of other features."""

    name: str
    args: tuple[str | At | Contains, ...]
    code: str
    fingerprint: str
    value_type: Type = "float"
    default: float | None = None
    doc: str = ""


_Named = TypeVar("_Named", EntitySpec, EventSpec, "ViewSpec", "ServiceSpec")

FeatureSpec = AnyAggregation | Derived | At | Contains


class ViewSpec(msgspec.Struct, frozen=True):
    """Named features of one entity, or of a pair (a cross view).

    `filling` are aggregations of its features as they begin anew, to be served once their history is added: see
    `features.evolve.backfilling`.
    """

    name: str
    entities: tuple[str, ...]
    features: tuple[FeatureSpec, ...]
    owner: str = ""
    tags: dict[str, str] = {}
    doc: str = ""
    filling: tuple[AnyAggregation, ...] = ()

    @property
    def aggregations(self) -> tuple[Aggregation, ...]:
        """Those that keep state."""
        return (*(spec for spec in self.features if isinstance(spec, Aggregation)), *self.filling)


class ServiceSpec(msgspec.Struct, frozen=True):
    """The list of features that one model reads, by full name."""

    name: str
    features: tuple[str, ...]
    owner: str = ""
    tags: dict[str, str] = {}
    doc: str = ""


class Feature(msgspec.Struct, frozen=True):
    """One servable feature, derived from its view's specification."""

    view: str
    name: str
    entities: tuple[str, ...]
    value_type: Type
    spec: FeatureSpec
    window: Window | None = None
    default: float | str | None = None
    doc: str = ""

    @property
    def full_name(self) -> str:
        """`view__name`, as Feast has it."""
        return f"{self.view}__{self.name}"


class Known(msgspec.Struct, frozen=True, array_like=True):
    """That a feature knows all its events since `lead_ms` before streams took up the plan of this number."""

    plan: int
    lead_ms: int


class History(msgspec.Struct, frozen=True):
    """What a plan's views are filled with: the events from `since_ms` on, in so many batches a shard."""

    batches: int
    since_ms: int = 0


class Plan(msgspec.Struct, frozen=True, dict=True):
    """What is applied.

    `number` says how many were applied before it. `known` is of the features that
    lacked something when it was applied, by full name: each knows its events since the latest of these. Both, and the
    aggregations' `origin`, come from the plan before: see `features.evolve.succeed`. `history` is that of a plan with
    views that are `filling`. `generation` tells its rows from those before a rebuild.
    """

    project: str
    shards: int
    entities: tuple[EntitySpec, ...]
    events: tuple[EventSpec, ...]
    views: tuple[ViewSpec, ...]
    services: tuple[ServiceSpec, ...]
    number: int = 0
    known: dict[str, tuple[Known, ...]] = {}
    history: History | None = None
    generation: int = 0
    version: int = VERSION

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that name this plan in answers, logs and metrics."""
        return digest(msgspec.json.encode(self, order="sorted"))

    @cached_property
    def needs(self) -> frozenset[int]:
        """The plans of which it matters when streams took them up: see `known`."""
        return frozenset(known.plan for each in self.known.values() for known in each)

    @cached_property
    def features(self) -> dict[str, Feature]:
        """Every servable feature by its full name, in order of declaration."""
        return {feature.full_name: feature for view in self.views for feature in features_of(view)}

    @cached_property
    def topics(self) -> dict[str, tuple[EventSpec, ...]]:
        """The contracts of each topic that is read, in order of declaration."""
        every = dict.fromkeys(topic for spec in self.events for topic in spec.topics)
        return {topic: tuple(spec for spec in self.events if topic in spec.topics) for topic in every}

    @cached_property
    def stored_entities(self) -> tuple[str, ...]:
        """Names of the entities that have rows, and so shards with commit records; sorted."""
        return tuple(sorted({view.entities[0] for view in self.views if len(view.entities) == 1}))

    def service(self, name: str) -> ServiceSpec:
        """The service called `name`.

        Raises:
            KeyError: if there is none; the message lists those there are.
        """
        return _named("service", self.services, name)

    def view(self, name: str) -> ViewSpec:
        """The view called `name`, or KeyError."""
        return _named("view", self.views, name)

    def entity(self, name: str) -> EntitySpec:
        """The entity called `name`, or KeyError."""
        return _named("entity", self.entities, name)

    def event(self, name: str) -> EventSpec:
        """The contract called `name`, or KeyError."""
        return _named("event", self.events, name)

    def encode(self) -> str:
        """The plan as canonical JSON."""
        return msgspec.json.encode(self, order="sorted").decode()

    @classmethod
    def decode(cls, text: str | bytes) -> Plan:
        """The inverse of `encode`.

        Raises:
            ValueError: if the text is no plan, or one of another version of Headrace.
        """
        try:
            plan = msgspec.json.decode(text, type=cls)
        except msgspec.DecodeError as error:
            msg = f"the applied plan can't be read by this version of Headrace ({error}); run `headrace apply` with it"
            raise ValueError(msg) from error
        if plan.version != VERSION:
            msg = (
                f"the applied plan has version {plan.version}, this Headrace {VERSION}: "
                "run `headrace apply` with this one, or use the one that applied it"
            )
            raise ValueError(msg)
        return plan


def digest(data: bytes) -> str:
    """Twelve hexadecimal digits of a SHA-256."""
    return hashlib.sha256(data).hexdigest()[:12]


def features_of(view: ViewSpec) -> Iterator[Feature]:
    """The servable features of a view: an aggregation over several windows is one a window."""
    for spec in view.features:
        match spec:
            case Derived():
                yield Feature(view.name, spec.name, view.entities, spec.value_type, spec, None, spec.default, spec.doc)
            case At():
                yield Feature(view.name, spec.name, view.entities, "float", spec, None, None, spec.doc)
            case Contains():
                yield Feature(view.name, spec.name, view.entities, "bool", spec, None, None, spec.doc)
            case _:
                for window in spec.windows:
                    name = f"{spec.name}_{window.name}" if spec.over else spec.name
                    yield Feature(view.name, name, view.entities, spec.value_type, spec, window, spec.default, spec.doc)


def arguments(spec: FeatureSpec) -> tuple[str, ...]:
    """Full names of the features that a feature is computed from."""
    match spec:
        case Derived():
            return tuple(name for arg in spec.args for name in ((arg,) if isinstance(arg, str) else arguments(arg)))
        case At():
            return (spec.of, spec.key)
        case Contains():
            return (spec.of,)
        case _:
            return ()


def stateful(plan: Plan, full_names: Iterable[str]) -> list[str]:
    """Full names of the features that keep state for these: themselves, or what they are computed from."""
    found: dict[str, None] = {}
    for name in full_names:
        spec = plan.features[name].spec
        found |= dict.fromkeys([name] if isinstance(spec, Aggregation) else stateful(plan, arguments(spec)))
    return list(found)


def contracts_of(plan: Plan, full_names: Iterable[str]) -> set[str]:
    """Names of the contracts whose events features that keep state are made of."""
    specs = (plan.features[name].spec for name in full_names)
    return {measure.event for spec in specs if isinstance(spec, Aggregation) for measure in spec.measures}


class CodeChangedError(RuntimeError):
    """The code that an applied plan names is gone, or is no longer what was applied."""


def find_contract(spec: EventSpec) -> type[Event]:
    """The contract's class, found by name.

    Raises:
        CodeChangedError: if it is not there or its fields have changed since `apply`.
    """
    contract = find_code(spec.code)
    is_contract = isinstance(contract, type) and issubclass(contract, Event)
    if not is_contract or contract_fingerprint(contract) != spec.fingerprint:
        msg = (
            f"contract {spec.name} ({spec.code}) is not the one that was applied; "
            "run `headrace plan`, then `headrace apply`"
        )
        raise CodeChangedError(msg)
    found: type[Event] = contract
    return found


def find_function(spec: Derived) -> Callable[..., Any]:
    """The derived feature's function, found by name.

    Raises:
        CodeChangedError: if it is not there or has changed since `apply`.
    """
    declared = find_code(spec.code)
    if getattr(declared, "fingerprint", None) != spec.fingerprint:
        msg = (
            f"derived feature {spec.name} ({spec.code}) is not the one that was applied; "
            "run `headrace plan`, then `headrace apply`"
        )
        raise CodeChangedError(msg)
    function: Callable[..., Any] = declared.function
    return function


def contract_fingerprint(contract: type[Event]) -> str:
    """What a contract accepts, condensed: its documentation does not matter."""
    own = [contract.declared_source] if contract.declared_source != Source() else []
    return digest(msgspec.json.encode([contract.topic, contract_schema(contract), *own], order="sorted"))


def contract_schema(contract: type[Event]) -> dict[str, Any]:
    """What a contract accepts, as JSON schema."""
    # By its own names: where records have them, the source says.
    schema = contract.model_json_schema(by_alias=False)
    schema.pop("description", None)
    return schema


def find_code(path: str) -> Any:
    """The object at `module:qualified.name`, or None."""
    module_name, _, qualified_name = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError:
        return None
    for part in qualified_name.split("."):
        found = getattr(found, part, None)
    return found


def _named(what: str, specs: tuple[_Named, ...], name: str) -> _Named:
    for spec in specs:
        if spec.name == name:
            return spec
    msg = f"no {what} {name!r} in the plan; there is: {', '.join(spec.name for spec in specs) or 'none'}"
    raise KeyError(msg)
