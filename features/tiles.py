"""Tiles that meet: what `merge` does to one table of many rows, in loops that numba compiles.

Tables are int64[lines, entries], as `features.rows` has them: the row of each entry, its start and bucket where the
table has them, and its columns. Those of state are sorted by row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from features.fold import begin, fold, tails_of
from features.loops import compiled
from features.sketch import cells
from features.times import TICK_MS

Ints = NDArray[np.int64]
Keys = NDArray[np.uint64]
Mask = NDArray[np.bool_]


@compiled
def merge_tables(  # noqa: PLR0913, PLR0917  # compiled code takes arrays, not objects
    pool: Ints,
    sizes: Ints,
    recode: Ints,
    n_rows: int,
    now_ms: int,
    shapes: Ints,
    operations: Ints,
    empty: Ints,
    measures: Ints,
    kinds: Ints,
    ageing: Ints,
    recency: Ints,
    is_text: Mask,
    rows: Ints,
    times_ms: Ints,
    takes: Mask,
    values: Ints,
    buckets: Ints,
    has_bucket: Mask,
) -> tuple[Ints, Ints, Ints]:
    """Adds events to all tables of rows.

    Args:
        pool: int64[…], the lines of all tables: see `features.rows.Rows.of_pool`.
        sizes: int64[tables], entries.
        recode: int64[texts + 1], what codes in the pool become; the last is -1, for null.
        n_rows: how many rows there are.
        now_ms: see `features.kernel.merge`.
        shapes: int64[tables, 6], see `features.fold.fold_tables`, like the next two.
        operations: int64[partials, 3], of all tables.
        empty: int64[columns], of all tables.
        measures: int64[partials], what goes into each: its place among `takes` and `values`.
        kinds: int64[tables, 6]: its place among `buckets`, if it has any by itself; how many a row keeps, 0 for all;
            whether those that are not kept go into the next table, as cells; whether they count as evicted; how many
            of the next, and of those after it, are its own.
        ageing: int64[windows, 3], of all tables: see `_meet`, like the next.
        recency: int64[…], of all tables.
        is_text: bool[lines], of all tables: which hold codes of texts.
        rows: int64[events], the row that each concerns.
        times_ms: int64[events].
        takes: bool[measures, events], whether the event counts.
        values: int64[measures, events]: codes of texts, or the bits of a float64.
        buckets: int64[fields, events].
        has_bucket: bool[fields, events], whether there is one; the last is of tables without any.

    Returns:
        The new pool and sizes; and how many buckets were evicted, int64[tables].
    """
    merged = np.empty(_most(sizes, shapes, kinds, len(rows)), np.int64)
    merged_sizes = np.empty(len(sizes), np.int64)
    spilled = np.empty((0, 0), np.int64)
    evicted = np.zeros(len(sizes), np.int64)
    pool_at = merged_at = line_at = first_operation = first_column = first_window = first_recency = 0
    for index in range(len(sizes)):
        n_lines, n_columns, size = shapes[index, 0], shapes[index, 3], sizes[index]
        source, bound, spills, counts, n_windows, n_recency = kinds[index]
        own_operations = operations[first_operation : first_operation + shapes[index, 5]]
        own_empty = empty[first_column : first_column + n_columns]
        arrived = spilled
        if not (index and kinds[index - 1, 2]):
            own_measures = measures[first_operation : first_operation + shapes[index, 5]]
            own = (buckets[source], has_bucket[source])
            arrived = _arrive(
                shapes[index], own_operations, own_empty, rows, times_ms, own_measures, takes, values, *own
            )
        lines = np.empty((n_lines, size + arrived.shape[1]), np.int64)
        for line in range(n_lines):
            lines[line, :size] = pool[pool_at : pool_at + size]
            lines[line, size:] = arrived[line]
            if is_text[line_at + line]:
                for entry in range(size):
                    lines[line, entry] = recode[lines[line, entry]]
            pool_at += size
        own_ageing = ageing[first_window : first_window + n_windows]
        own_recency = recency[first_recency : first_recency + n_recency]
        kept, out, n_out = _meet(
            shapes[index], own_operations, own_empty, own_ageing, own_recency, bound, lines, n_rows, now_ms
        )
        if spills:
            bucket_line = out[n_lines - n_columns - 1]
            bucket_line[:] = cells(bucket_line.view(np.uint64))
            spilled = out
        evicted[index] = n_out if counts else 0
        merged_sizes[index] = kept.shape[1]
        for line in range(n_lines):
            merged[merged_at : merged_at + kept.shape[1]] = kept[line]
            merged_at += kept.shape[1]
        line_at += n_lines
        first_operation += shapes[index, 5]
        first_column += n_columns
        first_window += n_windows
        first_recency += n_recency
    return merged[:merged_at], merged_sizes, evicted


@compiled
def _most(sizes: Ints, shapes: Ints, kinds: Ints, n_events: int) -> int:
    """How long the merged pool can be: no table has more than it had and what arrives."""
    most = before = 0
    for index in range(len(sizes)):
        before = sizes[index] + (before if index and kinds[index - 1, 2] else n_events)
        most += shapes[index, 0] * before
    return most


@compiled
def latest(before_ms: Ints, reads: Mask, contracts: Ints, rows: Ints, times_ms: Ints) -> Ints:
    """int64[families, n]: the time of each row's last event in each family.

    Args:
        before_ms: int64[families, n], what it was before.
        reads: bool[families, contracts], which events concern a family.
        contracts: int64[events], the contract of each.
        rows: int64[events], the row that each concerns.
        times_ms: int64[events].
    """
    found = before_ms.copy()
    for event in range(len(rows)):
        for family in range(len(found)):
            if reads[family, contracts[event]]:
                found[family, rows[event]] = max(found[family, rows[event]], times_ms[event])
    return found


@compiled
def _arrive(  # noqa: PLR0913, PLR0917  # as above
    shape: Ints,
    operations: Ints,
    empty: Ints,
    rows: Ints,
    times_ms: Ints,
    measures: Ints,
    takes: Mask,
    values: Ints,
    buckets: Ints,
    has_bucket: Mask,
) -> Ints:
    """Entries of one table: one an event that any of its partials takes.

    Args:
        shape: int64[6], see `features.fold.fold_tables`, like the next two.
        operations: int64[partials, 3].
        empty: int64[columns].
        rows: int64[events], the row that each concerns.
        times_ms: int64[events].
        measures: int64[partials], what goes into each: its place among the next two.
        takes: bool[measures, events], whether the event counts.
        values: int64[measures, events]: codes of texts, or the bits of a float64.
        buckets: int64[events]; not looked at where the table has no buckets.
        has_bucket: bool[events], whether there is one; where the table has none, whether the event goes in.
    """
    n_lines, has_starts, has_buckets, n_columns = shape[0], shape[1], shape[2], shape[3]
    index = np.empty(len(rows), np.int64)
    n = 0
    for event in range(len(rows)):
        taken = False
        for measure in measures:
            taken |= takes[measure, event]
        if taken and has_bucket[event]:
            index[n] = event
            n += 1
    lines = np.empty((n_lines, n), np.int64)
    columns = lines[n_lines - n_columns :]
    floats = columns.view(np.float64)
    for column in range(n_columns):
        columns[column] = empty[column]
    for at in range(n):
        event = index[at]
        lines[0, at] = rows[event]
        if has_starts:
            lines[1, at] = times_ms[event] // TICK_MS
        if has_buckets:
            lines[1 + has_starts, at] = buckets[event]
    for partial in range(len(operations)):
        measure = measures[partial]
        for at in range(n):
            # Where the partial takes no part, its identity: it must not matter what the event holds there.
            event = index[at]
            if takes[measure, event]:
                begin(operations[partial], columns, floats, at, times_ms[event], values[measure, event])
    return lines


@compiled
def _meet(  # noqa: PLR0913, PLR0917  # as above
    shape: Ints,
    operations: Ints,
    empty: Ints,
    ageing: Ints,
    recency: Ints,
    bound: int,
    lines: Ints,
    n_rows: int,
    now_ms: int,
) -> tuple[Ints, Ints, int]:
    """Ages tiles, drops what every window has left, folds entries of one key, and keeps as many buckets as are allowed.

    Args:
        shape: int64[6], see `features.fold.fold_tables`, like the next two.
        operations: int64[partials, 3].
        empty: int64[columns].
        ageing: int64[windows, 3], shortest first: width and hop in ms, hop in ticks; of a table without starts, the
            window beyond which entries are forgotten by the first of their columns, if there is one.
        recency: int64[…], the columns that say when a bucket was seen.
        bound: how many buckets a row keeps, those seen latest; 0 for all.
        lines: int64[lines, entries], in any order: state and what has arrived.
        n_rows: how many rows there are.
        now_ms: see `features.kernel.merge`.

    Returns:
        The entries that are kept and those of buckets that are not, both sorted by row, bucket and start; and how many
        buckets these are.
    """
    n_lines, has_starts, has_buckets, n_columns = shape[0], shape[1], shape[2], shape[3]
    columns = lines[n_lines - n_columns :]
    starts = lines[1].copy() if has_starts else lines[0]
    if has_starts:
        held = _age(starts, ageing, now_ms)
    else:
        held = np.ones(len(starts), np.bool_)
        for tail in tails_of(ageing, now_ms):
            held &= columns[0] >= tail
    major = (lines[1 + has_starts] if has_buckets else starts).view(np.uint64)
    minor = starts.view(np.uint64)
    order = _by_row(lines[0], held, n_rows)
    if has_starts or has_buckets:
        _sort_rows(order, lines[0], major, minor)
    runs = np.full(lines.shape[1], -1, np.int64)
    firsts = np.empty(len(order), np.int64)
    n = 0
    for at in range(len(order)):
        entry, before = order[at], order[at - 1] if at else order[at]
        if (
            at == 0
            or lines[0, entry] != lines[0, before]
            or major[entry] != major[before]
            or minor[entry] != minor[before]
        ):
            firsts[n] = entry
            n += 1
        runs[entry] = n - 1
    folded = np.empty((n_lines, n), np.int64)
    for run in range(n):
        folded[0, run] = lines[0, firsts[run]]
        if has_starts:
            folded[1, run] = starts[firsts[run]]
        if has_buckets:
            folded[1 + has_starts, run] = lines[1 + has_starts, firsts[run]]
    totals = folded[n_lines - n_columns :]
    for column in range(n_columns):
        totals[column] = empty[column]
    for index in range(len(operations)):
        fold(operations[index], totals, totals.view(np.float64), runs, columns, columns.view(np.float64))
    if not bound:
        return folded, folded[:, :0].copy(), 0
    kept: tuple[Ints, Ints, int] = _bounded(folded, folded[1 + has_starts].view(np.uint64), totals, recency, bound)
    return kept


@compiled
def _age(starts: Ints, ageing: Ints, now_ms: int) -> Mask:
    """Rounds starts down to the hop of the finest window that holds them; says which any window holds."""
    tails = tails_of(ageing, now_ms)
    held = np.ones(len(starts), np.bool_)
    for entry in range(len(starts)):
        # Longer windows have earlier tails: the first that holds a tile is the finest.
        window = 0
        for tail in tails:
            window += starts[entry] < tail
        if window < len(tails):
            starts[entry] -= starts[entry] % ageing[window, 2]
        else:
            held[entry] = False
    return held


@compiled
def _by_row(rows: Ints, held: Mask, n_rows: int) -> Ints:
    """The entries that are held, by row, and otherwise in the order that they have: a counting sort."""
    ends = np.zeros(n_rows + 1, np.int64)
    for entry in range(len(rows)):
        ends[rows[entry] + 1] += held[entry]
    for row in range(n_rows):
        ends[row + 1] += ends[row]
    order = np.empty(ends[n_rows], np.int64)
    for entry in range(len(rows)):
        if held[entry]:
            order[ends[rows[entry]]] = entry
            ends[rows[entry]] += 1
    return order


@compiled
def _sort_rows(order: Ints, rows: Ints, major: Keys, minor: Keys) -> None:
    """Sorts what is in order by row by two keys as well."""
    scratch = np.empty(len(order), np.int64)
    first = 0
    for last in range(1, len(order) + 1):
        if last == len(order) or rows[order[last]] != rows[order[first]]:
            _sort(order, first, last, major, minor, scratch)
            first = last


@compiled
def _sort(order: Ints, first: int, last: int, major: Keys, minor: Keys, scratch: Ints) -> None:
    """Sorts `order[first:last]` by two keys, stably: a merge sort that passes over what is in order, as state is."""
    width = 1
    while width < last - first:
        for low in range(first, last - width, 2 * width):
            left, right, end = low, low + width, min(low + 2 * width, last)
            if not _is_before(order[right], order[right - 1], major, minor):
                continue
            middle, to = right, low
            scratch[low:middle] = order[low:middle]
            while left < middle:
                if right < end and _is_before(order[right], scratch[left], major, minor):
                    order[to] = order[right]
                    right += 1
                else:
                    order[to] = scratch[left]
                    left += 1
                to += 1
        width *= 2


@compiled
def _is_before(one: int, other: int, major: Keys, minor: Keys) -> bool:
    return bool(major[one] < major[other] or (major[one] == major[other] and minor[one] < minor[other]))


@compiled
def _bounded(lines: Ints, buckets: Keys, columns: Ints, recency: Ints, bound: int) -> tuple[Ints, Ints, int]:
    """Entries of the `bound` buckets a row that were seen latest, and the others: see `_meet`."""
    n = lines.shape[1]
    groups = np.empty(n, np.int64)
    rows, keys, seen = np.empty(n, np.int64), np.empty(n, np.uint64), np.zeros(n, np.uint64)
    n_groups = 0
    for entry in range(n):
        if entry == 0 or lines[0, entry] != lines[0, entry - 1] or buckets[entry] != buckets[entry - 1]:
            rows[n_groups], keys[n_groups] = lines[0, entry], buckets[entry]
            n_groups += 1
        group = n_groups - 1
        groups[entry] = group
        for column in recency:
            # Never is -1, before all times.
            seen[group] = max(seen[group], np.uint64(columns[column, entry] + 1))
    evicted = np.zeros(n_groups, np.bool_)
    order, scratch = np.arange(n_groups), np.empty(n_groups, np.int64)
    first = n_evicted = 0
    for last in range(1, n_groups + 1):
        if last == n_groups or rows[last] != rows[first]:
            if last - first > bound:
                _sort(order, first, last, seen, keys, scratch)
                evicted[order[first : last - bound]] = True
                n_evicted += last - first - bound
            first = last
    if not n_evicted:
        return lines, lines[:, :0].copy(), 0
    out = evicted[groups]
    return lines[:, ~out], lines[:, out], n_evicted
