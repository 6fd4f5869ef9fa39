"""Features of an item, and of who sells it."""

from features.catalog.entities import item, seller
from features.catalog.events import Click, Impression, Like
from headrace import agg, derived, view
from headrace.types import Array

OVER = ["10m", "1h", "24h", "7d"]


@view(item, owner="ranking", tags={"tier": "1"})
class ItemActivity:
    """What happens to an item."""

    impressions = agg.count(Impression, over=OVER, doc="Times shown")
    clicks = agg.count(Click, over=OVER, doc="Times opened")
    likes = agg.count(Like, over=OVER, doc="Times liked")
    ctr = agg.ratio(Click, Impression, over=OVER, prior=0.05, strength=40, doc="Smoothed click-through rate")
    like_rate = agg.ratio(Like, Click, over=OVER, prior=0.1, strength=20, doc="Smoothed likes a click")
    viewers = agg.distinct(Click, "user_id", over=["1h", "24h"], doc="Users who opened it")
    popularity_30m = agg.decayed(Click, half_life="30m", doc="Decayed clicks, half-life 30 minutes")
    popularity_24h = agg.decayed(Click, half_life="24h", doc="Decayed clicks, half-life a day")
    category = agg.last(Click, "category", doc="Category, as last seen")
    seller = agg.last(Click, "seller_id", doc="Seller, as last seen")
    price = agg.last(Click, "price", doc="Price, as last seen")

    @derived(clicks["1h"], clicks["24h"], doc="Last hour against the day's hourly mean; 1 is steady")
    def trend(hour: Array, day: Array) -> Array:
        return (hour + 1) / (day / 24 + 1)


@view(seller, owner="marketplace")
class SellerActivity:
    """What happens to a seller's items."""

    impressions = agg.count(Impression, over=["1h", "24h", "7d"], doc="Times shown")
    clicks = agg.count(Click, over=["1h", "24h", "7d"], doc="Times opened")
    likes = agg.count(Like, over=["1h", "24h", "7d"], doc="Times liked")
    ctr = agg.ratio(Click, Impression, over=["24h", "7d"], prior=0.05, strength=100, doc="Smoothed click-through rate")
    buyers = agg.distinct(Click, "user_id", over=["24h", "7d"], doc="Users who opened one of them")
    price_mean = agg.mean(Click, "price", over="7d", doc="Mean price of items opened")
    top_categories = agg.top_k(Click, "category", 5, over="7d", doc="Categories opened most")
    idle_s = agg.seconds_since(Click, doc="Seconds since the last click")
