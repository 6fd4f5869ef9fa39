"""The peers of the stream benchmark count right: a peer that is wrong would prove nothing."""

from __future__ import annotations

import random
from typing import Any

import pytest

from benchmarks.stream_peers import MINUTES, Tiles
from benchmarks.traffic import TOPICS


def counted(seen: list[tuple[int, int]]) -> dict[str, int]:
    """The counts by definition: the end of the windows is the latest event."""
    now = max(minute for _, minute in seen)
    return {
        f"{topic}_{window}": sum(kind == number and minute >= (now - width) // hop * hop for kind, minute in seen)
        for window, (width, hop) in MINUTES.items()
        for number, topic in enumerate(TOPICS)
    }


def pairs(fields: tuple[Any, ...]) -> dict[str, int]:
    return dict(zip(fields[::2], fields[1::2], strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_minute_tiles_count_what_windows_hold(seed: int) -> None:
    """Whatever order events come in, in batches of any size; late by up to a day, over three weeks."""
    rng = random.Random(seed)
    tiles, seen, minute = Tiles(), [], 29_000_000
    for _ in range(300):
        batch = []
        for _ in range(rng.randint(1, 5)):
            minute += rng.choice([0, 0, 1, 3, 20, 90, 400])
            batch.append((rng.randrange(len(TOPICS)), minute - rng.choice([0, 0, 0, 2, 45, 1000])))
        seen += batch
        ((fields,), _) = tiles.on_batch(batch)
        assert pairs(fields) == counted(seen), f"seed {seed}"
