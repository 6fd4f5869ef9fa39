"""Latest value of a field."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from features.aggregations.base import LATEST, Aggregation, Part, Slot, null_if
from features.partials import LatestNumber, LatestText
from features.values import EachWindow, Texts, Type


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

    def values(self, parts: tuple[Part, ...], now_ms: int) -> EachWindow:
        """See `Aggregation.values`."""
        times_ms, values = parts[0].totals
        outside = (times_ms < 0) | (times_ms < self.begins_ms(now_ms))
        if self.kind == "str":
            codes = np.where(outside, -1, values).astype(np.int64)
            return [Texts(of_window, parts[0].texts) for of_window in codes]
        return null_if(outside, values)
