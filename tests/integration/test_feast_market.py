"""A project with streaming and ordinary views, used as Feast's users do: by either command, its SDK, its clients."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import feast
import httpx
import numpy as np
import pandas as pd
import pytest

from config.settings import Settings
from features.plan import Plan
from headrace.embedded import EmbeddedBroker, EmbeddedRedis
from headrace.feast import as_of
from headrace.server import FeastAnswers
from registry.apply import apply
from store.connect import connect
from tests.support.market.profiles import TYPES, item, kinds, pair, stock, today, trips
from tests.support.served import SHARDS, Clock, Rows, listening

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
        "map": json.dumps({word(rng): word(rng) for _ in range(rng.randrange(1, 4))}),
        "maps": json.dumps([{"a": word(rng)}, {"b": "c"}]),
        "json": '{"a": [1, null]}',
        "uuid": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
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
        source: Any = view.batch_source
        pd.DataFrame(columns).to_parquet(folder / source.path)


@pytest.fixture(scope="module")
def market(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Market]:
    folder = tmp_path_factory.mktemp("market")
    now = datetime.now(UTC)
    (folder / "feature_store.yaml").write_text(HEADRACE)
    (folder / "repo.py").write_text("from headrace.feast_repo import *\n")
    profiles(folder, now)
    with EmbeddedRedis() as redis, EmbeddedBroker() as broker:
        settings = Settings(
            repo=folder,
            definitions="tests.support.market",
            redis_url=redis.url,
            kafka=broker.bootstrap_servers,
            topics="auto",
            shards=SHARDS,
        )
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
    """By a service: the newest of what was materialized, and what is derived of it and of what the stream counts."""
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
        assert got["fit__taste"][at] == got["user_acts__tastes_24h"][at].get(category, 0.0)
    newest = int((materialized.now - timedelta(hours=1)).timestamp())
    before = int((materialized.now - timedelta(hours=5)).timestamp())
    assert got["item_profile__price__ts"] == [newest, before, newest, newest, 0]
    assert got["user_profile__age__ts"] == [newest, newest, before, before, 0]
    statuses = dict(zip(answer.proto.metadata.feature_names.val, answer.proto.results, strict=True))
    assert list(statuses["user_profile__age"].statuses) == [1, 1, 1, 1, 3]  # PRESENT, also where null; NOT_FOUND


def test_one_round_trip(materialized: Market, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many views of either kind a request has."""
    store: Any = materialized.store._get_provider().online_store
    client, calls = store._redis(materialized.store.config), []
    execute = client.execute_command

    def counted(*words: Any, **more: Any) -> Any:
        calls.append(words[0])
        return execute(*words, **more)

    monkeypatch.setattr(client, "execute_command", counted)
    rows = [{"user_id": user, "item_id": item} for user, item in ASKED]
    materialized.read("ranking_v1", rows, full=True)
    materialized.read(["item_profile:price", "user_acts:clicks_1h", "stock:left", "pair:score"], rows)
    assert calls == ["MGET", "MGET"]


def test_keys_of_every_kind(materialized: Market) -> None:
    """Integers, two at once, none; a row that is too old says so, and has no value, as in a training set."""
    rows = [{"user_id": user, "item_id": item} for user, item in ASKED]
    assert materialized.read(["pair:score"], rows).to_dict()["score"] == [0.5, None, 0.25, None, None]
    swapped = [dict(reversed(row.items())) for row in rows]
    assert materialized.read(["pair:score"], swapped).to_dict()["score"] == [0.5, None, 0.25, None, None]
    drivers = {"driver_id": [7, -8, 9]}
    got = materialized.read(["trips:n", "today:rate"], drivers).to_dict()
    assert got == {"driver_id": [7, -8, 9], "n": [1, 2, None], "rate": [1.5] * 3}
    assert materialized.read(["trips:n"], {"driver_id": ["7"]}).to_dict()["n"] == [1]
    late = materialized.now_ms + 3 * 3_600_000
    with as_of(late):
        answer = materialized.store.get_online_features(["stock:left", "pair:score"], rows[:2])
    assert answer.to_dict()["left"] == [None, None]
    left, score = answer.proto.results[2:4]
    assert (list(left.statuses), list(score.statuses)) == ([4, 4], [1, 3])
    assert materialized.read([*("stock:left", "pair:score")], []).to_dict() == {
        "item_id": [],
        "user_id": [],
        "left": [],
        "score": [],
    }


def test_on_demand_views_of_users(materialized: Market) -> None:
    """Over either kind of view and what a request brings, alone, together with others, and in a service of theirs."""
    rows = [{"user_id": user, "item_id": item, "budget": 100.0} for user, item in ASKED[:3]]
    wanted = ["budgeted:affordable", "spending:a_click", "user_acts:clicks_1h", "item_profile:category"]
    got = materialized.read(wanted, rows).to_dict()
    assert got["affordable"] == [20.0, 100 / 12, 20.0]
    assert got["a_click"] == [5.0] * 3
    assert (got["clicks_1h"], got["category"]) == ([20] * 3, ["c1", "c2", "c1"])
    assert materialized.read(["spending:a_click"], rows).to_dict()["a_click"] == [5.0] * 3
    service = materialized.read("ordinary_v1", rows).to_dict()
    assert {name: service[name] for name in ("age", "price", "left", "affordable")} == {
        "age": [31, 31, 40],
        "price": [5.0, 12.0, 5.0],
        "left": [3, 4, 3],
        "affordable": [20.0, 100 / 12, 20.0],
    }


def test_over_http(materialized: Market) -> None:
    """`/v1/features` as JSON and npy, `/v1/entities`, Feast's own call and its `remote` store say what the SDK does."""
    items = [item for _, item in ASKED if item != "none"]
    rows = [{"user_id": "u0", "item_id": item} for item in items]
    sdk = materialized.store.get_online_features(
        materialized.store.get_feature_service("ranking_v1"), rows, full_feature_names=True
    ).to_dict()
    settings = materialized.settings.model_copy(update={"requests_max": 10_000})
    with listening(settings, materialized.plan, FeastAnswers(settings)) as port:
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
        body = {"service": "ranking_v1", "user_id": "u0", "item_ids": items}
        answer = http.post("/v1/features", json=body).json()
        for at, item in enumerate(answer["items"]):
            values = dict(zip(answer["features"], item["values"], strict=True)) | answer["user"]["features"]
            assert {name: sdk[name][at] for name in values} == values, item
        matrix = np.load(
            io.BytesIO(http.post("/v1/features", json=body, headers={"accept": "application/x-npy"}).content)
        )
        names = http.get("/v1/services/ranking_v1").json()["matrix"]
        assert "item_profile__price" in names
        column = matrix[:, names.index("item_profile__price")]
        np.testing.assert_array_equal(column, np.array(sdk["item_profile__price"], np.float32))
        entity = http.get("/v1/entities/item/i1").json()["features"]
        assert (entity["item_profile__price"], entity["stock__left"]) == (5.0, 3)
        assert http.get("/v1/entities/driver/7").json()["features"] == {"trips__n": 1}
        feast_body = {
            "features": ["kinds:text", "pair:score", "stock:left"],
            "entities": {"user_id": ["u0"], "item_id": ["i1"]},
        }
        found = http.post("/get-online-features", json=feast_body).json()
        assert [result["values"] for result in found["results"][2:]] == [[None], [0.5], [3]]
        remote = remote_store(materialized.folder, port)
        same = remote.get_online_features(["item_profile:price", "stock:left", "user_acts:clicks_1h"], rows).to_dict()
        assert [same["price"], same["left"]] == [sdk["item_profile__price"], [3, 4, 3, 3]]
        # On-demand views of users, which the plan does not know, and a service that was made in Feast.
        spent = [{**row, "budget": 100.0} for row in rows]
        computed = remote.get_online_features(["budgeted:affordable", "spending:a_click"], spent).to_dict()
        assert computed["affordable"] == [100 / price for price in sdk["item_profile__price"]]
        assert computed["a_click"] == [100 / clicks for clicks in sdk["user_acts__clicks_24h"]]
        ordinary = remote.get_online_features(remote.get_feature_service("ordinary_v1"), spent).to_dict()
        assert ordinary["affordable"] == computed["affordable"]
        with pytest.raises(feast.errors.FeatureViewNotFoundException, match="nothing"):
            remote.get_online_features(["nothing:at_all"], rows)
        http.close()


def remote_store(folder: Path, port: int) -> feast.FeatureStore:
    """An unmodified client of Feast's, with the same registry."""
    return store_in(folder / "remote", f"{folder}/registry.db", f"{{type: remote, path: 'http://127.0.0.1:{port}'}}")


def store_in(folder: Path, registry: str, online: str) -> feast.FeatureStore:
    """A store of Feast's, with another online store."""
    folder.mkdir(exist_ok=True)
    said = ["project: market", "provider: local", f"registry: {registry}", f"online_store: {online}"]
    (folder / "feature_store.yaml").write_text("\n".join([*said, "entity_key_serialization_version: 3"]))
    return feast.FeatureStore(str(folder))


def test_every_type_as_feasts_own_stores_have_it(market: Market, tmp_path: Path, redis_url: str) -> None:
    """A thousand rows, of items that come again and again and in no order: of each the newest, bit for bit."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rows = rows_of(random.Random(seed), market.now, N_ROWS)
    address = redis_url.removeprefix("redis://").removesuffix("/0")
    theirs = {
        "redis": store_in(tmp_path / "redis", "registry.db", f"{{type: redis, connection_string: '{address}'}}"),
        "sqlite": store_in(tmp_path / "sqlite", "registry.db", "{type: sqlite, path: online.db}"),
    }
    for store in theirs.values():
        store.apply([item, copy(kinds)])
    theirs["sqlite"].write_to_online_store("kinds", rows.sort_values("event_timestamp"))  # It keeps the last written.
    for at in range(0, N_ROWS, 100):
        for store in (market.store, theirs["redis"]):
            store.write_to_online_store("kinds", rows[at : at + 100].copy())
    ids = [*dict.fromkeys(rows["item_id"]), "never"]
    asked = ([f"kinds:{each}" for each in TYPES], {"item_id": ids})
    ours = market.store.get_online_features(*asked)
    mine = ours.to_dict(include_event_timestamps=True)
    vectors = dict(zip(ours.proto.metadata.feature_names.val, ours.proto.results, strict=True))
    for name, store in theirs.items():
        answer = store.get_online_features(*asked)
        for column, values in answer.to_dict(include_event_timestamps=True).items():
            assert mine[column] == values, (name, column)
        for column, vector in zip(answer.proto.metadata.feature_names.val, answer.proto.results, strict=True):
            assert list(vectors[column].values) == list(vector.values), (name, column)
            found = slice(
                None, -1 if name == "redis" else None
            )  # Feast's Redis store has what is not there as present.
            assert list(vectors[column].statuses)[found] == list(vector.statuses)[found], (name, column)
            times = [[at.seconds for at in each.event_timestamps] for each in (vectors[column], vector)]
            assert times[0] == times[1], (name, column)  # SQLite's are whole seconds.
    assert ours.to_arrow().num_rows == len(ids)


def test_history_joins_both_kinds(materialized: Market) -> None:
    """As Feast joins its own, in one call with ours; also for on-demand views."""
    hours = [6, 3, 0.5, 0.5, 0.5]
    labels = pd.DataFrame(
        {
            "user_id": ["u0", "u0", "u0", "u0", "u2"],
            "item_id": ["i1", "i1", "i1", "i1", "i2"],
            "event_timestamp": [materialized.now - timedelta(hours=each) for each in hours],
            "budget": [60.0] * 5,
            "kept": range(5),
        }
    )
    wanted = [
        *("item_profile:price", "user_profile:age", "user_acts:clicks_1h", "fit:price_ratio", "fit:known"),
        *("budgeted:affordable", "spending:a_click", "item_profile:category"),
    ]
    got = materialized.store.get_historical_features(labels, wanted).to_df()
    assert got["kept"].tolist() == [0, 1, 2, 3, 4]
    price = [None, 11.0, 5.0, 5.0, 12.0]
    assert _plain(got["price"]) == price
    assert _plain(got["age"]) == [None, 30, 31, 31, None]
    assert _plain(got["affordable"]) == [None if each is None else 60 / each for each in price]
    assert _plain(got["category"]) == [None, "c1", "c1", "c1", "c2"]
    alone = materialized.store.get_historical_features(labels[:2], ["item_profile:price"]).to_df()
    assert _plain(alone["price"]) == price[1:2]  # Feast leaves out labels that it finds nothing for.


def _plain(values: Any) -> list[Any]:
    return [None if pd.isna(each) else each for each in values.tolist()]


def test_three_applies_leave_one_version(market: Market) -> None:
    """By either command, whatever was declared in whosever words; and nobody else's objects go."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for command in (["feast", "apply"], ["headrace", "apply"], ["feast", "apply"]):
        said = run_in(market.folder, environment, *command)
        print(said)
    registry = feast.FeatureStore(str(market.folder)).registry
    views = [*registry.list_feature_views("market"), *registry.list_stream_feature_views("market")]
    assert {view.name for view in views} >= {"user_profile", "item_profile", "stock", "user_acts"}
    for view in views:
        assert len(registry.list_feature_view_versions(view.name, "market")) <= 1, view.name
    said = run_in(market.folder, environment, "headrace", "plan")
    assert "nothing to do" in said, said


def run_in(folder: Path, environment: dict[str, str], *words: str) -> str:
    """A command of the command line, in the project's folder."""
    module = {"feast": "feast.cli.cli", "headrace": "headrace"}[words[0]]
    done = subprocess.run(
        [sys.executable, "-m", module, *words[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_view_that_goes_takes_its_rows_with_it(materialized: Market) -> None:
    """And nothing else, by `feast delete` as by `teardown`."""
    client = connect(materialized.settings.redis_url.get_secret_value(), 10)
    before = set(client.scan_iter("*"))
    store = materialized.store
    store.apply([], objects_to_delete=[store.get_feature_view("trips")], partial=False)
    gone = before - set(client.scan_iter("*"))
    assert gone
    assert all(key.startswith(b"{market@trips:") for key in gone)
    store.teardown()
    left = set(client.scan_iter("*"))
    assert not [key for key in left if b"@" in key]
    assert {key for key in before if b"@" not in key} == left
