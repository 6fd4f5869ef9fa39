"""Distinct values of a field over a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from features import sketch
from features.aggregations.base import Aggregation, Measure, Slot, SlotTotals, Table
from features.partials import SeenTick
from features.values import Type, Values

EXACT_MAX: Final = 64


class Distinct(Aggregation, frozen=True, kw_only=True, tag="distinct"):
    """How many distinct values: exact up to 64 in a window, above that by a sketch with a standard error under 5 %.

    The row keeps the hashes of the 65 values seen latest, each with the time when it was. Windows all end now, so a
    window that holds 64 values or fewer holds only some of these. What falls out of the 65 goes into one sketch
    with a time in each cell, from which every window reads its own estimate: see `features.sketch`. Values may be of
    several fields together (`item_id+size`), where all of them are known.

    >>> from features.aggregations.worked import worked
    >>> viewers = Distinct(name="viewers", event="Click", field="user_id", over=("1h",))
    >>> worked(viewers, {"00:00": {"user_id": "a"}, "00:10": {"user_id": "b"}, "00:20": {"user_id": "a"}}, at="00:45")
    2
    """

    @property
    def value_type(self) -> Type:
        """See `Aggregation.value_type`."""
        return "int"

    @property
    def measure(self) -> Measure:
        """See `Aggregation.measure`."""
        # Of several fields none says by itself which events count: that is for the buckets.
        several = "+" in str(self.field)
        return Measure(self.event, None if several else self.field, self.where, self.origin)

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        exact = Table(self.name, self.windows, starts=False, by=self.field, bucket="hash", bound=EXACT_MAX + 1)
        cells = Table(self.name, self.windows, starts=False, by=self.field, bucket="cell")
        return Slot(exact, SeenTick(), self.measure), Slot(cells, SeenTick(), self.measure)

    def values(self, slots: tuple[SlotTotals, ...], now_ms: NDArray[np.int64]) -> Sequence[Values]:
        """See `Aggregation.values`."""
        exact, cells = slots
        kept = (exact.rows, exact.totals[0, 0], exact.buckets)
        spilled = (cells.rows, cells.totals[0, 0], cells.buckets)
        return list(sketch.counts(*kept, *spilled, self.tails(now_ms), EXACT_MAX, exact.n_rows))
