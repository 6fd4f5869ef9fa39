"""A topic that is deleted and made anew under its name is another topic, however long it is."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from tests.support.feed import Feed, differences
from tests.support.kafka import RealKafka
from tests.support.stack import Stack, wait_for

pytestmark = pytest.mark.kafka

OLD = 30
LENGTHS = {"shorter": 10, "as long": OLD, "longer": 63}


@pytest.fixture(scope="module")
def kafka() -> Iterator[RealKafka]:
    with RealKafka() as server:
        yield server


def has_noticed(stack: Stack, since: int = 0) -> bool:
    return "headrace accept-topic clicks" in stack.log("stream")[since:]


def stopped(stream: subprocess.Popen[bytes]) -> int:
    stream.terminate()
    return stream.wait(120)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("running", [True, False], ids=["while it runs", "while it is down"])
def test_a_topic_made_anew_is_read_from_its_start_once_it_is_accepted(
    kafka: RealKafka, length: str, running: bool
) -> None:
    """The stream stops, saying which command goes on; then all events of the old topic and of the new one count once.

    A stream that looks at offsets alone goes on with the new topic at the old one's offset, and leaves out what comes
    before; one that looks at ids only now and then does so until then.
    """
    with Stack(broker=kafka, partitions=1, shards=4, lanes=2) as stack:
        stream = stack.start_stream(1)
        address = stack.start_server()
        feed = Feed(kafka.bootstrap_servers)
        feed.send(OLD)
        feed.send(20, "likes")
        stack.wait_until_committed()
        if not running:
            assert stopped(stream) == 0
        stack.make_anew("clicks")
        feed.made_anew("clicks")
        feed.send(LENGTHS[length])
        if not running:
            stream = stack.start_stream(1)
        wait_for("it is noticed", lambda: has_noticed(stack))
        feed.send(40, "likes")
        assert "is read from its beginning: 12 shards" in stack.headrace("accept-topic", "clicks")
        assert "there was nothing to do" in stack.headrace("accept-topic", "clicks")
        if stream.poll() is not None:  # After so many failures it has given up.
            stack.start_stream(1)
        stack.wait_until_committed()
        feed.send(10)
        stack.wait_until_committed()
        wrong = differences(address, feed.events)
        assert not wrong, (len(wrong), wrong[:5])


def test_a_broker_that_starts_again_has_the_topics_that_it_had(kafka: RealKafka) -> None:
    """Then nothing is to be accepted, neither while the stream runs nor when it starts."""
    with Stack(broker=kafka, partitions=1, shards=4, lanes=2) as stack:
        stream = stack.start_stream(1)
        address = stack.start_server()
        feed = Feed(kafka.bootstrap_servers)
        feed.send(OLD)
        stack.wait_until_committed()
        kafka.kill()
        kafka.start()
        feed.send(OLD)
        stack.wait_until_committed()
        assert stopped(stream) == 0
        kafka.kill()
        kafka.start()
        stack.start_stream(1)
        feed.send(OLD)
        stack.wait_until_committed()
        assert not has_noticed(stack)
        assert "there was nothing to do" in stack.headrace("accept-topic", "clicks")
        wrong = differences(address, feed.events)
        assert not wrong, (len(wrong), wrong[:5])
