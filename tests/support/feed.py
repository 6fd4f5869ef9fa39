"""Random events on their way to Kafka, and what the server must answer afterwards."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import httpx
from confluent_kafka import Producer

from tests.support import compare

TOPICS = ("impressions", "clicks", "likes")


def an_event(rng: random.Random, number: int, users: int = 80, items: int = 60) -> dict[str, Any]:
    """A valid event of now."""
    item = min(int(rng.paretovariate(0.8)), items)
    return {
        "event_id": f"e{number}",
        "occurred_at": time.time_ns() // 1_000_000 - rng.randint(0, 3_600_000),
        "user_id": f"u{rng.randrange(users)}",
        "item_id": f"i{item}",
        "category": f"c{item % 5}",
        "seller_id": f"s{item % 9}",
        "price": round(rng.lognormvariate(3, 1), 2),
    }


def differences(address: str, events: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Every user and item over HTTP against brute force."""
    wrong: list[str] = []
    with httpx.Client(base_url=address, timeout=10) as http:
        for entity, key, expected in (
            ("user", "user_id", compare.expected_user),
            ("item", "item_id", compare.expected_item),
        ):
            for entity_id, own in compare.by_key(events, key).items():
                query_ms = time.time_ns() // 1_000_000
                got = http.get(f"/v1/entities/{entity}/{entity_id}", params={"as_of": query_ms}).json()
                wrong += [
                    f"{entity} {entity_id} {each}"
                    for each in compare.differences(got["features"], expected(own, query_ms))
                ]
    return wrong


class Sender:
    """Sends records, and knows at which topic, partition and offset the broker has each.

    Args:
        kafka: bootstrap servers.
        options: more of librdkafka's.
    """

    def __init__(self, kafka: str, **options: Any) -> None:
        fixed = {"acks": "all", "linger.ms": 5, "message.timeout.ms": 150_000, "log_level": 0}
        self._producer = Producer({"bootstrap.servers": kafka, **fixed, **options})
        self.sent: dict[tuple[str, int, int], Any] = {}
        self._failed: list[Any] = []

    def send(self, topic: str, key: str, value: Mapping[str, Any] | bytes, partition: int = -1) -> None:
        """Sends an event, or raw bytes; may return before the broker has it."""
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self._producer.produce(topic, raw, key, partition=partition, on_delivery=partial(self._delivered, value))
        self._producer.poll(0)

    def flush(self) -> None:
        """Returns when the broker has everything."""
        assert self._producer.flush(150) == 0
        assert not self._failed, self._failed[:3]

    def _delivered(self, value: Mapping[str, Any] | bytes, error: Any, message: Any) -> None:
        if error is not None:
            self._failed.append(error)
        else:
            self.sent[message.topic(), message.partition(), message.offset()] = value


class Feed:
    """Sends random events, each to the partition that is named, and knows those that must count."""

    def __init__(self, kafka: str, seed: int | None = None) -> None:
        seed = random.randrange(1 << 32) if seed is None else seed
        print("seed", seed)
        self._rng = random.Random(seed)
        self._kafka = kafka
        self._sent: dict[tuple[str, int, int], dict[str, Any]] = {}
        self._of_old_topics: list[tuple[str, dict[str, Any]]] = []
        self._number = 0

    def send(self, count: int, topic: str = "clicks", partition: int = -1, **more: Any) -> None:
        """Returns when the broker has them."""
        sender = Sender(self._kafka)  # A new one knows of new partitions.
        for _ in range(count):
            event = an_event(self._rng, self._number) | more
            self._number += 1
            sender.send(topic, event["user_id"], event, partition)
        sender.flush()
        self._sent |= sender.sent

    def lose(self, topic: str, partition: int, first: int, last: int) -> None:
        """These will not have been seen."""
        for offset in range(first, last + 1):
            del self._sent[topic, partition, offset]

    def made_anew(self, topic: str) -> None:
        """What was sent to the topic was seen, and is in none that there is now."""
        for place in [each for each in self._sent if each[0] == topic]:
            self._of_old_topics.append((topic, self._sent.pop(place)))

    @property
    def events(self) -> dict[str, list[dict[str, Any]]]:
        """By topic, as brute force takes them."""
        found: dict[str, list[dict[str, Any]]] = {topic: [] for topic in TOPICS}
        for topic, event in [*self._of_old_topics, *((place[0], event) for place, event in self._sent.items())]:
            found[topic].append({**event, "t": event["occurred_at"]})
        return found
