"""Most frequent values of a field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from features.aggregations.base import Aggregation, Slot, SlotTotals
from features.partials import Tally
from features.values import Type, Values

_ONCE: Final = np.ones(1, np.int64)


class TopK(Aggregation, frozen=True, kw_only=True, tag="top_k"):
    """The k most frequent values of a text field in a window, ties by value, ascending.

    A row keeps the counts of `buckets` values, those seen latest; up to as many distinct ones it is exact.

    >>> from features.aggregations.worked import worked
    >>> top = TopK(name="top", event="Click", field="brand", k=1, over=("1h",), buckets=8)
    >>> worked(top, {"00:00": {"brand": "b"}, "00:10": {"brand": "a"}, "00:20": {"brand": "b"}}, at="00:45")
    ['b']
    """

    k: int

    @property
    def value_type(self) -> Type:
        """See `Aggregation.value_type`."""
        return "list[str]"

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(by=self.field), Tally(), self.measure),)

    def values(self, slots: tuple[SlotTotals, ...], now_ms: NDArray[np.int64]) -> Sequence[Values]:
        """See `Aggregation.values`."""
        return [slots[0].ranked(window, _ONCE, self.k, ties=-1) for window in range(len(self.windows))]
