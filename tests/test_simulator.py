"""Simulated shoppers keep to their contracts, to their seed, and to their tastes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from features.catalog import Click, Impression, Like
from headrace.simulator import CATEGORIES, PAGE_ITEMS, TREND_MS, Marketplace

NOW_MS = 1_763_719_200_000
CONTRACTS = {contract.topic: contract for contract in (Impression, Click, Like)}
Topical = tuple[str, dict[str, Any]]


def ten_minutes(seed: int) -> list[Topical]:
    """40 events every 0.6 seconds, for ten minutes."""
    marketplace = Marketplace(seed)
    return [event for step in range(1000) for event in marketplace.events(NOW_MS + step * 600, 40)]


@pytest.fixture(scope="module", params=[7, 8])
def events(request: pytest.FixtureRequest) -> list[Topical]:
    return ten_minutes(request.param)


def test_equal_seeds_give_equal_events() -> None:
    one, same, other = Marketplace(7), Marketplace(7), Marketplace(8)
    for at in (NOW_MS, NOW_MS + 5, NOW_MS + TREND_MS):
        expected = one.events(at, 500)
        assert same.events(at, 500) == expected
        assert other.events(at, 500) != expected


def test_every_event_keeps_its_contract(events: list[Topical]) -> None:
    for topic, event in events:
        CONTRACTS[topic].model_validate(event)
    assert len({event["event_id"] for _, event in events}) == len(events)
    for name in ("seller_id", "category", "brand", "price", "surface"):
        assert sum(name in event for _, event in events) > 0.8 * len(events), name


def test_clicks_follow_impressions_and_likes_follow_clicks(events: list[Topical]) -> None:
    seen: dict[str, set[tuple[str, str]]] = {topic: set() for topic in CONTRACTS}
    before = {"clicks": "impressions", "likes": "clicks"}
    for topic, event in events:
        pair = event["user_id"], event["item_id"]
        assert topic not in before or pair in seen[before[topic]]
        seen[topic].add(pair)
    topics = Counter(topic for topic, _ in events)
    assert 0.03 < topics["clicks"] / topics["impressions"] < 0.25
    assert 0.05 < topics["likes"] / topics["clicks"] < 0.5


def test_a_shopper_opens_what_is_to_their_taste(events: list[Topical]) -> None:
    """Most of a busy shopper's clicks are in their two best categories of twenty; all shoppers' together are not."""
    clicks = [event for topic, event in events if topic == "clicks"]
    busiest = [user for user, _ in Counter(event["user_id"] for event in clicks).most_common(30)]
    by_user = [Counter(event["category"] for event in clicks if event["user_id"] == user) for user in busiest]
    assert sum(map(share_of_two, by_user)) / len(by_user) > 0.6
    by_all = Counter(event["category"] for event in clicks)
    assert share_of_two(by_all) < 0.45
    assert len(by_all) == len(CATEGORIES)


def share_of_two(categories: Counter[str]) -> float:
    return sum(n for _, n in categories.most_common(2)) / categories.total()


def test_shoppers_come_in_sessions(events: list[Topical]) -> None:
    """Who is there looks at several pages: in a minute, more than two pages of items, while most others see none."""
    minute = [event for topic, event in events[:4000] if topic == "impressions"]
    shown = Counter(event["user_id"] for event in minute)
    assert sum(shown.values()) / len(shown) > 2 * PAGE_ITEMS
    assert len(shown) < 1000


def test_trending_items_are_opened_more(events: list[Topical]) -> None:
    seed = int(events[0][1]["event_id"].split("-")[1])
    marketplace = Marketplace(seed)
    step_ms = 30_000
    lifted, all_items = 0, 0
    for start in range(NOW_MS, NOW_MS + 600_000, step_ms):
        trending = set(marketplace.trending(start))
        clicked = [
            event["item_id"]
            for topic, event in events
            if topic == "clicks" and start <= event["occurred_at"] < start + step_ms
        ]
        lifted += sum(item in trending for item in clicked)
        all_items += len(clicked)
        share_of_items = len(trending) / len(marketplace.item_ids)
        assert share_of_items < 0.05
    assert lifted > 5 * 0.04 * all_items


def test_trends_pass() -> None:
    marketplace = Marketplace(7)
    now, later = set(marketplace.trending(NOW_MS)), set(marketplace.trending(NOW_MS + 2 * TREND_MS))
    assert now
    assert now != later


def test_the_first_places_of_a_page_are_opened_most() -> None:
    """Position bias: the first of ten places is opened more than the last, though what stands there is no better."""
    marketplace = Marketplace(7)
    random_page = marketplace._random.integers(0, 1000, (5000, PAGE_ITEMS))
    chance = marketplace._open_chance(marketplace._random.integers(0, 2000, 5000), random_page).mean(axis=0)
    assert chance[0] > 1.5 * chance[-1]
