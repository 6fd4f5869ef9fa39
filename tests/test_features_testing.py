"""Tests of features without servers: what a scenario says when it is not as expected."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime

import pytest

from features.catalog import Click, Like, UserActivity, UserItem, feed_v1, ranking_v1
from features.catalog.entities import item, user
from headrace import DeclarationError, cross, derived, given
from headrace.testing import Scenario, events, milliseconds
from headrace.types import Array

clicks = events(Click, user_id="u1", item_id="i1", category="shoes", price=9.5)


@cross(user, item)
class Suits:
    """Whether an item suits a user, by what others say of it."""

    fans = given("piece_profile:fans").contains(user)

    @derived(UserActivity.clicks["1h"], given("piece_profile:price"))
    def spent(clicks: Array, price: Array) -> Array:
        return clicks * price


def test_what_is_not_as_expected_is_said_with_the_events_and_the_window() -> None:
    """As a timeline: `o` is an event inside the window, `.` one outside."""
    shop = Scenario(UserActivity, clicks("11:48"), clicks("11:52", every="4m", times=2), clicks("12:00:00.500"))
    with pytest.raises(AssertionError) as raised:
        shop.at("12:00", user_id="u1").has(clicks_10m=3, clicks_1h=3)
    assert (
        str(raised.value)
        == """\
user_activity__clicks_10m of user u1 at 12:00:00 is 2, not 3
    11:48:00 . Click item_id=i1 category=shoes price=9.5
    11:50:00 - <- where window 10m begins
    11:52:00 o Click item_id=i1 category=shoes price=9.5
    11:56:00 o Click item_id=i1 category=shoes price=9.5
    12:00:00 - <- now, where window 10m ends
    12:00:00.500 . Click item_id=i1 category=shoes price=9.5"""
    )


def test_of_a_derived_feature_it_is_said_what_it_is_made_of() -> None:
    likes = events(Like, user_id="u1", item_id="i1")
    shop = Scenario(UserItem, clicks("11:00"), likes("11:30"))
    with pytest.raises(AssertionError) as raised:
        shop.at("12:00", user_id="u1", item_id="i1").has(price_ratio=2.0, clicked=True)
    said = str(raised.value)
    assert said.startswith("user_item__price_ratio of user u1, item i1 at 12:00:00 is 1.0, not 2.0")
    assert "\n    user_activity__price_mean_7d is 9.5\n        " in said
    assert "\n    item_activity__price is 9.5\n        11:00:00 o Click user_id=u1" in said
    assert "Like" not in said


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda shop: shop.at("noon", user_id="u1"), "'noon' is no time: write '12:00'"),
        (lambda shop: shop.at(datetime(2025, 1, 1), user_id="u1"), "has no time zone"),  # noqa: DTZ001  # the mistake
        (lambda shop: shop.at("12:00", user="u1"), "user is no entity's key; there are: item_id, user_id"),
        (lambda shop: shop.at("12:00", user_id="u1")["clicks_10"], "try .*clicks_10m"),
        (lambda shop: shop.at("12:00", user_id="u1", item_id="i1")["clicks_1h"], "item_activity__clicks_1h"),
        (lambda _: Scenario(Click), "is no view and no service"),
        (lambda _: clicks("12:00", every="soon"), "'soon' is not a duration"),
    ],
)
def test_a_mistake_is_said_with_what_would_be_right(wrong: object, said: str) -> None:
    with pytest.raises((ValueError, TypeError, KeyError), match=said):
        wrong(Scenario(ranking_v1))  # type: ignore[operator]  # each is a function


def test_a_duplicate_counts_once_and_time_can_go_back() -> None:
    (click,) = clicks("12:00")
    shop = Scenario((UserActivity, feed_v1), click, [click], clicks("-1d 12:00"))
    assert [shop.at(when, user_id="u1")["clicks_7d"] for when in ("12:30", "12:00", "-1d 12:00")] == [2, 1, 0]
    assert shop.at(datetime(2025, 11, 21, 13, tzinfo=UTC), user_id="u1")["clicks_1h"] == 1
    assert milliseconds("12:00") == click.occurred_at


def test_nobody_who_does_not_test_pays_for_it() -> None:
    """Servers and streams import the language, and nothing of this."""
    code = "import sys, headrace, headrace.cli, features.catalog; print([m for m in sys.modules if 'testing' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not [name for name in eval(done.stdout) if name.startswith(("features", "headrace"))]  # noqa: S307  # ours


def test_features_of_ordinary_views_are_given_by_name() -> None:
    """Nobody materializes anything for a test; without a value they are null."""
    shop = Scenario(Suits, clicks("11:58", times=3))
    profile = {"piece_profile__price": 2.5, "piece_profile__fans": ["u1"]}
    shop.at("12:00", user_id="u1", item_id="i1", **profile).has(spent=7.5, fans=True)
    moment = shop.at("12:00", user_id="u1", item_id="i1")
    assert (moment["spent"], moment["fans"]) == (None, False)
    with pytest.raises(TypeError, match="piece_profile__price"):
        shop.at("12:00", user_id="u1", piece_profile__cost=1)
    with pytest.raises(ValueError, match="price: 'dear' is no float"):
        shop.at("12:00", user_id="u1", item_id="i1", piece_profile__price="dear")["spent"]
    with pytest.raises(DeclarationError, match="given"):
        given("Not a name:price")
