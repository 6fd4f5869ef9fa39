"""A project with rows in a real Redis and the server's app in this process; the clock is the test's."""

from __future__ import annotations

import shutil
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import orjson
import uvicorn

from config.settings import Settings
from features.aggregations.base import Aggregation
from features.definitions import compile_definitions
from features.plan import Plan
from registry.ordinary import declared
from serving import worker
from serving.app import create_app
from serving.feast import Others
from store.commit import initialise
from store.connect import connect
from store.keys import Keyspace
from store.plans import layouts_of
from streams.chunk import Chunk, Partition
from streams.decode import Decoder
from streams.lane import Lane
from tests.support.stack import wait_for

ROOT = Path(__file__).resolve().parent.parent.parent
NOW_MS = 2_000_023_200_000
"""2033-05-18 10:00:00 UTC: Redis expires rows by the real clock, so the test's is ahead of it."""
SHARDS = 4

Event = Mapping[str, Any]
"""What a producer sends, with its time `t` (ms) in place of `occurred_at`; `event_id` may be left out."""


class Clock:
    """Seconds since the epoch, as `time.time` gives them; it stands still until it is set."""

    def __init__(self, now_ms: int = NOW_MS) -> None:
        self.now_ms = now_ms

    def __call__(self) -> float:
        return self.now_ms / 1000


def catalogue(shards: int = SHARDS) -> Plan:
    """The shipped catalogue's plan."""
    return compile_definitions("features.catalog", "headrace", shards, declared(Settings()).plan)


def with_windows(plan: Plan, *more: str) -> Plan:
    """The plan with more windows of all that has any: every layout changes but those of lists."""
    views = []
    for view in plan.views:
        specs = [
            msgspec.structs.replace(spec, over=tuple(dict.fromkeys((*spec.over, *more))))
            if isinstance(spec, Aggregation) and spec.over
            else spec
            for spec in view.features
        ]
        views.append(msgspec.structs.replace(view, features=tuple(specs)))
    return msgspec.structs.replace(plan, views=tuple(views))


class Rows:
    """Writes events into rows as the stream does: decoded, merged by a lane, committed."""

    def __init__(self, plan: Plan, redis_url: str, clock: Clock) -> None:
        self.plan, self._redis_url = plan, redis_url
        self.client: Any = connect(redis_url, 10)
        self._clock = clock
        self.sent: dict[str, int] = {}
        self._decoder = Decoder(plan, 1, 0)
        initialise(self.client, Keyspace.of(plan), plan.stored_entities)
        self._lane = Lane(plan, 0, 1, self.client, clock, layouts=layouts_of(self.client, plan))

    def under(self, plan: Plan) -> Rows:
        """The stream of another plan, which goes on where this one is: it claims all shards."""
        self._clock.now_ms += 1000  # Idle shards have their offsets committed after a second.
        self._lane.write([])
        successor = Rows(plan, self._redis_url, self._clock)
        successor.sent = self.sent
        return successor

    def write(self, topic: str, events: Sequence[Event]) -> None:
        """Commits events of one topic; each reaches the broker at its own time, the clock's at the latest."""
        start = self.sent.get(topic, 0)
        end = self.sent[topic] = start + len(events)
        chunk = Chunk(
            Partition(topic, 0),
            start,
            end,
            values=[
                orjson.dumps({"event_id": f"{topic}-{start + at}", "occurred_at": event["t"], **_fields(event)})
                for at, event in enumerate(events)
            ],
            keys=[None] * len(events),
            offsets=np.arange(start, end),
            record_ms=np.array([event["t"] for event in events], np.int64),
        )
        decoded = self._decoder.decode(chunk)
        assert not decoded.dead_letters, decoded.dead_letters[0].reason
        self._lane.write(decoded.parts)

    def write_all(self, events: Mapping[str, Sequence[Event]]) -> None:
        """Commits events of several topics."""
        for topic, many in events.items():
            self.write(topic, many)

    def key_of(self, family: str, entity_id: str) -> bytes:
        """The Redis key of a row that is there."""
        (key,) = [key for key in self.client.keys("*") if key.endswith(f":{family}:{entity_id}".encode())]
        found: bytes = key
        return found


def _fields(event: Event) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "t"}


def settings_of(redis_url: str, **options: Any) -> Settings:
    """Settings for a server of `catalogue()`'s plan, which refuses nothing for being slow, as one that compiles is."""
    return Settings(**{"redis_url": redis_url, "shards": SHARDS, "requests_max": 10_000, **options})


@asynccontextmanager
async def served(settings: Settings, plan: Plan, clock: Clock) -> AsyncIterator[httpx.AsyncClient]:
    """The app, started, behind an HTTP client; what the app lets escape is an answer 500, as it is in production."""
    app = create_app(settings, plan, clock=clock)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://headrace") as http,
    ):
        yield http


@contextmanager
def listening(settings: Settings, plan: Plan, others: Others | None = None) -> Iterator[int]:
    """The server as production runs it, but in a thread of this process; gives its port on 127.0.0.1."""
    server = uvicorn.Server(worker.config(settings, plan, others, host="127.0.0.1", port=0))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for("the server listens", lambda: server.started or not thread.is_alive())
        assert server.started
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def project_folder(folder: Path) -> Path:
    """A project's folder with the shipped feature_store.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "feature_store.yaml", folder)
    return folder


def values_of(answer: Mapping[str, Any], at: int = 0) -> dict[str, Any]:
    """Every feature by name for one item of a `POST /v1/features` answer."""
    return {**answer["user"]["features"], **dict(zip(answer["features"], answer["items"][at]["values"], strict=True))}


def random_events(seed: int, users: int, items: int, n: int, end_ms: int = NOW_MS) -> dict[str, list[dict[str, Any]]]:
    """Events by topic over the eight days before `end_ms`, most of them recent, in order of time."""
    rng = np.random.default_rng(seed)
    events: dict[str, list[dict[str, Any]]] = {"impressions": [], "clicks": [], "likes": []}
    for age_ms in sorted(rng.exponential(1 / 20, n) * 8 * 86_400_000, reverse=True):
        item = int(rng.integers(items))
        event: dict[str, Any] = {
            "t": end_ms - 1 - int(age_ms),
            "user_id": f"u{rng.integers(users)}",
            "item_id": f"i{item}",
        }
        if rng.random() < 0.9:
            event |= {
                "category": f"c{item % 7}",
                "seller_id": f"s{item % 5}",
                "price": round(float(rng.lognormal(3, 1)), 2),
            }
        events[str(rng.choice(list(events), p=[0.5, 0.4, 0.1]))].append(event)
    return events


def names_of(events: Mapping[str, Iterable[Event]], key: str) -> list[str]:
    """The ids that events have under a key, sorted."""
    return sorted({event[key] for many in events.values() for event in many if event.get(key) is not None})
