"""Records by a schema registry, as Confluent's own serialisers write them, against what was given to these."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from functools import cache
from typing import Any

import fastavro
import numpy as np
import pytest
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.json_schema import JSONSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import descriptor_pb2, message_factory, timestamp_pb2
from google.protobuf.descriptor_pool import DescriptorPool
from pydantic import AliasPath, Field, ValidationError

from config.settings import Settings
from features import source
from features.events import Event
from streams.decode import Decoder
from streams.schemas import SchemaRegistryError, Schemas
from tests.support.schema_registry import SchemaRegistry
from tests.test_streams_decode import HORIZON_MS, NOW_MS, happened, plan_of
from tests.test_streams_topics import chunk, reasons

PRODUCT = {
    "type": "record",
    "name": "Product",
    "fields": [
        {"name": "id", "type": "long"},
        {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
    ],
}
FIELDS: list[dict[str, Any]] = [
    {"name": "id", "type": "string"},
    {"name": "at", "type": {"type": "long", "logicalType": "timestamp-micros"}},
    {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": ["click", "view"]}},
    {"name": "user_id", "type": "long"},
    {"name": "product", "type": ["null", PRODUCT], "default": None},
    {"name": "tags", "type": {"type": "array", "items": "string"}},
]


def avro(*more: dict[str, Any]) -> str:
    return json.dumps({"type": "record", "name": "Interaction", "fields": [*FIELDS, *more]})


class AvroClick(Event, topic="avro", format="avro", when={"kind": "click"}, event_id="id", occurred_at="at"):
    user_id: int
    item_id: int | None = Field(None, validation_alias=AliasPath("product", "id"))
    price: Decimal | None = Field(None, validation_alias=AliasPath("product", "price"))
    tags: list[str]
    surface: str | None = None


class PlainAvro(Event, topic="plain", format=source.avro(avro()), event_id="id", occurred_at="at"):
    user_id: int


class Framed(Event, topic="framed", format="json_schema"):
    user_id: str


class ProtoClick(Event, topic="proto", format="protobuf", event_id="id", occurred_at="at", when={"kind": "CLICK"}):
    user_id: int
    item_id: str | None = Field(None, validation_alias=AliasPath("product", "id"))
    price: float | None = Field(None, validation_alias=AliasPath("product", "price"))
    tags: list[str]
    note: str | None = None


@pytest.fixture(scope="module")
def registry() -> Iterator[SchemaRegistry]:
    with SchemaRegistry() as running:
        yield running


@pytest.fixture(scope="module")
def client(registry: SchemaRegistry) -> Iterator[SchemaRegistryClient]:
    with SchemaRegistryClient({"url": registry.url}) as made:
        yield made


@pytest.fixture
def settings(registry: SchemaRegistry) -> Settings:
    return Settings(schema_registry=registry.url)


def value_of(topic: str) -> SerializationContext:
    return SerializationContext(topic, MessageField.VALUE)


def interaction(number: int, kind: str = "click", **more: Any) -> dict[str, Any]:
    at = datetime.fromtimestamp(NOW_MS / 1000, UTC)
    return {"id": f"e{number}", "at": at, "kind": kind, "user_id": number, "product": None, "tags": [], **more}


def test_avro_whose_schema_gains_a_field_in_mid_flow(
    registry: SchemaRegistry, client: SchemaRegistryClient, settings: Settings
) -> None:
    """Each record is read by the schema that it was written with, which is asked for once."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    writers = [
        AvroSerializer(client, avro()),
        AvroSerializer(client, avro({"name": "surface", "type": ["null", "string"], "default": None})),
    ]
    values: list[bytes | None] = []
    wanted: list[tuple[int, Any, float | None, str | None]] = []
    for number in range(200):
        writer = writers[number > 100 or rng.random() < 0.1]
        product = {"id": number, "price": Decimal("12.50")} if rng.random() < 0.7 else None
        given = interaction(number, rng.choice(["click", "view"]), product=product, tags=["a", "b"])
        if writer is writers[1]:
            given["surface"] = "search"
        values.append(writer(given, value_of("avro")))
        if given["kind"] == "click":
            wanted.append((number, product and product["id"], 12.5 if product else None, given.get("surface")))
    before = len(registry.asked)
    (checked,) = Decoder(plan_of(AvroClick), 1, HORIZON_MS, Schemas(settings)).check_all([chunk(values, "avro")])
    assert len(registry.asked) - before == 2
    fields = {
        name: column.tolist() if isinstance(column, np.ndarray) else column.to_pylist()
        for name, column in checked.events[0].accepted.fields.items()
    }
    nan = float("nan")
    found = zip(fields["user_id"], fields["item_id"], fields["price"], fields["surface"], strict=True)
    assert repr([*found]) == repr(
        [(float(u), nan if i is None else float(i), nan if p is None else p, s) for u, i, p, s in wanted]
    )
    assert set(checked.events[0].accepted.times_ms.tolist()) == {NOW_MS}
    assert checked.unclaimed == 200 - len(wanted)
    assert checked.dead_letters == []


def test_avro_that_is_wrong_is_a_dead_letter_with_a_reason(client: SchemaRegistryClient, settings: Settings) -> None:
    writer = AvroSerializer(client, avro())
    good = writer(interaction(1, tags=["a"]), value_of("avro"))
    assert good is not None
    empty = writer(interaction(2, tags=[""]), value_of("avro"))
    values = [good, b"\0\0\0\x03\xe7xx", b"{}", good[:-3], good + b"x", empty, b"\0", None]
    decoder = Decoder(plan_of(AvroClick), 1, HORIZON_MS, Schemas(settings))
    found = decoder.decode(chunk(values, "avro"))
    assert [name for name, _, _ in happened(found, "user")] == ["1"]
    said = reasons(found)
    assert sorted(said) == [1, 2, 3, 4, 5, 6]
    assert said[1].startswith("schema 999: the schema registry at http://127.0.0.1")
    assert "answers 404: Schema not found" in said[1]
    assert said[2].startswith("it begins with 7b 7d, not with a schema's id")
    assert "no Avro of its schema" in said[3]
    assert "1 bytes are left over" in said[4]
    assert said[5].startswith("tags.0: String should have at least 1 character")
    assert found.unclaimed == 1


def test_plain_avro_has_its_schema_in_the_contract() -> None:
    values = []
    for number in range(3):
        data = io.BytesIO()
        fastavro.schemaless_writer(data, fastavro.parse_schema(json.loads(avro())), interaction(number))
        values.append(data.getvalue())
    found = Decoder(plan_of(PlainAvro), 1, HORIZON_MS, Schemas(Settings())).decode(chunk(values, "plain"))
    assert [name for name, _, _ in happened(found, "user")] == ["0", "1", "2"]


def test_json_schema_is_json_after_an_id_and_needs_no_registry(client: SchemaRegistryClient) -> None:
    schema = json.dumps({"type": "object", "title": "T", "properties": {"user_id": {"type": "string"}}})
    writer = JSONSerializer(schema, client)
    event = {"event_id": "e", "occurred_at": NOW_MS, "user_id": "u"}
    values = [writer(event, value_of("framed")), json.dumps(event).encode()]
    found = Decoder(plan_of(Framed), 1, HORIZON_MS).decode(chunk(values, "framed"))
    assert [name for name, _, _ in happened(found, "user")] == ["u"]
    assert 'leave out format="json_schema"' in reasons(found)[1]


# --- Protobuf


def proto_file(*, with_note: bool) -> Any:
    """A schema as protoc would make it of a .proto: an enum, a message in another, a timestamp, a repeated field."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=f"shop{with_note}.proto", package="shop", syntax="proto3")
    file.dependency.append("google/protobuf/timestamp.proto")
    other = file.message_type.add(name="Other")
    other.field.add(name="n", number=1, type=kinds.TYPE_INT32, label=kinds.LABEL_OPTIONAL)
    kind = file.enum_type.add(name="Kind")
    for number, name in enumerate(("UNKNOWN", "CLICK", "VIEW")):
        kind.value.add(name=name, number=number)
    message = file.message_type.add(name="Interaction")
    product = message.nested_type.add(name="Product")
    product.field.add(name="id", number=1, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)
    product.field.add(name="price", number=2, type=kinds.TYPE_DOUBLE, label=kinds.LABEL_OPTIONAL)
    one = {"label": kinds.LABEL_OPTIONAL}
    message.field.add(name="id", number=1, type=kinds.TYPE_STRING, **one)
    message.field.add(name="at", number=2, type=kinds.TYPE_MESSAGE, type_name=".google.protobuf.Timestamp", **one)
    message.field.add(name="kind", number=3, type=kinds.TYPE_ENUM, type_name=".shop.Kind", **one)
    message.field.add(name="user_id", number=4, type=kinds.TYPE_INT64, **one)
    message.field.add(name="product", number=5, type=kinds.TYPE_MESSAGE, type_name=".shop.Interaction.Product", **one)
    message.field.add(name="tags", number=6, type=kinds.TYPE_STRING, label=kinds.LABEL_REPEATED)
    if with_note:
        message.field.add(name="note", number=7, type=kinds.TYPE_STRING, **one)
    return file


@cache
def proto_class(*, with_note: bool) -> Any:
    pool: Any = DescriptorPool()
    pool.AddSerializedFile(timestamp_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(proto_file(with_note=with_note).SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("shop.Interaction"))


def proto_message(number: int, kind: int = 1, *, with_note: bool = False) -> Any:
    message = proto_class(with_note=with_note)(id=f"e{number}", kind=kind, user_id=number, tags=["a"])
    message.at.FromMilliseconds(NOW_MS)
    if number % 2:
        message.product.id, message.product.price = f"i{number}", 2.5
    if with_note:
        message.note = "late"
    return message


def test_protobuf_whose_schema_gains_a_field_in_mid_flow(
    registry: SchemaRegistry, client: SchemaRegistryClient, settings: Settings
) -> None:
    """It is the second message of its schema; an empty text is one that was not set."""
    options = {"use.deprecated.format": False}
    writers = [ProtobufSerializer(proto_class(with_note=note), client, options) for note in (False, True)]
    values = []
    for number in range(20):
        message = proto_message(number, 2 if number == 7 else 1, with_note=number >= 10)
        values.append(writers[number >= 10](message, value_of("proto")))
    good = values[0]
    assert good is not None
    values += [good[:5], good[:-1], b"\0\0\0\x03\xe8x"]
    decoder = Decoder(plan_of(ProtoClick), 1, HORIZON_MS, Schemas(settings))
    (checked,) = decoder.check_all([chunk(values, "proto")])
    fields = checked.events[0].accepted.fields
    numbers = [number for number in range(20) if number != 7]
    assert fields["user_id"].tolist() == numbers
    assert fields["item_id"].to_pylist() == [f"i{n}" if n % 2 else None for n in numbers]
    assert repr(fields["price"].tolist()) == repr([2.5 if n % 2 else float("nan") for n in numbers])
    assert fields["note"].to_pylist() == ["late" if n >= 10 else None for n in numbers]
    assert fields["tags"].to_pylist() == [["a"]] * 19
    assert set(checked.events[0].accepted.times_ms.tolist()) == {NOW_MS}
    assert checked.unclaimed == 1
    assert [letter.offset for letter in checked.dead_letters] == [20, 21, 22]


# --- the registry itself


def test_a_registry_that_is_away_is_no_dead_letter(registry: SchemaRegistry) -> None:
    """It will pass: a worker that stops for it is started again, and nothing is lost or refused meanwhile."""
    schemas = Schemas(Settings(schema_registry="http://127.0.0.1:9", schema_registry_timeout_s=1))
    with pytest.raises(ConnectionError, match="can't be reached"):
        schemas("avro", b"\0\0\0\0\x01x")
    registry.failing = 503
    try:
        with pytest.raises(ConnectionError, match="answers 503"):
            Schemas(Settings(schema_registry=registry.url))("avro", b"\0\0\0\0\x01x")
    finally:
        registry.failing = 0
    with pytest.raises(SchemaRegistryError, match="HEADRACE_SCHEMA_REGISTRY"):
        Schemas(Settings())("avro", b"\0\0\0\0\x01x")


def test_an_unknown_id_is_asked_for_now_and_then(registry: SchemaRegistry) -> None:
    now_s = [0.0]
    schemas = Schemas(Settings(schema_registry=registry.url), clock=lambda: now_s[0])
    before = len(registry.asked)
    for at_s in (0.0, 1.0, 29.0, 31.0):
        now_s[0] = at_s
        with pytest.raises(ValueError, match="schema 9999"):
            schemas("avro", b"\0\0\0\x27\x0fx")
    assert len(registry.asked) - before == 2


def test_credentials_are_given_and_never_said() -> None:
    with SchemaRegistry(user="me:hush-hush") as registry:
        registry.register("s", avro())
        options = {"basic.auth.user.info": "me:hush-hush"}
        inside = Settings(schema_registry=registry.url, schema_registry_options=options)
        with pytest.raises(ValueError, match="no Avro of its schema"):
            Schemas(inside)("avro", b"\0\0\0\0\x01x")
        assert "hush-hush" not in repr(inside)
        assert json.loads(inside.environment()["HEADRACE_SCHEMA_REGISTRY_OPTIONS"]) == options
        outside = inside.model_copy(update={"schema_registry_options": {"basic.auth.user.info": "me:wrong"}})
        with pytest.raises(SchemaRegistryError, match="answers 401") as caught:
            Schemas(outside)("avro", b"\0\0\0\0\x01x")
        assert "wrong" not in str(caught.value)
        odd = inside.model_copy(update={"schema_registry_options": {"odd": "hush-hush"}})
        with pytest.raises(SchemaRegistryError, match="takes no such options") as caught:
            Schemas(odd)("avro", b"\0\0\0\0\x01x")
        assert "hush-hush" not in str(caught.value)
    with pytest.raises(ValidationError, match="credentials go into") as refused:
        Settings(schema_registry="https://me:hush-hush@there")
    assert "hush-hush" not in str(refused.value)


def test_any_bytes_after_an_id_are_an_event_or_a_dead_letter(client: SchemaRegistryClient, settings: Settings) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    good = {
        "avro": AvroSerializer(client, avro())(interaction(1, tags=["a"]), value_of("avro")),
        "proto": ProtobufSerializer(proto_class(with_note=False), client, {"use.deprecated.format": False})(
            proto_message(1), value_of("proto")
        ),
    }
    for contract in (AvroClick, ProtoClick):
        value = good[contract.topic]
        assert value is not None
        values: list[bytes | None] = []
        for _ in range(300):
            changed = bytearray(value)
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(5, len(changed))] = rng.randrange(256)
            values.append(
                bytes(changed[: rng.randrange(5, len(changed) + 1)]) if rng.random() < 0.3 else bytes(changed)
            )
        decoder = Decoder(plan_of(contract), 2, HORIZON_MS, Schemas(settings))
        found = decoder.decode(chunk(values, contract.topic))
        assert found.events + found.duplicates + found.unclaimed + len(found.dead_letters) == 300
