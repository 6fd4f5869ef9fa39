"""Redis Cluster: everything as on one server, also while a master dies and while slots move."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from redis.connection import Connection
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from headrace.embedded import EmbeddedRedis, free_port
from store.commit import Position, RowWrite, ShardCommit, Writer, initialise, read_record
from store.connect import connect, servers
from store.keys import Keyspace
from store.slots import slot_of
from tests.support.cluster import RedisCluster

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
    masters = {cluster.master_of(key).port for key in KEYS}
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
    victim.start()
    cluster.settled()
    assert client.mget(KEYS) == VALUES


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
