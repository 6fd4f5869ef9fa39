"""Events in a window."""

from __future__ import annotations

from typing import ClassVar

from features.aggregations.base import Aggregation, Slot
from features.formulas import Formula
from features.partials import Tally
from features.values import Type


class Count(Aggregation, frozen=True, kw_only=True, tag="count"):
    """How many events.

    >>> from features.aggregations.worked import worked
    >>> worked(Count(name="clicks", event="Click", over=("10m",)), {"00:00": {}, "00:05": {}, "00:09": {}}, at="00:12")
    2
    """

    formula: ClassVar[Formula | None] = Formula.TOTAL

    @property
    def value_type(self) -> Type:
        """See `Aggregation.value_type`."""
        return "map[str, float]" if self.by else "int"

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(), Tally(), self.measure),)
