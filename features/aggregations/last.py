"""Latest value of a field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from features.aggregations.base import LATEST, Aggregation, Part, Slot
from features.formulas import Formula
from features.partials import LatestNumber, LatestText
from features.values import Texts, Type, Values


class Last(Aggregation, frozen=True, kw_only=True, tag="last"):
    """The latest value of a field, by time; of equal times the larger value. Null where there is none.

    >>> from features.aggregations.worked import worked
    >>> price = Last(name="price", event="Click", field="price", kind="float")
    >>> worked(price, {"00:30": {"price": 2.0}, "00:00": {"price": 5.0}}, at="00:45")
    2.0
    """

    nothing: ClassVar[float] = float("nan")

    kind: Literal["str", "int", "float", "bool"]

    @property
    def value_type(self) -> Type:
        """See `Aggregation.value_type`."""
        return self.kind

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        return (Slot(LATEST, LatestText() if self.kind == "str" else LatestNumber(), self.measure),)

    @property
    def formula(self) -> Formula | None:  # type: ignore[override]  # as the field's kind has it
        """See `Aggregation.formula`."""
        return None if self.kind == "str" else Formula.LATEST

    def values(self, parts: tuple[Part, ...], now_ms: int) -> Sequence[Values]:
        """See `Aggregation.values`."""
        times_ms, codes = parts[0].totals[:, 0]
        return [
            Texts(np.where((times_ms < 0) | (times_ms < begin_ms), -1, codes).astype(np.int64), parts[0].texts)
            for begin_ms in self.begins_ms(now_ms)
        ]
