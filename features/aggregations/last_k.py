"""Latest distinct values of a field."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from features.aggregations.base import Aggregation, Slot, SlotTotals, Table
from features.partials import Seen
from features.times import ALL, TICK_MS, Window
from features.values import Type, Values


class LastK(Aggregation, frozen=True, kw_only=True, tag="last_k"):
    """The k latest distinct values of a text field, newest first; of equal times the larger text is the later.

    Always exact: a value that fell out of the k latest can only come back with an event of its own.

    >>> from features.aggregations.worked import worked
    >>> recent = LastK(name="recent", event="Click", field="item_id", k=2)
    >>> ids = {"00:00": "a", "00:01": "b", "00:02": "a", "00:03": "c"}
    >>> clicks = {time: {"item_id": item_id} for time, item_id in ids.items()}
    >>> worked(recent, clicks, at="00:45")
    ['c', 'a']
    """

    k: int

    @property
    def value_type(self) -> Type:
        """See `Aggregation.value_type`."""
        return "list[str]"

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        table = Table(self.name, (Window.parse(ALL),), starts=False, by=self.field, bucket="text", bound=self.k)
        return (Slot(table, Seen(), self.measure),)

    def values(self, slots: tuple[SlotTotals, ...], now_ms: NDArray[np.int64]) -> Sequence[Values]:
        """See `Aggregation.values`."""
        begins_ms = np.ascontiguousarray(self.tails(now_ms).T) * TICK_MS
        return [slots[0].ranked(0, begin_ms, self.k, ties=1) for begin_ms in begins_ms]
