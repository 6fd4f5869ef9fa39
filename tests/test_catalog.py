"""What the shipped features say: of a user, of an item, of the two."""

from __future__ import annotations

from features.catalog import (
    Click,
    Impression,
    ItemActivity,
    Like,
    SellerActivity,
    UserActivity,
    UserHistory,
    UserItem,
    UserTaste,
    ranking_v1,
)
from headrace.testing import Scenario, events

clicks = events(Click, user_id="ann", item_id="boots", category="shoes", seller_id="sam", price=40.0)
shown = events(Impression, user_id="ann", item_id="boots", category="shoes", seller_id="sam")
likes = events(Like, user_id="ann", item_id="boots", category="shoes", seller_id="sam")


# A user


def test_what_a_user_did_is_counted_in_four_windows() -> None:
    """An event leaves a window when the window's start, which moves in steps, has passed its tile."""
    shop = Scenario(UserActivity, clicks("12:00"), shown("12:00", every="1m", times=3), likes("12:04"))
    shop.at("12:05", user_id="ann").has(clicks_10m=1, impressions_10m=3, likes_10m=1, clicks_7d=1)
    shop.at("12:12", user_id="ann").has(clicks_10m=0, impressions_10m=1, clicks_1h=1)
    shop.at("13:10", user_id="ann").has(clicks_1h=0, clicks_24h=1)
    shop.at("+1d 13:00", user_id="ann").has(clicks_24h=0, clicks_7d=1)
    shop.at("+8d 12:00", user_id="ann").has(clicks_7d=0, likes_7d=0)


def test_only_clicks_from_search_are_search_clicks() -> None:
    shop = Scenario(UserActivity, clicks("12:00", surface="search"), clicks("12:01", surface="feed"), clicks("12:02"))
    shop.at("12:30", user_id="ann").has(search_clicks_24h=1, clicks_24h=3)


def test_prices_say_what_a_user_looks_for_and_have_a_default_before() -> None:
    shop = Scenario(UserActivity, clicks("12:00", price=10.0), clicks("12:01", price=30.0), clicks("12:02", price=None))
    shop.at("11:00", user_id="ann").has(price_mean_24h=25.0, price_std_24h=10.0, price_max_7d=None)
    shop.at("12:30", user_id="ann").has(price_mean_24h=20.0, price_std_24h=10.0, price_max_7d=30.0)
    shop.at("+2d 12:30", user_id="ann").has(price_mean_24h=25.0, price_mean_7d=20.0)


def test_idle_is_the_time_since_the_last_click_whatever_came_in_late() -> None:
    shop = Scenario(UserActivity, clicks("12:00"), clicks("11:00"))
    shop.at("11:59:59", user_id="ann").has(idle_s=3599.0)
    shop.at("12:00:30", user_id="ann").has(idle_s=30.0)
    shop.at("12:00", user_id="bob").has(idle_s=None)


def test_pace_is_about_one_for_who_clicks_evenly() -> None:
    """Six clicks an hour, evenly; then five more within a minute."""
    shop = Scenario(UserActivity, clicks("11:05", every="10m", times=6))
    shop.at("12:00", user_id="ann").has(pace=6 * 1 / (6 + 1))
    shop.add(clicks("11:58", every="10s", times=5))
    shop.at("12:00", user_id="ann").has(pace=6 * 6 / (11 + 1))


def test_openness_is_the_share_of_what_was_shown_and_one_in_twenty_of_nothing() -> None:
    shop = Scenario(UserActivity, shown("12:00", times=80), clicks("12:10", times=9))
    shop.at("11:00", user_id="ann").has(openness=1 / 20)
    shop.at("12:30", user_id="ann").has(openness=10 / 100)


def test_taste_is_by_category_and_by_seller_and_fades() -> None:
    """Half of an affinity is left after seven days; counts leave with their window."""
    shop = Scenario(UserTaste, clicks("12:00", times=2), clicks("12:01", category="hats", seller_id="eve"))
    shop.at("12:01:00.001", user_id="ann").has(
        category_clicks_7d={"shoes": 2.0, "hats": 1.0},
        seller_clicks_7d={"sam": 2.0, "eve": 1.0},
        top_categories_7d=["shoes", "hats"],
        top_sellers_7d=["sam", "eve"],
        category_likes={},
    )
    later = shop.at("+7d 12:01", user_id="ann")
    assert round(later["category_affinity"]["hats"], 6) == 0.5
    shop.at("+9d 12:00", user_id="ann").has(category_clicks_7d={}, top_categories_7d=[])


def test_history_is_the_last_twenty_items_each_once_newest_first() -> None:
    many = [clicks("12:00", item_id="boots")]
    many += [clicks(f"12:{number:02}", item_id=f"item{number}") for number in range(1, 21)]
    shop = Scenario(UserHistory, *many)
    assert shop.at("12:30", user_id="ann")["clicked"] == [f"item{number}" for number in range(20, 0, -1)]
    shop.add(clicks("12:40", item_id="item3"))
    assert shop.at("12:45", user_id="ann")["clicked"][:3] == ["item3", "item20", "item19"]


# An item


def test_rates_start_at_what_is_usual_and_move_with_what_is_seen() -> None:
    """One in twenty is opened, with the weight of 40 views; one in ten of those liked, with that of 20 clicks."""
    shop = Scenario(ItemActivity, shown("12:00", times=60), clicks("12:01", times=8))
    shop.at("11:00", item_id="boots").has(ctr_24h=0.05, like_rate_24h=0.1)
    shop.at("12:30", item_id="boots").has(ctr_24h=(8 + 0.05 * 40) / (60 + 40), like_rate_24h=(0 + 0.1 * 20) / (8 + 20))


def test_an_item_is_what_it_was_last_seen_as_and_viewers_count_once() -> None:
    shop = Scenario(ItemActivity, clicks("12:00"), clicks("12:05", price=30.0))
    shop.add(clicks("12:06", user_id="bob", price=None))
    shop.at("12:01", item_id="boots").has(price=40.0, category="shoes", seller="sam", viewers_1h=1)
    shop.at("12:30", item_id="boots").has(price=30.0, category="shoes", viewers_1h=2, clicks_1h=3)
    shop.at("12:30", item_id="hat").has(price=None, category=None, viewers_1h=0)


def test_popularity_halves_in_its_half_life() -> None:
    shop = Scenario(ItemActivity, clicks("12:00", every="1s", times=1))
    shop.at("12:30", item_id="boots").has(popularity_30m=0.5, popularity_24h=0.5 ** (1 / 48))
    shop.at("13:00", item_id="boots").has(popularity_30m=0.25)


def test_trend_is_the_last_hour_against_the_days_hours() -> None:
    shop = Scenario(ItemActivity, clicks("11:30", times=5))
    shop.at("11:00", item_id="boots").has(trend=1.0)
    shop.at("12:00", item_id="boots").has(trend=(5 + 1) / (5 / 24 + 1))


def test_a_seller_is_known_by_all_their_items() -> None:
    shop = Scenario(SellerActivity, clicks("12:00"), clicks("12:10", item_id="hat", category="hats", price=20.0))
    shop.at("12:20", seller_id="sam").has(
        clicks_1h=2, buyers_24h=1, price_mean_7d=30.0, top_categories_7d=["hats", "shoes"], idle_s=600.0
    )


# Both


def test_what_a_user_and_an_item_have_to_do_with_each_other() -> None:
    """The item's category and seller are those of its own clicks, whoever made them."""
    of_others = clicks("11:00", user_id="bob", item_id="pumps", price=60.0)
    shop = Scenario(UserItem, clicks("11:30"), clicks("11:40", price=20.0), likes("11:50"), of_others)
    shop.at("12:00", user_id="ann", item_id="pumps").has(
        category_clicks=2.0, clicked=False, liked=False, price_ratio=60 / 30, price_deviation=(60 - 30) / (10 + 1)
    )
    shop.at("12:00", user_id="ann", item_id="boots").has(clicked=True, liked=True, price_ratio=20 / 30)
    shop.at("12:00", user_id="ann", item_id="unknown").has(category_clicks=0.0, price_ratio=None)


def test_a_cold_item_is_what_the_request_says() -> None:
    shop = Scenario(UserItem, clicks("11:30", times=2))
    shop.at("12:00", user_id="ann", item_id="new", item__category="shoes", item__price=80.0).has(
        category_clicks=2.0, price_ratio=2.0
    )


def test_nobody_yet_is_ranked_by_what_is_known_of_the_items() -> None:
    """A user never seen, a popular item: every feature of the ranker has a value or is null, and none fails."""
    everything = Scenario(ranking_v1, clicks("12:00", times=3)).at("12:10", user_id="new", item_id="boots")
    everything.has(
        user_activity__clicks_7d=0, item_activity__clicks_7d=3, user_item__clicked=False, price_ratio=40 / 25
    )
    assert len(everything) == 58
