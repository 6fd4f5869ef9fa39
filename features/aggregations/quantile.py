"""Quantile of a field over a window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from features.aggregations.base import Aggregation, Slot, SlotTotals, Table
from features.partials import Tally
from features.quantiles import NUMBERS
from features.values import Values


class Quantile(Aggregation, frozen=True, kw_only=True, tag="quantile"):
    """The value at rank floor(q * (n - 1)) of the n values of a numeric field, within 1 % of itself; null for none.

    Tiles count their values by logarithmic cells, see `features.quantiles`. So the answer is the same in any order and
    batches; and all quantiles of a field share the counts.

    >>> from features.aggregations.worked import worked
    >>> median = Quantile(name="median", event="Click", field="price", q=0.5, over=("1h",))
    >>> worked(median, {"00:00": {"price": 5.0}, "00:10": {"price": 0.0}, "00:30": {"price": 200.0}}, at="00:45")
    5.021346665894205
    """

    nothing: ClassVar[float] = float("nan")

    q: float

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        starts = not self.windows[0].unbounded
        # No name of an aggregation has a dot.
        table = Table(f"{self.field}.quantiles", self.windows, starts, by=self.field, bucket="log")
        return (Slot(table, Tally(), self.measure),)

    def values(self, slots: tuple[SlotTotals, ...], now_ms: NDArray[np.int64]) -> Sequence[Values]:
        """See `Aggregation.values`."""
        (counted,) = slots
        found = []
        for counts in counted.totals[0]:
            n = np.bincount(counted.rows, counts, counted.n_rows)
            # Cells are in order in each row: the first one up to which there are more values than the rank.
            ends, there = np.cumsum(counts), n > 0
            rank = (np.cumsum(n) - n + np.floor(self.q * (n - 1)))[there]
            numbers = np.full(counted.n_rows, np.nan)
            # Of changed bytes, whose counts are beyond all measure, any will do.
            at = np.minimum(np.searchsorted(ends, rank, side="right"), len(ends) - 1)
            numbers[there] = NUMBERS[counted.buckets[at]]
            found.append(numbers)
        return found
