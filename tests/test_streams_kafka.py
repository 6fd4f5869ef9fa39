"""Where a partition's reader starts."""

from __future__ import annotations

import pytest

from store.commit import Position
from streams.chunk import Partition
from streams.kafka import LogLostError, Start, start_of

CLICKS = Partition("clicks", 0)


def test_it_starts_at_the_lowest_committed_offset_and_reads_from_the_horizon() -> None:
    """Duplicates are told apart from the horizon's offset on; nothing below the lowest offset is counted again."""
    #  low      horizon      behind     ahead     high
    #   0          40          70         90       100
    assert start_of(CLICKS, [Position(90, 50), Position(70, 40)], 0, 100) == Start(40, 70, None)


def test_a_shard_that_has_read_nothing_gets_everything() -> None:
    """A new kind of entity, or a crash before a shard's first commit, must not lose what others have committed.

    Taking the minimum over the shards that have a position would start at 70 and lose 0 to 69 for the third.
    """
    assert start_of(CLICKS, [Position(90, 50), Position(70, 40), None], 0, 100) == Start(0, 0, None)


def test_a_new_topic_starts_at_what_the_broker_still_has_and_nothing_is_lost() -> None:
    """Records deleted before the first read were never promised."""
    assert start_of(CLICKS, [None, None], 30, 100) == Start(30, 30, None)


def test_what_retention_took_away_is_lost_with_its_offsets() -> None:
    """Offsets 70 to 79 were not read and are no longer there."""
    assert start_of(CLICKS, [Position(90, 50), Position(70, 40)], 80, 100) == Start(80, 80, (70, 80))


def test_a_horizon_that_retention_took_away_loses_nothing() -> None:
    """Only the memory for duplicates is shorter."""
    assert start_of(CLICKS, [Position(90, 50)], 60, 100) == Start(60, 90, None)


def test_a_topic_that_ends_before_what_was_committed_is_refused() -> None:
    """Going on at its end would silently skip what is written next."""
    with pytest.raises(LogLostError, match="clicks/0 ends at offset 60, but offsets up to 90 were committed"):
        start_of(CLICKS, [Position(90, 50), Position(50, 40)], 0, 60)
