"""`make soak`, or `python -m benchmarks.soak`: what the server does for long at 80 % of its capacity, and at twice it.

One server process with its defaults, one user and 200 items a request. Four phases, each at a fixed pace: request
n is due at n / rate whether others are answered or not, and its latency counts from when it was sent.

1. soak: 80 % for `--seconds` (600): no error, no drift of p99 (the last fifth against the first), no growth of memory;
2. unloaded: 5 % of the capacity, for the p99 that the next is compared with;
3. overload: twice the capacity over many connections: p99 of what was accepted, and how much it was;
4. recovery: 50 % at once after it: how long until nothing is refused any more.

The capacity is what 4 connections get that ask again once they are answered: as much as can be had without a queue. It
is the median of five measurements, and taken anew before the overload.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import msgspec
import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.harness import end_on_sigterm, figure, say
from benchmarks.load import generate, measure, write_requests
from benchmarks.population import fill
from benchmarks.project import Project
from benchmarks.ranking import NPY, http

CONNECTIONS: Final = {"unloaded": 4, "soak": 16, "overload": 64, "recovery": 16}
_PARTS: Final = 5
_ANSWER_TIMEOUT_S: Final = 60.0


@dataclass(frozen=True)
class Paced:
    """Answers of a paced load, in order of sending: seconds since its start, latency (s), HTTP status."""

    sent_s: Any
    took_s: Any
    status: Any

    @property
    def accepted(self) -> Any:
        """Which were answered with 200."""
        return self.status == 200

    def p99_ms(self, since: float = 0.0, until: float = 1.0) -> float:
        """The p99 of what was accepted, in a share of the time."""
        end = self.sent_s[-1]
        part = self.accepted & (self.sent_s >= since * end) & (self.sent_s <= until * end)
        return float(np.percentile(self.took_s[part], 99)) * 1000


class _Connection(asyncio.Protocol):
    """Sends one request at a time and reads its answer."""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.answer: asyncio.Future[int] | None = None
        self._data = b""

    async def ask(self, request: bytes) -> int:
        """The status of the answer."""
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self.answer

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0 or self.answer is None:
            return
        length = int(self._data[:end].lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        if len(self._data) >= end + 4 + length:
            self._data, status = b"", int(self._data[9:12])
            self.answer.set_result(status)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(ConnectionError(f"the server closed a connection: {exc}"))


async def _load(given: argparse.Namespace) -> None:
    requests: list[bytes] = msgspec.msgpack.decode(given.requests.read_bytes())
    gc.freeze()
    gc.disable()
    loop = asyncio.get_running_loop()
    found: list[tuple[float, float, int]] = []
    n_sent, began = 0, 0.0

    async def work(connection: _Connection) -> None:
        """Takes the next request that is due; a connection that is late takes the next at once."""
        nonlocal n_sent
        while True:
            number = n_sent
            n_sent += 1
            due = began + number / given.rate
            if number / given.rate > given.seconds:
                return
            # Loops wake up to the millisecond; the rest of it is waited for among the others.
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            sent = time.perf_counter()
            status = await connection.ask(requests[number % len(requests)])
            found.append((sent - began, time.perf_counter() - sent, status))

    connections = [
        (await loop.create_connection(_Connection, given.host, given.port))[1] for _ in range(given.connections)
    ]
    began = time.perf_counter()
    async with asyncio.timeout(given.seconds + _ANSWER_TIMEOUT_S), asyncio.TaskGroup() as group:
        for each in connections:
            group.create_task(work(each))
    np.save(given.out, np.array(sorted(found)))


def paced(address: str, requests: Path, connections: int, rate: float, seconds: float) -> Paced:
    """Loads a server at a pace, from a process of its own.

    Raises:
        RuntimeError: if a connection ended, or an answer did not come.
    """
    out = requests.with_suffix(".npy")
    generate(
        "benchmarks.soak",
        address,
        requests=requests,
        connections=connections,
        rate=rate,
        seconds=seconds,
        out=out,
    )
    sent_s, took_s, status = np.load(out).T
    return Paced(sent_s, took_s, status)


def _resident_mb(pid: int) -> float:
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def _server_pid(port: int) -> int:
    """The process that was started with this port, among our children."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == os.getpid() and str(port).encode() in words:
            return int(folder.name)
    msg = f"no child of ours serves port {port}"
    raise RuntimeError(msg)


def run(seconds: float, overload_s: float, users: int) -> dict[str, float]:
    """Measures all phases; returns the figures."""
    with Project() as project:
        population = fill(project.client, project.plan, users, users)
        say(population.describe())
        requests = write_requests(project.folder / "soak", http(population.requests(min(users, 20_000)), NPY))
        # Everything as it is by default: what is refused here would be refused there.
        defaults = {"request_timeout_s": 1.0, "redis_timeout_s": 5.0, "requests_max": project.settings.requests_max}
        with project.serve(**defaults) as address:
            pid = _server_pid(int(address.rpartition(":")[2]))

            def carried() -> float:
                """The capacity now, requests/s: other tenants of a machine make it another one within minutes."""
                each_s = min(4.0, seconds)
                found = median(measure(address, requests, 4, each_s, 1.0).rps for _ in range(_PARTS))
                say(f"capacity: {found:,.0f} requests/s")
                return found

            def phase(name: str, share: float, length_s: float, capacity: float) -> Paced:
                done = paced(address, requests, CONNECTIONS[name], share * capacity, length_s)
                taken = int(done.accepted.sum())
                say(f"{name}: {len(done.status):,} asked, {taken:,} answered, p99 {done.p99_ms():.2f} ms")
                return done

            before = carried()
            phase("soak", 0.8, min(10.0, seconds / 10), before)  # Memory is what it is after the first of these.
            before_mb = _resident_mb(pid)
            soak = phase("soak", 0.8, seconds, before)
            after_mb = _resident_mb(pid)
            after = carried()
            unloaded = phase("unloaded", 0.05, min(20.0, seconds), after)
            overload = phase("overload", 2, overload_s, after)
            recovery = phase("recovery", 0.5, min(5.0, overload_s), after)
    share = 1 / _PARTS
    refused = recovery.sent_s[~recovery.accepted]
    return {
        "capacity_rps": before,
        "soak_requests": len(soak.status),
        "soak_errors": int((~soak.accepted).sum()),
        "soak_p99_ms": soak.p99_ms(),
        "soak_p99_drift": soak.p99_ms(1 - share) / soak.p99_ms(0, share),
        "soak_memory_before_mb": before_mb,
        "soak_memory_growth_mb": after_mb - before_mb,
        "overload_capacity_rps": after,
        "unloaded_p99_ms": unloaded.p99_ms(),
        "overload_offered_rps": len(overload.status) / overload.sent_s[-1],
        "overload_accepted_rps": float(overload.accepted.sum()) / overload.sent_s[-1],
        "overload_other_errors": int((~overload.accepted & (overload.status != 503)).sum()),
        "overload_p99_ms": overload.p99_ms(),
        "overload_p99_ratio": overload.p99_ms() / unloaded.p99_ms(),
        "recovery_s": float(refused.max()) if len(refused) else 0.0,
    }


MUST: Final = {
    "soak_errors": 0,
    "soak_p99_drift": 1.5,
    "soak_memory_growth_mb": 20,
    "overload_other_errors": 0,
    "overload_p99_ratio": 5,
    "recovery_s": 1,
}
"""At most."""


def main() -> None:
    """The command line; the load generator's own options are for `paced`."""
    end_on_sigterm()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description="80 % for long, then twice too much")
    parser.add_argument("--seconds", type=float, default=600.0, help="how long to soak")
    parser.add_argument("--overload", type=float, default=30.0, help="seconds of overload")
    parser.add_argument("--users", type=int, default=20_000, help="how many users, and items, there are")
    parser.add_argument("--json", action="store_true", help="make the last line of output one JSON object")
    for name, kind in (("requests", Path), ("host", str), ("port", int), ("connections", int), ("rate", float)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.requests is not None:
        uvloop.run(_load(given))
        return
    found = run(given.seconds, given.overload, given.users)
    table = Table("figure", "value", "at most", "")
    for name, value in found.items():
        limit = MUST.get(name)
        verdict = "" if limit is None else "reached" if value <= limit else "[bold red]missed[/]"
        table.add_row(name, figure(value), "" if limit is None else f"{limit:g}", verdict)
    Console(highlight=False, width=120).print(table)
    if given.json:
        sys.stdout.flush()
        print(json.dumps(found))
    sys.exit(any(found[name] > limit for name, limit in MUST.items()))


if __name__ == "__main__":
    main()
