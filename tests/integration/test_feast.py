"""A project with streaming and ordinary views, used as Feast's users do: by either command, its SDK, its clients."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import feast
import numpy as np
import pandas as pd
import pytest

from config.settings import Settings
from features.plan import Plan
from headrace.embedded import EmbeddedBroker, EmbeddedRedis
from headrace.feast import as_of
from registry.apply import apply
from store.connect import connect
from tests.support.market.profiles import TYPES, kinds, pair, stock, today, trips
from tests.support.served import SHARDS, Clock, Rows

ROOT = Path(__file__).resolve().parents[2]
N_ROWS = 1_000
HEADRACE = """
project: market
provider: local
registry: registry.db
entity_key_serialization_version: 3
online_store:
  type: registry.online.HeadraceOnlineStore
offline_store:
  type: registry.offline.HeadraceOfflineStore
"""


def word(rng: random.Random) -> str:
    return "".join(rng.choice("abcü€ 😀") for _ in range(rng.randrange(6)))


def kinds_of(rng: random.Random, now: datetime) -> dict[str, Any]:
    """A value of each of Feast's types, now and then null."""
    at = now - timedelta(seconds=rng.randrange(10**6))
    values: dict[str, Any] = {
        "int32": rng.randrange(-(1 << 31), 1 << 31),
        "int64": rng.choice([rng.randrange(-(1 << 63), 1 << 63), 5]),
        "float32": float(np.float32(rng.gauss(0, 1))),
        "float64": rng.gauss(0, 1e9),
        "bool": rng.random() < 0.5,
        "text": word(rng),
        "raw": rng.randbytes(4),
        "at": at.replace(microsecond=0),
        "ints": [rng.randrange(99) for _ in range(rng.randrange(1, 4))],
        "numbers": [rng.random() for _ in range(rng.randrange(1, 4))],
        "singles": [float(np.float32(rng.random())) for _ in range(rng.randrange(1, 4))],
        "texts": [word(rng) for _ in range(rng.randrange(1, 4))],
        "bools": [rng.random() < 0.5 for _ in range(rng.randrange(1, 4))],
        "raws": [rng.randbytes(3) for _ in range(rng.randrange(1, 4))],
        "times": [at.replace(microsecond=0) for _ in range(rng.randrange(1, 4))],
        "map": {word(rng): rng.choice([1, "x", 2.5, [1, 2]]) for _ in range(rng.randrange(1, 4))},
        "maps": [{"a": rng.randrange(9)}, {"b": "c"}],
        "json": '{"a": [1, null]}',
        "uuid": uuid.UUID(int=rng.getrandbits(128), version=4),
        "decimal": Decimal(rng.randrange(10**9)) / 100,
    }
    return {name: None if rng.random() < 0.1 else value for name, value in values.items()}


def rows_of(rng: random.Random, now: datetime, n: int) -> pd.DataFrame:
    """Rows of `kinds`, of items that come again and again, in no order of time."""
    names = [f"i{rng.randrange(n // 2)}" for _ in range(n)]
    times = [now - timedelta(microseconds=rng.randrange(10**10)) for _ in range(n)]
    values = [kinds_of(rng, now) for _ in range(n)]
    columns = {name: pd.Series([row[name] for row in values], dtype=object) for name in TYPES}
    return pd.DataFrame({"item_id": names, **columns, "event_timestamp": times, "created": times})


@dataclass
class Market:
    """An applied project: its folder, its store, what was written."""

    folder: Path
    settings: Settings
    store: feast.FeatureStore
    plan: Plan
    rows: Rows
    now: datetime

    @property
    def now_ms(self) -> int:
        return round(self.now.timestamp() * 1000)

    def read(self, features: Any, rows: Any, *, full: bool = False) -> Any:
        """What the SDK answers at the market's time."""
        wanted = self.store.get_feature_service(features) if isinstance(features, str) else features
        with as_of(self.now_ms):
            return self.store.get_online_features(wanted, rows, full_feature_names=full)


def profiles(folder: Path, now: datetime) -> None:
    """The files of the batch views, two rows of each id, of which the newer counts."""
    (folder / "data").mkdir()
    before, later = now - timedelta(hours=5), now - timedelta(hours=1)
    users = pd.DataFrame(
        {
            "user_id": ["u0", "u1", "u0", "u2"],
            "age": [30, 40, 31, None],
            "favourites": [["i1"], ["i2", "i9"], ["i1", "i3"], []],
            "event_timestamp": [before, before, later, before],
            "created": [now] * 4,
        }
    ).astype({"age": "Int64"})
    users.to_parquet(folder / "data" / "users.parquet")
    items = pd.DataFrame(
        {
            "item_id": [f"i{at}" for at in range(8)] + ["i1"],
            "price": [10.0 + at for at in range(8)] + [5.0],
            "category": [f"c{at % 3}" for at in range(8)] + ["c1"],
            "made": [*range(2000, 2008), 1999],
            "event_timestamp": [before] * 8 + [later],
            "created": [now] * 9,
        }
    )
    items.to_parquet(folder / "data" / "items.parquet")
    for view in (stock, pair, trips, today, kinds):  # Of what is pushed nothing was kept yet.
        times = pd.to_datetime([], utc=True)
        names = [*(f"{entity}_id" for entity in view.entities), *(field.name for field in view.features)]
        columns: dict[str, Any] = {name: [] for name in names}
        columns |= {"event_timestamp": times, "created": times}
        pd.DataFrame(columns).to_parquet(folder / view.batch_source.path)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    folder = tmp_path_factory.mktemp("market")
    now = datetime.now(UTC)
    (folder / "feature_store.yaml").write_text(HEADRACE)
    (folder / "repo.py").write_text("from headrace.feast_repo import *\n")
    profiles(folder, now)
    with EmbeddedRedis() as redis, EmbeddedBroker() as broker:
        options = {"redis_url": redis.url, "kafka": broker.bootstrap_servers, "topics": "auto", "shards": SHARDS}
        settings = Settings(repo=folder, definitions="tests.support.market", **options)
        plan = apply(settings, connect(redis.url, 10)).plan
        rows = Rows(plan, redis.url, Clock(round(now.timestamp() * 1000)))
        clicks = [
            {"t": rows._clock.now_ms - 60_000 - at, "user_id": f"u{at % 3}", "item_id": f"i{at % 5}"}
            | {"category": f"c{at % 3}", "price": 8.0 + at % 4}
            for at in range(60)
        ]
        rows.write("clicks", clicks)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {
                "HEADRACE_REDIS_URL": redis.url,
                "HEADRACE_DEFINITIONS": "tests.support.market",
            }.items():
                patch.setenv(name, value)
            patch.setenv("HEADRACE_KAFKA", broker.bootstrap_servers)
            patch.setenv("HEADRACE_TOPICS", "auto")
            patch.setenv("HEADRACE_SHARDS", str(SHARDS))
            yield Market(folder, settings, feast.FeatureStore(str(folder)), plan, rows, now)


@pytest.fixture(scope="module")
def materialized(market: Market) -> Market:
    """The market, its files materialized, some rows pushed."""
    market.store.materialize_incremental(market.now)
    pushed = {"event_timestamp": [market.now] * 2, "created": [market.now] * 2}
    market.store.push("stock_pushed", pd.DataFrame({"item_id": ["i1", "i2"], "left": [3, 4], **pushed}))
    pairs_pushed = {"user_id": ["u0", "u1"], "item_id": ["i1", "i1"], "score": [0.5, 0.25], **pushed}
    market.store.write_to_online_store("pair", pd.DataFrame(pairs_pushed))
    asyncio.run(market.store.push_async("trip_rows", pd.DataFrame({"driver_id": [7, -8], "n": [1, 2], **pushed})))
    market.store.push("days", pd.DataFrame({"rate": [1.5], **{name: values[:1] for name, values in pushed.items()}}))
    return market


EXPECTED = {
    "user_profile__age": [31, 31, 40, None, None],
    "item_profile__price": [5.0, 12.0, 5.0, 5.0, None],
    "item_profile__category": ["c1", "c2", "c1", "c1", None],
    "item_profile__made": [1999, 2002, 1999, 1999, None],
    "fit__known": [True, False, False, False, False],
}
ASKED = [("u0", "i1"), ("u0", "i2"), ("u1", "i1"), ("u2", "i1"), ("nobody", "none")]


def test_ordinary_views_are_read_with_ours(materialized: Market) -> None:
    """By a service: materialized values, the newest of each; and what is derived of them and of what the stream counts."""
    rows = [{"user_id": user, "item_id": item} for user, item in ASKED]
    answer = materialized.read("ranking_v1", rows, full=True)
    got = answer.to_dict(include_event_timestamps=True)
    for name, values in EXPECTED.items():
        assert got[name] == values, name
    clicks, mean = got["user_acts__clicks_24h"], got["user_acts__price_mean_24h"]
    assert clicks == [20, 20, 20, 20, 0]
    for at in range(len(rows)):
        age, price, category = (got[name][at] for name in list(EXPECTED)[:3])
        assert got["user_acts__pace"][at] == (None if age is None else clicks[at] / age)
        assert got["fit__price_ratio"][at] == (None if price is None or mean[at] is None else price / mean[at])
        assert got["fit__taste"][at] == (got["user_acts__tastes_24h"][at].get(category) if category else None)
    newest = int((materialized.now - timedelta(hours=1)).timestamp())
    before = int((materialized.now - timedelta(hours=5)).timestamp())
    assert got["item_profile__price__ts"] == [newest, before, newest, newest, 0]
    assert got["user_profile__age__ts"] == [newest, newest, before, before, 0]
    statuses = dict(zip(answer.proto.metadata.feature_names.val, answer.proto.results, strict=True))
    assert list(statuses["user_profile__age"].statuses) == [1, 1, 1, 1, 3]  # PRESENT, also where null; NOT_FOUND
