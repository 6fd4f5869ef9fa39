"""Largest value of a field over a window."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from features.aggregations.base import Aggregation, Part, Slot, null_if
from features.partials import Greatest
from features.values import EachWindow


class Max(Aggregation, frozen=True, kw_only=True, tag="max"):
    """The largest value of a numeric field; null where there is none.

    >>> from features.aggregations.worked import worked
    >>> price = Max(name="price", event="Click", field="price", over=("1h",))
    >>> worked(price, {"00:00": {"price": 5.0}, "00:30": {"price": 2.0}}, at="00:45")
    5.0
    """

    nothing: ClassVar[float] = float("nan")

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(), Greatest(), self.measure),)

    def values(self, parts: tuple[Part, ...], now_ms: int) -> EachWindow:
        """See `Aggregation.values`."""
        (value,) = parts[0].totals
        return null_if(np.isinf(value), value)
