"""What goes on at a steady rate while something else is measured; each is a process of its own.

    python -m benchmarks.background events --kafka 127.0.0.1:9092 --rate 2000
    python -m benchmarks.background reads --address http://127.0.0.1:8000 --requests FILE --rate 200

Both run until SIGTERM, and then print what they reached: `Reached` as JSON.
"""

from __future__ import annotations

import argparse
import http.client
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Final

import msgspec
from confluent_kafka import Producer

from benchmarks.traffic import Traffic
from headrace.embedded import end, spawn

TICK_S: Final = 0.01
READERS: Final = 8

_stopped = threading.Event()


class Reached(msgspec.Struct):
    """How many a second there were."""

    a_second: float = 0.0


@contextmanager
def background(role: str, folder: Path, environment: Mapping[str, str], **options: object) -> Iterator[Reached]:
    """Runs a role for the length of a `with` block; what it gives is filled in at the end.

    Raises:
        RuntimeError: if it ended before.
    """
    log = folder / f"background-{role}.log"
    log.unlink(missing_ok=True)
    argv = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    process = spawn([sys.executable, "-m", "benchmarks.background", role, *argv], log=log, env=environment)
    reached = Reached()
    try:
        yield reached
        alone = process.poll() is not None
    finally:
        end(process)
    text = log.read_text()
    if alone or process.returncode != 0:
        msg = f"the background's {role} ended with status {process.returncode}:\n{text[-4000:]}"
        raise RuntimeError(msg)
    reached.a_second = msgspec.json.decode(text.strip().splitlines()[-1], type=Reached).a_second


def produce(kafka: str, rate: int, users: int, items: int) -> int:
    """Sends events of now, evenly; returns how many."""
    traffic = Traffic(users, items)
    producer = Producer({"bootstrap.servers": kafka, "linger.ms": 2, "acks": "all"})

    def send(n: int) -> None:
        now_ms = time.time_ns() // 1_000_000
        for block in traffic.blocks(n, now_ms, now_ms + 1):
            for topic, key, value in traffic.encode(block):
                producer.produce(topic, value, key)
        producer.poll(0)

    sent = _steadily(rate, send)
    producer.flush(10)
    return sent


def read(address: str, requests: Path, rate: int) -> int:
    """Sends requests and reads their answers, evenly over a few connections; returns how many."""
    found: list[int] = []
    bodies: list[bytes] = msgspec.msgpack.decode(requests.read_bytes())
    each = [threading.Thread(target=_read, args=(address, bodies[n::READERS], rate, found)) for n in range(READERS)]
    for thread in each:
        thread.start()
    for thread in each:
        thread.join()
    if len(found) < READERS:
        sys.exit("a reader failed")
    return sum(found)


def _read(address: str, bodies: list[bytes], rate: int, found: list[int]) -> None:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    headers = {"Content-Type": "application/json", "Accept": "application/x-npy"}
    endless = cycle(bodies)

    def ask(n: int) -> None:
        for _ in range(n):
            connection.request("POST", "/v1/features", next(endless), headers)
            answer = connection.getresponse()
            answer.read()
            if answer.status != http.client.OK:
                msg = f"an answer was {answer.status}"
                raise RuntimeError(msg)

    found.append(_steadily(rate / READERS, ask))


def _steadily(rate: float, act: Callable[[int], None]) -> int:
    """Calls `act` with how many are due, until stopped; returns how many that were."""
    began_s, done = time.monotonic(), 0
    while not _stopped.is_set():
        # Who is behind catches up a tenth of a second at a time: told to stop, it would otherwise do all of it first.
        due = min(int((time.monotonic() - began_s) * rate) - done, max(1, int(rate / 10)))
        if due > 0:
            act(due)
            done += due
        time.sleep(TICK_S if due > 0 or rate > 1 / TICK_S else 0.25 / rate)
    return done


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.background", description="A steady load until SIGTERM")
    roles = parser.add_subparsers(dest="role", required=True)
    events = roles.add_parser("events", help="events of now into Kafka")
    events.add_argument("--kafka", required=True, help="bootstrap servers")
    events.add_argument("--users", type=int, default=100_000, help="how many users there are")
    events.add_argument("--items", type=int, default=50_000, help="how many items there are")
    reads = roles.add_parser("reads", help="requests for a server")
    reads.add_argument("--address", required=True, help="http://host:port")
    reads.add_argument("--requests", type=Path, required=True, help="bodies of POST /v1/features, as MessagePack")
    for role in (events, reads):
        role.add_argument("--rate", type=int, required=True, help="how many a second")
    given = vars(parser.parse_args())
    signal.signal(signal.SIGTERM, lambda *_: _stopped.set())
    began_s = time.monotonic()
    done = produce(**given) if given.pop("role") == "events" else read(**given)
    print(msgspec.json.encode(Reached(done / (time.monotonic() - began_s))).decode(), flush=True)


if __name__ == "__main__":
    _main()
