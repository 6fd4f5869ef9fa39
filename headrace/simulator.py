"""Simulated shoppers of a second-hand fashion marketplace, so that features have something to say.

Every shopper has a taste over categories, a few favourite sellers and a level of prices; every item a category, a
seller, a price and a quality that is not written on it. Shoppers come in sessions of several pages. A page shows items
of categories that the shopper likes, or ones that are popular; whether an item is opened depends on taste, seller,
price, quality, trend and its place on the page. Trends lift a few items of one category for some minutes.

Pure: no clock and no I/O. Equal seeds and calls give equal events.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CATEGORIES: Final = (
    "dresses", "sneakers", "coats", "jeans", "bags", "knitwear", "boots", "t-shirts", "jewellery", "skirts",
    "shirts", "sandals", "jackets", "scarves", "sportswear", "watches", "hats", "suits", "belts", "swimwear",
)  # fmt: skip
BRANDS: Final = ("Northloom", "Vela", "Maison Brune", "Kestrel", "Osier", "Talla", "Fjordwear", "Ponte", "Ardent")
SURFACES: Final = ("feed", "search", "similar")

SESSIONS: Final = 64
"""Shoppers who are there at the same time."""
PAGES_AT_ONCE: Final = 16
PAGE_ITEMS: Final = 10
LEAVE: Final = 0.12
"""The chance that a page was a session's last."""
TREND_MS: Final = 240_000
TRENDS: Final = 3
"""Trends at any time; each lasts `TREND_MS`, and they start one after the other."""
TREND_ITEMS: Final = 12
_TREND_SHOWN: Final = 12.0
_TREND_LIKED: Final = 1.2


class Marketplace:
    """A marketplace with its shoppers.

    Args:
        seed: of everything that is random.
        users: how many shoppers there are.
        items: how many pieces are on offer.
    """

    def __init__(self, seed: int, users: int = 2000, items: int = 1000) -> None:
        self._seed = seed
        self._random = random = np.random.default_rng(seed)
        kinds, sellers = len(CATEGORIES), max(2, items // 15)
        self.user_ids: Final = [f"u{n}" for n in range(users)]
        self.item_ids: Final = [f"i{n}" for n in range(items)]

        # Items stand by category, so that a category is a slice of the running sum of their weights.
        share = 1 / np.arange(1, kinds + 1) ** 0.7
        self._category = np.sort(random.choice(kinds, items, p=share / share.sum()))
        self._starts = np.searchsorted(self._category, np.arange(kinds + 1))
        self._seller = random.zipf(1.4, items) % sellers
        self._brand = random.integers(0, len(BRANDS), items)
        self._price = np.round(np.exp(random.normal(3.2 + random.normal(0, 0.4, kinds)[self._category], 0.5)), 2)
        self._quality = random.normal(0, 0.7, items)

        # Small alphas: most of a shopper's taste is in two or three categories.
        self._taste = random.dirichlet(np.full(kinds, 0.12), users)
        self._favourites = random.integers(0, sellers, (users, 4))
        self._budget = random.normal(3.2, 0.5, users)
        activity = 1 / np.arange(1, users + 1) ** 0.6
        self._activity = np.cumsum(random.permutation(activity / activity.sum()))

        self._present = self._arrivals(SESSIONS)
        self._trend_slot = -1
        self._lift = np.zeros(items)
        self._shown = np.zeros(items + 1)
        self._queue: deque[tuple[str, dict[str, Any]]] = deque()
        self._events = 0

    def __repr__(self) -> str:
        return f"<Marketplace seed={self._seed} users={len(self.user_ids)} items={len(self.item_ids)}>"

    def events(self, now_ms: int, n: int) -> list[tuple[str, dict[str, Any]]]:
        """The next `n` events as (topic, event), all at `now_ms`; an impression comes before its click and like.

        The topics are `impressions`, `clicks` and `likes`, the events plain dicts that their contracts accept.
        """
        while len(self._queue) < n:
            self._turn_pages(now_ms)
        found = [self._queue.popleft() for _ in range(n)]
        for _, event in found:
            self._events += 1
            event["event_id"] = f"sim-{self._seed}-{self._events}"
            event["occurred_at"] = now_ms
        return found

    def trending(self, now_ms: int) -> list[str]:
        """The items that a trend lifts at `now_ms`."""
        self._follow_trends(now_ms)
        return [self.item_ids[item] for item in np.flatnonzero(self._lift)]

    def _turn_pages(self, now_ms: int) -> None:
        """Some of the shoppers who are there look at a page each."""
        self._follow_trends(now_ms)
        random = self._random
        seats = random.choice(SESSIONS, PAGES_AT_ONCE, replace=False)
        users = self._present[seats]
        surfaces = random.choice(len(SURFACES), PAGES_AT_ONCE, p=(0.55, 0.3, 0.15))
        items = self._page(users, surfaces)
        clicked = random.random(items.shape) < self._open_chance(users, items)
        liked = clicked & (random.random(items.shape) < 0.04 + 0.22 * self._match(users, items))
        # Pages come in turns, place by place: sessions overlap as they would.
        for place in range(PAGE_ITEMS):
            for page in random.permutation(PAGES_AT_ONCE).tolist():
                item = int(items[page, place])
                if item in items[page, :place]:
                    continue
                event = self._event(int(users[page]), item, SURFACES[surfaces[page]])
                self._queue.append(("impressions", event))
                if clicked[page, place]:
                    self._queue.append(("clicks", dict(event)))
                if liked[page, place]:
                    self._queue.append(("likes", dict(event)))
        gone = seats[random.random(PAGES_AT_ONCE) < LEAVE]
        self._present[gone] = self._arrivals(len(gone))

    def _arrivals(self, n: int) -> Ints:
        drawn = np.searchsorted(self._activity, self._random.random(n) * self._activity[-1])
        arrived: Ints = np.minimum(drawn, len(self.user_ids) - 1).astype(np.int64)
        return arrived

    def _page(self, users: Ints, surfaces: Ints) -> Ints:
        """int[pages, places]: the items shown. A search stays in one category; half a feed is what is popular."""
        random = self._random
        shape = (len(users), PAGE_ITEMS)
        taste = np.cumsum(self._taste[users], axis=1)
        categories = (random.random(shape)[:, :, None] > taste[:, None, :-1]).sum(axis=2)
        categories[surfaces != 0] = categories[surfaces != 0, :1]
        low, high = self._shown[self._starts[categories]], self._shown[self._starts[categories + 1]]
        popular = (random.random(shape) < 0.5) & (surfaces == 0)[:, None] | (low == high)
        low, high = np.where(popular, 0.0, low), np.where(popular, self._shown[-1], high)
        drawn = np.searchsorted(self._shown, low + random.random(shape) * (high - low), side="right") - 1
        items: Ints = np.clip(drawn, 0, len(self.item_ids) - 1).astype(np.int64)
        return items

    def _match(self, users: Ints, items: Ints) -> Floats:
        """float[pages, places] in 0 to 1: how much of a shopper's taste is the item's category."""
        return np.sqrt(self._taste[users[:, None], self._category[items]])

    def _open_chance(self, users: Ints, items: Ints) -> Floats:
        favourite = (self._favourites[users][:, None, :] == self._seller[items][:, :, None]).any(axis=2)
        price_gap = np.log(self._price[items]) - self._budget[users][:, None]
        leaning = (
            -3.6
            + 3.0 * self._match(users, items)
            + 1.2 * favourite
            + self._quality[items]
            - 0.7 * price_gap**2
            + _TREND_LIKED * self._lift[items]
        )
        chance: Floats = 1 / (1 + np.exp(-leaning)) / (1 + 0.15 * np.arange(PAGE_ITEMS))
        return chance

    def _follow_trends(self, now_ms: int) -> None:
        """What is shown more, and liked more, for now: a function of the seed and the time alone."""
        step_ms = TREND_MS // TRENDS
        slot = now_ms // step_ms
        if slot == self._trend_slot:
            return
        self._trend_slot = slot
        self._lift = np.zeros(len(self.item_ids))
        for start in range(slot - TRENDS + 1, slot + 1):
            random = np.random.default_rng((self._seed, start))
            category = self._category[random.integers(len(self.item_ids))]
            members = np.arange(self._starts[category], self._starts[category + 1])
            self._lift[random.permutation(members)[:TREND_ITEMS]] = 1.0
        weights = np.exp(0.8 * self._quality) * (1 + _TREND_SHOWN * self._lift)
        self._shown = np.concatenate([[0.0], np.cumsum(weights)])

    def _event(self, user: int, item: int, surface: str) -> dict[str, Any]:
        event: dict[str, Any] = {
            "user_id": self.user_ids[user],
            "item_id": self.item_ids[item],
            "seller_id": f"s{self._seller[item]}",
            "category": CATEGORIES[self._category[item]],
            "price": float(self._price[item]),
            "surface": surface,
        }
        if item % 10:  # Who sells does not always know the brand.
            event["brand"] = BRANDS[self._brand[item]]
        return event
