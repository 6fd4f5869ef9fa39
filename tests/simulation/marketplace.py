"""What the simulated stream computes, a log of its events, and what each feature must be: by brute force."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from typing import Any, Final, NamedTuple

import msgspec

from features import agg
from features.aggregations import Count, LastK, Sum
from features.compile import compile_plan
from features.events import Event
from features.language import Entity, view
from features.plan import Plan
from store.completeness import Completeness
from store.forgotten import Forgotten, read_forgotten
from store.keys import Keyspace
from store.layouts import Layouts
from store.reader import Reader
from streams.chunk import Partition
from tests import oracle
from tests.support.log import Message

replace = msgspec.structs.replace
HORIZON_MS: Final = 60_000
FORGOTTEN_MS: Final = 3 * 86_400_000
"""The age of some events: whenever a worker comes to them, `forget_after` has passed, and for all others it has not."""
BASE_MS: Final = 1_763_683_200_000
USERS, ITEMS, SELLERS = (tuple(f"{kind}{n}" for n in range(count)) for kind, count in (("u", 4), ("i", 3), ("s", 2)))
PARTITIONS: Final = (Partition("clicks", 0), Partition("clicks", 1), Partition("likes", 0))

IDS: Final = {"user": USERS, "item": ITEMS, "seller": SELLERS}
WINDOWS: Final = ("2m", "5m", "3h", "24h")
"""Shorter and longer than those that there are, and with finer and coarser hops."""
MORE: Final = (
    Count(name="many", event="Click", over=("1m", "10m")),
    Sum(name="spent", event="Click", field="price", over=("10m", "1h")),
    LastK(name="met", event="Click", field="user_id", k=3),
)
SKEW_MS: Final = 3_000

user = Entity("user", key="user_id", forget_after="2d")
item = Entity("item", key="item_id")
seller = Entity("seller", key="seller_id", forget_after="2d")


class Click(Event, topic="clicks"):
    user_id: str
    item_id: str
    seller_id: str | None = None
    category: str | None = None
    price: float | None = None


class Like(Event, topic="likes"):
    user_id: str
    item_id: str


@view(user)
class Activity:
    clicks = agg.count(Click, over=["10m", "1h"])
    likes = agg.count(Like, over="all")
    price = agg.mean(Click, "price", over="1h")
    taste = agg.decayed(Click, by="category", half_life="1h", buckets=8)
    seen = agg.last_k(Click, "item_id", 2)
    recent = agg.sequence(Click, ["category", "price"], 3, over="1h")
    first = agg.first(Click, "item_id", over="1h")
    began = agg.first_k(Click, "item_id", 2)
    trend = agg.delta(Click, over="10m")


@view(item)
class Popularity:
    clicks = agg.count(Click, over=["1m", "10m"])
    fans = agg.distinct(Like, "user_id", over="10m")
    price = agg.quantile(Click, "price", [0.5], over="10m")


@view(seller)
class Sales:
    top = agg.top_k(Click, "category", 2, over="24h", buckets=8)
    sold = agg.sum(Click, "price", over="all")


@cache
def plan_of(shards: int) -> Plan:
    """The plan with so many shards of each kind of entity."""
    return compile_plan([{"Activity": Activity, "Popularity": Popularity, "Sales": Sales}], "sim", shards)


def varied(shards: int, rng: random.Random) -> Plan:
    """The plan with some features more, so that what it has anyway goes on in rows of other layouts."""
    views = []
    for each in plan_of(shards).views:
        specs = [
            replace(spec, over=(*spec.over, *rng.sample(WINDOWS, rng.randint(0, 2))))
            if isinstance(spec, Count) and spec.over != ("all",)
            else spec
            for spec in each.features
        ]
        specs += rng.sample(MORE, rng.randint(0, 2))
        views.append(replace(each, features=tuple(specs)))
    return replace(plan_of(shards), views=tuple(views))


class Record(NamedTuple):
    """A record, when the broker has it, and the event in it if its contract accepts it."""

    partition: Partition
    message: Message
    arrives_ms: int
    event: dict[str, Any] | None


def a_log(rng: random.Random) -> list[Record]:
    """Records in order of arrival: with holes between offsets, malformed ones, late events, and producers' retries.

    A retry comes within the dedupe horizon (also of another retry), beyond it, or to another partition.
    """
    at_ms = BASE_MS
    disorder_ms = rng.choice([0, 0, 1_000, HORIZON_MS // 2])
    next_offset = {partition: rng.choice([0, 0, 5]) for partition in PARTITIONS}
    steps_ms = rng.choices([0, 30, 700, 5_000, 20_000, 61_000, 900_000], [3, 5, 5, 5, 4, 2, rng.choice([0, 1])], k=90)
    records: list[Record] = []
    for number in range(rng.randint(20, 60)):
        at_ms += steps_ms[number]
        partition = rng.choice(PARTITIONS)
        event: dict[str, Any] | None = None
        again = [each for each in records[-12:] if each.event and each.partition.topic == partition.topic]
        if again and rng.random() < 0.3:
            event = rng.choice(again).event
        elif rng.random() < 0.92:
            event = _an_event(rng, partition.topic, f"e{number}", at_ms)
        value = json.dumps(event).encode() if event else rng.choice([None, b"bad", b'{"event_id": 3}'])
        offset = next_offset[partition] + rng.choice([0, 0, 0, 0, 1, 3])
        next_offset[partition] = offset + 1
        message = Message(offset, value, at_ms - rng.randint(0, disorder_ms))
        records.append(Record(partition, message, at_ms, event))
    return records


def _an_event(rng: random.Random, topic: str, event_id: str, at_ms: int) -> dict[str, Any]:
    occurred_ms = at_ms - rng.choice([0, 3, 3, 900, 90_000, 1_000_000, FORGOTTEN_MS]) + rng.choice([0, 0, 0, 5_000])
    event: dict[str, Any] = {"event_id": event_id, "occurred_at": occurred_ms}
    event |= {"user_id": rng.choice(USERS), "item_id": rng.choice(ITEMS)}
    if topic == "clicks":
        event |= {"seller_id": rng.choice([None, *SELLERS]), "category": rng.choice([None, "a", "b", "ü"])}
        event["price"] = rng.randrange(1, 500) / 4
    return event


def counted(records: Sequence[Record]) -> dict[str, list[dict[str, Any]]]:
    """The events that count, by topic: not too old, and with no earlier record of their partition, id and horizon."""
    found: dict[str, list[dict[str, Any]]] = {"clicks": [], "likes": []}
    earlier: dict[tuple[Partition, str], list[int]] = {}
    for record in records:
        if record.event is not None:
            ms = record.message.ms
            seen = earlier.setdefault((record.partition, record.event["event_id"]), [])
            t = min(record.event["occurred_at"], ms)
            if not any(ms - each <= HORIZON_MS for each in seen) and t > BASE_MS - 2 * 86_400_000:
                found[record.partition.topic].append({**record.event, "t": t})
            seen.append(ms)
    return found


def expected(records: Sequence[Record], forgotten: Forgotten, query_ms: int) -> dict[tuple[str, str], Any]:
    """Every feature of every entity, by id and name."""
    events = counted(records)
    found: dict[tuple[str, str], Any] = {}

    def value(id_: str, name: str, agg: str, own: list[dict[str, Any]], *arguments: Any, **more: Any) -> None:
        found[id_, name] = oracle.expected(agg, own, query_ms, *arguments, **more)

    for id_ in USERS:
        clicks, likes = (_of(events[topic], "user", id_, forgotten) for topic in ("clicks", "likes"))
        value(id_, "activity__clicks_10m", "count", clicks, "10m")
        value(id_, "activity__clicks_1h", "count", clicks, "1h")
        value(id_, "activity__likes_all", "count", likes)
        value(id_, "activity__price_1h", "mean", clicks, "1h", "price")
        value(id_, "activity__seen", "last_k", clicks, field="item_id", k=2)
        value(id_, "activity__first_1h", "first", clicks, "1h", "item_id")
        value(id_, "activity__began", "first_k", clicks, field="item_id", k=2)
        value(id_, "activity__trend_10m", "delta", clicks, "10m", before="10m")
        for of in ("category", "price", "occurred_at"):
            options = {"k": 3, "fields": ("category", "price"), "of": of}
            value(id_, f"activity__recent_{of}_1h", "sequence", clicks, "1h", **options)
        found[id_, "activity__taste"] = {
            name: oracle.expected("decayed", [each for each in clicks if each["category"] == name], query_ms)
            for name in sorted({each["category"] for each in clicks} - {None})
        }
    for id_ in ITEMS:
        clicks, likes = (_of(events[topic], "item", id_, forgotten) for topic in ("clicks", "likes"))
        value(id_, "popularity__clicks_1m", "count", clicks, "1m")
        value(id_, "popularity__clicks_10m", "count", clicks, "10m")
        value(id_, "popularity__fans_10m", "distinct", likes, "10m", "user_id")
        value(id_, "popularity__price_p50_10m", "quantile", clicks, "10m", "price", q=0.5)
    for id_ in SELLERS:
        clicks = _of(events["clicks"], "seller", id_, forgotten)
        value(id_, "sales__top_24h", "top_k", clicks, "24h", "category", k=2)
        value(id_, "sales__sold_all", "sum", clicks, field="price")
    return found


def more(records: Sequence[Record], forgotten: Forgotten, plan: Plan, query_ms: int) -> dict[tuple[str, str], Any]:
    """As `expected`: the features that a plan has beside."""
    events = counted(records)
    found: dict[tuple[str, str], Any] = {}
    for name in plan.features.keys() - plan_of(plan.shards).features.keys():
        feature = plan.features[name]
        spec, window = feature.spec, feature.window
        assert isinstance(spec, Count | Sum | LastK)
        assert window is not None
        (entity,) = feature.entities
        agg = {Count: "count", Sum: "sum", LastK: "last_k"}[type(spec)]
        for id_ in IDS[entity]:
            own = _of(events["clicks"], entity, id_, forgotten)
            k = spec.k if isinstance(spec, LastK) else 0
            found[id_, name] = oracle.expected(agg, own, query_ms, window.name, spec.field, k)
    return found


def served(
    mget: Any, plan: Plan, layouts: Layouts, query_ms: int
) -> tuple[dict[tuple[str, str], Any], dict[str, int | None]]:
    """As `expected`, and `more`: what the rows in Redis give; and what of it is said to be incomplete."""
    found: dict[tuple[str, str], Any] = {}
    completeness = Completeness(plan)
    # Clocks of workers, which say when they took a plan up, are wrong by seconds.
    completeness.learn(mget(completeness.keys), query_ms - 2 * SKEW_MS)
    for entity, ids in IDS.items():
        key = f"{entity}_id"
        names = [name for name, each in plan.features.items() if each.entities == (entity,)]
        columns = Reader(plan, names, layouts).read(mget, {key: list(ids)}, query_ms, full=True).to_dict()
        for name in names:
            found |= {(id_, name): value for id_, value in zip(ids, columns[name], strict=True)}
    return found, completeness.incomplete(plan.features, query_ms - 2 * SKEW_MS)


def differences(records: Sequence[Record], mget: Any, plans: Sequence[Plan], query_ms: int) -> list[str]:
    """What is served by the last of several plans, and is not what it must be."""
    plan = plans[-1]
    forgotten = read_forgotten(_Mget(mget), Keyspace.of(plan), IDS)
    want = expected(records, forgotten, query_ms) | more(records, forgotten, plan, query_ms)
    got, incomplete = served(mget, plan, Layouts(plan, lambda first, last: plans[first : last + 1]), query_ms)
    assert want.keys() == got.keys(), want.keys() ^ got.keys()
    wrong = [name for name in incomplete if name in plans[0].features]
    assert not wrong, f"said to be incomplete, and never changed: {wrong}"
    return [
        f"{id_} {name}: {got[id_, name]!r} is not {one!r}"
        for (id_, name), one in want.items()
        if name not in incomplete and not _same(got[id_, name], one)
    ]


def _of(events: Sequence[dict[str, Any]], entity: str, id_: str, forgotten: Forgotten) -> list[dict[str, Any]]:
    """Those of an entity since it was forgotten."""
    since_ms = forgotten.get(entity, {}).get(id_.encode(), -1)
    return [each for each in events if each[f"{entity}_id"] == id_ and each["t"] > since_ms]


class _Mget(NamedTuple):
    """A client that can do no more."""

    mget: Any


def _same(got: Any, want: Any) -> bool:
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(oracle.close(got[key], want[key]) for key in want)
    return oracle.close(got, want)
