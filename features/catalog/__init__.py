"""The shipped catalogue: a second-hand fashion marketplace. It uses Headrace as its users do."""

from features.catalog.cross import UserItem
from features.catalog.events import Click, Impression, Like
from features.catalog.item import ItemActivity, SellerActivity
from features.catalog.user import UserActivity, UserHistory, UserTaste
from headrace import service

ranking_v1 = service(
    "ranking_v1",
    UserActivity,
    UserTaste.top_categories,
    UserHistory,
    ItemActivity,
    UserItem,
    # The sketch can be a hundred times as long as the rest of an item's row, and the model does not use it.
    without=[ItemActivity.viewers["1h"], ItemActivity.viewers["24h"]],
    owner="ranking",
    tags={"model": "ranker"},
    doc="What the ranker reads for one user and a few hundred candidate items",
)
feed_v1 = service(
    "feed_v1",
    UserActivity,
    UserTaste,
    UserHistory,
    ItemActivity,
    owner="feed",
    doc="What the feed shows of one user or one item",
)
seller_v1 = service("seller_v1", SellerActivity, owner="marketplace", doc="What a seller's page shows")

__all__ = [
    "Click",
    "Impression",
    "ItemActivity",
    "Like",
    "SellerActivity",
    "UserActivity",
    "UserHistory",
    "UserItem",
    "UserTaste",
    "feed_v1",
    "ranking_v1",
    "seller_v1",
]
