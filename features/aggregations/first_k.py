"""Earliest distinct values of a field."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from features.aggregations.base import Aggregation, Slot, SlotTotals, Table
from features.partials import FirstSeen
from features.times import ALL, Window
from features.values import Lists, Type, Values


class FirstK(Aggregation, frozen=True, kw_only=True, tag="first_k"):
    """The k earliest distinct values of a text field, oldest first; of equal times the smaller text is the earlier.

    Always exact: times of kept values only fall, so a value that fell out can only come back with an event of its own.
    There are no windows: what is first in one may be any event.

    >>> from features.aggregations.worked import worked
    >>> met = FirstK(name="met", event="Click", field="item_id", k=2)
    >>> ids = {"00:03": "c", "00:02": "a", "00:01": "b", "00:00": "a"}
    >>> worked(met, {time: {"item_id": item_id} for time, item_id in ids.items()}, at="00:45")
    ['a', 'b']
    """

    k: int

    @property
    def value_type(self) -> Type:
        """See `Aggregation.value_type`."""
        return "list[str]"

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        table = Table(self.name, (Window.parse(ALL),), starts=False, by=self.field, bucket="text", bound=self.k)
        return (Slot(table, FirstSeen(), self.measure),)

    def values(self, slots: tuple[SlotTotals, ...], now_ms: NDArray[np.int64]) -> Sequence[Values]:
        """See `Aggregation.values`."""
        (kept,) = slots
        order = np.lexsort((kept.buckets, kept.totals[0, 0], kept.rows))
        return [Lists(kept.rows[order], kept.n_rows, kept.buckets[order], kept.texts)]
