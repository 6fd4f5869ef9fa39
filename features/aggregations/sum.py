"""Sum of a field over a window."""

from __future__ import annotations

from features.aggregations.base import Aggregation, Part, Slot
from features.partials import Total
from features.times import Window
from features.values import Values


class Sum(Aggregation, frozen=True, kw_only=True, tag="sum"):
    """The sum of a numeric field, nulls left out.

    >>> from features.aggregations.worked import worked
    >>> spent = Sum(name="spent", event="Click", field="price", over=("1h",))
    >>> worked(spent, {"00:00": {"price": 5.0}, "00:30": {"price": 2.5}, "00:40": {"price": None}}, at="01:02")
    7.5
    """

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(), Total(), self.measure),)

    def value(self, window: Window, parts: tuple[Part, ...], now_ms: int) -> Values:
        """See `Aggregation.value`."""
        return parts[0].over(window)[0]
