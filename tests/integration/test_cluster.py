"""Redis Cluster: everything as on one server, also while a master dies and while slots move."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from redis.connection import Connection
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from headrace.embedded import EmbeddedRedis, free_port
from store.cluster import Cluster
from store.commit import Position, RowWrite, ShardCommit, Writer, initialise, read_record
from store.connect import connect, servers
from store.connection import _Link
from store.keys import Keyspace
from store.slots import slot_of
from tests.support.aof import bring_back
from tests.support.cluster import DEADLINE_S, RedisCluster, falling_behind, wait_for
from tests.support.failing import check_nothing_lost

SPACE = Keyspace("test", 20)
KEYS = [b"{test:item:%d}:row:%d" % (at % 20, at) for at in range(200)]
VALUES = [b"value %d" % at for at in range(200)]
FAR_MS = 4_000_000_000_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with RedisCluster() as found:
        yield found


@pytest.fixture
def client(cluster: RedisCluster) -> Iterator[Any]:
    """A blocking client of an empty cluster that is whole."""
    cluster.settled()
    with connect(cluster.url, 10) as found:
        for master in servers(found):
            master.flushall()
        yield found


def fill(client: Any) -> None:
    pipeline = client.pipeline()
    for key, value in zip(KEYS, VALUES, strict=True):
        pipeline.execute_command("SET", key, value)
    assert set(pipeline.execute()) == {b"OK"}


def test_slots_are_redis_own() -> None:
    for key in (*KEYS, b"", b"{", b"}{", b"{}a", b"{{a}}", b"a{b}c{d}", b"a}b{c}", b"plain"):
        assert slot_of(key) == key_slot(key), key


def test_keys_of_all_nodes_take_one_round_trip_a_node(
    cluster: RedisCluster, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads of 20 shards on three nodes: each node is written to once, before any answer is waited for."""
    fill(client)
    assert client.mget(KEYS) == VALUES
    done: list[tuple[str, int]] = []
    send, read = Connection.send_packed_command, Connection.read_response

    def sent(connection: Connection, *given: Any, **options: Any) -> None:
        done.append(("sent", connection.port))
        send(connection, *given, **options)

    def received(connection: Connection, *given: Any, **options: Any) -> Any:
        done.append(("received", connection.port))
        return read(connection, *given, **options)

    monkeypatch.setattr(Connection, "send_packed_command", sent)
    monkeypatch.setattr(Connection, "read_response", received)
    assert client.mget([*KEYS, b"{test:item:3}:none"]) == [*VALUES, None]
    masters = {cluster.master_of(key).port for key in KEYS[:20]}
    assert len(masters) == 3
    assert {what for what, _ in done[:3]} == {"sent"}
    assert {port for _, port in done[:3]} == masters
    assert {what for what, _ in done[3:23]} == {"received"}


def test_a_moving_slot_is_read_and_written(cluster: RedisCluster, client: Any) -> None:
    """While the keys of a slot are partly on one node and partly on another, and some on none."""
    fill(client)
    keys, values = [*KEYS, b"{test:item:0}:none", b"{test:item:0}:new"], [*VALUES, None, b"1"]
    slot, to = slot_of(KEYS[0]), cluster.other_master(KEYS[0])
    source = cluster.begin_move(slot, to)
    assert cluster.move_keys(slot, source, to, 4) == 4
    assert client.execute_command("SET", b"{test:item:0}:new", b"1") == b"OK"
    assert client.mget(keys) == values
    while cluster.move_keys(slot, source, to, 4):
        assert client.mget(keys) == values
    assert client.mget(keys) == values
    cluster.end_move(slot, source, to)
    assert client.mget(keys) == values


def test_a_commit_to_a_moving_slot_waits_for_its_end(cluster: RedisCluster, client: Any) -> None:
    """A script needs all its keys in one place, which a moving slot does not offer."""
    initialise(client, SPACE, ["item"])
    writer = Writer(client, SPACE)
    record = writer.claim("item", 5)
    key = SPACE.commit_record("item", 5)
    slot, to = slot_of(key), cluster.other_master(key)
    source = cluster.begin_move(slot, to)
    new = record.advanced(writer.token, {"clicks/0": Position(7, 0)})
    rows = [RowWrite(b"{test:item:5}:row:%d" % at, b"x", FAR_MS) for at in range(3)]
    commit = threading.Thread(target=writer.commit, args=([ShardCommit(key, record, new, rows)],))
    commit.start()
    while cluster.move_keys(slot, source, to, 1):
        pass
    cluster.end_move(slot, source, to)
    commit.join(60)
    assert not commit.is_alive()
    assert read_record(client, key) == new
    assert client.mget([row.key for row in rows]) == [b"x"] * 3


def test_a_lost_master_s_replica_answers(cluster: RedisCluster, client: Any) -> None:
    """Within the call's deadline, if that is longer than the fail-over; records and rows are what was committed."""
    fill(client)
    initialise(client, SPACE, ["item"])
    writers = {shard: Writer(client, SPACE) for shard in range(20)}
    records = {shard: writer.claim("item", shard) for shard, writer in writers.items()}
    cluster.settled()
    victim = cluster.master_of(KEYS[0])
    cluster.fail_over(victim)
    assert client.mget(KEYS) == VALUES
    for shard, writer in writers.items():
        new = records[shard].advanced(writer.token, {"clicks/0": Position(9, 0)})
        writer.commit([ShardCommit(SPACE.commit_record("item", shard), records[shard], new)])
        assert read_record(client, SPACE.commit_record("item", shard)) == new
    bring_back(victim)
    cluster.settled()
    assert client.mget(KEYS) == VALUES


async def test_a_server_s_reads_take_one_round_trip_a_node(
    cluster: RedisCluster, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 slots on three nodes, tracked or not: each node is written to once."""
    fill(client)
    reading = Cluster(cluster.url, 10, on_invalidated=lambda _: None)
    try:
        await reading.mget(KEYS)
        sent: list[object] = []
        send = _Link.send

        def noted(link: _Link, request: bytes, n_replies: int) -> Any:
            if b"MGET" in request:
                sent.append(link)
            return send(link, request, n_replies)

        monkeypatch.setattr(_Link, "send", noted)
        assert await reading.mget(KEYS[:50], tracked=KEYS[50:]) == VALUES
        assert len(sent) == len(set(sent)) == len({cluster.master_of(key).port for key in KEYS[:20]}) == 3
    finally:
        await reading.aclose()


class Keeper:
    """Keeps values as `Connection` says that one may, and reads only what it does not have."""

    def __init__(self, url: str) -> None:
        self.kept: dict[bytes, bytes | None] = {}
        self._wanted: list[set[bytes]] = []
        self.cluster = Cluster(url, 10, on_invalidated=self._invalidated)

    def _invalidated(self, keys: Sequence[bytes] | None) -> None:
        for key in list(self.kept) if keys is None else keys:
            self.kept.pop(key, None)
        for wanted in self._wanted:
            wanted.difference_update(list(wanted) if keys is None else keys)

    async def read(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values, those that are kept without asking."""
        found = {key: self.kept[key] for key in keys if key in self.kept}
        missing = [key for key in keys if key not in found]
        wanted = set(missing)
        self._wanted.append(wanted)
        try:
            values = await self.cluster.mget((), tracked=missing) if missing else []
        finally:
            self._wanted.remove(wanted)
        read = dict(zip(missing, values, strict=True))
        self.kept |= {key: value for key, value in read.items() if key in wanted}
        return [{**found, **read}[key] for key in keys]


async def become(keeper: Keeper, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
    """Returns once these values are read, which may be kept ones."""
    async with asyncio.timeout(DEADLINE_S):
        while await keeper.read(keys) != values:  # noqa: ASYNC110  # what is waited for happens in Redis
            await asyncio.sleep(0.02)


async def keep(keeper: Keeper, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
    """Returns once these values are all kept, which they are not while nodes still tell one another of slots."""
    async with asyncio.timeout(DEADLINE_S):
        while set(keeper.kept) != set(keys):
            assert await keeper.read(keys) == values
            await asyncio.sleep(0.02)


async def test_kept_values_follow_a_slot_that_moves(cluster: RedisCluster, client: Any) -> None:
    """Whoever keeps values ends with the right ones at every step of a move: keys that are still here, that have gone,
    and that were on no node before. Without a look at the nodes a key that was kept as absent stays so: the node that
    gives its slot away never has it.
    """
    fill(client)
    own = [key for key in KEYS if key.startswith(b"{test:item:7}")]
    absent = [b"{test:item:7}:absent:%d" % at for at in range(3)]
    keys = own + absent
    slot, to = slot_of(own[0]), cluster.other_master(own[0])
    keeper = Keeper(cluster.url)

    async def written(key: bytes, value: bytes) -> None:
        await asyncio.to_thread(client.execute_command, "SET", key, value)
        values[keys.index(key)] = value
        await become(keeper, keys, values)

    try:
        values: list[bytes | None] = [*(VALUES[KEYS.index(key)] for key in own), *[None] * 3]
        await keep(keeper, keys, values)
        source = await asyncio.to_thread(cluster.begin_move, slot, to)
        await written(absent[0], b"made at the new master")
        await written(own[0], b"not moved yet")
        await asyncio.to_thread(cluster.move_keys, slot, source, to, 5)
        for key in own:
            await written(key, b"half moved " + key)
        while await asyncio.to_thread(cluster.move_keys, slot, source, to, 5):
            await written(own[1], b"another " + bytes(str(len(keeper.kept)), "ascii"))
        await written(absent[1], b"all moved")
        await asyncio.to_thread(cluster.end_move, slot, source, to)
        await written(absent[2], b"at its new place")
        for key in own:
            await written(key, b"moved " + key)
    finally:
        await keeper.cluster.aclose()


async def test_kept_values_follow_a_master_that_is_demoted(cluster: RedisCluster, client: Any) -> None:
    """It stays up, and so do connections to it; nobody reads from it, since everything that is read is kept."""
    fill(client)
    keeper = Keeper(cluster.url)
    try:
        await keep(keeper, KEYS, VALUES)
        master = cluster.master_of(KEYS[0])
        replica = cluster.replica_of(master)
        cluster.do(replica, "CLUSTER", "FAILOVER")
        await asyncio.to_thread(wait_for, "the replica is the master", lambda: cluster.master_of(KEYS[0]) is replica)
        values = [b"new " + value for value in VALUES]
        pipeline = client.pipeline()
        for key, value in zip(KEYS, values, strict=True):
            pipeline.execute_command("SET", key, value)
        await asyncio.to_thread(pipeline.execute)
        await become(keeper, KEYS, values)
    finally:
        await keeper.cluster.aclose()


async def test_a_server_reads_on_after_a_fail_over(cluster: RedisCluster, client: Any) -> None:
    """A read that finds the master dead has its replica's answer, if that is promoted within the deadline."""
    fill(client)
    cluster.settled()
    reading = Cluster(cluster.url, DEADLINE_S, on_invalidated=lambda _: None)
    try:
        assert await reading.mget(KEYS) == VALUES
        victim = cluster.master_of(KEYS[0])
        failing_over = asyncio.create_task(asyncio.to_thread(cluster.fail_over, victim))
        n = 0
        while not failing_over.done():
            assert await reading.mget(KEYS) == VALUES
            n += 1
            await asyncio.sleep(0.01)
        await failing_over
        assert n > 0
        bring_back(victim)
        await asyncio.to_thread(cluster.settled)
        assert await reading.mget((), tracked=KEYS) == VALUES
    finally:
        await reading.aclose()


def test_a_cluster_that_is_away_or_none_says_so() -> None:
    nobody = free_port()
    with (
        connect(f"redis+cluster://127.0.0.1:{nobody}", 0.2) as client,
        pytest.raises(RedisConnectionError, match=rf"no node .*127\.0\.0\.1:{nobody} answers"),
    ):
        client.get(b"k")
    with (
        EmbeddedRedis() as server,
        connect(f"redis+cluster://127.0.0.1:{server.port}", 5) as client,
        pytest.raises(ResponseError, match=r"is no node of a Redis Cluster: write redis:// in place of"),
    ):
        client.get(b"k")


@pytest.mark.kafka
def test_masters_that_die_in_mid_flow_leave_every_row_as_brute_force_has_it() -> None:
    """Two of three masters are killed, one after the other, and come back as replicas, while two workers write and a
    server answers: 0 differences. The first one's replica lacks commits that were acknowledged: a writer that went on
    without comparing records would lose them; one that sent a commit again without looking would count it twice.
    """
    cluster, keyspace = RedisCluster(), Keyspace("headrace", 8)

    def lose_commits() -> None:
        record = keyspace.commit_record("user", 3)
        victim = cluster.master_of(record)
        with falling_behind(victim, cluster.replica_of(victim), record):
            cluster.fail_over(victim)
        bring_back(victim)
        cluster.settled()

    def lose_none() -> None:
        victim = cluster.master_of(keyspace.commit_record("item", 5))
        cluster.fail_over(victim)
        bring_back(victim)
        cluster.settled()

    check_nothing_lost(cluster, [lose_commits, lose_none])
