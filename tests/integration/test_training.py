"""Train on exactly what is served: a training value is the value that was served at that instant, and brute force's."""

from __future__ import annotations

import csv
import os
import random
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import feast
import httpx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.plan import Plan
from store.archive import tables_of
from store.plans import load_plan
from tests.properties.scenarios import agree
from tests.support.expected import Expected
from tests.support.served import values_of
from tests.support.stack import TOPICS, Stack, wait_for

pytestmark = pytest.mark.kafka

CONTRACTS = {"impressions": "Impression", "clicks": "Click", "likes": "Like"}
ROUNDS, REQUESTS, ITEMS = 6, 18, 20
"""So many (entity, time) pairs: 6 * 18 * (1 + 20) = 2,268."""
DAY_MS = 86_400_000
MORE = """
from features.catalog import Click, Impression, ItemActivity, Like, UserActivity, UserHistory, UserItem, UserTaste
from features.catalog.entities import user
from headrace import agg, service, view


@view(user)
class UserMore:
    spent = agg.sum(Click, "price", over=["1h", "7d"], doc="What the shipped catalogue has not")
    cheapest = agg.min(Click, "price", over=["24h", "7d"])
    items = agg.distinct(Click, "item_id", over=["1h", "7d"])
    seen = agg.count(Impression, over="all")


everything = service("everything", UserActivity, UserTaste, UserHistory, UserMore, ItemActivity, UserItem)
"""
Event = dict[str, Any]


def simulated(rng: random.Random) -> Iterator[tuple[str, Event, int]]:
    """Endless shopping: topic, event without a time, and how long before now it was."""
    while True:
        item = min(int(rng.paretovariate(0.8)), 40)
        event: Event = {"user_id": f"u{rng.randrange(30)}", "item_id": f"i{item}"}
        if rng.random() < 0.9:
            event |= {
                "category": f"c{item % 7}",
                "seller_id": f"s{item % 11}",
                "price": round(rng.lognormvariate(3, 1), 2),
                "surface": rng.choice(["search", "feed"]),
            }
        yield rng.choices(TOPICS, [5, 4, 1])[0], event, int(rng.expovariate(24) * 8 * DAY_MS)


def real(path: Path) -> Iterator[tuple[str, Event, int]]:
    """Real events from a file, views as clicks and favourites as likes, each as long before the last as it was."""
    with path.open() as file:
        rows = [row for row in csv.reader(file) if row[3] in ("pv", "fav")]
    last_s = int(rows[-1][4])
    for user, item, category, behaviour, at_s in rows:
        event = {"user_id": user, "item_id": item, "category": category, "price": float(int(item) % 997)}
        yield "likes" if behaviour == "fav" else "clicks", event, (last_s - int(at_s)) * 1000


FILE = os.environ.get("HEADRACE_TEST_EVENTS")
"""A file of real events, whose licence keeps it out of here: `user,item,category,behaviour,epoch_s`."""


class Shop:
    """Sends events, late, doubled and out of order, and remembers what was served of them, and when.

    So that training sees what was served, though it goes by the time of an event and serving by its arrival: what is
    sent in a round has all arrived, and is committed, before anything is asked, and is later than what was asked
    before. Within a round, and of all history in the first one, events come in any order. No event is of the
    tile of 5 s that holds a query and later than the query, as all were sent before.
    """

    def __init__(self, stack: Stack, plan: Plan, source: Iterator[tuple[str, Event, int]], rng: random.Random) -> None:
        self._stack, self._plan, self._source, self._rng = stack, plan, source, rng
        self._number = 0
        self._asked_ms = 0
        self.events: dict[str, list[Event]] = {contract: [] for contract in CONTRACTS.values()}
        self.served: list[tuple[str, str, int, dict[str, Any]]] = []

    def send(self, count: int) -> None:
        """Events since the last query; in the first round of any age."""
        now_ms = time.time_ns() // 1_000_000
        records: list[tuple[str, str, Event | bytes]] = []
        for topic, fields, age_ms in (next(self._source) for _ in range(count)):
            at_ms = now_ms - (age_ms if not self._asked_ms else age_ms % (now_ms - self._asked_ms))
            event = {"event_id": f"e{self._number}", "occurred_at": at_ms, **fields}
            self._number += 1
            self.events[CONTRACTS[topic]].append({**fields, "t": at_ms})
            records += [(topic, event["user_id"], event)] * (2 if self._rng.random() < 0.03 else 1)
            if self._rng.random() < 0.01:
                records.append((topic, event["user_id"], b"{}"))
        self._rng.shuffle(records)
        self._stack.produce(records)
        self._stack.wait_until_committed()

    def ask(self, address: str) -> None:
        """Asks for one user and some items, now, and keeps the answer."""
        users = sorted({event["user_id"] for many in self.events.values() for event in many})
        items = sorted({event["item_id"] for many in self.events.values() for event in many})
        user, wanted = self._rng.choice([*users, "nobody"]), self._rng.sample([*items, "nothing"], k=ITEMS)
        own = {event["item_id"] for event in self._of(user)} - set(wanted)
        wanted[0] = self._rng.choice([*own, wanted[0]])
        body = {"service": "everything", "user_id": user, "item_ids": wanted, "as_of": time.time_ns() // 1_000_000}
        answer = httpx.post(f"{address}/v1/features", json=body, timeout=30).raise_for_status().json()
        assert answer["as_of"] == body["as_of"]
        self._asked_ms = answer["as_of"]
        self.served += [(user, item, self._asked_ms, values_of(answer, at)) for at, item in enumerate(wanted)]

    def _of(self, user: str) -> list[Event]:
        return [event for many in self.events.values() for event in many if event["user_id"] == user]


@pytest.mark.parametrize("source", ["simulated", *(["real"] if FILE else [])])
def test_training_values_are_what_was_served(source: str, tmp_path: Path) -> None:
    """Every aggregation, derived and cross features, by the command and by Feast, from the archive and Kafka's tail.

    The archiver is stopped before the last round, so that what follows is with Kafka alone; once it has archived that
    too, the archive by itself gives the same table.
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    (tmp_path / "trained_shop.py").write_text(textwrap.dedent(MORE))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with Stack(code=tmp_path, definitions="trained_shop", archive_commit_s=0.5) as stack:
            plan = load_plan(stack.settings)
            shop = Shop(stack, plan, simulated(rng) if source == "simulated" else real(Path(str(FILE))), rng)
            stack.start_worker("worker")
            stack.start("archiver", "-m", "headrace", "archive")
            address = stack.start_server()
            history = 2_500 if source == "simulated" else 15_000
            for number in range(ROUNDS):
                if number == ROUNDS - 1:
                    wait_for("the rounds before are archived", lambda: archived(stack) == ends(stack))
                    stack.stop("archiver")
                shop.send(history if number == 0 else 300)
                for _ in range(REQUESTS):
                    shop.ask(address)
            labels = pd.DataFrame(
                {
                    "user_id": [user for user, *_ in shop.served],
                    "item_id": [item for _, item, *_ in shop.served],
                    "event_timestamp": pd.to_datetime([at_ms for *_, at_ms, _ in shop.served], unit="ms", utc=True),
                    "clicked": [rng.random() < 0.1 for _ in shop.served],
                }
            )
            labels.to_parquet(stack.folder / "labels.parquet")
            print(stack.headrace("train", *arguments(stack, "with_tail")))
            table = pq.read_table(stack.folder / "with_tail.parquet")
            check(plan, shop, table, labels)
            check_feast(stack, patch, table, labels)

            stack.start("archiver", "-m", "headrace", "archive")
            wait_for("the last round is archived", lambda: archived(stack) == ends(stack))
            print(stack.headrace("train", *arguments(stack, "archive"), "--no-tail"))
            assert pq.read_table(stack.folder / "archive.parquet") == table


def arguments(stack: Stack, name: str) -> list[str]:
    folder = stack.folder
    return [str(folder / "labels.parquet"), "--service", "everything", "--out", str(folder / f"{name}.parquet")]


def archived(stack: Stack) -> int:
    """How many records the archive has read."""
    tables = tables_of(stack.settings, load_plan(stack.settings)).values()
    return sum(at.next for table in tables for at in table.complete().values())


def ends(stack: Stack) -> int:
    return sum(end for topic in TOPICS for end in stack.ends(topic))


def check(plan: Plan, shop: Shop, table: pa.Table, labels: pd.DataFrame) -> None:
    """Training value = served value = brute force."""
    assert table.select(list(labels)).to_pandas().equals(labels)
    expected = Expected(plan, shop.events)
    features = [plan.features[name] for name in plan.service("everything").features]
    rows = table.to_pylist()
    unserved, wrong = [], []
    for row, (user, item, at_ms, served) in zip(rows, shop.served, strict=True):
        for feature in features:
            trained = row[feature.full_name]
            trained = dict(trained) if feature.value_type == "map[str, float]" else trained
            if not agree(trained, served[feature.full_name], 1e6):
                unserved.append((feature.full_name, user, item, at_ms, trained, served[feature.full_name]))
        wrong += expected.differences(features, {"user": user, "item": item}, at_ms, row)
    pairs = {(user, at_ms) for user, _, at_ms, _ in shop.served} | {(item, at_ms) for _, item, at_ms, _ in shop.served}
    print(f"{len(rows):,} labels, {len(pairs):,} (entity, time) pairs, {len(rows) * len(features):,} values of ")
    print(f"{len(features)} features: {len(unserved)} differ from what was served, {len(wrong)} from brute force")
    assert len(pairs) >= 2_000
    assert unserved == []
    assert wrong == []


def check_feast(stack: Stack, patch: pytest.MonkeyPatch, table: pa.Table, labels: pd.DataFrame) -> None:
    """Feast's own call gives the same table."""
    for name, value in stack.settings.environment().items():
        patch.setenv(name, value)
    store = feast.FeatureStore(str(stack.folder))
    service = store.get_feature_service("everything")
    assert store.get_historical_features(labels, service, full_feature_names=True).to_arrow().equals(table)
