"""State in memory: the rows of many entities, as tables of entries; and events on their way into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.layout import Bundle, Family, TableLayout
from features.texts import NO_TEXTS

Ints = NDArray[np.int64]
Index = NDArray[np.intp]


@dataclass(frozen=True)
class Events:
    """Events of one contract: of which row (intp[n]), when (int64[n], ms), and their fields by name.

    A text field is a `pa.StringArray`, one of lists a `pa.ListArray`, any other float64[n] with NaN for null.
    """

    rows: Index
    times_ms: Ints
    fields: Mapping[str, Any]

    def take(self, mask: NDArray[np.bool_]) -> Events:
        """The events under the mask."""
        if mask.all():
            return self
        return Events(self.rows[mask], self.times_ms[mask], taken(self.fields, mask))


def taken(fields: Mapping[str, Any], mask: NDArray[np.bool_]) -> dict[str, Any]:
    """The values of events under the mask."""
    keep = pa.array(mask)
    return {
        name: column.filter(keep) if isinstance(column, pa.Array) else column[mask] for name, column in fields.items()
    }


class Entries:
    """One table of many rows, sorted by row, bucket and start.

    Attributes:
        rows: intp[n], the row of each entry.
        buckets: [n], a text's code, a hash or a cell; None where the table has none.
        starts: int64[n], the tile in ticks; None where entries are no tiles.
        table: int64[columns, n], the partials; floats as their bits.
        columns: a view of each column in the dtype that the layout's `physical` says.
    """

    __slots__ = ("buckets", "columns", "rows", "starts", "table")

    def __init__(
        self, rows: Index, buckets: NDArray[Any] | None, starts: Ints | None, columns: tuple[NDArray[Any], ...]
    ) -> None:
        table = np.array([column.view(np.int64) for column in columns], np.int64).reshape(len(columns), len(rows))
        self._set(rows, buckets, starts, table, tuple(column.dtype for column in columns))

    def _set(
        self, rows: Index, buckets: NDArray[Any] | None, starts: Ints | None, table: Ints, dtypes: Sequence[Any]
    ) -> None:
        self.rows, self.buckets, self.starts, self.table = rows, buckets, starts, table
        self.columns = tuple(column.view(dtype) for column, dtype in zip(table, dtypes, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of_lines(cls, layout: TableLayout, lines: Ints) -> Entries:
        """Entries as views of int64[lines, n]: their rows, starts and buckets, as far as there are, and columns."""
        first = layout.n_lines - len(layout.physical)
        buckets: Any = None
        if layout.table.bucket is not None:
            buckets = lines[first - 1].view(np.uint64) if layout.table.bucket == "hash" else lines[first - 1]
        entries = cls.__new__(cls)
        entries._set(lines[0], buckets, lines[1] if layout.table.starts else None, lines[first:], layout.dtypes)
        return entries

    @property
    def lines(self) -> Ints:
        """The inverse of `of_lines`."""
        keys = [self.starts, None if self.buckets is None else self.buckets.view(np.int64)]
        return np.vstack([self.rows, *(key for key in keys if key is not None), self.table])


class Rows:
    """All state of `n` entities in one family or bundle. Text columns and buckets are codes: positions in `texts`.

    Attributes:
        n: how many.
        latest_ms: int64[families, n], the time of each row's last event in each family; -1 for none.
        texts: what codes stand for.
    """

    _bundle: Bundle | None = None

    def __init__(self, n: int, last_event_ms: Ints, tables: tuple[Entries, ...], texts: pa.StringArray) -> None:
        self.n, self.latest_ms, self.texts = n, last_event_ms.reshape(1, n), texts
        self.tables = tables

    @classmethod
    def of_pool(cls, bundle: Bundle, latest_ms: Ints, pool: Ints, sizes: Ints, texts: pa.StringArray) -> Rows:
        """Rows whose tables stand in one array, the lines of each one after the other, with `sizes` entries each."""
        rows = cls.__new__(cls)
        rows.n, rows.latest_ms, rows.texts = latest_ms.shape[1], latest_ms, texts
        rows._bundle, rows.pool, rows.sizes = bundle, pool, sizes
        return rows

    @classmethod
    def empty(cls, rows_of: Family | Bundle, n: int) -> Rows:
        """Rows of entities never seen."""
        bundle = rows_of.alone if isinstance(rows_of, Family) else rows_of
        latest_ms = np.full((len(bundle.families), n), -1, np.int64)
        return cls.of_pool(bundle, latest_ms, np.zeros(0, np.int64), np.zeros(len(bundle.tables), np.int64), NO_TEXTS)

    @cached_property
    def last_event_ms(self) -> Ints:
        """int64[n], the time of each row's last event in any family; -1 for none."""
        latest: Ints = self.latest_ms[0] if len(self.latest_ms) == 1 else np.maximum.reduce(self.latest_ms)
        return latest

    @cached_property
    def tables(self) -> tuple[Entries, ...]:
        """The entries of each of the family's tables."""
        layouts = self._bundle.tables if self._bundle else ()
        return tuple(Entries.of_lines(layout, self.lines(index)) for index, layout in enumerate(layouts))

    def lines(self, table: int) -> Ints:
        """int64[lines, entries]: a table in memory, see `Entries.of_lines`."""
        if self._bundle is None:
            return self.tables[table].lines
        return self.pool[self._ends[table] : self._ends[table + 1]].reshape(self._bundle.tables[table].n_lines, -1)

    @cached_property
    def _ends(self) -> list[int]:
        lines = [layout.n_lines for layout in self._bundle.tables] if self._bundle else []
        return [0, *accumulate(n * size for n, size in zip(lines, self.sizes.tolist(), strict=True))]

    @cached_property
    def pool(self) -> Ints:
        """int64[…]: see `of_pool`."""
        return np.concatenate([table.lines.ravel() for table in self.tables])

    @cached_property
    def sizes(self) -> Ints:
        """int64[tables]: how many entries each has."""
        return np.array([len(table) for table in self.tables], np.int64)
