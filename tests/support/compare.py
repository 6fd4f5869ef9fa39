"""Every user and item of a set of events: what is served against brute force."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests import oracle

Events = Mapping[str, Sequence[Mapping[str, Any]]]
"""Events by topic, each with its effective time `t` in ms, and fields."""

WINDOWS = ("10m", "1h", "24h", "7d")
COUNTS = {"impressions": "impressions", "clicks": "clicks", "likes": "likes"}


def by_key(events: Events, key: str) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Entity id to topic to its events."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for topic, many in events.items():
        for event in many:
            if event.get(key) is not None:
                found[event[key]][topic].append(event)
    return found


def expected_counts(view: str, own: Mapping[str, Sequence[Mapping[str, Any]]], query_ms: int) -> dict[str, int]:
    """The counts of a view over its windows."""
    return {
        f"{view}__{topic}_{window}": oracle.expected("count", own.get(topic, ()), query_ms, window)
        for topic in COUNTS
        for window in WINDOWS
    }


def expected_user(own: Mapping[str, Sequence[Mapping[str, Any]]], query_ms: int) -> dict[str, Any]:
    """Counts, prices and lists of one user."""
    clicks, likes = own.get("clicks", ()), own.get("likes", ())
    return {
        **expected_counts("user_activity", own, query_ms),
        "user_activity__price_max_7d": oracle.expected("max", clicks, query_ms, "7d", "price"),
        "user_history__clicked": oracle.expected("last_k", clicks, query_ms, field="item_id", k=20),
        "user_history__liked": oracle.expected("last_k", likes, query_ms, field="item_id", k=20),
        "user_taste__top_categories_7d": oracle.expected("top_k", clicks, query_ms, "7d", field="category", k=5),
    }


def expected_item(own: Mapping[str, Sequence[Mapping[str, Any]]], query_ms: int) -> dict[str, Any]:
    """Counts, popularity and last values of one item."""
    clicks = own.get("clicks", ())
    return {
        **expected_counts("item_activity", own, query_ms),
        "item_activity__popularity_24h": oracle.expected("decayed", clicks, query_ms, half_life="24h"),
        "item_activity__category": oracle.expected("last", clicks, query_ms, field="category"),
        "item_activity__price": oracle.expected("last", clicks, query_ms, field="price"),
    }


def differences(got: Mapping[str, Any], want: Mapping[str, Any]) -> list[str]:
    """What is not as it should be."""
    return [
        f"{name}: {got[name]!r} is not {value!r}" for name, value in want.items() if not oracle.close(got[name], value)
    ]


def batches(ids: Iterable[str], size: int) -> Iterable[list[str]]:
    """The ids in lists of at most `size`."""
    every = sorted(ids)
    return (every[start : start + size] for start in range(0, len(every), size))
