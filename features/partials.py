"""Partials: what a tile keeps of its events, and how two of them become one.

Every partial is a few numpy columns with one entry a tile. All are commutative and associative, so that order and
batching never matter. `combine` reduces sorted groups of entries at once; it is the only arithmetic on state, shared
by merge (tiles that meet) and evaluate (tiles of a window).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from features.times import TICK_MS

Column = NDArray[Any]
Columns = tuple[Column, ...]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

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
class Groups:
    """Runs of equal keys in sorted entries: `starts` holds the index of each run's first entry."""

    starts: NDArray[np.intp]
    entries: int

    @cached_property
    def ids(self) -> NDArray[np.intp]:
        """intp[entries]: the group of each entry."""
        return np.repeat(np.arange(len(self.starts)), np.diff(self.starts, append=self.entries))


class Partial(Protocol):
    """One kind of partial aggregate."""

    physical: ClassVar[tuple[Physical, ...]]
    empty: ClassVar[tuple[float, ...]]

    def of(self, times_ms: Ints, values: Column) -> Columns:
        """The partial of each single event: `values` is float64[n], or text codes int64[n], never null."""
        ...

    def combine(self, columns: Columns, groups: Groups) -> Columns:
        """One partial a group."""
        ...


@dataclass(frozen=True)
class Tally:
    """How many."""

    physical: ClassVar[tuple[Physical, ...]] = ("count",)
    empty: ClassVar[tuple[float, ...]] = (0,)

    def of(self, times_ms: Ints, values: Column) -> Columns:
        """See `Partial.of`."""
        return (np.ones(len(times_ms), np.int64),)

    def combine(self, columns: Columns, groups: Groups) -> Columns:
        """See `Partial.combine`."""
        return (np.add.reduceat(columns[0], groups.starts),)


@dataclass(frozen=True)
class Total:
    """The sum of the values."""

    physical: ClassVar[tuple[Physical, ...]] = ("float",)
    empty: ClassVar[tuple[float, ...]] = (0.0,)

    def of(self, times_ms: Ints, values: Column) -> Columns:
        """See `Partial.of`."""
        return (values.astype(np.float64),)

    def combine(self, columns: Columns, groups: Groups) -> Columns:
        """See `Partial.combine`."""
        return (np.add.reduceat(columns[0], groups.starts),)


@dataclass(frozen=True)
class Least:
    """The smallest value."""

    physical: ClassVar[tuple[Physical, ...]] = ("float",)
    empty: ClassVar[tuple[float, ...]] = (np.inf,)

    def of(self, times_ms: Ints, values: Column) -> Columns:
        """See `Partial.of`."""
        return (values.astype(np.float64),)

    def combine(self, columns: Columns, groups: Groups) -> Columns:
        """See `Partial.combine`."""
        return (np.minimum.reduceat(columns[0], groups.starts),)


@dataclass(frozen=True)
class Greatest:
    """The largest value."""

    physical: ClassVar[tuple[Physical, ...]] = ("float",)
    empty: ClassVar[tuple[float, ...]] = (-np.inf,)

    def of(self, times_ms: Ints, values: Column) -> Columns:
        """See `Partial.of`."""
        return (values.astype(np.float64),)

    def combine(self, columns: Columns, groups: Groups) -> Columns:
        """See `Partial.combine`."""
        return (np.maximum.reduceat(columns[0], groups.starts),)


@dataclass(frozen=True)
class Moments:
    """(n, mean, M2): combined pairwise as Chan, Golub and LeVeque (1979) do: it keeps small spreads of large values."""

    physical: ClassVar[tuple[Physical, ...]] = ("count", "float", "float")
    empty: ClassVar[tuple[float, ...]] = (0, 0.0, 0.0)

    def of(self, times_ms: Ints, values: Column) -> Columns:
        """See `Partial.of`."""
        return np.ones(len(values), np.int64), values.astype(np.float64), np.zeros(len(values))

    def combine(self, columns: Columns, groups: Groups) -> Columns:
        """See `Partial.combine`."""
        n, mean, m2 = columns
        total = np.add.reduceat(n, groups.starts)
        # Means are averaged about the group's first one, so that equal values give exactly their own mean.
        pivot = np.maximum.reduceat(np.where(n > 0, mean, -np.inf), groups.starts)
        pivot[total == 0] = 0.0
        offset = np.where(n > 0, mean - pivot[groups.ids], 0.0)
        shift = np.add.reduceat(n * offset, groups.starts) / np.maximum(total, 1)
        spread = m2 + n * (offset - shift[groups.ids]) ** 2
        return total, pivot + shift, np.add.reduceat(spread, groups.starts)


@dataclass(frozen=True)
class Seen:
    """The time of the latest event; -1 for none."""

    physical: ClassVar[tuple[Physical, ...]] = ("time",)
    empty: ClassVar[tuple[float, ...]] = (-1,)

    def of(self, times_ms: Ints, values: Column) -> Columns:
        """See `Partial.of`."""
        return (times_ms,)

    def combine(self, columns: Columns, groups: Groups) -> Columns:
        """See `Partial.combine`."""
        return (np.maximum.reduceat(columns[0], groups.starts),)


@dataclass(frozen=True)
class SeenTick:
    """The 5 s tick of the latest event: half the bytes of `Seen`, and enough to tell windows apart."""

    physical: ClassVar[tuple[Physical, ...]] = ("tick",)
    empty: ClassVar[tuple[float, ...]] = (0,)

    def of(self, times_ms: Ints, values: Column) -> Columns:
        """See `Partial.of`."""
        return (times_ms // TICK_MS,)

    def combine(self, columns: Columns, groups: Groups) -> Columns:
        """See `Partial.combine`."""
        return (np.maximum.reduceat(columns[0], groups.starts),)


@dataclass(frozen=True)
class LatestNumber:
    """(time, value) of the latest event; of equal times, the larger value."""

    physical: ClassVar[tuple[Physical, ...]] = ("time", "float")
    empty: ClassVar[tuple[float, ...]] = (-1, -np.inf)

    def of(self, times_ms: Ints, values: Column) -> Columns:
        """See `Partial.of`."""
        return times_ms, values.astype(np.float64)

    def combine(self, columns: Columns, groups: Groups) -> Columns:
        """See `Partial.combine`."""
        times_ms, values = columns
        latest = np.maximum.reduceat(times_ms, groups.starts)
        newest = np.where(times_ms == latest[groups.ids], values, self.empty[1])
        return latest, np.maximum.reduceat(newest, groups.starts)


@dataclass(frozen=True)
class LatestText:
    """(time, text) of the latest event; of equal times, the larger text."""

    physical: ClassVar[tuple[Physical, ...]] = ("time", "text")
    empty: ClassVar[tuple[float, ...]] = (-1, -1)

    def of(self, times_ms: Ints, values: Column) -> Columns:
        """See `Partial.of`."""
        return times_ms, values

    def combine(self, columns: Columns, groups: Groups) -> Columns:
        """See `Partial.combine`."""
        times_ms, codes = columns
        latest = np.maximum.reduceat(times_ms, groups.starts)
        return latest, np.maximum.reduceat(np.where(times_ms == latest[groups.ids], codes, -1), groups.starts)


@dataclass(frozen=True)
class Decay:
    """(time, amplitude): the exponentially decayed sum as it stood at the time of the latest event."""

    half_life_ms: int
    physical: ClassVar[tuple[Physical, ...]] = ("time", "float")
    empty: ClassVar[tuple[float, ...]] = (-1, 0.0)

    def of(self, times_ms: Ints, values: Column) -> Columns:
        """See `Partial.of`."""
        return times_ms, values.astype(np.float64)

    def combine(self, columns: Columns, groups: Groups) -> Columns:
        """See `Partial.combine`."""
        times_ms, amplitude = columns
        latest = np.maximum.reduceat(times_ms, groups.starts)
        aged = amplitude * np.exp2((times_ms - latest[groups.ids]) / self.half_life_ms)
        return latest, np.add.reduceat(aged, groups.starts)

    def at(self, columns: Columns, now_ms: int) -> Floats:
        """The decayed sums at `now_ms`."""
        times_ms, amplitude = columns
        aged: Floats = amplitude * np.exp2((times_ms - now_ms) / self.half_life_ms)
        return aged


AnyPartial = Tally | Total | Least | Greatest | Moments | Seen | SeenTick | LatestNumber | LatestText | Decay
