"""`headrace demo`: the whole system on one machine, with simulated shoppers.

    shoppers ──> embedded broker ──> `headrace stream` ──> embedded Redis ──> `headrace serve` <── ranking requests

Redis, the stream and the server are processes of their own, run as in production; the broker is librdkafka's. What is
shown is measured from outside: freshness, for one, is the time from the broker's acknowledgement of a click until an
HTTP answer counts it.
"""

from __future__ import annotations

import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from pydantic import SecretStr
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from config.settings import DEAD_LETTER_SUFFIX, Settings
from features.plan import Plan
from headrace.embedded import EmbeddedBroker, EmbeddedRedis, ServerError, end, free_port, spawn
from headrace.simulator import Marketplace
from store.commit import read_record
from store.connect import connect
from store.keys import Keyspace
from store.plans import load_plan

START_TIMEOUT_S: Final = 60.0
CATCH_UP_TIMEOUT_S: Final = 10.0
CALL_TIMEOUT_S: Final = 5.0
TICK_S: Final = 0.02
REFRESH_S: Final = 0.5
RANKING_EVERY_S: Final = 0.05
CANDIDATES: Final = 100
PROBE_PAUSE_S: Final = 0.25
POLL_S: Final = 0.002
MALFORMED_EVERY: Final = 2_000
LOG_LINES_SHOWN: Final = 20
HOTTEST_SHOWN: Final = 8
RECENT: Final = 300
"""Measurements that the live table looks back on."""

MALFORMED: Final = (
    b"no JSON at all",
    b'{"event_id": "bad", "user_id": "u1", "item_id": "i1"}',
    b'{"event_id": "bad", "occurred_at": 12, "user_id": "u1", "item_id": "i1"}',
    b'{"event_id": "bad", "occurred_at": 1763719200000, "user_id": 7, "item_id": "i1"}',
    b'{"event_id": "bad", "occurred_at": 1763719200000, "user_id": "u1", "item_id": "i1", "price": -5}',
)


class DemoError(RuntimeError):
    """The demonstration can't go on."""


class _Stopped(Exception):  # noqa: N818  # Not an error: Ctrl-C came while something was waited for.
    pass


@dataclass
class Figures:
    """What was measured so far. Each number has one writing thread, so nothing is locked."""

    url: str
    seed: int
    shopped: int = 0
    probed: int = 0
    committed: int = 0
    dead_letters: int = 0
    requests: int = 0
    failed_requests: int = 0
    freshness_ms: list[float] = field(default_factory=list)
    request_ms: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    items: dict[str, dict[str, Any]] = field(default_factory=dict)
    user: str = ""
    user_features: dict[str, Any] = field(default_factory=dict)
    history: deque[tuple[float, int, int]] = field(default_factory=lambda: deque(maxlen=7))

    @property
    def acknowledged(self) -> int:
        """The records that the broker has."""
        return self.shopped + self.probed

    def look(self, now_s: float) -> None:
        """Notes the time, so that rates can be told."""
        self.history.append((now_s, self.acknowledged, self.requests))

    def rates(self) -> tuple[float, float]:
        """Events and requests a second, over the last few seconds."""
        if len(self.history) < 2:
            return 0.0, 0.0
        (start, events, requests), (now, more_events, more_requests) = self.history[0], self.history[-1]
        return (more_events - events) / (now - start), (more_requests - requests) / (now - start)

    def hottest(self) -> list[tuple[str, dict[str, Any]]]:
        """The items of the highest popularity that any ranking answer told of, with their features."""
        by_popularity = sorted(self.items.items(), key=lambda item: -item[1]["item_activity__popularity_30m"])
        return by_popularity[:HOTTEST_SHOWN]

    def summary(self) -> dict[str, float | int | None]:
        """The last line of the demonstration."""
        median, worst = percentiles(self.freshness_ms)
        return {
            "events": self.acknowledged,
            "committed": self.committed,
            "dead_letters": self.dead_letters,
            "requests": self.requests,
            "freshness_ms_p50": median,
            "freshness_ms_p99": worst,
        }

    def line(self) -> str:
        """One line, for output that is no terminal."""
        events, requests = self.rates()
        hottest = " ".join(item for item, _ in self.hottest()[:3])
        return (
            f"{events:,.0f} events/s  {self.committed:,} of {self.acknowledged:,} committed  "
            f"{self.dead_letters} dead letters  freshness {_ms(self.freshness_ms[-RECENT:])}  "
            f"{requests:.0f} requests/s {_ms(self.request_ms)}  hottest {hottest or '-'}"
        )

    def __rich__(self) -> Panel:
        events, requests = self.rates()
        numbers = Table.grid(padding=(0, 3))
        for _ in range(2):
            numbers.add_column(style="dim")
            numbers.add_column(justify="right", min_width=22)
        failed = f" ({self.failed_requests} failed)" if self.failed_requests else ""
        numbers.add_row("events/s", f"{events:,.0f}", "committed", f"{self.committed:,} of {self.acknowledged:,}")
        numbers.add_row("freshness", _ms(self.freshness_ms[-RECENT:]), "dead letters", f"{self.dead_letters}")
        numbers.add_row("ranking requests/s", f"{requests:.0f}{failed}", "answered in", _ms(self.request_ms))

        items = Table(title="Hottest items", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        items.add_column("item")
        items.add_column("category")
        for name in ("popularity 30m", "clicks 10m", "likes 10m", "CTR 1h", "price"):
            items.add_column(name, justify="right")
        for item, features in self.hottest():
            items.add_row(
                item,
                str(features["item_activity__category"]),
                f"{features['item_activity__popularity_30m']:.1f}",
                f"{features['item_activity__clicks_10m']}",
                f"{features['item_activity__likes_10m']}",
                f"{features['item_activity__ctr_1h']:.1%}",
                f"{features['item_activity__price'] or 0:.2f}",
            )
        user = Text("A shopper", style="bold")
        if self.user:
            likes = ", ".join(self.user_features["user_taste__top_categories_7d"])
            clicks = self.user_features["user_activity__clicks_10m"]
            user.append(f"  {self.user} opened {clicks} items in ten minutes, most of {likes}", style="not bold")
        title = f"Headrace · {self.url} · seed {self.seed}"
        return Panel(Group(numbers, "", items, "", user), title=title, title_align="left", width=100)


def percentiles(values_ms: Sequence[float]) -> tuple[float | None, float | None]:
    """The median and the 99th percentile; None of nothing."""
    if not values_ms:
        return None, None
    median, worst = np.percentile(list(values_ms), [50, 99])
    return round(float(median), 1), round(float(worst), 1)


def run_demo(
    settings: Settings,
    seconds: float | None,
    port: int,
    *,
    rate: int = 500,
    seed: int = 7,
    picture: Path | None = None,
) -> int:
    """Runs everything until the time is up, or until SIGINT or SIGTERM; returns the exit status.

    Args:
        settings: its folder is where feature_store.yaml is copied from; addresses are the demonstration's own.
        seconds: how long shoppers shop, from when all is ready; for ever if None.
        port: the server's; 0 for any free one.
        rate: simulated events a second.
        seed: of the simulated shoppers.
        picture: a file for the last table, as SVG.
    """
    console = Console()
    with _stop_signals() as stop, ExitStack() as stack:
        try:
            if port:
                _check_free(port)
            figures = Figures(f"http://127.0.0.1:{port or free_port()}", seed)
            _say(console, f"{figures.url} is the server's address; starting it ...")
            _Demo(settings, figures, stack, stop, console).run(seconds, rate)
        except _Stopped:
            _say(console, "stopped")
        except (DemoError, ServerError, KafkaException) as error:
            stack.close()
            _complain(str(error))
            return 1
        # Before the last line, so that it is the last whatever a process has to say at its end.
        stack.close()
        if picture is not None:
            _save(figures, picture)
        if not stop.is_set():
            _say(console, json.dumps(figures.summary()))
        if figures.committed >= figures.acknowledged or stop.is_set():
            return 0
        _complain(
            f"only {figures.committed:,} of {figures.acknowledged:,} committed after {CATCH_UP_TIMEOUT_S:g} s more"
        )
        return 1


class _Demo:
    """One run: `stack` ends, in reverse order, all that it started."""

    def __init__(
        self, settings: Settings, figures: Figures, stack: ExitStack, stop: threading.Event, console: Console
    ) -> None:
        self._figures = figures
        self._stop = stop
        self._console = console
        self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-demo-")))
        self._copy_repo(settings.repo)
        redis = stack.enter_context(EmbeddedRedis())
        broker = stack.enter_context(EmbeddedBroker())
        self._settings = settings.model_copy(
            update={
                "repo": self._folder,
                "definitions": "features.catalog",  # What the simulated shoppers' events are for.
                "kafka": broker.bootstrap_servers,
                "kafka_options": {},
                "topics": "auto",
                "lanes": 1,  # There is one worker, and one server.
                "server_processes": 1,
                "sample": {"ranking_v1": 0.2},
                "sample_folder": self._folder / "served",
                "archive": str(self._folder / "archive"),  # The broker forgets what is a few minutes old.
                "archive_options": {},
                "redis_url": SecretStr(redis.url),
                "host": "127.0.0.1",
                "port": int(figures.url.rpartition(":")[2]),
            }
        )
        self._redis = connect(redis.url, CALL_TIMEOUT_S)
        stack.callback(self._redis.close)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        stack.callback(self._end_children)
        self._tasks: list[Future[None]] = []
        self._pool = stack.enter_context(ThreadPoolExecutor(4, thread_name_prefix="demo"))
        self._done = threading.Event()
        stack.callback(self._done.set)
        self._shopping = True

    def run(self, seconds: float | None, rate: int) -> None:
        """Starts everything, shows it, and returns when all that was produced is committed, or too late."""
        figures = self._figures
        self._start("apply")
        self._wait("apply", lambda: self._children["apply"].poll() == 0)
        del self._children["apply"]
        self._start("stream")
        self._start("archive")
        self._start("serve", "--port", str(self._settings.port))
        self._wait("the server", self._is_ready)
        there = {
            "KAFKA": self._settings.kafka,
            "REDIS_URL": self._settings.redis_url.get_secret_value(),
            "PORT": self._settings.port,
            "TOPICS": self._settings.topics,
            "SAMPLE_FOLDER": self._settings.sample_folder,
            "ARCHIVE": self._settings.archive,
        }
        command = os.path.relpath(Path(sys.prefix, "bin", "headrace"))
        where = " ".join(f"HEADRACE_{name}={value}" for name, value in there.items())
        _say(self._console, f"for events and features of your own, in another terminal: export {where}")
        _say(self._console, f"events: {command} replay events.jsonl --topic clicks --rebase-to-now")
        _say(self._console, f"features: change features/catalog, then {command} plan, and {command} apply")
        _say(self._console, f"was what is served right? {command} compare")
        plan = load_plan(self._settings, self._redis)
        marketplace = Marketplace(figures.seed)
        recent_users: deque[str] = deque(maxlen=RECENT)
        producing = self._submit(self._produce, marketplace, rate, recent_users)
        self._wait("the stream", lambda: self._look_at_commits(plan) > 0)
        probing = self._submit(self._probe, marketplace)
        self._submit(self._rank, marketplace, recent_users)
        self._submit(self._count_dead_letters, plan)
        live = Live(figures, console=self._console, auto_refresh=False) if self._console.is_terminal else None
        with live or nullcontext():
            self._show(plan, live, time.monotonic() + seconds if seconds else float("inf"))
            self._shopping = False
            self._wait("the producers", lambda: producing.done() and probing.done())
            self._within(CATCH_UP_TIMEOUT_S, lambda: self._look_at_commits(plan) >= figures.acknowledged)
            self._done.set()
            self._wait("the requests", lambda: all(task.done() for task in self._tasks))
            self._check()
            if live is not None:
                live.refresh()

    def _show(self, plan: Plan, live: Live | None, until_s: float) -> None:
        """A live table, or a line a second, until the time is up."""
        figures = self._figures
        looks = 0
        while (now_s := time.monotonic()) < until_s:
            self._check()
            self._look_at_commits(plan)
            figures.look(now_s)
            looks += 1
            if live is not None:
                live.refresh()
            elif looks % round(1 / REFRESH_S) == 0:
                _say(self._console, figures.line())
            if self._stop.wait(min(REFRESH_S, max(0.0, until_s - now_s))):
                raise _Stopped

    def _copy_repo(self, repo: Path) -> None:
        """A project of its own, beside the user's: the registry's path in the file is relative to its folder."""
        source = repo / "feature_store.yaml"
        if not source.exists():
            msg = f"no feature_store.yaml in {repo.resolve()}: run in the project's folder, or set HEADRACE_REPO to it"
            raise DemoError(msg)
        shutil.copy(source, self._folder)

    def _start(self, command: str, *arguments: str) -> None:
        """`headrace COMMAND`, which dies with this process."""
        self._children[command] = spawn(
            [sys.executable, "-m", "headrace", command, *arguments],
            log=self._log(command),
            # Feast leaves a folder in TMPDIR.
            env=os.environ | self._settings.environment() | {"TMPDIR": str(self._folder)},
        )

    def _log(self, command: str) -> Path:
        return self._folder / f"{command}.log"

    def _submit(self, work: Callable[..., None], *arguments: Any) -> Future[None]:
        task = self._pool.submit(work, *arguments)
        self._tasks.append(task)
        return task

    def _wait(self, what: str, condition: Callable[[], bool]) -> None:
        if not self._within(START_TIMEOUT_S, condition):
            msg = f"{what} took more than {START_TIMEOUT_S:g} s"
            raise DemoError(msg)

    def _within(self, timeout_s: float, condition: Callable[[], bool]) -> bool:
        """Whether it came true in time."""
        until_s = time.monotonic() + timeout_s
        while not condition():
            self._check()
            if time.monotonic() > until_s:
                return False
            if self._stop.wait(TICK_S):
                raise _Stopped
        return True

    def _check(self) -> None:
        """Raises if something that should run does not, or if it is time to stop."""
        for command, child in self._children.items():
            status = child.poll()
            if status is None or (command == "apply" and status == 0):
                continue
            # Ctrl-C reaches the children too, and one may be quicker than we are.
            if self._stop.wait(0.5):
                raise _Stopped
            lines = self._log(command).read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
            log = "\n  ".join(lines)
            msg = f"`headrace {command}` stopped with status {status}; its log ends:\n  {log}"
            raise DemoError(msg)
        for task in self._tasks:
            if task.done() and (error := task.exception()) is not None:
                raise error

    def _end_children(self) -> None:
        """All are told before the first is waited for."""
        for child in self._children.values():
            child.terminate()
        for child in self._children.values():
            end(child)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self._figures.url}/readyz", timeout=CALL_TIMEOUT_S).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def _look_at_commits(self, plan: Plan) -> int:
        """How many records all shards have committed: of each partition, what the last of them has."""
        keys = Keyspace.of(plan).commit_records(plan.stored_entities)
        records = [read_record(self._redis, key).positions for key in keys]
        partitions = {name for positions in records for name in positions}
        self._figures.committed = sum(
            min(positions[name].next if name in positions else 0 for positions in records) for name in partitions
        )
        return self._figures.committed

    def _producer(self, linger_ms: int) -> Producer:
        options = {"linger.ms": linger_ms, "message.timeout.ms": int(START_TIMEOUT_S * 1000), "log_level": 4}
        return Producer(self._settings.librdkafka(**options))

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            msg = f"the broker did not take an event of {message.topic()}: {error}"
            raise DemoError(msg)

    def _produce(self, marketplace: Marketplace, rate: int, recent_users: deque[str]) -> None:
        """The shoppers, at an even pace."""
        dice = random.Random(self._figures.seed)
        producer = self._producer(linger_ms=50)  # The broker gives out what came together.
        acknowledged = 0

        def delivered(error: Any, message: Any) -> None:
            nonlocal acknowledged
            self._delivered(error, message)
            acknowledged += 1

        started_s = time.monotonic()
        sent = 0
        while self._shopping and not self._done.is_set():
            # What a pause of the machine delayed is made up for, but not all at once.
            due = min(int((time.monotonic() - started_s) * rate) - sent, rate)
            for topic, event in marketplace.events(time.time_ns() // 1_000_000, max(due, 0)):
                value = json.dumps(event).encode()
                if dice.random() * MALFORMED_EVERY < 1:
                    value = dice.choice(MALFORMED)
                producer.produce(topic, value, key=event["user_id"], on_delivery=delivered)
                recent_users.append(event["user_id"])
                sent += 1
            producer.poll(0)
            self._figures.shopped = acknowledged
            self._done.wait(TICK_S)
        if producer.flush(CALL_TIMEOUT_S):
            msg = f"the broker did not take the last events in {CALL_TIMEOUT_S:g} s"
            raise DemoError(msg)
        self._figures.shopped = acknowledged
        producer.close()

    def _probe(self, marketplace: Marketplace) -> None:
        """Clicks of users that nobody has seen; each is waited for until the server counts it."""
        name = "user_activity__clicks_1h"
        producer = self._producer(linger_ms=0)
        with httpx.Client(base_url=self._figures.url, timeout=CALL_TIMEOUT_S) as client:
            while self._shopping and not self._done.wait(PROBE_PAUSE_S):
                user_id = f"fresh-{self._figures.probed}"
                event = {
                    "event_id": user_id,
                    "occurred_at": time.time_ns() // 1_000_000,
                    "user_id": user_id,
                    "item_id": marketplace.item_ids[self._figures.probed % len(marketplace.item_ids)],
                }
                producer.produce("clicks", json.dumps(event).encode(), key=user_id, on_delivery=self._delivered)
                if producer.flush(CALL_TIMEOUT_S):
                    msg = f"the broker did not take a click in {CALL_TIMEOUT_S:g} s"
                    raise DemoError(msg)
                acknowledged_s = time.monotonic()
                self._figures.probed += 1
                fresh_ms = 0.0
                seen = False
                # One that is given up counts as so long.
                while not seen and fresh_ms < CALL_TIMEOUT_S * 1000 and not self._done.wait(POLL_S):
                    with suppress(httpx.HTTPError):
                        answer = client.get(f"/v1/entities/user/{user_id}", params={"service": "feed_v1"})
                        seen = answer.is_success and answer.json()["features"][name] == 1
                    fresh_ms = (time.monotonic() - acknowledged_s) * 1000
                self._figures.freshness_ms.append(fresh_ms)
        producer.close()

    def _rank(self, marketplace: Marketplace, recent_users: deque[str]) -> None:
        """Ranking requests for shoppers who are there, with random candidates."""
        figures = self._figures
        dice = random.Random(figures.seed)
        with httpx.Client(base_url=figures.url, timeout=CALL_TIMEOUT_S) as client:
            due_s = time.monotonic()
            while not self._done.wait(max(0.0, due_s - time.monotonic())):
                due_s = max(due_s + RANKING_EVERY_S, time.monotonic())
                user_id = recent_users[-1]
                item_ids = dice.sample(marketplace.item_ids, CANDIDATES)
                body = {"service": "ranking_v1", "user_id": user_id, "item_ids": item_ids}
                started_s = time.monotonic()
                try:
                    response = client.post("/v1/features", json=body).raise_for_status()
                except httpx.HTTPError:
                    figures.failed_requests += 1
                    continue
                figures.request_ms.append((time.monotonic() - started_s) * 1000)
                figures.requests += 1
                answer = response.json()
                # Replaced, not changed: another thread may be reading it.
                figures.items = figures.items | {
                    item["id"]: dict(zip(answer["features"], item["values"], strict=True)) for item in answer["items"]
                }
                # The same shopper for some seconds: who reads needs them.
                if figures.requests % 80 == 1 or not figures.user:
                    features = answer["user"]["features"]
                    if len(features["user_taste__top_categories_7d"]) > 1:
                        figures.user_features, figures.user = features, user_id

    def _count_dead_letters(self, plan: Plan) -> None:
        consumer = Consumer(self._settings.librdkafka(**{"group.id": "headrace-demo", "log_level": 4}))
        try:
            finished = False
            while not finished:
                finished = self._done.wait(REFRESH_S)
                topics = consumer.list_topics(timeout=CALL_TIMEOUT_S).topics
                partitions = [
                    TopicPartition(name, number)
                    for name in (topic + DEAD_LETTER_SUFFIX for topic in plan.topics)
                    for number in (topics[name].partitions if name in topics else ())
                ]
                self._figures.dead_letters = sum(
                    consumer.get_watermark_offsets(each, timeout=CALL_TIMEOUT_S)[1] for each in partitions
                )
        finally:
            consumer.close()


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set; they do nothing else, also while everything is ended."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            msg = f"port {port} on 127.0.0.1: {error.strerror}; take another, or --port 0 for any free one"
            raise DemoError(msg) from error


def _say(console: Console, text: str) -> None:
    """A line as it is, however long."""
    console.print(text, soft_wrap=True, markup=False, highlight=False)


def _complain(text: str) -> None:
    Console(stderr=True).print(f"error: {text}", style="red", markup=False, highlight=False, soft_wrap=True)


def _ms(values_ms: Sequence[float] | deque[float]) -> str:
    median, worst = percentiles(list(values_ms))
    return "-" if median is None else f"p50 {median:.0f} p99 {worst:.0f} ms"


def _save(figures: Figures, picture: Path) -> None:
    """The table as SVG, without the fonts that rich's would load from the net."""
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(figures)
    svg = re.sub(r"@font-face\s*\{[^}]*\}\s*", "", console.export_svg(title="make demo"))
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_text(svg)
