"""Largest value of a field over a window."""

from __future__ import annotations

from typing import ClassVar

from features.aggregations.base import Aggregation, Slot
from features.formulas import Formula
from features.partials import Greatest


class Max(Aggregation, frozen=True, kw_only=True, tag="max"):
    """The largest value of a numeric field; null where there is none.

    >>> from features.aggregations.worked import worked
    >>> price = Max(name="price", event="Click", field="price", over=("1h",))
    >>> worked(price, {"00:00": {"price": 5.0}, "00:30": {"price": 2.0}}, at="00:45")
    5.0
    """

    formula: ClassVar[Formula | None] = Formula.EXTREME
    nothing: ClassVar[float] = float("nan")

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(), Greatest(), self.measure),)
