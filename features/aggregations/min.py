"""Smallest value of a field over a window."""

from __future__ import annotations

from typing import ClassVar

from features.aggregations.base import Aggregation, Slot
from features.formulas import Formula
from features.partials import Least


class Min(Aggregation, frozen=True, kw_only=True, tag="min"):
    """The smallest value of a numeric field; null where there is none.

    >>> from features.aggregations.worked import worked
    >>> price = Min(name="price", event="Click", field="price", over=("1h",))
    >>> worked(price, {"00:00": {"price": 5.0}, "00:30": {"price": 2.0}}, at="00:45")
    2.0
    """

    formula: ClassVar[Formula | None] = Formula.EXTREME
    nothing: ClassVar[float] = float("nan")

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(), Least(), self.measure),)
