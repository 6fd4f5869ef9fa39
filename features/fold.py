"""Folding: the only arithmetic on state, in loops that numba compiles. `merge` folds tiles that meet, `evaluate` folds
the tiles of a window.

Partials are columns of int64; those of floats hold the bits of a float64, so that a table is one array. Every loop
therefore takes a table twice: as it is and as a view of floats.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from features.loops import compiled
from features.partials import (
    AnyPartial,
    Decay,
    EarliestNumber,
    EarliestText,
    FirstSeen,
    Greatest,
    GreatestText,
    LatestNumber,
    LatestText,
    Least,
    Moments,
    Seen,
    SeenTick,
    Tally,
    Total,
)
from features.times import TICK_MS, tail_ticks

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

tail_of: Final = compiled(tail_ticks)
"""The window rule, `features.times.tail_ticks`, for loops."""
NEVER_MS: Final = 1 << 62
_TALLY, _TOTAL, _LEAST, _GREATEST, _MOMENTS, _SEEN, _SEEN_TICK, _NUMBER, _TEXT, _DECAY = range(10)
_GREATEST_TEXT, _FIRST_SEEN, _FIRST_NUMBER, _FIRST_TEXT = range(10, 14)
_OPS: Final[dict[type[AnyPartial], int]] = {
    Tally: _TALLY,
    Total: _TOTAL,
    Least: _LEAST,
    Greatest: _GREATEST,
    Moments: _MOMENTS,
    Seen: _SEEN,
    SeenTick: _SEEN_TICK,
    LatestNumber: _NUMBER,
    LatestText: _TEXT,
    Decay: _DECAY,
    GreatestText: _GREATEST_TEXT,
    FirstSeen: _FIRST_SEEN,
    EarliestNumber: _FIRST_NUMBER,
    EarliestText: _FIRST_TEXT,
}


def operations(partials: tuple[AnyPartial, ...]) -> Ints:
    """int64[partials, 3]: the operation of each, its first column, and its half-life in ms."""
    found, column = [], 0
    for partial in partials:
        found.append((_OPS[type(partial)], column, partial.half_life_ms if isinstance(partial, Decay) else 0))
        column += len(partial.physical)
    return np.array(found, np.int64).reshape(-1, 3)


@compiled
def begin(operation: Ints, into: Ints, into_floats: Floats, at: int, time_ms: int, value: int) -> None:
    """Writes the partial of one event to entry `at`; its `value` is a text's code, or the bits of a float64."""
    op, c = operation[0], operation[1]
    if op in (_TALLY, _MOMENTS):
        into[c, at] = 1
    elif op in (_TOTAL, _LEAST, _GREATEST, _GREATEST_TEXT):
        into[c, at] = value
    elif op == _SEEN_TICK:
        into[c, at] = time_ms // TICK_MS
    else:
        into[c, at] = time_ms
    if op in (_MOMENTS, _NUMBER, _TEXT, _DECAY, _FIRST_NUMBER, _FIRST_TEXT):
        into[c + 1, at] = value
    if op == _MOMENTS:
        into_floats[c + 2, at] = 0.0


@compiled
def fold(  # noqa: PLR0912  # a list of cases, one an operation
    operation: Ints, into: Ints, into_floats: Floats, slots: Ints, table: Ints, floats: Floats
) -> None:
    """Adds the partial in each entry of `table` to that in its slot (-1 for none) of `into`, one after the other."""
    op, c = operation[0], operation[1]
    to, of, to_floats, of_floats = into[c], table[c], into_floats[c], floats[c]
    if op == _TALLY:
        for at in range(len(slots)):
            if slots[at] >= 0:
                to[np.uint64(slots[at])] += of[np.uint64(at)]
    elif op == _TOTAL:
        for at in range(len(slots)):
            if slots[at] >= 0:
                to_floats[slots[at]] += of_floats[at]
    elif op in (_SEEN, _SEEN_TICK, _GREATEST_TEXT):
        for at in range(len(slots)):
            if slots[at] >= 0:
                to[slots[at]] = max(to[slots[at]], of[at])
    elif op == _LEAST:
        for at in range(len(slots)):
            if slots[at] >= 0:
                to_floats[slots[at]] = min(to_floats[slots[at]], of_floats[at])
    elif op == _GREATEST:
        for at in range(len(slots)):
            if slots[at] >= 0:
                to_floats[slots[at]] = max(to_floats[slots[at]], of_floats[at])
    elif op == _MOMENTS:
        _fold_moments(c, into, into_floats, slots, table, floats)
    elif op == _NUMBER:
        to_number, number = into_floats[c + 1], floats[c + 1]
        for at in range(len(slots)):
            slot = slots[at]
            if slot >= 0 and (of[at] > to[slot] or (of[at] == to[slot] and number[at] > to_number[slot])):
                to[slot], to_number[slot] = of[at], number[at]
    elif op == _TEXT:
        to_text, text = into[c + 1], table[c + 1]
        for at in range(len(slots)):
            slot = slots[at]
            if slot >= 0 and (of[at] > to[slot] or (of[at] == to[slot] and text[at] > to_text[slot])):
                to[slot], to_text[slot] = of[at], text[at]
    elif op >= _FIRST_SEEN:
        _fold_earliest(op, c, into, into_floats, slots, table, floats)
    else:
        _fold_decayed(c, operation[2], into, into_floats, slots, table, floats)


@compiled
def _fold_moments(c: int, into: Ints, into_floats: Floats, slots: Ints, table: Ints, floats: Floats) -> None:
    """Pairwise, as Chan, Golub and LeVeque (1979) do; equal means stay exactly what they are."""
    for at in range(len(slots)):
        to = slots[at]
        if to < 0:
            continue
        n, total = table[c, at], into[c, to] + table[c, at]
        if n == total:
            into_floats[c + 1, to], into_floats[c + 2, to] = floats[c + 1, at], floats[c + 2, at]
        elif n > 0:
            apart = floats[c + 1, at] - into_floats[c + 1, to]
            into_floats[c + 1, to] += apart * (n / total)
            into_floats[c + 2, to] += floats[c + 2, at] + apart * apart * (n / total) * into[c, to]
        into[c, to] = total


@compiled
def _fold_earliest(op: int, c: int, into: Ints, into_floats: Floats, slots: Ints, table: Ints, floats: Floats) -> None:
    """The earlier of two times, none (-1) being later than all; of equal ones the smaller value."""
    for at in range(len(slots)):
        to = slots[at]
        if to < 0 or table[c, at] < 0:
            continue
        earlier = into[c, to] < 0 or table[c, at] < into[c, to]
        if table[c, at] == into[c, to]:
            earlier |= op == _FIRST_NUMBER and floats[c + 1, at] < into_floats[c + 1, to]
            earlier |= op == _FIRST_TEXT and table[c + 1, at] < into[c + 1, to]
        if earlier:
            into[c, to] = table[c, at]
            if op != _FIRST_SEEN:
                into[c + 1, to] = table[c + 1, at]


@compiled
def _fold_decayed(
    c: int, half_life_ms: int, into: Ints, into_floats: Floats, slots: Ints, table: Ints, floats: Floats
) -> None:
    """Of two amplitudes, the earlier one is brought to the later one's time."""
    for at in range(len(slots)):
        to = slots[at]
        if to < 0:
            continue
        later_ms = table[c, at] - into[c, to]
        if later_ms > 0:
            aged = into_floats[c + 1, to]
            # Nothing stays nothing (-0.0): an empty slot's time is no time. What is too small becomes 0.
            if aged != 0.0:
                aged = aged * 2.0 ** (-later_ms / half_life_ms) + 0.0
            into_floats[c + 1, to] = aged + floats[c + 1, at]
            into[c, to] = table[c, at]
        else:
            into_floats[c + 1, to] += floats[c + 1, at] * 2.0 ** (later_ms / half_life_ms)


@compiled
def tails_of(windows: Ints, now_ms: int) -> Ints:
    """int64[windows]: the first tick inside each; `windows` begin with width and hop in ms."""
    tails = np.empty(len(windows), np.int64)
    for window in range(len(windows)):
        tails[window] = tail_of(now_ms, windows[window, 0], windows[window, 1])
    return tails


@compiled
def tails_at(windows: Ints, now_ms: Ints) -> Ints:
    """int64[times, windows]: as `tails_of`, at each of some times."""
    tails = np.empty((len(now_ms), len(windows)), np.int64)
    for at in range(len(now_ms)):
        tails[at] = tails_of(windows, now_ms[at])
    return tails


@compiled
def _groups(lines: Ints, has_starts: int) -> tuple[Ints, Ints]:
    """The group of each entry, a run of equal row and bucket; and each group's first entry."""
    rows, buckets = lines[0], lines[1 + has_starts]
    groups = np.empty(len(rows), np.int64)
    firsts = np.empty(len(rows), np.int64)
    n = 0
    for entry in range(len(rows)):
        if entry == 0 or rows[entry] != rows[entry - 1] or buckets[entry] != buckets[entry - 1]:
            firsts[n] = entry
            n += 1
        groups[entry] = n - 1
    return groups, firsts[:n]


@compiled
def _slots(lines: Ints, groups: Ints, n_groups: int, windows: Ints, now_ms: Ints) -> Ints:
    """Where each entry is counted first: at its group in the finest window that holds it; -1 for nowhere."""
    tails, now_tick = tails_of(windows, now_ms[0]), now_ms[0] // TICK_MS
    rows, starts = lines[0], lines[1]
    slots = np.empty(len(groups), np.int64)
    for entry in range(len(groups)):
        p = np.uint64(entry)
        if len(now_ms) > 1 and (entry == 0 or rows[p] != rows[p - np.uint64(1)]):
            tails, now_tick = tails_of(windows, now_ms[rows[p]]), now_ms[rows[p]] // TICK_MS
        # Longer windows begin earlier: the first that holds the tile is the finest, and all after it hold it too.
        window = 0
        for tail in tails:
            window += starts[p] < tail
        # Of the future, only the tile that holds now has begun.
        held = window < len(windows) and starts[p] <= now_tick
        slots[p] = window * n_groups + groups[p] if held else -1
    return slots


@compiled
def _fold_windows(
    operations: Ints, empty: Ints, is_float: NDArray[np.bool_], table: Ints, slots: Ints, totals: Ints, n_groups: int
) -> None:
    """Writes the partials of each group over each window to `totals`: float64 (as bits)[columns, windows * groups]."""
    total_floats, floats = totals.view(np.float64), table.view(np.float64)
    for column in range(len(totals)):
        totals[column] = empty[column]
    longer = np.arange(n_groups, totals.shape[1])
    for index in range(len(operations)):
        fold(operations[index], totals, total_floats, slots, table, floats)
        fold(operations[index], totals, total_floats, longer, totals, total_floats)
    for column in range(len(totals)):
        if not is_float[column]:
            for at in range(totals.shape[1]):
                total_floats[column, at] = totals[column, at]


@compiled
def fold_tables(  # noqa: PLR0913, PLR0917  # compiled code takes arrays, not objects
    pool: Ints,
    sizes: Ints,
    wanted: NDArray[np.bool_],
    shapes: Ints,
    operations: Ints,
    empty: Ints,
    is_float: NDArray[np.bool_],
    windows: Ints,
    now_ms: Ints,
    n_rows: int,
) -> tuple[Floats, Ints, Ints]:
    """The partials of each group of each table over each window. A group is a row, or a (row, bucket) pair.

    Args:
        pool: int64[…], the lines of all tables: see `features.rows.Rows.of_pool`.
        sizes: int64[tables], entries.
        wanted: bool[tables], whether to fold it.
        shapes: int64[tables, 6]: lines, whether there are starts, whether there are buckets, columns, windows (1 where
            there are no starts), partials.
        operations: int64[partials, 3], of all tables: see `operations`.
        empty: int64[columns], of all tables: each column's identity.
        is_float: bool[columns], of all tables.
        windows: int64[windows, 2], of all tables, each table's shortest first: width and hop in ms.
        now_ms: int64[1 or n_rows], query time: one for all rows, or each row's own.
        n_rows: how many rows there are.

    Returns:
        The totals, float64[columns, windows, groups] of each table one after the other (integers are exact up to 2^53);
        how many groups each table has (0 if it was not wanted); and the first entry of each group, of tables with
        buckets, one after the other.
    """
    n_groups = np.zeros(len(sizes), np.int64)
    totals = np.empty(0, np.int64)
    firsts = np.empty(0, np.int64)
    # Twice: first to see how much there is, then to fold it.
    for folding in range(2):
        pool_at = first_column = first_operation = first_window = totals_at = firsts_at = 0
        for index in range(len(sizes)):
            n_lines, has_starts, has_buckets, n_columns, n_windows, n_operations = shapes[index]
            lines = pool[pool_at : pool_at + n_lines * sizes[index]].reshape((n_lines, sizes[index]))
            if wanted[index]:
                groups, n = lines[0], n_rows
                if has_buckets:
                    groups, first = _groups(lines, has_starts)
                    n = len(first)
                    if folding:
                        firsts[firsts_at : firsts_at + n] = first
                    firsts_at += n
                n_groups[index] = n
                size = n_columns * n_windows * n
                if folding:
                    slots = groups
                    if has_starts:
                        slots = _slots(lines, groups, n, windows[first_window : first_window + n_windows], now_ms)
                    _fold_windows(
                        operations[first_operation : first_operation + n_operations],
                        empty[first_column : first_column + n_columns],
                        is_float[first_column : first_column + n_columns],
                        lines[n_lines - n_columns :],
                        slots,
                        totals[totals_at : totals_at + size].reshape((n_columns, n_windows * n)),
                        n,
                    )
                totals_at += size
            pool_at += n_lines * sizes[index]
            first_column += n_columns
            first_operation += n_operations
            first_window += n_windows
        if not folding:
            totals = np.empty(totals_at, np.int64)
            firsts = np.empty(firsts_at, np.int64)
    return totals.view(np.float64), n_groups, firsts


@compiled
def next_changes(pool: Ints, sizes: Ints, shapes: Ints, windows: Ints, now_ms: int, n_rows: int) -> Ints:
    """int64[rows]: when a tile of each row next enters or leaves a window; arguments as of `fold_tables`."""
    changes = np.full(n_rows, NEVER_MS, np.int64)
    pool_at = first_window = 0
    for index in range(len(sizes)):
        n_lines, has_starts, n_windows = shapes[index, 0], shapes[index, 1], shapes[index, 4]
        lines = pool[pool_at : pool_at + n_lines * sizes[index]].reshape((n_lines, sizes[index]))
        if has_starts:
            own = windows[first_window : first_window + n_windows]
            finest = _slots(lines, np.zeros(sizes[index], np.int64), 1, own, np.full(1, now_ms))
            for entry in range(sizes[index]):
                row, start_ms = lines[0, entry], lines[1, entry] * TICK_MS
                if start_ms > now_ms:
                    changes[row] = min(changes[row], start_ms)
                elif finest[entry] >= 0:
                    # It leaves the finest window that holds it once that window's tail is past its start.
                    width_ms, hop_ms = own[finest[entry]]
                    changes[row] = min(changes[row], width_ms + hop_ms * (start_ms // hop_ms + 1))
        pool_at += n_lines * sizes[index]
        first_window += n_windows
    return changes


@compiled
def groups_of(table: int, n_groups: Ints, firsts: Ints, shapes: Ints, pool: Ints, sizes: Ints) -> tuple[Ints, Ints]:
    """int64[groups] twice: the row and the bucket of each group of a table with buckets; arguments as of `ranked`."""
    first_at = pool_at = 0
    for each in range(table):
        first_at += n_groups[each] if shapes[each, 2] else 0
        pool_at += shapes[each, 0] * sizes[each]
    rows, buckets = np.empty(n_groups[table], np.int64), np.empty(n_groups[table], np.int64)
    for group in range(n_groups[table]):
        entry = pool_at + firsts[first_at + group]
        rows[group], buckets[group] = pool[entry], pool[entry + (1 + shapes[table, 1]) * sizes[table]]
    return rows, buckets


@compiled
def ranked(  # noqa: PLR0913, PLR0917  # as of `fold_tables`
    totals: Floats,
    n_groups: Ints,
    firsts: Ints,
    shapes: Ints,
    pool: Ints,
    sizes: Ints,
    table: int,
    column: int,
    window: int,
    least: Ints,
    k: int,
    ties: int,
) -> tuple[Ints, Ints]:
    """Up to k buckets of each row, those of the largest totals, largest first.

    Args:
        totals: as `fold_tables` gives them, like the next two.
        n_groups: int64[tables].
        firsts: int64[…].
        shapes: int64[tables, 6], as `fold_tables` takes them, like the next two.
        pool: int64[…].
        sizes: int64[tables].
        table: which, of those with buckets.
        column: of which total, in which `window`.
        window: see `column`.
        least: int64[1 or rows], for all rows or each: buckets of smaller totals are left out.
        k: how many of a row.
        ties: 1 if of equal totals the larger bucket comes first, -1 if the smaller.

    Returns:
        int64[…] twice, the row and the bucket of each, by row.
    """
    rows, buckets = groups_of(table, n_groups, firsts, shapes, pool, sizes)
    first_total = (column * shapes[table, 4] + window) * n_groups[table]
    for each in range(table):
        first_total += shapes[each, 3] * shapes[each, 4] * n_groups[each]
    keys = totals[first_total : first_total + n_groups[table]]
    order = np.empty(len(rows), np.int64)
    n = first = 0
    for group in range(len(rows)):
        if group and rows[group] != rows[group - 1]:
            first = n = min(n, first + k)
        if keys[group] < least[rows[group] if len(least) > 1 else 0]:
            continue
        at = n
        while at > first:
            before = order[at - 1]
            if keys[before] > keys[group] or (
                keys[before] == keys[group] and ties * buckets[before] > ties * buckets[group]
            ):
                break
            order[at] = before
            at -= 1
        order[at] = group
        n += 1
    order = order[: min(n, first + k)]
    return rows[order], buckets[order]
