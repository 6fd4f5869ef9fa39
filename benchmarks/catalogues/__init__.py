"""Catalogues of a stated size, for `growth`: `benchmarks.catalogues.features_50` is one of 50 features.

Half of the features are a user's, half an item's; each half is so many measures over so many windows.
"""

from __future__ import annotations

from typing import Any, Final

from features.catalog.entities import item, user
from features.catalog.events import Click, Impression, Like
from headrace import agg, col, service, view

WINDOWS: Final = ("24h", "1h", "7d", "10m", "6h", "30m", "3d", "3h", "12h", "30d")


def declare(measures: int, windows: int) -> dict[str, Any]:
    """The declarations of a catalogue, by name: `2 * measures * windows` features in the service `ranking_v1`."""
    views: dict[str, Any] = {}
    for name, entity in (("UserActivity", user), ("ItemActivity", item)):
        body = dict(list(_measures(WINDOWS[:windows]).items())[:measures])
        views[name] = view(entity, owner="growth")(type(name, (), {"__doc__": "For growth.", **body}))
    return {**views, "ranking_v1": service("ranking_v1", *views.values(), owner="growth")}


def _measures(over: tuple[str, ...]) -> dict[str, Any]:
    return {
        "clicks": agg.count(Click, over=over),
        "impressions": agg.count(Impression, over=over),
        "likes": agg.count(Like, over=over),
        "ctr": agg.ratio(Click, Impression, over=over, prior=0.05, strength=40),
        "price_mean": agg.mean(Click, "price", over=over),
        "search_clicks": agg.count(Click, where=col("surface") == "search", over=over),
        "feed_clicks": agg.count(Click, where=col("surface") == "feed", over=over),
        "search_impressions": agg.count(Impression, where=col("surface") == "search", over=over),
        "feed_likes": agg.count(Like, where=col("surface") == "feed", over=over),
        "price_max": agg.max(Click, "price", over=over),
    }
