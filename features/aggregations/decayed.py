"""Exponentially decayed sum."""

from __future__ import annotations

from features.aggregations.base import LATEST, Aggregation, Part, Slot, Table
from features.partials import Decay
from features.times import ALL, Window, duration_ms
from features.values import Values


class Decayed(Aggregation, frozen=True, kw_only=True, tag="decayed"):
    """The sum of x * 2^(-(q - t) / half_life) over all events: of a numeric field, or of 1 an event.

    >>> from features.aggregations.worked import worked
    >>> heat = Decayed(name="heat", event="Click", half_life="30m")
    >>> worked(heat, {"00:00": {}, "00:30": {}}, at="01:00")
    0.75
    """

    half_life: str

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        everything = (Window.parse(ALL),)
        by_bucket = Table(
            "", everything, starts=False, by=self.by, bucket="text", bound=self.buckets, only=self.counted
        )
        return (Slot(by_bucket if self.by else LATEST, self._decay, self.measure),)

    def value(self, window: Window, parts: tuple[Part, ...], now_ms: int) -> Values:
        """See `Aggregation.value`."""
        return self._decay.at(parts[0].over(window), now_ms)

    @property
    def _decay(self) -> Decay:
        return Decay(duration_ms(self.half_life))
