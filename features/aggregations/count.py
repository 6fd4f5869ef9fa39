"""Events in a window."""

from __future__ import annotations

from features.aggregations.base import Aggregation, Part, Slot
from features.partials import Tally
from features.values import EachWindow, Floats, Type


class Count(Aggregation, frozen=True, kw_only=True, tag="count"):
    """How many events.

    >>> from features.aggregations.worked import worked
    >>> worked(Count(name="clicks", event="Click", over=("10m",)), {"00:00": {}, "00:05": {}, "00:09": {}}, at="00:12")
    2
    """

    @property
    def value_type(self) -> Type:
        """See `Aggregation.value_type`."""
        return "map[str, float]" if self.by else "int"

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(), Tally(), self.measure),)

    def values(self, parts: tuple[Part, ...], now_ms: int) -> EachWindow:
        """See `Aggregation.values`."""
        total: Floats = parts[0].totals[0]
        return total
