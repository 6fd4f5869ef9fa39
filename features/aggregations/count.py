"""Events in a window."""

from __future__ import annotations

from features.aggregations.base import Aggregation, Part, Slot
from features.partials import Tally
from features.times import Window
from features.values import Type, Values


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

    def value(self, window: Window, parts: tuple[Part, ...], now_ms: int) -> Values:
        """See `Aggregation.value`."""
        return parts[0].over(window)[0].astype(float)
