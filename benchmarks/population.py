"""Rows of a whole marketplace in Redis, and requests for them. Equal seeds give equal events and requests.

The events are those of `benchmarks.traffic`: who sends them, about what, and of which kind. Their ages are
`7 days * u²` with u even in 0 to 1, so that every window has something to hold: 3.2 % of the events are within the last
10 minutes, 7.7 % within the hour, 37.8 % within the day. The rows are made by the kernel's `merge` and the codec's
`encode`, family by family and thousands of entities at once, as a stream that read all these events now would leave
them, and written with their expiry; only Kafka and the commits are left out.

Requests ask for one user, all users being as likely, and for 200 different items, drawn one after the other by Zipf's
law (exponent 1) over the items in order of their events, most first.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from benchmarks.harness import say
from benchmarks.traffic import Block, Traffic
from features.kernel import SLACK_MS, merge
from features.layout import Family, families_of
from features.plan import Plan
from features.rows import Events, Rows
from store.codec import encode
from store.keys import Keyspace, expire_at_ms

SPAN_MS: Final = 7 * 86_400_000
EVENTS_A_USER: Final = 66
_BATCH: Final = 10_000
_RESOLUTION: Final = 1 << 40
_CONTRACTS: Final = ("Impression", "Click", "Like")
"""Of `benchmarks.traffic.TOPICS`, in that order."""
_COLUMNS: Final = ("topics", "users", "items", "surfaces", "times_ms")

Ints = NDArray[np.int64]


class Asked(NamedTuple):
    """A ranking request: a user and candidate items."""

    user_id: str
    item_ids: list[str]


@dataclass(frozen=True)
class Population:
    """What is in Redis: how many users, items and events; `popular` is the items, most events first; rows and their
    bytes are by family.
    """

    users: int
    items: int
    events: int
    now_ms: int
    popular: Ints
    rows: dict[str, int] = field(default_factory=dict)
    row_bytes: dict[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        """Sizes, in a sentence."""
        families = ", ".join(f"{name} {self.row_bytes[name] / rows:.0f}" for name, rows in self.rows.items() if rows)
        return (
            f"{self.users:,} users, {self.items:,} items, {self.events:,} events of 7 days; "
            f"{sum(self.rows.values()):,} rows, bytes a row: {families}"
        )

    def requests(self, n: int, items_each: int = 200, seed: int = 11) -> list[Asked]:
        """`n` requests, each for `items_each` items (no two the same)."""
        random = np.random.default_rng(seed)
        cumulated = np.cumsum(1 / np.arange(1, self.items + 1))
        users = random.integers(0, self.users, n)
        found = []
        for user in users.tolist():
            ranks: dict[int, None] = {}
            while len(ranks) < items_each:
                drawn = np.searchsorted(cumulated, random.random(2 * items_each) * cumulated[-1])
                ranks |= dict.fromkeys(np.minimum(drawn, self.items - 1).tolist())
            items = self.popular[list(ranks)[:items_each]].tolist()
            found.append(Asked(f"u{user}", [f"i{item}" for item in items]))
        return found


def fill(
    client: Any,
    plan: Plan,
    users: int = 100_000,
    items: int = 50_000,
    events_a_user: int = EVENTS_A_USER,
    seed: int = 7,
) -> Population:
    """Writes the rows of every family of the plan to Redis.

    Args:
        client: a blocking redis-py client.
        plan: an applied plan of the shipped catalogue.
        users: how many; their ids are `u0`, `u1`, …
        items: how many; their ids are `i0`, `i1`, …
        events_a_user: on average; impressions, clicks and likes together.
        seed: of the events.
    """
    began = time.perf_counter()
    now_ms = int(time.time() * 1000)
    market = _Market(Traffic(users, items, seed), items, users * events_a_user, now_ms)
    popular = np.argsort(-np.bincount(market.events.items, minlength=items), kind="stable")
    done = Population(users, items, users * events_a_user, now_ms, popular)
    keyspace = Keyspace.of(plan)
    for entity in ("user", "item", "seller"):
        families = [family for view in plan.views for family in families_of(plan, view) if family.entity == entity]
        for ids, events in market.batches(entity):
            for family in families:
                _write(client, keyspace, family, ids, events, done)
    say(f"filled Redis in {time.perf_counter() - began:.0f} s")
    return done


def _write(
    client: Any, keyspace: Keyspace, family: Family, ids: list[bytes], events: Mapping[str, Events], done: Population
) -> None:
    """The family's rows of these entities; one without events of its own has none."""
    own = {name: events[name] for name in family.events}
    rows = merge(family, Rows.empty(family, len(ids)), own, done.now_ms - SLACK_MS).rows
    blobs = encode(family, rows)
    written = 0
    with client.pipeline(transaction=False) as pipe:
        expires = expire_at_ms(family, rows.last_event_ms).tolist()
        for key, blob, expire in zip(keyspace.rows(family, ids), blobs, expires, strict=True):
            if blob:
                pipe.execute_command("SET", key, blob, "PXAT", expire)
                written += 1
        pipe.execute()
    done.rows[family.name] = done.rows.get(family.name, 0) + written
    done.row_bytes[family.name] = done.row_bytes.get(family.name, 0) + sum(map(len, blobs))


class _Market:
    """All events, and by entity as the kernel takes them."""

    def __init__(self, traffic: Traffic, items: int, n: int, now_ms: int) -> None:
        self._traffic = traffic
        blocks = list(traffic.blocks(n, 0, _RESOLUTION))

        def joined(name: str) -> Ints:
            return np.concatenate([getattr(block, name) for block in blocks])

        ages_ms = (1 - joined("times_ms") / _RESOLUTION) ** 2 * (SPAN_MS - 2)
        times_ms = now_ms - 1 - ages_ms.astype(np.int64)
        self.events = Block(joined("topics"), joined("users"), joined("items"), joined("surfaces"), times_ms)
        every_item = np.arange(items)
        sellers = traffic.columns(Block(*(every_item if name == "items" else 0 * every_item for name in _COLUMNS)))
        self._sellers: Any = sellers["seller_id"].dictionary_encode()

    def batches(self, entity: str) -> Iterator[tuple[list[bytes], dict[str, Events]]]:
        """Ids (UTF-8) of some of the entities that there are, and their events by contract."""
        owner = self.events.users if entity == "user" else self.events.items
        if entity == "seller":
            owner = np.asarray(self._sellers.indices)[owner]
        order = np.argsort(owner, kind="stable")
        sorted_owner = owner[order]
        for start in range(0, int(sorted_owner[-1]) + 1, _BATCH):
            low, high = np.searchsorted(sorted_owner, [start, start + _BATCH])
            picked = order[low:high]
            there, rows = np.unique(sorted_owner[low:high], return_inverse=True)
            yield self._ids(entity, there), dict(self._events(picked, rows))

    def _ids(self, entity: str, numbers: Ints) -> list[bytes]:
        if entity == "seller":
            return [text.encode() for text in self._sellers.dictionary.take(pa.array(numbers)).to_pylist()]
        return [f"{entity[0]}{number}".encode() for number in numbers.tolist()]

    def _events(self, picked: Ints, rows: NDArray[np.intp]) -> Iterator[tuple[str, Events]]:
        topics = self.events.topics[picked]
        for index, contract in enumerate(_CONTRACTS):
            mine = topics == index
            block = Block(*(getattr(self.events, name)[picked[mine]] for name in _COLUMNS))
            yield contract, Events(rows[mine], block.times_ms, self._traffic.columns(block))
