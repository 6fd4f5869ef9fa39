"""The Kafka that other integration tests stand on keeps what it acknowledged."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, Consumer, TopicPartition
from kafka import KafkaProducer
from kafka.admin import KafkaAdminClient, NewTopic

if TYPE_CHECKING:
    from confluent_kafka import Message

    from tests.support.kafka import RealKafka

DEADLINE_S = 60
TOPIC = "test-real-kafka"


def read(bootstrap_servers: str, n: int) -> list[Message]:
    """Read the first `n` records of the one partition."""
    consumer = Consumer({"bootstrap.servers": bootstrap_servers, "group.id": "unused"})
    try:
        consumer.assign([TopicPartition(TOPIC, 0, 0)])
        return consumer.consume(n, timeout=DEADLINE_S)
    finally:
        consumer.close()


def test_acknowledged_records_survive_a_kill(real_kafka: RealKafka) -> None:
    """They also bear the broker's time, not the producer's, as `LogAppendTime` says."""
    address = real_kafka.bootstrap_servers
    admin = KafkaAdminClient(bootstrap_servers=address)
    topic = NewTopic(TOPIC, 1, 1, topic_configs={"message.timestamp.type": "LogAppendTime"})
    admin.create_topics([topic], timeout_ms=DEADLINE_S * 1000)
    admin.close()

    before_ms = time.time_ns() // 1_000_000
    producer = KafkaProducer(bootstrap_servers=address, acks="all")
    sent = [producer.send(TOPIC, b"%d" % i, timestamp_ms=i) for i in range(3)]
    assert [future.get(timeout=DEADLINE_S).offset for future in sent] == [0, 1, 2]
    producer.close()

    first = read(address, 3)
    real_kafka.kill()
    real_kafka.start()
    assert real_kafka.bootstrap_servers == address
    again = read(address, 3)

    assert [m.value() for m in again] == [b"0", b"1", b"2"]
    assert [m.timestamp() for m in again] == [m.timestamp() for m in first]
    for message in again:
        kind, at_ms = message.timestamp()
        assert kind == TIMESTAMP_LOG_APPEND_TIME
        assert at_ms >= before_ms
