"""A marketplace's events, block by block: what the benchmarks fill Kafka with. Equal seeds give equal events.

75 % impressions, 20 % clicks, 5 % likes. Items are drawn by Zipf's law (exponent 1) within a category; seven in ten
events are in one of the user's three favourite categories. Users are drawn by rank to the power -0.5, so that the
busiest tenth sends a third of the events; a seller's share of the items falls with its rank to the power -0.7. Every
field is filled, and a session's id, which no contract asks for, rides along: about 240 bytes of JSON an event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import orjson
import pyarrow as pa
from confluent_kafka import Producer
from numpy.typing import NDArray

from headrace.simulator import BRANDS, CATEGORIES, SURFACES

TOPICS: Final = ("impressions", "clicks", "likes")
SHARES: Final = (0.75, 0.20, 0.05)
BLOCK: Final = 50_000
_SURFACE_SHARES: Final = (0.55, 0.30, 0.15)
_FAVOURITES: Final = 3
_LOYALTY: Final = 0.7

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Block:
    """Events in order of time: of which topic (index into `TOPICS`), user, item and surface, and when."""

    topics: Ints
    users: Ints
    items: Ints
    surfaces: Ints
    times_ms: Ints


class Traffic:
    """Who there is and what is on offer, and the events between them.

    Args:
        users, items: how many; their ids are `u0`, `u1`, … and `i0`, `i1`, …
        seed: of everything that is random.
        user_skew, item_skew: the exponents of their distributions; 0 if all are alike.
    """

    def __init__(
        self,
        users: int = 100_000,
        items: int = 50_000,
        seed: int = 7,
        *,
        user_skew: float = 0.5,
        item_skew: float = 1.0,
    ) -> None:
        self._random = random = np.random.default_rng(seed)
        self._seed = seed
        self._sent = 0
        kinds = len(CATEGORIES)
        # Items stand by category, so that a category is a slice of the running sum of their weights.
        share = 1 / np.arange(1, kinds + 1) ** 0.7
        self._category = np.sort(random.choice(kinds, items, p=share / share.sum()))
        starts = np.searchsorted(self._category, np.arange(kinds + 1))
        ranks = [np.arange(1, end - start + 1) for start, end in pairwise(starts)]
        weights = np.concatenate(
            [
                part * rank**-item_skew / sum(rank**-item_skew)
                for part, rank in zip(share / share.sum(), ranks, strict=True)
            ]
        )
        self._shown = np.concatenate([[0.0], np.cumsum(weights)])
        self._low, self._high = self._shown[starts[:-1]], self._shown[starts[1:]]
        sellers = np.cumsum(1 / np.arange(1, max(2, items // 15) + 1) ** 0.7)
        self._seller = np.searchsorted(sellers, random.random(items) * sellers[-1])
        self._brand = random.integers(0, len(BRANDS), items)
        self._price = np.round(np.exp(random.normal(3.2, 0.6, items)), 2)
        self._favourites = random.choice(kinds, (users, _FAVOURITES), p=share / share.sum())
        activity = random.permutation(np.arange(1.0, users + 1) ** -user_skew)
        self._activity = np.cumsum(activity / activity.sum())

    def blocks(self, n: int, start_ms: int, end_ms: int) -> Iterator[Block]:
        """The next `n` events, evenly spread from `start_ms` to just before `end_ms`."""
        edges = np.linspace(0, n, -(-n // BLOCK) + 1).astype(int)
        for first, last in pairwise(edges):
            times = start_ms + (np.arange(first, last) * (end_ms - start_ms)) // n
            yield self._block(times)

    def columns(self, block: Block) -> dict[str, Any]:
        """The block's fields as the kernel takes them: texts as `pa.StringArray`, prices as float64."""
        items = block.items
        return {
            "user_id": _ids("u", block.users),
            "item_id": _ids("i", items),
            "seller_id": _ids("s", self._seller[items]),
            "category": pa.array(CATEGORIES).take(pa.array(self._category[items])),
            "brand": pa.array(BRANDS).take(pa.array(self._brand[items])),
            "surface": pa.array(SURFACES).take(pa.array(block.surfaces)),
            "price": self._price[items],
        }

    def encode(self, block: Block) -> list[tuple[str, bytes, bytes]]:
        """The block's events as (topic, key, JSON): Kafka's key is the user."""
        found = []
        items = block.items
        ids = (block.topics, block.users, items, block.surfaces, block.times_ms)
        known = (self._seller[items], self._category[items], self._brand[items], self._price[items])
        session = self._random.bytes(14).hex()
        for topic, user, item, surface, time_ms, seller, category, brand, price in zip(
            *(column.tolist() for column in (*ids, *known)), strict=True
        ):
            self._sent += 1
            event = {
                # As long as the UUID that a producer would use.
                "event_id": f"bench-{self._seed:05d}-{self._sent:024d}",
                "occurred_at": time_ms,
                "user_id": f"u{user}",
                "item_id": f"i{item}",
                "seller_id": f"s{seller}",
                "category": CATEGORIES[category],
                "brand": BRANDS[brand],
                "price": price,
                "surface": SURFACES[surface],
                "session_id": session,
            }
            found.append((TOPICS[topic], b"u%d" % user, orjson.dumps(event)))
        return found

    def fill(
        self,
        bootstrap_servers: str,
        n: int,
        start_ms: int,
        end_ms: int,
        written: Callable[[str, bytes], tuple[str, bytes]] = lambda topic, value: (topic, value),
    ) -> int:
        """Sends `n` events to Kafka, acknowledged by the broker when it returns; returns the bytes of their values.

        `written` says into which topic each goes instead, and as what.
        """
        failed: list[str] = []
        producer = Producer(
            {
                "bootstrap.servers": bootstrap_servers,
                "linger.ms": 20,
                "acks": "all",
                "compression.type": "lz4",
                "queue.buffering.max.messages": 4 * BLOCK,
            }
        )

        def delivered(error: object, _message: object) -> None:
            if error is not None:
                failed.append(str(error))

        size = 0
        for block in self.blocks(n, start_ms, end_ms):
            for own, key, plain in self.encode(block):
                topic, value = written(own, plain)
                producer.produce(topic, value, key, on_delivery=delivered)
                size += len(value)
            # Everything in order and nothing dropped: a block is out before the next one is made.
            producer.flush(60)
        if failed:
            msg = f"{len(failed)} events were not taken by Kafka at {bootstrap_servers}: {failed[0]}"
            raise RuntimeError(msg)
        return size

    def _block(self, times_ms: Ints) -> Block:
        random, n = self._random, len(times_ms)
        drawn = np.searchsorted(self._activity, random.random(n) * self._activity[-1])
        users = np.minimum(drawn, len(self._activity) - 1)
        favourite = self._favourites[users, random.integers(0, _FAVOURITES, n)]
        loyal = random.random(n) < _LOYALTY
        low = np.where(loyal, self._low[favourite], 0.0)
        high = np.where(loyal, self._high[favourite], self._shown[-1])
        items = np.searchsorted(self._shown, low + random.random(n) * (high - low), side="right") - 1
        return Block(
            random.choice(len(TOPICS), n, p=SHARES),
            users,
            np.clip(items, 0, len(self._category) - 1),
            random.choice(len(SURFACES), n, p=_SURFACE_SHARES),
            times_ms,
        )


def _ids(letter: str, numbers: Ints) -> pa.StringArray:
    """`u0`, `u1`, … of many numbers; each text is made once."""
    there, codes = np.unique(numbers, return_inverse=True)
    return pa.array([f"{letter}{number}" for number in there.tolist()], pa.string()).take(pa.array(codes))
