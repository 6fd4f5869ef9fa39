"""Feast's SDK over our online store, and Feast's own HTTP protocol: both equal to /v1, at one instant."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import feast
import httpx
import pandas as pd
import pytest
from click.testing import CliRunner
from feast.cli.cli import cli as feast_cli
from feast.errors import (
    FeastError,
    FeastObjectNotFoundException,
    FeatureNameCollisionError,
    FeatureServiceNotFoundException,
    FeatureViewNotFoundException,
)
from feast.online_response import OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from config.settings import Settings
from features import aggregations as kinds
from features.plan import Contains, EntitySpec, EventSpec, Plan, ServiceSpec, ViewSpec, features_of
from headrace.embedded import EmbeddedBroker, EmbeddedRedis
from headrace.feast import as_of
from registry.apply import apply
from registry.register import register
from store.connect import connect
from store.reader import Reader
from tests import oracle
from tests.support import compare
from tests.support.served import (
    NOW_MS,
    SHARDS,
    Clock,
    Rows,
    names_of,
    project_folder,
    random_events,
    served,
    settings_of,
    values_of,
)


@dataclass
class Project:
    """An applied project with rows from random events."""

    plan: Plan
    store: feast.FeatureStore
    rows: Rows
    redis: EmbeddedRedis
    events: dict[str, list[dict[str, Any]]]

    def read(self, features: Any, entity_rows: Any, *, full: bool = True, at_ms: int = NOW_MS) -> Any:
        """What the SDK answers at an instant; `features` is a list, or the name of a service."""
        if isinstance(features, str):
            features = self.store.get_feature_service(features)
        with as_of(at_ms):
            return self.store.get_online_features(features=features, entity_rows=entity_rows, full_feature_names=full)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    folder: Path = project_folder(tmp_path_factory.mktemp("project"))
    with EmbeddedRedis() as redis, EmbeddedBroker() as broker:
        settings = Settings(
            repo=folder, redis_url=redis.url, kafka=broker.bootstrap_servers, topics="auto", shards=SHARDS
        )
        plan = apply(settings, connect(redis.url, 10)).plan
        rows = Rows(plan, redis.url, Clock())
        events = random_events(seed, users=12, items=15, n=900)
        rows.write_all(events)
        store = feast.FeatureStore(str(folder))
        store.config.online_store.redis_url = redis.url
        yield Project(plan, store, rows, redis, events)


@pytest.fixture
async def http(project: Project) -> AsyncIterator[httpx.AsyncClient]:
    async with served(settings_of(project.redis.url), project.plan, Clock()) as client:
        yield client


def pairs(seed: int, n: int) -> list[dict[str, Any]]:
    """Rows of several users and items, some of them unknown, none at all, or asked for twice."""
    rng = random.Random(seed)
    users = [*(f"u{at}" for at in range(12)), "nobody", None]
    items = [*(f"i{at}" for at in range(15)), "nothing", None]
    rows = [{"user_id": rng.choice(users), "item_id": rng.choice(items)} for _ in range(n)]
    return rows + rows[:3]


# The SDK


async def test_the_sdk_equals_http_and_brute_force(project: Project, http: httpx.AsyncClient) -> None:
    """For every pair of users and items of a request, at one instant, every feature of the service."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    at_ms = NOW_MS - 9_000
    asked = pairs(seed, 40)
    got = project.read("ranking_v1", asked, at_ms=at_ms).to_dict()
    assert [got["user_id"], got["item_id"]] == [[row[key] for row in asked] for key in ("user_id", "item_id")]
    assert list(got)[2:] == list(project.plan.service("ranking_v1").features)
    for at, row in enumerate(asked):
        body = {
            "service": "ranking_v1",
            "user_id": row["user_id"],
            "item_ids": [row["item_id"] or "none"],
            "as_of": at_ms,
        }
        answer = (await http.post("/v1/features", json=body)).json()
        assert {name: got[name][at] for name in list(got)[2:]} == values_of(answer), row
    # Brute force at the clock: at an earlier `as_of`, events of the tile that holds it count too.
    now = project.read("ranking_v1", asked).to_dict()
    users, items = compare.by_key(project.events, "user_id"), compare.by_key(project.events, "item_id")
    for at, row in enumerate(asked):
        values = {name: column[at] for name, column in now.items()}
        expected = {
            name: value
            for name, value in {
                **compare.expected_user(users.get(row["user_id"], {}), NOW_MS),
                **compare.expected_item(items.get(row["item_id"], {}), NOW_MS),
            }.items()
            if name in values
        }
        assert len(expected) > 25
        assert not compare.differences(values, expected), row
        own_clicks = users.get(row["user_id"], {}).get("clicks", ())
        last = oracle.expected("last_k", own_clicks, NOW_MS, field="item_id", k=20)
        assert values["user_item__clicked"] is (row["item_id"] in last)


@pytest.mark.parametrize("service", ["ranking_v1", "feed_v1"])
def test_all_forms_of_an_answer_agree(project: Project, service: str) -> None:
    answer = project.read(service, pairs(3, 20))
    columns = answer.to_dict()
    assert OnlineResponse(answer.proto).to_dict() == columns
    with_times = answer.to_dict(include_event_timestamps=True)
    assert OnlineResponse(answer.proto).to_dict(include_event_timestamps=True) == with_times
    frame = answer.to_df()
    assert list(frame.columns) == list(columns)
    for name, values in columns.items():
        of_frame = [None if value is None or value is pd.NA else value for value in frame[name].tolist()]
        of_frame = [None if isinstance(value, float) and math.isnan(value) else value for value in of_frame]
        assert of_frame == values, name
    assert answer.proto.metadata.feature_names.val == list(columns)


@pytest.mark.parametrize("service", ["ranking_v1", "feed_v1"])
def test_the_arrow_form_agrees_too(project: Project, service: str) -> None:
    """A map keeps its own keys: as a struct, every row would have every other row's, as null."""
    answer = project.read(service, pairs(3, 20))
    table = answer.to_arrow()
    for name, values in answer.to_dict().items():
        maps = name in project.plan.features and project.plan.features[name].value_type.startswith("map")
        got = table[name].to_pylist(maps_as_pydicts="strict" if maps else None)
        assert got == values, name


def test_arrow_types_do_not_depend_on_the_values(project: Project) -> None:
    """A model's reader can't take a column that is `null` or `struct<>` when nobody was seen."""
    some, nobody = [{"user_id": f"u{at}", "item_id": "i1"} for at in range(12)], [{"user_id": "x", "item_id": "x"}]
    assert project.read("feed_v1", nobody).to_arrow().schema == project.read("feed_v1", some).to_arrow().schema


def test_times_of_the_last_event_are_seconds_and_none_of_them_is_before_1970(project: Project) -> None:
    asked = [{"user_id": "u1", "item_id": "i1"}, {"user_id": "nobody", "item_id": "i1"}]
    answer = project.read(["user_activity:clicks_7d"], asked)
    last = max(event["t"] for many in project.events.values() for event in many if event["user_id"] == "u1")
    times = answer.to_dict(include_event_timestamps=True)["user_activity__clicks_7d__ts"]
    assert times == OnlineResponse(answer.proto).to_dict(include_event_timestamps=True)["user_activity__clicks_7d__ts"]
    assert times == [last // 1000, 0]


def statuses(answer: OnlineResponse, n_keys: int) -> list[list[str]]:
    """Of the features, row by row, as Feast names them; the ids come first."""
    return [[FieldStatus.Name(status) for status in each.statuses] for each in answer.proto.results[n_keys:]]


def test_statuses_tell_not_found_from_null(project: Project) -> None:
    project.rows.write("likes", [{"t": NOW_MS - 1, "user_id": "liker", "item_id": "i1"}])
    asked = [{"user_id": user} for user in ("liker", "nobody", None)]
    answer = project.read(["user_activity:likes_7d", "user_activity:price_max_7d"], asked)
    assert statuses(answer, 1) == [["PRESENT", "NOT_FOUND", "NOT_FOUND"], ["NULL_VALUE", "NOT_FOUND", "NOT_FOUND"]]
    assert answer.to_dict()["user_activity__likes_7d"] == [1, 0, 0]


async def test_the_async_call_answers_the_same(project: Project) -> None:
    asked = pairs(5, 10)
    with as_of(NOW_MS):
        answer = await project.store.get_online_features_async(
            features=project.store.get_feature_service("ranking_v1"), entity_rows=asked, full_feature_names=True
        )
    assert answer.to_dict() == project.read("ranking_v1", asked).to_dict()


def test_features_are_answered_in_the_order_asked(project: Project) -> None:
    asked = ["item_activity:clicks_7d", "user_activity:clicks_7d", "user_item:price_ratio", "item_activity:category"]
    got = project.read(asked, pairs(7, 5)).to_dict()
    assert list(got)[2:] == [reference.replace(":", "__") for reference in asked]
    whole = project.read("ranking_v1", pairs(7, 5)).to_dict()
    assert got == {name: whole[name] for name in got}


@pytest.mark.parametrize("feature", ["clicked", "liked", "category_affinity", "seller_affinity", "price_ratio"])
def test_a_cross_feature_can_be_read_alone(project: Project, feature: str) -> None:
    """Also one that needs the item's id and none of its rows."""
    asked = pairs(9, 12)
    got = project.read([f"user_item:{feature}"], asked).to_dict()
    name = f"user_item__{feature}"
    assert got[name] == project.read("ranking_v1", asked).to_dict()[name]


def test_a_service_of_whole_views_made_by_a_user_of_feast_is_read(project: Project) -> None:
    """Feast's registry lists a stream view's key among its features; it is none of ours."""
    store = project.store
    whole = feast.FeatureService(
        name="mine",
        features=[store.get_stream_feature_view("user_activity"), store.get_stream_feature_view("user_history")],
    )
    asked = [{"user_id": "u1"}, {"user_id": "nobody"}]
    with as_of(NOW_MS):
        got = store.get_online_features(features=whole, entity_rows=asked, full_feature_names=True).to_dict()
    views = ("user_activity", "user_history")
    assert set(got) == {"user_id", *(name for name, each in project.plan.features.items() if each.view in views)}
    assert got == {
        name: project.read("feed_v1", [{**row, "item_id": None} for row in asked]).to_dict()[name] for name in got
    }


@pytest.mark.parametrize("full", [True, False])
def test_a_view_is_read_twice_under_other_names_and_by_other_keys(project: Project, full: bool) -> None:
    """As Feast has aliases: two users and their item in one request, each with features of its own.

    Read by the view's name alone, both would be one, and the friend nowhere.
    """
    store = project.store
    view = store.get_stream_feature_view("user_activity")
    features = [
        view[["clicks_7d", "idle_s"]].with_name("buyer"),
        view[["impressions_7d"]].with_name("friend").with_join_key_map({"user_id": "friend_id"}),
        store.get_on_demand_feature_view("user_item")[["clicked"]],
    ]
    service = feast.FeatureService(name="two", features=features)
    asked = [
        {"user_id": "u1", "friend_id": "u2", "item_id": "i1"},
        {"user_id": "u3", "friend_id": "u1", "item_id": "i4"},
    ]
    with as_of(NOW_MS):
        got = store.get_online_features(service, asked, full_feature_names=full)
    users, friends = (
        project.read("ranking_v1", [{"user_id": row[key], "item_id": row["item_id"]} for row in asked]).to_dict()
        for key in ("user_id", "friend_id")
    )
    wanted = {
        "buyer__clicks_7d": users["user_activity__clicks_7d"],
        "buyer__idle_s": users["user_activity__idle_s"],
        "friend__impressions_7d": friends["user_activity__impressions_7d"],
        "user_item__clicked": users["user_item__clicked"],
    }
    keys = {key: [row[key] for row in asked] for key in ("user_id", "friend_id", "item_id")}
    wanted = {name if full else name.partition("__")[2]: values for name, values in wanted.items()}
    assert got.to_dict() == keys | wanted
    assert got.to_arrow().to_pydict() == keys | wanted
    assert wanted["friend__impressions_7d" if full else "impressions_7d"] != users["user_activity__impressions_7d"]
    with pytest.raises(ValueError, match="lack 'friend_id'"):
        store.get_online_features(service, [{"user_id": "u1", "item_id": "i1"}])


@pytest.mark.parametrize("view", ["user_activity", "user_history"])
def test_a_view_is_read_by_feasts_own_paths(project: Project, view: str) -> None:
    """`online_read` is what Feast calls for one view; without names it is for all that the view has."""
    keys = [EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=name)]) for name in ("u1", "nobody")]
    store: Any = project.store._get_provider().online_store
    with as_of(NOW_MS):
        (time, values), nobody = store.online_read(
            project.store.config, project.store.get_stream_feature_view(view), keys
        )
    assert nobody == (None, None)
    assert set(values) == {each.name for each in project.plan.features.values() if each.view == view}
    own = [
        event["t"]
        for topic, many in project.events.items()
        for event in many
        if event["user_id"] == "u1" and (view == "user_activity" or topic != "impressions")
    ]
    assert time.timestamp() == pytest.approx(max(own) / 1000)


def test_short_names_that_collide_are_refused(project: Project) -> None:
    """With Feast's own error and advice, which is another one where the same is asked for twice."""
    both = ["user_activity:clicks_7d", "item_activity:clicks_7d"]
    asked = [{"user_id": "u1", "item_id": "i1"}]
    with pytest.raises(FeatureNameCollisionError, match="full_feature_names=True"):
        project.read(both, asked, full=False)
    with pytest.raises(FeatureNameCollisionError, match=r"clicks_7d found.\n.*rename one of the feature views"):
        project.read([both[0], both[1], both[0]], asked)
    assert set(project.read(both[:1], asked, full=False).to_dict()) == {"user_id", "item_id", "clicks_7d"}


def test_mistakes_say_what_is_wrong(project: Project) -> None:
    with pytest.raises(KeyError, match="user_activity__nope"):
        project.read(["user_activity:nope"], [{"user_id": "u1"}])
    with pytest.raises(FeatureViewNotFoundException, match="Feature view nope does not exist in project headrace"):
        project.read(["nope:clicks_7d"], [{"user_id": "u1"}])
    with pytest.raises(ValueError, match="No features specified"):
        project.read([], [{"user_id": "u1"}])
    with pytest.raises(ValueError, match="lack 'user_id'"):
        project.read(["user_activity:clicks_7d"], [{"nobodys_key": 1}])
    with pytest.raises(ValueError, match=r"lack 'user_id'.*they have: item_id"):
        project.read(["user_activity:clicks_7d"], [{"item_id": "i1"}])
    with pytest.raises(ValueError, match="same keys"):
        project.read(["user_activity:clicks_7d"], [{"user_id": "u1"}, {"item_id": "i1"}])
    with pytest.raises(ValueError, match="as many values"):
        project.read(["user_activity:clicks_7d"], {"user_id": ["u1"], "item_id": ["i1", "i2"]})
    assert project.read(["user_activity:clicks_7d"], {"user_id": []}).to_dict() == {
        "user_id": [],
        "user_activity__clicks_7d": [],
    }


def test_what_is_nobodys_key_is_left_out_of_the_answer(project: Project) -> None:
    """As in Feast: a data frame with a label or a price beside the ids may be passed as it is."""
    asked = [{"user_id": "u1", "item_id": "i1", "label": 1, "clicks_7d": 5}]
    got = project.read(["user_activity:clicks_7d"], asked, full=False).to_dict()
    want = project.read(["user_activity:clicks_7d"], [{"user_id": "u1"}], full=False).to_dict()
    assert got == {"user_id": ["u1"], "item_id": ["i1"], "clicks_7d": want["clicks_7d"]}


def test_ids_may_be_numbers(project: Project) -> None:
    """Of several types in one request, too."""
    project.rows.write("clicks", [{"t": NOW_MS - 1, "user_id": "77", "item_id": "i1"}])
    got = project.read(["user_activity:clicks_7d"], [{"user_id": 77}, {"user_id": "77"}])
    assert got.to_dict()["user_activity__clicks_7d"] == [1, 1]
    assert got.to_arrow()["user_id"].to_pylist() == ["77", "77"]
    numbers = project.read(["user_activity:clicks_7d"], [{"user_id": 77}, {"user_id": None}]).to_arrow()
    assert numbers["user_id"].to_pylist() == [77, None]


def test_no_rows_get_an_empty_answer(project: Project) -> None:
    got = project.read(["user_item:clicked", "user_activity:clicks_7d"], [])
    names = {"user_id", "item_id", "user_item__clicked", "user_activity__clicks_7d"}
    assert got.to_dict() == {name: [] for name in names}
    assert (got.to_df().shape, got.to_arrow().num_rows) == ((0, 4), 0)


def test_a_disabled_view_is_not_served(project: Project) -> None:
    """As in Feast, by the SDK; and served again once it is enabled."""
    store, asked = project.store, [{"user_id": "u1", "item_id": "i1"}]
    store.disable_feature_view("user_taste")
    try:
        with pytest.raises(ValueError, match="'user_taste' is disabled"):
            project.read(["user_taste:top_categories_7d"], asked)
        with pytest.raises(ValueError, match="'user_taste' is disabled"):
            project.read("ranking_v1", asked)
        assert project.read(["user_activity:clicks_7d"], asked).to_dict()
    finally:
        store.enable_feature_view("user_taste")
    assert project.read(["user_taste:top_categories_7d"], asked).to_dict()


def test_features_and_keys_are_named_as_feast_takes_them(project: Project) -> None:
    """A view's latest version, and an entity by its name."""
    asked = [{"user_id": "u1"}, {"user_id": "u2"}]
    want = project.read(["user_activity:clicks_7d"], asked).to_dict(include_event_timestamps=True)
    by_name = [{"user": row["user_id"]} for row in asked]
    got = project.read(["user_activity@latest:clicks_7d"], by_name).to_dict(include_event_timestamps=True)
    assert got == want
    assert want["user_id__ts"] == [0, 0]


def test_values_are_never_written_through_feast(project: Project) -> None:
    columns: dict[str, list[Any]] = {
        feature.name: [None] for feature in project.plan.features.values() if feature.view == "user_activity"
    }
    columns["clicks_1h"] = [1]
    frame = pd.DataFrame({"user_id": ["u1"], "occurred_at": [pd.Timestamp("2033-05-18", tz="UTC")], **columns})
    before = project.rows.client.dbsize()
    with pytest.raises(NotImplementedError, match=r"written by its stream only.*headrace replay"):
        project.store.write_to_online_store("user_activity", frame, allow_registry_cache=False)
    assert project.rows.client.dbsize() == before


def test_feasts_command_to_materialize_leaves_streaming_views_out(project: Project) -> None:
    """Their stream writes them, and it says so; the catalogue's profiles are there afterwards."""
    folder = Path(str(project.store.repo_path)) / "data"
    now = [pd.Timestamp.now("UTC")]
    rows: dict[str, dict[str, list[Any]]] = {
        "user_profile": {"user_id": ["u1"], "country": ["NL"], "joined_days": [3], "brands": [["acme"]]},
        "item_profile": {"item_id": ["i1"], "category": ["c9"], "price": [4.5], "brand": ["acme"]},
        "stock": {"item_id": ["i1"], "left": [7]},
    }
    for name, columns in rows.items():
        pd.DataFrame({**columns, "event_timestamp": now}).to_parquet(folder / f"{name}.parquet")
    words = ["-c", str(project.store.repo_path), "materialize-incremental", "2033-05-18"]
    done = CliRunner().invoke(feast_cli, words, env={"HEADRACE_REDIS_URL": project.redis.url})
    assert done.exit_code == 0, done.output
    streamed = "item_activity, seller_activity, user_activity, user_history, user_taste"
    assert f"Left out are streaming views, whose rows their stream writes: {streamed}" in done.output
    wanted = ["user_profile:country", "item_profile:price", "stock:left", "user_activity:clicks_7d"]
    got = project.read(wanted, {"user_id": ["u1"], "item_id": ["i1"]}, full=False).to_dict()
    assert (got["country"], got["price"]) == (["NL"], [4.5])


def test_feasts_teardown_and_apply_leave_the_rows(project: Project) -> None:
    before = sorted(project.rows.client.keys("*"))
    project.store.apply(project.store.get_entity("user"), partial=True)
    assert sorted(project.rows.client.keys("*")) == before
    feast_store: Any = project.store._get_provider().online_store
    feast_store.teardown(project.store.config, [], [])
    assert sorted(project.rows.client.keys("*")) == before


# Feast's protocol


async def test_feasts_server_protocol_answers_as_the_sdk_does(project: Project, http: httpx.AsyncClient) -> None:
    asked = pairs(11, 10)
    entities = {key: [row[key] for row in asked] for key in ("user_id", "item_id")}
    body = {"feature_service": "ranking_v1", "entities": entities, "full_feature_names": True}
    document = (await http.post("/get-online-features", json=body)).json()
    answer = project.read("ranking_v1", asked)
    columns = answer.to_dict()
    assert set(document) == {"metadata", "results"}
    assert document["metadata"]["feature_names"] == list(columns)
    for name, result in zip(columns, document["results"], strict=True):
        assert set(result) == {"values", "statuses", "event_timestamps"}
        assert result["values"] == [None if value in ([], {}) else value for value in columns[name]], name
    assert [result["statuses"] for result in document["results"][2:]] == statuses(answer, 2)
    assert document["results"][0]["statuses"] == ["PRESENT"] * len(asked)
    times = answer.to_dict(include_event_timestamps=True)
    for name, result in list(zip(columns, document["results"], strict=True))[2:]:
        at_s = [int(datetime.fromisoformat(each).timestamp()) for each in result["event_timestamps"]]
        assert at_s == times[f"{name}__ts"], name
    assert set(document["results"][0]["event_timestamps"]) == {"1970-01-01T00:00:00.000000Z"}
    assert (await http.get("/health")).status_code == 200


async def test_empty_lists_are_null_for_feast_and_empty_for_v1(project: Project, http: httpx.AsyncClient) -> None:
    body: dict[str, Any] = {
        "features": ["user_history:clicked", "user_taste:category_clicks_7d"],
        "entities": {"user_id": ["nobody"]},
    }
    document = (await http.post("/get-online-features", json=body)).json()
    assert document["metadata"]["feature_names"] == ["user_id", "clicked", "category_clicks_7d"]
    assert [result["values"] for result in document["results"]] == [["nobody"], [None], [None]]
    assert document["results"][1]["statuses"] == ["NOT_FOUND"]
    v1 = (await http.get("/v1/entities/user/nobody")).json()["features"]
    assert (v1["user_history__clicked"], v1["user_taste__category_clicks_7d"]) == ([], {})


async def test_a_cross_feature_can_be_read_alone_by_feasts_protocol(http: httpx.AsyncClient) -> None:
    body = {"features": ["user_item:clicked"], "entities": {"user_id": ["u1"], "item_id": ["nothing"]}}
    answer = await http.post("/get-online-features", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["results"][2]["values"] == [False]


ONE = {"user_id": ["u1"]}
BOTH = {"user_id": ["u1"], "item_id": ["i1"]}
CLICKS = ["user_activity:clicks_7d"]


@pytest.mark.parametrize(
    ("body", "status", "error", "mentioned"),
    [
        ({"entities": ONE}, 422, FeastError, "No features specified"),
        ({"features": CLICKS}, 422, FeastError, "entities"),
        ({"features": CLICKS, "entities": {}}, 422, FeastError, "user_id"),
        ({"features": CLICKS, "entities": {"item_id": ["i1"]}}, 422, FeastError, "lack 'user_id'"),
        ({"features": CLICKS, "entities": {"user_id": [1.5]}}, 422, FeastError, "entities.user_id.0"),
        ({"features": CLICKS, "entities": {**BOTH, "item_id": ["i1", "i2"]}}, 422, FeastError, "as many values"),
        ({"features": ["clicks_7d"], "entities": ONE}, 422, FeastError, "<feature_view>:<feature>"),
        ({"features": ["user_activity:nope"], "entities": ONE}, 404, FeastObjectNotFoundException, "activity__nope"),
        ({"features": ["nope:clicks_7d"], "entities": ONE}, 404, FeatureViewNotFoundException, "user_activity"),
        ({"feature_service": "nope", "entities": ONE}, 404, FeatureServiceNotFoundException, "ranking_v1"),
        (
            {"features": [*CLICKS, "item_activity:clicks_7d"], "entities": BOTH},
            422,
            FeatureNameCollisionError,
            str(FeatureNameCollisionError([*CLICKS, "item_activity:clicks_7d"], False)),
        ),
        (
            {"features": [*CLICKS, *CLICKS], "entities": ONE, "full_feature_names": True},
            422,
            FeatureNameCollisionError,
            str(FeatureNameCollisionError(CLICKS, True)),
        ),
    ],
)
async def test_mistakes_in_feasts_protocol_are_feasts_errors(
    http: httpx.AsyncClient, body: dict[str, Any], status: int, error: type[FeastError], mentioned: str
) -> None:
    """As its clients make exceptions of them; on other routes they are problem documents."""
    answer = await http.post("/get-online-features", json=body)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    raised = FeastError.from_error_detail(answer.json())
    assert type(raised) is error
    assert mentioned in str(raised)


@pytest.mark.parametrize("given", [1.0, 1.5, True, False, [1], {"a": 1}])
async def test_an_id_that_is_no_text_or_whole_number_is_refused(
    project: Project, http: httpx.AsyncClient, given: object
) -> None:
    """Made a text, it is another one in each language: `1.0` and `true` were read as the user "1"."""
    project.rows.write("clicks", [{"t": NOW_MS - 1, "user_id": "1", "item_id": "i1"}])
    [clicks] = project.read(CLICKS, [{"user_id": "1"}]).to_dict()["user_activity__clicks_7d"]
    for id_, status in (("1", 200), (1, 200), (given, 422)):
        answer = await http.post("/get-online-features", json={"features": CLICKS, "entities": {"user_id": [id_]}})
        assert answer.status_code == status, answer.text
        if status == 200:
            assert [each["values"] for each in answer.json()["results"]] == [["1"], [clicks]]
    assert f"user_id.0: an id is a text, a whole number or null, and not {given!r}" in str(
        FeastError.from_error_detail(answer.json())
    )


async def test_many_rows_are_answered_in_pieces(project: Project, http: httpx.AsyncClient) -> None:
    """As the SDK answers them, and at one instant; by whole pieces, and by one row more and less."""
    for n in (999, 1000, 1001, 2000, 2001):
        asked = (pairs(n, 100) * 20)[:n]
        entities = {key: [row[key] for row in asked] for key in ("user_id", "item_id")}
        body = {"feature_service": "ranking_v1", "entities": entities, "full_feature_names": True}
        document = (await http.post("/get-online-features", json=body)).json()
        columns = project.read("ranking_v1", asked).to_dict()
        assert document["metadata"]["feature_names"] == list(columns)
        for (name, values), result in zip(columns.items(), document["results"], strict=True):
            assert result["values"] == [None if value in ([], {}) else value for value in values], name
            assert (len(result["statuses"]), len(result["event_timestamps"])) == (n, n), name


# Names


def random_catalogue(rng: random.Random) -> Plan:
    """Three entities, a view of each and one of a pair; features are often named after a key that is not their own."""
    key_of = {"user": "user_id", "item": rng.choice(["item_id", "item"]), "group": rng.choice(["category", "n_1h"])}
    fields: dict[str, Any] = {**dict.fromkeys(key_of.values(), "str"), "price": "float"}

    def aggregation(name: str, window: str | None) -> kinds.Aggregation:
        if window is None:
            return kinds.Last(name=name, event="Click", field="price", kind="float")
        return kinds.Count(name=name, event="Click", over=(window,))

    views = []
    for entity, key in key_of.items():
        named = {name: (name, None) for name in ("price", "seen", *key_of.values())} | {"n_1h": ("n", "1h")}
        del named[key]
        chosen = rng.sample(sorted(named), rng.randint(1, len(named)))
        specs = [aggregation(*named[name]) for name in chosen]
        recent = kinds.LastK(name="recent", event="Click", field=key_of["item"], k=3)
        views.append(ViewSpec(f"of_{entity}", (entity,), (*specs, recent)))  # type: ignore[arg-type]  # every Aggregation is in the union
    pair = (Contains("of_user__recent", "item", rng.choice([key_of["group"], "seen"])),)
    views.append(ViewSpec("pair", ("user", "item"), pair))
    names = [feature.full_name for view in views for feature in features_of(view)]
    services = (
        ServiceSpec("all_v1", tuple(names)),
        ServiceSpec("some_v1", tuple(rng.sample(names, rng.randint(1, len(names))))),
    )
    entities = tuple(EntitySpec(name, key, "90d") for name, key in key_of.items())
    return Plan("headrace", SHARDS, entities, (EventSpec("Click", "clicks", fields, "", ""),), tuple(views), services)


async def test_every_feature_of_a_service_is_in_every_answer(tmp_path: Path, redis_url: str) -> None:
    """Whatever the features are called, in the plan's order: by Feast's SDK, by its protocol, and by view.

    Keys were taken out by name alone, so a feature named as another entity's key was missing from the SDK's answer.
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    named_as_keys = 0
    for at in range(5):
        plan = random_catalogue(rng)
        keys = {spec.name: spec.key for spec in plan.entities}
        named_as_keys += sum(feature.name in keys.values() for feature in plan.features.values())
        folder = project_folder(tmp_path / str(at))
        store = feast.FeatureStore(str(folder))
        store.config.online_store.redis_url = redis_url
        register(store, plan, Settings(kafka="127.0.0.1:1"))
        columns = {key: ["x"] for key in keys.values()}
        async with served(settings_of(redis_url), plan, Clock()) as http:
            for spec in plan.services:
                expected = [*columns, *spec.features]
                service = store.get_feature_service(spec.name)
                answer = store.get_online_features(service, columns, full_feature_names=True)
                assert list(answer.to_dict()) == expected
                assert answer.to_arrow().column_names == expected
                assert list(answer.proto.metadata.feature_names.val) == expected
                body = {"feature_service": spec.name, "entities": columns, "full_feature_names": True}
                document = (await http.post("/get-online-features", json=body)).json()
                assert document["metadata"]["feature_names"] == expected
        for view in plan.views:
            names = [feature.name for feature in features_of(view)]
            own = {keys[entity]: ["x"] for entity in view.entities}
            made = store.get_on_demand_feature_view if len(view.entities) > 1 else store.get_stream_feature_view
            whole = feast.FeatureService(name="mine", features=[made(view.name)])
            assert set(store.get_online_features(whole, own).to_dict()) == {*own, *names}
    assert named_as_keys


def test_a_short_name_that_is_a_key_of_the_request_is_refused() -> None:
    """Answered, the feature's values would stand where the ids are expected, or the ids where the feature's are."""
    entities = (EntitySpec("item", "item_id", "90d"), EntitySpec("group", "category", "90d"))
    category = kinds.Last(name="category", event="Click", field="category", kind="str")
    count = kinds.Count(name="n", event="Click", over=("1h",))
    views = (ViewSpec("item_stats", ("item",), (category,)), ViewSpec("group_stats", ("group",), (count,)))
    reader = Reader(Plan("p", 1, entities, (), views, ()), ["item_stats__category", "group_stats__n_1h"])
    columns = {"item_id": ["i"], "category": ["c"]}

    def read(*, full: bool) -> Any:
        return reader.read(lambda keys: [None] * len(keys), columns, NOW_MS, full=full)

    with pytest.raises(ValueError, match=r"category: a feature and a key .* full_feature_names=True"):
        read(full=False)
    assert read(full=True).to_dict() == {**columns, "item_stats__category": [None], "group_stats__n_1h": [0]}


def test_the_events_cover_all_that_is_compared(project: Project) -> None:
    """Otherwise the comparisons above would compare zeros."""
    assert len(names_of(project.events, "user_id")) > 8
    assert len(names_of(project.events, "item_id")) > 8
    assert all(len(many) > 20 for many in project.events.values())
