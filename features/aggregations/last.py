"""Latest value of a field."""

from __future__ import annotations

from typing import ClassVar, Literal

from features.aggregations.base import LATEST, Aggregation, Slot
from features.formulas import Formula
from features.partials import LatestNumber, LatestText
from features.values import Type


class Last(Aggregation, frozen=True, kw_only=True, tag="last"):
    """The latest value of a field, by time; of equal times the larger value. Null where there is none.

    >>> from features.aggregations.worked import worked
    >>> price = Last(name="price", event="Click", field="price", kind="float")
    >>> worked(price, {"00:30": {"price": 2.0}, "00:00": {"price": 5.0}}, at="00:45")
    2.0
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
        return (Slot(LATEST, LatestText() if self.kind == "str" else LatestNumber(), self.measure),)
