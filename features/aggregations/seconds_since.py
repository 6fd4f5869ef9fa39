"""Time since the last event."""

from __future__ import annotations

from typing import ClassVar

from features.aggregations.base import LATEST, Aggregation, Slot
from features.formulas import Formula
from features.partials import Seen


class SecondsSince(Aggregation, frozen=True, kw_only=True, tag="seconds_since"):
    """Seconds since the latest event, to the millisecond, never negative; null where there is none.

    >>> from features.aggregations.worked import worked
    >>> worked(SecondsSince(name="idle", event="Click"), {"00:00": {}, "00:30": {}}, at="00:45")
    900.0
    """

    formula: ClassVar[Formula | None] = Formula.SINCE
    nothing: ClassVar[float] = float("nan")

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(LATEST, Seen(), self.measure),)
