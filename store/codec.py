"""The packed row: bytes to `Rows` and back, for thousands of rows at once.

    byte 0      version of this format
    1-2         tag of the family's layout
    3-8         time of the last event: seconds (u4), milliseconds (u2)
    9-10        number of texts
    5 a table   number of entries (u4), width of its small integers (u1)
    …           the tables' entries, one packed record each
    …           the texts: their lengths (u2 each), then their UTF-8 bytes

Counts, buckets and text indices are unsigned integers of the width that the row's largest needs (1, 2, 4 or 8 bytes);
a text index is one more than its position in the row's texts, 0 for null. Little-endian throughout. Records stand at
any byte: numpy gathers them through a view with a stride of one byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.kernel import Entries, Rows
from features.layout import Family, TableLayout
from features.partials import DTYPES
from features.sketch import CELLS
from features.texts import buffers, from_buffers

VERSION: Final = 1
_WIDTHS: Final = (1, 2, 4, 8)
_TIME: Final = np.dtype([("s", "<u4"), ("ms", "<u2")])
_TABLE: Final = np.dtype([("entries", "<u4"), ("width", "u1")])

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]


class CorruptRowError(ValueError):
    """Bytes that are no row of the family; `position` is the row's place in what was decoded."""

    def __init__(self, family: Family, position: int, reason: str) -> None:
        super().__init__(f"not a row of {family.name}: {reason}")
        self.family = family
        self.position = position
        self.reason = reason


def decode(family: Family, blobs: Sequence[bytes | None]) -> Rows:
    """Rows of n entities from their bytes; None is an entity never seen.

    Raises:
        CorruptRowError: if bytes have another version, layout or length than they should.
    """
    lengths = np.fromiter((0 if blob is None else len(blob) for blob in blobs), np.int64, len(blobs))
    there = np.flatnonzero(lengths)
    rows = Rows.empty(family, len(blobs))
    if len(there) == 0:
        return rows
    data = np.frombuffer(b"".join(filter(None, blobs)), np.uint8)
    ends = np.cumsum(lengths[there])
    at = ends - lengths[there]
    header = _header(family, data, there, at, lengths[there])
    at = at + header.dtype.itemsize
    counts = [header[f"t{index}"]["entries"].astype(np.int64) for index in range(len(family.tables))]
    widths = [header[f"t{index}"]["width"] for index in range(len(family.tables))]
    sizes = [
        _sizes(layout)[np.minimum(width, len(_WIDTHS) - 1)] for layout, width in zip(family.tables, widths, strict=True)
    ]
    texts_at = at + sum(
        (count * size for count, size in zip(counts, sizes, strict=True)), start=np.zeros(len(at), np.int64)
    )
    text_counts = header["texts"].astype(np.int64)
    bad = np.flatnonzero(texts_at + 2 * text_counts > ends)
    if len(bad):
        raise CorruptRowError(family, int(there[bad[0]]), "its tables are longer than its bytes")
    texts, first_text = _decode_texts(family, data, there, texts_at, text_counts, ends)
    tables = []
    for layout, count, size, width in zip(family.tables, counts, sizes, widths, strict=True):
        table = _decode_table(layout, data, there, at, count, width, first_text)
        _check_ranges(family, layout, table, count, first_text, text_counts)
        tables.append(table)
        at = at + count * size
    rows.last_event_ms[there] = _from_time(header["last"])
    return Rows(rows.n, rows.last_event_ms, tuple(tables), texts)


def encode(family: Family, rows: Rows) -> list[bytes]:
    """The bytes of each row; empty ones for a row with no entry in any table."""
    texts, first_text, tables = _local_texts(family, rows)
    text_offsets, text_data = buffers(texts)
    text_counts = np.diff(first_text)
    header = np.zeros(rows.n, _header_dtype(family))
    header["version"], header["tag"], header["texts"] = VERSION, family.tag, text_counts
    header["last"] = _to_time(np.maximum(rows.last_event_ms, 0))
    at = np.full(rows.n, header.dtype.itemsize)
    packed = []
    for index, (layout, entries) in enumerate(zip(family.tables, tables, strict=True)):
        count, width = np.bincount(entries.rows, minlength=rows.n), _width(layout, entries, rows.n)
        header[f"t{index}"]["entries"], header[f"t{index}"]["width"] = count, width
        packed.append((layout, entries, at, count, width))
        at = at + count * _sizes(layout)[width]
    text_bytes = text_offsets[first_text]
    lengths_at, texts_at = at, at + 2 * text_counts
    size = texts_at + np.diff(text_bytes)
    size[sum((count for _, _, _, count, _ in packed), start=np.zeros(rows.n, np.int64)) == 0] = 0
    ends = np.cumsum(size)
    base = ends - size
    data = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    live = np.flatnonzero(size)
    _scatter(data, base[live], header[live])
    for layout, entries, table_at, count, width in packed:
        _encode_table(layout, entries, data, base + table_at, count, width)
    _scatter(data, _spread(base + lengths_at, text_counts, 2), np.diff(text_offsets).astype("<u2"))
    data[_spread(base + texts_at, np.diff(text_bytes), 1)] = text_data
    whole = data.tobytes()
    return [whole[start:end] for start, end in zip(base.tolist(), ends.tolist(), strict=True)]


@lru_cache
def _header_dtype(family: Family) -> np.dtype[Any]:
    tables = [(f"t{index}", _TABLE) for index in range(len(family.tables))]
    return np.dtype([("version", "u1"), ("tag", "<u2"), ("last", _TIME), ("texts", "<u2"), *tables])


@lru_cache
def _record(layout: TableLayout, width: int) -> np.dtype[Any]:
    """One entry, with small integers of `_WIDTHS[width]` bytes."""
    small = f"<u{_WIDTHS[width]}"
    packed: dict[str, Any] = {"count": small, "text": small, "float": "<f8", "time": _TIME, "tick": "<u4"}
    key: list[tuple[str, Any]] = [("start", "<u4")] if layout.table.starts else []
    if layout.table.bucket is not None:
        key.append(("bucket", "<u8" if layout.table.bucket == "hash" else small))
    return np.dtype([*key, *((f"c{index}", packed[kind]) for index, kind in enumerate(layout.physical))])


@lru_cache
def _sizes(layout: TableLayout) -> Ints:
    return np.array([_record(layout, width).itemsize for width in range(len(_WIDTHS))])


def _header(family: Family, data: Bytes, there: NDArray[np.intp], at: Ints, lengths: Ints) -> NDArray[Any]:
    dtype = _header_dtype(family)
    short = np.flatnonzero(lengths < dtype.itemsize)
    if len(short):
        raise CorruptRowError(family, int(there[short[0]]), f"{lengths[short[0]]} bytes are too few")
    header = _gather(data, at, dtype)
    wrong = np.flatnonzero((header["version"] != VERSION) | (header["tag"] != family.tag))
    if len(wrong):
        first = header[wrong[0]]
        reason = f"version {first['version']}, layout {first['tag']:04x} where {VERSION}, {family.tag:04x} is expected"
        raise CorruptRowError(family, int(there[wrong[0]]), reason)
    for index in range(len(family.tables)):
        wide = np.flatnonzero(header[f"t{index}"]["width"] >= len(_WIDTHS))
        if len(wide):
            raise CorruptRowError(family, int(there[wide[0]]), f"table {index} has integers of unknown width")
    return header


def _decode_texts(
    family: Family, data: Bytes, there: NDArray[np.intp], at: Ints, counts: Ints, ends: Ints
) -> tuple[pa.StringArray, Ints]:
    """All rows' texts, and the position of each row's first."""
    lengths = _gather(data, _spread(at, counts, 2), np.dtype("<u2")).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    first = np.concatenate([[0], np.cumsum(counts)])
    row_bytes = np.diff(offsets[first])
    bad = np.flatnonzero(at + 2 * counts + row_bytes != ends)
    if len(bad):
        raise CorruptRowError(family, int(there[bad[0]]), "its length is not what its parts add up to")
    texts = from_buffers(offsets, data[_spread(at + 2 * counts, row_bytes, 1)])
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        where = next(row for row, start in enumerate(first[:-1]) if not _is_utf8(texts[start : first[row + 1]]))
        raise CorruptRowError(family, int(there[where]), f"it holds text that is not UTF-8: {error}") from error
    return texts, first[:-1]


def _decode_table(
    layout: TableLayout,
    data: Bytes,
    there: NDArray[np.intp],
    at: Ints,
    counts: Ints,
    widths: NDArray[np.uint8],
    first_text: Ints,
) -> Entries:
    total = int(counts.sum())
    entry_row = np.repeat(np.arange(len(counts)), counts)
    starts = np.zeros(total, np.int64) if layout.table.starts else None
    bucket = layout.table.bucket
    buckets = None if bucket is None else np.zeros(total, np.uint64 if bucket == "hash" else np.int64)
    columns = tuple(np.zeros(total, DTYPES[kind]) for kind in layout.physical)
    for width in np.unique(widths[counts > 0]).tolist():
        rows = np.flatnonzero((widths == width) & (counts > 0))
        dtype = _record(layout, width)
        records = _gather(data, _spread(at[rows], counts[rows], dtype.itemsize), dtype)
        where: Any = slice(None) if len(records) == total else widths[entry_row] == width
        to_text = first_text[entry_row[where]] - 1
        if starts is not None:
            starts[where] = records["start"]
        if buckets is not None:
            buckets[where] = records["bucket"].astype(np.int64) + to_text if bucket == "text" else records["bucket"]
        for index, (kind, column) in enumerate(zip(layout.physical, columns, strict=True)):
            packed = records[f"c{index}"]
            if kind == "time":
                column[where] = _from_time(packed)
            elif kind == "text":
                column[where] = np.where(packed > 0, packed.astype(np.int64) + to_text, -1)
            else:
                column[where] = packed
    return Entries(there[entry_row], buckets, starts, columns)


def _is_utf8(texts: pa.StringArray) -> bool:
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def _check_ranges(
    family: Family,
    layout: TableLayout,
    entries: Entries,
    counts: Ints,
    first_text: Ints,
    text_counts: Ints,
) -> None:
    """Every text is one of the row's own, every cell one of the sketch's: none is a neighbour's."""
    first, end = np.repeat(first_text, counts), np.repeat(first_text + text_counts, counts)
    wrong = np.zeros(len(entries), bool)
    buckets = np.asarray(entries.buckets)
    if layout.table.bucket == "text":
        wrong |= (buckets < first) | (buckets >= end)
    elif layout.table.bucket == "cell":
        wrong |= (buckets < 0) | (buckets >= CELLS)
    for kind, column in zip(layout.physical, entries.columns, strict=True):
        if kind == "text":
            wrong |= (column != -1) & ((column < first) | (column >= end))
    bad = np.flatnonzero(wrong)
    if len(bad):
        raise CorruptRowError(family, int(entries.rows[bad[0]]), "an entry names a text or cell that there is not")


def _encode_table(
    layout: TableLayout, entries: Entries, data: Bytes, at: Ints, counts: Ints, widths: NDArray[np.intp]
) -> None:
    entry_width = widths[entries.rows]
    for width in np.unique(widths[counts > 0]).tolist():
        rows = np.flatnonzero((widths == width) & (counts > 0))
        chosen = entries.take(entry_width == width)
        records = np.zeros(len(chosen), _record(layout, width))
        if chosen.starts is not None:
            records["start"] = chosen.starts
        if chosen.buckets is not None:
            records["bucket"] = chosen.buckets
        for index, (kind, column) in enumerate(zip(layout.physical, chosen.columns, strict=True)):
            records[f"c{index}"] = _to_time(column) if kind == "time" else column
        _scatter(data, _spread(at[rows], counts[rows], records.dtype.itemsize), records)


def _width(layout: TableLayout, entries: Entries, n_rows: int) -> NDArray[np.intp]:
    """intp[n_rows]: the index in `_WIDTHS` that a row's largest small integer needs."""
    largest = np.zeros(n_rows, np.int64)
    small = [column for kind, column in zip(layout.physical, entries.columns, strict=True) if kind in ("count", "text")]
    if entries.buckets is not None and layout.table.bucket != "hash":
        small.append(entries.buckets)
    for column in small:
        np.maximum.at(largest, entries.rows, column)
    return np.searchsorted(np.array([1 << 8, 1 << 16, 1 << 32]), largest, side="right")


def _local_texts(family: Family, rows: Rows) -> tuple[pa.StringArray, Ints, list[Entries]]:
    """The texts that each row uses, where each row's begin, and the tables, their texts numbered from 1 in a row."""
    used: list[tuple[Any, Any]] = []
    for layout, entries in zip(family.tables, rows.tables, strict=True):
        if layout.table.bucket == "text":
            used.append((entries.rows, entries.buckets))
        used += [
            (entries.rows, column)
            for kind, column in zip(layout.physical, entries.columns, strict=True)
            if kind == "text"
        ]
    stride = len(rows.texts) + 1
    pairs = np.unique(
        np.concatenate(
            [row * stride + code for row, code in ((row[code >= 0], code[code >= 0]) for row, code in used)]
            or [np.zeros(0, np.int64)]
        )
    )
    first_text = np.searchsorted(pairs, np.arange(rows.n + 1) * stride)

    def local(row: NDArray[np.intp], code: NDArray[Any]) -> NDArray[Any]:
        return np.where(code < 0, 0, np.searchsorted(pairs, row * stride + code) - first_text[row] + 1)

    tables = [
        Entries(
            entries.rows,
            local(entries.rows, entries.buckets)
            if layout.table.bucket == "text" and entries.buckets is not None
            else entries.buckets,
            entries.starts,
            tuple(
                local(entries.rows, column) if kind == "text" else column
                for kind, column in zip(layout.physical, entries.columns, strict=True)
            ),
        )
        for layout, entries in zip(family.tables, rows.tables, strict=True)
    ]
    return rows.texts.take(pa.array(pairs % stride)), first_text, tables


def _spread(at: Ints, counts: NDArray[Any], step: int) -> Ints:
    """Positions at, at + step, … of `counts` items for each start, one after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(at - before * step, counts) + np.arange(int(counts.sum())) * step


def _gather(data: Bytes, at: Ints, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Records that stand at the given bytes."""
    if len(at) == 0:
        return np.zeros(0, dtype)
    # Gathering whole void records is six times as fast as numpy's field by field copy of a structured dtype.
    every = np.ndarray((len(data) - dtype.itemsize + 1,), np.dtype((np.void, dtype.itemsize)), data, strides=(1,))
    return every[at].view(dtype)


def _scatter(data: Bytes, at: Ints, records: NDArray[Any]) -> None:
    """The inverse of `_gather`."""
    if len(at):
        void = np.dtype((np.void, records.dtype.itemsize))
        every = np.ndarray((len(data) - records.dtype.itemsize + 1,), void, data, strides=(1,))
        every[at] = np.ascontiguousarray(records).view(void)


def _to_time(ms: Ints) -> NDArray[Any]:
    time = np.zeros(len(ms), _TIME)
    # -1 (none) becomes second 0, millisecond 65535, a value that no time has.
    time["s"], time["ms"] = np.maximum(ms, 0) // 1000, np.where(ms < 0, 65535, ms % 1000)
    return time


def _from_time(time: NDArray[Any]) -> Ints:
    ms: Ints = time["s"].astype(np.int64) * 1000 + time["ms"]
    return np.where(time["ms"] == 65535, -1, ms)  # see _to_time
