"""Folded rows: the partials of many rows over every window, from which aggregations compute their values."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.fold import fold_tables, groups_of, next_changes, ranked
from features.formulas import finish, look_ups
from features.layout import Bundle, TableLayout
from features.rows import Index, Ints, Rows
from features.texts import buffers
from features.values import Lists

Floats = NDArray[np.float64]
_NO_ROWS: Final = np.zeros(0, np.int64)


class Totals:
    """The partials of all groups of `n` rows over every window, as of some time.

    A group is a row, or a (row, bucket) pair of a table with buckets.

    Attributes:
        n: how many rows.
        last_event_ms: int64[n], the time of each row's last event; -1 for none.
        texts: what codes of texts stand for.
    """

    def __init__(
        self,
        bundle: Bundle,
        folded: tuple[Floats, Ints, Ints],
        last_event_ms: Ints,
        texts: pa.StringArray,
        rows: Rows | None = None,
    ) -> None:
        self.n, self.last_event_ms, self.texts = len(last_event_ms), last_event_ms, texts
        self._bundle, self._rows = bundle, rows
        self._totals, self._n_groups, self._firsts = folded
        self._made: dict[tuple[int, int], Ints] = {}

    @classmethod
    def of(cls, bundle: Bundle, rows: Rows, now_ms: Ints, wanted: NDArray[np.bool_]) -> Totals:
        """The totals at `now_ms` (int64[1 or n]) of those tables that are wanted: bool[tables]."""
        folded = fold_tables(rows.pool, rows.sizes, wanted, *bundle.folding, now_ms, rows.n)
        return cls(bundle, folded, rows.last_event_ms, rows.texts, rows)

    @classmethod
    def of_matrix(cls, bundle: Bundle, matrix: Floats, last_event_ms: Ints, texts: pa.StringArray) -> Totals:
        """The inverse of `flat`."""
        n_groups = np.full(len(bundle.tables), len(last_event_ms))
        return cls(bundle, (matrix.ravel(), n_groups, np.zeros(0, np.int64)), last_event_ms, texts)

    def finish(self, formulas: tuple[Ints, Floats], now_ms: Ints, values: Floats, rows: Ints = _NO_ROWS) -> int:
        """Computes numeric features: see `features.formulas.finish`."""
        return finish(self._totals, self._n_groups, self._bundle.folding.shapes, *formulas, now_ms, rows, values)

    def look_ups(
        self,
        maps: tuple[Ints, Ints, Floats, Floats],
        owners: Ints,
        wanted: Floats,
        texts: Any,
        now_ms: Ints,
        values: Floats,
    ) -> None:
        """Looks texts up in maps and lists of these rows: see `features.formulas.look_ups`.

        `maps` are its first four arguments, `texts` the buffers of those that are wanted.
        """
        given: Any = (*maps, *self._folded, *self._text_buffers, owners, wanted, *texts, now_ms, values)
        look_ups(*given)

    def ranked(self, table: int, column: int, window: int, least: Ints, k: int, ties: int) -> Lists:
        """Lists of buckets that are texts: see `features.fold.ranked`."""
        rows, codes = ranked(*self._folded, table, column, window, least, k, ties)
        return Lists(rows, self.n, codes, self.texts)

    @cached_property
    def _folded(self) -> tuple[Floats, Ints, Ints, Ints, Ints, Ints]:
        """As loops take them that look at tables with buckets."""
        rows = self._rows
        assert rows is not None  # noqa: S101  # for the type checker: asked of tables with buckets only
        return self._totals, self._n_groups, self._firsts, self._bundle.folding.shapes, rows.pool, rows.sizes

    @cached_property
    def _text_buffers(self) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        return buffers(self.texts)

    def slot(self, table: int, partial: int) -> _OfSlot:
        """One slot of a table."""
        return _OfSlot(self, table, self._bundle.tables[table], partial)

    def of_table(self, table: int) -> Floats:
        """float64[columns, windows, groups] of a table."""
        columns, windows = self._bundle.tables[table].totals_shape
        begin, end = self._ends[table : table + 2]
        return self._totals[begin:end].reshape(columns, windows, -1 if end > begin else 0)

    @cached_property
    def _ends(self) -> list[int]:
        """Where each table's totals begin, and where the last's end."""
        return [0, *np.cumsum(self._bundle.n_totals * self._n_groups).tolist()]

    def groups(self, table: int) -> tuple[Ints, Ints]:
        """The row and the bucket of each group of a table with buckets: see `features.fold.groups_of`."""
        found: tuple[Ints, Ints] = groups_of(table, *self._folded[1:])
        return found


class _OfSlot:
    """One slot of a table: the kernel's side of `features.aggregations.base.SlotTotals`."""

    def __init__(self, of: Totals, table: int, layout: TableLayout, partial: int) -> None:
        self.n_rows, self.texts = of.n, of.texts
        self._of, self._table, self._layout, self._columns = of, table, layout, layout.slices[partial]

    @cached_property
    def totals(self) -> Floats:
        """See `SlotTotals.totals`."""
        return self._of.of_table(self._table)[self._columns]

    def ranked(self, window: int, least: Ints, k: int, *, ties: Literal[1, -1]) -> Lists:
        """See `SlotTotals.ranked`."""
        return self._of.ranked(self._table, self._columns.start, window, least, k, ties)

    def once(self, make: Callable[[], Ints]) -> Ints:
        """See `SlotTotals.once`."""
        made, slot = self._of._made, (self._table, self._columns.start)
        if slot not in made:
            made[slot] = make()
        return made[slot]

    @cached_property
    def _groups(self) -> tuple[Ints, Ints]:
        return self._of.groups(self._table)

    @property
    def rows(self) -> Index:
        """See `SlotTotals.rows`."""
        rows: Index = self._groups[0]
        return rows

    @property
    def buckets(self) -> NDArray[Any]:
        """See `SlotTotals.buckets`."""
        buckets: NDArray[Any] = self._groups[1]
        return buckets.view(np.uint64) if self._layout.table.bucket == "hash" else buckets


def flat(bundle: Bundle, rows: Rows, now_ms: int) -> Floats:
    """float64[numbers, n]: all totals of a bundle without buckets, each row's in a column."""
    every = np.ones(len(bundle.tables), bool)
    totals: Floats = fold_tables(rows.pool, rows.sizes, every, *bundle.folding, np.array([now_ms]), rows.n)[0]
    return totals.reshape(-1, rows.n)


def stay_until_ms(bundle: Bundle, rows: Rows, now_ms: int) -> Ints:
    """int64[n]: until when the totals of each row stay as they are at `now_ms`, if no event comes."""
    shapes, windows = bundle.folding.shapes, bundle.folding.windows
    until: Ints = next_changes(rows.pool, rows.sizes, shapes, windows, now_ms, rows.n)
    return until
