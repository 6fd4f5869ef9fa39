"""Features of a user."""

from features.catalog.entities import user
from features.catalog.events import Click, Impression, Like
from headrace import agg, col, derived, view
from headrace.types import Array

OVER = ["10m", "1h", "24h", "7d"]


@view(user, owner="ranking", tags={"tier": "1"})
class UserActivity:
    """What a user has been doing lately."""

    impressions = agg.count(Impression, over=OVER, doc="Items shown")
    clicks = agg.count(Click, over=OVER, doc="Items opened")
    likes = agg.count(Like, over=OVER, doc="Items liked")
    search_clicks = agg.count(Click, where=col("surface") == "search", over="24h", doc="Items opened from search")
    price_mean = agg.mean(Click, "price", over=["24h", "7d"], default=25.0, doc="Mean price of items opened")
    price_std = agg.std(Click, "price", over=["24h", "7d"], default=10.0, doc="Spread of the prices of items opened")
    price_max = agg.max(Click, "price", over="7d", doc="Dearest item opened")
    idle_s = agg.seconds_since(Click, doc="Seconds since the last item opened")

    @derived(clicks["10m"], clicks["1h"], doc="Clicks of ten minutes, an hour's worth, against the last hour's")
    def pace(ten: Array, hour: Array) -> Array:
        return 6 * ten / (hour + 1)

    @derived(clicks["24h"], impressions["24h"], doc="Share of the items shown in a day that were opened")
    def openness(clicks: Array, impressions: Array) -> Array:
        return (clicks + 1) / (impressions + 20)


@view(user, owner="ranking", tags={"tier": "1"})
class UserTaste:
    """What a user likes: by category and by seller."""

    category_clicks = agg.count(Click, by="category", over="7d", buckets=32, doc="Items opened, by category")
    category_affinity = agg.decayed(Click, by="category", half_life="7d", buckets=32, doc="Decayed clicks, by category")
    category_likes = agg.decayed(Like, by="category", half_life="7d", buckets=32, doc="Decayed likes, by category")
    top_categories = agg.top_k(Click, "category", 5, over="7d", buckets=32, doc="Categories opened most")
    seller_clicks = agg.count(Click, by="seller_id", over="7d", buckets=32, doc="Items opened, by seller")
    seller_affinity = agg.decayed(Click, by="seller_id", half_life="7d", buckets=32, doc="Decayed clicks, by seller")
    top_sellers = agg.top_k(Click, "seller_id", 5, over="7d", buckets=32, doc="Sellers opened most")


@view(user, owner="ranking")
class UserHistory:
    """The items that a user came across last."""

    clicked = agg.last_k(Click, "item_id", 20, doc="Last items opened, newest first")
    liked = agg.last_k(Like, "item_id", 20, doc="Last items liked, newest first")
