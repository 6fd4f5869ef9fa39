"""The compiled loops of the codec: see `store.codec` for the format.

`places` say how a table's records are laid out: for each field its kind, or -1 beyond the last. `sizes` are the bytes
of a record, for each of the four widths that small integers can have, first with starts and ticks in full, then near.
Tables in memory are as `Rows.of_pool` has them.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from features.loops import compiled
from features.sketch import CELLS
from features.times import MINUTE_MS, TICK_MS

Ints = NDArray[np.int64]
Bytes = NDArray[np.uint8]

START, COUNT, TIME, WORD, TEXT, BUCKET, CELL, TICK = range(8)
"""Kinds of fields: u4; small; seconds u4 and ms u2; 8 bytes; small, 0 for null; small, never null; small; u4."""
TAG_BYTES: Final = 4
HEAD_BYTES: Final = 12
TABLE_BYTES: Final = 5
WIDTHS: Final = (1, 2, 4, 8)
NEAR: Final = 4
"""Added to a table's width if its starts and ticks are kept as how long before the row's last event they are."""
START_BYTES: Final = (4, 2)
"""In full, and in minutes near the last event."""
TICK_BYTES: Final = (4, 3)
_MINUTE_TICKS: Final = MINUTE_MS // TICK_MS
_U1: Final = np.uint64(1)
_SHORT, _OTHER, _WIDE, _LONG, _UNEVEN, _UNKNOWN = range(1, 7)
REASONS: Final = {
    _WIDE: "a table has integers of unknown width",
    _LONG: "its tables are longer than its bytes",
    _UNEVEN: "its length is not what its parts add up to",
    _UNKNOWN: "an entry names a text, cell or time that there is not",
}
TOO_SHORT: Final = _SHORT
OTHER_LAYOUT: Final = _OTHER


@compiled
def _read(data: Bytes, at: int, size: int) -> int:
    """A little-endian integer."""
    value = 0
    for index in range(size):
        value |= int(data[at + index]) << (8 * index)
    return value


# The next four are `_read` of a fixed size, for loops over entries. A signed index may be negative, and is looked at;
# an unsigned one is not, so that the bytes are read in one go: six times as fast.
@compiled
def _read_2(data: Bytes, at: int) -> int:
    p = np.uint64(at)
    return int(np.int64(data[p]) | np.int64(data[p + _U1]) << 8)


@compiled
def _read_3(data: Bytes, at: int) -> int:
    value: int = _read_2(data, at) | int(data[np.uint64(at + 2)]) << 16
    return value


@compiled
def _read_4(data: Bytes, at: int) -> int:
    value: int = _read_2(data, at) | _read_2(data, at + 2) << 16
    return value


@compiled
def _read_8(data: Bytes, at: int) -> int:
    value: int = _read_4(data, at) | _read_4(data, at + 4) << 32
    return value


@compiled
def _write_2(data: Bytes, at: int, value: int) -> None:
    p = np.uint64(at)
    data[p], data[p + _U1] = value & 255, (value >> 8) & 255


@compiled
def _write_3(data: Bytes, at: int, value: int) -> None:
    _write_2(data, at, value)
    data[np.uint64(at + 2)] = value >> 16


@compiled
def _write_4(data: Bytes, at: int, value: int) -> None:
    _write_2(data, at, value)
    _write_2(data, at + 2, value >> 16)


@compiled
def _write_8(data: Bytes, at: int, value: int) -> None:
    _write_4(data, at, value)
    _write_4(data, at + 4, value >> 32)


@compiled
def _scan(  # noqa: PLR0913, PLR0917  # compiled code takes arrays, not objects
    data: Bytes,
    lengths: Ints,
    tags: Bytes,
    parts: Ints,
    sizes: Ints,
    latest_ms: Ints,
    text_counts: Ints,
    counts: Ints,
    widths: Ints,
) -> tuple[int, int, int]:
    """Reads and checks the heads of all rows, and writes to its last four arguments; the others are `unpack`'s.

    Returns the first that is bad (-1 for none), what is wrong with it, and the bytes of all texts.
    """
    n_rows = latest_ms.shape[1]
    end = text_bytes = 0
    for blob in range(len(lengths)):
        begin, end = end, end + lengths[blob]
        part, row = blob // n_rows, blob % n_rows
        first_table, last_table = parts[part - 1] if part else 0, parts[part]
        if begin == end:
            continue
        # Before its length: a row of another layout may be shorter than any of this one.
        for index in range(TAG_BYTES if begin + TAG_BYTES <= end else 0):
            if data[begin + index] != tags[part, index]:
                return blob, _OTHER, 0
        at = begin + HEAD_BYTES + (last_table - first_table) * TABLE_BYTES
        if at > end:
            return blob, _SHORT, 0
        latest_ms[part, row] = _read_time(data, begin + TAG_BYTES)
        n_texts = _read(data, begin + TAG_BYTES + 6, 2)
        text_counts[blob] = n_texts
        for table in range(first_table, last_table):
            head = begin + HEAD_BYTES + (table - first_table) * TABLE_BYTES
            width = data[head + 4]
            if width >= sizes.shape[1]:
                return blob, _WIDE, 0
            counts[table, row], widths[table, row] = _read(data, head, 4), width
            at += counts[table, row] * sizes[table, width]
        if at + 2 * n_texts > end:
            return blob, _LONG, 0
        of_row = 0
        for index in range(n_texts):
            of_row += _read(data, at + 2 * index, 2)
        if at + 2 * n_texts + of_row != end:
            return blob, _UNEVEN, 0
        text_bytes += of_row
    return -1, 0, text_bytes


@compiled
def _read_time(data: Bytes, at: int) -> int:
    ms = _read_2(data, at + 4)
    return -1 if ms == 65535 else _read_4(data, at) * 1000 + ms


@compiled
def _unpack_near(data: Bytes, at: int, step: int, n: int, kind: int, latest_ms: int, pool: Ints, slot: int) -> bool:
    """Starts or ticks of a row's n entries that are near its last event: whether there are such times."""
    for entry in range(n):
        place = at + entry * step
        if kind == START:
            time = (latest_ms // MINUTE_MS - _read_2(data, place)) * _MINUTE_TICKS
        else:
            time = latest_ms // TICK_MS - _read_3(data, place)
        if time < 0:
            return False
        pool[np.uint64(slot + entry)] = time
    return True


@compiled
def _unpack_field(  # noqa: PLR0911, PLR0912, PLR0913, PLR0917  # cases, one a kind; slices would cost as much as reading
    data: Bytes,
    at: int,
    step: int,
    n: int,
    kind: int,
    width: int,
    latest_ms: int,
    first_text: int,
    n_texts: int,
    pool: Ints,
    slot: int,
) -> int:
    """One field of a row's n entries, `step` bytes apart: its size, or -1 if one names what there is not."""
    if kind in (START, TICK):
        near = width // NEAR
        if not near:
            for entry in range(n):
                pool[np.uint64(slot + entry)] = _read_4(data, at + entry * step)
        elif not _unpack_near(data, at, step, n, kind, latest_ms, pool, slot):
            return -1
        return START_BYTES[near] if kind == START else TICK_BYTES[near]
    if kind == TIME:
        for entry in range(n):
            pool[np.uint64(slot + entry)] = _read_time(data, at + entry * step)
        return 6
    if kind == WORD:
        for entry in range(n):
            pool[np.uint64(slot + entry)] = _read_8(data, at + entry * step)
        return 8
    width %= NEAR
    if width == 0:
        for entry in range(n):
            pool[np.uint64(slot + entry)] = data[np.uint64(at + entry * step)]
    elif width == 1:
        for entry in range(n):
            pool[np.uint64(slot + entry)] = _read_2(data, at + entry * step)
    elif width == 2:
        for entry in range(n):
            pool[np.uint64(slot + entry)] = _read_4(data, at + entry * step)
    else:
        for entry in range(n):
            pool[np.uint64(slot + entry)] = _read_8(data, at + entry * step)
    if kind == CELL:
        for entry in range(slot, slot + n):
            if not 0 <= pool[entry] < CELLS:
                return -1
    elif kind != COUNT:
        for entry in range(slot, slot + n):
            if not (kind == BUCKET) <= pool[entry] <= n_texts:
                return -1
            pool[entry] = first_text + pool[entry] - 1 if pool[entry] else -1
    return 1 << width


@compiled
def unpack(
    data: Bytes, lengths: Ints, n_rows: int, tags: Bytes, parts: Ints, sizes: Ints, places: Ints, lines: Ints
) -> tuple[int, int, Ints, Ints, Ints, NDArray[np.int32], Bytes, Ints]:
    """Reads rows.

    Args:
        data: uint8[bytes], all rows of the first part (family), then all of the next …
        lengths: int64[parts * rows], the bytes of each.
        n_rows: how many rows there are.
        tags: uint8[parts, 4], the tag of the layout that is expected.
        parts: int64[parts], the tables up to the end of each part.
        sizes: int64[tables, 8].
        places: int64[tables, fields].
        lines: int64[tables], how many numbers an entry is in memory.

    Returns:
        The first that is bad (-1 for none) and what is wrong with it; the time of each row's last event,
        int64[parts, rows]; all tables in memory, one after the other, int64[…], and their entries, int64[tables]; the
        texts' offsets, int32[texts + 1], and bytes, uint8[…], and how many texts each has, int64[parts * rows].
    """
    n_tables = len(places)
    latest_ms = np.full((len(parts), n_rows), -1, np.int64)
    text_counts = np.zeros(len(lengths), np.int64)
    counts = np.zeros((n_tables, n_rows), np.int64)
    widths = np.zeros((n_tables, n_rows), np.int64)
    totals = np.zeros(n_tables, np.int64)
    bad, reason, text_bytes = _scan(data, lengths, tags, parts, sizes, latest_ms, text_counts, counts, widths)
    slots = np.zeros(n_tables, np.int64)
    slot = 0
    if bad < 0:
        for table in range(n_tables):
            slots[table] = slot
            totals[table] = counts[table].sum()
            slot += totals[table] * lines[table]
    pool = np.empty(slot, np.int64)
    text_offsets = np.zeros((text_counts.sum() if bad < 0 else 0) + 1, np.int32)
    text_data = np.empty(text_bytes, np.uint8)
    first_text = text_byte = end = 0
    for blob in range(len(lengths) if bad < 0 else 0):
        begin, end = end, end + lengths[blob]
        if begin == end:
            continue
        part, row = blob // n_rows, blob % n_rows
        first_table, last_table = parts[part - 1] if part else 0, parts[part]
        at = begin + HEAD_BYTES + (last_table - first_table) * TABLE_BYTES
        n_texts, latest = text_counts[blob], latest_ms[part, row]
        for table in range(first_table, last_table):
            n, width, slot = counts[table, row], widths[table, row], slots[table]
            if n == 0:
                continue
            step = sizes[table, width]
            for entry in range(slot, slot + n):
                pool[np.uint64(entry)] = row
            field_at = at
            for field in range(lines[table] - 1):
                slot += totals[table]
                kind = places[table, field]
                size = _unpack_field(data, field_at, step, n, kind, width, latest, first_text, n_texts, pool, slot)
                if size < 0:
                    return blob, _UNKNOWN, latest_ms, pool, totals, text_offsets, text_data, text_counts
                field_at += size
            at += n * step
            slots[table] += n
        for index in range(n_texts):
            text_byte += _read_2(data, at + 2 * index)
            text_offsets[first_text + index + 1] = text_byte
        behind = end - text_byte
        for position in range(text_offsets[first_text], text_byte):
            text_data[np.uint64(position)] = data[np.uint64(position + behind)]
        first_text += n_texts
    return bad, reason, latest_ms, pool, totals, text_offsets, text_data, text_counts


@compiled
def pack(  # noqa: PLR0912, PLR0913, PLR0915, PLR0917  # one pass over all rows; slices of it would cost as much
    tags: Bytes,
    parts: Ints,
    sizes: Ints,
    places: Ints,
    lines: Ints,
    latest_ms: Ints,
    pool: Ints,
    entries: Ints,
    text_offsets: NDArray[np.int32],
    text_data: Bytes,
) -> tuple[Bytes, Ints]:
    """The inverse of `unpack`: the arguments are its arguments and answers.

    Args:
        tags: uint8[parts, 4].
        parts: int64[parts].
        sizes: int64[tables, 8].
        places: int64[tables, fields].
        lines: int64[tables].
        latest_ms: int64[parts, rows].
        pool: int64[…]; the entries of each table are sorted by row.
        entries: int64[tables].
        text_offsets: int32[texts + 1]; the texts are sorted.
        text_data: uint8[…].

    Returns:
        All rows of the first part, then all of the next …, uint8[bytes], and where each ends, int64[parts * rows]. A
        row without entries has no bytes.
    """
    n_parts, n_rows = latest_ms.shape
    n_tables = len(places)
    slots = np.zeros(n_tables, np.int64)
    most = n_parts * n_rows * HEAD_BYTES + n_tables * n_rows * TABLE_BYTES
    for table in range(n_tables):
        slots[table] = slots[table - 1] + lines[table - 1] * entries[table - 1] if table else 0
        most += entries[table] * sizes[table, 3]
        for field in range(lines[table] - 1):
            if places[table, field] in (TEXT, BUCKET):
                first = slots[table] + (1 + field) * entries[table]
                for slot in range(first, first + entries[table]):
                    code = pool[slot]
                    most += 2 + text_offsets[code + 1] - text_offsets[code] if code >= 0 else 0
    data = np.empty(most, np.uint8)
    ends = np.empty(n_parts * n_rows, np.int64)
    # Of each text, the last row that used it, and its number there.
    users, numbers = np.full(len(text_offsets), -1, np.int64), np.zeros(len(text_offsets), np.int64)
    used = np.empty(len(text_offsets), np.int64)
    done, stops = np.zeros(n_tables, np.int64), np.zeros(n_tables, np.int64)
    end = 0
    for blob in range(len(ends)):
        part, row = blob // n_rows, blob % n_rows
        first_table, last_table = parts[part - 1] if part else 0, parts[part]
        n_entries = n_used = 0
        for table in range(first_table, last_table):
            stop = done[table]
            while stop < entries[table] and pool[slots[table] + stop] == row:
                stop += 1
            stops[table] = stop
            n_entries += stop - done[table]
            for field in range(lines[table] - 1):
                if places[table, field] in (TEXT, BUCKET):
                    first = slots[table] + (1 + field) * entries[table]
                    for slot in range(first + done[table], first + stop):
                        code = pool[slot]
                        if code >= 0 and users[code] != blob:
                            users[code] = blob
                            used[n_used] = code
                            n_used += 1
        ends[blob] = end
        if n_entries == 0:
            continue
        used[:n_used].sort()
        for number in range(n_used):
            numbers[used[number]] = number + 1
        data[end : end + TAG_BYTES] = tags[part]
        latest = max(latest_ms[part, row], 0)
        _write_time(data, end + TAG_BYTES, latest)
        _write_2(data, end + TAG_BYTES + 6, n_used)
        at = end + HEAD_BYTES + (last_table - first_table) * TABLE_BYTES
        for table in range(first_table, last_table):
            head = end + HEAD_BYTES + (table - first_table) * TABLE_BYTES
            n, first = stops[table] - done[table], slots[table] + done[table]
            width = _width(places[table], n, first, entries[table], latest, pool, numbers)
            _write_4(data, head, n)
            data[head + 4] = width
            field_at = at
            for field in range(lines[table] - 1):
                first += entries[table]
                kind = places[table, field]
                step = sizes[table, width]
                field_at += _pack_field(data, field_at, step, n, kind, width, latest, first, pool, numbers)
            at += n * sizes[table, width]
            done[table] = stops[table]
        for index in range(n_used):
            begin, length = text_offsets[used[index]], text_offsets[used[index] + 1] - text_offsets[used[index]]
            _write_2(data, at + 2 * index, length)
        at += 2 * n_used
        for index in range(n_used):
            begin, length = text_offsets[used[index]], text_offsets[used[index] + 1] - text_offsets[used[index]]
            for position in range(length):
                data[np.uint64(at + position)] = text_data[np.uint64(begin + position)]
            at += length
        ends[blob] = end = at
    return data[:end], ends


@compiled
def _width(places: Ints, n: int, first: int, step: int, latest_ms: int, pool: Ints, numbers: Ints) -> int:
    """What the small integers of a row's n entries need, as an index into `WIDTHS`; and `NEAR` if they can be that."""
    bits = 0
    near = NEAR
    for kind in places:
        first += step
        if kind in (COUNT, CELL):
            for slot in range(first, first + n):
                bits |= pool[slot]
        elif kind in (TEXT, BUCKET):
            for slot in range(first, first + n):
                bits |= numbers[pool[slot]] if pool[slot] >= 0 else 0
        elif kind in (START, TICK) and not _all_near(kind, pool[first : first + n], latest_ms):
            near = 0
    width = 0
    while width < 3 and bits >> (8 << width):
        width += 1
    return width | near


@compiled
def _all_near(kind: int, ticks: Ints, latest_ms: int) -> bool:
    """Whether starts or ticks can be kept as how long before the row's last event they are."""
    for tick in ticks:
        minutes, rest = divmod(tick, _MINUTE_TICKS)
        if kind == START and (rest or not 0 <= latest_ms // MINUTE_MS - minutes < 1 << 16):
            return False
        if kind == TICK and not 0 <= latest_ms // TICK_MS - tick < 1 << 24:
            return False
    return True


@compiled
def _pack_near(data: Bytes, at: int, step: int, n: int, kind: int, latest_ms: int, slot: int, pool: Ints) -> None:
    """The inverse of `_unpack_near`."""
    for entry in range(n):
        tick, place = pool[np.uint64(slot + entry)], at + entry * step
        if kind == START:
            _write_2(data, place, latest_ms // MINUTE_MS - tick // _MINUTE_TICKS)
        else:
            _write_3(data, place, latest_ms // TICK_MS - tick)


@compiled
def _pack_field(  # noqa: PLR0912, PLR0913, PLR0917  # as of `_unpack_field`
    data: Bytes,
    at: int,
    step: int,
    n: int,
    kind: int,
    width: int,
    latest_ms: int,
    slot: int,
    pool: Ints,
    numbers: Ints,
) -> int:
    """One field of a row's n entries, `step` bytes apart: returns its size."""
    if kind in (START, TICK):
        near = width // NEAR
        if near:
            _pack_near(data, at, step, n, kind, latest_ms, slot, pool)
        else:
            for entry in range(n):
                _write_4(data, at + entry * step, pool[np.uint64(slot + entry)])
        return START_BYTES[near] if kind == START else TICK_BYTES[near]
    if kind == TIME:
        for entry in range(n):
            _write_time(data, at + entry * step, pool[np.uint64(slot + entry)])
        return 6
    if kind == WORD:
        for entry in range(n):
            _write_8(data, at + entry * step, pool[np.uint64(slot + entry)])
        return 8
    width %= NEAR
    for entry in range(n):
        value = pool[np.uint64(slot + entry)]
        if kind in (TEXT, BUCKET):
            value = numbers[value] if value >= 0 else 0
        place = at + entry * step
        if width == 0:
            data[np.uint64(place)] = value
        elif width == 1:
            _write_2(data, place, value)
        elif width == 2:
            _write_4(data, place, value)
        else:
            _write_8(data, place, value)
    return 1 << width


@compiled
def _write_time(data: Bytes, at: int, ms: int) -> None:
    _write_4(data, at, 0 if ms < 0 else ms // 1000)
    # A millisecond that no time has stands for none.
    _write_2(data, at + 4, 65535 if ms < 0 else ms % 1000)
