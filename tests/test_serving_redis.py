"""The server when Redis is not well, with real ones: each state has its answer, and none hangs. And its own end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from config.settings import Settings
from features.plan import Plan
from headrace.embedded import EmbeddedBroker, EmbeddedRedis, end, free_port, spawn
from registry.apply import apply
from store.connect import connect
from tests.support.served import NOW_MS, ROOT, SHARDS, Clock, Rows, catalogue, project_folder, served, settings_of
from tests.support.stack import wait_for

LONG_S = 60.0
CLICK = {"t": NOW_MS - 1, "user_id": "u1", "item_id": "i1"}
RANKING = {"service": "ranking_v1", "user_id": "u1", "item_ids": ["i1"]}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return catalogue()


@pytest.fixture
def own() -> Iterator[EmbeddedRedis]:
    """A Redis that the test may make unwell."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def rows(plan: Plan, own: EmbeddedRedis) -> Rows:
    made = Rows(plan, own.url, Clock())
    made.write("clicks", [CLICK])
    return made


@pytest.fixture
async def http(plan: Plan, own: EmbeddedRedis, rows: Rows) -> AsyncIterator[httpx.AsyncClient]:
    async with served(settings_of(own.url, request_timeout_s=LONG_S, deadline_s=LONG_S), plan, Clock()) as client:
        yield client


async def clicks(http: httpx.AsyncClient) -> Any:
    """What is answered of u1: its clicks, or the status."""
    async with asyncio.timeout(LONG_S):
        answer = await http.post("/v1/features", json=RANKING)
    if answer.status_code != 200:
        assert answer.headers["content-type"] == "application/problem+json"
        return answer.status_code
    return answer.json()["user"]["features"]["user_activity__clicks_7d"]


async def test_a_slow_redis_is_waited_for(http: httpx.AsyncClient, rows: Rows) -> None:
    assert await clicks(http) == 1
    rows.client.execute_command("CLIENT", "PAUSE", 400, "ALL")
    assert await asyncio.gather(*(clicks(http) for _ in range(20))) == [1] * 20


async def test_a_redis_out_of_memory_is_still_read(http: httpx.AsyncClient, rows: Rows) -> None:
    """Writes fail there; the stream stops and says so. What is there is served."""
    rows.client.config_set("maxmemory", 1)
    with pytest.raises(redis.exceptions.RedisError, match=r"OOM|maxmemory"):
        rows.client.set("x", "y")
    assert await clicks(http) == 1
    assert (await http.get("/readyz")).status_code == 200


async def test_a_replica_that_takes_no_writes_is_read(plan: Plan, own: EmbeddedRedis, rows: Rows) -> None:
    """With its mirror: what the replica is told of, the server is told of."""
    with EmbeddedRedis(args=["--replicaof", "127.0.0.1", str(own.port)]) as replica:
        copied = connect(replica.url, 10)
        wait_for("it has all keys", lambda: copied.dbsize() == rows.client.dbsize())
        with pytest.raises(redis.exceptions.ReadOnlyError):
            copied.set("x", "y")
        async with served(settings_of(replica.url, request_timeout_s=LONG_S), plan, Clock()) as http:
            assert (await clicks(http), await clicks(http)) == (1, 1)
            assert (await http.get("/readyz")).status_code == 200
            rows.write("clicks", [CLICK])
            async with asyncio.timeout(LONG_S):
                while await clicks(http) != 2:  # noqa: ASYNC110  # another process decides when
                    await asyncio.sleep(0.01)


async def test_a_redis_that_loads_its_data_is_unavailable_until_it_has(
    http: httpx.AsyncClient, rows: Rows, own: EmbeddedRedis
) -> None:
    """Real loading, made slow: the commands that Redis refuses meanwhile are 503, not wrong, not late."""
    assert await clicks(http) == 1
    # It looks at its connections after each 2 MB.
    for n in range(40):
        rows.client.set(f"other{n}", os.urandom(500_000))
    rows.client.config_set("key-load-delay", 100_000)
    reloading = threading.Thread(target=connect(own.url, LONG_S).execute_command, args=("DEBUG", "RELOAD"))
    reloading.start()
    try:
        async with asyncio.timeout(LONG_S):
            while (found := await clicks(http)) == 1:  # noqa: ASYNC110  # Redis decides when
                await asyncio.sleep(0.01)
        assert found == 503
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.headers["retry-after"]) == (503, "1")
        assert (await http.get("/healthz")).status_code == 200
    finally:
        reloading.join(LONG_S)
    assert await clicks(http) == 1


# The end of the server


@pytest.fixture
def serving(tmp_path: Path, own: EmbeddedRedis) -> Iterator[tuple[subprocess.Popen[bytes], int, Path]]:
    """`headrace serve` as a process: it, its port and its log."""
    port, log = free_port(), tmp_path / "server.log"
    with EmbeddedBroker() as broker:
        settings = Settings(
            repo=project_folder(tmp_path / "project"),
            redis_url=own.url,
            kafka=broker.bootstrap_servers,
            topics="auto",
            shards=SHARDS,
            port=port,
            request_timeout_s=LONG_S,
            deadline_s=4,
        )
        apply(settings, connect(own.url, 10))
    environment = os.environ | settings.environment() | {"PYTHONPATH": str(ROOT)}
    process = spawn([sys.executable, "-W", "ignore", "-m", "headrace", "serve"], log=log, env=environment)
    try:
        wait_for("it listens", lambda: process.poll() is not None or "running on" in log.read_text())
        yield process, port, log
    finally:
        if process.poll() is None:
            end(process)
        print(log.read_text())


def test_a_server_that_is_stopped_answers_what_is_in_flight(
    serving: tuple[subprocess.Popen[bytes], int, Path], own: EmbeddedRedis
) -> None:
    """Also with clients that are idle, or that never send the rest: they are told so or closed; the status is 0."""
    process, port, log = serving
    body = json.dumps(RANKING).encode()
    request = b"POST /v1/features HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    connections = [socket.create_connection(("127.0.0.1", port), LONG_S) for _ in range(4)]
    in_flight, half, half_head, _idle = connections
    try:
        in_flight.sendall(request)
        assert in_flight.recv(12) == b"HTTP/1.1 200"  # It serves.
        wait_for("all of it is there", lambda: in_flight.recv(1_000_000).endswith(b"]}"))
        os.kill(own.pid, signal.SIGSTOP)
        in_flight.sendall(request)
        half.sendall(request[:-3])
        half_head.sendall(request[:9])
        # Its connection is asked for only once the others' bytes have arrived.
        assert httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=LONG_S).status_code == 200
        process.terminate()
        wait_for("it stops", lambda: "Shutting down" in log.read_text())
        os.kill(own.pid, signal.SIGCONT)
        assert in_flight.recv(12) == b"HTTP/1.1 200"
        assert half.recv(12) == b"HTTP/1.1 408"
        assert process.wait(LONG_S) == 0
    finally:
        os.kill(own.pid, signal.SIGCONT)
        for each in connections:
            each.close()
    assert not re.search("Traceback|cancel", log.read_text(), re.IGNORECASE)
