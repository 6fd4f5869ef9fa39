"""Training sets: every label with every feature as of its time, from the events strictly before."""

from __future__ import annotations

import random
import resource
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from config.settings import Settings
from features.compile import compile_plan
from features.plan import Given, Plan
from headrace import Entity, Event, agg, service, view
from tests.support.archived import archive
from tests.support.expected import Expected
from tests.support.served import NOW_MS, catalogue, random_events
from training import point_in_time, run
from training.run import TableLabels, training_set
from training.split import Splitter

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
    features = {name: each for name, each in plan.features.items() if not isinstance(each.spec, Given)}
    table = joined(settings, plan, labels, *features)
    assert table.select(labels.column_names) == labels
    expected = Expected(plan, events)
    wrong = []
    for row in table.to_pylist():
        ids = {"user": row["user_id"], "item": row["item_id"], "seller": row["seller_id"]}
        at_ms = int(row["event_timestamp"].timestamp() * 1000)
        wrong += expected.differences(features.values(), ids, at_ms, row)
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


def test_fields_and_views_may_have_any_name(settings: Settings, rng: random.Random) -> None:
    """Also those that the join's own columns would be called by."""
    user = Entity("user", key="user_id", forget_after="90d")

    class Step(Event, topic="steps"):
        user_id: str
        t: float
        place: str | None = None

    @view(user)
    class Place:
        t = agg.sum(Step, "t", over="1h")
        row = agg.last(Step, "place")

    plan = compile_plan([{"service": service("places_v1", Place)}], "test", 1)
    steps = [{"t": NOW_MS - 5, "user_id": "u1", "place": "here"}]  # The helper takes a field `t` for the time.
    archive(settings, plan, {"Step": steps}, rng)
    labels = pa.table({"user_id": ["u1"], "event_timestamp": times([NOW_MS])})
    table = joined(settings, plan, labels, "place__t_1h", "place__row")
    assert (table["place__t_1h"].to_pylist(), table["place__row"].to_pylist()) == ([NOW_MS - 5.0], ["here"])


def test_no_label_and_no_event_are_no_mistake(plan: Plan, settings: Settings, tmp_path: Path) -> None:
    """A file of no labels becomes a file of none, with all columns; where nothing is archived, nothing has happened."""
    names = ("user_activity__clicks_1h", "user_history__clicked", "user_taste__category_likes")
    for ids in ([], ["u1", None]):
        at = times([NOW_MS] * len(ids))
        labels = TableLabels(pa.table({"user_id": pa.array(ids, pa.string()), "event_timestamp": at}))
        file = tmp_path / "training.parquet"
        run.write_training_set(settings, plan, names, labels, file, with_tail=False)
        table = pq.read_table(file)
        assert table.column_names == ["user_id", "event_timestamp", *names]
        assert [table[name].to_pylist() for name in names] == [[0] * len(ids), [[]] * len(ids), [[]] * len(ids)]


def test_ids_in_a_csv_are_texts_and_so_are_overrides(plan: Plan, settings: Settings, tmp_path: Path) -> None:
    """Taken for numbers, `007` would be 7, which nobody is; and a category that is a number failed after all else."""
    click = {"t": NOW_MS - 9, "user_id": "007", "item_id": "0", "category": "12"}
    archive(settings, plan, {"Click": [click]}, random.Random(1))
    file = tmp_path / "labels.csv"
    file.write_text(
        "user_id,item_id,event_timestamp,item__category\n007,0,2033-05-18T10:00:00Z,12\n,1,2033-05-18T10:00:00Z,\n"
    )
    names = ("user_activity__clicks_1h", "user_item__category_clicks")
    labels = run.read_labels(file, plan)
    table = pa.Table.from_batches(list(training_set(settings, plan, names, labels, with_tail=False)))
    assert [table[name].to_pylist() for name in ("user_id", *names)] == [["007", None], [1, 0], [1.0, 0.0]]


def test_a_machine_that_does_not_see_the_folder_says_so(plan: Plan, settings: Settings, tmp_path: Path) -> None:
    """As on a cluster without a shared one: what is not there would be taken for entities of which nothing happened."""
    job = point_in_time.Job(plan, ("user_activity__clicks_1h",), "at", 1, tmp_path / "elsewhere", 0, NOW_MS)
    labels = pa.record_batch({"user_id": ["u1"], "at": times([NOW_MS])})
    entities = point_in_time.Entities([point_in_time.questions(job, labels)["user"]])
    for step in (
        lambda: Splitter(job.spill, lambda *_: entities.chosen(labels["user_id"], 1), "x"),
        lambda: point_in_time.make_rows(job, "user", entities, 0),
        lambda: point_in_time.evaluate(job, labels, 0),
    ):
        with pytest.raises(OSError, match="--spill"):
            step()


def test_no_more_files_are_open_than_threads(plan: Plan, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many partitions: a file for each of them, held open, is more than a process may have."""
    clicks = [{"t": NOW_MS - 1 - at, "user_id": f"u{at}", "item_id": "i1"} for at in range(300)]
    archive(settings, plan, {"Click": clicks}, random.Random(1))
    monkeypatch.setattr(run, "PARTITION_EVENTS", 1)
    labels = pa.table({"user_id": [f"u{at}" for at in range(300)], "event_timestamp": times([NOW_MS] * 300)})
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 60, hard))
    try:
        table = joined(settings, plan, labels, "user_activity__clicks_1h")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert table["user_activity__clicks_1h"].to_pylist() == [1] * 300
