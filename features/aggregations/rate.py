"""One exponentially decayed sum against another."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from features.aggregations.base import LATEST, Aggregation, Measure, Slot, Table
from features.expressions import AnyCondition
from features.formulas import Formula
from features.partials import Decay
from features.times import duration_ms


class Rate(Aggregation, frozen=True, kw_only=True, tag="rate"):
    """A smoothed rate that forgets: (a + prior * strength) / (b + strength), of sums that halve every `half_life`.

    a is of 1 an event, or of a numeric field; b of 1 an event `of`. As events fade, it goes back to the prior.

    >>> from features.aggregations.worked import worked
    >>> rate = Rate(name="rate", event="Click", of="Click", field="price", half_life="30m", prior=1.0, strength=0.25)
    >>> worked(rate, {}, at="01:00")
    1.0
    >>> worked(rate, {"00:00": {"price": 4.0}, "00:30": {"price": 2.0}}, at="01:00")
    2.25
    """

    formula: ClassVar[Formula | None] = Formula.RATE

    of: str
    of_where: AnyCondition | None = None
    half_life: str
    prior: float
    strength: float

    @property
    def without_events(self) -> float:
        """See `Aggregation.without_events`."""
        return self.prior

    @property
    def counted(self) -> tuple[Measure, ...]:
        """See `Aggregation.counted`."""
        return (*super().counted, Measure(self.of, None, self.of_where))

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        table = LATEST
        if self.by:
            bound, only = self.buckets, self.counted
            table = Table("", LATEST.windows, starts=False, by=self.by, bucket="text", bound=bound, only=only)
        decay, of = Decay(duration_ms(self.half_life)), replace(self.counted[1], origin=self.origin)
        return Slot(table, decay, self.measure), Slot(table, decay, of)

    @property
    def constants(self) -> tuple[float, float, float]:
        """See `Aggregation.constants`."""
        return self.prior, self.strength, duration_ms(self.half_life)
