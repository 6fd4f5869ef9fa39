"""Topics as others write them: whose a record is, where its parts are, what is around them."""

from __future__ import annotations

import base64
import random
from collections.abc import Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from pydantic import AliasChoices, AliasPath, BaseModel, Field

from features import source
from features.events import Event
from streams.chunk import Chunk, Partition
from streams.contract import ContractDecoder
from streams.decode import Decoded, Decoder
from tests.test_streams_decode import HORIZON_MS, NOW_MS, happened, plan_of, raw

S = NOW_MS // 1000


class Click(Event, topic="mixed", when={"kind": "click"}, occurred_at=source.seconds("meta.at"), event_id="meta.id"):
    """One of several on a topic."""

    user_id: int = Field(validation_alias=AliasPath("payload", "user", "id"))
    item_id: str | None = Field(None, validation_alias=AliasChoices("item", AliasPath("payload", "item", "id")))
    price: float | None = Field(None, validation_alias=AliasPath("payload", "price"))


class Like(Event, topic="mixed", when={"kind": ["like", "love"]}, event_id=("who", "n"), occurred_at="at"):
    """Another."""

    user_id: str = Field(validation_alias="who")


class Numbered(Event, topic="mixed", when={"kind": 1}, event_id=source.position, occurred_at=source.record_time):
    """A kind that is a number."""

    user_id: str


def chunk(
    values: Sequence[bytes | None],
    topic: str = "mixed",
    headers: Sequence[Any] = (),
    partition: int = 0,
    start: int = 0,
    fresh: int = 0,
) -> Chunk:
    n = len(values)
    offsets, times = np.arange(start, start + n), np.full(n, NOW_MS, np.int64)
    head = [list(each) for each in headers]
    keys: list[bytes | None] = [b"k"] * n
    given = (list(values), keys, offsets, times)
    return Chunk(Partition(topic, partition), start, start + n, fresh, *given, headers=head)


def decoded(
    contracts: Sequence[type[Event]], values: Sequence[bytes | None], topic: str = "mixed", **options: Any
) -> Decoded:
    return Decoder(plan_of(*contracts), 2, HORIZON_MS).decode(chunk(values, topic, **options))


def reasons(found: Decoded) -> dict[int, str]:
    return {letter.offset: letter.reason for letter in found.dead_letters}


def click(number: int, user: Any = 4711, at: Any = S, **more: Any) -> dict[str, Any]:
    return {"kind": "click", "meta": {"id": f"c{number}", "at": at}, "payload": {"user": {"id": user}}, **more}


# --- whose a record is


def test_a_record_goes_to_the_contract_that_claims_it_and_others_are_counted() -> None:
    """What nobody claims is no dead letter; what is claimed and wrong is one, with the path in its reason."""
    values = raw(
        click(1),
        {"kind": "like", "who": "u1", "n": 1, "at": NOW_MS},
        {"kind": "view", "who": 3},
        {"kind": ["click"]},
        {"kind": True},
        {"kind": 1, "user_id": "u2"},
        click(2, user="4711"),
        None,
        {"no": "kind"},
        {"kind": "love", "who": "u1", "n": 2, "at": NOW_MS},
    )
    found = decoded([Click, Like, Numbered], values)
    who = [(name, offset) for name, offset, _ in happened(found, "user")]
    assert who == [("4711", 0), ("u1", 1), ("u2", 5), ("u1", 9)]
    assert reasons(found) == {6: "payload.user.id: Input should be a valid integer; got '4711'"}
    assert (found.events, found.unclaimed, found.duplicates) == (4, 5, 0)
    contracts = {each.contract for part in found.parts for each in part.events["user"]}
    assert contracts == {"Click", "Like", "Numbered"}


def test_what_nobody_can_read_is_a_dead_letter_as_it_may_be_anyones() -> None:
    found = decoded([Click, Like], [b"{", b"\xff", *raw(click(1))])
    assert sorted(reasons(found)) == [0, 1]
    assert all("can't be read" in reason for reason in reasons(found).values())
    assert (found.events, found.unclaimed) == (1, 0)


def test_contracts_of_a_topic_may_be_told_apart_by_a_header() -> None:
    values = raw(*({"event_id": f"e{n}", "occurred_at": NOW_MS, "user_id": f"u{n}"} for n in range(4)))
    headers = [[("kind", b"b"), ("kind", b"a")], [("kind", b"2")], [("kind", None)], []]
    found = decoded([HeaderA, HeaderB], values, "headed", headers=headers)
    assert [name for name, _, _ in happened(found, "user")] == ["u0", "u1"]
    assert found.unclaimed == 2


class HeaderA(Event, topic="headed", when={source.header("kind"): "a"}):
    user_id: str


class HeaderB(Event, topic="headed", when={source.header("kind"): 2}):
    user_id: str


def test_the_same_id_in_two_contracts_is_no_duplicate_and_in_one_it_is() -> None:
    """Whatever else of the topic stands between them, also over chunks."""
    decoder = Decoder(plan_of(HeaderA, HeaderB), 2, HORIZON_MS)
    event = {"event_id": "e", "occurred_at": NOW_MS, "user_id": "u"}
    kinds = [b"a", b"2", b"x", b"a", b"2"]
    first = decoder.decode(chunk(raw(*[event] * 5), "headed", [[("kind", kind)] for kind in kinds]))
    assert (first.events, first.duplicates, first.unclaimed) == (2, 2, 1)
    second = decoder.decode(chunk(raw(event), "headed", [[("kind", b"2")]], start=5))
    assert (second.events, second.duplicates) == (0, 1)


def test_a_contract_may_be_read_from_several_topics() -> None:
    decoder = Decoder(plan_of(Several), 1, HORIZON_MS)
    event = {"event_id": "e", "occurred_at": NOW_MS, "user_id": "u"}
    found = decoder.decode_all([chunk(raw(event), topic) for topic in ("web", "app", "web")])
    assert [each.events for each in found] == [1, 1, 0]  # A partition's ids are its own.


class Several(Event, topic=["web", "app"]):
    user_id: str


# --- times and identities


@pytest.mark.parametrize(
    ("unit", "written", "wanted"),
    [
        (source.seconds, S, NOW_MS),
        (source.seconds, S + 0.25, NOW_MS + 250),
        (source.milliseconds, NOW_MS, NOW_MS),
        (source.microseconds, NOW_MS * 1000 + 7, NOW_MS),
        (source.seconds, "2025-11-21T00:00:00.250Z", NOW_MS + 250),
        (source.microseconds, "2025-11-21T01:00:00.250+01:00", NOW_MS + 250),
        (source.seconds, str(S), NOW_MS),
    ],
)
def test_a_time_is_what_its_unit_says(unit: Any, written: Any, wanted: int) -> None:
    from streams.opened import times_ms

    assert times_ms([written], unit("at"), None) == ([wanted], {})


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (NOW_MS, "counts s: say source.seconds"),
        (S * 1_000_000, "counts s"),
        ("yesterday", "RFC 3339"),
        (None, "there is no time; got None"),
        (True, "no time is written so"),
        ([S], "no time is written so"),
        (1e300, "counts s"),
    ],
)
def test_a_wrong_time_is_refused_with_its_place(written: Any, said: str) -> None:
    found = decoded([Click, Like], raw(click(1, at=written), click(2)))
    assert list(reasons(found)) == [0]
    assert reasons(found)[0].startswith("occurred_at (meta.at")
    assert said in reasons(found)[0]
    assert found.events == 1


def test_identities_of_several_places_can_not_be_confused() -> None:
    values = raw(
        *(
            {"kind": "like", "at": NOW_MS, "who": who, "n": n}
            for who, n in [("a", "b,c"), ("a,b", "c"), ("a", 1), ("a", "1"), ("a", 1), ("a", None), ("a", [1])]
        )
    )
    found = decoded([Click, Like], values)
    assert (found.events, found.duplicates) == (4, 1)
    assert reasons(found)[5] == "event_id (n): it must be a text or a whole number; got None"
    assert sorted(reasons(found)) == [5, 6]


def test_identity_by_position_knows_only_kafkas_own_repeats() -> None:
    decoder = Decoder(plan_of(Numbered), 1, HORIZON_MS)
    values = raw(*[{"kind": 1, "user_id": "u"}] * 3)
    first = decoder.check_all([chunk(values)])[0]
    assert first.events[0].accepted.event_ids.to_pylist() == ["mixed-0-0", "mixed-0-1", "mixed-0-2"]
    assert first.events[0].accepted.times_ms.tolist() == [NOW_MS] * 3
    again = decoder.decode(chunk(values[:1]))
    assert (again.events, again.duplicates) == (0, 1)


def test_a_contract_is_made_in_python_by_its_own_names_and_in_milliseconds() -> None:
    made = Click.of(event_id="e", occurred_at=NOW_MS, user_id=7, item_id="i")
    assert (made.event_id, made.occurred_at, made.user_id, made.item_id) == ("e", NOW_MS, 7, "i")


# --- envelopes


class Cloud(Event, topic="cloud", envelope="cloudevents", when={"type": "shop.click"}):
    user_id: str


def cloud(number: int, **data: Any) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": str(number),
        "source": "/shop",
        "type": "shop.click",
        "time": "2025-11-21T00:00:00Z",
        "data": {"user_id": f"u{number}", **data},
    }


def test_cloud_events_structured_and_binary_are_one() -> None:
    binary = [
        ("ce_specversion", b"1.0"),
        *((f"ce_{name}", value.encode()) for name, value in cloud(2).items() if name not in ("data", "specversion")),
    ]
    other = [*binary[:-2], ("ce_type", b"shop.view")]
    encoded = {name: value for name, value in cloud(4).items() if name != "data"}
    encoded["data_base64"] = base64.b64encode(b'{"user_id":"u4"}').decode()
    values = [
        *raw(cloud(1)),
        b'{"user_id":"u2"}',
        b'{"user_id":"u3"}',
        *raw(encoded),
        *raw({**cloud(5), "type": "shop.view"}),
        b"{}",
        b"nothing",
        *raw(cloud(2)),
        None,
        *raw(cloud(6, user_id=7)),
        *raw({name: value for name, value in cloud(7).items() if name != "time"}),
    ]
    headers: list[Any] = [[] for _ in values]
    headers[1], headers[2] = binary, other
    found = decoded([Cloud], values, "cloud", headers=headers)
    assert happened(found, "user") == [
        *[(f"u{n}", at, NOW_MS) for n, at in ((1, 0), (2, 1), (4, 3), (7, 10))],
    ]
    assert (found.duplicates, found.unclaimed) == (1, 3)
    assert sorted(reasons(found)) == [5, 6, 9]
    assert "specversion" in reasons(found)[5]
    assert reasons(found)[9] == "user_id: Input should be a valid string; got 7"


class Bought(Event, topic="db", envelope="debezium"):
    user_id: int
    price: Decimal | None = None


class Removed(Event, topic="db", envelope="debezium", when={"op": "d"}):
    user_id: int


def change(op: str, number: int, *, after: Any = None, before: Any = None, **more: Any) -> dict[str, Any]:
    return {
        "op": op,
        "ts_ms": number,
        "source": {"ts_ms": NOW_MS, "lsn": number},
        "before": before,
        "after": after,
        **more,
    }


def test_debezium_inserts_and_updates_are_events_and_deletes_where_they_are_declared() -> None:
    """A change that is sent again has another `ts_ms` of its own, and the same id; a snapshot is nobody's."""
    row = {"user_id": 1, "price": "12.50"}
    values = raw(
        change("c", 1, after=row),
        change("u", 2, before=row, after={"user_id": 2}),
        change("d", 3, before={"user_id": 3}),
        change("r", 4, after=row),
        {**change("c", 1, after=row), "ts_ms": 99},
        {"schema": {}, "payload": change("c", 5, after={"user_id": 5})},
        change("c", 6, after={"user_id": "6"}),
        None,
    )
    found = decoded([Bought, Removed], values, "db")
    assert [(name, at) for name, at, _ in happened(found, "user")] == [("1", 0), ("2", 1), ("3", 2), ("5", 5)]
    assert (found.duplicates, found.unclaimed) == (1, 2)
    assert reasons(found) == {6: "user_id: Input should be a valid integer; got '6'"}


# --- types


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Size(Enum):
    S = 1
    M = 2


class Product(BaseModel):
    price: float
    colour: Colour | None = None
    made: date | None = None


class Typed(Event, topic="typed"):
    """A field of each type."""

    user_id: int
    colour: Colour = Colour.RED
    size: Size | None = None
    session: UUID | None = None
    paid: Decimal | None = None
    opened: datetime | None = None
    day: date | None = None
    tags: list[str] | None = None
    product: Product | None = None


def test_every_type_is_a_kind_that_features_know() -> None:
    assert Typed.kinds() == {
        "event_id": "str",
        "occurred_at": "int",
        "user_id": "int",
        "colour": "str",
        "size": "int",
        "session": "str",
        "paid": "float",
        "opened": "int",
        "day": "int",
        "tags": "list[str]",
        "product.price": "float",
        "product.colour": "str",
        "product.made": "int",
    }
    record = {
        "event_id": "e",
        "occurred_at": NOW_MS,
        "user_id": 7,
        "colour": "blue",
        "size": 2,
        "session": "A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11",
        "paid": "12.5",
        "opened": "2025-11-21T01:00:00+01:00",
        "day": "2025-11-21",
        "tags": ["a", "b"],
        "product": {"price": 3, "colour": "red", "made": "1970-01-02"},
    }
    bare = {"event_id": "f", "occurred_at": NOW_MS, "user_id": 8}
    objects = [
        record
        | {
            "session": UUID(record["session"]),  # type: ignore[arg-type]  # a text
            "paid": Decimal("12.5"),
            "opened": datetime(2025, 11, 21, tzinfo=UTC),
            "occurred_at": datetime(2025, 11, 21, tzinfo=UTC),
            "day": date(2025, 11, 21),
            "product": {"price": 3.0, "colour": "red", "made": date(1970, 1, 2)},
        },
        bare,
    ]
    decoder = ContractDecoder("Typed", Typed)
    for values in (raw(record, bare), objects):
        accepted, refused = decoder.decode(values, np.full(2, NOW_MS))
        assert refused == []
        assert decoder.fast is not None
        assert decoder.fast.columns(values)
        found = {
            name: column.tolist() if isinstance(column, np.ndarray) else column.to_pylist()
            for name, column in accepted.fields.items()
        }
        nan = float("nan")
        assert repr(found) == repr(
            {
                "user_id": [7.0, 8.0],
                "colour": ["blue", "red"],
                "size": [2.0, nan],
                "session": ["a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", None],
                "paid": [12.5, nan],
                "opened": [float(NOW_MS), nan],
                "day": [float(NOW_MS), nan],
                "tags": [["a", "b"], None],
                "product.price": [3.0, nan],
                "product.colour": ["red", None],
                "product.made": [86_400_000.0, nan],
            }
        )


def test_the_decoder_of_objects_refuses_what_json_could_not_say() -> None:
    """NaN, infinity and NUL are no values of a contract, in whatever format they come."""
    good = {"event_id": "e", "occurred_at": NOW_MS, "user_id": 7}
    bad: list[dict[str, Any]] = [
        {"product": {"price": float("inf")}},
        {"product": {"price": float("nan")}},
        {"tags": ["a\0"]},
        {"tags": [""]},
        {"event_id": "\0"},
        {"user_id": 1 << 60},
        {"user_id": True},
        {"user_id": 7.0},
        {"paid": Decimal("NaN")},
    ]
    decoder = ContractDecoder("Typed", Typed)
    accepted, refused = decoder.decode([good, *(good | each for each in bad)], np.full(10, NOW_MS))
    assert accepted.index.tolist() == [0]
    assert [at for at, _ in refused] == list(range(1, 10))


@pytest.mark.parametrize("contracts", [(Click, Like, Numbered)])
def test_any_records_are_somebodys_nobodys_or_dead_letters(contracts: Sequence[type[Event]]) -> None:
    """In any order and any chunks: features of a record never depend on what else is there."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    pool: list[Any] = [
        lambda n: click(n, user=rng.choice([n, "x", None, 1.5])),
        lambda n: click(n, at=rng.choice([S, S + 0.5, "2025-11-21T00:00:00Z", NOW_MS, None])),
        lambda n: {"kind": rng.choice(["like", "love", "loves", 1, True, None, 1.0]), "who": "u", "n": n, "at": NOW_MS},
        lambda n: {"kind": 1, "user_id": f"u{n}", "payload": rng.choice([None, 3, {"user": 5}])},
        lambda _: b"{" * rng.randrange(3) + b"}",
        lambda _: None,
    ]
    values = raw(*(rng.choice(pool)(n) for n in range(400)))
    alone = [decoded(contracts, [value]) for value in values]
    whole = decoded(contracts, values)
    assert whole.events + whole.unclaimed + len(whole.dead_letters) + whole.duplicates == 400
    assert whole.duplicates == 0
    assert [reason for _, reason in sorted(reasons(whole).items())] == [
        reason for each in alone for reason in reasons(each).values()
    ]
    assert [name for name, _, _ in happened(whole, "user")] == [
        name for each in alone for name, _, _ in happened(each, "user")
    ]
    assert whole.unclaimed == sum(each.unclaimed for each in alone)


def test_records_that_the_contract_itself_accepts_stand_beside_those_of_the_fast_decoder() -> None:
    """Where one of a chunk is odd, each is judged alone; times and identities are the record's for both."""
    odd = click(2) | {"payload": {"user": {"id": 8}, "item": 5}}
    decoder = Decoder(plan_of(Click), 1, HORIZON_MS)
    (checked,) = decoder.check_all([chunk(raw(click(1), odd, click(3)))])
    accepted = checked.events[0].accepted
    assert accepted.event_ids.to_pylist() == ["c1", "c2", "c3"]
    assert accepted.times_ms.tolist() == [NOW_MS] * 3
    assert accepted.fields["user_id"].tolist() == [4711, 8, 4711]
