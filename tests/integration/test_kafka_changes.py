"""The stream while Kafka changes under it or does not let it in: partitions, retention, passwords, lag, shutdown."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions  # type: ignore[attr-defined]  # where it is documented
from prometheus_client.parser import text_string_to_metric_families

from headrace.embedded import free_port
from tests.support.feed import Feed, an_event, differences
from tests.support.kafka import KafkaCluster, RealKafka
from tests.support.stack import Stack, children_of, wait_for

pytestmark = pytest.mark.kafka

PASSWORD = "hunter2-and-more"
SOON_S = 25
"""Within which the stream ends when told to, whatever is away."""


@pytest.fixture(scope="module")
def kafka() -> Iterator[RealKafka]:
    with RealKafka(PASSWORD) as server:
        yield server


@contextmanager
def suspended(pid: int) -> Iterator[None]:
    """A process that does nothing meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def metrics(stack: Stack) -> dict[tuple[str, str, str], float]:
    """The stream's, by name, topic and partition."""
    text = httpx.get(f"http://127.0.0.1:{stack.settings.stream_metrics_port}/metrics", timeout=10).text
    return {
        (sample.name, sample.labels.get("topic", ""), sample.labels.get("partition", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def stop(process: subprocess.Popen[bytes]) -> int:
    """The exit status after SIGTERM."""
    process.send_signal(signal.SIGTERM)
    return process.wait(SOON_S)


def partitions(stack: Stack, topic: str) -> int:
    """How many can be read; a new one has no leader for a moment."""
    with suppress(KafkaException):
        return len(stack.ends(topic))
    return 0


def claimed(stack: Stack, times: int = 1) -> None:
    wait_for("the lanes are claimed", lambda: stack.log("stream").count("lane_claimed") >= times * stack.settings.lanes)


def test_partitions_that_a_topic_gains_are_read_at_once(kafka: RealKafka) -> None:
    """Each new partition has one reader, while both workers run on; all of its events count.

    Workers that list partitions when they start would leave these events where they are until the next start.
    """
    with Stack(broker=kafka, partitions=2, shards=8, lanes=2) as stack:
        script = (
            "import runpy, sys; from streams import kafka; kafka.LOOK_S = 0.5; "
            "sys.argv = ['bytewax.run', 'streams.dataflow:flow', '-s', '1', '-w', '2']; "
            "runpy.run_module('bytewax.run', run_name='__main__')"
        )
        worker = stack.start("stream", "-c", script)
        address = stack.start_server()
        feed = Feed(stack.kafka.bootstrap_servers)
        feed.send(500)
        stack.wait_until_committed()
        admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})
        for done in admin.create_partitions([NewPartitions("clicks", 5), NewPartitions("likes", 3)]).values():
            done.result()
        wait_for("there are more", lambda: partitions(stack, "clicks") == 5 and partitions(stack, "likes") == 3)
        for number in range(5):
            feed.send(200, "clicks", number)
        feed.send(200, "likes", 2)
        stack.wait_until_committed()
        wrong = differences(address, feed.events)
        assert not wrong, (len(wrong), wrong[:5])
        assert stop(worker) == 0


def test_records_deleted_before_they_were_read_are_reported_and_the_rest_is_exact(kafka: RealKafka) -> None:
    """While the stream is down, and while it runs: lost are those offsets, and the stream goes on after them.

    A consumer that goes to the earliest offset by itself says nothing; one that stops is down for good. Before and
    after, SIGTERM ends it with status 0 and all that it had read committed.
    """
    with Stack(broker=kafka, partitions=2, shards=8, stream_metrics_port=free_port()) as stack:
        admin = AdminClient({"bootstrap.servers": kafka.bootstrap_servers})

        def delete(partition: int, before: int) -> None:
            for done in admin.delete_records([TopicPartition("clicks", partition, before)]).values():
                done.result()

        stream = stack.start_stream(1)
        address = stack.start_server()
        feed = Feed(stack.kafka.bootstrap_servers)
        feed.send(1_000)
        stack.wait_until_committed()
        assert stop(stream) == 0

        read = stack.ends("clicks")[0]
        feed.send(800, "clicks", 0)
        delete(0, read + 300)
        feed.lose("clicks", 0, read, read + 299)
        stream = stack.start_stream(1)
        claimed(stack, 2)
        assert re.search(rf"records_lost +first={read} last={read + 299} partition=clicks/0", stack.log("stream"))
        stack.wait_until_committed()

        worker, *_ = children_of(stream)
        read = stack.ends("clicks")[1]
        with suspended(worker):
            # The broker answers what it was asked last after 100 ms, with nothing: else with what is to be lost.
            time.sleep(1)
            feed.send(900, "clicks", 1)
            delete(1, read + 700)
        stack.wait_until_committed()
        said = re.search(rf"records_lost +first=(\d+) last={read + 699} partition=clicks/1", stack.log("stream"))
        assert said, stack.log("stream")
        # What the broker had on its way to the worker is read, and not lost: mostly nothing.
        first = int(said[1])
        assert read <= first
        feed.lose("clicks", 1, first, read + 699)
        assert children_of(stream)[0] == worker, stack.log("stream")
        found = metrics(stack)
        assert found["headrace_stream_records_lost_total", "clicks", "0"] == 300
        assert found["headrace_stream_records_lost_total", "clicks", "1"] == read + 700 - first
        wrong = differences(address, feed.events)
        assert not wrong, (len(wrong), wrong[:5])


def memory_mb(pid: int, which: str) -> float:
    """VmRSS, what it has, or VmHWM, the most it ever had."""
    found = re.search(rf"{which}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1000


def test_a_stream_that_falls_behind_says_so_needs_no_more_memory_and_catches_up(kafka: RealKafka) -> None:
    """240 MB wait in Kafka: they are not all taken at once, the lag is told while it lasts, and every event counts."""
    with Stack(broker=kafka, shards=8, chunk_events=2_000, stream_metrics_port=free_port()) as stack:
        stream = stack.start_stream(1)
        address = stack.start_server()
        claimed(stack)
        feed = Feed(stack.kafka.bootstrap_servers)
        feed.send(500)
        stack.wait_until_committed()
        worker, *_ = children_of(stream)
        before_mb = memory_mb(worker, "VmRSS")
        with suspended(worker):
            feed.send(60_000, note="x" * 3_800)
        lags: list[tuple[float, float]] = []

        def caught_up() -> bool:
            found = metrics(stack)
            mine = [(name, topic) for name, topic, _ in found if name.startswith("headrace_stream_lag")]
            assert mine
            lags.append(
                tuple(  # type: ignore[arg-type]  # it has two
                    sum(value for (each, _, _), value in found.items() if each == name)
                    for name in ("headrace_stream_lag_records", "headrace_stream_lag_seconds")
                )
            )
            return found["headrace_stream_events_total", "clicks", ""] >= 60_500 and lags[-1] == (0, 0)

        wait_for("it has caught up", caught_up)
        grown_mb = memory_mb(worker, "VmHWM") - before_mb
        print(f"lag at most {max(lags)}, memory {before_mb:.0f} MB and {grown_mb:.0f} more")
        assert max(lags)[0] > 10_000
        assert max(seconds for _, seconds in lags) > 0
        assert grown_mb < 160
        stack.wait_until_committed()
        wrong = differences(address, feed.events)
        assert not wrong, (len(wrong), wrong[:5])


def test_a_hanging_redis_ends_the_worker_and_nothing_holds_up_the_end(kafka: RealKafka) -> None:
    """A worker whose Redis does not answer ends by its deadlines and is started again. SIGTERM ends the stream soon.

    A commit's thread that is waited for, or a drain without a bound, held the process for 30 s.
    """
    with Stack(broker=kafka, shards=8, redis_timeout_s=1, row_cache_mb=0) as stack:
        stream = stack.start_stream(1)
        address = stack.start_server()
        claimed(stack)
        feed = Feed(stack.kafka.bootstrap_servers)
        with suspended(stack.redis.pid):
            feed.send(200)
            wait_for("the worker has ended", lambda: "workers_stopped" in stack.log("stream"))
        claimed(stack, 2)
        feed.send(200)
        stack.wait_until_committed()
        with suspended(stack.redis.pid):
            feed.send(200)
            assert stop(stream) == 0
        stream = stack.start_stream(1)
        claimed(stack, 3)
        stack.wait_until_committed()
        kafka.kill()
        try:
            assert stop(stream) == 0
        finally:
            kafka.start()
        wrong = differences(address, feed.events)
        assert not wrong, (len(wrong), wrong[:5])


@pytest.mark.parametrize("tls", [False, True], ids=["SASL_PLAINTEXT", "SASL_SSL"])
def test_every_client_of_kafka_gets_in_by_the_options(kafka: RealKafka, tls: bool, tmp_path: Path) -> None:
    """`apply` makes topics, the stream reads and writes dead letters, `doctor` looks, `replay` sends."""
    options = {
        "security.protocol": "SASL_SSL" if tls else "SASL_PLAINTEXT",
        "sasl.mechanism": "SCRAM-SHA-256",
        "sasl.username": "alice",
        "sasl.password": PASSWORD,
        **({"ssl.ca.location": str(kafka.ca)} if tls else {}),
    }
    servers = kafka.ssl_servers if tls else kafka.sasl_servers
    with Stack(broker=kafka, kafka=servers, kafka_options=options, shards=4) as stack:
        stack.start_stream(1)
        address = stack.start_server()
        feed = Feed(stack.kafka.bootstrap_servers)
        feed.send(300)
        stack.produce([("clicks", "u1", b"{not json")])
        event = an_event(random.Random(0), 0) | {"event_id": "replayed", "user_id": "u-replayed"}
        (tmp_path / "events.jsonl").write_text(json.dumps(event))
        printed = stack.headrace("replay", str(tmp_path / "events.jsonl"), "--topic", "clicks")
        printed += stack.headrace("doctor")
        assert "NOT OK" not in printed
        assert "topic clicks: 4 partitions" in printed
        stack.wait_until_committed()
        assert [letter.value() for letter in stack.read_topic("clicks.dead-letter")] == [b"{not json"]
        assert httpx.get(f"{address}/v1/entities/user/u-replayed").json()["features"]["user_activity__clicks_1h"] == 1
        events = feed.events
        events["clicks"].append({**event, "t": event["occurred_at"]})
        wrong = differences(address, events)
        assert not wrong, (len(wrong), wrong[:5])
        assert PASSWORD not in printed + stack.log("stream") + stack.log("server")


def test_a_wrong_password_is_said_at_once_and_never_shown(kafka: RealKafka, tmp_path: Path) -> None:
    """By every command: not a timeout after which it could be the network. Neither password is printed."""
    wrong = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "SCRAM-SHA-256", "sasl.username": "alice"}
    with Stack(broker=kafka, shards=4) as stack:
        stack.settings = stack.settings.model_copy(
            update={"kafka": kafka.sasl_servers, "kafka_options": {**wrong, "sasl.password": "wrong-" + PASSWORD}}
        )
        (tmp_path / "events.jsonl").write_text(json.dumps(an_event(random.Random(0), 0)))
        worker = stack.start_worker("worker")
        for command in (["apply"], ["doctor"], ["replay", str(tmp_path / "events.jsonl"), "--topic", "clicks"]):
            done = subprocess.run(
                [sys.executable, "-m", "headrace", *command],
                env=stack.environment,
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            printed = done.stdout + done.stderr
            assert done.returncode == 1, printed
            assert "authentication" in printed.lower(), (command, printed)
            assert PASSWORD not in printed
        wait_for("the worker gives up", lambda: worker.poll() is not None)
        assert worker.returncode == 1
        assert "Authentication failed" in stack.log("worker")
        assert PASSWORD not in stack.log("worker")


def test_one_of_three_brokers_is_killed_and_nothing_is_missed() -> None:
    """Replication 3, of which 2 acknowledge: events flow on, and each counts once."""
    cluster = KafkaCluster()
    with Stack(broker=cluster, shards=8, replication=3, partitions=3) as stack:
        stack.start_stream(1)
        address = stack.start_server()
        feed = Feed(stack.kafka.bootstrap_servers)
        for node in cluster.nodes[:2]:
            feed.send(500)
            node.kill()
            feed.send(500)
            stack.wait_until_committed()
            node.start()
            wait_for("it is back among the replicas", lambda: all_in_sync(cluster))
        stack.wait_until_committed()
        wrong = differences(address, feed.events)
        assert not wrong, (len(wrong), wrong[:5])


def all_in_sync(cluster: KafkaCluster) -> bool:
    """Whether every partition has all its replicas."""
    topics = (
        AdminClient({"bootstrap.servers": cluster.bootstrap_servers, "log_level": 0}).list_topics(timeout=10).topics
    )
    return all(len(each.isrs) == len(each.replicas) for topic in topics.values() for each in topic.partitions.values())
