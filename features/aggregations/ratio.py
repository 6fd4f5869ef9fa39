"""One kind of event against another, with a prior."""

from __future__ import annotations

import numpy as np

from features.aggregations.base import Aggregation, Measure, Part, Slot
from features.expressions import AnyCondition
from features.partials import Tally
from features.values import EachWindow


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
        return (self.measure, Measure(self.of, None, self.of_where))

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        tiles = self.tiles()
        return tuple(Slot(tiles, Tally(), measure) for measure in self.counted)

    def values(self, parts: tuple[Part, ...], now_ms: int) -> EachWindow:
        """See `Aggregation.values`."""
        hits, trials = (part.totals[0] for part in parts)
        rate = (hits + self.prior * self.strength) / (trials + self.strength)
        # Exactly the prior: `by` leaves such buckets out.
        return np.where((hits == 0) & (trials == 0), self.prior, rate)
