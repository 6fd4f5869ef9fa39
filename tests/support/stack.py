"""The whole path with real servers: Kafka, Redis, the registry, the dataflow and the HTTP server as processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # it is there

from config.settings import Settings
from headrace.embedded import EmbeddedRedis, end, free_port, spawn
from registry.apply import apply
from store.commit import read_record
from store.connect import connect
from store.keys import Keyspace
from store.plans import applied_plan
from tests.support.feed import Sender
from tests.support.kafka import KafkaCluster, RealKafka

ROOT = Path(__file__).resolve().parent.parent.parent
TOPICS = ("impressions", "clicks", "likes")
DEADLINE_S = 120.0


def run_headrace(arguments: Iterable[str], environment: Mapping[str, str], folder: Path | None = None) -> str:
    """Runs a command of the command line to its end; returns what it printed."""
    return _run([sys.executable, "-m", "headrace", *arguments], environment, folder, DEADLINE_S)


def run_shell(command: str, environment: Mapping[str, str], folder: Path) -> str:
    """Runs a line of a console block in a shell; returns what it printed."""
    return _run(["bash", "-c", command], environment, folder, 180)


def commands_of(block: str) -> list[str]:
    """What a console block has one type, without what is said of it."""
    return [line.split("   #")[0].strip() for line in re.findall(r"^\$ (.*)$", block, re.MULTILINE)]


def _run(argv: list[str], environment: Mapping[str, str], folder: Path | None, timeout_s: float) -> str:
    done = subprocess.run(
        argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, f"{argv[-1]}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def wait_for(
    what: str,
    condition: Callable[[], object],
    deadline_s: float = DEADLINE_S,
    passing: tuple[type[Exception], ...] = (),
) -> None:
    """Returns once the condition holds, which until then may raise what is `passing`; fails after the deadline."""
    until = time.monotonic() + deadline_s
    while True:
        said = ""
        try:
            if condition():
                return
        except passing as error:
            said = f" ({error})"
        if time.monotonic() > until:
            message = f"waited {deadline_s} s in vain: {what}{said}"
            raise AssertionError(message)
        time.sleep(0.05)


@contextmanager
def project_copy(folder: Path) -> Iterator[Path]:
    """The project as a newcomer has it, with the environment and the compiled loops that make would install."""
    copy = folder / "headrace"
    ignored = shutil.ignore_patterns(".venv", ".git", ".cache", ".*_cache", "data", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=ignored)
    (copy / ".venv").symlink_to(sys.prefix)
    yield copy


def children_of(process: subprocess.Popen[bytes]) -> list[int]:
    """Process ids of a process's children, the oldest first: of a supervisor, first those that work."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


class Stack:
    """Everything from Kafka to HTTP, on ports and in folders of its own; all of it gone at exit.

    A `shared` broker runs already, and goes on; what topics it has are deleted first.
    `redis` is one server unless given: what has a `url`, and is there in a `with` block. `code` is a folder of
    definitions, which change while processes import them.
    """

    def __init__(
        self,
        *,
        broker: RealKafka | KafkaCluster | None = None,
        shared: bool = False,
        redis: Any = None,
        code: Path | None = None,
        **settings: Any,
    ) -> None:
        self._path = f"{code}:{ROOT}" if code else str(ROOT)
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-test-"))
        self.redis: Any = redis or EmbeddedRedis()
        self.kafka: Any = broker or RealKafka()
        self._shared = shared
        self._options = settings
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        try:
            self.redis.__enter__()
            if self._shared:
                self._delete_topics()
            else:
                self.kafka.__enter__()
            shutil.copy(ROOT / "feature_store.yaml", self.folder)
            # What runs has no registry file in reach, and neither Feast nor what comes with it.
            self._bare = self.folder / "bare"
            self._bare.mkdir()
            shutil.copy(ROOT / "feature_store.yaml", self._bare)
            for name in ("feast", "typeguard"):
                (self._bare / f"{name}.py").write_text("raise ImportError('it is not for streams and servers')")
            # Most tests end before anybody dies, and need the processor themselves.
            options = {"kafka": self.kafka.bootstrap_servers, "standby": False}
            options |= {"archive": str(self.folder / "archive"), **self._options}
            self.settings = Settings(repo=self.folder, redis_url=self.redis.url, **options)
            self.client: Any = connect(self.redis.url, 10)
            self.keyspace = Keyspace("headrace", self.settings.shards)
            apply(self.settings, self.client)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                end(process)
        if not self._shared:
            self.kafka.__exit__(kind, error, trace)
        self.redis.__exit__(kind, error, trace)
        if error is not None:
            for log in sorted(self.folder.glob("*.log")):
                print(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
        shutil.rmtree(self.folder)

    def _delete_topics(self) -> None:
        admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap_servers})
        there = [name for name in admin.list_topics(timeout=10).topics if not name.startswith("__")]
        if there:
            for done in admin.delete_topics(there).values():
                done.result()
            wait_for("topics are gone", lambda: not admin.list_topics(timeout=10).topics.keys() & set(there))

    @property
    def environment(self) -> dict[str, str]:
        """Variables for child processes."""
        return {
            **os.environ,
            **self.settings.environment(),
            "PYTHONPATH": self._path,
            "PYTHONWARNINGS": "ignore",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def headrace(self, *arguments: str) -> str:
        """Runs a command of the command line to its end; returns what it printed."""
        return run_headrace(arguments, self.environment)

    def start(self, name: str, *argv: str, bare: bool = True) -> subprocess.Popen[bytes]:
        """Starts a process; its output is in `{name}.log`. One that is not bare has the registry."""
        out_of_reach = {"HEADRACE_REPO": str(self._bare), "PYTHONPATH": f"{self._bare}:{self._path}"}
        process = spawn(
            [sys.executable, *argv],
            log=self.folder / f"{name}.log",
            env=self.environment | (out_of_reach if bare else {}),
        )
        self._processes[name] = process
        return process

    def start_worker(self, name: str) -> subprocess.Popen[bytes]:
        """The dataflow without a supervisor: one process, as an operator would run it."""
        return self.start(name, "-m", "bytewax.run", "streams.dataflow:flow", "-s", "1")

    def start_stream(self, processes: int, name: str = "stream") -> subprocess.Popen[bytes]:
        """`headrace stream`; workers that ran for 5 s were well, so that it never gives up in a test of many kills."""
        script = "from streams import supervise; supervise._STEADY_S = 5; from headrace.cli import main; main()"
        return self.start(name, "-c", script, "stream", "--processes", str(processes))

    def start_server(self, name: str = "server") -> str:
        """The HTTP server; returns its address once it is ready."""
        port = free_port()
        self.start(name, "-m", "headrace", "serve", "--port", str(port))
        address = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            try:
                return httpx.get(f"{address}/readyz", timeout=5).status_code == httpx.codes.OK
            except httpx.HTTPError:
                return False

        wait_for("the server is ready", ready)
        return address

    def stop(self, name: str) -> None:
        """Has a process end well."""
        end(self._processes[name])

    def log(self, name: str) -> str:
        """What a process has printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def produce(self, records: Iterable[tuple[str, str, Mapping[str, Any] | bytes]]) -> None:
        """Sends (topic, key, event or raw bytes), acknowledged by the broker when it returns."""
        sender = Sender(self.kafka.bootstrap_servers)
        for topic, key, value in records:
            sender.send(topic, key, value)
        sender.flush()

    def make_anew(self, topic: str) -> None:
        """Deletes a topic and makes another of its name, with one partition."""
        admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap_servers, "log_level": 0})
        admin.delete_topics([topic])[topic].result()

        def made() -> bool:
            try:
                admin.create_topics([NewTopic(topic, 1, 1)])[topic].result()
            except KafkaException:  # The old one is on its way.
                return False
            return True

        wait_for("the topic is made", made)

    def ends(self, topic: str) -> list[int]:
        """The offset after the last record of each partition."""
        consumer = Consumer({"bootstrap.servers": self.kafka.bootstrap_servers, "group.id": "test"})
        try:
            numbers = consumer.list_topics(topic, timeout=10).topics[topic].partitions
            return [
                consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)[1]
                for number in sorted(numbers)
            ]
        finally:
            consumer.close()

    def read_topic(self, topic: str) -> list[Any]:
        """All records of a topic."""
        consumer = Consumer(
            {"bootstrap.servers": self.kafka.bootstrap_servers, "group.id": "test", "auto.offset.reset": "earliest"}
        )
        try:
            ends = self.ends(topic)
            consumer.assign([TopicPartition(topic, number, 0) for number in range(len(ends))])
            found: list[Any] = []
            until = time.monotonic() + DEADLINE_S
            while len(found) < sum(ends) and time.monotonic() < until:
                found += [message for message in consumer.consume(1000, timeout=1) if message.error() is None]
            return found
        finally:
            consumer.close()

    def wait_until_committed(self, deadline_s: float = DEADLINE_S) -> None:
        """Returns once every shard's record includes all that the topics hold."""
        plan = applied_plan(self.client, "headrace")
        assert plan is not None
        topics = list(plan.topics)
        ends = {f"{topic}/{number}": end for topic in topics for number, end in enumerate(self.ends(topic))}

        def committed() -> bool:
            for entity in plan.stored_entities:
                for shard in range(self.settings.shards):
                    positions = read_record(self.client, self.keyspace.commit_record(entity, shard)).positions
                    if any(
                        end > 0 and (name not in positions or positions[name].next < end) for name, end in ends.items()
                    ):
                        return False
            return True

        wait_for("everything is committed", committed, deadline_s)
