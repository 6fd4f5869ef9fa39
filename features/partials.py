"""Partials: what a tile keeps of its events, and how two of them become one.

Every partial is a few columns with one entry a tile, each of a kind (`physical`) and with an identity (`empty`): what a
window without events holds. All are commutative and associative, so that order and batching never matter. How one is
made of an event, and how two are combined, is in `features.fold`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

Physical = Literal["count", "float", "time", "tick", "text"]
"""How the codec packs a column: unsigned integer, float64, milliseconds, 5 s tick, or index into the row's texts."""

DTYPES: dict[Physical, type[np.generic]] = {
    "count": np.int64,
    "float": np.float64,
    "time": np.int64,
    "tick": np.int64,
    "text": np.int64,
}


@dataclass(frozen=True)
class Tally:
    """How many."""

    physical: ClassVar[tuple[Physical, ...]] = ("count",)
    empty: ClassVar[tuple[float, ...]] = (0,)


@dataclass(frozen=True)
class Total:
    """The sum of the values; -0.0 for none, which adds nothing, and which no sum of 0.0 and others can be."""

    physical: ClassVar[tuple[Physical, ...]] = ("float",)
    empty: ClassVar[tuple[float, ...]] = (-0.0,)


@dataclass(frozen=True)
class Least:
    """The smallest value."""

    physical: ClassVar[tuple[Physical, ...]] = ("float",)
    empty: ClassVar[tuple[float, ...]] = (np.inf,)


@dataclass(frozen=True)
class Greatest:
    """The largest value."""

    physical: ClassVar[tuple[Physical, ...]] = ("float",)
    empty: ClassVar[tuple[float, ...]] = (-np.inf,)


@dataclass(frozen=True)
class Moments:
    """(n, mean, M2), which keep small spreads of large values."""

    physical: ClassVar[tuple[Physical, ...]] = ("count", "float", "float")
    empty: ClassVar[tuple[float, ...]] = (0, 0.0, 0.0)


@dataclass(frozen=True)
class Seen:
    """The time of the latest event; -1 for none."""

    physical: ClassVar[tuple[Physical, ...]] = ("time",)
    empty: ClassVar[tuple[float, ...]] = (-1,)


@dataclass(frozen=True)
class SeenTick:
    """The 5 s tick of the latest event: half the bytes of `Seen`, and enough to tell windows apart."""

    physical: ClassVar[tuple[Physical, ...]] = ("tick",)
    empty: ClassVar[tuple[float, ...]] = (0,)


@dataclass(frozen=True)
class LatestNumber:
    """(time, value) of the latest event; of equal times, the larger value."""

    physical: ClassVar[tuple[Physical, ...]] = ("time", "float")
    empty: ClassVar[tuple[float, ...]] = (-1, -np.inf)


@dataclass(frozen=True)
class LatestText:
    """(time, text) of the latest event; of equal times, the larger text."""

    physical: ClassVar[tuple[Physical, ...]] = ("time", "text")
    empty: ClassVar[tuple[float, ...]] = (-1, -1)


@dataclass(frozen=True)
class GreatestText:
    """The largest text."""

    physical: ClassVar[tuple[Physical, ...]] = ("text",)
    empty: ClassVar[tuple[float, ...]] = (-1,)


@dataclass(frozen=True)
class FirstSeen:
    """The time of the earliest event; -1 for none."""

    physical: ClassVar[tuple[Physical, ...]] = ("time",)
    empty: ClassVar[tuple[float, ...]] = (-1,)


@dataclass(frozen=True)
class EarliestNumber:
    """(time, value) of the earliest event; of equal times, the smaller value."""

    physical: ClassVar[tuple[Physical, ...]] = ("time", "float")
    empty: ClassVar[tuple[float, ...]] = (-1, np.inf)


@dataclass(frozen=True)
class EarliestText:
    """(time, text) of the earliest event; of equal times, the smaller text."""

    physical: ClassVar[tuple[Physical, ...]] = ("time", "text")
    empty: ClassVar[tuple[float, ...]] = (-1, -1)


@dataclass(frozen=True)
class Decay:
    """(time, amplitude): the exponentially decayed sum as it stood at the time of the latest event; -0.0 for none."""

    half_life_ms: int
    physical: ClassVar[tuple[Physical, ...]] = ("time", "float")
    empty: ClassVar[tuple[float, ...]] = (-1, -0.0)


Earliest = FirstSeen | EarliestNumber | EarliestText
AnyPartial = (
    Tally
    | Total
    | Least
    | Greatest
    | GreatestText
    | Moments
    | Seen
    | SeenTick
    | LatestNumber
    | LatestText
    | Decay
    | Earliest
)


def any_event(partial: AnyPartial, totals: NDArray[np.float64]) -> NDArray[np.bool_]:
    """bool[…]: whether a partial is of any event, by its last column's totals."""
    found = np.ones(totals.shape, bool)  # Of other partials, the number is null without events.
    if isinstance(partial, Tally):
        found = totals != 0
    elif isinstance(partial, Total | Decay):
        found = (totals != 0) | ~np.signbit(totals)
    return found
