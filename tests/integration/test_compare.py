"""What was served is computed again: nothing differs, unless somebody meddles with Redis, and then it is said where.

And how it is distributed is said, with whether events are as their contracts expect.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from prometheus_client.parser import text_string_to_metric_families

from features.layout import families_of
from store.plans import load_plan
from store.served import read
from tests.support.feed import TOPICS, Sender, an_event
from tests.support.stack import Stack, wait_for

pytestmark = pytest.mark.kafka

CONTRACTS = {"Impression": "impressions", "Click": "clicks", "Like": "likes"}


class Shop:
    """Events that flow, some of them late, and requests of all kinds."""

    def __init__(self, stack: Stack, rng: random.Random) -> None:
        self._stack, self._rng, self._number = stack, rng, 0
        self._sender = Sender(stack.kafka.bootstrap_servers)

    def send(self, n: int, topics: Sequence[str] = TOPICS, **more: Any) -> None:
        for _ in range(n):
            self._number += 1
            event = an_event(self._rng, self._number, users=60, items=300) | more
            if self._rng.random() < 0.2:
                event["occurred_at"] -= self._rng.randrange(6 * 86_400_000)
            self._sender.send(self._rng.choice(topics), event["user_id"], event)
        self._sender.flush()

    def sent(self, topic: str) -> list[Any]:
        """All events of a topic."""
        return [event for place, event in self._sender.sent.items() if place[0] == topic]

    @contextmanager
    def flowing(self) -> Iterator[None]:
        ends = threading.Event()

        def flow() -> None:
            while not ends.wait(0.05):
                self.send(2)

        thread = threading.Thread(target=flow)
        thread.start()
        try:
            yield
        finally:
            ends.set()
            thread.join()

    def ask(self, address: str, n: int) -> None:
        """As a ranking service does, in all formats, also with what it knows of items itself."""
        for _ in range(n):
            items = [f"i{self._rng.randrange(320)}" for _ in range(5)]
            user = None if self._rng.random() < 0.1 else f"u{self._rng.randrange(66)}"
            body: dict[str, Any] = {"service": "ranking_v1", "user_id": user}
            if self._rng.random() < 0.3:
                body["items"] = [{"id": item, "price": round(self._rng.random() * 90, 2)} for item in items]
            else:
                body["item_ids"] = items
            accept = self._rng.choice(["application/json", "application/vnd.apache.arrow.stream", "application/x-npy"])
            httpx.post(f"{address}/v1/features", json=body, headers={"Accept": accept}, timeout=30).raise_for_status()
            for one in (f"user/u{self._rng.randrange(66)}", f"item/i{self._rng.randrange(320)}"):
                httpx.get(f"{address}/v1/entities/{one}?service=feed_v1", timeout=30).raise_for_status()


def found_by(stack: Stack, command: str, *options: str) -> tuple[int, Any]:
    """The command's status and what it found."""
    argv = [sys.executable, "-m", "headrace", command, "--json", *options]
    done = subprocess.run(argv, env=stack.environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode in {0, 1}, done.stdout + done.stderr
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_nothing_differs_but_what_was_meddled_with() -> None:
    """With events on their way and late ones, from archive and Kafka: 0 mismatches; then one row is another's.

    By the events' own times alone, every late event would be a difference; without leaving out what was on its way,
    every event that came with the request.

    Meanwhile, how it is distributed is what was kept of it says, and events are as contracts expect until some are not.
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    sample = {"ranking_v1": 1.0, "feed_v1": 1.0}
    with Stack(archive_commit_s=0.5, sample=sample) as stack:
        stack.settings.sample_folder = stack.folder / "served"
        shop = Shop(stack, random.Random(seed))
        stack.start_worker("worker")
        stack.start("archiver", "-m", "headrace", "archive")
        address = stack.start_server()
        shop.send(1_500)
        stack.wait_until_committed()
        time.sleep(1.5)  # What was sent is no longer on its way.
        shop.ask(address, 30)
        with shop.flowing():
            shop.ask(address, 60)
        stack.wait_until_committed()
        wait_for("all is kept", lambda: (kept(stack, "ranking_v1"), kept(stack, "feed_v1")) == (450, 180))
        status, found = found_by(stack, "compare", "--settle", "1s")
        compared = {(each["service"], each["feature"]): each for each in found["features"]}
        undecided = sum(each["undecided"] for each in compared.values())
        print(f"{found['rows']} rows compared, {undecided} values undecided")
        assert [each for each in compared.values() if each["mismatches"]] == []
        assert status == 0
        assert found["rows"] == 630
        assert undecided < sum(each["rows"] for each in compared.values()) / 10
        assert {service for service, _ in compared} == set(sample)
        look_at_quality(stack, shop)

        plan = load_plan(stack.settings)
        (family, *_) = families_of(plan, plan.view("user_activity"))
        keys = stack.keyspace.rows(family, [b"u1", b"u2"])
        assert stack.client.get(keys[1])
        stack.client.set(keys[0], stack.client.get(keys[1]))
        time.sleep(1.5)
        before = kept(stack, "feed_v1")
        httpx.get(f"{address}/v1/entities/user/u1?service=feed_v1", timeout=30).raise_for_status()
        httpx.get(f"{address}/v1/entities/user/u2?service=feed_v1", timeout=30).raise_for_status()
        wait_for("both are kept", lambda: kept(stack, "feed_v1") == before + 2)
        status, found = found_by(stack, "compare", "--settle", "1s", "--service", "feed_v1")
        assert status == 1
        wrong = [each for each in found["features"] if each["mismatches"]]
        assert {each["feature"].partition("__")[0] for each in wrong} == {"user_activity"}
        for each in wrong:
            assert [example["ids"]["user_id"] for example in each["examples"]] == ["u1"] * len(each["examples"])
            (example, *_) = each["examples"]
            assert example["served"] != example["computed"]
            assert {event["user_id"] for event in example["events"]} <= {"u1"}
        assert any(example["events"] for each in wrong for example in each["examples"])


def look_at_quality(stack: Stack, shop: Shop) -> None:
    """Of the same answers and events: shares against a reference of which one column is another's."""
    tables = dict(read(stack.settings.sample_path(), 0))
    served = tables["ranking_v1"]
    at = served.column_names.index("user_activity__clicks_24h")
    reference, metrics = stack.folder / "reference.parquet", stack.folder / "quality.prom"
    pq.write_table(served.set_column(at, served.column_names[at], pc.add(served.column(at), 1000)), reference)
    options = ("--since", "7d", "--reference", str(reference), "--prometheus", str(metrics))
    status, found = found_by(stack, "quality", *options)
    assert status == 0
    features = {(each["service"], each["feature"]): each for each in found["features"]}
    n_items = len(served.group_by(["event_timestamp", "item_id"]).aggregate([]))
    clicks = features["ranking_v1", "user_activity__clicks_24h"]
    assert clicks["rows"] == len(pc.unique(served["event_timestamp"])) == 90
    assert features["ranking_v1", "item_activity__price"]["rows"] == n_items
    assert features["feed_v1", "user_activity__clicks_24h"]["rows"] == 90
    assert features["feed_v1", "item_activity__price"]["rows"] == 90
    of_items = tables["feed_v1"].filter(pc.field("item_id").is_valid())["item_activity__price"]
    assert features["feed_v1", "item_activity__price"]["null"] == of_items.null_count / 90
    psi = {feature: each["psi"] for (service, feature), each in features.items() if service == "ranking_v1"}
    assert psi.pop("user_activity__clicks_24h") > 0.25
    assert set(psi.values()) == {0}
    assert found_by(stack, "quality", "--psi-max", "0.25", *options)[0] == 1
    assert {(each["contract"], each["events"]) for each in found["checks"]} == {
        (contract, len(shop.sent(topic))) for contract, topic in CONTRACTS.items()
    }
    assert not any(each["breached"] for each in found["checks"])

    shop.send(200, ["clicks"], category=None)
    status, found = found_by(stack, "quality", *options)
    assert status == 1
    (breached,) = (each for each in found["checks"] if each["breached"])
    sent = shop.sent("clicks")
    assert breached == {
        "contract": "Click",
        "check": 'share_null("category") < 0.05',
        "events": len(sent),
        "value": sum(event["category"] is None for event in sent) / len(sent),
        "breached": True,
    }
    broken = {
        (sample.labels["contract"], sample.labels["check"]): sample.value
        for family in text_string_to_metric_families(metrics.read_text())
        for sample in family.samples
        if sample.name == "headrace_quality_breach"
    }
    assert len(broken) == len(found["checks"])
    assert {check for check, value in broken.items() if value} == {("Click", 'share_null("category") < 0.05')}
    stack.wait_until_committed()


def kept(stack: Stack, service: str) -> int:
    """How many rows of a service were kept."""
    return sum(len(table) for name, table in read(stack.settings.sample_path(), 0) if name == service)
