"""Nothing lost, nothing twice: kill -9 in mid-flow, zombies, and malformed messages."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from functools import partial
from typing import Any

import pytest

from tests.support.effort import effort
from tests.support.feed import an_event, differences
from tests.support.stack import Stack, wait_for

pytestmark = pytest.mark.kafka


def test_kill_9_with_zombies_leaves_every_row_as_brute_force_has_it() -> None:
    """Workers are killed in mid-flow or stopped and continued beside their successors: 0 differences.

    Writes without the compared record would count an event twice here: a zombie's and its successor's. Offsets kept
    apart from rows would lose or repeat what lay between two kills.
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    events: dict[str, list[dict[str, Any]]] = {topic: [] for topic in ("impressions", "clicks", "likes")}
    number = 0

    def produce(stack: Stack, count: int) -> None:
        nonlocal number
        records = []
        for _ in range(count):
            topic = rng.choice(("impressions", "clicks", "clicks", "likes"))
            event = an_event(rng, number)
            number += 1
            events[topic].append({**event, "t": event["occurred_at"]})
            records += [(topic, event["user_id"], event)] * (2 if rng.random() < 0.02 else 1)  # a producer's retry
        stack.produce(records)

    with Stack(shards=8, lanes=2, chunk_events=200) as stack:
        address = stack.start_server()
        zombies = []
        worker = stack.start_worker("worker-0")
        for round_number in range(effort(5, 10)):
            produce(stack, 600)
            # In mid-flow: some of what was just sent may be committed, the rest is not.
            time.sleep(rng.uniform(0.0, 0.6))
            successor = f"worker-{round_number + 1}"
            if round_number % 3 == 1:
                # Stopped before, it would claim the shards once it goes on, and its successor had to end.
                claims = partial(has_claimed, stack, f"worker-{round_number}")
                wait_for("the worker has claimed", claims)
                worker.send_signal(signal.SIGSTOP)
                zombies.append((worker, f"worker-{round_number}"))
                worker = stack.start_worker(successor)
                wait_for("the successor has claimed", partial(has_claimed, stack, successor))
                zombies[-1][0].send_signal(signal.SIGCONT)
            else:
                worker.kill()
                worker.wait()
                worker = stack.start_worker(successor)
        produce(stack, 600)
        stack.wait_until_committed()
        for zombie, name in zombies:
            wait_for(f"{name} stops by itself", partial(has_stopped, zombie))
            assert zombie.returncode in (3, -9), stack.log(name)
            if zombie.returncode == 3:
                assert "superseded" in stack.log(name)
        assert any(zombie.returncode == 3 for zombie, _ in zombies)
        wrong = differences(address, events)
        print(f"{number} events, {len(zombies)} zombies, {len(wrong)} differences")
        assert not wrong, (len(wrong), wrong[:5])


def has_stopped(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process is gone."""
    return process.poll() is not None


def has_claimed(stack: Stack, name: str) -> bool:
    """Whether a worker says that it has all lanes."""
    return stack.log(name).count("lane_claimed") == stack.settings.lanes


def malformed(rng: random.Random, number: int) -> bytes:
    """A message that the contract refuses, of one of many kinds."""
    good = an_event(rng, number) | {"event_id": f"bad{number}"}
    kinds = [
        lambda: b"{not json",
        lambda: b"",
        lambda: b"[]",
        lambda: b'"text"',
        lambda: b"null",
        lambda: json.dumps(good).encode()[:-5],
        lambda: json.dumps(good).encode("utf-16"),
        lambda: json.dumps({**good, "category": "caf\u00e9"}, ensure_ascii=False).encode("latin-1"),
        lambda: json.dumps(_without(good, rng)).encode(),
        lambda: json.dumps({**good, "user_id": 17}).encode(),
        lambda: json.dumps({**good, "item_id": ["i1"]}).encode(),
        lambda: json.dumps({**good, "user_id": ""}).encode(),
        lambda: json.dumps({**good, "price": "12"}).encode(),
        lambda: json.dumps({**good, "price": -1}).encode(),
        lambda: json.dumps({**good, "price": True}).encode(),
        lambda: json.dumps({**good, "price": float("nan")}).encode(),
        lambda: json.dumps({**good, "price": float("inf")}).encode(),
        lambda: json.dumps(good).replace(f'"price": {good["price"]}', '"price": 1e400').encode(),
        lambda: json.dumps({**good, "occurred_at": 0}).encode(),
        lambda: json.dumps({**good, "occurred_at": -5}).encode(),
        lambda: json.dumps({**good, "occurred_at": good["occurred_at"] // 1000}).encode(),
        lambda: json.dumps({**good, "occurred_at": good["occurred_at"] + 2 * 86_400_000}).encode(),
        lambda: json.dumps({**good, "occurred_at": 10**30}).encode(),
        lambda: json.dumps({**good, "occurred_at": "yesterday"}).encode(),
        lambda: json.dumps({**good, "occurred_at": "2025-11-21T10:00:00"}).encode(),
        lambda: json.dumps({**good, "occurred_at": 1.5}).encode(),
        lambda: json.dumps({**good, "category": "x" * 900_000}).encode(),
        lambda: json.dumps({**good, "item_id": "i\0"}).encode(),
        lambda: json.dumps({**good, "user_id": "u\ud800"}).encode(),
        lambda: b"\x00\x01\x02\xff\xfe",
        lambda: b"[" * 5_000,
    ]
    return kinds[number % len(kinds)]()


def _without(event: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    missing = rng.choice(("event_id", "user_id", "item_id", "occurred_at"))
    return {name: value for name, value in event.items() if name != missing}


def test_a_thousand_malformed_messages_are_dead_letters_and_ten_thousand_good_ones_count() -> None:
    """Every malformed message is in the dead-letter topic with its reason and origin; every good one is counted."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    events: dict[str, list[dict[str, Any]]] = {"clicks": []}
    records: list[tuple[str, str, Any]] = []
    for number in range(10_000):
        event = an_event(rng, number)
        events["clicks"].append({**event, "t": event["occurred_at"]})
        records.append(("clicks", event["user_id"], event))
    bad = [malformed(rng, number) for number in range(1_000)]
    records += [("clicks", f"u{number % 80}", value) for number, value in enumerate(bad)]
    rng.shuffle(records)
    with Stack() as stack:
        stack.produce(records)
        stack.start_worker("worker")
        address = stack.start_server()
        stack.wait_until_committed()
        letters = stack.read_topic("clicks.dead-letter")
        assert len(letters) == len(bad)
        assert sorted(letter.value() or b"" for letter in letters) == sorted(bad)
        for letter in letters:
            headers = dict(letter.headers())
            assert headers["reason"], letter.value()[:100]
            topic, partition, offset = letter.key().decode().split("/")
            assert (topic, partition.isdigit(), offset.isdigit()) == ("clicks", True, True)
        wrong = differences(address, events)
        assert not wrong, (len(wrong), wrong[:5])
