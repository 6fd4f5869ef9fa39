"""Whatever fails, whoever comes back and however often: rows are those of one undisturbed pass over the log."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from tests.simulation.sabotage import BREAKS, Break
from tests.simulation.world import simulate
from tests.support.effort import effort

SEEDS = effort(200, 1_000)
"""As many are fixed, and as many are new each time."""
SEEDS_TO_NOTICE_MAX = 400
FAULTS = (
    "Crash", "FencedError", "GapError", "apply", "broken", "forget", "kill", "late", "lost", "redelivered", "retention",
    "rollback", "stale", "start", "unanswered", "unread", "zombie",
)  # fmt: skip


def test_thousands_of_seeds() -> None:
    """Two processes: one repeats the same seeds each time, one tries new ones. A seed that fails is printed."""
    fresh = random.randrange(1 << 40)
    ranges = [f"0:{SEEDS}", f"{fresh}:{fresh + SEEDS}"]
    print("seeds", ranges)
    command = [sys.executable, "-W", "error", "-m", "tests.simulation", "--seeds"]
    runs = [subprocess.Popen([*command, each], stdout=subprocess.PIPE, text=True) for each in ranges]
    try:
        said = [run.communicate(timeout=600)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    print(*said, sep="\n")
    assert [run.returncode for run in runs] == [0, 0]
    assert [fault for fault in FAULTS if f"'{fault}'" not in said[0]] == []


def test_a_seed_repeats_itself() -> None:
    """Otherwise a failure could not be looked into."""
    for seed in range(5):
        assert simulate(seed) == simulate(seed)


@pytest.mark.parametrize("each", BREAKS, ids=lambda each: each.what)
def test_a_broken_line_is_noticed(each: Break) -> None:
    """A simulation that passes whatever the code does proves nothing."""
    with each.made():
        noticed = next(((seed, wrong) for seed in range(SEEDS_TO_NOTICE_MAX) if (wrong := simulate(seed)[0])), None)
    assert noticed
    print("noticed by seed", *noticed)
