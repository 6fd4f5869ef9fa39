"""What every aggregation declares, and what it asks of the kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, Protocol

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.expressions import AnyCondition
from features.fold import tails_at
from features.formulas import Formula
from features.partials import AnyPartial
from features.times import ALL, Window, hop_ms
from features.values import Lists, Type, Values

DEFAULT_BUCKETS = 64


@dataclass(frozen=True)
class Measure:
    """Which events count, and what of each: those of a contract where the condition holds and the field isn't null."""

    event: str
    field: str | None = None
    where: AnyCondition | None = None
    origin: str = ""
    """See `Aggregation.origin`."""


@dataclass(frozen=True)
class Table:
    """Entries of one shape in a row; aggregations that agree on all of this share them.

    An entry's key is its row, bucket and start, as far as the table has them: `bucket` is None, a text, a 64-bit hash
    of the field's value (or of those of several, `+` between their names), a sketch cell, the logarithmic cell of a
    number, or a hash of the event: its time and fields. `starts` says that entries are tiles, which age. A row keeps
    `bound` buckets, those seen latest.
    """

    row: str
    windows: tuple[Window, ...]
    starts: bool
    by: str | None = None
    bucket: Literal["text", "hash", "cell", "log", "event"] | None = None
    bound: int | None = None
    only: tuple[Measure, ...] = ()
    """With a bound, the events that its buckets are of: no other feature's can push them out."""


@dataclass(frozen=True)
class Slot:
    """One partial of an aggregation: where it is kept and what goes in."""

    table: Table
    partial: AnyPartial
    measure: Measure


class SlotTotals(Protocol):
    """A slot's state for many rows, as the kernel hands it to `Aggregation.values`.

    Its unit is the group: a row, or a (row, bucket) pair of a table with buckets.
    """

    @property
    def n_rows(self) -> int:
        """How many rows there are."""
        ...

    @property
    def rows(self) -> NDArray[np.intp]:
        """intp[groups]: each group's row, ascending."""
        ...

    @property
    def buckets(self) -> NDArray[Any]:
        """[groups]: each group's bucket: a text's code, a hash or a cell."""
        ...

    @property
    def texts(self) -> pa.StringArray:
        """What codes stand for."""
        ...

    @property
    def totals(self) -> NDArray[np.float64]:
        """float64[columns, windows, groups]: each group's partial over each window of the table, shortest first.

        A table without starts has one for all windows.
        """
        ...

    def ranked(self, window: int, least: NDArray[np.int64], k: int, *, ties: Literal[1, -1]) -> Lists:
        """Up to k texts of each row, those of the largest totals over a window, largest first: of the first column.

        Smaller totals than `least` (int64[1 or n_rows]) are left out; of equal ones, the larger text comes first, or
        with -1 the smaller.
        """
        ...

    def once(self, make: Callable[[], NDArray[np.int64]]) -> NDArray[np.int64]:
        """What is made of this slot and those beside it, made once for all features that have them."""
        ...


class Aggregation(msgspec.Struct, frozen=True, kw_only=True, tag_field="is", omit_defaults=True):
    """A declared aggregation, as plain data: what the plan keeps and the kernel runs."""

    formula: ClassVar[Formula | None] = None
    """How its number follows from its partials; None where it is no number, or takes more than a formula."""
    nothing: ClassVar[float] = 0.0
    """The number for no events; NaN reads as null."""

    name: str
    event: str
    field: str | None = None
    where: AnyCondition | None = None
    over: tuple[str, ...] = ()
    by: str | None = None
    buckets: int | None = None
    default: float | str | None = None
    doc: str = ""
    origin: str = ""
    """The plan with which its state began, if that was not the first: see `features.evolve.succeed`."""

    @property
    def without_events(self) -> float:
        """What a bucket that is not there stands for."""
        return self.nothing if self.default is None else float(self.default)

    @property
    def windows(self) -> tuple[Window, ...]:
        """Declared windows, shortest first; `all` where none is declared."""
        return _windows(self.over or (ALL,))

    def reach(self, window: Window) -> Window:
        """The window whose events its number over `window` takes: that one itself, unless it looks further back."""
        return window

    @property
    def measure(self) -> Measure:
        """The events that it is about."""
        return Measure(self.event, self.field, self.where, self.origin)

    @property
    def measures(self) -> tuple[Measure, ...]:
        """All events that it reads."""
        return tuple(dict.fromkeys(slot.measure for slot in self.slots()))

    @property
    def value_type(self) -> Type:
        """The type of its features."""
        return "map[str, float]" if self.by else "float"

    def tiles(self, by: str | None = None) -> Table:
        """The windowed table that the aggregation shares with others of the same windows (and buckets)."""
        windows, by = self.windows, by or self.by
        starts = not windows[0].unbounded
        if by is None:
            return Table("", windows, starts)
        return Table("", windows, starts, by, "text", self.buckets, self.counted)

    @property
    def counted(self) -> tuple[Measure, ...]:
        """Which events it is about, whatever it takes of them."""
        return (Measure(self.event, None, self.where),)

    def slots(self) -> tuple[Slot, ...]:
        """The partials that it keeps."""
        raise NotImplementedError

    @property
    def constants(self) -> tuple[float, float, float]:
        """The constants p, q and r of its formula."""
        return 0.0, 0.0, 0.0

    def values(self, slots: tuple[SlotTotals, ...], now_ms: NDArray[np.int64]) -> Sequence[Values]:
        """The feature over each of its windows, shortest first, for all rows: of one that has no formula.

        `now_ms` is int64[1 or n_rows]: one time for all rows, or each row's own.
        """
        raise NotImplementedError

    def tails(self, now_ms: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64[times, windows]: the first tick inside each of its windows."""
        tails: NDArray[np.int64] = tails_at(np.array([(w.width_ms, hop_ms(w.width_ms)) for w in self.windows]), now_ms)
        return tails


@cache
def _windows(over: tuple[str, ...]) -> tuple[Window, ...]:
    return tuple(sorted(Window.parse(name) for name in over))


LATEST = Table(row="", windows=(Window.parse(ALL),), starts=False)
"""Where partials without a window live: one entry a row."""
