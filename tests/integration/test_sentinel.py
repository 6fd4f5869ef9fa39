"""Sentinel: reads and commits go to the master that sentinels name, and to no other."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from headrace.embedded import EmbeddedRedis, free_port
from store.connect import connect
from store.connection import Connection
from store.keys import Keyspace
from tests.support.aof import bring_back
from tests.support.cluster import DEADLINE_S, falling_behind
from tests.support.failing import check_nothing_lost
from tests.support.sentinel import NAME, SentinelRedis


@pytest.fixture(scope="module")
def servers() -> Iterator[SentinelRedis]:
    with SentinelRedis() as found:
        yield found


@pytest.fixture
def client(servers: SentinelRedis) -> Iterator[Any]:
    """A blocking client of an empty master whose replica is in step."""
    servers.settled()
    with connect(servers.url, 5) as found:
        found.flushall()
        yield found


async def answered(connection: Connection, key: bytes) -> bytes | None:
    """The value, once there is an answer."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            with suppress(RedisError):
                return (await connection.mget([key]))[0]
            await asyncio.sleep(0.02)


async def test_after_a_fail_over_the_new_master_is_read_and_written(servers: SentinelRedis, client: Any) -> None:
    """By a blocking client and by a server's connection, which says first that anything may have changed."""
    client.set(b"k", b"1")
    servers.settled()
    news: list[Sequence[bytes] | None] = []
    connection = Connection(servers.url, 5, on_invalidated=news.append)
    try:
        assert await connection.mget((), tracked=[b"k"]) == [b"1"]
        victim = await asyncio.to_thread(servers.fail_over)
        assert await answered(connection, b"k") == b"1"
        assert None in news
        assert client.get(b"k") == b"1"
        assert client.set(b"k", b"2")
        assert await connection.mget([b"k"]) == [b"2"]
        bring_back(victim)
        await asyncio.to_thread(servers.settled)
        # On a busy machine it may be the master again by now, and without the last write.
        assert await connection.mget([b"k"]) == [servers.do(servers.master.port, "GET", "k")]
    finally:
        await connection.aclose()


async def test_a_demoted_master_that_nobody_told_is_left(servers: SentinelRedis, client: Any) -> None:
    """The sentinels name another while this one still takes itself for the master, as when it is cut off from them.
    Whoever trusts an open connection would read from it for ever.
    """
    client.set(b"k", b"1")
    with EmbeddedRedis() as stray:
        servers.do(stray.port, "SET", "k", "stray")
        servers.do(servers.sentinels[0], "SENTINEL", "MONITOR", "stray", "127.0.0.1", stray.port, 1)
        connection = Connection(servers.url.replace(f"/{NAME}", "/stray"), 5, on_invalidated=lambda _: None)
        try:
            assert await connection.mget([b"k"]) == [b"stray"]
            servers.do(servers.sentinels[0], "SENTINEL", "REMOVE", "stray")
            port = servers.master.port
            servers.do(servers.sentinels[0], "SENTINEL", "MONITOR", "stray", "127.0.0.1", port, 1)
            async with asyncio.timeout(DEADLINE_S):
                while await answered(connection, b"k") != b"1":  # noqa: ASYNC110  # it happens in Redis
                    await asyncio.sleep(0.02)
            assert servers.do(stray.port, "GET", "k") == b"stray"
        finally:
            await connection.aclose()
            servers.do(servers.sentinels[0], "SENTINEL", "REMOVE", "stray")


async def test_a_replica_is_not_taken_for_the_master(servers: SentinelRedis, client: Any) -> None:
    """Sentinels can be behind and name a server that is none: neither client reads from it."""
    assert client.set(b"k", b"1")
    (port, *_) = servers.sentinels
    servers.do(port, "SENTINEL", "MONITOR", "stray", "127.0.0.1", servers.replica.port, 3)
    url = servers.url.replace(f"/{NAME}", "/stray")
    connection = Connection(url, 5)
    try:
        with pytest.raises(RedisConnectionError, match="is no master: the sentinels have not agreed"):
            await connection.mget([b"k"])
        with connect(url, 5) as other, pytest.raises(RedisConnectionError, match=r"no master|No master"):
            other.get(b"k")
    finally:
        await connection.aclose()
        servers.do(port, "SENTINEL", "REMOVE", "stray")


def test_sentinels_that_are_away_or_know_no_such_master_say_so(servers: SentinelRedis) -> None:
    nobody = free_port()
    for url in (f"redis+sentinel://127.0.0.1:{nobody}/{NAME}", servers.url.replace(f"/{NAME}", "/other")):
        with connect(url, 0.5) as client, pytest.raises(RedisConnectionError, match="No master found for"):
            client.get(b"k")

    async def read(url: str) -> None:
        connection = Connection(url, 5)
        try:
            await connection.mget([b"k"])
        finally:
            await connection.aclose()

    with pytest.raises(RedisConnectionError, match=f"{nobody}.* can't be reached"):
        asyncio.run(read(f"redis+sentinel://127.0.0.1:{nobody}/{NAME}"))
    with pytest.raises(RedisConnectionError, match="knows no master 'other'"):
        asyncio.run(read(servers.url.replace(f"/{NAME}", "/other")))


@pytest.mark.kafka
def test_masters_that_die_in_mid_flow_leave_every_row_as_brute_force_has_it() -> None:
    """The master is killed and comes back as a replica, while two workers write and a server answers: 0 differences,
    though the replica that took its place lacked commits which had been acknowledged. Then that one hangs, is
    replaced by the first, and goes on as if it were the master still.
    """
    servers = SentinelRedis()

    def lose_commits() -> None:
        with falling_behind(servers.master, servers.replica, Keyspace("headrace", 8).commit_record("user", 3)):
            victim = servers.fail_over()
        bring_back(victim)
        servers.settled()

    def hang() -> None:
        hung = servers.fail_over(lambda master: os.kill(master.pid, signal.SIGSTOP))
        os.kill(hung.pid, signal.SIGCONT)
        servers.settled()

    check_nothing_lost(servers, [lose_commits, hang])
