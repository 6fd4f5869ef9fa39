"""Catalogues of a stated size, for `growth`: `benchmarks.catalogues.features_50` is one of 50 features.

Half of the features are a user's, half an item's; each half is so many measures over so many windows.
"""

from __future__ import annotations

from typing import Any, Final

from features.catalog.entities import item, user
from features.catalog.events import Click, Impression, Like
from headrace import Event, agg, col, service, view

Contracts = tuple[type[Event], type[Event], type[Event]]
"""Of clicks, impressions and likes."""

WINDOWS: Final = ("24h", "1h", "7d", "10m", "6h", "30m", "3d", "3h", "12h", "30d")


def declare(measures: int, windows: int, contracts: Contracts = (Click, Impression, Like)) -> dict[str, Any]:
    """The declarations of a catalogue, by name: `2 * measures * windows` features in the service `ranking_v1`."""
    views: dict[str, Any] = {}
    for name, entity in (("UserActivity", user), ("ItemActivity", item)):
        body = dict(list(_measures(WINDOWS[:windows], *contracts).items())[:measures])
        views[name] = view(entity, owner="growth")(type(name, (), {"__doc__": "For growth.", **body}))
    return {**views, "ranking_v1": service("ranking_v1", *views.values(), owner="growth")}


def _measures(over: tuple[str, ...], click: type[Event], shown: type[Event], like: type[Event]) -> dict[str, Any]:
    return {
        "clicks": agg.count(click, over=over),
        "impressions": agg.count(shown, over=over),
        "likes": agg.count(like, over=over),
        "ctr": agg.ratio(click, shown, over=over, prior=0.05, strength=40),
        "price_mean": agg.mean(click, "price", over=over),
        "search_clicks": agg.count(click, where=col("surface") == "search", over=over),
        "feed_clicks": agg.count(click, where=col("surface") == "feed", over=over),
        "search_impressions": agg.count(shown, where=col("surface") == "search", over=over),
        "feed_likes": agg.count(like, where=col("surface") == "feed", over=over),
        "price_max": agg.max(click, "price", over=over),
    }
