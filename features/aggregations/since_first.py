"""Time since the first event."""

from __future__ import annotations

from typing import ClassVar

from features.aggregations.base import Aggregation, Slot
from features.formulas import Formula
from features.partials import FirstSeen


class SinceFirst(Aggregation, frozen=True, kw_only=True, tag="since_first"):
    """Seconds since the earliest event in a window, to the millisecond, never negative; null where there is none.

    >>> from features.aggregations.worked import worked
    >>> worked(SinceFirst(name="known", event="Click"), {"00:00": {}, "00:30": {}}, at="00:45")
    2700.0
    """

    formula: ClassVar[Formula | None] = Formula.SINCE
    nothing: ClassVar[float] = float("nan")

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(), FirstSeen(), self.measure),)
