"""`headrace doctor` on a real Kafka: what is wrong though everything is up."""

from __future__ import annotations

import subprocess
import sys

import pytest
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # where they are documented
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
)

from headrace import doctor
from tests.integration.test_topics_made_anew import stopped
from tests.support.feed import Feed
from tests.support.kafka import RealKafka
from tests.support.stack import Stack

pytestmark = pytest.mark.kafka


def configure(kafka: RealKafka, topic: str, name: str, value: str) -> None:
    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[entry])
    client = AdminClient({"bootstrap.servers": kafka.bootstrap_servers, "log_level": 0})
    for done in client.incremental_alter_configs([resource]).values():
        done.result()


def examined(stack: Stack) -> dict[str, tuple[bool | None, str]]:
    return {check.what: (check.good, check.found) for check in doctor.examine(stack.settings)}


def test_the_doctor_finds_what_is_wrong_though_everything_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records that are refused, a stream that is down, a topic with producers' times or made anew: all of it was ok."""
    with Stack(partitions=2, shards=4, lanes=2) as stack:
        stream = stack.start_stream(1)
        feed = Feed(stack.kafka.bootstrap_servers)
        feed.send(20)
        stack.wait_until_committed()
        assert [(what, found) for what, found in examined(stack).items() if not found[0]] == []

        stack.produce([("clicks", "u1", b"{not json")])
        stack.wait_until_committed()
        good, found = examined(stack)["dead letters of clicks"]
        assert good is None
        assert found.startswith("1 in the last hour, in which 21 records came: the reason of each is in its headers")
        stack.produce([("clicks", "u1", b"{not json")] * 5)
        stack.wait_until_committed()
        assert examined(stack)["dead letters of clicks"][0] is False
        assert examined(stack)["lag of clicks"] == (True, "0 records")

        configure(stack.kafka, "likes", "message.timestamp.type", "CreateTime")
        assert examined(stack)["topic likes"][0] is None
        assert "set LogAppendTime" in examined(stack)["topic likes"][1]
        configure(stack.kafka, "likes", "cleanup.policy", "compact")
        assert examined(stack)["topic likes"][0] is False
        assert "set delete" in examined(stack)["topic likes"][1]

        assert stopped(stream) == 0
        feed.send(7)
        good, found = examined(stack)["lag of clicks"]
        assert (good, found) == (True, "7 records")  # It may be on its way.
        monkeypatch.setattr(doctor, "_BEHIND_S", 0)
        good, found = examined(stack)["lag of clicks"]
        assert good is False
        assert found.startswith("7 records came more than 0 s ago")

        stack.make_anew("clicks")
        done = subprocess.run(
            [sys.executable, "-m", "headrace", "doctor"],
            env=stack.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1
        assert "NOT OK topic clicks: topic clicks was made anew" in " ".join(done.stdout.split())
        assert "headrace accept-topic clicks" in " ".join(done.stdout.split())
