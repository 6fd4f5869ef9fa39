"""What the stream computes, and a service that has ordinary features, too."""

from headrace import Entity, Event, agg, cross, derived, given, service, view
from headrace.types import Array

user = Entity("user", key="user_id", forget_after="90d")
item = Entity("item", key="item_id", forget_after="90d")


class Click(Event, topic="clicks"):
    user_id: str
    item_id: str
    category: str | None = None
    price: float | None = None


@view(user)
class UserActs:
    clicks = agg.count(Click, over=["1h", "24h"])
    tastes = agg.count(Click, over="24h", by="category")
    price_mean = agg.mean(Click, "price", over="24h")
    recent = agg.last_k(Click, "item_id", 5)

    @derived(clicks["24h"], given("user_profile:age"))
    def pace(clicks: Array, age: Array) -> Array:
        return clicks / age


@view(item)
class ItemActs:
    clicks = agg.count(Click, over=["1h", "24h"])


@cross(user, item)
class Fit:
    taste = UserActs.tastes["24h"].at(given("item_profile:category"))
    known = given("user_profile:favourites").contains(item)

    @derived(given("item_profile:price"), UserActs.price_mean["24h"])
    def price_ratio(price: Array, mean: Array) -> Array:
        return price / mean


ranking_v1 = service(
    "ranking_v1", UserActs, ItemActs, Fit, given("item_profile"), given("user_profile:age"), given("today")
)
