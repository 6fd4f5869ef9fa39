"""Features over contracts whose ids are numbers, whose elements are lists and whose fields are nested."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from msgspec import structs
from pydantic import AliasPath, BaseModel, Field

from features import agg, source
from features.changes import changes
from features.checks import DeclarationError
from features.compile import compile_plan
from features.events import Event
from features.expressions import col
from features.language import Entity, service, view
from features.plan import Plan
from headrace.testing import Scenario, events

user = Entity("user", key="user_id", forget_after="90d")
item = Entity("item", key="item_id", forget_after="90d")
name = Entity("name", key="who")


class Product(BaseModel):
    price: float
    brand: str | None = None


class Viewed(Event, topic="interactions", when={"type": "view"}, event_id=source.position):
    """Somebody looked at something."""

    user_id: int = Field(validation_alias=AliasPath("user", "id"))
    item_id: int
    tags: list[str] = Field([])
    product: Product | None = None


class Liked(Event, topic="interactions", when={"type": "like"}):
    """Somebody liked something."""

    user_id: int
    item_id: int


class Named(Event, topic="named"):
    who: str


@view(user)
class OfUser:
    """What a user does."""

    views = agg.count(Viewed, over=["1h", "24h"])
    by_tag = agg.count(Viewed, over="1h", by="tags")
    by_item = agg.count(Viewed, over="1h", by="item_id")
    recent = agg.last_k(Viewed, "item_id", k=3)
    last = agg.last(Viewed, "item_id")
    spent = agg.sum(Viewed, "product.price", over="1h", where=col("item_id") == 4711)
    brand = agg.last(Viewed, "product.brand")
    taste = agg.decayed(Viewed, by="tags", half_life="7d")
    likes = agg.count(Liked, over="1h")


@view(item)
class OfItem:
    views = agg.count(Viewed, over="1h")


@view(name)
class OfName:
    events = agg.count(Named, over="1h")


def plan(*more: Any) -> Plan:
    named = {"a": OfUser, "b": OfItem, "s": service("s", OfUser)}
    return compile_plan([named, {str(number): each for number, each in enumerate(more)}], "test", 4)


def test_an_event_counts_once_for_each_distinct_element_and_once_otherwise() -> None:
    """Whatever the order and however often an element stands there; with no element it is in no bucket."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    made, counts, n = [], Counter[str](), 0
    view_ = events(Viewed, user_id=7, item_id=1)
    for minute in range(40):
        tags = [rng.choice("abcd") for _ in range(rng.randrange(5))]
        made.append(view_(f"11:{minute:02}", tags=tags))
        counts.update(set(tags))
        n += 1
    found = Scenario(OfUser, *made).at("12:00", user_id=7)
    assert found["views_1h"] == n
    assert found["by_tag_1h"] == counts


def test_numbers_are_ids_by_their_decimal_text() -> None:
    view_ = events(Viewed, user_id=7)
    shop = Scenario(
        (OfUser, OfItem),
        view_("11:00", item_id=4711, product=Product(price=2.5, brand="x"), tags=["a", "a"]),
        view_("11:10", item_id=12, product=Product(price=9.0)),
        view_("11:20", item_id=4711, product=Product(price=1.0)),
        events(Liked, user_id=7, item_id=1)("11:30"),
    )
    found = shop.at("11:59", user_id="7")
    found.has(recent=["4711", "12"], last=4711, by_item_1h={"4711": 2, "12": 1}, spent_1h=3.5, likes_1h=1, brand="x")
    found.has(by_tag_1h={"a": 1})
    assert shop.at("11:59", item_id=12)["views_1h"] == 1


def test_ids_stay_whole_numbers_in_feast_where_all_contracts_have_them_so() -> None:
    assert {spec.name: spec.id_type for spec in plan(OfName).entities if spec.id_type} == {"user": "int", "item": "int"}


def test_contracts_of_one_topic_must_exclude_each_other() -> None:
    class Other(Event, topic="interactions", when={"kind": "view"}):
        user_id: int

    @view(user)
    class OfOther:
        n = agg.count(Other, over="1h")

    with pytest.raises(DeclarationError, match=r"topic interactions: .* a record could be both's; tell them apart"):
        plan(OfOther)


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        (lambda: agg.sum(Viewed, "tags", over="1h"), r"field='tags' is list\[str\]; it needs"),
        (lambda: agg.last(Viewed, "tags"), r"'tags' is list\[str\]"),
        (lambda: agg.last_k(Viewed, "tags", k=3), r"'tags' is list\[str\]; it needs a field of type str or int"),
        (lambda: agg.distinct(Viewed, "tags", over="1h"), r"'tags' is list\[str\]"),
        (lambda: agg.count(Viewed, over="1h", where=col("tags") == "a"), r"'tags' is list\[str\]"),
        (lambda: agg.count(Viewed, over="1h", by="product.price"), r"by='product.price' is float"),
        (lambda: agg.sum(Viewed, "product", over="1h"), "'product' is no field of Viewed; it has: .*product.price"),
    ],
)
def test_a_list_has_one_use(declared: Any, said: str) -> None:
    with pytest.raises(DeclarationError, match=said):

        @view(user)
        class Wrong:
            wrong = declared()


def said(before: Plan, **source_: Any) -> list[str]:
    """What applying a change of Viewed's source says."""
    specs = tuple(
        structs.replace(spec, source=structs.replace(spec.reads, **source_), fingerprint="other")
        if spec.name == "Viewed"
        else spec
        for spec in before.events
    )
    return [str(each) for each in changes(before, structs.replace(before, events=specs), 0)]


def test_a_plan_says_what_becomes_of_records_that_are_found_elsewhere() -> None:
    before = plan()
    (moved,) = said(before, paths={"user_id": (("who",),)})
    assert "breaks producers contract Viewed: user_id is looked for at who" in moved
    (unit,) = said(before, occurred_at=source.seconds("ts"))
    assert "the time is ts, numbers in s" in unit
    (more,) = said(before, topics=("interactions", "more"))
    assert more == "adds contract Viewed: topic more is read too, from its beginning"
    assert "written as avro" in said(before, format="avro")[0]
    liked, viewed = (str(each) for each in changes(None, before, 0) if each.what == "contract")
    begins = "the stream reads topic interactions from its beginning, of which its are those where type is"
    assert liked == f'adds contract Liked: {begins} "like"'
    repeats = "its events have no id but their place in Kafka: what a producer sends twice counts twice"
    assert viewed == f'adds contract Viewed: {begins} "view"; {repeats}'
    less = structs.replace(before, events=tuple(spec for spec in before.events if spec.name == "Liked"))
    (added,) = (str(each) for each in changes(less, before, 0) if each.what == "contract")
    assert "from where the stream is by now" in added


def test_a_plan_without_any_of_it_reads_as_before() -> None:
    """Plans that are applied, and their fingerprints, know nothing of it."""
    (spec,) = compile_plan([{"v": OfName}], "test", 4).events
    text = compile_plan([{"v": OfName}], "test", 4).encode()
    assert "source" not in text
    assert "id_type" not in text
    assert spec.topics == ("named",)
    assert Plan.decode(plan().encode()) == plan()
