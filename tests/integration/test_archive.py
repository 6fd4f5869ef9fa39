"""The archive holds every accepted event once, in order of offsets, whoever is killed meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from features.events import Kind
from store.archive import ArchiveTable, tables_of
from store.plans import load_plan
from tests.support.effort import effort
from tests.support.feed import an_event
from tests.support.stack import TOPICS, Stack, children_of, wait_for

pytestmark = pytest.mark.kafka

KILLS = effort(6, 20)
KINDS: tuple[Kind, ...] = ("str", "float")


def tables(stack: Stack) -> dict[str, ArchiveTable]:
    return tables_of(stack.settings, load_plan(stack.settings))


def read_up_to(stack: Stack) -> dict[str, list[int]]:
    """The offsets before which the archive has everything, by topic and partition."""
    found = {topic: table.complete() for topic, table in tables(stack).items()}
    return {topic: [at[number].next for number in sorted(at)] for topic, at in found.items()}


def is_complete(stack: Stack) -> bool:
    read = read_up_to(stack)
    return read == {topic: [end for end in stack.ends(topic) if end] for topic in read}


def has_moved(stack: Stack, before: dict[str, list[int]]) -> bool:
    return read_up_to(stack) != before


def taken_up(stack: Stack, n: int) -> bool:
    """Whether an archiver of the n-th plan writes: what one of an earlier plan archives has not the new fields."""
    return stack.log("archiver").count("tables_claimed") == n


def has_noticed(stack: Stack, name: str) -> bool:
    return "was made anew" in stack.log(name)


def events_in(stack: Stack, topic: str) -> list[dict[str, Any]]:
    """All that the archive has of a topic, by partition and offset, as anybody reads a Delta table."""
    table = DeltaTable(stack.settings.archive_url() + "/" + topic).to_pyarrow_table()
    found: list[dict[str, Any]] = table.sort_by([("_partition", "ascending"), ("_offset", "ascending")]).to_pylist()
    return found


class Sending:
    """Sends events, some late, doubled, or refused by their contract, and knows which the archive must hold."""

    def __init__(self, stack: Stack, rng: random.Random) -> None:
        self._stack, self._rng, self._number = stack, rng, 0
        self.accepted: dict[str, dict[str, dict[str, Any]]] = {topic: {} for topic in TOPICS}

    def send(self, count: int) -> None:
        records: list[tuple[str, str, dict[str, Any] | bytes]] = []
        for _ in range(count):
            topic, event = self._rng.choice(TOPICS), an_event(self._rng, self._number)
            self._number += 1
            if self._rng.random() < 0.1:
                event["occurred_at"] -= self._rng.randrange(40 * 86_400_000)
            if self._rng.random() < 0.05:
                records.append((topic, event["user_id"], b'{"user_id": 7}'))
                continue
            self.accepted[topic][event["event_id"]] = event
            records += [(topic, event["user_id"], event)] * (2 if self._rng.random() < 0.05 else 1)
        self._stack.produce(records)


def test_an_archiver_killed_again_and_again_repeats_nothing_and_loses_nothing() -> None:
    """Kills while events flow, of a worker or of the supervisor with it, and compaction and vacuum in between.

    Offsets in another commit than events would repeat what was written before a kill, or lose what was not.
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    with Stack(archive_commit_s=0.2) as stack:
        sending = Sending(stack, rng)
        archiver = start(stack)
        kills: Counter[str] = Counter()
        for number in range(KILLS):
            before = read_up_to(stack)
            sending.send(rng.randrange(50, 400))
            if rng.random() < 0.7:  # Others die before they have written anything.
                wait_for("some is archived", partial(has_moved, stack, before))
            time.sleep(rng.random() * 0.3)
            if number % 3 == 2 and all(table.exists for table in tables(stack).values()):
                stack.headrace("archive", "--compact", "--vacuum", "--status")
                kills["compacted"] += 1
            workers = children_of(archiver)
            if workers and rng.random() < 0.7:
                os.kill(rng.choice(workers), signal.SIGKILL)
                kills["worker"] += 1
            else:
                archiver.kill()
                archiver.wait()
                for worker in workers:  # They hear that nobody is left to tell them, in time; now is sooner.
                    os.kill(worker, signal.SIGKILL)
                archiver = start(stack)
                kills["supervisor"] += 1
        sending.send(200)
        wait_for("all is archived", lambda: is_complete(stack))
        print(kills, {topic: len(events) for topic, events in sending.accepted.items()})
        for topic in TOPICS:
            check(stack, topic, sending.accepted[topic])
        stack.stop("archiver")
        held = {topic: events_in(stack, topic) for topic in TOPICS}
        print(stack.headrace("archive", "--compact", "--vacuum", "--status"))
        assert {topic: events_in(stack, topic) for topic in TOPICS} == held
        assert is_complete(stack)


def start(stack: Stack) -> subprocess.Popen[bytes]:
    script = "from streams import supervise; supervise._STEADY_S = 1; from headrace.cli import main; main()"
    return stack.start("archiver", "-c", script, "archive")


def check(stack: Stack, topic: str, accepted: dict[str, dict[str, Any]]) -> None:
    """Each event once, with all its fields, where the broker has its first record."""
    first: dict[str, tuple[int, int]] = {}
    for message in sorted(stack.read_topic(topic), key=lambda message: (message.partition(), message.offset())):
        sent = json.loads(message.value())
        if "event_id" in sent:
            first.setdefault(sent["event_id"], (message.partition(), message.offset()))
    rows = events_in(stack, topic)
    assert Counter(row["event_id"] for row in rows) == Counter(accepted.keys())
    for row in rows:
        event = accepted[row["event_id"]]
        assert (row["_partition"], row["_offset"]) == first[row["event_id"]]
        assert row["occurred_at"].timestamp() * 1000 == pytest.approx(event["occurred_at"], abs=0.001)
        assert row["_day"] == min(row["occurred_at"], row["_recorded_at"]).date()
        assert {name: row[name] for name in ("user_id", "item_id", "category", "price")} == {
            name: event[name] for name in ("user_id", "item_id", "category", "price")
        }


DECLARED = """
from headrace import Entity, Event, agg, service, view

user = Entity("user", key="user_id", forget_after="90d")


class Click(Event, topic="clicks"):
    user_id: str
    {fields}

{more}
@view(user)
class Activity:
    clicks = agg.count(Click, over="24h")
    {features}


shop_v1 = service("shop_v1", Activity)
"""
LIKE = """
class Like(Event, topic="likes"):
    user_id: str

"""


def test_the_archive_follows_plans_and_topics(tmp_path: Path) -> None:
    """A field and a topic are added, a field gets another type, a topic is made anew: no event is lost, none another's.

    The archiver is told nothing; the last needs the consent that the stream needs.
    """
    likes = 'likes = agg.count(Like, over="1h")'

    def declare(fields: str, more: str = "", features: str = "") -> None:
        (tmp_path / "archived_shop.py").write_text(DECLARED.format(fields=fields, more=more, features=features))

    declare("price: float | None = None")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with Stack(code=tmp_path, definitions="archived_shop", archive_commit_s=0.2, partitions=1) as stack:
            number = count()

            def send(topic: str, n: int, **fields: Any) -> None:
                every = [{"event_id": f"e{next(number)}", "occurred_at": time.time_ns() // 1_000_000} for _ in range(n)]
                stack.produce((topic, "u1", {**event, "user_id": "u1", **fields}) for event in every)

            def archived(n: int) -> None:
                wait_for("all is archived", lambda: is_complete(stack) and len(events_in(stack, "clicks")) == n)

            start(stack)
            send("clicks", 5, price=2.5)
            archived(5)

            declare("price: float | None = None\n    surface: str | None = None", LIKE, likes)
            stack.headrace("apply")
            wait_for("it is taken up", partial(taken_up, stack, 2))
            send("clicks", 4, price=3.5, surface="search")
            send("likes", 3)
            archived(9)
            assert [row["surface"] for row in events_in(stack, "clicks")] == [None] * 5 + ["search"] * 4
            assert len(events_in(stack, "likes")) == 3

            declare("price: str | None = None\n    surface: str | None = None", LIKE, likes)
            stack.headrace("apply", "--replace", "Click")
            wait_for("it is taken up", partial(taken_up, stack, 3))
            send("clicks", 2, price="dear")
            archived(11)
            table = tables(stack)["clicks"]
            now, before = (
                [price for batch in table.scan({"price": kind}) for price in batch["price"].to_pylist()]
                for kind in KINDS
            )
            assert sorted(now, key=str) == [None] * 9 + ["dear"] * 2
            assert sorted(before, key=str) == [2.5] * 5 + [3.5] * 4 + [None] * 2

            stack.start_stream(1)
            stack.wait_until_committed()
            stack.make_anew("clicks")
            send("clicks", 3)
            for name in ("archiver", "stream"):
                wait_for("the topic is seen to be another", partial(has_noticed, stack, name))
                stack.stop(name)
            stack.headrace("accept-topic", "clicks")
            start(stack)
            archived(14)
            assert [row["_offset"] for row in events_in(stack, "clicks")][:6] == [0, 0, 1, 1, 2, 2]
