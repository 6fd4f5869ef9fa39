"""Spread of a field over a window."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from features.aggregations.base import Aggregation, Part, Slot, null_if
from features.partials import Moments
from features.values import EachWindow


class Std(Aggregation, frozen=True, kw_only=True, tag="std"):
    """The population's standard deviation of a numeric field, nulls left out; null where there is none.

    >>> from features.aggregations.worked import worked
    >>> spread = Std(name="spread", event="Click", field="price", over=("1h",))
    >>> worked(spread, {"00:00": {"price": 5.0}, "00:30": {"price": 2.0}}, at="00:45")
    1.5
    """

    nothing: ClassVar[float] = float("nan")

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(), Moments(), self.measure),)

    def values(self, parts: tuple[Part, ...], now_ms: int) -> EachWindow:
        """See `Aggregation.values`."""
        n, _, m2 = parts[0].totals
        return null_if(n == 0, np.sqrt(m2 / np.maximum(n, 1)))
