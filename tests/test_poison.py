"""A message that makes a derived function raise: the stream counts it, and only who asks for it hears of it."""

from __future__ import annotations

import httpx

from features import agg
from features.compile import compile_plan
from features.events import Event
from features.language import Entity, derived, service, view
from features.types import Array
from headrace.embedded import EmbeddedRedis
from tests.support.served import NOW_MS, SHARDS, Clock, Rows, served, settings_of

user = Entity("user", key="user_id")


class Bid(Event, topic="bids"):
    user_id: str
    price: float


@view(user)
class Bidding:
    bids = agg.count(Bid, over="1h")
    total = agg.sum(Bid, "price", over="1h")

    @derived(total["1h"])
    def rounded(total: Array) -> Array:  # of a view's columns, not of an object
        if (total > 100).any():
            message = f"{total.max():g} is too much"
            raise ArithmeticError(message)
        return total.round()


bidding_v1 = service("bidding_v1", Bidding)
PLAN = compile_plan([{"Bidding": Bidding, "bidding_v1": bidding_v1}], "headrace", SHARDS)


async def test_only_who_asks_for_what_it_spoils_hears_of_it() -> None:
    """Functions run when features are read. A stream that ran them would end at this message, again and again."""
    with EmbeddedRedis() as redis:
        rows = Rows(PLAN, redis.url, Clock())
        for user_id, price in (("u1", 1.4), ("u2", 1000.0), ("u1", 2.2)):
            rows.write("bids", [{"t": NOW_MS - 5, "user_id": user_id, "price": price}])
        async with served(settings_of(redis.url), PLAN, Clock()) as http:
            good, spoilt = await features_of(http, "u1"), await features_of(http, "u2")
    assert good.json()["features"] == {
        "bidding__bids_1h": 2,
        "bidding__total_1h": 3.6,
        "bidding__rounded": 4,
    }
    assert spoilt.status_code == 500
    assert "bidding__rounded: its function failed on 1 rows: ArithmeticError: 1000 is too much" in spoilt.text


async def features_of(http: httpx.AsyncClient, user_id: str) -> httpx.Response:
    """The answer about a user."""
    return await http.get(f"/v1/entities/user/{user_id}")
