"""History for what is new, while events go on and whoever is part of it is killed: nothing missing, nothing twice."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from store.archive import tables_of
from store.commit import read_records
from store.completeness import Completeness, look
from store.forgotten import Forgotten, read_forgotten
from store.keys import Keyspace
from store.plans import applied_plan, layouts_of
from store.reader import Reader
from tests.support.expected import Expected
from tests.support.feed import Sender, an_event
from tests.support.stack import Stack, children_of, wait_for

pytestmark = pytest.mark.kafka

LONG = bool(os.environ.get("HEADRACE_TEST_LONG"))
KILLS = 6 if LONG else 1
"""For each change."""
DAY_MS = 86_400_000
BATCH_EVENTS = 150
CONTRACTS = {"clicks": "Click", "likes": "Like"}
HEAD = """
from headrace import Entity, Event, agg, col, service, view

user = Entity("user", key="user_id", forget_after="90d")
item = Entity("item", key="item_id", forget_after="90d")
seller = Entity("seller", key="seller_id", forget_after="90d")


class Click(Event, topic="clicks"):
    user_id: str
    item_id: str
    category: str
    seller_id: str
    price: float


class Like(Event, topic="likes"):
    user_id: str
    item_id: str
    category: str
    seller_id: str
    price: float


@view(item, owner="us")
class ItemActs:
    \"\"\"Of items.\"\"\"
    likes = agg.count(Like, over=["24h"])
    ctr = agg.ratio(Like, Click, over=["24h"], prior=0.1, strength=10)
    viewers = agg.distinct(Click, "user_id", over=["24h"])
"""
USER = """
@view(user, owner="us")
class UserActs:
    \"\"\"Of users.\"\"\"
    clicks = agg.count(Click, over=[{windows}])
    tastes = agg.count(Click, over=[{windows}], by="category")
    recent = agg.last_k(Click, "item_id", {k})
    spent = agg.sum(Click, "price", over=[{spent}]{where})
    seen = agg.seconds_since(Click)


acts_v1 = service("acts_v1", UserActs.clicks, UserActs.recent, ItemActs.likes)
"""
SELLER = """
@view(seller, owner="us")
class SellerActs:
    \"\"\"Of sellers.\"\"\"
    clicks = agg.count(Click, over=["1h", "all"])
    heat = agg.decayed(Like, half_life="12h")
    dearest = agg.max(Click, "price", over=["7d"])
    latest = agg.last(Click, "category")
"""


def text(*, windows: str = '"1h", "24h"', k: int = 4, spent: str = '"24h"', where: str = "", more: str = "") -> str:
    """A module of definitions."""
    return HEAD + USER.format(windows=windows, k=k, spent=spent, where=where) + more


class Shop:
    """A project whose definitions change, events that flow, servers that are asked, and what must be."""

    def __init__(self, stack: Stack, folder: Path, rng: random.Random) -> None:
        self.stack, self.rng, self._folder = stack, rng, folder
        self.events: dict[str, list[dict[str, Any]]] = {contract: [] for contract in CONTRACTS.values()}
        self.answers: Counter[int] = Counter()
        self.forgotten = Forgotten()
        self._number = 0
        self._sender = Sender(stack.kafka.bootstrap_servers)
        self._flows, self._ends, self._pouring = threading.Event(), threading.Event(), threading.Lock()

    def declare(self, module: str, *options: str) -> None:
        (self._folder / "filled_shop.py").write_text(module)
        print(self.stack.headrace("apply", *options))

    def send(self, n: int, days: float) -> None:
        """Events of so many days, some of them twice, some refused."""
        for _ in range(n):
            self._number += 1
            topic = self.rng.choice(["clicks", "clicks", "likes"])
            event = an_event(self.rng, self._number, users=40, items=30)
            event["occurred_at"] -= int(self.rng.random() ** 3 * days * DAY_MS)
            self.events[CONTRACTS[topic]].append(event | {"t": event["occurred_at"]})
            for _ in range(2 if self.rng.random() < 0.03 else 1):
                self._sender.send(topic, event["user_id"], event)
            if self.rng.random() < 0.01:
                self._sender.send(topic, event["user_id"], b"{}")
        self._sender.flush()

    def flow(self) -> None:
        """Events, now and then late ones, while they are to flow."""
        while not self._ends.is_set():
            self._flows.wait(0.1)
            with self._pouring:  # Who stops the flow has this lock after that: nothing is sent any more.
                if self._flows.is_set():
                    self.send(10, self.rng.choice([0, 0, 12]))
            time.sleep(0.05)

    def ask(self, address: str) -> None:
        """Asks, without end."""
        while not self._ends.wait(0.05):
            body = {"service": "acts_v1", "user_id": "u1", "item_ids": ["i1", "i2"]}
            self.answers[httpx.post(f"{address}/v1/features", json=body, timeout=30).status_code] += 1

    def end(self) -> None:
        self._ends.set()

    def flowing(self, flows: bool) -> None:
        if flows:
            self._flows.set()
            return
        self._flows.clear()
        with self._pouring:
            self.stack.wait_until_committed()

    def job(self, name: str, command: str, *options: str) -> Any:
        """Starts one, with small batches."""
        script = f"from training import history; history.PARTITION_EVENTS = {BATCH_EVENTS}; "
        script += "from registry import backfill; backfill._GRACE_S = 1; "
        return self.stack.start(
            name, "-c", script + "from headrace.cli import main; main()", command, *options, bare=False
        )

    def fill(self, stream: Any, *options: str) -> Any:
        """Has history added while it, workers and the supervisor are killed; returns the stream that runs."""
        killed: Counter[str] = Counter()
        for number in range(KILLS):
            process = self.job(f"backfill-{number}", "backfill", *options)
            moment = self.rng.randrange(12)
            wait_for("it is time", partial(self.has_come, moment, process))
            time.sleep(self.rng.random() * 0.2)
            victim = self.rng.choice(["backfill", "worker", "stream"])
            workers = children_of(stream)
            if victim == "stream":
                stream.kill()
                stream.wait()
            for worker in workers if victim != "backfill" else ():
                os.kill(worker, signal.SIGKILL)
            if victim == "stream":
                stream = self.stack.start_stream(1, f"stream-{self.rng.randrange(1 << 32)}")
            killed[f"{victim} at batch {moment}" if process.poll() is None else "nobody"] += 1
            if victim != "backfill":
                time.sleep(self.rng.uniform(0, 3))
            process.kill()
            process.wait()
        print("killed:", dict(killed))
        self.finish("backfill", *options)
        return stream

    def finish(self, command: str, *options: str) -> None:
        """Has it come to its end."""
        name = f"{command}-{self.rng.randrange(1 << 32)}"
        last = self.job(name, command, *options)
        wait_for(f"{command} is done", lambda: last.poll() is not None, deadline_s=600)
        print(self.stack.log(name))
        assert last.returncode == 0

    def forget(self, *ids: str) -> None:
        """Has users forgotten, one of whom a dead letter names; and all who have not come for long, which is one."""
        self._sender.send("clicks", ids[0], b'{"user_id": "%s"}' % ids[0].encode())
        self._sender.flush()
        self.stack.wait_until_committed()
        said = self.stack.headrace("forget", "user", *ids)
        print(said)
        assert "dead letter clicks.dead-letter/" in said
        assert f"{len(ids)} users are forgotten" in said
        old = an_event(self.rng, -1, users=1, items=1) | {"user_id": "idle"}
        old["occurred_at"] -= 20 * DAY_MS
        self.events["Click"].append(old | {"t": old["occurred_at"]})
        self._sender.send("clicks", "idle", old)
        self._sender.flush()
        self.stack.wait_until_committed()
        said = self.stack.headrace("forget", "user", "--older-than", "19d")
        assert "user idle is forgotten; 0 dead letters" in said, said

    def erased(self) -> None:
        """Compaction takes ids out of the archive's events of before they were forgotten, and nothing else."""
        before = self.archived()
        said = self.stack.headrace("archive", "--compact")
        print(said)
        since_ms = self.forgotten["user"]

        def left(user_id: str | None, at_ms: int) -> str | None:
            return None if user_id and at_ms <= since_ms.get(user_id.encode(), -1) else user_id

        want = [(left(user_id, at_ms), item_id, at_ms) for user_id, item_id, at_ms in before]
        assert sorted(map(str, self.archived())) == sorted(map(str, want))
        assert want != before
        assert "events of who was forgotten are out of it" in said

    def archived(self) -> list[tuple[str | None, str, int]]:
        """User, item and time of all that is archived."""
        plan = applied_plan(self.stack.client, "headrace")
        assert plan is not None
        tables = tables_of(self.stack.settings, plan).values()
        batches = [batch for table in tables for batch in table.scan({"user_id": "str", "item_id": "str"})]
        return [tuple(row.values())[:3] for batch in batches for row in batch.to_pylist()]

    def rebuild(self, shards: int) -> None:
        """Has all rows made anew."""
        self.stack.settings.shards = shards
        for number in range(KILLS // 2):
            process = self.job(f"killed-{number}", "rebuild")
            time.sleep(self.rng.uniform(1, 8))
            process.kill()
            process.wait()
        self.finish("rebuild")
        plan = applied_plan(self.stack.client, "headrace")
        assert plan is not None
        self.stack.keyspace = Keyspace.of(plan)
        assert (plan.shards, plan.generation > 0) == (shards, True)
        others = [
            key
            for key in self.stack.client.scan_iter(match="{headrace[:~]*")
            if not key.startswith(self.stack.keyspace.prefix.encode())
        ]
        assert others == []

    def has_come(self, batches: int, process: Any) -> bool:
        """Whether the plan is filled, and some shard has so many batches; or there are no more."""
        plan = applied_plan(self.stack.client, "headrace")
        if process.poll() is not None:
            return True
        if plan is None or plan.history is None:
            return False
        entities = {view.entities[0] for view in plan.views if view.filling}
        records = read_records(self.stack.client, Keyspace.of(plan).commit_records(entities))
        added = [record.filled for record in records if record and isinstance(record.filled, int)]
        return max(added, default=-1) >= min(batches, plan.history.batches)

    def check(self) -> int:
        """Every feature of everybody against brute force; returns how many values there were."""
        self.flowing(False)
        plan, client, n_values = applied_plan(self.stack.client, "headrace"), self.stack.client, 0
        assert plan is not None
        told = read_forgotten(client, Keyspace.of(plan), plan.stored_entities)
        assert not any(self.forgotten.values()) or told == self.forgotten
        self.forgotten = told
        wrong: list[str] = []
        for entity in plan.entities:
            since_ms = self.forgotten.get(entity.name, {})
            expected = Expected(
                plan,
                {
                    contract: [each for each in many if each["t"] > since_ms.get(each[entity.key].encode(), -1)]
                    for contract, many in self.events.items()
                },
            )
            names = [each.full_name for each in plan.features.values() if each.entities == (entity.name,)]
            if not names:
                continue
            known = sorted({event[entity.key] for many in self.events.values() for event in many})
            now_ms, completeness = time.time_ns() // 1_000_000, Completeness(plan)
            look(completeness, client, now_ms)
            reader = Reader(plan, names, layouts_of(client, plan), completeness)
            answer = reader.read(client.mget, {entity.key: known}, now_ms, full=True)
            assert answer.incomplete == {}
            values = answer.to_dict()
            for at, entity_id in enumerate(known):
                got = {name: values[name][at] for name in names}
                wrong += expected.differences(
                    map(plan.features.__getitem__, names), {entity.name: entity_id}, now_ms, got
                )
            n_values += len(known) * len(names)
        assert wrong == []
        self.flowing(True)
        return n_values


def test_what_is_new_has_its_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A longer window, a view of a new entity, replaced features: after each, all is as if it had always been there.

    And who is forgotten in between is as never seen before that, also after everything was made anew, and everybody
    else as before.
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    (tmp_path / "filled_shop.py").write_text(text())
    monkeypatch.syspath_prepend(str(tmp_path))
    with Stack(code=tmp_path, definitions="filled_shop", archive_commit_s=0.5, chunk_events=100) as stack:
        shop = Shop(stack, tmp_path, rng)
        stream = stack.start_stream(1)
        stack.start("archiver", "-m", "headrace", "archive")
        shop.send(2_000, days=25)
        threads = [threading.Thread(target=shop.flow), threading.Thread(target=shop.ask, args=(stack.start_server(),))]
        for thread in threads:
            thread.start()
        try:
            shop.flowing(True)
            assert shop.check() > 0
            windows = '"1h", "24h", "7d"'
            shop.declare(text(windows=windows))
            stream = shop.fill(stream)
            print("a longer window:", shop.check(), "values, 0 differ")
            if LONG:  # Otherwise together with the next.
                shop.declare(text(windows=windows, more=SELLER))
                stream = shop.fill(stream, "--view", "seller_acts")
                print("a view of a new entity:", shop.check(), "values, 0 differ")
            replaced = text(
                windows=windows, k=9, spent='"24h", "7d"', where=', where=col("category") == "c1"', more=SELLER
            )
            stack.stop("archiver")  # What follows is in Kafka alone.
            shop.declare(replaced, "--replace", "user_acts.spent")
            stream = shop.fill(stream)
            print("a view of a new entity, replaced features:", shop.check(), "values, 0 differ")
            shop.forget("u1", "u2")
            print("two users were forgotten:", shop.check(), "values, 0 differ")
            assert shop.forgotten["user"].keys() == {b"u1", b"u2", b"idle"}
            shop.rebuild(shards=12)
            print("another number of shards:", shop.check(), "values, 0 differ")
            shop.flowing(False)
            served = set(shop.answers)
            stack.client.flushall()
            shop.rebuild(shards=8)
            print("after a loss, and with other shards again:", shop.check(), "values, 0 differ")
            shop.erased()
        finally:
            shop.end()
            for thread in threads:
                thread.join()
        print("answers:", dict(shop.answers))
        assert served == {200}
