"""Exponentially decayed sum."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from features.aggregations.base import LATEST, Aggregation, Part, Slot, Table
from features.partials import Decay
from features.times import ALL, Window, duration_ms
from features.values import EachWindow


class Decayed(Aggregation, frozen=True, kw_only=True, tag="decayed"):
    """The sum of x * 2^(-(q - t) / half_life) over all events: of a numeric field, or of 1 an event.

    >>> from features.aggregations.worked import worked
    >>> heat = Decayed(name="heat", event="Click", half_life="30m")
    >>> worked(heat, {"00:00": {}, "00:30": {}}, at="01:00")
    0.75
    """

    half_life: str

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        everything = (Window.parse(ALL),)
        by_bucket = Table(
            "", everything, starts=False, by=self.by, bucket="text", bound=self.buckets, only=self.counted
        )
        return (Slot(by_bucket if self.by else LATEST, Decay(duration_ms(self.half_life)), self.measure),)

    def values(self, parts: tuple[Part, ...], now_ms: int) -> EachWindow:
        """See `Aggregation.values`."""
        times_ms, amplitude = parts[0].totals
        decayed: NDArray[np.float64] = amplitude * np.exp2((times_ms - now_ms) / duration_ms(self.half_life))
        return decayed
