"""`headrace contract`: contracts drafted from schemas and from what is in topics, and held to registered schemas.

A schema, in whatever language, and a sample of records are both read as *parts*: what there is at each path. From parts
follow a class's fields, and what of a class a schema does not give.
"""

from __future__ import annotations

import json
import keyword
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from pathlib import Path as File
from typing import Any, Final, Literal, get_args, get_origin
from uuid import UUID

from features.events import Event, Leaf
from features.source import Path, shown

IDS: Final = ("event_id", "eventid", "id", "uuid", "message_id", "messageid")
TIMES: Final = (
    "occurred_at",
    "event_time",
    "eventtime",
    "timestamp",
    "ts",
    "time",
    "at",
    "created_at",
    "createdat",
    "ts_ms",
)
KINDS: Final = ("type", "event_type", "eventtype", "event", "kind", "action", "event_name", "name")
CLASSES_MAX: Final = 8
_EXAMPLES: Final = 3
_DEPTH_MAX: Final = 6
_ENUM_MAX: Final = 12
_DATETIME: Final = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?")
_DATE: Final = re.compile(r"\d{4}-\d\d-\d\d")
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_TAKES: Final[dict[Any, tuple[str, ...]]] = {
    str: ("str", "UUID", "datetime", "date"),
    int: ("int",),
    float: ("int", "float", "Decimal"),
    bool: ("bool",),
    Decimal: ("int", "float", "Decimal", "str"),
    datetime: ("datetime", "str"),
    date: ("date", "str"),
    UUID: ("UUID", "str"),
    list[str]: ("list[str]",),
}


class ContractError(ValueError):
    """A schema, a topic or a contract that nothing can be said of: the message says why."""


@dataclass
class Part:
    """What is at a path.

    Attributes:
        path: where.
        type: as a contract would have it; empty if features have no use for it.
        null: whether it may be null, or not there.
        values: of an enumeration.
        note: what else is known.
    """

    path: Path
    type: str
    null: bool = False
    values: tuple[str, ...] = ()
    note: str = ""


# --- schemas


def parts_of_avro(schema: Any) -> list[Part]:
    """The parts of an Avro record.

    Raises:
        ContractError: if it is none.
    """
    named: dict[str, Any] = {}
    if not isinstance(schema, dict) or schema.get("type") != "record":
        msg = "the Avro schema is no record; contracts are of records"
        raise ContractError(msg)
    return list(_avro(schema, (), named, null=False))


_AVRO: Final = {
    "string": "str",
    "int": "int",
    "long": "int",
    "float": "float",
    "double": "float",
    "boolean": "bool",
    "uuid": "UUID",
    "date": "date",
    "decimal": "Decimal",
}


def _avro(schema: Any, path: Path, named: dict[str, Any], *, null: bool) -> Iterator[Part]:
    if isinstance(schema, list):
        kinds = [each for each in schema if each != "null"]
        null = null or len(kinds) < len(schema)
        if len(kinds) > 1:
            yield Part(path, "", null, note="one of several types")
        else:
            yield from _avro(kinds[0] if kinds else "null", path, named, null=null)
    elif isinstance(schema, dict):
        yield from _avro_object(schema, path, named, null=null)
    elif schema in named and len(path) < _DEPTH_MAX:
        yield from _avro(named[schema], path, named, null=null)
    else:
        yield Part(path, _AVRO.get(schema, ""), null)


def _avro_object(schema: dict[str, Any], path: Path, named: dict[str, Any], *, null: bool) -> Iterator[Part]:
    kind, logical = schema.get("type"), schema.get("logicalType", "")
    if "name" in schema:
        named[schema["name"]] = named[f"{schema.get('namespace', '')}.{schema['name']}"] = schema
    if kind == "record":
        for each in schema["fields"]:
            yield from _avro(each["type"], (*path, each["name"]), named, null=null)
    elif kind == "enum":
        yield Part(path, "str", null, tuple(schema["symbols"]))
    elif kind == "array":
        yield Part(path, "list[str]" if schema.get("items") == "string" else "", null, note="a list")
    elif "timestamp" in logical:
        yield Part(path, "datetime", null)
    elif logical in _AVRO:
        yield Part(path, _AVRO[logical], null)
    elif isinstance(kind, dict | list) or kind in _AVRO:
        yield from _avro(kind, path, named, null=null)
    else:
        yield Part(path, "", null, note=str(kind))


def parts_of_json(schema: Any) -> list[Part]:
    """The parts of a JSON Schema of objects.

    Raises:
        ContractError: if it is none.
    """
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        msg = "the JSON Schema has no properties; contracts are of objects"
        raise ContractError(msg)
    return list(_json(schema, (), schema, null=False))


_JSON: Final = {"string": "str", "integer": "int", "number": "float", "boolean": "bool"}
_FORMATS: Final = {"date-time": "datetime", "date": "date", "uuid": "UUID"}


def _json(schema: Any, path: Path, root: Mapping[str, Any], *, null: bool) -> Iterator[Part]:
    schema = schema if isinstance(schema, dict) else {}
    if str(schema.get("$ref", "")).startswith("#/"):
        found: Any = root
        for step in schema["$ref"][2:].split("/"):
            found = found.get(step, {})
        schema = found
    if len(path) > _DEPTH_MAX:
        return
    for several in ("anyOf", "oneOf"):
        if several in schema:
            rest = [each for each in schema[several] if each != {"type": "null"}]
            null = null or len(rest) < len(schema[several])
            schema = rest[0] if len(rest) == 1 else {}
            yield from _json(schema, path, root, null=null)
            return
    kinds: Any = schema.get("type", "object" if "properties" in schema else "")
    if isinstance(kinds, list):
        null = null or "null" in kinds
        rest = [each for each in kinds if each != "null"]
        kinds = rest[0] if len(rest) == 1 else ""
    if kinds == "object":
        for name, each in schema.get("properties", {}).items():
            yield from _json(each, (*path, name), root, null=null or name not in schema.get("required", ()))
    elif "enum" in schema and all(isinstance(each, str) for each in schema["enum"]):
        yield Part(path, "str", null, tuple(schema["enum"]))
    elif kinds == "array":
        of_texts = schema.get("items", {}).get("type") == "string"
        yield Part(path, "list[str]" if of_texts else "", null, note="a list")
    else:
        yield Part(path, _FORMATS.get(schema.get("format", ""), _JSON.get(str(kinds), "")), null)


def parts_of_protobuf(file: Any, message: str = "") -> list[Part]:
    """The parts of a message of a Protobuf file (a FileDescriptorProto), by default its first.

    Raises:
        ContractError: if there is none.
    """
    names = [each.name for each in file.message_type]
    if not names or (message and message not in names):
        msg = f"{file.name} has no message {message or 'at all'}; there is: {', '.join(names) or 'none'}"
        raise ContractError(msg)
    chosen = file.message_type[names.index(message) if message else 0]
    types = dict(_messages(file, f".{file.package}" if file.package else ""))
    return list(_proto(chosen, (), types, null=False))


def _messages(of: Any, scope: str) -> Iterator[tuple[str, Any]]:
    for each in of.message_type if hasattr(of, "message_type") else of.nested_type:
        yield f"{scope}.{each.name}", each
        yield from _messages(each, f"{scope}.{each.name}")
    for each in of.enum_type:
        yield f"{scope}.{each.name}", each


def _proto(message: Any, path: Path, types: Mapping[str, Any], *, null: bool) -> Iterator[Part]:
    for each in message.field:
        kind, where = each.Type.Name(each.type), (*path, each.name)
        found = types.get(each.type_name)
        # A text that is not set is no text; of numbers that can't be told.
        may_lack = null or each.proto3_optional or each.HasField("oneof_index") or kind == "TYPE_STRING"
        if each.label == each.LABEL_REPEATED:
            yield Part(where, "list[str]" if kind == "TYPE_STRING" else "", null, note="a list")
        elif each.type_name == ".google.protobuf.Timestamp":
            yield Part(where, "datetime", null=True)
        elif kind == "TYPE_MESSAGE" and found is not None and len(where) < _DEPTH_MAX:
            yield from _proto(found, where, types, null=True)
        elif kind == "TYPE_ENUM" and found is not None:
            yield Part(where, "str", may_lack, tuple(value.name for value in found.value))
        elif kind in ("TYPE_STRING", "TYPE_BOOL", "TYPE_DOUBLE", "TYPE_FLOAT"):
            yield Part(where, {"TYPE_STRING": "str", "TYPE_BOOL": "bool"}.get(kind, "float"), may_lack)
        else:
            yield Part(where, "int" if "INT" in kind or "FIXED" in kind else "", may_lack)


# --- samples


@dataclass
class Seen:
    """What was found at a path of many records."""

    n: int = 0
    types: Counter[str] = field(default_factory=Counter)
    examples: dict[str, int] = field(default_factory=dict)

    def add(self, value: Any) -> None:
        """One more."""
        kind = type_of(value)
        self.types[kind] += 1
        if value is not None:
            self.n += 1
            if len(self.examples) < 1000:
                text = json.dumps(value, default=str, ensure_ascii=False)[:40]
                self.examples[text] = self.examples.get(text, 0) + 1


def type_of(value: Any) -> str:
    """The type that a contract would have for a value; empty if none."""
    match value:
        case None:
            return "None"
        case bool():
            return "bool"
        case int() | float() | Decimal() | datetime() | date() | UUID():
            return type(value).__name__
        case str():
            patterns = {"datetime": _DATETIME, "date": _DATE, "UUID": _UUID}
            return next((kind for kind, pattern in patterns.items() if pattern.fullmatch(value)), "str")
        case list() if all(isinstance(each, str) for each in value):
            return "list[str]"
    return ""


def look(records: Iterable[Any]) -> tuple[int, dict[Path, Seen]]:
    """How many records there are, and what is at each path of them."""
    found: dict[Path, Seen] = {}
    n = 0
    for record in records:
        n += 1
        for path, value in _flat(record, ()):
            found.setdefault(path, Seen()).add(value)
    return n, found


def _flat(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, dict) and len(path) < _DEPTH_MAX:
        for name, each in value.items():
            yield from _flat(each, (*path, name))
    elif path:
        yield path, value


def parts_of_records(records: Sequence[Any]) -> list[Part]:
    """The parts of records: of each path its type, the share of those that have it, and examples."""
    n, found = look(records)
    parts = []
    for path, seen in found.items():
        types = {kind for kind in seen.types if kind != "None"}
        if types in ({"int", "float"}, {"float", "Decimal"}, {"int", "Decimal"}):
            types = {"float"}
        if len(types) > 1 and types <= {"str", "datetime", "date", "UUID"}:
            types = {"str"}
        (kind,) = types if len(types) == 1 else ("",)
        share = seen.n / n
        examples = ", ".join(sorted(seen.examples, key=lambda text: -seen.examples[text])[:_EXAMPLES])
        several = f"several types: {', '.join(sorted(filter(None, types)))}; " if len(types) > 1 else ""
        note = f"{several}{'' if share == 1 else f'{share:.0%} have it; '}{examples}"
        parts.append(Part(path, kind, share < 1, note=note))
    return parts


def kinds_of(records: Sequence[Any]) -> tuple[Path, list[str]] | None:
    """The path whose few texts tell kinds of records apart, and these, the most frequent first."""
    n, found = look(records)
    for name in KINDS:
        for path, seen in sorted(found.items(), key=lambda each: len(each[0])):
            if str(path[-1]).lower() != name or len(path) > 2 or seen.n < n or set(seen.types) != {"str"}:
                continue
            if 1 < len(seen.examples) <= 20 and n >= 2 * len(seen.examples):
                every = sorted(seen.examples, key=lambda text: -seen.examples[text])
                return path, [json.loads(text) for text in every if text.endswith('"')][:CLASSES_MAX]
    return None


def unit_of(examples: Iterable[Any]) -> str | None:
    """What numbers that are times count: s, ms or us; None if they are no times."""
    numbers = [each for each in examples if isinstance(each, int | float) and not isinstance(each, bool)]
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        # A few are mistakes, which the contract is to refuse.
        if sum(946_684_800 <= each / scale <= 4_102_444_800 for each in numbers) > 0.8 * len(numbers):
            return unit
    return None


# --- classes


def draft(
    name: str,
    topic: str,
    parts: Sequence[Part],
    *,
    keywords: Mapping[str, str] | None = None,
    time_unit: str | None = None,
    root: Sequence[Part] | None = None,
) -> str:
    """A contract's class as Python.

    Args:
        name: of the class.
        topic: its topic.
        parts: what its records have.
        keywords: of the class, as Python.
        time_unit: what numbers count where the time is.
        root: where time and identity are looked for, if not among the parts.
    """
    said = {"topic": json.dumps(topic), **(keywords or {})}
    given = root if root is not None else parts
    taken: set[Path] = set()
    if "envelope" not in said:
        at, unit = _first(given, TIMES, ("int", "float", "datetime")), time_unit
        if at is None:
            said["occurred_at"] = "source.record_time"
        else:
            taken.add(at.path)
            where = json.dumps(shown(at.path))
            if at.type == "datetime" or unit == "ms":
                said["occurred_at"] = where
            else:
                named = {"s": "seconds", "us": "microseconds"}.get(unit or "", "milliseconds")
                said["occurred_at"] = f"source.{named}({where})"
            if said["occurred_at"] == '"occurred_at"':
                del said["occurred_at"]
        identity = _first(given, IDS, ("str", "int", "UUID"))
        if identity is not None and identity.path == ("event_id",) and identity.type == "str":
            taken.add(identity.path)
        else:
            said["event_id"] = "source.position" if identity is None else json.dumps(shown(identity.path))
            if identity is not None:
                taken.add(identity.path)
    lines = [f"class {name}(Event, {', '.join(f'{key}={value}' for key, value in said.items())}):"]
    lines += [f'    """{name}, as it is in {topic}."""', ""]
    lines += [line for part, own in _named(parts) if part.path not in taken for line in _field(part, own)]
    return "\n".join(lines) + "\n"


def class_name(text: str) -> str:
    """A name for a class: `page.view` is PageView."""
    words = re.findall(r"[A-Za-z0-9]+", text)
    name = "".join(word[0].upper() + word[1:] for word in words)
    return name if name.isidentifier() and not keyword.iskeyword(name) else f"Event{name}"


def header(text: str) -> str:
    """The imports that classes need."""
    pydantic = [word for word in ("AliasPath", "Field") if f"{word}(" in text]
    ours = [word for word in ("Event", "source") if re.search(rf"\b{word}\b[.,)]", text)]
    found = [f"from {home} import {word}" for word, home in (
        ("date, datetime", "datetime"), ("date", "datetime"), ("datetime", "datetime"), ("Decimal", "decimal"),
        ("Literal", "typing"), ("UUID", "uuid"),
    ) if all(re.search(rf": {each}\b", text) for each in word.split(", "))]  # fmt: skip
    if any("date, datetime" in line for line in found):
        found = [line for line in found if line not in ("from datetime import date", "from datetime import datetime")]
    blocks = [
        "\n".join(found),
        f"from pydantic import {', '.join(pydantic)}" if pydantic else "",
        f"from headrace import {', '.join(ours)}",
    ]
    return "\n\n".join(filter(None, blocks)) + "\n\n\n"


def _first(parts: Sequence[Part], names: Sequence[str], types: Sequence[str]) -> Part | None:
    for name in names:
        for part in sorted(parts, key=lambda each: len(each.path)):
            if str(part.path[-1]).lower() == name and len(part.path) <= 2 and part.type in types:
                return part
    return None


def _named(parts: Sequence[Part]) -> Iterator[tuple[Part, str]]:
    """Parts with names for fields: of the last names of their paths, as few as tell them apart."""
    taken = {"event_id", "occurred_at"}
    for part in parts:
        steps = [_snake(str(step)) for step in part.path]
        names = ["_".join(steps[-n:]) for n in range(1, len(steps) + 1)]
        # What is called `id` is somebody's.
        start = 1 if names[0] in ("id", "name", "type", "at") and len(names) > 1 else 0
        own = next((name for name in [*names[start:], *names] if name not in taken), f"{names[-1]}_{len(taken)}")
        if keyword.iskeyword(own) or not own.isidentifier() or hasattr(Event, own):
            own = f"field_{own}"
        taken.add(own)
        yield part, own


def _snake(name: str) -> str:
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"\W+", "_", spaced).strip("_").lower() or "field"


def _field(part: Part, name: str) -> Iterator[str]:
    if not part.type:
        yield f"    # {shown(part.path)}: no type that features use ({part.note or 'unknown'})"
        return
    kind = part.type
    if 0 < len(part.values) <= _ENUM_MAX:
        kind = f"Literal[{', '.join(map(json.dumps, part.values))}]"
    alias = ""
    if part.path != (name,):
        path = ", ".join(map(json.dumps, part.path))
        alias = f"validation_alias={path if len(part.path) == 1 else f'AliasPath({path})'}"
    default = "None" if part.null else ""
    value = f"Field({', '.join(filter(None, (default, alias)))})" if alias else default
    optional = " | None" if part.null else ""
    note = f"  # {part.note}" if part.note else ""
    yield f"    {name}: {kind}{optional}{f' = {value}' if value else ''}{note}"


# --- a class beside a schema


@dataclass
class Comparison:
    """A contract beside a schema.

    Attributes:
        wrong: what of the contract the schema does not give, so that records are refused.
        doubtful: what may be refused, or read as null.
        producer: what the producer's next change may and may not be.
        contract: what the contract's may be.
    """

    wrong: list[str]
    doubtful: list[str]
    producer: list[str]
    contract: list[str]


def compare(contract: type[Event], parts: Sequence[Part]) -> Comparison:
    """What a contract reads beside what a schema has."""
    by_path = {part.path: part for part in parts}
    source = contract.declared_source
    wrong: list[str] = []
    doubtful: list[str] = []
    needed: list[str] = []
    optional: list[str] = []
    below = ("after",) if source.envelope == "debezium" else ()
    used: set[Path] = set()
    for name, leaf in contract.leaves().items():
        if name in ("event_id", "occurred_at") and (source.identity_is_given or source.time_is_given):
            continue
        paths = [(*below, *path) for path in _paths(contract, leaf)]
        part = next((by_path[path] for path in paths if path in by_path), None)
        where = " or ".join(map(shown, paths))
        if part is None:
            (wrong if leaf.required else doubtful).append(
                f"{name}: the schema has no {where}" + ("" if leaf.required else ", so it is always null")
            )
            continue
        used.add(part.path)
        (needed if leaf.required else optional).append(shown(part.path))
        wrong += [f"{name}: {each}" for each in _mismatch(leaf, part)]
        if part.null and leaf.required:
            doubtful.append(f"{name}: {shown(part.path)} may be null in the schema, and then the record is refused")
    for place in source.places:
        if place.path and place.path not in by_path and not source.envelope:
            wrong.append(f"the schema has no {place}, by which records are told apart, or have their time or identity")
        elif place.path:
            needed.append(str(place))
            used.add(place.path)
    free = [
        shown(part.path) for part in parts if part.path not in used and part.type and part.path[: len(below)] == below
    ]
    may = "may add fields, and make what nobody reads anything"
    producer = [may, f"must keep, with its type and never null: {', '.join(dict.fromkeys(needed)) or 'nothing'}"]
    if optional:
        producer.append(f"may leave out, which then reads as null: {', '.join(optional)}")
    next_ = [f"may read too, once it is in all records or with `| None = None`: {', '.join(free) or 'nothing more'}"]
    next_.append("may drop any field that no feature reads; a field that becomes required refuses what lacks it")
    return Comparison(wrong, doubtful, producer, next_)


def _paths(contract: type[Event], leaf: Leaf) -> list[Path]:
    first, *rest = leaf.attributes
    paths = contract.declared_source.paths.get(first, ((first,),))
    return [(*path, *rest) for path in paths]


def _mismatch(leaf: Leaf, part: Part) -> Iterator[str]:
    kind: Any = leaf.type
    values: Sequence[Any] = ()
    if isinstance(kind, type) and issubclass(kind, Enum):
        values = [each.value for each in kind]
    elif get_origin(kind) is Literal:
        values = get_args(kind)
    if values:
        more = [value for value in part.values if value not in values]
        if more:
            yield f"{shown(part.path)} may be {', '.join(more)}, which the contract does not know"
        kind = type(values[0])
    if part.type not in _TAKES.get(kind, ()):
        yield f"{shown(part.path)} is {part.type or part.note or 'of no type that features use'}, not {leaf.kind}"


def parts_of_file(file: File, message: str = "") -> tuple[str, str, list[Part]]:
    """The format, the name and the parts of a schema in a file: Avro, JSON Schema, or what `protoc -o` writes.

    Raises:
        ContractError: if it is none of these.
    """
    if file.suffix == ".proto":
        msg = f"{file}: compile it first: protoc --descriptor_set_out={file.stem}.desc {file.name}"
        raise ContractError(msg)
    if file.suffix in (".desc", ".binpb", ".pb"):
        from google.protobuf import descriptor_pb2

        made = descriptor_pb2.FileDescriptorSet.FromString(file.read_bytes()).file[-1]
        return "protobuf", message or made.message_type[0].name, parts_of_protobuf(made, message)
    try:
        schema = json.loads(file.read_text())
    except ValueError as error:
        msg = f"{file} is no schema: {error}"
        raise ContractError(msg) from error
    return _of_text(schema)


def _of_text(schema: Any) -> tuple[str, str, list[Part]]:
    if isinstance(schema, dict) and schema.get("type") == "record":
        return "avro", str(schema.get("name", "Drafted")), parts_of_avro(schema)
    return "json", str(schema.get("title", "Drafted")) if isinstance(schema, dict) else "", parts_of_json(schema)


def parts_of_registered(registered: Any, message: str = "") -> tuple[str, str, list[Part]]:
    """As `parts_of_file`, of a schema that a registry gives; Protobuf serialised."""
    kind, text = registered.schema.schema_type, registered.schema.schema_str
    if kind == "PROTOBUF":
        import base64

        from google.protobuf import descriptor_pb2

        file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(text))
        return "protobuf", message or file.message_type[0].name, parts_of_protobuf(file, message)
    format_, name, parts = _of_text(json.loads(text))
    return "json_schema" if kind == "JSON" else format_, name, parts
