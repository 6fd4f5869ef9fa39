"""Records of other people's topics, opened: what is around their fields is taken away, and looked at. Pure: no I/O."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Final

import msgspec
from msgspec import UNSET, Raw

from features.events import NEWEST_MS, OLDEST_MS, TEXT_LENGTH_MAX, epoch_ms, milliseconds_of
from features.source import Identity, Path, Place, Source, Time, Unit

Headers = Sequence[tuple[str, bytes | None]]
Schemas = Callable[[str, bytes], Any]
"""The object in a record of a format, `avro` or `protobuf`.

Raises:
    ValueError: if there is none in it; the message says why.
"""

_MAGIC: Final = b"\0"
_WIRE_BYTES: Final = 5
_NO_JSON: Final = (msgspec.MsgspecError, RecursionError, ValueError)
_OF_ENVELOPE: Final[Mapping[str, tuple[Time, Identity]]] = {
    "cloudevents": (Time(Place(("time",))), Identity((Place(("source",)), Place(("id",))))),
    # Of Debezium's, the opener makes the identity.
    "debezium": (Time(Place(("source", "ts_ms"))), Identity()),
}
_SCALES: Final[dict[Unit, float]] = {"s": 1000, "ms": 1, "us": 0.001}


@dataclass
class Opened:
    """Records without what is around them.

    Attributes:
        bodies: what the fields are in: JSON, or an object; None if there is nothing.
        roots: what places are in, likewise, where that is more.
        headers: of each record.
        attributes: of CloudEvents.
        digests: of Debezium's changes, an id.
        unreadable: why a record can't be opened, by its place.
    """

    bodies: list[Any]
    roots: list[Any]
    headers: Sequence[Headers]
    attributes: list[Mapping[str, Any]] | None = None
    digests: list[str] | None = None
    unreadable: dict[int, str] = field(default_factory=dict)

    def look(self, places: Iterable[Place]) -> dict[Place, list[Any]]:
        """What is at some places of each record; UNSET where there is nothing."""
        places = tuple(dict.fromkeys(places))
        found: dict[Place, list[Any]] = {}
        in_roots = []
        for place in places:
            if place.header:
                found[place] = [_header(each, place.header) for each in self.headers]
            elif self.attributes is not None and place.path[0] != "data":
                found[place] = [_at(each, place.path) for each in self.attributes]
            else:
                in_roots.append(place)
        if in_roots:
            # CloudEvents' data is what `data` means.
            paths = [place.path if self.attributes is None else place.path[1:] for place in in_roots]
            look, rows = looker(tuple(paths)), []
            for at, root in enumerate(self.roots):
                try:
                    rows.append(look(root))
                except _NO_JSON as error:
                    rows.append((UNSET,) * len(paths))
                    self.unreadable.setdefault(at, f"it can't be read: {error}")
            found |= (
                zip(in_roots, map(list, zip(*rows, strict=True)), strict=True)
                if rows
                else ((place, []) for place in in_roots)
            )
        return found


def opened(source: Source, values: Sequence[bytes | None], headers: Sequence[Headers], schemas: Schemas) -> Opened:
    """Records of a topic, as a contract says that they are written there.

    Raises:
        OSError: if a schema is to be asked for, and who knows it is away.
    """
    unreadable: dict[int, str] = {}
    bodies: list[Any] = list(values)
    if source.envelope == "cloudevents":
        return _cloud_events(values, headers, is_framed=source.format == "json_schema")
    if source.format != "json":
        read = _reader(source, schemas)
        for at, value in enumerate(values):
            if value is not None:
                try:
                    bodies[at] = read(value)
                except ValueError as error:
                    bodies[at], unreadable[at] = None, str(error)
    whole = Opened(bodies, bodies, headers, unreadable=unreadable)
    return _changes(whole) if source.envelope == "debezium" else whole


def _reader(source: Source, schemas: Schemas) -> Callable[[bytes], Any]:
    if source.format == "json_schema":
        return _unframed
    if source.format == "plain_avro":
        return lambda value: schemas(source.schema, value)
    return lambda value: schemas(source.format, value)


def _unframed(value: bytes) -> bytes:
    if value[:1] != _MAGIC or len(value) < _WIRE_BYTES:
        msg = (
            f"it begins with {value[:_WIRE_BYTES].hex(' ') or 'nothing'}, not with a schema's id as serialisers of a "
            'schema registry write it (00 and four bytes); if it is plain JSON, leave out format="json_schema"'
        )
        raise ValueError(msg)
    return value[_WIRE_BYTES:]


def _cloud_events(values: Sequence[bytes | None], headers: Sequence[Headers], *, is_framed: bool) -> Opened:
    """Structured, where a record is all of it, or binary, where attributes are headers."""
    bodies: list[Any] = []
    attributes: list[Mapping[str, Any]] = []
    unreadable: dict[int, str] = {}
    for at, (value, own) in enumerate(zip(values, headers, strict=True)):
        said = {
            name.lower()[3:]: text.decode(errors="replace")
            for name, text in own
            if text is not None and name.lower().startswith("ce_")
        }
        body: Any = value
        try:
            if value is not None and "specversion" not in said:
                said, body = _structured(value)
            elif value is not None and is_framed:
                body = _unframed(value)
        except _NO_JSON as error:
            said, body, unreadable[at] = {}, None, f"no CloudEvent: {error}"
        bodies.append(body)
        attributes.append(said)
    return Opened(bodies, bodies, headers, attributes, unreadable=unreadable)


def _structured(value: bytes) -> tuple[dict[str, Any], bytes]:
    whole = _RAW_OBJECT.decode(value)
    data, encoded = whole.pop("data", None), whole.pop("data_base64", None)
    if encoded is not None:
        body = base64.b64decode(msgspec.json.decode(encoded, type=str), validate=True)
    else:
        body = b"{}" if data is None else bytes(data)
    if "specversion" not in whole:
        msg = "it has no specversion, neither as a header ce_specversion nor in its JSON"
        raise ValueError(msg)
    return {name: msgspec.json.decode(raw) for name, raw in whole.items()}, body


class _Change(msgspec.Struct, gc=False):
    """Debezium's, in JSON; with `schemas.enable` it is the payload of one more object."""

    op: str = ""
    source: Raw = Raw(b"null")
    before: Raw = Raw(b"null")
    after: Raw = Raw(b"null")
    payload: Raw | msgspec.UnsetType = UNSET


_RAW_OBJECT: Final = msgspec.json.Decoder(dict[str, Raw])
_CHANGE: Final = msgspec.json.Decoder(_Change)


def _changes(whole: Opened) -> Opened:
    """The rows of Debezium's changes: as they are after it, or of what is deleted as they were."""
    bodies: list[Any] = []
    roots: list[Any] = []
    digests: list[Any] = []
    for at, value in enumerate(whole.roots):
        found: tuple[Any, Any, str] = None, None, ""
        if value is not None:
            try:
                found = (_json_change if isinstance(value, bytes) else _object_change)(value)
            except _NO_JSON as error:
                whole.unreadable[at] = f"no change of Debezium's: {error}"
        for column, each in zip((roots, bodies, digests), found, strict=True):
            column.append(each)
    return Opened(bodies, roots, whole.headers, None, digests, whole.unreadable)


def _json_change(value: bytes) -> tuple[bytes, bytes | None, str]:
    change = _CHANGE.decode(value)
    if change.payload is not UNSET:
        value = bytes(change.payload)
        change = _CHANGE.decode(value)
    before, after = bytes(change.before), bytes(change.after)
    parts = (change.op.encode(), bytes(change.source), before, after)
    row = before if after == b"null" else after
    return value, None if row == b"null" else row, _digest(parts)


def _object_change(value: Any) -> tuple[Any, Any, str]:
    if not isinstance(value, dict):
        msg = f"it holds {value!r:.40}, not an object"
        raise ValueError(msg)  # noqa: TRY004  # the record's mistake, not a caller's
    parts = [value.get(name) for name in ("op", "source", "before", "after")]
    row = parts[2] if parts[3] is None else parts[3]
    return value, row, _digest([json.dumps(part, default=repr).encode() for part in parts])


def _digest(parts: Sequence[bytes]) -> str:
    whole = hashlib.blake2b(digest_size=16)
    for part in parts:
        whole.update(b"%d:" % len(part))
        whole.update(part)
    return whole.hexdigest()


# --- looking


def looker(paths: tuple[Path, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """A function that gives what is at some paths of a record, in JSON or as an object; UNSET where there is nothing.

    What raises msgspec.MsgspecError or RecursionError is no JSON.
    """
    made = _LOOKERS.get(paths)
    if made is None:
        made = _LOOKERS[paths] = _made_looker(paths)
    return made


_LOOKERS: Final[dict[tuple[Path, ...], Callable[[Any], tuple[Any, ...]]]] = {}


def _made_looker(paths: tuple[Path, ...]) -> Callable[[Any], tuple[Any, ...]]:
    decode: Callable[[bytes], Any] | None = None
    attributes: dict[Path, tuple[str, ...]] = {}
    if _are_names(paths):
        struct, attributes = _struct(paths, "Looked")
        decode = msgspec.json.Decoder(struct).decode

    def look(root: Any) -> tuple[Any, ...]:
        if root is None:
            return (UNSET,) * len(paths)
        if not isinstance(root, bytes):
            return tuple(_at(root, path) for path in paths)
        if decode is not None:
            try:
                found = decode(root)
            except msgspec.ValidationError:
                pass  # Another kind of record has something else there.
            else:
                return tuple(_along(found, attributes[path]) for path in paths)
        whole = msgspec.json.decode(root)
        return tuple(_at(whole, path) for path in paths)

    return look


def _are_names(paths: tuple[Path, ...]) -> bool:
    """Whether they are no places in lists, and none is on the way to another."""
    return all(path and isinstance(step, str) for path in paths for step in path) and not any(
        path != other and path == other[: len(path)] for path in paths for other in paths
    )


def _struct(paths: tuple[Path, ...], name: str) -> tuple[Any, dict[Path, tuple[str, ...]]]:
    """A struct with what is at some paths, and by which attributes each is found."""
    fields: list[Any] = []
    attributes: dict[Path, tuple[str, ...]] = {}
    steps = dict.fromkeys(path[0] for path in paths)
    for number, step in enumerate(steps):
        own = f"f{number}"
        if below := tuple(path[1:] for path in paths if path[0] == step and len(path) > 1):
            struct, found = _struct(below, f"{name}.{step}")
            fields.append((own, struct | None, None))
            attributes |= {(step, *path): (own, *each) for path, each in found.items()}
        else:
            fields.append((own, Any, UNSET))
            attributes[step,] = (own,)
    rename = {f"f{number}": str(step) for number, step in enumerate(steps)}
    return msgspec.defstruct(name, fields, gc=False, rename=rename), attributes


def _along(struct: Any, attributes: tuple[str, ...]) -> Any:
    for attribute in attributes[:-1]:
        struct = getattr(struct, attribute)
        if struct is None:
            return UNSET
    return getattr(struct, attributes[-1])


def _at(value: Any, path: Path) -> Any:
    for step in path:
        if isinstance(value, Mapping):
            value = value.get(step, UNSET)
        elif isinstance(value, list) and isinstance(step, int) and -len(value) <= step < len(value):
            value = value[step]
        else:
            return UNSET
    return value


def _header(headers: Headers, name: str) -> Any:
    for other, value in reversed(headers or ()):
        if other == name:
            return UNSET if value is None else value.decode(errors="replace")
    return UNSET


# --- times and identities


def time_of(source: Source) -> Time | None:
    """Where a contract's times are, if that is no field."""
    return source.occurred_at or (_OF_ENVELOPE[source.envelope][0] if source.envelope else None)


def identity_of(source: Source) -> Identity | None:
    """Where its events' identity is, likewise; None also if the opener makes it."""
    if source.event_id is not None or source.envelope != "cloudevents":
        return source.event_id
    return _OF_ENVELOPE["cloudevents"][1]


def places_of(source: Source) -> tuple[Place, ...]:
    """All places that are looked at in a contract's records."""
    time, identity = time_of(source), identity_of(source)
    more = [time.at] if time is not None and time.at is not None else []
    return tuple(dict.fromkeys([*source.places, *more, *(identity.at if identity is not None else ())]))


def times_ms(values: Sequence[Any], time: Time, otherwise_ms: Sequence[int] | None) -> tuple[list[int], dict[int, str]]:
    """Milliseconds of what is found where times are, and why there are none, by place.

    Args:
        values: what is found; UNSET for nothing.
        time: where, and what numbers count there.
        otherwise_ms: the times where nothing is found; without it that is refused.
    """
    found: list[int] = []
    refused: dict[int, str] = {}
    for at, value in enumerate(values):
        made = OLDEST_MS
        if value is UNSET and otherwise_ms is not None:
            made = otherwise_ms[at]
        else:
            try:
                made = _milliseconds(value, time.unit)
            except (ValueError, OverflowError) as error:
                refused[at] = f"occurred_at ({time.at}): {error}; got {_shown(value)}"
            else:
                if not OLDEST_MS <= made <= NEWEST_MS:
                    refused[at] = (
                        f"occurred_at ({time.at}): {_shown(value)} is not between the years 2000 and 2100 if it counts "
                        f"{time.unit}: say source.seconds, source.milliseconds or source.microseconds"
                    )
                    made = OLDEST_MS
        found.append(made)
    return found, refused


def _milliseconds(value: Any, unit: Unit) -> int:
    if value is UNSET or value is None:
        msg = "there is no time"
        raise ValueError(msg)
    if isinstance(value, date):
        return milliseconds_of(value)
    if isinstance(value, str):
        # A header's number is a text.
        try:
            value = int(value)
        except ValueError:
            return int(str(epoch_ms(value)))
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        msg = "no time is written so"
        raise ValueError(msg)
    if isinstance(value, int):
        return value * 1000 if unit == "s" else value // 1000 if unit == "us" else value
    return int(value * _SCALES[unit] // 1)


def ids_of(columns: Sequence[Sequence[Any]], identity: Identity) -> tuple[list[str], dict[int, str]]:
    """The event_ids that are made of what is found in places, and why there are none."""
    found: list[str] = []
    refused: dict[int, str] = {}
    for at, values in enumerate(zip(*columns, strict=True)):
        made = "?"
        for value, place in zip(values, identity.at, strict=True):
            if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
                refused[at] = f"event_id ({place}): it must be a text or a whole number; got {_shown(value)}"
                break
        else:
            made = str(values[0]) if len(values) == 1 else json.dumps(values, ensure_ascii=False, separators=(",", ":"))
            if len(made) > TEXT_LENGTH_MAX or "\0" in made or not _is_unicode(made):
                refused[at], made = f"event_id ({identity}): longer than 256 characters, or no text: {made!r:.80}", "?"
        found.append(made)
    return found, refused


def _is_unicode(text: str) -> bool:
    try:
        return bool(text.encode())
    except UnicodeEncodeError:
        return False


def _shown(value: Any) -> str:
    return "nothing" if value is UNSET else repr(value)[:80]
