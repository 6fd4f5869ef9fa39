"""From raw records to columns: what the contract refuses is a dead letter, and no bytes whatever stop the stream."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal
from zlib import crc32

import annotated_types
import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import AliasGenerator, ConfigDict, Field, ValidationError, field_validator, model_validator

from features import catalog
from features.compile import compile_plan
from features.events import Event, value_of
from features.plan import CodeChangedError, EntitySpec, EventSpec, Plan, contract_fingerprint
from features.times import DAY_MS
from store.keys import shard_of
from streams.chunk import Chunk, Partition
from streams.contract import ContractDecoder
from streams.decode import Decoded, Decoder
from tests.properties import scenarios  # noqa: F401  # its profile prints what repeats a failure

NOW_MS = 1_763_683_200_000
HORIZON_MS = 300_000
HUGE_MS = (1 << 63) - 1


class Everything(Event, topic="everything"):
    """A field of every kind that the fast decoder knows."""

    user_id: str
    item_id: str | None = None
    count: int | None = None
    small: int = Field(3, ge=-5, lt=100)
    price: float | None = Field(None, ge=0)
    share: float = Field(0.5, gt=0, le=1)
    yes: bool | None = None
    sure: bool = False


class Plainest(Event, topic="plainest"):
    """No field more than a contract must have, but for the id."""

    user_id: str


class _Own(Event, topic="own"):
    user_id: str

    @field_validator("user_id")
    @classmethod
    def _odd(cls, value: str) -> Any:
        match value:
            case "key":
                raise KeyError(value)
            case "recursion":
                return cls._odd(value)
            case "exit":
                raise StopIteration
            case "memory":
                raise MemoryError
            case "assert":
                message = "not this one"
                raise AssertionError(message)
            case "number":
                return 7
            case "object":
                return object()
            case "surrogate":
                return "\ud800"
            case "none":
                return None
            case "empty":
                return value[5:]
            case "long":
                return value * 20_000
            case "nul":
                return "a\0b"
        return value


class Own(_Own, topic="own"):
    """Has a validator that raises whatever there is, and returns what it should not."""

    amount: int | None = None
    price: float | None = None

    @field_validator("amount", "price", "occurred_at")
    @classmethod
    def _huge(cls, value: Any) -> Any:
        return {3: 10**400, 4: float("nan"), 5: float("inf"), 6: 1 << 70, NOW_MS + 3: 1 << 70}.get(value, value)


def spec_of(contract: type[Event]) -> EventSpec:
    return EventSpec(
        contract.__name__,
        contract.topic,
        dict(contract.kinds()),
        f"{contract.__module__}:{contract.__qualname__}",
        contract_fingerprint(contract),
        source=contract.declared_source,
    )


def plan_of(*contracts: type[Event], shards: int = 8) -> Plan:
    entities = (EntitySpec("item", "item_id"), EntitySpec("seller", "seller_id"), EntitySpec("user", "user_id"))
    return Plan("test", shards, entities, tuple(map(spec_of, contracts)), (), ())


CATALOG = compile_plan([vars(catalog)], "test", 8)


def event(number: int = 0, **fields: Any) -> dict[str, Any]:
    return {"event_id": f"e{number}", "occurred_at": NOW_MS - 1000, "user_id": "u1", **fields}


def raw(*events: dict[str, Any] | bytes | None) -> list[bytes | None]:
    return [json.dumps(each).encode() if isinstance(each, dict) else each for each in events]


def chunk_of(
    values: Sequence[bytes | None],
    *,
    topic: str = "everything",
    start: int = 0,
    offsets: Sequence[int] | None = None,
    record_ms: Sequence[int] | None = None,
    fresh: int = 0,
) -> Chunk:
    """A chunk of one partition; offsets without holes and records of `NOW_MS`, unless said."""
    at = list(range(start, start + len(values))) if offsets is None else list(offsets)
    times = [NOW_MS] * len(values) if record_ms is None else list(record_ms)
    return Chunk(
        Partition(topic, 0),
        start,
        at[-1] + 1 if at else start,
        fresh,
        list(values),
        [b"key %d" % offset for offset in at],
        np.array(at, np.int64),
        np.array(times, np.int64),
    )


def reason_of(contract: type[Event], value: bytes | None) -> str:
    ((_, reason),) = ContractDecoder(contract.__name__, contract).decode([value], np.array([NOW_MS]))[1]
    return reason


def happened(decoded: Decoded, entity: str) -> list[tuple[str, int, int]]:
    """(id, offset, time) of an entity's events in all lanes, by offset."""
    found: list[tuple[str, int, int]] = []
    for part in decoded.parts:
        for mine in part.events.get(entity, ()):
            found += zip(mine.ids.to_pylist(), mine.offsets.tolist(), mine.times_ms.tolist(), strict=True)
    return sorted(found, key=lambda each: each[1])


# --- the fast decoder against the contract

INTEGERS = [
    *("0", "-0", "1", "3", "99", "100", "-5", "-6", "9007199254740993", "9223372036854775807", "9223372036854775808"),
    *("18446744073709551615", "18446744073709551616", "-9223372036854775809", "1" + "0" * 30, "1" + "0" * 308),
    *("1" + "0" * 309, "9" * 500, "00", "01", "-", "+1", str(NOW_MS), str(NOW_MS // 1000), "946684800000"),
    *("946684799999", "4102444800000", "4102444800001"),
]
FLOATS = [
    *(
        "1.0",
        "0.0",
        "-0.0",
        "1e0",
        "1E2",
        "1e+2",
        "12e-1",
        "0.1",
        "1.7976931348623157e308",
        "1e309",
        "-1e400",
        "5e-324",
    ),
    *(
        "1e-400",
        "2.2250738585072011e-308",
        "0.1000000000000000055511151231257827021181583404541015625",
        ".5",
        "1.",
        "1e",
    ),
    *("123456789012345678901234567890.5", "9007199254740993.0", "NaN", "Infinity", "-Infinity", "nan", "1_0", "0x1"),
    *("8.98846567431158e307", "179769313486231580793e289", "0." + "3" * 400, "1" * 400 + "e-390", f"{NOW_MS}.0"),
]
TEXTS = [
    *('""', '"u1"', '"é"', '"😀"', r'"\u0000"', r'"a\u0000b"', r'"\\u0000"', r'"\ud800"', r'"\ud800abcdefgh"'),
    *(r'"\udc00abcdefgh"', r'"\ud83d\ude00"', r'"\ud83d\u0041bcdefgh"', r'"\n\t\r\b\f\/\"\\"', r'"\q"', r'"\u12"'),
    *(
        '"' + "x" * 256 + '"',
        '"' + "x" * 257 + '"',
        '"' + "😀" * 256 + '"',
        '"' + "é" * 257 + '"',
        '"a\nb"',
        '"a\x7fb"',
    ),
    *('"2025-11-21T10:00:00Z"', '"2025-11-21T10:00:00+02:00"', '"2025-02-30T10:00:00Z"', '"1763683200000"', "'u1'"),
    '"' + r"\u00e9" * 256 + '"',
]
OTHERS = ["null", "true", "false", "True", "[]", "{}", "[1]", '{"a":{"b":[null,1e5,"x"]}}', "[" * 250 + "]" * 250, ""]
OTHERS += ["[" * 101 + "]" * 101, '{"a":' * 199 + "1" + "}" * 199, "[1,]", '{"a":1,}', "nul", "/**/1"]
INVALID_UTF8 = [b'"\xff"', b'"\xc0\x80"', b'"\xed\xa0\x80"', b'"\xf4\x90\x80\x80"', b'"\xe9"', b'"\x00"', b'"\xc3"']
VALUES = [text.encode() for text in INTEGERS + FLOATS + TEXTS + OTHERS] + INVALID_UTF8
NAMES = [f'"{name}"'.encode() for name in (*Everything.model_fields, "more", "Price", "")]
NAMES += [rb'"\u0070rice"', rb'"user\u005fid"', b'"\xff"', rb'"\ud800abcdefgh"', b"price", b'"a\nb"', rb'"\u0000"']
GOOD: dict[bytes, list[bytes]] = {
    b'"event_id"': [b'"e1"'],
    b'"occurred_at"': [str(NOW_MS).encode()],
    b'"user_id"': [b'"u1"', '"é"'.encode()],
}
FITTING: dict[bytes, list[str]] = {
    b'"count"': INTEGERS,
    b'"small"': INTEGERS,
    b'"price"': INTEGERS + FLOATS,
    b'"share"': FLOATS,
    b'"item_id"': TEXTS,
    b'"user_id"': TEXTS,
    b'"event_id"': TEXTS,
    b'"occurred_at"': INTEGERS + TEXTS,
    b'"yes"': ["true", "false", "null"],
}
spaces = st.sampled_from([b"", b"", b"", b" ", b"\n", b"\t\r\n ", b"\x0b", b"\xc2\xa0", b"\xef\xbb\xbf"])


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """A message that is right but for a few mutations."""
    members = [(name, draw(st.sampled_from(values))) for name, values in GOOD.items()]
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(FITTING)))
        members.append((name, draw(st.sampled_from(FITTING[name])).encode()))
    members += draw(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(VALUES)), max_size=2))
    if draw(st.booleans()):
        members.append((b'"price"', repr(draw(st.floats())).encode()))
    if draw(st.booleans()):
        members.append((b'"count"', str(draw(st.integers(-(1 << 70), 1 << 70))).encode()))
    if draw(st.integers(0, 4)) == 0:
        members.pop(draw(st.integers(0, len(members) - 1)))
    if draw(st.booleans()):
        members = draw(st.permutations(members))
    space = [draw(spaces) for _ in range(4)] if draw(st.integers(0, 3)) == 0 else [b""] * 4
    body = b",".join(space[0] + name + space[1] + b":" + space[2] + value for name, value in members)
    whole = space[3] + b"{" + body + b"}"
    match draw(st.integers(0, 9)):
        case 0:
            whole += draw(
                st.sampled_from([b" ", b"\n", b"\0", b"x", b"{}", b",", b"]", b"//", b"\xff", b"\xef\xbb\xbf"])
            )
        case 1:
            whole = whole[: draw(st.integers(0, len(whole)))]
        case 2:
            at = draw(st.integers(0, len(whole) - 1))
            whole = whole[:at] + bytes([draw(st.integers(0, 255))]) + whole[at + 1 :]
        case 3:
            whole = draw(st.sampled_from([b"[" + whole + b"]", whole.decode("latin-1").encode("utf-16"), b"null", b""]))
    return whole


def judge(contract: type[Event], value: bytes) -> tuple[Any, Any]:
    """What the fast decoder and the contract make of a message: field values with their types, or None if refused."""
    fast = ContractDecoder(contract.__name__, contract).fast
    assert fast is not None

    def plainly(values: Iterable[Any]) -> list[tuple[str, str]]:
        return [(type(each).__name__, repr(each)) for each in values]

    try:
        quick = plainly(each for (each,) in fast.columns([value]).values())
    except (msgspec.MsgspecError, ValueError, RecursionError):
        quick = None
    try:
        found = contract.model_validate_json(value)
        full = plainly(value_of(found, leaf.attributes) for leaf in contract.leaves().values())
    except ValidationError:
        full = None
    return quick, full


def prefixed(rest: bytes) -> bytes:
    return b'{"event_id":"e","occurred_at":1763683200000,"user_id":"u"' + rest + b"}"


@settings(max_examples=1500)
@given(messages())
@example(prefixed(b',"more":"\xff"'))
@example(prefixed(b',"\xff":1'))
@example(prefixed(b',"more":' + b"[" * 250 + b"]" * 250))
@example(prefixed(b',"more":' + b"[" * 5_000 + b"]" * 5_000))
@example(prefixed(b',"more":' + b"9" * 5_000))
def test_the_fast_decoder_accepts_only_what_the_contract_does_with_equal_values(value: bytes) -> None:
    """Whichever decoder a message meets, the features are the same."""
    quick, full = judge(Everything, value)
    assert quick is None or quick == full


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value[:20]))
def test_every_odd_value_in_every_field(value: bytes) -> None:
    for name in NAMES:
        members = {key: values[0] for key, values in GOOD.items()} | {name: value}
        message = b"{" + b",".join(key + b":" + each for key, each in members.items()) + b"}"
        quick, full = judge(Everything, message)
        assert quick is None or quick == full, message
        repeated = message[:-1] + b"," + name + b":" + value + b"}"
        quick, full = judge(Everything, repeated)
        assert quick is None or quick == full, repeated


def test_ordinary_messages_take_the_fast_decoder() -> None:
    """Otherwise all the above would hold for a decoder that refuses everything."""
    rng = random.Random(7)
    for number in range(100):
        more = {"item_id": "i", "count": number, "price": rng.random(), "yes": True, "more": {"a": [1, 2]}, "text": "é"}
        quick, full = judge(Everything, json.dumps(event(number, **more), ensure_ascii=number % 2 == 0).encode())
        assert quick is not None
        assert quick == full
    for spec in CATALOG.events:
        contract = getattr(catalog, spec.name)
        assert ContractDecoder(spec.name, contract).fast is not None


# --- contracts that no fast decoder equals


class FieldOwn(Event, topic="c1"):
    user_id: str

    @field_validator("user_id")
    @classmethod
    def _short(cls, value: str) -> str:
        if len(value) > 1:
            message = "too long"
            raise ValueError(message)
        return value


class ModelOwn(Event, topic="c2"):
    user_id: str

    @model_validator(mode="after")
    def _not_u(self) -> ModelOwn:
        message = "never"
        raise ValueError(message)


class BeforeOwn(Event, topic="c3"):
    user_id: str

    @model_validator(mode="before")
    @classmethod
    def _other(cls, data: Any) -> Any:
        return data | {"user_id": "other"}


def _never(cls: type[Event], value: object) -> object:
    message = f"never {value}"
    raise ValueError(message)


# A validator in the place of the one that every contract has.
_meta: Any = type(Event)
SameName: Any = _meta(
    "SameName",
    (Event,),
    {
        "__module__": __name__,
        "__annotations__": {"user_id": str},
        **{name: field_validator("*")(classmethod(_never)) for name in Event.__pydantic_decorators__.field_validators},
    },
    topic="c4",
)


class PostInit(Event, topic="c5"):
    user_id: str

    def model_post_init(self, context: Any) -> None:
        message = "never"
        raise ValueError(message)


class Forbids(Event, topic="c6"):
    model_config = ConfigDict(extra="forbid")
    user_id: str


class Lowers(Event, topic="c7"):
    model_config = ConfigDict(str_to_lower=True)
    user_id: str


class Strips(Event, topic="c8"):
    model_config = ConfigDict(str_strip_whitespace=True)
    user_id: str


class Shorter(Event, topic="c9"):
    model_config = ConfigDict(str_max_length=2)
    user_id: str


class Aliased(Event, topic="c10"):
    user_id: str = Field(alias="user")


class AllAliased(Event, topic="c11"):
    model_config = ConfigDict(alias_generator=AliasGenerator(validation_alias=str.upper))
    user_id: str


class Pattern(Event, topic="c12"):
    user_id: str = Field(pattern="^u")


class Limited(Event, topic="c13"):
    user_id: str = Field(max_length=2)


class Chosen(Event, topic="c14"):
    user_id: str
    surface: Literal["search", "feed"]


class Made(Event, topic="c15"):
    user_id: str = Field(default_factory=lambda: "made")


class Later(Event, topic="c16"):
    """Narrows the time that every contract has."""

    occurred_at: Annotated[int, Field(ge=NOW_MS + 1)]
    user_id: str


class Doubly(Event, topic="c17"):
    user_id: str
    price: Annotated[float, annotated_types.Ge(5), annotated_types.Ge(0)] = 7.0


class Multiple(Event, topic="c18"):
    user_id: str
    count: int = Field(0, multiple_of=2)


class Both(Event, topic="c20"):
    user_id: str
    price: float = Field(3, ge=0, gt=0)


class Checked(Event, topic="c21"):
    user_id: str
    price: float = Field(-1.0, ge=0, validate_default=True)


PARTICULAR = [
    *(FieldOwn, ModelOwn, BeforeOwn, SameName, PostInit, Forbids, Lowers, Strips, Shorter, Aliased, AllAliased),
    *(Pattern, Limited, Chosen, Made, Later, Doubly, Multiple, Both, Checked),
]
PROBES: list[dict[str, Any]] = [
    {},
    {"user_id": "UPPER"},
    {"user_id": " u "},
    {"user": "u", "USER_ID": "U", "EVENT_ID": "e", "OCCURRED_AT": NOW_MS},
    {"more": 1},
    {"surface": "search"},
    {"surface": "other"},
    {"price": 3},
    {"price": 0},
    {"count": 1},
    {"count": 0},
    {"occurred_at": NOW_MS + 5},
    {"user_id": None},
]


@pytest.mark.parametrize("contract", PARTICULAR, ids=lambda contract: contract.__name__)
def test_a_contract_that_the_fast_decoder_does_not_equal_decides_itself(contract: type[Event]) -> None:
    """Validators, post-init, configuration, aliases, default factories, bounds of every kind: none is passed over."""
    decoder = ContractDecoder(contract.__name__, contract)
    for probe in PROBES:
        fields = {name: value for name, value in event(**probe).items() if value is not None}
        value = json.dumps(fields).encode()
        try:
            want: Any = tuple(contract.model_validate_json(value).model_dump().values())
        except ValidationError:
            want = None
        try:
            got: Any = decoder.check(value)
        except ValueError:
            got = None
        assert got == want, (contract.__name__, value)


@pytest.mark.parametrize("contract", [FieldOwn, ModelOwn, BeforeOwn, Own])
def test_a_contract_with_validators_of_its_own_has_no_fast_decoder(contract: type[Event]) -> None:
    assert ContractDecoder(contract.__name__, contract).fast is None


# --- reasons


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"user_id": 17}, ["user_id: ", "string", "got 17"]),
        ({"user_id": ""}, ["user_id: ", "at least 1 character", "got ''"]),
        ({"user_id": "x" * 300}, ["user_id: ", "at most 256 characters", "got 'xxx", "..."]),
        ({"user_id": "a\0b"}, ["user_id: ", "NUL", "got 'a\\x00b'"]),
        ({"price": -1}, ["price: ", "greater than or equal to 0", "got -1"]),
        ({"price": "12"}, ["price: ", "valid number", "got '12'"]),
        ({"price": float("nan")}, ["price: ", "finite", "got nan"]),
        ({"count": 1.5}, ["count: ", "valid integer", "got 1.5"]),
        ({"yes": 1}, ["yes: ", "valid boolean", "got 1"]),
        ({"occurred_at": "yesterday"}, ["occurred_at: ", "RFC 3339", "got 'yesterday'"]),
        ({"occurred_at": NOW_MS // 1000}, ["occurred_at: ", "946684800000", f"got {NOW_MS // 1000}"]),
        ({"user_id": 17, "price": -1}, ["user_id: ", "(and 1 more)"]),
    ],
)
def test_a_reason_names_the_field_what_it_holds_and_what_is_expected(fields: dict[str, Any], parts: list[str]) -> None:
    reason = reason_of(Everything, json.dumps(event(**fields)).encode())
    for part in parts:
        assert part in reason
    assert "\n" not in reason


def test_reasons_of_what_is_no_event_at_all() -> None:
    assert reason_of(Everything, None) == "the record is empty; send a JSON object"
    assert "Invalid JSON" in reason_of(Everything, b"")
    assert "Invalid JSON" in reason_of(Everything, b"{not json")
    assert reason_of(Everything, b"{}").startswith("event_id: Field required")
    assert "object" in reason_of(Everything, b"[]")


def test_a_reason_is_short_however_long_the_message() -> None:
    decoder = ContractDecoder("Everything", Everything)
    for value in (b'"' + b"x" * 100_000 + b'"', prefixed(b',"price":[' + b"1," * 50_000 + b"1]")):
        ((at, reason),) = decoder.decode([value], np.array([NOW_MS]))[1]
        assert at == 0
        assert 0 < len(reason) <= 500


# --- what a chunk becomes


def test_columns_hold_the_values_and_null_is_nan() -> None:
    values = raw(event(1, price=2, count=None, yes=True), event(2, user_id="u2", item_id="i", count=7, price=None))
    accepted, refused = ContractDecoder("Everything", Everything).decode(values, np.array([NOW_MS, NOW_MS]))
    assert refused == []
    assert accepted.event_ids.to_pylist() == ["e1", "e2"]
    assert accepted.times_ms.tolist() == [NOW_MS - 1000] * 2
    assert accepted.fields["user_id"].to_pylist() == ["u1", "u2"]
    assert accepted.fields["item_id"].to_pylist() == [None, "i"]
    numbers = {name: column.tolist() for name, column in accepted.fields.items() if isinstance(column, np.ndarray)}
    assert repr(numbers) == repr(
        {
            "count": [np.nan, 7.0],
            "small": [3.0, 3.0],
            "price": [2.0, np.nan],
            "share": [0.5, 0.5],
            "yes": [1.0, np.nan],
            "sure": [0.0, 0.0],
        }
    )


def test_both_ways_of_writing_a_time_are_one() -> None:
    values = raw(event(1, occurred_at="2025-11-21T00:00:00.250Z"), event(2, occurred_at=NOW_MS + 250))
    decoded = Decoder(plan_of(Everything), 1, HORIZON_MS).decode(chunk_of(values, record_ms=[NOW_MS + 1000] * 2))
    assert [time_ms for _, _, time_ms in happened(decoded, "user")] == [NOW_MS + 250] * 2


def test_a_time_later_than_its_record_counts_at_the_record() -> None:
    """Up to a day: a clock that is a little fast. Later is a mistake, refused with its value."""
    early = [0, 1, DAY_MS, DAY_MS + 1, 2 * DAY_MS]
    values = raw(*(event(number, occurred_at=NOW_MS + ahead) for number, ahead in enumerate(early)))
    decoded = Decoder(plan_of(Everything), 2, HORIZON_MS).decode(chunk_of(values))
    assert happened(decoded, "user") == [("u1", offset, NOW_MS) for offset in range(3)]
    assert [letter.offset for letter in decoded.dead_letters] == [3, 4]
    assert decoded.dead_letters[0].reason.startswith(f"occurred_at: {NOW_MS + DAY_MS + 1} is more than a day ahead")
    assert decoded.events == 3


def test_a_refused_time_is_not_remembered_as_a_duplicate() -> None:
    values = raw(event(1, occurred_at=NOW_MS + 2 * DAY_MS), event(1), event(1))
    decoded = Decoder(plan_of(Everything), 1, HORIZON_MS).decode(chunk_of(values))
    assert happened(decoded, "user") == [("u1", 1, NOW_MS - 1000)]
    assert (decoded.events, decoded.duplicates, len(decoded.dead_letters)) == (1, 1, 1)


def test_event_ids_count_once_within_a_partition() -> None:
    """In one chunk and over chunks, and again once the horizon is over; another partition has its own."""
    decoder = Decoder(plan_of(Everything, Plainest), 1, HORIZON_MS)
    first = decoder.decode(chunk_of(raw(event(1), event(1), event(2))))
    assert (first.events, first.duplicates) == (2, 1)
    later = NOW_MS + HORIZON_MS
    second = decoder.decode(chunk_of(raw(event(2), event(3)), start=3, record_ms=[later, later]))
    assert [offset for _, offset, _ in happened(second, "user")] == [4]
    third = decoder.decode(chunk_of(raw(event(1)), start=5, record_ms=[later + 1]))
    assert (third.events, third.duplicates) == (1, 0)
    other = decoder.decode(chunk_of(raw(event(1)), topic="plainest"))
    assert (other.events, other.duplicates) == (1, 0)


def test_what_was_committed_before_only_tells_duplicates_apart() -> None:
    """Below `fresh` nothing counts, nothing is a dead letter again, and nothing is counted as a duplicate."""
    values = raw(event(1), b"bad", event(1), event(1), b"bad", event(2))
    decoded = Decoder(plan_of(Everything), 3, HORIZON_MS).decode(chunk_of(values, start=10, fresh=13))
    assert happened(decoded, "user") == [("u1", 15, NOW_MS - 1000)]
    assert [letter.offset for letter in decoded.dead_letters] == [14]
    assert (decoded.events, decoded.duplicates) == (1, 1)


def test_a_dead_letter_has_the_original_bytes_and_where_it_is_from() -> None:
    decoded = Decoder(plan_of(Everything), 2, HORIZON_MS).decode(
        chunk_of([b"\xff\x00", None, *raw(event(1))], start=7, offsets=[8, 20, 21])
    )
    letters = sorted(decoded.dead_letters, key=lambda letter: letter.offset)
    assert [(letter.offset, letter.key, letter.value) for letter in letters] == [
        (8, b"key 8", b"\xff\x00"),
        (20, b"key 20", None),
    ]
    assert all(letter.partition == ("everything", 0) and letter.reason for letter in letters)


@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 11])
def test_there_is_a_part_for_every_lane_and_each_event_is_where_its_shard_is(lanes: int) -> None:
    """For each kind of entity apart: a user and the item clicked are as a rule in different lanes."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    events = [event(n, user_id=f"ü{rng.randrange(30)}", item_id=rng.choice([None, f"i{n % 17}"])) for n in range(200)]
    offsets = sorted(rng.sample(range(100, 1000), 200))
    decoded = Decoder(plan_of(Everything), lanes, HORIZON_MS).decode(chunk_of(raw(*events), start=100, offsets=offsets))
    assert len(decoded.parts) == lanes
    for lane, part in enumerate(decoded.parts):
        assert (part.partition, part.start, part.end) == (("everything", 0), 100, offsets[-1] + 1)
        assert part.record_ms_max == NOW_MS
        assert "seller" not in part.events  # No field of the contract names one.
        for (mine,) in part.events.values():
            assert mine.contract == "Everything"
            for name, shard in zip(mine.ids.to_pylist(), mine.shards.tolist(), strict=True):
                assert shard == shard_of(name.encode(), 8) == crc32(name.encode()) % 8
                assert shard % lanes == lane
            assert all(len(column) == len(mine.ids) for column in mine.fields.values())
    for entity, key in (("user", "user_id"), ("item", "item_id")):
        want = [(each[key], offset) for each, offset in zip(events, offsets, strict=True) if each[key] is not None]
        assert [(name, offset) for name, offset, _ in happened(decoded, entity)] == want
    assert decoded.events == 200


@pytest.mark.parametrize("values", [[], [b"bad", None], raw(event(1))], ids=["empty", "all bad", "no item"])
def test_a_chunk_without_events_still_has_its_range_for_every_lane(values: list[bytes | None]) -> None:
    decoded = Decoder(plan_of(Everything), 3, HORIZON_MS).decode(chunk_of(values, start=5))
    assert [(part.start, part.end) for part in decoded.parts] == [(5, 5 + len(values))] * 3
    assert happened(decoded, "item") == []
    lost = Decoder(plan_of(Everything), 3, HORIZON_MS).decode(Chunk(Partition("everything", 0), 5, 1_000_000))
    assert [(part.start, part.end, part.horizon) for part in lost.parts] == [(5, 1_000_000, 1_000_000)] * 3
    assert [part.record_ms_max for part in lost.parts] == [-1] * 3


def test_a_contract_that_is_not_the_applied_one_is_refused() -> None:
    plan = plan_of(Everything)
    other = Plan("test", 8, plan.entities, (msgspec.structs.replace(plan.events[0], fingerprint="0" * 12),), (), ())
    with pytest.raises(CodeChangedError, match="Everything"):
        Decoder(other, 1, HORIZON_MS)


# --- nothing stops the stream


@pytest.mark.parametrize(
    "odd",
    [
        *({"user_id": name} for name in ("key", "recursion", "exit", "memory", "assert", "number", "object")),
        *({"user_id": name} for name in ("surrogate", "empty", "long", "nul")),
        *({"amount": 3}, {"price": 3.0}, {"price": 4.0}, {"price": 5.0}, {"occurred_at": NOW_MS + 3}),
    ],
    ids=repr,
)
def test_a_validator_that_raises_or_returns_anything_makes_a_dead_letter(odd: dict[str, Any]) -> None:
    """One message must not stop the others: the stream would start again and meet it again, for ever.

    An empty id would be that of all who have none, a text of more bytes than two can count a row that can't be read.
    """
    values = raw(event(1), event(2, **odd), event(3))
    decoded = Decoder(plan_of(Own), 2, HORIZON_MS).decode(chunk_of(values, topic="own"))
    assert [offset for _, offset, _ in happened(decoded, "user")] == [0, 2]
    assert [letter.offset for letter in decoded.dead_letters] == [1]
    assert decoded.dead_letters[0].reason


def test_a_validator_that_returns_none_leaves_the_event_without_that_entity() -> None:
    decoded = Decoder(plan_of(Own), 2, HORIZON_MS).decode(chunk_of(raw(event(1, user_id="none")), topic="own"))
    assert happened(decoded, "user") == []


@pytest.mark.parametrize("contract", [Everything, Own], ids=["fast", "own"])
@pytest.mark.parametrize("digits", [309, 400, 4_000, 10_000])
@pytest.mark.parametrize("field", ["count", "amount", "occurred_at", "price"])
def test_an_integer_that_no_float_holds_is_refused(contract: type[Event], digits: int, field: str) -> None:
    """`count: int` has no bounds of its own, and one such message stopped the stream: columns are float64."""
    bad = prefixed(f',"{field}":1{"0" * digits}'.encode())
    decoded = Decoder(plan_of(contract), 1, HORIZON_MS).decode(
        chunk_of([*raw(event(1)), bad, *raw(event(2))], topic=contract.topic)
    )
    counted = field not in contract.model_fields and digits < 4_300
    assert [offset for _, offset, _ in happened(decoded, "user")] == [0, 1, 2] if counted else [0, 2]
    assert len(decoded.dead_letters) == 1 - counted


@pytest.mark.parametrize("depth", [100, 199, 250, 1_000, 5_000, 100_000])
@pytest.mark.parametrize("pair", ["[]", "{}"])
def test_deep_nesting_in_a_field_that_the_contract_ignores_stops_nothing(depth: int, pair: str) -> None:
    """Msgspec answers with RecursionError, which is no error of a value: 2 kB that stopped the stream for good."""
    opening = pair[0] if pair == "[]" else '{"a":'
    nested = (opening * depth + "1" + pair[1] * depth).encode()
    values = [*raw(event(1)), prefixed(b',"more":' + nested), *raw(event(2))]
    for contract in (Everything, Own):
        decoded = Decoder(plan_of(contract), 1, HORIZON_MS).decode(chunk_of(values, topic=contract.topic))
        assert {0, 2} <= {offset for _, offset, _ in happened(decoded, "user")}
        assert decoded.events + len(decoded.dead_letters) == 3


@settings(max_examples=400)
@given(st.lists(st.one_of(messages(), st.binary(max_size=40), st.none()), max_size=8), st.integers(0, 2))
def test_any_bytes_are_an_event_a_duplicate_or_a_dead_letter(values: list[bytes | None], which: int) -> None:
    contract = (Everything, Plainest, Own)[which]
    decoded = Decoder(plan_of(contract), 2, HORIZON_MS).decode(chunk_of(values, topic=contract.topic))
    assert decoded.events + decoded.duplicates + len(decoded.dead_letters) == len(values)
    offsets = {letter.offset for letter in decoded.dead_letters} | {at for _, at, _ in happened(decoded, "user")}
    assert len(offsets) == len(values) - decoded.duplicates


@settings(max_examples=100)
@given(st.data())
def test_any_record_timestamps_stop_nothing_and_hide_no_event(data: st.DataObject) -> None:
    """Under CreateTime they are the producer's word: microseconds, zero, -1, the largest number there is.

    Where ids are all different there is no duplicate, whatever the times.
    """
    repeat = data.draw(st.sampled_from([1, 2, 5]))
    n = data.draw(st.integers(1, 12))
    odd = st.sampled_from([-1, 0, NOW_MS, NOW_MS * 1000, NOW_MS * 1_000_000, HUGE_MS, HUGE_MS - DAY_MS, -HUGE_MS - 1])
    times = data.draw(st.lists(st.one_of(odd, st.integers(-HUGE_MS, HUGE_MS)), min_size=n, max_size=n))
    decoder = Decoder(plan_of(Plainest), 2, HORIZON_MS)
    for start in (0, n):
        values = raw(*(event((start + number) // repeat) for number in range(n)))
        decoded = decoder.decode(chunk_of(values, topic="plainest", start=start, record_ms=times))
        assert decoded.duplicates == 0 or repeat > 1
        assert decoded.events + decoded.duplicates + len(decoded.dead_letters) == n


def test_duplicates_among_ten_thousand_records_in_microseconds_are_found() -> None:
    """Runs of equal ids told apart by adding multiples of the largest time overflow, and duplicates count twice."""
    n = 10_000
    values = raw(*(event(number) for number in range(n)))
    decoder = Decoder(plan_of(Plainest), 1, HORIZON_MS)
    times = [NOW_MS * 1000 - number for number in range(n)]
    decoded = decoder.decode(chunk_of(values + values[:5], topic="plainest", record_ms=times + times[:5]))
    assert (decoded.events, decoded.duplicates) == (n, 5)
