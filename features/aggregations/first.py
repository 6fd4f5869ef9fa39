"""Earliest value of a field."""

from __future__ import annotations

from typing import ClassVar, Literal

from features.aggregations.base import Aggregation, Slot
from features.formulas import Formula
from features.partials import EarliestNumber, EarliestText
from features.values import Type


class First(Aggregation, frozen=True, kw_only=True, tag="first"):
    """The earliest value of a field in a window, by time; of equal times the smaller value. Null where there is none.

    A window moves on and so does its first event, so each tile keeps its own.

    >>> from features.aggregations.worked import worked
    >>> price = First(name="price", event="Click", field="price", kind="float", over=("1h",))
    >>> clicks = {"00:30": {"price": 2.0}, "00:00": {"price": 5.0}}
    >>> worked(price, clicks, at="00:45"), worked(price, clicks, at="01:15")
    (5.0, 2.0)
    """

    formula: ClassVar[Formula | None] = Formula.LATEST
    nothing: ClassVar[float] = float("nan")

    kind: Literal["str", "int", "float", "bool"]

    @property
    def value_type(self) -> Type:
        """See `Aggregation.value_type`."""
        return self.kind

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(self.tiles(), EarliestText() if self.kind == "str" else EarliestNumber(), self.measure),)
