"""Exponentially decayed sum."""

from __future__ import annotations

from typing import ClassVar

from features.aggregations.base import LATEST, Aggregation, Slot, Table
from features.formulas import Formula
from features.partials import Decay
from features.times import ALL, Window, duration_ms


class Decayed(Aggregation, frozen=True, kw_only=True, tag="decayed"):
    """The sum of x * 2^(-(q - t) / half_life) over all events: of a numeric field, or of 1 an event.

    >>> from features.aggregations.worked import worked
    >>> heat = Decayed(name="heat", event="Click", half_life="30m")
    >>> worked(heat, {"00:00": {}, "00:30": {}}, at="01:00")
    0.75
    """

    formula: ClassVar[Formula | None] = Formula.DECAYED

    half_life: str

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        everything = (Window.parse(ALL),)
        by_bucket = Table(
            "", everything, starts=False, by=self.by, bucket="text", bound=self.buckets, only=self.counted
        )
        return (Slot(by_bucket if self.by else LATEST, Decay(duration_ms(self.half_life)), self.measure),)

    @property
    def constants(self) -> tuple[float, float, float]:
        """See `Aggregation.constants`."""
        return duration_ms(self.half_life), 0.0, 0.0
