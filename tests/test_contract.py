"""`headrace contract`: what it drafts is a contract that takes the records that it was drafted from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from pydantic import AliasPath, Field
from typer.testing import CliRunner

from config.settings import Settings
from features import source
from features.events import Event
from headrace import contract
from headrace.cli import app
from headrace.contract import ContractError, compare, parts_of_avro, parts_of_file, parts_of_json, parts_of_protobuf
from headrace.sampling import Sample, drafted
from streams.chunk import Chunk, Partition
from tests.support.schema_registry import SchemaRegistry
from tests.test_streams_decode import NOW_MS
from tests.test_streams_schemas import avro, proto_file

JSON_SCHEMA = {
    "title": "Page viewed",
    "type": "object",
    "required": ["id", "ts", "user"],
    "properties": {
        "id": {"type": "string", "format": "uuid"},
        "ts": {"type": "integer"},
        "user": {"$ref": "#/definitions/user"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "mood": {"enum": ["good", "bad"]},
        "seen": {"type": ["string", "null"], "format": "date-time"},
        "odd": {"type": "array", "items": {"type": "number"}},
        "either": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    },
    "definitions": {"user": {"type": "object", "required": ["id"], "properties": {"id": {"type": "integer"}}}},
}


def made(text: str) -> dict[str, type[Event]]:
    scope: dict[str, Any] = {"__name__": "drafted"}
    exec(compile(text, "drafted", "exec", dont_inherit=True), scope)  # noqa: S102  # as a user's file
    return {
        name: each for name, each in scope.items() if isinstance(each, type) and issubclass(each, Event) and each.topic
    }


def run(*arguments: str, status: int = 0) -> str:
    done = CliRunner().invoke(app, ["contract", *arguments], catch_exceptions=False)
    assert done.exit_code == status, done.output
    return done.output


def test_a_class_from_avro_reads_what_the_schema_says(tmp_path: Path) -> None:
    (tmp_path / "interactions.avsc").write_text(avro())
    text = run("from-schema", str(tmp_path / "interactions.avsc"))
    assert 'class Interaction(Event, topic="interactions", format="avro", occurred_at="at", event_id="id"):' in text
    assert '    kind: Literal["click", "view"]' in text
    assert '    price: Decimal | None = Field(None, validation_alias=AliasPath("product", "price"))' in text
    (drafted_,) = made(text).values()
    found = compare(drafted_, parts_of_avro(json.loads(avro())))
    assert (found.wrong, found.doubtful) == ([], [])


def test_a_class_from_json_schema() -> None:
    parts = parts_of_json(JSON_SCHEMA)
    text = contract.draft("PageViewed", "pages", parts, time_unit="s")
    assert text.splitlines() == [
        'class PageViewed(Event, topic="pages", occurred_at=source.seconds("ts"), event_id="id"):',
        '    """PageViewed, as it is in pages."""',
        "",
        '    user_id: int = Field(validation_alias=AliasPath("user", "id"))',
        "    tags: list[str] | None = None  # a list",
        '    mood: Literal["good", "bad"] | None = None',
        "    seen: datetime | None = None",
        "    # odd: no type that features use (a list)",
        "    either: float | None = None",
    ]
    (drafted_,) = made(contract.header(text) + text).values()
    assert compare(drafted_, parts).wrong == []


def test_a_class_from_protobuf(tmp_path: Path) -> None:
    compiled = descriptor_pb2.FileDescriptorSet(file=[proto_file(with_note=True)])
    (tmp_path / "shop.desc").write_bytes(compiled.SerializeToString())
    text = run("from-schema", str(tmp_path / "shop.desc"), "--message", "Interaction", "--topic", "seen")
    assert 'class Interaction(Event, topic="seen", format="protobuf", occurred_at="at", event_id="id"):' in text
    assert '    kind: Literal["UNKNOWN", "CLICK", "VIEW"]' in text
    assert made(text)
    with pytest.raises(ContractError, match="no message Odd; there is: Other, Interaction"):
        parts_of_protobuf(proto_file(with_note=True), "Odd")
    (tmp_path / "shop.proto").write_text("")
    with pytest.raises(ContractError, match=r"protoc --descriptor_set_out=shop\.desc shop\.proto"):
        parts_of_file(tmp_path / "shop.proto")


def test_a_class_from_a_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    with SchemaRegistry() as registry:
        monkeypatch.setenv("HEADRACE_SCHEMA_REGISTRY", registry.url)
        registry.register("seen-value", avro())
        text = run("from-schema", "seen-value")
        assert 'class Interaction(Event, topic="seen", format="avro"' in text
        with pytest.raises(ContractError, match="no file and no subject 'nothing'"):
            run("from-schema", "nothing")


class Reads(Event, topic="t", format="avro", event_id="id", occurred_at="when", when={"kind": "click"}):
    user_id: int
    item: str | None = Field(None, validation_alias=AliasPath("product", "sku"))
    product_id: str | None = Field(None, validation_alias=AliasPath("product", "id"))
    price: float = Field(validation_alias=AliasPath("product", "price"))
    kind: Literal["click"]
    more: str


def test_a_comparison_says_what_does_not_fit_and_what_may_change() -> None:
    found = compare(Reads, parts_of_avro(json.loads(avro())))
    assert found.wrong == [
        "product_id: product.id is int, not str",
        "kind: kind may be view, which the contract does not know",
        "more: the schema has no more",
        "the schema has no when, by which records are told apart, or have their time or identity",
    ]
    assert found.doubtful == [
        "item: the schema has no product.sku, so it is always null",
        "price: product.price may be null in the schema, and then the record is refused",
    ]
    assert found.producer[1] == "must keep, with its type and never null: user_id, product.price, kind, id"
    assert found.producer[2] == "may leave out, which then reads as null: product.id"
    assert "may read too" in found.contract[0]
    assert "tags" in found.contract[0]


def test_check_ends_with_status_1_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    with SchemaRegistry() as registry:
        monkeypatch.setenv("HEADRACE_SCHEMA_REGISTRY", registry.url)
        monkeypatch.setenv("HEADRACE_DEFINITIONS", "tests.support.shop")
        said = run("check", "Seen", status=1)
        assert "there is no file and no subject 'shop.seen-value'" in said
        fields = [
            {"name": "id", "type": "string"},
            {"name": "at", "type": "long"},
            {"name": "kind", "type": "string"},
            *(
                {"name": name, "type": {"type": "record", "name": name, "fields": [{"name": "id", "type": kind}]}}
                for name, kind in (("who", "long"), ("product", "string"))
            ),
        ]
        schema: dict[str, Any] = {"type": "record", "name": "Seen", "fields": fields}
        registry.register("shop.seen-value", json.dumps(schema))
        assert "wrong: item_id: product.id is str, not int" in run("check", "Seen", status=1)
        fields[4]["type"]["fields"][0]["type"] = "long"  # type: ignore[index]  # a record
        registry.register("shop.seen-value", json.dumps(schema))
        said = run("check", "Seen")
        assert "Seen and shop.seen-value: they fit" in said
        assert "the producer's next schema: may leave out" not in said
        assert "doubtful: surface: the schema has no surface, so it is always null" in said


def sample_of(records: list[Any], headers: list[Any] | None = None) -> Sample:
    n = len(records)
    values: list[bytes | None] = [msgspec.json.encode(each) for each in records]
    keys: list[bytes | None] = [None] * n
    given = (values, keys, np.arange(n), np.full(n, NOW_MS, np.int64))
    chunk = Chunk(Partition("topic", 0), 0, n, 0, *given, headers=headers or [[] for _ in records])
    return Sample([chunk], "json", records, 0)


def test_a_sample_of_mixed_records_becomes_a_contract_for_each_kind() -> None:
    """With names, types, the share of nulls and examples; and all of the sample is accepted by it."""
    records = [
        {
            "type": "click",
            "id": n,
            "ts": NOW_MS // 1000 + n,
            "user": {"id": 4711 + n},
            "price": n / 2 if n % 4 else None,
        }
        for n in range(40)
    ] + [{"type": "like", "id": f"l{n}", "ts": NOW_MS // 1000, "user": {"id": 1}, "tags": ["a"]} for n in range(10)]
    text, said = drafted(Settings(), "topic", sample_of(records))
    assert (
        'class Click(Event, topic="topic", when={"type": "click"}, occurred_at=source.seconds("ts"), event_id="id"):'
        in text
    )
    assert '    user_id: int = Field(validation_alias=AliasPath("user", "id"))  # 4711, 4712, 4713' in text
    assert "    price: float | None = None  # 75% have it; " in text
    assert said == ["of 50 records of topic:", "  40 are accepted by Click", "  10 are accepted by Like"]
    assert set(made(text)) == {"Click", "Like"}


def test_samples_in_envelopes() -> None:
    changes = [
        {"op": "c", "source": {"table": "likes", "ts_ms": NOW_MS}, "before": None, "after": {"user_id": n}, "ts_ms": n}
        for n in range(5)
    ]
    text, said = drafted(Settings(), "topic", sample_of(changes))
    assert 'class Likes(Event, topic="topic", when={"source.table": "likes"}, envelope="debezium"):' in text
    assert said[1:] == ["  5 are accepted by Likes"]
    cloud = [
        {"specversion": "1.0", "id": str(n), "source": "/s", "type": "page.view", "data": {"user_id": f"u{n}"}}
        for n in range(5)
    ]
    text, said = drafted(Settings(), "topic", sample_of(cloud))
    assert 'class PageView(Event, topic="topic", when={"type": "page.view"}, envelope="cloudevents"):' in text
    assert said[1:] == ["  5 are accepted by PageView"]


def test_a_sample_without_time_or_identity_says_so_in_its_contract() -> None:
    text, said = drafted(
        Settings(), "topic", sample_of([{"user": n, "class": [1], "mixed": n or "a"} for n in range(9)])
    )
    assert "occurred_at=source.record_time, event_id=source.position):" in text
    assert "# mixed: no type that features use (several types: int, str; " in text
    assert said[1:] == ["  9 are accepted by Topic"]


def test_a_source_that_is_wrong_is_an_error_of_the_class() -> None:
    metaclass: Any = type(Event)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"format": "xml"}, "format='xml': use one of 'json'"),
        ({"envelope": "soap"}, "envelope='soap': use one of"),
        ({"when": {"a..b": 1}}, "'a..b' is no place in a record"),
        ({"when": {"a": []}}, "compare with a text, a whole number or a bool"),
        ({"when": {"a": 1.5}}, "compare with a text"),
        ({"occurred_at": 3}, "3 is no place in a record"),
        ({"envelope": "cloudevents", "format": "avro"}, "is read of JSON, not of avro"),
    ]
    for keywords, said in cases:
        with pytest.raises(TypeError, match=said):
            metaclass("Bad", (Event,), {"__module__": __name__}, topic="t", **keywords)
    with pytest.raises(TypeError, match="event_id is declared as a field and by a keyword"):

        class Twice(Event, topic="t", event_id=source.position):
            event_id: str
