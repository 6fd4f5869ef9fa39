"""`freshness`: from producing an event to seeing it in an HTTP answer, while other events stream and others read.

A probe is one click of a user never seen before. It is produced, and once the broker has acknowledged it the user's
features are asked for about every millisecond, until an answer counts the click.
"""

from __future__ import annotations

import http.client
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

import msgspec
import numpy as np
import orjson
from confluent_kafka import Producer

from benchmarks import population
from benchmarks.background import background
from benchmarks.harness import Benchmark, Options, Report, Series, alternate, main
from benchmarks.project import Project
from benchmarks.ranking import body
from benchmarks.stream import streaming
from tests.support.kafka import RealKafka

EVENTS_A_SECOND: Final = 2_000
READS_A_SECOND: Final = 200
POLL_S: Final = 0.001
PAUSE_S: Final = 0.05
"""Between probes, half to one and a half times as long."""
TIMEOUT_S: Final = 30.0
_SERVICE: Final = "feed_v1"
_COUNT: Final = "user_activity__clicks_10m"
SEED: Final = 5


class Probed(NamedTuple):
    """One probe: ms from producing it to the broker's answer and to its being seen, and of the request that saw it."""

    acknowledged_ms: float
    seen_ms: float
    request_ms: float


def run(options: Options, report: Report) -> None:
    """Probes for some seconds, three times."""
    users, items = options.pick((100_000, 50_000), (5_000, 2_000))
    with RealKafka() as kafka, Project(kafka.bootstrap_servers) as project:
        there = population.fill(project.client, project.plan, users, items)
        report.note(f"in Redis before: {there.describe()}")
        requests = project.folder / "requests"
        requests.write_bytes(msgspec.msgpack.encode([orjson.dumps(body(asked)) for asked in there.requests(500)]))
        events = {"kafka": kafka.bootstrap_servers, "rate": EVENTS_A_SECOND, "users": users, "items": items}
        folder, environment = project.folder, project.environment()
        with project.serve() as address, streaming(project), prober(kafka.bootstrap_servers, address) as probing:
            reads = {"address": address, "requests": requests, "rate": READS_A_SECOND}
            probing.probe_for(0.1)
            with (
                background("events", folder, environment, **events) as streamed,
                background("reads", folder, environment, **reads) as read,
            ):
                probing.probe_for(options.pick(8.0, 1.0))  # Not counted: then everything is warm.
                seconds = options.pick(25.0, 3.0)
                runs = alternate({"probes": lambda: probing.probe_for(seconds)}, options)["probes"]
        report.note(
            f"meanwhile {streamed.a_second:,.0f} events/s and {read.a_second:,.0f} reads/s (npy, 1 user + 200 items); "
            f"{min(map(len, runs))} to {max(map(len, runs))} probes a run"
        )
    seen = [np.array([probe.seen_ms for probe in probes]) for probes in runs]
    report.add("p50", Series.of(np.percentile(ms, 50) for ms in seen), "ms", key="p50_ms", at_most=15)
    report.add("p99", Series.of(np.percentile(ms, 99) for ms in seen), "ms", key="p99_ms", at_most=100)
    for what, column in (
        ("p50 of it until Kafka's acknowledgement", [[probe.acknowledged_ms for probe in probes] for probes in runs]),
        (
            "p50 of it in the stream and Redis",
            [[p.seen_ms - p.acknowledged_ms - p.request_ms for p in r] for r in runs],
        ),
        ("p50 of it in the request that saw it", [[probe.request_ms for probe in probes] for probes in runs]),
    ):
        report.add(what, Series.of(np.percentile(ms, 50) for ms in column), "ms")


class Prober:
    """Sends clicks of users never seen before, and asks for each until it is counted."""

    def __init__(self, producer: Producer, connection: http.client.HTTPConnection) -> None:
        self._producer = producer
        self._connection = connection
        self._random = random.Random(SEED)
        self._sent = 0

    def probe_for(self, seconds: float) -> list[Probed]:
        """Probes one after the other, with pauses, for so long."""
        probes = []
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            probes.append(self.probe())
            time.sleep(PAUSE_S * (0.5 + self._random.random()))
        return probes

    def probe(self) -> Probed:
        """Sends one click, and waits until it is seen."""
        self._sent += 1
        user = f"probe-{self._sent}"
        click = {
            "event_id": f"probe-{self._sent:030d}",
            "occurred_at": time.time_ns() // 1_000_000,
            "user_id": user,
            "item_id": f"i{self._random.randrange(2000)}",
            "price": 25.0,
            "surface": "feed",
        }
        began_s = time.perf_counter()
        self._producer.produce("clicks", orjson.dumps(click), user)
        if self._producer.flush(TIMEOUT_S):
            msg = f"Kafka did not acknowledge a click in {TIMEOUT_S:g} s"
            raise RuntimeError(msg)
        acknowledged_s = time.perf_counter()
        while True:
            asked_s = time.perf_counter()
            count = self._count(user)
            seen_s = time.perf_counter()
            if count:
                return Probed(*(1000 * s for s in (acknowledged_s - began_s, seen_s - began_s, seen_s - asked_s)))
            if seen_s - began_s > TIMEOUT_S:
                msg = f"a click of {user} could not be seen after {TIMEOUT_S:g} s"
                raise RuntimeError(msg)
            time.sleep(max(0.0, POLL_S - (seen_s - asked_s)))

    def _count(self, user: str) -> int:
        self._connection.request("GET", f"/v1/entities/user/{user}?service={_SERVICE}")
        answer = self._connection.getresponse()
        text = answer.read()
        if answer.status != http.client.OK:
            msg = f"the server answered {answer.status}: {text[:500]!r}"
            raise RuntimeError(msg)
        return int(orjson.loads(text)["features"][_COUNT])


@contextmanager
def prober(kafka: str, address: str) -> Iterator[Prober]:
    """What probes, by a broker's bootstrap servers and a server's address."""
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=TIMEOUT_S)
    try:
        # It may live a little longer than its broker, and would say so.
        producer = Producer({"bootstrap.servers": kafka, "linger.ms": 0, "acks": "all", "log_level": 0})
        yield Prober(producer, connection)
    finally:
        connection.close()


BENCHMARK = Benchmark(
    "freshness",
    work=f"a click sent until an HTTP answer counts it, at {EVENTS_A_SECOND:,} events/s and {READS_A_SECOND} reads/s",
    peer="nothing",
    keys=("p50_ms", "p99_ms"),
    run=run,
)

if __name__ == "__main__":
    main(BENCHMARK)
