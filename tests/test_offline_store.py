"""Feast's `get_historical_features` over our offline store: what the online store answers, as of each row's time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import feast
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast.dqm.profilers.profiler import Profile, Profiler, ValidationError
from feast.feature_logging import LOG_TIMESTAMP_FIELD, FeatureServiceLoggingSource, LoggingConfig
from feast.infra.offline_stores.file_source import FileLoggingDestination, SavedDatasetFileStorage

from config.settings import Settings
from features.plan import Plan
from headrace.embedded import EmbeddedBroker, EmbeddedRedis
from headrace.feast import as_of
from registry.apply import apply
from store.connect import connect
from tests.properties.scenarios import agree, scale_of
from tests.support.archived import archive
from tests.support.served import NOW_MS, SHARDS, Clock, Rows, project_folder, random_events

CONTRACTS = {"impressions": "Impression", "clicks": "Click", "likes": "Like"}


@dataclass
class Project:
    """An applied project with the same random events in its rows and in its archive."""

    plan: Plan
    store: feast.FeatureStore
    folder: Path
    events: dict[str, list[dict[str, Any]]]

    def history(self, entity_df: pd.DataFrame, features: Any) -> Any:
        """Feast's call; `features` is a list, or the name of a service."""
        if isinstance(features, str):
            features = self.store.get_feature_service(features)
        return self.store.get_historical_features(entity_df, features, full_feature_names=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    folder = project_folder(tmp_path_factory.mktemp("project"))
    with EmbeddedRedis() as redis, EmbeddedBroker() as broker, pytest.MonkeyPatch.context() as patch:
        # Of Feast's configuration there is no broker: it is where the variable says.
        patch.setenv("HEADRACE_KAFKA", broker.bootstrap_servers)
        patch.setenv("HEADRACE_REDIS_URL", redis.url)
        settings = Settings(repo=folder, topics="auto", shards=SHARDS)
        plan = apply(settings, connect(redis.url, 10)).plan
        events = random_events(seed, users=12, items=15, n=900)
        Rows(plan, redis.url, Clock()).write_all(events)
        archive(settings, plan, {CONTRACTS[topic]: many for topic, many in events.items()}, random.Random(seed))
        yield Project(plan, feast.FeatureStore(str(folder)), folder, events)


def asked(n: int = 40) -> pd.DataFrame:
    """Rows of users and items, known and not, at one time; with a label, an index and a column of no use."""
    rng = random.Random(7)
    return pd.DataFrame(
        {
            "label": [rng.random() for _ in range(n)],
            "item_id": [rng.choice([f"i{rng.randrange(15)}", "nothing", None]) for _ in range(n)],
            "event_timestamp": pd.Timestamp(NOW_MS, unit="ms", tz="UTC"),
            "user_id": [rng.choice([f"u{rng.randrange(12)}", "nobody", None]) for _ in range(n)],
            "note": [rng.choice(["a", None]) for _ in range(n)],
        },
        index=[7] * n,
    )


@pytest.mark.parametrize(
    "features",
    [
        "ranking_v1",
        ["user_item:clicked", "item_activity:category", "user_item:price_ratio", "user_history:clicked"],
        ["user_taste:category_clicks_7d"],
    ],
)
def test_history_is_what_is_served_at_that_time(project: Project, features: Any) -> None:
    """Every row is there, in order, with its other columns; cross features too, and nothing that was not asked for."""
    frame = asked()
    table = project.history(frame, features).to_arrow()
    rows: Any = frame[["user_id", "item_id"]].to_dict("records")
    of = project.store.get_feature_service(features) if isinstance(features, str) else features
    with as_of(NOW_MS):
        served = project.store.get_online_features(of, rows, full_feature_names=True).to_arrow()
    names = [name for name in served.column_names if name not in frame]
    assert table.column_names == [*frame, *names]
    assert table.select(["user_id", "item_id"]) == served.select(["user_id", "item_id"])
    # The rows added the same events up in another order: sums are equal to their rounding, all else exactly.
    scale = scale_of(event | {"price": event.get("price")} for many in project.events.values() for event in many)
    wrong = {
        name: (row, trained, online)
        for name in names
        for row, trained, online in zip(rows, table[name].to_pylist(), served[name].to_pylist(), strict=True)
        if not agree(trained, online, scale)
    }
    assert wrong == {}
    assert table.select(names).schema == served.select(names).schema
    assert table["label"].to_pylist() == frame["label"].tolist()
    assert table["note"].to_pylist() == frame["note"].tolist()


def test_history_as_a_data_frame_and_as_a_file(project: Project) -> None:
    """Lists and maps as the online store has them; a file is overwritten only if that is said."""
    frame = asked()
    names = ["user_taste:category_clicks_7d", "user_history:clicked", "item_activity:clicks_7d"]
    job = project.history(frame, names)
    found = job.to_df()
    rows: Any = frame[["user_id", "item_id"]].to_dict("records")
    with as_of(NOW_MS):
        served = project.store.get_online_features(names, rows, full_feature_names=True).to_dict()
    assert found["user_taste__category_clicks_7d"].tolist() == served["user_taste__category_clicks_7d"]
    assert [list(each) for each in found["user_history__clicked"]] == served["user_history__clicked"]
    assert found["item_activity__clicks_7d"].tolist() == served["item_activity__clicks_7d"]
    assert found["event_timestamp"].tolist() == frame["event_timestamp"].tolist()

    storage = SavedDatasetFileStorage("training.parquet")
    job.persist(storage)
    assert pq.read_table(project.folder / "training.parquet") == job.to_arrow()
    with pytest.raises(FileExistsError, match="allow_overwrite"):
        job.persist(storage)
    job.persist(storage, allow_overwrite=True)


@pytest.mark.filterwarnings("ignore:Saving dataset is an experimental:RuntimeWarning")  # Feast's own word of it.
def test_a_saved_dataset_is_read_back_by_feast(project: Project) -> None:
    job = project.history(asked(), ["user_activity:clicks_7d"])
    project.store.create_saved_dataset(job, "clicks", SavedDatasetFileStorage(str(project.folder / "clicks.parquet")))
    assert project.store.registry.get_saved_dataset("clicks", "headrace").join_keys == [
        "label",
        "item_id",
        "user_id",
        "note",
    ]


class Seen(Profiler, Profile):
    """Which texts a column has: others are a mistake."""

    def __init__(self, column: str, known: frozenset[str] = frozenset()) -> None:
        self.column, self.known = column, known

    def analyze_dataset(self, dataset: pd.DataFrame) -> Seen:
        return Seen(self.column, frozenset(dataset[self.column].dropna()))

    def validate(self, dataset: pd.DataFrame) -> Any:
        new = set(dataset[self.column].dropna()) - self.known
        errors = [ValidationError("unknown", self.column, repr(each)) for each in sorted(new)]
        return SimpleNamespace(is_success=not errors, errors=errors)

    def to_proto(self) -> Any:
        raise NotImplementedError

    @classmethod
    def from_proto(cls, proto: Any) -> Any:
        raise NotImplementedError


@pytest.mark.filterwarnings("ignore:.*is an experimental feature:RuntimeWarning")  # Feast's own word of it.
def test_what_was_served_is_validated_by_feast(project: Project) -> None:
    """As `feast validate` does: logged to files, read of a time, against a data set that was saved."""
    store = project.store
    view = store.get_stream_feature_view("item_activity")[["category"]]
    logged = LoggingConfig(FileLoggingDestination(path="logged"))
    service = feast.FeatureService(name="logged", features=[view], logging_config=logged)
    store.apply([service])
    job = project.history(asked(), ["item_activity:category"])
    storage = SavedDatasetFileStorage(str(project.folder / "categories.parquet"))
    saved = store.create_saved_dataset(job, "categories", storage)
    reference = saved.as_reference("categories", Seen("item_activity__category"))
    schema = FeatureServiceLoggingSource(service, "headrace").get_schema(store.registry)
    times = [datetime(2033, 5, day, tzinfo=UTC) for day in (1, 2, 3)]
    known = job.to_df()["item_activity__category"].dropna().iloc[0]
    for category, time in zip([known, None, "no such"], times, strict=True):
        row = {"item_id": "i1", "item_activity__category": category, LOG_TIMESTAMP_FIELD: time}
        store.write_logged_features(pa.Table.from_pylist([row], schema), service)

    def validated(last: datetime) -> Any:
        given: Any = {"throw_exception": False, "cache_profile": False}
        return store.validate_logged_features(service, times[0], last, reference, **given)

    assert validated(times[1]) is None
    assert [each.check_config for each in validated(times[2]).validation_report.errors] == ["'no such'"]


def test_short_names_are_feasts(project: Project) -> None:
    job = project.store.get_historical_features(asked(), ["user_activity:clicks_7d"], full_feature_names=False)
    assert job.to_df().columns.tolist() == [*asked(), "clicks_7d"]


def test_a_short_name_that_a_column_has_is_refused(project: Project) -> None:
    """Two columns of one name can't be told apart."""
    frame = asked().assign(clicks_7d=1)
    with pytest.raises(ValueError, match=r"clicks_7d: .*full_feature_names=True"):
        project.store.get_historical_features(frame, ["user_activity:clicks_7d"], full_feature_names=False)


def test_an_event_does_not_count_at_its_own_time(project: Project) -> None:
    """Strictly before: what is to be predicted must not be among what it is predicted from."""
    labels = project.events["likes"][-1:]
    frame = pd.DataFrame(labels)[["user_id", "t"]]
    times = [pd.Timestamp(labels[0]["t"] + ms, unit="ms", tz="UTC") for ms in (0, 1)]
    both = pd.concat([frame.assign(event_timestamp=at) for at in times])
    before, after = project.history(both, ["user_activity:likes_7d"]).to_df()["user_activity__likes_7d"]
    assert after == before + 1


def test_without_labels_every_event_of_a_time_is_one(project: Project) -> None:
    """As Feast has it: a row for what happened in a time, as of when it happened, with what was known before."""
    start_ms = NOW_MS - 6 * 3_600_000
    features = ["user_item:clicked", "item_activity:clicks_7d"]
    start, end = (datetime.fromtimestamp(ms / 1000, UTC) for ms in (start_ms, NOW_MS))
    job = project.store.get_historical_features(
        features=features, full_feature_names=True, start_date=start, end_date=end
    )
    found = job.to_df()
    happened = {
        (event["user_id"], event["item_id"], event["t"])
        for many in project.events.values()
        for event in many
        if start_ms <= event["t"] < NOW_MS
    }
    times_ms = [at.value // 1_000_000 for at in found["event_timestamp"]]
    rows = list(zip(found["user_id"], found["item_id"], times_ms, strict=True))
    assert rows == sorted(happened, key=lambda each: (each[2], each[0], each[1]))
    labels = found[["user_id", "item_id", "event_timestamp"]]
    assert project.history(labels, features).to_df().equals(found)


def test_labels_are_no_sql(project: Project) -> None:
    with pytest.raises(NotImplementedError, match="a row for each label"):
        project.history("SELECT 1", ["user_activity:clicks_7d"])  # type: ignore[arg-type]  # as Feast lets one
