"""Avro and Protobuf as objects, by the schemas of a registry: each is asked for once. Knows the registry's client.

The wire format is Confluent's: a zero byte, a schema's id in four bytes, and for Protobuf which message of the schema.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib import import_module
from typing import Any, Final

from config.settings import Settings

Read = Callable[[bytes, int], Any]
"""The object in a record, from an offset on."""

_UNKNOWN_S: Final = 30.0
"""An id that the registry does not know is asked for no more often."""
_WIRE_BYTES: Final = 5
_INSTALL: Final = "install Headrace with its extra `schemas` (pip install headrace[schemas])"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MESSAGES_MAX: Final = 64


class SchemaRegistryError(RuntimeError):
    """The registry does not let us in, or its client is not there: it will not pass by itself."""


class Schemas:
    """Objects in records. To be called with a format (`avro`, `protobuf`, or the text of an Avro schema) and a record.

    Args:
        settings: where the registry is.
        clock: seconds, for how long an id is taken for unknown.

    Raises, when it is called:
        ValueError: if there is none in it; the message says why.
        ConnectionError: if the registry is away.
        SchemaRegistryError: if it does not let us in.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._clock = settings, clock
        self._reads: dict[tuple[str, int], Read] = {}
        self._plain: dict[str, Read] = {}
        self._unknown: dict[tuple[str, int], tuple[float, str]] = {}

    def __call__(self, format_: str, value: bytes) -> Any:
        """The object in a record."""
        if format_ not in ("avro", "protobuf"):
            if format_ not in self._plain:
                self._plain[format_] = avro_of(format_)
            return self._plain[format_](value, 0)
        if value[:1] != b"\0" or len(value) <= _WIRE_BYTES:
            msg = (
                f"it begins with {value[:_WIRE_BYTES].hex(' ') or 'nothing'}, not with a schema's id as serialisers "
                f"of a schema registry write it (00 and four bytes): is it {format_} of a schema registry?"
            )
            raise ValueError(msg)
        key = format_, int.from_bytes(value[1:_WIRE_BYTES], "big")
        read = self._reads.get(key)
        if read is None:
            read = self._reads[key] = self._ask(*key)
        return read(value, _WIRE_BYTES)

    def _ask(self, format_: str, schema_id: int) -> Read:
        until_s, why = self._unknown.get((format_, schema_id), (0.0, ""))
        if self._clock() < until_s:
            raise ValueError(why)
        try:
            schema = self.get(
                lambda client: client.get_schema(schema_id, fmt="serialized" if format_ == "protobuf" else None)
            )
            if schema.schema_type.lower() != format_:
                msg = f"schema {schema_id} is {schema.schema_type}, not {format_}"
                raise ValueError(msg)  # noqa: TRY301  # remembered, as the registry's own
            return self._avro(schema) if format_ == "avro" else self._protobuf(schema)
        except LookupError as error:
            why = f"schema {schema_id}: {error.args[0]}"
        except ValueError as error:
            why = str(error)
        self._unknown[format_, schema_id] = self._clock() + _UNKNOWN_S, why
        raise ValueError(why)

    def get(self, ask: Callable[[Any], Any]) -> Any:
        """What the registry answers.

        Raises:
            LookupError: if it has nothing of this.
            ConnectionError: if it is away.
            SchemaRegistryError: if it does not let us in.
        """
        url = self._settings.schema_registry
        if not url:
            msg = "records say their schema by its id, and no schema registry is named: set HEADRACE_SCHEMA_REGISTRY"
            raise SchemaRegistryError(msg)
        try:
            from confluent_kafka.schema_registry import SchemaRegistryClient
            from confluent_kafka.schema_registry.error import SchemaRegistryError as AnsweredError
        except ImportError as error:
            msg = f"{error}: {_INSTALL}"
            raise SchemaRegistryError(msg) from error
        try:
            limits = {"timeout": self._settings.schema_registry_timeout_s, "max.retries": 1}
            with SchemaRegistryClient({"url": url, **limits, **self._settings.schema_registry_options}) as client:
                return ask(client)
        except AnsweredError as error:
            said = f"the schema registry at {url} answers {error.http_status_code}: {error.error_message}"
            match error.http_status_code:
                case 404:
                    raise LookupError(said) from None
                case 401 | 403:
                    msg = f"{said}; credentials are among HEADRACE_SCHEMA_REGISTRY_OPTIONS"
                    raise SchemaRegistryError(msg) from None
                case _:
                    raise ConnectionError(said) from None
        except ValueError as error:
            # Its options', which may hold a password.
            msg = f"the client of the schema registry at {url} takes no such options: {type(error).__name__}"
            raise SchemaRegistryError(msg) from None
        except Exception as error:
            # Of whatever HTTP library it uses.
            msg = f"the schema registry at {url} can't be reached: {type(error).__name__}: {error}"
            raise ConnectionError(msg) from error

    def _avro(self, schema: Any) -> Read:
        others = [each.schema_str for each in self._references(schema)]
        return avro_of(schema.schema_str, others)

    def _protobuf(self, schema: Any) -> Read:
        return protobuf_of(schema.schema_str, [each.schema_str for each in self._references(schema, "serialized")])

    def _references(self, schema: Any, fmt: str | None = None) -> Iterable[Any]:
        """The schemas that a schema refers to, each after those that it refers to."""
        for each in schema.references or ():
            found = self.get(partial(_version, each.subject, each.version, fmt)).schema
            yield from self._references(found, fmt)
            yield found


def _version(subject: str, version: int, fmt: str | None, client: Any) -> Any:
    return client.get_version(subject, version, fmt=fmt)


# --- Avro


def avro_of(text: str, references: Iterable[str] = ()) -> Read:
    """Reads data of an Avro schema.

    Raises:
        ValueError: if it is none.
    """
    try:
        import fastavro
    except ImportError as error:
        msg = f"{error}: {_INSTALL}"
        raise SchemaRegistryError(msg) from error
    named: Any = {}
    try:
        for each in references:
            fastavro.parse_schema(json.loads(each), named_schemas=named)
        parsed = fastavro.parse_schema(json.loads(text), named_schemas=named)
    except Exception as error:
        msg = f"no Avro schema: {type(error).__name__}: {error}"
        raise ValueError(msg) from error
    read = fastavro.schemaless_reader

    def of(value: bytes, begin: int) -> Any:
        data = io.BytesIO(value)
        data.seek(begin)
        try:
            found: Any = read(data, parsed)
        except Exception as error:
            # Whatever bytes lead it to.
            msg = f"no Avro of its schema: {type(error).__name__}: {error}"
            raise ValueError(msg) from error
        if data.tell() != len(value):
            msg = f"no Avro of its schema: {len(value) - data.tell()} bytes are left over"
            raise ValueError(msg)
        return found

    return of


# --- Protobuf


def protobuf_of(text: str, references: Iterable[str] = ()) -> Read:
    """Reads messages of a Protobuf schema, serialised and in base64, as a registry gives it.

    Raises:
        ValueError: if it is none.
    """
    try:
        from google.protobuf import descriptor_pb2, message_factory
        from google.protobuf.descriptor_pool import DescriptorPool
    except ImportError as error:
        msg = f"{error}: {_INSTALL}"
        raise SchemaRegistryError(msg) from error
    pool: Any = DescriptorPool()
    added: set[str] = set()

    def add(file: Any) -> Any:
        for name in file.dependency:
            if name not in added:
                add(_known_file(name))
        added.add(file.name)
        return pool.AddSerializedFile(file.SerializeToString())

    try:
        for each in references:
            add(descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(each, validate=True)))
        file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(text, validate=True))
        add(file)
        descriptor = pool.FindFileByName(file.name)
    except Exception as error:
        msg = f"no serialised Protobuf schema, as the registry is asked for: {type(error).__name__}: {error}"
        raise ValueError(msg) from error
    readers: dict[tuple[int, ...], tuple[Any, Callable[[Any], Any]]] = {}

    def of(value: bytes, begin: int) -> Any:
        try:
            path, begin = _message_path(value, begin)
            if path not in readers:
                message = descriptor.message_types_by_name[file.message_type[path[0]].name]
                for index in path[1:]:
                    message = message.nested_types[index]
                readers[path] = message_factory.GetMessageClass(message), _reader_of(message)
            made, plain = readers[path]
            return plain(made.FromString(value[begin:]))
        except Exception as error:
            # Whatever bytes lead it to.
            msg = f"no Protobuf of its schema: {type(error).__name__}: {error}"
            raise ValueError(msg) from error

    return of


def _known_file(name: str) -> Any:
    """A file that comes with a library: `google/protobuf/timestamp.proto`, or Confluent's own."""
    from google.protobuf import descriptor_pb2

    module = name.removesuffix(".proto").replace("/", ".") + "_pb2"
    if module.startswith("confluent."):
        module = f"confluent_kafka.schema_registry.{module}"
    made = descriptor_pb2.FileDescriptorProto()
    made.ParseFromString(import_module(module).DESCRIPTOR.serialized_pb)
    return made


def _message_path(value: bytes, at: int) -> tuple[tuple[int, ...], int]:
    """Which message of a schema it is, and where it begins; a single zero stands for the first."""
    n, at = _varint(value, at)
    if not 0 <= n <= _MESSAGES_MAX:
        msg = f"it names a message {n} levels deep"
        raise ValueError(msg)
    path = []
    for _ in range(n):
        index, at = _varint(value, at)
        path.append(index)
    return tuple(path) or (0,), at


def _varint(value: bytes, at: int) -> tuple[int, int]:
    """A zigzag number, and where it ends."""
    found = shift = 0
    while True:
        byte = value[at]
        found |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return (found >> 1) ^ -(found & 1), at


def _reader_of(message: Any, above: Mapping[str, Any] | None = None) -> Callable[[Any], Any]:
    """What makes an object of a message: fields by name, without those that are not set and without empty texts."""
    if message.full_name == "google.protobuf.Timestamp":
        return lambda found: _EPOCH + timedelta(seconds=found.seconds, microseconds=found.nanos // 1000)
    if message.file.name == "google/protobuf/wrappers.proto":
        return lambda found: found.value
    # A message may be in itself.
    known: dict[str, Any] = dict(above or {})
    fields: list[tuple[str, bool, Callable[[Any], Any] | None]] = []

    def read(found: Any) -> dict[str, Any]:
        made = {}
        for name, is_told, of in fields:
            if is_told and not found.HasField(name):
                continue
            value = getattr(found, name)
            if of is not None:
                value = of(value)
            if not (isinstance(value, str) and not value):
                made[name] = value
        return made

    known[message.full_name] = read
    for field in message.fields:
        is_repeated = field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED
        fields.append(
            (field.name, field.has_presence and not is_repeated, _field_reader(field, known, is_repeated=is_repeated))
        )
    return read


def _field_reader(field: Any, known: Mapping[str, Any], *, is_repeated: bool) -> Callable[[Any], Any] | None:
    of: Callable[[Any], Any] | None = None
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name["value"]
        inner = _field_reader(entry, known, is_repeated=False)
        return lambda found: {str(key): inner(found[key]) if inner else found[key] for key in found}
    if field.message_type is not None:
        of = known.get(field.message_type.full_name) or _reader_of(field.message_type, known)
    elif field.enum_type is not None:
        names = {number: value.name for number, value in field.enum_type.values_by_number.items()}
        of = lambda number: names.get(number, number)  # noqa: E731  # one of several
    if not is_repeated:
        return of
    return (lambda found: [of(each) for each in found]) if of else list
