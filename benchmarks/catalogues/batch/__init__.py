"""The shipped catalogue, and its ranking service with 20 batch features more (`views`)."""

from features.catalog import (
    ItemActivity,
    SellerActivity,
    UserActivity,
    UserHistory,
    UserItem,
    UserTaste,
    feed_v1,
    ranking_v1,
    seller_v1,
)
from headrace import given, service

ranking_batch_v1 = service(
    "ranking_batch_v1",
    UserActivity,
    UserTaste.top_categories,
    UserHistory,
    ItemActivity,
    UserItem,
    given("user_batch"),
    given("item_batch"),
    without=[ItemActivity.viewers["1h"], ItemActivity.viewers["24h"]],
    owner="ranking",
)

__all__ = ["SellerActivity", "feed_v1", "ranking_batch_v1", "ranking_v1", "seller_v1"]
