"""One kind of event against another, with a prior."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from features.aggregations.base import Aggregation, Measure, Slot
from features.expressions import AnyCondition
from features.formulas import Formula
from features.partials import Tally


class Ratio(Aggregation, frozen=True, kw_only=True, tag="ratio"):
    """A smoothed rate: (events + prior * strength) / (events `of` + strength).

    With no event at all it is the prior; each event `of` moves it, as if `strength` of them had been seen before.

    >>> from features.aggregations.worked import worked
    >>> rate = Ratio(name="rate", event="Click", of="Click", where=None, over=("1h",), prior=0.1, strength=10)
    >>> worked(rate, {}, at="00:45")
    0.1
    >>> worked(rate, {"00:00": {}, "00:30": {}}, at="00:45")
    0.25
    """

    formula: ClassVar[Formula | None] = Formula.RATIO

    of: str
    of_where: AnyCondition | None = None
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
        tiles = self.tiles()
        return tuple(Slot(tiles, Tally(), replace(measure, origin=self.origin)) for measure in self.counted)

    @property
    def constants(self) -> tuple[float, float, float]:
        """See `Aggregation.constants`."""
        return self.prior, self.strength, 0.0
