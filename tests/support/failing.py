"""Masters die and come back while events flow: what is served at the end against brute force."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Self

import feast
import httpx

from registry.online import as_of
from tests.support import compare
from tests.support.feed import an_event, differences
from tests.support.stack import Stack

TOPICS = ("impressions", "clicks", "clicks", "likes")


class Flow:
    """Events that flow, and a client that asks, until told to stop.

    Attributes:
        events: all that were sent, by topic, as brute force takes them.
        answers: how many of each status the server gave.
    """

    def __init__(self, stack: Stack, address: str, rng: random.Random) -> None:
        self.events: dict[str, list[dict[str, Any]]] = {topic: [] for topic in TOPICS}
        self.answers: Counter[int] = Counter()
        self._stack, self._address, self._rng = stack, address, rng
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._send, self._ask)]
        self._failed: list[BaseException] = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)
        assert not self._failed, self._failed

    @property
    def n(self) -> int:
        """How many events were sent."""
        return sum(map(len, self.events.values()))

    def _send(self) -> None:
        number = 0
        try:
            while not self._is_over.is_set():
                records = []
                for _ in range(50):
                    topic = self._rng.choice(TOPICS)
                    event = an_event(self._rng, number)
                    number += 1
                    self.events[topic].append({**event, "t": event["occurred_at"]})
                    records += [(topic, event["user_id"], event)] * (2 if self._rng.random() < 0.02 else 1)
                self._stack.produce(records)
                time.sleep(0.1)  # Two cores have more to do than this.
        except BaseException as error:  # noqa: BLE001  # told to the test
            self._failed.append(error)

    def _ask(self) -> None:
        body = {"service": "ranking_v1", "user_id": "u1", "item_ids": [f"i{at}" for at in range(1, 40)]}
        try:
            with httpx.Client(base_url=self._address, timeout=30) as http:
                while not self._is_over.is_set():
                    self.answers[http.post("/v1/features", json=body).status_code] += 1
                    time.sleep(0.05)
        except BaseException as error:  # noqa: BLE001  # as above
            self._failed.append(error)


def check_nothing_lost(redis: Any, happenings: Sequence[Callable[[], None]]) -> None:
    """Runs the stream and the server on a Redis to which things happen, commits being lost by one of them at least:
    0 differences, by HTTP and by Feast's SDK.
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    with Stack(redis=redis, shards=8, lanes=2, chunk_events=200) as stack:
        stack.start_stream(2)
        address = stack.start_server()
        with Flow(stack, address, random.Random(seed)) as flow:
            for happen in happenings:
                before = flow.n
                happen()
                assert flow.n > before
        stack.wait_until_committed()
        wrong = differences(address, flow.events) + sdk_differences(stack, flow.events)
        log = stack.log("stream")
        print(
            f"{flow.n} events, answers {dict(flow.answers)}, {log.count('workers_stopped')} restarts of the workers, "
            f"{log.count('older data')} writers fenced by lost data, {len(wrong)} differences"
        )
        assert not wrong, (len(wrong), wrong[:5])
        assert "Redis came back with older data" in log
        assert flow.answers[200] > 0
        assert set(flow.answers) <= {200, 503}


def sdk_differences(stack: Stack, events: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Every user and item by Feast's SDK against brute force."""
    store = feast.FeatureStore(str(stack.folder))
    store.config.online_store.redis_url = stack.redis.url
    wrong: list[str] = []
    for key, expected in (("user_id", compare.expected_user), ("item_id", compare.expected_item)):
        for ids in compare.batches(own := compare.by_key(events, key), 100):
            query_ms = time.time_ns() // 1_000_000
            names = list(expected(own[ids[0]], query_ms))
            with as_of(query_ms):
                got = store.get_online_features(
                    features=[name.replace("__", ":", 1) for name in names],
                    entity_rows=[{key: each} for each in ids],
                    full_feature_names=True,
                ).to_dict()
            for at, each in enumerate(ids):
                values = {name: got[name][at] for name in names}
                wrong += [f"sdk {each} {one}" for one in compare.differences(values, expected(own[each], query_ms))]
    return wrong
