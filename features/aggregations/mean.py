"""Mean of a field over a window."""

from __future__ import annotations

from typing import ClassVar

from features.aggregations.base import Aggregation, Slot
from features.formulas import Formula
from features.partials import Moments


class Mean(Aggregation, frozen=True, kw_only=True, tag="mean"):
    """The arithmetic mean of a numeric field, nulls left out; null where there is none.

    >>> from features.aggregations.worked import worked
    >>> price = Mean(name="price", event="Click", field="price", over=("1h",))
    >>> worked(price, {"00:00": {"price": 5.0}, "00:30": {"price": 2.0}}, at="00:45")
    3.5
    >>> worked(price, {}, at="00:45")
    """

    formula: ClassVar[Formula | None] = Formula.MEAN
    nothing: ClassVar[float] = float("nan")

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(), Moments(), self.measure),)
