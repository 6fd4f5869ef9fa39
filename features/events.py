"""Contracts: what an event of a topic must look like."""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, ClassVar, Final, Literal, NamedTuple
from uuid import UUID

import numpy as np
import pyarrow as pa
from msgspec.structs import replace
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from features import source
from features.expectations import Expectation
from features.source import Source

OLDEST_MS: Final = 946_684_800_000
"""2000-01-01: earlier times are a producer's mistake (seconds for milliseconds, zero, …)."""
NEWEST_MS: Final = 4_102_444_800_000
"""2100-01-01. A time more than a day ahead of the record's is refused too, where the record is known."""
TEXT_LENGTH_MAX: Final = 256
WHOLE_MAX: Final = 1 << 53
LIST_LENGTH_MAX: Final = 256

_RFC_3339: Final = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ](?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:[Zz]|[+-]\d\d:[0-5]\d)", re.ASCII
)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def epoch_ms(value: object) -> object:
    """Epoch milliseconds of an RFC 3339 text; anything else is returned as it is, for pydantic to judge.

    >>> epoch_ms("2025-11-21T10:00:00.250Z")
    1763719200250
    """
    if not isinstance(value, str):
        return value
    if _RFC_3339.fullmatch(value) is None:
        msg = "not RFC 3339: write epoch milliseconds, or a text such as 2025-11-21T10:00:00.250Z with its offset"
        raise ValueError(msg)
    return (datetime.fromisoformat(value.upper()) - _EPOCH) // timedelta(milliseconds=1)


OccurredAt = Annotated[
    int, BeforeValidator(epoch_ms, json_schema_input_type=int | str), Field(ge=OLDEST_MS, le=NEWEST_MS)
]


def _given_id(value: object, info: ValidationInfo) -> object:
    """Of a record, whatever stands in for the id that is found elsewhere: see `features.source`."""
    return value if info.mode == "python" else "given"


def _given_time(value: object, info: ValidationInfo) -> object:
    return epoch_ms(value) if info.mode == "python" else OLDEST_MS


_GivenId = Annotated[str, BeforeValidator(_given_id)]
_GivenTime = Annotated[int, BeforeValidator(_given_time), Field(ge=OLDEST_MS, le=NEWEST_MS)]

Kind = Literal["str", "int", "float", "bool", "list[str]"]
_KINDS: Final[dict[Any, Kind]] = {
    str: "str",
    int: "int",
    float: "float",
    bool: "bool",
    UUID: "str",
    Decimal: "float",
    datetime: "int",
    date: "int",
    list[str]: "list[str]",
}
_NESTING_MAX: Final = 8


class Leaf(NamedTuple):
    """A field as features have it: its kind and type, and by which attributes an event has it."""

    kind: Kind
    type: Any
    attributes: tuple[str, ...]
    required: bool


class Event(BaseModel):
    """One immutable fact from a Kafka topic. Subclass it with the topic and the fields that features use.

    Fields are `str`, `int`, `float` or `bool`, optional ones with `| None = None`. Also an `Enum` or a `Literal` of
    texts, a `UUID` (its text), a `Decimal` (as a float), a `datetime` or `date` (as milliseconds since 1970, UTC),
    `list[str]` for `by=`, and a model of such fields, which features name by path: `"product.price"`. Validation is
    strict: no text for a number, finite numbers only (whole ones up to 2^53), no empty text (send null instead), at
    most 256 characters, no NUL. Unknown fields are ignored, so that producers can add them first.

    Args of the class:
        topic: the topic, or several.
        expect: what its events shall be like as a whole, which refuses none of them: see `features.expectations`.
        when: which records of the topic are its events, if others are on it too: a value for each place.
        occurred_at: where the time is, if it is no field `occurred_at` in milliseconds or RFC 3339.
        event_id: where the identity is, if it is no field `event_id`; several places in a tuple make one together.
        format: `"json"`, or `"avro"`, `"protobuf"`, `"json_schema"` of a schema registry, or `source.avro(schema)`.
        envelope: `"cloudevents"` or `"debezium"`.

    The last five, and the topic, are taken over from the class that it is a subclass of: see `features.source`.
    """

    model_config = ConfigDict(
        strict=True, frozen=True, allow_inf_nan=False, extra="ignore", str_min_length=1, str_max_length=TEXT_LENGTH_MAX
    )

    topic: ClassVar[str] = ""
    declared_source: ClassVar[Source] = Source()
    expectations: ClassVar[tuple[Expectation, ...]] = ()

    event_id: str
    occurred_at: OccurredAt

    def __init_subclass__(
        cls, *, topic: str | Sequence[str] = "", expect: Sequence[Expectation] = (), **kwargs: Any
    ) -> None:
        said: dict[str, Any] = {name: kwargs.pop(name) for name in source.KEYWORDS if name in kwargs}
        super().__init_subclass__(**kwargs)
        topics = (topic,) if isinstance(topic, str) else tuple(topic)
        if topic == "" and cls.topic:
            topics = cls.topics()
        for each in topics or ("",):
            if re.fullmatch(r"[a-zA-Z0-9._-]{1,200}", each) is None or each in (".", ".."):
                msg = (
                    f"{cls.__name__}: topic={each!r} is no Kafka topic name; "
                    f'declare `class {cls.__name__}(Event, topic="clicks")`'
                )
                raise TypeError(msg)
            if topics.count(each) > 1:
                msg = f"{cls.__name__}: topic={list(topics)} names {each!r} twice; name it once"
                raise TypeError(msg)
        try:
            declared = source.declared(cls.declared_source, said)
        except TypeError as error:
            msg = f"{cls.__name__}: {error}"
            raise TypeError(msg) from None
        cls.topic = topics[0]
        cls.declared_source = replace(declared, topics=topics if len(topics) > 1 else ())
        if declared.identity_is_given:
            cls._give("event_id", _GivenId, "given")
        if declared.time_is_given:
            cls._give("occurred_at", _GivenTime, OLDEST_MS)

    @classmethod
    def _give(cls, name: str, annotation: Any, stand_in: Any) -> None:
        """Makes a field one that records need not have, as it is found elsewhere."""
        own = vars(cls).get("__annotations__", {})
        if name in own:
            msg = f"{cls.__name__}: {name} is declared as a field and by a keyword or an envelope; leave one out"
            raise TypeError(msg)
        cls.__annotations__ = {**own, name: annotation}
        setattr(cls, name, Field(stand_in))

    @classmethod
    def __pydantic_init_subclass__(cls, *, expect: Sequence[Expectation] = (), **kwargs: Any) -> None:
        from features.checks import checked_expectations  # Which knows contracts.

        paths = {
            name: found
            for name, info in cls.model_fields.items()
            if (found := source.paths_of(name, info.validation_alias)) != ((name,),)
        }
        cls.declared_source = replace(cls.declared_source, paths=paths)
        cls.kinds()
        cls.expectations = checked_expectations(cls, expect)

    @field_validator("*", mode="after")
    @classmethod
    def _storable(cls, value: object) -> object:
        if isinstance(value, int) and abs(value) > WHOLE_MAX:
            msg = "whole numbers beyond 2^53 can't be kept exactly"
            raise ValueError(msg)
        if isinstance(value, Decimal) and not math.isfinite(float(value)):
            msg = "no float is so large"
            raise ValueError(msg)
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(each, str) and "\0" in each for each in texts):
            msg = "text holds a NUL character; remove it"
            raise ValueError(msg)
        if len(texts) > LIST_LENGTH_MAX:
            msg = f"more than {LIST_LENGTH_MAX} elements"
            raise ValueError(msg)
        return value

    @classmethod
    def of(cls, **fields: Any) -> typing.Self:
        """An event by the names of its fields, wherever records have them; its time as `occurred_at` by default has it.

        Raises:
            pydantic.ValidationError: if the contract refuses it.
        """
        return cls.model_validate(fields, by_alias=False, by_name=True)

    @classmethod
    def topics(cls) -> tuple[str, ...]:
        """All its topics."""
        return cls.declared_source.topics or (cls.topic,)

    @classmethod
    def leaves(cls) -> dict[str, Leaf]:
        """Its fields as features have them, in order of declaration: of a model in it each by its path.

        Raises:
            TypeError: if a field has a type that features can't use.
        """
        return dict(_leaves(cls, cls.__name__, (), required=True))

    @classmethod
    def kinds(cls) -> dict[str, Kind]:
        """Field name to kind, in order of declaration.

        Raises:
            TypeError: if a field has a type that features can't use.
        """
        return {name: leaf.kind for name, leaf in cls.leaves().items()}


def _leaves(
    model: type[BaseModel], where: str, above: tuple[str, ...], *, required: bool
) -> Iterator[tuple[str, Leaf]]:
    for name, info in model.model_fields.items():
        place, attributes = f"{where}.{name}", (*above, name)
        plain, optional = without_none(info.annotation)
        needed = required and info.is_required() and not optional
        if isinstance(plain, type) and issubclass(plain, BaseModel) and not issubclass(plain, Event):
            if len(attributes) > _NESTING_MAX:
                msg = f"{place}: models are nested more than {_NESTING_MAX} deep; declare only what features use"
                raise TypeError(msg)
            yield from _leaves(plain, place, attributes, required=needed)
        else:
            yield ".".join(attributes), Leaf(_kind(place, plain), plain, attributes, needed)


def without_none(annotation: Any) -> tuple[Any, bool]:
    """A type without `| None` and pydantic's constraints, and whether it had the former."""
    optional = False
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        inner = [member for member in typing.get_args(annotation) if member is not type(None)]
        optional = len(inner) < len(typing.get_args(annotation))
        annotation = inner[0] if len(inner) == 1 else annotation
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation, optional


def _kind(where: str, annotation: Any) -> Kind:
    values: Sequence[Any] = ()
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        values = [each.value for each in annotation]
    elif typing.get_origin(annotation) is Literal:
        values = typing.get_args(annotation)
    for kind in (str, int):
        if values and all(type(value) is kind for value in values):
            return _KINDS[kind]
    try:
        return _KINDS[annotation]
    except (KeyError, TypeError):
        pass
    origin = typing.get_origin(annotation) or annotation
    right = (
        "use str, int, float or bool, optional with `| None = None`; or an Enum, datetime, date, UUID, Decimal, "
        "list[str] or a model of such fields"
    )
    if origin in (list, tuple, set, frozenset):
        right = "of lists only list[str] has a use, in by=; declare the element that features need: AliasPath(…, 0, …)"
    elif origin is dict:
        right = 'declare each value that features need as a field: Field(validation_alias=AliasPath("name", "key"))'
    elif values:
        right = "the values of an Enum or a Literal must be all texts or all whole numbers"
    msg = f"{where}: type {annotation} can't be used by features; {right}"
    raise TypeError(msg)


def milliseconds_of(moment: datetime | date) -> int:
    """Epoch milliseconds of a time, or of a day's beginning; without a zone it is UTC."""
    if not isinstance(moment, datetime):
        moment = datetime(moment.year, moment.month, moment.day, tzinfo=UTC)
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // timedelta(milliseconds=1)


def plainly(value: Any) -> Any:
    """A field's value as features have it: a text, a number, a bool, a list of texts or None."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, UUID):
        return str(value)
    if isinstance(value, Decimal):
        return float(value)
    return milliseconds_of(value) if isinstance(value, date) else value


def column_of(kind: Kind, values: Sequence[Any]) -> Any:
    """Values of a field as `features.rows.Events` has them."""
    if kind == "str":
        return pa.array(values, pa.string())
    return pa.array(values, pa.list_(pa.string())) if kind == "list[str]" else np.array(values, np.float64)


def value_of(event: Any, attributes: Sequence[str]) -> Any:
    """A field of an event, as features have it; of a model that is not there None."""
    for name in attributes:
        event = None if event is None else getattr(event, name)
    return plainly(event)
