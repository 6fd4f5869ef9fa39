"""Latest events, as lists side by side."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import Final

import numpy as np
from numpy.typing import NDArray

from features.aggregations.base import Aggregation, Measure, Slot, SlotTotals, Table
from features.partials import Greatest, GreatestText, Seen, Tally
from features.times import ALL, TICK_MS, Window
from features.values import Lists, NumberLists, Type, Values

TIME: Final = "occurred_at"
"""What the list of their times is called, as in the events."""
_TIME_BITS: Final = 43
"""Of a time in ms that a row can hold."""


class Sequence(Aggregation, frozen=True, kw_only=True, tag="sequence"):
    """One field of the k latest events, newest first: the other fields' lists have those of the same events beside it.

    Of equal times an event of larger values is later, by the first field, then the next; null is less than all. Equal
    events stand there as often as they happened. Always exact: an entry is an event (its time and values, by their
    hash) with how often it happened, and one that fell out of the k latest can only come back by itself.

    >>> from features.aggregations.worked import worked
    >>> recent = Sequence(name="recent_price", event="Click", of="price", fields=("price",), texts=(False,), k=2)
    >>> worked(recent, {"00:00": {"price": 1.5}, "00:01": {"price": 2.0}, "00:02": {"price": 1.5}}, at="00:45")
    [1.5, 2.0]
    """

    of: str
    fields: tuple[str, ...]
    texts: tuple[bool, ...]
    k: int

    @property
    def value_type(self) -> Type:
        """See `Aggregation.value_type`."""
        if self.of == TIME:
            return "list[int]"
        return "list[str]" if self.texts[self.fields.index(self.of)] else "list[float]"

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        row, by = self.name.removesuffix(f"_{self.of}"), "+".join(self.fields)
        table = Table(row, (Window.parse(ALL),), starts=False, by=by, bucket="event", bound=self.k)
        fields = zip(self.fields, self.texts, strict=True)
        return (
            Slot(table, Seen(), self.measure),
            Slot(table, Tally(), self.measure),
            *(
                Slot(table, GreatestText() if is_text else Greatest(), self._measure(field))
                for field, is_text in fields
            ),
        )

    def values(self, slots: tuple[SlotTotals, ...], now_ms: NDArray[np.int64]) -> Several[Values]:
        """See `Aggregation.values`."""
        seen = slots[0]
        times_ms, values = seen.totals[0, 0], [each.totals[0, 0] for each in slots[2:]]
        order = seen.once(lambda: self._newest(slots))
        begins_ms = np.broadcast_to(self.tails(now_ms) * TICK_MS, (seen.n_rows, len(self.windows)))
        inside = (order[times_ms[order] >= begin_ms[seen.rows[order]]] for begin_ms in begins_ms.T)
        if self.of == TIME:
            return [NumberLists(seen.rows[each], seen.n_rows, times_ms[each], whole=True) for each in inside]
        at = self.fields.index(self.of)
        if self.texts[at]:
            codes = values[at].astype(np.int64)
            return [Lists(seen.rows[each], seen.n_rows, codes[each], seen.texts, sparse=True) for each in inside]
        numbers = np.where(np.isinf(values[at]), np.nan, values[at])
        return [NumberLists(seen.rows[each], seen.n_rows, numbers[each]) for each in inside]

    def _newest(self, slots: tuple[SlotTotals, ...]) -> NDArray[np.int64]:
        """int64[…]: the entries of each row, newest first, as often as they happened, no more than k of a row."""
        seen, tally, *fields = slots
        times_ms, rows = seen.totals[0, 0], seen.rows
        key = (rows << _TIME_BITS) - times_ms.astype(np.int64)
        order = np.argsort(key, kind="stable")
        if seen.n_rows >> (63 - _TIME_BITS) or not np.all(np.diff(key[order])):
            order = np.lexsort((*(-each.totals[0, 0] for each in reversed(fields)), -times_ms, rows))
        order = np.repeat(order, np.clip(tally.totals[0, 0][order], 0, self.k).astype(np.int64))
        firsts = np.searchsorted(rows[order], np.arange(seen.n_rows))
        newest: NDArray[np.int64] = order[np.arange(len(order)) - firsts[rows[order]] < self.k]
        return newest

    def _measure(self, field: str) -> Measure:
        return Measure(self.event, field, self.where, self.origin)
