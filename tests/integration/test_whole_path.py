"""From a file of events through a real Kafka, the dataflow and a real Redis to HTTP and the Feast SDK: all agree."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import feast
import httpx
import numpy as np
import pytest

from headrace.feast import as_of
from serving.client import Client
from tests.support import compare
from tests.support.stack import Stack

pytestmark = pytest.mark.kafka


def generated(seed: int, users: int, items: int, n: int, end_ms: int) -> dict[str, list[dict[str, Any]]]:
    """Events by topic over the last eight days, most of them recent, Zipf items."""
    rng = np.random.default_rng(seed)
    events: dict[str, list[dict[str, Any]]] = {"impressions": [], "clicks": [], "likes": []}
    for number in range(n):
        topic = rng.choice(["impressions", "clicks", "likes"], p=[0.5, 0.4, 0.1])
        item = int(min(rng.zipf(1.3), items))
        t = end_ms - int(rng.exponential(1 / 24) * 8 * 86_400_000)
        event = {"t": t, "event_id": f"e{number}", "user_id": f"u{rng.integers(users)}", "item_id": f"i{item}"}
        if rng.random() < 0.9:
            event |= {
                "category": f"c{item % 7}",
                "seller_id": f"s{item % 11}",
                "price": round(float(rng.lognormal(3, 1)), 2),
            }
        events[topic].append(event)
    return events


def test_a_replayed_file_reads_the_same_over_http_in_the_sdk_and_by_brute_force() -> None:
    """Every count, list and price of every user and item agrees three ways, at one instant."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    with Stack() as stack:
        now_ms = time.time_ns() // 1_000_000
        events = generated(seed, users=150, items=120, n=6_000, end_ms=now_ms - 1_000)
        file = stack.folder / "events.jsonl"
        lines = [
            json.dumps({**{k: v for k, v in event.items() if k != "t"}, "occurred_at": event["t"], "kind": topic})
            for topic, many in events.items()
            for event in many
        ]
        random.Random(seed).shuffle(lines)
        file.write_text("\n".join(lines))
        print(stack.headrace("replay", str(file), "--topic-column", "kind"))
        stack.start_worker("worker")
        address = stack.start_server()
        stack.wait_until_committed()
        check_everything(stack, address, events)
        check_unmodified_feast_client(stack, address)


def check_everything(stack: Stack, address: str, events: dict[str, list[dict[str, Any]]]) -> None:
    """HTTP, npy, the Feast SDK and brute force on every user and item, at one `as_of`."""
    users, items = compare.by_key(events, "user_id"), compare.by_key(events, "item_id")
    store = feast.FeatureStore(str(stack.folder))
    store.config.online_store.redis_url = stack.redis.url
    service = store.get_feature_service("ranking_v1")
    wrong: list[str] = []
    with httpx.Client(base_url=address, timeout=10) as http, Client(address) as client:
        for user in sorted(users):
            query_ms = time.time_ns() // 1_000_000
            got = http.get(f"/v1/entities/user/{user}", params={"service": "feed_v1", "as_of": query_ms}).json()
            wrong += [
                f"{user} {each}"
                for each in compare.differences(got["features"], compare.expected_user(users[user], query_ms))
            ]
        for chunk in compare.batches(items, 100):
            query_ms = time.time_ns() // 1_000_000
            user = min(users)
            body = {"service": "ranking_v1", "user_id": user, "item_ids": chunk, "as_of": query_ms}
            answer = http.post("/v1/features", json=body).json()
            with as_of(query_ms):
                rows = [{"user_id": user, "item_id": item} for item in chunk]
                sdk = store.get_online_features(features=service, entity_rows=rows, full_feature_names=True).to_dict()
            ranking = client.features("ranking_v1", user, chunk, as_of=query_ms)
            for at, item in enumerate(answer["items"]):
                http_values = {
                    **answer["user"]["features"],
                    **dict(zip(answer["features"], item["values"], strict=True)),
                }
                wrong += [
                    f"{item['id']} {each}"
                    for each in compare.differences(http_values, compare.expected_item(items[item["id"]], query_ms))
                ]
                wrong += [f"{item['id']} sdk {name}" for name, value in http_values.items() if sdk[name][at] != value]
                for column, name in enumerate(ranking.names):
                    value = np.nan if http_values[name] is None else float(http_values[name])
                    if not np.isclose(ranking.matrix[at, column], np.float32(value), equal_nan=True, rtol=1e-6):
                        wrong.append(f"{item['id']} npy {name}")
    print(f"{len(users)} users, {len(items)} items compared")
    assert not wrong, (len(wrong), wrong[:5])


def check_unmodified_feast_client(stack: Stack, address: str) -> None:
    """A Feast client without our code on its path reads ranking_v1 through its own `remote` online store."""
    folder = stack.folder / "remote"
    folder.mkdir()
    registry = stack.folder / "data" / "registry.db"
    (folder / "feature_store.yaml").write_text(
        f"project: headrace\nprovider: local\nregistry: {registry}\n"
        f"online_store: {{type: remote, path: '{address}'}}\nentity_key_serialization_version: 3\n"
    )
    program = textwrap.dedent("""
        import functools, importlib.util, json, sys
        for name in ("headrace", "features", "registry", "store", "serving"):
            assert importlib.util.find_spec(name) is None, name
        from feast import FeatureStore
        store = FeatureStore(".")
        rows = [{"user_id": "u1", "item_id": "i1"}, {"user_id": "nobody", "item_id": "i2"}]
        read = functools.partial(store.get_online_features, entity_rows=rows, full_feature_names=True)
        service = read(features=store.get_feature_service("ranking_v1"))
        listed = read(features=["user_activity:clicks_7d", "item_activity:clicks_7d", "user_history:clicked"])
        print(json.dumps([service.to_dict(), listed.to_dict()]))
    """)
    # -S and an own path leave out the editable install, which is how our code gets on the path here.
    site = str(Path(feast.__file__).resolve().parent.parent)
    command = [sys.executable, "-S", "-c", f"import sys; sys.path.insert(0, {site!r})\n{program}"]
    done = subprocess.run(
        command, cwd=folder, env={"PATH": "/usr/bin"}, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    remote, listed = json.loads(done.stdout.splitlines()[-1])
    body = {"service": "ranking_v1", "user_id": "u1", "item_ids": ["i1"]}
    answer = httpx.post(f"{address}/v1/features", json=body, timeout=10).json()
    own = {**answer["user"]["features"], **dict(zip(answer["features"], answer["items"][0]["values"], strict=True))}
    steady = [
        name
        for name in own
        if name.endswith(("_7d", "__clicked", "__liked", "__category", "__seller", "_24h")) and "popularity" not in name
    ]
    assert len(steady) > 15
    for name in steady:
        assert remote[name][0] == (own[name] if own[name] != [] else None), name
    assert listed["user_activity__clicks_7d"] == [own["user_activity__clicks_7d"], 0]
    assert listed["user_history__clicked"] == [own["user_history__clicked"], None]
