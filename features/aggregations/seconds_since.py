"""Time since the last event."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from features.aggregations.base import LATEST, Aggregation, Part, Slot, null_if
from features.partials import Seen
from features.values import EachWindow


class SecondsSince(Aggregation, frozen=True, kw_only=True, tag="seconds_since"):
    """Seconds since the latest event, to the millisecond, never negative; null where there is none.

    >>> from features.aggregations.worked import worked
    >>> worked(SecondsSince(name="idle", event="Click"), {"00:00": {}, "00:30": {}}, at="00:45")
    900.0
    """

    nothing: ClassVar[float] = float("nan")

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(LATEST, Seen(), self.measure),)

    def values(self, parts: tuple[Part, ...], now_ms: int) -> EachWindow:
        """See `Aggregation.values`."""
        (seen_ms,) = parts[0].totals
        outside = (seen_ms < 0) | (seen_ms < self.begins_ms(now_ms))
        return null_if(outside, np.maximum(now_ms - seen_ms, 0) / 1000)
