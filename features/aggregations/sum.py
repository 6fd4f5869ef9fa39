"""Sum of a field over a window."""

from __future__ import annotations

from typing import ClassVar

from features.aggregations.base import Aggregation, Slot
from features.formulas import Formula
from features.partials import Total


class Sum(Aggregation, frozen=True, kw_only=True, tag="sum"):
    """The sum of a numeric field, nulls left out.

    >>> from features.aggregations.worked import worked
    >>> spent = Sum(name="spent", event="Click", field="price", over=("1h",))
    >>> worked(spent, {"00:00": {"price": 5.0}, "00:30": {"price": 2.5}, "00:40": {"price": None}}, at="01:02")
    7.5
    """

    formula: ClassVar[Formula | None] = Formula.TOTAL

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(), Total(), self.measure),)
