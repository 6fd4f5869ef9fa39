"""A window against the same window some time before."""

from __future__ import annotations

from typing import ClassVar

from features.aggregations.base import Aggregation, Slot, Table
from features.formulas import Formula
from features.partials import Tally, Total
from features.times import Window, duration_ms
from features.values import Type


class Delta(Aggregation, frozen=True, kw_only=True, tag="delta"):
    """Events in a window, or the sum of a numeric field, less those of a window as wide that ended `before` ago.

    Both ends of the earlier window move by the step of the window's own width, so it is as wide, and exact, as one that
    was asked for `before` ago: [floor((q - before - w) / hop) * hop, floor((q - before) / hop) * hop). So the row keeps
    tiles as fine as the window's own for all of `before` and the window.

    >>> from features.aggregations.worked import worked
    >>> pace = Delta(name="pace", event="Click", over=("10m",), before="30m")
    >>> worked(pace, {"00:00": {}, "00:05": {}, "00:25": {}, "00:36": {}}, at="00:40")
    -1
    """

    formula: ClassVar[Formula | None] = Formula.DELTA

    before: str

    @property
    def value_type(self) -> Type:
        """See `Aggregation.value_type`."""
        return "int" if self.field is None else "float"

    def reach(self, window: Window) -> Window:
        """See `Aggregation.reach`."""
        return Window.stepping(duration_ms(self.before) + window.width_ms, window.hop_ms)

    def slots(self) -> tuple[Slot, ...]:
        """See `Aggregation.slots`."""
        table = Table("", tuple(sorted(set(self._ends))), starts=True)
        return (Slot(table, Tally() if self.field is None else Total(), self.measure),)

    @property
    def constants(self) -> tuple[float, float, float]:
        """See `Aggregation.constants`."""
        _, end, begin = self._ends
        windows = sorted(set(self._ends))
        return windows.index(end), windows.index(begin), 0.0

    @property
    def _ends(self) -> tuple[Window, Window, Window]:
        """The window, and those whose starts are the end and the start of the earlier one."""
        (window,) = self.windows
        before_ms = duration_ms(self.before)
        same = before_ms == window.width_ms
        return window, window if same else Window.stepping(before_ms, window.hop_ms), self.reach(window)
