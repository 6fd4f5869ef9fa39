"""Latest value of a field."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from features.aggregations.base import LATEST, Aggregation, Part, Slot, null_if
from features.partials import LatestNumber, LatestText
from features.times import TICK_MS, Window
from features.values import Texts, Type, Values


class Last(Aggregation, frozen=True, kw_only=True, tag="last"):
    """The latest value of a field, by time; of equal times the larger value. Null where there is none.

    >>> from features.aggregations.worked import worked
    >>> price = Last(name="price", event="Click", field="price", kind="float")
    >>> worked(price, {"00:30": {"price": 2.0}, "00:00": {"price": 5.0}}, at="00:45")
    2.0
    """

    nothing: ClassVar[float] = float("nan")

    kind: Literal["str", "int", "float", "bool"]

    @property
    def value_type(self) -> Type:
        """See `Aggregation.value_type`."""
        return self.kind

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(LATEST, LatestText() if self.kind == "str" else LatestNumber(), self.measure),)

    def value(self, window: Window, parts: tuple[Part, ...], now_ms: int) -> Values:
        """See `Aggregation.value`."""
        times_ms, values = parts[0].over(window)
        outside = (times_ms < 0) | (times_ms < window.tail_ticks(now_ms) * TICK_MS)
        if self.kind == "str":
            return Texts(np.where(outside, -1, values), parts[0].texts)
        return null_if(outside, values)
