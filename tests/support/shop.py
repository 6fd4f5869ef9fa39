"""The declarations of a shop whose topics were there long before: see tests/integration/test_topics.py."""

from __future__ import annotations

from decimal import Decimal

from pydantic import AliasChoices, AliasPath, Field

from headrace import Entity, Event, agg, col, service, source, view

user = Entity("user", key="user_id", forget_after="90d")
item = Entity("item", key="item_id", forget_after="90d")


class Row(Event, topic="shop.interactions", envelope="debezium"):
    """What all tables of the shop's database have in common."""

    user_id: int = Field(validation_alias=AliasChoices("user_id", "customer"))
    item_id: int


class Click(Row, when={"source.table": "clicks"}):
    """Somebody opened an item."""

    price: Decimal | None = None


class Like(Row, when={"source.table": "likes"}):
    """Somebody likes an item."""


class Unlike(Row, when={"source.table": "likes", "op": "d"}):
    """Not any more."""


class Cart(Row, when={"source.table": "carts"}):
    """Something was put into the cart, or its number changed."""

    n: int


class Order(Row, when={"source.table": "orders"}, occurred_at=source.microseconds("after.ordered_at")):
    """Something was bought, when the row says."""

    price: Decimal


class Seen(Event, topic="shop.seen", format="avro", when={"kind": "view"}, event_id="id", occurred_at="at"):
    """An item was seen."""

    user_id: int = Field(validation_alias=AliasPath("who", "id"))
    item_id: int = Field(validation_alias=AliasPath("product", "id"))
    tags: list[str] | None = None
    surface: str | None = None


class Played(Event, topic="shop.played", format="protobuf", event_id="id", occurred_at="at"):
    """A film of an item was played."""

    user_id: int
    item_id: int
    seconds: float
    note: str | None = None


class Mailed(Event, topic="shop.mailed", envelope="cloudevents", when={"type": "mail.opened"}):
    """A mail was opened."""

    user_id: int
    item_id: int


class Rated(Event, topic="shop.rated", occurred_at=source.seconds("ts"), event_id="rating"):
    """An item was rated: ids are numbers, times are seconds."""

    user_id: int
    item_id: int
    stars: float = Field(ge=0, le=5)


class Scrolled(Event, topic="shop.scrolled", occurred_at="t", event_id=("user_id", "item_id", "t")):
    """Somebody scrolled past an item: there is no id, and the producer repeats itself."""

    user_id: int
    item_id: int


CONTRACTS = (Click, Like, Unlike, Cart, Order, Seen, Played, Mailed, Rated, Scrolled)


@view(user)
class UserShop:
    """What a user does."""

    clicks = agg.count(Click, over="7d")
    likes = agg.count(Like, over="7d")
    unlikes = agg.count(Unlike, over="7d")
    carts = agg.sum(Cart, "n", over="7d")
    spent = agg.sum(Order, "price", over="7d")
    seen = agg.count(Seen, over="7d")
    seen_by_tag = agg.count(Seen, over="7d", by="tags")
    searched = agg.count(Seen, where=col("surface") == "search", over="7d")
    played = agg.sum(Played, "seconds", over="7d")
    mailed = agg.count(Mailed, over="7d")
    rated = agg.mean(Rated, "stars", over="7d")
    scrolled = agg.count(Scrolled, over="7d")
    recent = agg.last_k(Click, "item_id", k=5)


@view(item)
class ItemShop:
    """What happens to an item."""

    clicks = agg.count(Click, over="7d")
    likes = agg.count(Like, over="7d")
    ordered = agg.count(Order, over="7d")
    seen = agg.count(Seen, over="7d")
    played = agg.count(Played, over="7d")
    mailed = agg.count(Mailed, over="7d")
    rated = agg.count(Rated, over="7d")
    scrolled = agg.count(Scrolled, over="7d")


shop_v1 = service("shop_v1", UserShop, ItemShop)
