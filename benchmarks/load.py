"""The load generator: N keep-alive connections, each sending its next request once it has the answer to the last.

A process of its own for every measurement, with nothing in it that the measured server could be waiting for: raw
asyncio protocols on uvloop, requests made beforehand, an answer read only as far as its length, no garbage collection.

    python -m benchmarks.load --port 8000 --requests FILE --connections 16 --seconds 5 --warm 1

prints one JSON object. The warm-up comes first and ends completely, all its answers there. Then every request that is
begun within the seconds is waited for: requests a second are all of these over the time until the last answer, so that
a server of few and long requests is not cut short.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop

_ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Load:
    """What a measurement found: requests a second, latencies in ms, how many requests these are of, and how many were
    sent with those of the warm-up.
    """

    rps: float
    p50_ms: float
    p99_ms: float
    n: int
    sent: int


def http_request(method: str, path: str, body: bytes = b"", accept: str = "application/json") -> bytes:
    """A whole HTTP/1.1 request as bytes."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAccept: {accept}\r\n"
    if body:
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def write_requests(path: Path, requests: Iterable[bytes]) -> Path:
    """Keeps requests in a file for `measure`; returns its path."""
    path.write_bytes(msgspec.msgpack.encode(list(requests)))
    return path


def measure(address: str, requests: Path, connections: int, seconds: float, warm_s: float = 1.0) -> Load:
    """Loads a server (http://host:port) from a process of its own.

    Raises:
        RuntimeError: if an answer was not 200, or a connection ended; with what was seen.
    """
    printed = generate(
        "benchmarks.load", address, requests=requests, connections=connections, seconds=seconds, warm=warm_s
    )
    return Load(**json.loads(printed))


def generate(module: str, address: str, **options: Any) -> str:
    """Runs a load generator against a server (http://host:port) in a process of its own; returns what it printed.

    Raises:
        RuntimeError: if it failed; with what it said.
    """
    host, port = address.removeprefix("http://").split(":")
    words = {"host": host, "port": port, **options}
    argv = [sys.executable, "-m", module]
    argv += [word for name, value in words.items() for word in (f"--{name}", str(value))]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd=root)
    if done.returncode:
        msg = f"the load generator failed on {address}: {done.stderr.strip()[-2000:]}"
        raise RuntimeError(msg)
    return done.stdout


class _Run:
    """Requests of one phase, shared by all connections: the next one until the time is over, and what each took."""

    def __init__(self, requests: Iterable[bytes], seconds: float, connections: int) -> None:
        self._requests = iter(requests)
        self._until = time.perf_counter() + seconds
        self._active = connections
        self.took_s: list[float] = []
        self.last_s = 0.0
        self.done = asyncio.get_running_loop().create_future()

    def next(self) -> bytes | None:
        """The next request, or None when it is time to stop."""
        if time.perf_counter() < self._until:
            return next(self._requests)
        self._active -= 1
        if self._active == 0 and not self.done.done():
            self.done.set_result(None)
        return None

    def fail(self, why: str) -> None:
        """Ends it."""
        if not self.done.done():
            self.done.set_exception(RuntimeError(why))


class _Connection(asyncio.Protocol):
    """One connection: writes a request, reads its answer, and so on until its run is over."""

    run: _Run

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._began = 0.0
        self._head = b""
        self._missing = 0

    def start(self, run: _Run) -> None:
        """Takes part in a run."""
        self.run = run
        self._send()

    def _send(self) -> None:
        request = self.run.next()
        if request is not None:
            self._began = time.perf_counter()
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._missing -= len(data)
        else:
            data = self._head + data
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._head = data
                return
            head, self._head = data[:end].lower() + b"\r\n", b""
            if not head.startswith(b"http/1.1 200"):
                self.run.fail(f"an answer was not 200: {data[:1000]!r}")
                return
            at = head.find(b"\r\ncontent-length:")
            if at < 0:
                self.run.fail(f"an answer has no content-length: {data[:1000]!r}")
                return
            self._missing = int(head[at + 17 : head.index(b"\r\n", at + 2)]) - (len(data) - end - 4)
        if self._missing == 0:
            run = self.run
            run.last_s = time.perf_counter()
            run.took_s.append(run.last_s - self._began)
            self._send()
        elif self._missing < 0:
            self.run.fail("an answer is longer than its content-length")

    def connection_lost(self, exc: Exception | None) -> None:
        self.run.fail(f"the server closed a connection: {exc}")


async def _load(given: argparse.Namespace) -> Load:
    requests: list[bytes] = msgspec.msgpack.decode(given.requests.read_bytes())
    gc.freeze()
    gc.disable()
    loop = asyncio.get_running_loop()
    connections = [
        (await loop.create_connection(_Connection, given.host, given.port))[1] for _ in range(given.connections)
    ]
    endless = cycle(requests)
    warm = await _phase(connections, endless, given.warm)
    began = time.perf_counter()
    run = await _phase(connections, endless, given.seconds)
    took_ms = np.array(run.took_s) * 1000
    return Load(
        len(took_ms) / (run.last_s - began),
        float(np.percentile(took_ms, 50)),
        float(np.percentile(took_ms, 99)),
        len(took_ms),
        len(took_ms) + len(warm.took_s),
    )


async def _phase(connections: list[_Connection], requests: Iterable[bytes], seconds: float) -> _Run:
    run = _Run(requests, seconds, len(connections))
    for connection in connections:
        connection.start(run)
    await asyncio.wait_for(run.done, seconds + _ANSWER_TIMEOUT_S)
    return run


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description="Load a server, print what it bore")
    parser.add_argument("--host", default="127.0.0.1", help="the server's address")
    parser.add_argument("--port", type=int, required=True, help="the server's port")
    parser.add_argument("--requests", type=Path, required=True, help="a file of requests, sent in turn")
    parser.add_argument("--connections", type=int, required=True, help="how many at once")
    parser.add_argument("--seconds", type=float, required=True, help="how long to begin requests")
    parser.add_argument("--warm", type=float, default=1.0, help="seconds of warm-up before")
    print(json.dumps(vars(uvloop.run(_load(parser.parse_args())))))
