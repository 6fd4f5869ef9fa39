"""The fast decoder against the contract, wherever fields are and whatever: see also tests/test_streams_decode.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any, Literal
from uuid import UUID

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import AliasChoices, AliasPath, BaseModel, ConfigDict, Field, field_validator

from features.events import Event, OccurredAt
from streams.contract import ContractDecoder
from tests.properties import scenarios  # noqa: F401  # its profile prints what repeats a failure
from tests.test_streams_decode import FLOATS, INTEGERS, NOW_MS, OTHERS, TEXTS

UUID_TEXT = "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"
TIMES = [
    *(
        "2025-11-21T10:00:00Z",
        "2025-11-21T10:00:00.123456Z",
        "2025-11-21T10:00:00.1234567Z",
        "2025-11-21T10:00:00+02:00",
    ),
    *("2025-11-21T10:00:00.5-23:59", "2025-11-21T24:00:00Z", "2025-11-21T10:00:60Z", "2025-02-29T10:00:00Z"),
    *("2025-11-21 10:00:00Z", "2025-11-21t10:00:00z", "2025-11-21T10:00Z", "2025-11-21T10:00:00", "2025-11-21", ""),
    *("1763683200", "0001-01-01T00:00:00+10:00", "9999-12-31T23:59:59-10:00", "2025-11-21T10:00:00,5Z", "10:00:00Z"),
    *(
        "2025-11-21T10:00:00Z\n",
        "\uff12\uff10\uff12\uff15-11-21T10:00:00Z",
        "2025-W01-1",
        "20251121",
        "2025-11-21T10:00:00+24:00",
    ),
    *("2025-11-21T10:00:00-00:00", "1969-12-31T23:59:59.999999Z", "1900-01-01T00:00:00.000001Z"),
]
UUIDS = [
    *(UUID_TEXT, UUID_TEXT.upper(), UUID_TEXT.replace("-", ""), "{" + UUID_TEXT + "}", "urn:uuid:" + UUID_TEXT),
    *(UUID_TEXT[:-1], UUID_TEXT + "\n", " " + UUID_TEXT, UUID_TEXT[:-1] + "g"),
]
NUMBERS = [
    "12.50",
    "0",
    "-1",
    "1e3",
    "NaN",
    "Infinity",
    "1" * 41,
    "1" * 39 + ".5",
    "0." + "1" * 40,
    "+1",
    " 1",
    "1_0",
    "",
    "\uff11",
]
QUOTED = [json.dumps(text, ensure_ascii=False) for text in TIMES + UUIDS + NUMBERS]
LISTS = [
    "[]",
    '["a"]',
    '["a","a"]',
    '["a",1]',
    '[""]',
    '["a\\u0000"]',
    "[null]",
    '"a"',
    json.dumps(["x"] * 257),
    '[["a"]]',
]
CHOICES = ['"red"', '"blue"', '"Red"', '"RED"', '"green"', "1", "2", "3", "1.0", "true", '"1"']
OBJECTS = [
    "{}",
    "null",
    "5",
    '"x"',
    "[]",
    '{"id":"u"}',
    '{"id":null}',
    '{"id":5}',
    '{"price":1}',
    '{"a":{"b":{"c":1}}}',
]
VALUES = INTEGERS[:16] + FLOATS[:14] + TEXTS + OTHERS[:8] + QUOTED + LISTS + CHOICES + OBJECTS


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Size(Enum):
    ONE = 1
    TWO = 2


class Maker(BaseModel):
    name: str
    since: date | None = None


class Product(BaseModel):
    price: float = 3.0
    colour: Colour | None = None
    maker: Maker | None = None
    sku: str = Field("none", validation_alias="SKU")


class Elsewhere(Event, topic="elsewhere"):
    """Fields at paths, under one of several names, in models; and of every type."""

    occurred_at: OccurredAt = Field(validation_alias=AliasPath("meta", "at"))
    user_id: str = Field(validation_alias=AliasPath("payload", "user", "id"))
    item_id: int | None = Field(None, validation_alias=AliasPath("payload", "item", "id"))
    name: str = Field("nobody", validation_alias=AliasPath("payload", "user", "name"))
    price: float | None = Field(None, validation_alias=AliasChoices("price", "Price", AliasPath("payload", "price")))
    count: int = Field(validation_alias=AliasChoices("count", AliasPath("payload", "n")))
    colour: Colour = Colour.RED
    size: Size | None = None
    surface: Literal["search", "feed"] | None = None
    session: UUID | None = None
    paid: Decimal | None = None
    opened: datetime | None = None
    day: date | None = None
    tags: list[str] = Field([])
    product: Product | None = None
    maker: Maker


GOOD: dict[str, Any] = {
    "event_id": "e1",
    "meta": {"at": NOW_MS},
    "payload": {"user": {"id": "u1", "name": "x"}, "item": {"id": 4}, "n": 3, "price": 2.5},
    "maker": {"name": "m"},
}
PATHS: list[tuple[str, ...]] = [
    *(("event_id",), ("meta",), ("meta", "at"), ("payload",), ("payload", "user"), ("payload", "user", "id")),
    *(("payload", "user", "name"), ("payload", "item"), ("payload", "item", "id"), ("payload", "price")),
    *(
        ("price",),
        ("Price",),
        ("count",),
        ("payload", "n"),
        ("colour",),
        ("size",),
        ("surface",),
        ("session",),
        ("paid",),
    ),
    *(
        ("opened",),
        ("day",),
        ("tags",),
        ("product",),
        ("product", "price"),
        ("product", "colour"),
        ("product", "maker"),
    ),
    *(("product", "maker", "name"), ("product", "maker", "since"), ("product", "SKU"), ("product", "sku"), ("maker",)),
    *(("maker", "name"), ("maker", "since"), ("more",), ("payload", "more"), ("user_id",), ("item_id",)),
]
FITTING: dict[str, list[str]] = {
    "session": [json.dumps(text) for text in UUIDS],
    "paid": [json.dumps(text) for text in NUMBERS] + FLOATS + INTEGERS,
    "opened": [json.dumps(text) for text in TIMES],
    "day": [json.dumps(text) for text in TIMES],
    "since": [json.dumps(text) for text in TIMES],
    "tags": LISTS,
    "colour": CHOICES,
    "size": CHOICES,
    "surface": ['"search"', '"other"'],
}


def put(whole: dict[str, Any], path: Sequence[str], text: str) -> None:
    """Puts a marker for JSON text at a path, making what is on the way to it."""
    for step in path[:-1]:
        whole = whole.setdefault(step, {}) if isinstance(whole.setdefault(step, {}), dict) else {}
    whole[path[-1]] = f"\x01{text}\x02"


def written(whole: dict[str, Any]) -> bytes:
    """JSON of it, with what was put into it as it was given."""
    parts = []

    def write(value: Any) -> None:
        if isinstance(value, dict):
            parts.append("{")
            for n, (name, each) in enumerate(value.items()):
                parts.append(f"{',' if n else ''}{json.dumps(name)}:")
                write(each)
            parts.append("}")
        elif isinstance(value, str) and value.startswith("\x01"):
            parts.append(value[1:-1])
        else:
            parts.append(json.dumps(value))

    write(whole)
    return "".join(parts).encode(errors="surrogatepass")


def copied(value: Any) -> Any:
    return {name: copied(each) for name, each in value.items()} if isinstance(value, dict) else value


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A message that is right but for a few mutations."""
    whole = copied(GOOD)
    for _ in range(draw(st.integers(0, 4))):
        path = draw(st.sampled_from(PATHS))
        pool = FITTING.get(path[-1], VALUES) if draw(st.booleans()) else VALUES
        put(whole, path, draw(st.sampled_from(pool)))
    if draw(st.integers(0, 3)) == 0:
        path = draw(st.sampled_from([("payload",), ("maker",), ("meta",), ("payload", "user"), ("payload", "n")]))
        inner: Any = whole
        for step in path[:-1]:
            inner = inner.get(step, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict):
            inner.pop(path[-1], None)
    value = written(whole)
    if draw(st.integers(0, 5)) == 0:
        # A name that is there twice: the last counts, whole.
        name = draw(st.sampled_from(["payload", "product", "maker", "price", "count"]))
        value = value[:-1] + f',"{name}":{draw(st.sampled_from([*OBJECTS, "1", "2.5"]))}}}'.encode()
    return value


DECODER = ContractDecoder("Elsewhere", Elsewhere)


def judged(value: Any) -> tuple[Any, Any]:
    """What the fast decoder and the contract make of a record, as columns have it; None if it is refused."""
    assert DECODER.fast is not None
    try:
        quick = [repr(each) for (each,) in DECODER.fast.columns([value]).values()]
    except (msgspec.MsgspecError, ValueError, RecursionError):
        quick = None
    fast, DECODER.fast = DECODER.fast, None
    try:
        full = [repr(each) for each in DECODER.check(value)]
    except ValueError:
        full = None
    finally:
        DECODER.fast = fast
    return quick, full


@settings(max_examples=1500)
@given(messages())
@example(written(GOOD))
@example(written({**GOOD, "payload": {**GOOD["payload"], "item": None}}))
@example(written({**GOOD, "product": {"maker": None}}))
@example(written({**GOOD, "product": None}))
@example(written({**GOOD, "price": None}))
def test_wherever_fields_are_the_fast_decoder_accepts_only_what_the_contract_does(value: bytes) -> None:
    """With equal values."""
    quick, full = judged(value)
    assert quick is None or quick == full


@pytest.mark.parametrize("path", PATHS, ids=".".join)
def test_every_odd_value_in_every_place(path: tuple[str, ...]) -> None:
    for text in dict.fromkeys(VALUES + FITTING.get(path[-1], [])):
        whole = copied(GOOD)
        put(whole, path, text)
        quick, full = judged(written(whole))
        assert quick is None or quick == full, text


def objects(value: Any) -> Any:
    """What Avro or Protobuf would have for JSON, as far as there is more than one way to say it."""
    match value:
        case dict():
            return {name: objects(each) for name, each in value.items()}
        case str():
            for made in (datetime.fromisoformat, date.fromisoformat, UUID, Decimal):
                try:
                    found: Any = made(value)
                except (ValueError, ArithmeticError):
                    continue
                return found
    return value


@settings(max_examples=600)
@given(messages(), st.booleans())
def test_of_objects_too(value: bytes, as_types: bool) -> None:
    """Decimals, times and ids as the types that Avro's logical types are."""
    try:
        plain = json.loads(value)
        json.dumps(plain, ensure_ascii=False).encode()
    except ValueError:
        return  # No JSON, or a text that neither has.
    quick, full = judged(objects(plain) if as_types else plain)
    assert quick is None or quick == full


def test_ordinary_records_take_the_fast_decoder() -> None:
    """Otherwise all the above would hold for a decoder that refuses everything."""
    more = {
        "colour": "blue",
        "size": 2,
        "session": UUID_TEXT,
        "paid": "12.5",
        "opened": "2025-11-21T10:00:00Z",
        "day": "2025-11-21",
        "tags": ["a"],
        "product": {"price": 1, "maker": {"name": "m", "since": "2025-11-21"}, "SKU": "s"},
        "surface": "feed",
        "Price": 5,
        "unknown": {"a": [1, {"b": 2}]},
    }
    for record in (GOOD, GOOD | more, GOOD | {"product": None, "paid": 3.25}):
        quick, full = judged(json.dumps(record).encode())
        assert quick is not None
        assert quick == full
        quick, full = judged(record | dict.fromkeys(("session", "opened", "day", "product", "paid")))
        assert quick is not None
        assert quick == full


class Lax(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)
    name: str


class Checked(BaseModel):
    name: str

    @field_validator("name")
    @classmethod
    def _short(cls, value: str) -> str:
        return value[:1]


class InLax(Event, topic="lax"):
    inner: Lax


class InChecked(Event, topic="checked"):
    inner: Checked


class Indexed(Event, topic="indexed"):
    first: str = Field(validation_alias=AliasPath("all", 0))


@pytest.mark.parametrize("contract", [InLax, InChecked, Indexed])
def test_what_it_has_no_equal_for_the_contract_decides(contract: type[Event]) -> None:
    decoder = ContractDecoder(contract.__name__, contract)
    assert decoder.fast is None
    value = json.dumps({"event_id": "e", "occurred_at": NOW_MS, "inner": {"name": "ab"}, "all": ["x"]}).encode()
    accepted, refused = decoder.decode([value], np.array([NOW_MS]))
    assert refused == []
    assert len(accepted.index) == 1
