"""Durations, the hop ladder and windows: the window rule in one place.

All times are integer milliseconds since the Unix epoch, UTC. State keeps them in *ticks* of 5 s, the finest hop, as
every tile starts on a multiple of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Final

TICK_MS: Final = 5_000
LADDER_MS: Final = (TICK_MS, 30_000, 60_000, 300_000, 3_600_000, 21_600_000, 86_400_000)
MINUTE_MS: Final = 60_000
DAY_MS: Final = 86_400_000
WINDOW_MS_MAX: Final = 90 * DAY_MS
ALL: Final = "all"
FOREVER: Final = 1 << 62
"""A hop in ticks that rounds every start down to 0: the single tile of `all`."""

_UNITS_MS: Final = {"s": 1_000, "m": MINUTE_MS, "h": 3_600_000, "d": DAY_MS}


def duration_ms(text: str) -> int:
    """Milliseconds of a duration such as `30m`, `24h` or `7d`.

    Raises:
        ValueError: if the text is not a positive whole number followed by s, m, h or d.

    >>> duration_ms("30m")
    1800000
    """
    match = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)
    if match is None:
        msg = f"{text!r} is not a duration: write a whole number and a unit, such as '90s', '30m', '24h' or '7d'"
        raise ValueError(msg)
    return int(match[1]) * _UNITS_MS[match[2]]


def hop_ms(window_ms: int) -> int:
    """The largest step of the ladder that is at most a tenth of the window.

    >>> [hop_ms(duration_ms(w)) // 1000 for w in ("1m", "10m", "1h", "24h", "7d", "30d")]
    [5, 60, 300, 3600, 21600, 86400]
    """
    return max(step for step in LADDER_MS if step * 10 <= window_ms)


def tail_ticks(now_ms: int, width_ms: int, step_ms: int) -> int:
    """The first tick inside a window at `now_ms`: floor((q - w) / hop) * hop; 0 of one that has no beginning.

    The window rule itself; loops call it compiled, as `features.fold.tail_of`.
    """
    return max(0, (now_ms - width_ms) // step_ms * (step_ms // TICK_MS))


@dataclass(frozen=True, order=True)
class Window:
    """A declared window: a width in milliseconds (`FOREVER` for `all`) and the name that features carry.

    One that is declared by another, as what `delta` compares with, moves by that one's step, which is in its name.
    """

    width_ms: int
    name: str
    step_ms: int = field(default=0, repr=False)
    """The step by which its start moves, if that is not the one of its width."""

    @classmethod
    def parse(cls, name: str) -> Window:
        """The window called `name`: `1m` to `90d`, or `all`.

        Raises:
            ValueError: if the name is no duration, or one out of range.
        """
        if name == ALL:
            return cls(FOREVER, ALL)
        width_ms = duration_ms(name)
        if not MINUTE_MS <= width_ms <= WINDOW_MS_MAX:
            msg = f"window {name!r} is out of range: use 1m to 90d, or 'all'"
            raise ValueError(msg)
        return cls(width_ms, name)

    @property
    def unbounded(self) -> bool:
        """Whether this is `all`."""
        return self.width_ms == FOREVER

    @classmethod
    def stepping(cls, width_ms: int, step_ms: int) -> Window:
        """A window whose start moves by a step that is not the one of its width."""
        return cls(width_ms, f"{width_ms // 1000}s/{step_ms // 1000}s", step_ms)

    @property
    def hop_ms(self) -> int:
        """The step by which the window's start moves."""
        return self.step_ms or hop_ms(self.width_ms)

    @property
    def hop_ticks(self) -> int:
        """As `hop_ms`, in ticks."""
        return FOREVER if self.unbounded else self.hop_ms // TICK_MS

    def tail_ticks(self, now_ms: int) -> int:
        """The first tick inside the window at `now_ms`: see the function of this name."""
        return tail_ticks(now_ms, self.width_ms, self.hop_ms)
