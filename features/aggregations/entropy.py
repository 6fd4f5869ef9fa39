"""How evenly events are spread over the values of a field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from features.aggregations.base import Aggregation, Slot, SlotTotals
from features.partials import Tally
from features.values import Values


class Entropy(Aggregation, frozen=True, kw_only=True, tag="entropy"):
    """Shannon's entropy of a text field's values in a window, in nats: 0 of one value, ln n of n as frequent ones.

    Null for no events. A row keeps the counts of `buckets` values, as `top_k` does, and shares them with it.

    >>> from features.aggregations.worked import worked
    >>> variety = Entropy(name="variety", event="Click", field="brand", over=("1h",), buckets=8)
    >>> worked(variety, {"00:00": {"brand": "b"}, "00:10": {"brand": "a"}}, at="00:45")
    0.6931471805599453
    """

    nothing: ClassVar[float] = float("nan")

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(by=self.field), Tally(), self.measure),)

    def values(self, slots: tuple[SlotTotals, ...], now_ms: NDArray[np.int64]) -> Sequence[Values]:
        """See `Aggregation.values`."""
        (counted,) = slots
        found = []
        for counts in counted.totals[0]:
            rows, there = counted.rows[counts > 0], counts[counts > 0]
            n = np.bincount(rows, there, counted.n_rows)
            share = there / n[rows]
            entropy = np.bincount(rows, -share * np.log(share), counted.n_rows) + 0.0
            found.append(np.where(n > 0, entropy, np.nan))
        return found
