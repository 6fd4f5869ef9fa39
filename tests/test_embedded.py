"""The embedded servers are real, private to their block, and never outlive it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
from confluent_kafka import Consumer, Producer, TopicPartition

from headrace import embedded
from headrace.embedded import EmbeddedBroker, EmbeddedRedis, ServerError

if TYPE_CHECKING:
    from collections.abc import Callable

DEADLINE_S = 20


def is_running(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent's look does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def eventually(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_redis_answers_in_its_block_and_is_gone_after_it() -> None:
    with EmbeddedRedis() as server:
        pid, folder, url = server.pid, server.folder, server.url
        with redis.Redis.from_url(url) as client:
            info = client.info("server")
        assert info["process_id"] == pid
        assert info["redis_version"].startswith("6.2")
        assert url == f"redis://127.0.0.1:{server.port}/0"
        assert repr(server) == f"<EmbeddedRedis pid={pid} {url}>"
    assert not is_running(pid)
    assert not folder.exists()
    assert repr(server) == "<EmbeddedRedis stopped>"


def test_redis_is_gone_when_its_block_raises() -> None:
    with pytest.raises(ZeroDivisionError), EmbeddedRedis() as server:  # noqa: PT012 - as intended
        pid, folder = server.pid, server.folder
        raise ZeroDivisionError
    assert not is_running(pid)
    assert not folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_redis_dies_with_a_parent_that_is_killed() -> None:
    code = """if True:
        from headrace.embedded import EmbeddedRedis
        with EmbeddedRedis() as server:
            print(server.pid, server.folder, flush=True)
            input()
    """
    parent = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        try:
            assert is_running(int(pid))
        finally:
            parent.kill()
    assert parent.returncode == -signal.SIGKILL
    assert eventually(lambda: not is_running(int(pid)))
    shutil.rmtree(os.fsdecode(folder))


def test_redis_outlives_the_thread_that_started_it() -> None:
    """The kernel takes the forking thread for the parent, and signals when that one ends."""
    server = EmbeddedRedis()
    starter = threading.Thread(target=server.__enter__)
    starter.start()
    starter.join(DEADLINE_S)
    try:
        with redis.Redis.from_url(server.url) as client:
            client.ping()
        time.sleep(0.1)  # Too short could only miss a fault, never report one.
        assert is_running(server.pid)
    finally:
        server.__exit__(None, None, None)


def test_redis_takes_another_port_when_somebody_took_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        taken = somebody.getsockname()[1]
        free = embedded.free_port()
        ports = iter([taken, free])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports))
        with EmbeddedRedis() as server:
            assert server.port == free


def test_redis_is_not_mistaken_for_another_one_on_its_port(
    redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "free_port", lambda: redis_server.port)
    with pytest.raises(ServerError, match="Address already in use"), EmbeddedRedis():
        pass


@pytest.mark.parametrize(("appendonly", "kept"), [(True, b"1"), (False, None)])
def test_only_an_append_only_file_survives_a_kill(appendonly: bool, kept: bytes | None) -> None:
    with EmbeddedRedis(appendonly=appendonly) as server:
        url, pid = server.url, server.pid
        with redis.Redis.from_url(url) as client:
            client.set("a", 1)
        server.kill()
        assert not is_running(pid)
        server.start()
        assert server.url == url
        with redis.Redis.from_url(url) as client:
            assert client.get("a") == kept


def test_arguments_reach_redis() -> None:
    args = ["--maxmemory", "50mb", "--appendonly", "yes"]
    with EmbeddedRedis(args=args) as server, redis.Redis.from_url(server.url) as client:
        assert client.config_get("maxmemory") == {"maxmemory": str(50 * 2**20)}
        assert client.config_get("appendonly") == {"appendonly": "yes"}


def test_redis_that_cannot_start_shows_its_log() -> None:
    with pytest.raises(ServerError, match=r"(?s)status 1 while starting.*no-such-setting"):
        EmbeddedRedis(args=["--no-such-setting", "1"]).__enter__()


def test_a_missing_binary_is_named() -> None:
    with pytest.raises(ServerError, match="'/no/redis-server' is not an executable file"):
        EmbeddedRedis("/no/redis-server").__enter__()


def test_redis_outside_its_block_says_so() -> None:
    with pytest.raises(ServerError, match="use it in a `with` block"):
        _ = EmbeddedRedis().url


def test_redis_7_works_too(redis7_server: EmbeddedRedis) -> None:
    with redis.Redis.from_url(redis7_server.url) as client:
        assert int(client.info("server")["redis_version"].split(".")[0]) >= 7


def test_redis_url_is_an_empty_database(redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0
        client.set("left by", "a test")


def test_redis_url_is_empty_again_for_the_next_test(redis_url: str) -> None:
    test_redis_url_is_an_empty_database(redis_url)


def test_broker_hands_on_what_was_produced() -> None:
    with EmbeddedBroker() as broker:
        producer = Producer({"bootstrap.servers": broker.bootstrap_servers})
        producer.produce("clicks", b"a click", key=b"u1", partition=2)
        assert producer.flush(DEADLINE_S) == 0
        consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": "unused"})
        try:
            consumer.assign([TopicPartition("clicks", 2, 0)])
            [message] = consumer.consume(1, timeout=DEADLINE_S)
        finally:
            consumer.close()
        assert message.error() is None
        assert (message.key(), message.value()) == (b"u1", b"a click")
        producer.close()


def test_broker_is_gone_after_its_block() -> None:
    with EmbeddedBroker() as broker:
        host, port = broker.bootstrap_servers.split(":")
        assert host == "127.0.0.1"
        socket.create_connection((host, int(port)), timeout=DEADLINE_S).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=DEADLINE_S)
    with pytest.raises(ServerError, match="use it in a `with` block"):
        _ = broker.bootstrap_servers


def test_both_run_for_who_tries_things_out_until_ctrl_c() -> None:
    """`python -m headrace.embedded` prints what to export, and leaves nothing."""
    with subprocess.Popen([sys.executable, "-m", "headrace.embedded"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            assert words.pop(0) == "export"
            there = dict(word.split("=", 1) for word in words)
            producer = Producer({"bootstrap.servers": there["HEADRACE_KAFKA"], "log_level": 0})
            assert producer.list_topics(timeout=DEADLINE_S).brokers
            producer.close()
            assert there["HEADRACE_TOPICS"] == "auto"
            with redis.Redis.from_url(there["HEADRACE_REDIS_URL"]) as client:
                pid = client.info("server")["process_id"]
            process.send_signal(signal.SIGINT)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
    assert eventually(lambda: not is_running(pid))
