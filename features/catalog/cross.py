"""What a user and an item have to do with each other."""

from features.catalog.entities import item, user
from features.catalog.item import ItemActivity
from features.catalog.user import UserActivity, UserHistory, UserTaste
from headrace import cross, derived
from headrace.types import Array


@cross(user, item, owner="ranking")
class UserItem:
    """This user and this item."""

    category_clicks = UserTaste.category_clicks["7d"].at(ItemActivity.category, doc="Clicks in the item's category")
    category_affinity = UserTaste.category_affinity.at(ItemActivity.category, doc="Taste for the item's category")
    category_likes = UserTaste.category_likes.at(ItemActivity.category, doc="Decayed likes in the item's category")
    seller_affinity = UserTaste.seller_affinity.at(ItemActivity.seller, doc="Taste for the item's seller")
    clicked = UserHistory.clicked.contains(item, doc="Among the last 20 that the user opened")
    liked = UserHistory.liked.contains(item, doc="Among the last 20 that the user liked")

    @derived(UserActivity.price_mean["7d"], ItemActivity.price, doc="The item's price against the user's mean")
    def price_ratio(mean: Array, price: Array) -> Array:
        return price / mean

    @derived(
        UserActivity.price_mean["7d"],
        UserActivity.price_std["7d"],
        ItemActivity.price,
        doc="The item's price in the user's standard deviations from the user's mean",
    )
    def price_deviation(mean: Array, std: Array, price: Array) -> Array:
        return (price - mean) / (std + 1)
