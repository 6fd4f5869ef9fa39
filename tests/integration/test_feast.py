"""Our server and SDK beside Feast's own: its server with its own store, its unmodified clients, its registries."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import feast
import httpx
import msgspec
import pytest
import uvicorn
from feast import types
from feast.errors import (
    FeastError,
    FeastObjectNotFoundException,
    FeatureNameCollisionError,
    FeatureServiceNotFoundException,
    FeatureViewNotFoundException,
)
from feast.feature_server import get_app
from feast.permissions.client.http_auth_requests_wrapper import HttpSessionManager
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.registry_server import start_server
from feast.type_map import python_values_to_proto_values
from feast.value_type import ValueType

from config.settings import Settings
from features.plan import Plan
from headrace.embedded import EmbeddedBroker, EmbeddedRedis, free_port
from headrace.feast import as_of
from registry.apply import apply
from registry.compile import FEAST_TYPES
from registry.ordinary import declared
from registry.register import drift
from serving.app import create_app
from store.connect import connect
from store.plans import plan_changes
from tests.support.served import NOW_MS, SHARDS, Clock, Rows, project_folder, random_events, settings_of
from tests.support.stack import wait_for

pytestmark = pytest.mark.filterwarnings("ignore:Using entity name is deprecated")
VIEWS = {"user_activity": "user_id", "item_activity": "item_id", "user_history": "user_id"}
"""What Feast's own store holds, too, and by which key."""
USERS, ITEMS = [f"u{at}" for at in range(12)], [f"i{at}" for at in range(15)]


@dataclass
class Project:
    """An applied project with rows, and our server of it."""

    plan: Plan
    folder: Path
    store: feast.FeatureStore
    address: str
    kafka: str

    def read(self, features: Any, rows: Any, *, full: bool = True) -> dict[str, list[Any]]:
        """What the SDK answers."""
        with as_of(NOW_MS):
            answer = self.store.get_online_features(features, rows, full_feature_names=full)
        return answer.to_dict(include_event_timestamps=True)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    folder = project_folder(tmp_path_factory.mktemp("ours"))
    with EmbeddedRedis() as redis, EmbeddedBroker() as broker:
        kafka = broker.bootstrap_servers
        settings = Settings(repo=folder, redis_url=redis.url, kafka=kafka, topics="auto", shards=SHARDS)
        plan = apply(settings, connect(redis.url, 10)).plan
        Rows(plan, redis.url, Clock()).write_all(random_events(seed, len(USERS), len(ITEMS), 900))
        store = store_at(folder)
        store.config.online_store.redis_url = redis.url
        with listening(create_app(settings_of(redis.url), plan, clock=Clock())) as address:
            yield Project(plan, folder, store, address, kafka)


@pytest.fixture(scope="module")
def peer(ours: Project, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """`feast serve` with Feast's SQLite store, which holds what ours answers."""
    folder = tmp_path_factory.mktemp("peer")
    (folder / "feature_store.yaml").write_text(
        "project: headrace\nprovider: local\nregistry: registry.db\nonline_store: {type: sqlite, path: online.db}\n"
        "entity_key_serialization_version: 3\n"
    )
    store = store_at(folder)
    entities = {
        key: feast.Entity(name=key[:-3], join_keys=[key], value_type=ValueType.STRING) for key in VIEWS.values()
    }
    views = {}
    for view, key in VIEWS.items():
        source = feast.FileSource(name=view, path=str(folder / "none.parquet"), timestamp_field="at")
        fields = [feast.Field(name=name, dtype=kind) for name, kind in kinds_of(ours.plan, view).items()]
        schema = [feast.Field(name=key, dtype=types.String), *fields]
        views[view] = feast.FeatureView(name=view, entities=[entities[key]], schema=schema, source=source)
    service = feast.FeatureService(name="ranking_v1", features=[views["user_activity"][["clicks_7d"]]])
    store.apply([*entities.values(), *views.values(), service])
    provider: Any = store._get_provider()
    for view, key in VIEWS.items():
        ids, kinds = USERS if key == "user_id" else ITEMS, kinds_of(ours.plan, view)
        # Our times are of an entity's last event, of the views that are read together.
        together = [f"{of}:{name}" for of in VIEWS if VIEWS[of] == key for name in kinds_of(ours.plan, of)]
        got = ours.read(together, {key: ids})
        protos = {name: protos_of(kind, got[f"{view}__{name}"]) for name, kind in kinds.items()}
        rows = [
            (
                EntityKey(join_keys=[key], entity_values=[Value(string_val=id_)]),
                {name: values[at] for name, values in protos.items()},
                datetime.fromtimestamp(got[f"{view}__{min(kinds)}__ts"][at], UTC),
                None,
            )
            for at, id_ in enumerate(ids)
        ]
        provider.online_store.online_write_batch(store.config, views[view], rows, None)
    # After an error of its own, Feast's server closes the connection.
    once = httpx.Limits(max_keepalive_connections=0)
    with listening(get_app(store)) as address, httpx.Client(base_url=address, timeout=60, limits=once) as http:
        yield http


def kinds_of(plan: Plan, view: str) -> dict[str, Any]:
    return {each.name: FEAST_TYPES[each.value_type] for each in plan.features.values() if each.view == view}


def protos_of(kind: Any, values: Sequence[Any]) -> list[Value]:
    known = kind.to_value_type()
    return [Value() if value is None else python_values_to_proto_values([value], known)[0] for value in values]


def store_at(folder: Path) -> feast.FeatureStore:
    return feast.FeatureStore(str(folder))


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """An app behind a port of 127.0.0.1; gives its address. However slow the machine, it closes no idle connection."""
    port = free_port()
    options: Any = {"log_level": "error", "lifespan": "on", "timeout_keep_alive": 600}
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for("the server listens", lambda: server.started or not thread.is_alive())
        assert server.started
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


@contextmanager
def remote(ours: Project, folder: Path, address: str) -> Iterator[feast.FeatureStore]:
    """Feast's own client of a server, on the project's registry."""
    folder.mkdir()
    (folder / "feature_store.yaml").write_text(
        f"project: headrace\nprovider: local\nregistry: {ours.folder / 'data' / 'registry.db'}\n"
        f"online_store: {{type: remote, path: '{address}', connection_retries: 1}}\n"
        "entity_key_serialization_version: 3\n"
    )
    yield store_at(folder)
    HttpSessionManager.close_session()


# The server beside `feast serve`


def columns_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """A column's values, statuses and times by its name; an empty list is null, as ours has it."""
    return {
        name: {
            "values": [None if value in ([], {}) else value for value in result["values"]],
            "statuses": result["statuses"],
            "times": [datetime.fromisoformat(each).replace(microsecond=0) for each in result["event_timestamps"]],
        }
        for name, result in zip(document["metadata"]["feature_names"], document["results"], strict=True)
    }


ONE = {"user_id": ["u1"]}
BOTH = {"user_id": ["u1", "u2"], "item_id": ["i3", "i4"]}
CLICKS = ["user_activity:clicks_7d"]
LISTS = ["user_history:clicked", "user_history:liked", "user_activity:price_max_7d", "item_activity:category"]


@pytest.mark.parametrize(
    "body",
    [
        {"features": CLICKS, "entities": ONE},
        {"features": CLICKS, "entities": ONE, "full_feature_names": True},
        {"features": ["user_activity@latest:clicks_7d"], "entities": ONE},
        {"features": CLICKS, "entities": {"user": ["u1", "u2"]}},
        {"features": CLICKS, "entities": BOTH},
        {"features": CLICKS, "entities": {**ONE, "nobodys_key": [1.5], "clicks_7d": [True]}},
        {"features": CLICKS, "entities": ONE, "unknown": "member"},
        {"features": LISTS, "feature_service": "", "entities": BOTH, "full_feature_names": True},
        {"features": [*LISTS, *CLICKS], "entities": {"user_id": USERS[:10], "item_id": ITEMS[:10]}},
        {"features": [*CLICKS, "item_activity:clicks_7d"], "entities": BOTH, "full_feature_names": True},
        {"features": CLICKS, "entities": {"user_id": USERS * 250}},
    ],
    ids=str,
)
def test_what_feast_answers_we_answer(ours: Project, peer: httpx.Client, body: dict[str, Any]) -> None:
    """Values, statuses and times; also thousands of rows."""
    theirs = peer.post("/get-online-features", json=body)
    assert theirs.status_code == 200, theirs.text
    answer = httpx.post(f"{ours.address}/get-online-features", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    want, got = columns_of(theirs.json()), columns_of(answer.json())
    assert got.keys() == want.keys()
    for name, column in want.items():
        assert got[name] == column, name


def test_ids_are_answered_as_texts_and_a_service_goes_before_features(ours: Project, peer: httpx.Client) -> None:
    body = {
        "feature_service": "ranking_v1",
        "features": LISTS,
        "entities": {"user_id": [7, "7"], "item_id": ["i1", "i2"]},
        "full_feature_names": True,
    }
    for address in (peer.base_url, ours.address):
        answer = httpx.post(f"{address}/get-online-features", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        columns = columns_of(answer.json())
        assert columns["user_id"]["values"] == ["7", "7"]
        assert "user_activity__clicks_7d" in columns


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"entities": ONE, "feature_service": "nope"}, 404),
        ({"entities": ONE, "features": ["nope:clicks_7d"]}, 404),
        ({"entities": ONE, "features": ["user_activity:nope"]}, 404),
        ({"entities": ONE, "features": ["clicks_7d"]}, 422),
        ({"entities": ONE, "features": [*CLICKS, *CLICKS]}, 422),
        ({"entities": ONE, "features": [*CLICKS, *CLICKS], "full_feature_names": True}, 422),
        ({"entities": BOTH, "features": [*CLICKS, "item_activity:clicks_7d"]}, 422),
        ({"entities": ONE}, 422),
        ({"entities": ONE, "features": []}, 422),
        ({"entities": ONE, "features": None}, 422),
        ({"entities": {}, "features": CLICKS}, 422),
        ({"entities": {"item_id": ["i1"]}, "features": CLICKS}, 422),
        ({"entities": {**BOTH, "user_id": ["u1"]}, "features": CLICKS}, 422),
        ({"features": CLICKS}, 422),
    ],
    ids=str,
)
def test_what_feast_refuses_we_refuse(ours: Project, peer: httpx.Client, body: dict[str, Any], status: int) -> None:
    """With its class of error and what it says, where it has one; and never a 500, which its clients send again."""
    theirs = peer.post("/get-online-features", json=body)
    answer = httpx.post(f"{ours.address}/get-online-features", json=body, timeout=60)
    assert (theirs.status_code in (status, 500), answer.status_code) == (True, status)
    raised = FeastError.from_error_detail(answer.json())
    assert raised is not None
    its = FeastError.from_error_detail(theirs.json()) if '"class' in theirs.text.replace("\\", "") else None
    if its is not None:
        assert type(raised) is type(its)
        assert str(raised).startswith(str(its))


# Feast's own clients


def test_feasts_client_raises_feasts_errors(ours: Project, tmp_path: Path) -> None:
    nope = feast.FeatureService(name="nope", features=[])
    asked = [{"user_id": "u1", "item_id": "i1"}]
    wrong: list[tuple[Any, Any, type[FeastError]]] = [
        (nope, asked, FeatureServiceNotFoundException),
        (["nope:clicks_7d"], asked, FeatureViewNotFoundException),
        (["user_activity:nope"], asked, FeastObjectNotFoundException),
        ([*CLICKS, *CLICKS], asked, FeatureNameCollisionError),
        (CLICKS, [{"user_id": 1.0}], FeastError),
        (CLICKS, [{"item_id": "i1"}], FeastError),
    ]
    with remote(ours, tmp_path / "remote", ours.address) as client:
        for features, rows, error in wrong:
            with pytest.raises(FeastError) as raised:
                client.get_online_features(features, rows)
            assert type(raised.value) is error, features


def test_feasts_client_reads_what_the_sdk_does(ours: Project, tmp_path: Path) -> None:
    """A whole service for thousands of rows."""
    rng = random.Random(5)
    rows = [{"user_id": rng.choice(USERS), "item_id": rng.choice(ITEMS)} for _ in range(3000)]
    service = ours.store.get_feature_service("ranking_v1")
    with remote(ours, tmp_path / "remote", ours.address) as client:
        got = client.get_online_features(service, rows, full_feature_names=True).to_dict()
    want = ours.read(service, rows)
    assert got == {
        name: [None if value in ([], {}) else value for value in want[name]]
        for name in want
        if not name.endswith("__ts")
    }


def test_empty_lists_are_what_feasts_client_can_read(ours: Project, tmp_path: Path) -> None:
    """Null, by both of its ways; at `[]`, which `feast serve` sends, one of them ends with an error."""
    features, rows = ["user_history:clicked"], [{"user_id": "nobody"}, {"user_id": "u1"}]
    keys = [EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=row["user_id"])]) for row in rows]
    with remote(ours, tmp_path / "remote", ours.address) as client:
        nobody, somebody = client.get_online_features(features, rows).to_dict()["clicked"]
        view = client.get_stream_feature_view("user_history")
        store: Any = client._get_provider().online_store
        (_, of_nobody), (_, of_somebody) = store.online_read(client.config, view, keys, ["clicked"])
    assert (nobody, bool(somebody)) == (None, True)
    assert (of_nobody["clicked"], list(of_somebody["clicked"].string_list_val.val)) == (Value(), somebody)
    document = {"metadata": {"feature_names": ["clicked"]}, "results": [{"values": [[]], "statuses": ["PRESENT"]}]}
    with pytest.raises(TypeError, match="infer"):
        store._build_online_response_from_json(document)


def test_aliases_are_read_by_feasts_client_of_feasts_server(ours: Project, tmp_path: Path) -> None:
    """Two users in one request. The service was made in Feast, so our own server, which has the plan, knows none."""
    view = ours.store.get_stream_feature_view("user_activity")
    service = feast.FeatureService(
        name="friends",
        features=[
            view[["clicks_7d", "idle_s"]].with_name("buyer"),
            view[["clicks_7d"]].with_name("friend").with_join_key_map({"user_id": "friend_id"}),
        ],
    )
    ours.store.apply([service])
    try:
        rows = [{"user_id": "u1", "friend_id": "u2"}, {"user_id": "u3", "friend_id": "nobody"}]
        want = ours.read(service, rows)
        served: Any = store_at(ours.folder)
        served.config.online_store.redis_url = ours.store.config.online_store.redis_url
        served._get_provider().online_store._clock = Clock()
        with listening(get_app(served)) as address, remote(ours, tmp_path / "remote", address) as client:
            got = client.get_online_features(service, rows, full_feature_names=True).to_dict()
        names = ["user_id", "friend_id", "buyer__clicks_7d", "buyer__idle_s", "friend__clicks_7d"]
        assert list(got) == names
        assert got == {name: want[name] for name in names}
        of_friends = ours.read(CLICKS, [{"user_id": row["friend_id"]} for row in rows])["user_activity__clicks_7d"]
        assert got["friend__clicks_7d"] == of_friends
        with (
            remote(ours, tmp_path / "ours", ours.address) as client,
            pytest.raises(FeatureServiceNotFoundException, match="`feast serve`"),
        ):
            client.get_online_features(service, rows)
    finally:
        ours.store.delete_feature_service("friends")


# Registries


def test_a_registry_in_sql_holds_what_a_file_does(ours: Project, tmp_path: Path, redis_url: str) -> None:
    """Applied once, there is nothing to do; read, it answers; what was taken out comes back."""
    folder = project_folder(tmp_path / "sql")
    text = (folder / "feature_store.yaml").read_text()
    path = f"sqlite:///{folder / 'registry.sqlite'}"
    text = text.replace("data/registry.db", f"{{registry_type: sql, path: '{path}', cache_ttl_seconds: 0}}")
    (folder / "feature_store.yaml").write_text(text)
    with EmbeddedBroker() as broker:
        kafka = broker.bootstrap_servers
        settings = Settings(repo=folder, redis_url=redis_url, kafka=kafka, topics="auto", shards=SHARDS)
        client = connect(redis_url, 10)
        first, second = apply(settings, client), apply(settings, client)
        assert (first.registered, bool(second)) == (True, False)
        store: Any = store_at(folder)
        assert store.registry.get_data_source("headrace_plan", "headrace")
        for view in ours.plan.views:
            assert len(store.registry.list_feature_view_versions(view.name, "headrace")) == 1
        store.config.online_store.redis_url = redis_url
        with as_of(NOW_MS):
            service, row = store.get_feature_service("feed_v1"), {"user_id": "u1", "item_id": "i1"}
            got = store.get_online_features(service, [row], full_feature_names=True)
        assert len(got.to_dict()) == 2 + len(ours.plan.service("feed_v1").features)
        store.registry.delete_feature_view("user_activity", "headrace")
        assert apply(settings, client).registered
        assert store_at(folder).get_stream_feature_view("user_activity").name == "user_activity"
        assert not plan_changes(settings, ordinary=declared(settings).plan).changes


def test_a_registry_behind_feasts_server_is_read_and_compared(ours: Project, tmp_path: Path) -> None:
    """There a stream view's features come with its keys, in any order: each `apply` found all of them changed."""
    port = free_port()
    server: Any = start_server(store_at(ours.folder), port, wait_for_termination=False)
    try:
        folder = project_folder(tmp_path / "behind")
        text = (folder / "feature_store.yaml").read_text()
        text = text.replace("data/registry.db", f"{{registry_type: remote, path: '127.0.0.1:{port}'}}")
        (folder / "feature_store.yaml").write_text(text)
        settings = Settings(repo=folder, kafka=ours.kafka)
        store = store_at(folder)
        assert drift(store, ours.plan, settings, declared(settings).objects) == []
        less = msgspec.structs.replace(ours.plan, services=ours.plan.services[:1])
        gone = [f"deletes FeatureService {each.name}" for each in ours.plan.services[1:]]
        assert drift(store, less, settings, declared(settings).objects) == [
            "changes RequestSource headrace_plan",
            *gone,
        ]
        store.config.online_store.redis_url = ours.store.config.online_store.redis_url
        rows = [{"user_id": "u1"}]
        with as_of(NOW_MS):
            got = store.get_online_features(CLICKS, rows, full_feature_names=True)
        assert got.to_dict(include_event_timestamps=True) == ours.read(CLICKS, rows)
    finally:
        server.stop(None).wait()
