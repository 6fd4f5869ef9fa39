"""Training sets: every label with every feature as of its time, from the events strictly before."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from config.settings import Settings
from features.plan import Plan
from tests.support.archived import archive
from tests.support.expected import Expected
from tests.support.served import NOW_MS, catalogue, random_events
from training import point_in_time, run
from training.run import TableLabels, training_set

CONTRACTS = {"impressions": "Impression", "clicks": "Click", "likes": "Like"}
Events = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return catalogue()


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(archive=str(tmp_path / "archive"))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many chunks and partitions of little data."""
    monkeypatch.setattr(point_in_time, "CHUNK_ROWS", 50)
    monkeypatch.setattr(run, "CHUNK_ROWS", 50)
    monkeypatch.setattr(run, "PARTITION_EVENTS", 100)


def events_of(rng: random.Random, n: int = 600) -> Events:
    found = random_events(rng.randrange(1 << 32), users=12, items=15, n=n)
    return {CONTRACTS[topic]: events for topic, events in found.items()}


def joined(settings: Settings, plan: Plan, labels: pa.Table, *names: str, **options: Any) -> pa.Table:
    wanted = names or plan.service("ranking_v1").features
    batches = training_set(settings, plan, wanted, TableLabels(labels), with_tail=False, **options)
    return pa.Table.from_batches(list(batches))


def times(ms: list[int], unit: str = "ms", zone: str | None = "UTC") -> pa.Array:
    return pa.array(ms, pa.timestamp("ms", zone)).cast(pa.timestamp(unit, zone))


@pytest.mark.usefixtures("small_parts")
def test_every_feature_is_what_brute_force_gives_for_the_events_before_each_label(
    plan: Plan, settings: Settings, rng: random.Random
) -> None:
    """Every feature of every view, derived and cross ones too; labels in any order, doubled, of unknown and no entity.

    Half of the times are those of events, of which the event itself must not count.
    """
    events = events_of(rng)
    archive(settings, plan, events, rng)
    every = [event for many in events.values() for event in many]
    asked = []
    for _ in range(160):
        event = rng.choice(every)
        user, item = rng.choice([event["user_id"], "u1", "nobody", None]), rng.choice([event["item_id"], "i3", None])
        asked.append((user, item, event.get("seller_id"), event["t"] + rng.choice([0, 0, 1, 60_000, 86_400_000])))
    asked += rng.choices(asked, k=20)
    users, items, sellers, at = (list(each) for each in zip(*asked, strict=True))
    labels = pa.table(
        {"label": range(len(asked)), "item_id": items, "event_timestamp": times(at), "user_id": users}
    ).append_column("seller_id", pa.array(sellers, pa.string()))
    table = joined(settings, plan, labels, *plan.features)
    assert table.select(labels.column_names) == labels
    expected = Expected(plan, events)
    wrong = []
    for row in table.to_pylist():
        ids = {"user": row["user_id"], "item": row["item_id"], "seller": row["seller_id"]}
        at_ms = int(row["event_timestamp"].timestamp() * 1000)
        wrong += expected.differences(plan.features.values(), ids, at_ms, row)
    assert wrong == []


def test_times_are_times_whatever_their_unit_and_zone(plan: Plan, settings: Settings, rng: random.Random) -> None:
    """Without a zone they are UTC; a part of a millisecond is after the event that the millisecond holds."""
    click = {"t": NOW_MS, "user_id": "u1", "item_id": "i1"}
    archive(settings, plan, {"Click": [click]}, rng)
    name = "user_activity__clicks_10m"
    abroad = datetime.fromtimestamp(NOW_MS / 1000, UTC).astimezone(timezone(timedelta(hours=9)))
    for column, found in [
        (times([NOW_MS, NOW_MS + 1]), [0, 1]),
        (times([NOW_MS, NOW_MS + 1], "ns", zone=None), [0, 1]),
        (times([NOW_MS, NOW_MS + 1000], "s"), [0, 1]),
        (pa.array([NOW_MS * 1000, NOW_MS * 1000 + 1]).view(pa.timestamp("us", "UTC")), [0, 1]),
        (pa.array([abroad, abroad + timedelta(milliseconds=1)], pa.timestamp("us", "Asia/Tokyo")), [0, 1]),
    ]:
        labels = pa.table({"user_id": ["u1", "u1"], "event_timestamp": column})
        assert joined(settings, plan, labels, name)[name].to_pylist() == found, column.type


def test_a_column_of_the_labels_stands_in_for_what_an_item_is_known_by(
    plan: Plan, settings: Settings, rng: random.Random
) -> None:
    """As `items` of an HTTP request do, also where labels ask of one item at one time; null overrides nothing."""
    click = {"t": NOW_MS - 9, "user_id": "u1", "item_id": "i1", "category": "shoes", "price": 10.0}
    archive(settings, plan, {"Click": [click]}, rng)
    names = ("item_activity__price", "user_item__category_clicks", "user_item__price_ratio")
    labels = pa.table(
        {
            "user_id": ["u1"] * 3,
            "item_id": ["i1", "i1", "cold"],
            "event_timestamp": times([NOW_MS] * 3),
            "item__price": [None, 20.0, 30.0],
            "item__category": [None, "hats", "shoes"],
        }
    )
    table = joined(settings, plan, labels, *names)
    assert [table[name].to_pylist() for name in names] == [[10.0, 20.0, 30.0], [1.0, 0.0, 1.0], [1.0, 2.0, 3.0]]
    assert table["item__price"].to_pylist() == [None, 20.0, 30.0]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"user_id": ["u1"], "event_timestamp": times([1])}, "no column 'item_id', the key of item"),
        ({"user_id": ["u1"], "item_id": ["i1"]}, "no column 'event_timestamp'"),
        ({"user_id": ["u1"], "item_id": ["i1"], "event_timestamp": [5]}, "int64 is no time"),
        (
            {"user_id": ["u1"], "item_id": ["i1"], "event_timestamp": pa.array([None], pa.timestamp("ms"))},
            "1 labels have no time",
        ),
        (
            {"user_id": ["u1"], "item_id": ["i1"], "event_timestamp": times([1]), "item__colour": ["red"]},
            "item__colour: .*item__category, item__price, item__seller_id",
        ),
        (
            {"user_id": ["u1"], "item_id": ["i1"], "event_timestamp": times([1]), "user_item__clicked": [True]},
            "user_item__clicked: .* rename it",
        ),
    ],
)
def test_labels_that_lack_something_are_refused_with_what(
    plan: Plan, settings: Settings, columns: dict[str, Any], said: str
) -> None:
    with pytest.raises(point_in_time.LabelsError, match=said):
        joined(settings, plan, pa.table(columns))


@pytest.mark.usefixtures("small_parts")
def test_a_cluster_writes_the_same_file(plan: Plan, settings: Settings, rng: random.Random, tmp_path: Path) -> None:
    """Byte for byte: sums depend in their last digit on the order of events, which no division of labour may change."""
    events = events_of(rng)
    archive(settings, plan, events, rng)
    clicks = events["Click"]
    labels = TableLabels(
        pa.table(
            {
                "user_id": [event["user_id"] for event in clicks],
                "item_id": [event["item_id"] for event in clicks],
                "event_timestamp": times([event["t"] for event in clicks]),
            }
        )
    )
    files = []
    for ray in (None, "local"):
        files.append(tmp_path / f"{ray}.parquet")
        given = (settings, plan, plan.service("ranking_v1").features, labels, files[-1])
        made = run.write_training_set(*given, with_tail=False, ray=ray)
        assert (made.labels, made.features) == (len(clicks), 58)
    assert files[0].read_bytes() == files[1].read_bytes()
