"""Where a contract's events are found in the records of topics that others write, and how they are written there.

Keywords of a contract's class: `class Click(Event, topic="interactions", when={"type": "click"})`. A *place* in a
record is a path of names (`"payload.type"`), pydantic's `AliasPath` where a name has a dot, or a `header`. In an
envelope places are the envelope's (`"op"`, `"source.table"`, CloudEvents' `"type"`), and fields are those of what is
in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec
from msgspec.structs import replace
from pydantic import AliasChoices, AliasPath

__all__ = ["Place", "Source", "avro", "header", "microseconds", "milliseconds", "position", "record_time", "seconds"]

Path = tuple[str | int, ...]
Unit = Literal["s", "ms", "us"]
Format = Literal["json", "json_schema", "avro", "protobuf", "plain_avro"]
Envelope = Literal["", "cloudevents", "debezium"]
_FORMATS: Final = ("json", "json_schema", "avro", "protobuf")
_ENVELOPES: Final = ("cloudevents", "debezium")
KEYWORDS: Final = ("when", "occurred_at", "event_id", "format", "envelope")
"""Of a contract's class."""
WRITES: Final = ("c", "u")
"""Debezium's operations that are events unless a contract says so itself: an insert, an update."""


class Place(msgspec.Struct, frozen=True, omit_defaults=True):
    """A path in the record, or the name of a header."""

    path: Path = ()
    header: str = ""

    def __str__(self) -> str:
        return f"header {self.header}" if self.header else shown(self.path)


class Condition(msgspec.Struct, frozen=True):
    """What a contract's records have in a place: one of these values."""

    at: Place
    values: tuple[str | int | bool, ...]

    def __str__(self) -> str:
        return f"{self.at} is {' or '.join(json.dumps(value) for value in self.values)}"


class Time(msgspec.Struct, frozen=True, omit_defaults=True):
    """When an event happened: what numbers count there (texts are RFC 3339); no place stands for the record's time."""

    at: Place | None = None
    unit: Unit = "ms"

    def __str__(self) -> str:
        return "the record's time" if self.at is None else f"{self.at}, numbers in {self.unit}"


class Identity(msgspec.Struct, frozen=True, omit_defaults=True):
    """What tells an event from others: one place or several together; none stands for where the record is in Kafka."""

    at: tuple[Place, ...] = ()

    def __str__(self) -> str:
        return " and ".join(map(str, self.at)) or "topic, partition and offset"


class Source(msgspec.Struct, frozen=True, omit_defaults=True):
    """All that a contract says of its records besides its fields, as plain data.

    Attributes:
        topics: all of them, if there are several.
        when: which of their records are its.
        paths: by field, where it is looked for, if not under its own name; the first that is there counts.
        occurred_at: by default the field of this name.
        event_id: likewise; in an envelope, what it has for both.
        format: how records are written; all but `json` and `plain_avro` begin as a schema registry's do.
        schema: of `plain_avro`.
        envelope: what is around the fields.
    """

    topics: tuple[str, ...] = ()
    when: tuple[Condition, ...] = ()
    paths: dict[str, tuple[Path, ...]] = {}
    occurred_at: Time | None = None
    event_id: Identity | None = None
    format: Format = "json"
    schema: str = ""
    envelope: Envelope = ""

    @property
    def identity_is_given(self) -> bool:
        """Whether an event's identity is no field of its contract's."""
        return self.event_id is not None or bool(self.envelope)

    @property
    def time_is_given(self) -> bool:
        """Whether an event's time is none."""
        return self.occurred_at is not None or bool(self.envelope)

    @property
    def is_plain(self) -> bool:
        """Whether a record is JSON of one contract's, with time and identity among its fields."""
        return self.format == "json" and not (self.when or self.identity_is_given or self.time_is_given)

    @property
    def needs_headers(self) -> bool:
        """Whether records' headers are looked at."""
        return self.envelope == "cloudevents" or any(each.header for each in self.places)

    @property
    def places(self) -> tuple[Place, ...]:
        """All that has to be looked at in a record before its fields."""
        found = [each.at for each in self.when]
        if self.occurred_at is not None and self.occurred_at.at is not None:
            found.append(self.occurred_at.at)
        if self.event_id is not None:
            found += self.event_id.at
        return tuple(dict.fromkeys(found))

    def excludes(self, other: Source) -> bool:
        """Whether no record can be both's."""
        mine, others = ({each.at: each.values for each in source.when} for source in (self, other))
        return any(_keys(values).isdisjoint(_keys(others[at])) for at, values in mine.items() if at in others)


class AvroSchema(msgspec.Struct, frozen=True):
    """The schema that all records of a topic are written with, without saying so."""

    text: str


def header(name: str) -> Place:
    """A record's header: of several by this name the last."""
    if not name or not isinstance(name, str):
        msg = f"header({name!r}): name one, such as header('event-type')"
        raise TypeError(msg)
    return Place(header=name)


def seconds(at: str | AliasPath | Place) -> Time:
    """A time in whole or fractional seconds since 1970, or RFC 3339."""
    return Time(place(at), "s")


def milliseconds(at: str | AliasPath | Place) -> Time:
    """A time in milliseconds since 1970, or RFC 3339."""
    return Time(place(at), "ms")


def microseconds(at: str | AliasPath | Place) -> Time:
    """A time in microseconds since 1970, or RFC 3339."""
    return Time(place(at), "us")


record_time: Final = Time()
"""The record's own timestamp: the broker's, or on a topic with CreateTime the producer's."""
position: Final = Identity()
"""Topic, partition and offset: what a producer sends twice then counts twice."""


def avro(schema: str | Mapping[str, Any]) -> AvroSchema:
    """Avro without a registry: each record is a datum of this schema, with nothing before it."""
    return AvroSchema(schema if isinstance(schema, str) else json.dumps(schema, sort_keys=True))


def declared(inherited: Source, said: Mapping[str, Any]) -> Source:
    """What a class says with its keywords, beside what the one above it said.

    Raises:
        TypeError: if a keyword has a value that it can't have.
    """
    found = inherited
    if "envelope" in said:
        found = replace(found, envelope=envelope_of(said["envelope"]))
    if "when" in said or (found.envelope == "debezium" and not found.when):
        found = replace(found, when=conditions(said.get("when", {}), found.envelope))
    if "occurred_at" in said:
        found = replace(found, occurred_at=time(said["occurred_at"]))
    if "event_id" in said:
        found = replace(found, event_id=identity(said["event_id"]))
    if "format" in said:
        format_, schema = format_of(said["format"])
        found = replace(found, format=format_, schema=schema)
    if found.envelope == "cloudevents" and found.format not in ("json", "json_schema"):
        msg = f'envelope="cloudevents" is read of JSON, not of {found.format}'
        raise TypeError(msg)
    return found


def place(at: str | AliasPath | Place) -> Place:
    """A place as it may be written.

    >>> place("payload.type"), place(header("ce_type"))
    (Place(path=('payload', 'type'), header=''), Place(path=(), header='ce_type'))
    """
    if isinstance(at, Place):
        return at
    if isinstance(at, AliasPath):
        return Place(tuple(at.path))
    steps: Any = at.split(".") if hasattr(at, "split") else []
    if steps and all(steps):
        return Place(tuple(steps))
    msg = f"{at!r} is no place in a record: write a path such as 'payload.type', an AliasPath, or source.header('type')"
    raise TypeError(msg)


def time(at: Time | str | AliasPath | Place) -> Time:
    """A time as it may be written: a place alone has milliseconds or RFC 3339."""
    return at if isinstance(at, Time) else Time(place(at))


def identity(at: Identity | str | AliasPath | Place | tuple[str | AliasPath | Place, ...] | list[Any]) -> Identity:
    """An identity as it may be written: one place, or several."""
    if isinstance(at, Identity):
        return at
    return Identity(tuple(map(place, at)) if isinstance(at, tuple | list) else (place(at),))


def conditions(when: Mapping[Any, Any], envelope: str) -> tuple[Condition, ...]:
    """Which records are meant, as it may be written: a value for each place, or several in a list."""
    found = []
    for at, value in when.items():
        values = tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)
        if not values or not all(isinstance(each, str | int) for each in values):
            msg = f"when={{{at!r}: {value!r}}}: compare with a text, a whole number or a bool, or several in a list"
            raise TypeError(msg)
        if place(at).header:
            values = tuple(str(each).lower() if isinstance(each, bool) else str(each) for each in values)
        found.append(Condition(place(at), tuple(sorted(values, key=str))))
    operation = Place(("op",))
    if envelope == "debezium" and not any(each.at == operation for each in found):
        found.append(Condition(operation, WRITES))
    return tuple(sorted(found, key=lambda each: str(each.at)))


def format_of(written: str | AvroSchema) -> tuple[Format, str]:
    """A format as it may be written, and its schema."""
    if isinstance(written, AvroSchema):
        return "plain_avro", written.text
    if written not in _FORMATS:
        msg = f"format={written!r}: use one of {', '.join(map(repr, _FORMATS))}, or source.avro(schema)"
        raise TypeError(msg)
    return written, ""  # type: ignore[return-value]  # one of them: see above


def envelope_of(written: str) -> Envelope:
    """An envelope as it may be written."""
    if written and written not in _ENVELOPES:
        msg = f"envelope={written!r}: use one of {', '.join(map(repr, _ENVELOPES))}, or none"
        raise TypeError(msg)
    return written  # type: ignore[return-value]  # one of them: see above


def paths_of(name: str, alias: str | AliasPath | AliasChoices | None) -> tuple[Path, ...]:
    """Where pydantic looks for a field."""
    if isinstance(alias, AliasChoices):
        return tuple(path for each in alias.choices for path in paths_of(name, each))
    if isinstance(alias, AliasPath):
        return (tuple(alias.path),)
    return ((name if alias is None else alias,),)


def shown(path: Path) -> str:
    """A path as people write it."""
    return ".".join(map(str, path))


def _keys(values: tuple[str | int | bool, ...]) -> set[tuple[type, str | int | bool]]:
    """True is no 1 here."""
    return {(type(value), value) for value in values}
