"""Formulas: what numeric aggregations make of their totals, for all features of a program in one compiled loop."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.fold import groups_of, tail_of
from features.loops import compiled
from features.texts import look_up
from features.times import TICK_MS, Window, hop_ms

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Formula(IntEnum):
    """How a number follows from the columns x, y, z of an aggregation's partials, and its constants p, q and r."""

    TOTAL = 0
    """x"""
    EXTREME = 1
    """x, null where it is infinite"""
    MEAN = 2
    """y, null where the count x is 0"""
    STD = 3
    """sqrt(z / x), null where the count x is 0"""
    RATIO = 4
    """(x + p * q) / (y + q)"""
    DECAYED = 5
    """y at time x, with half-life p ms"""
    SINCE = 6
    """Seconds since time x, null where that is outside the window"""
    LATEST = 7
    """y, null where its time x is outside the window"""
    RATE = 8
    """(a + p * q) / (b + q), of two sums with half-life r ms as `DECAYED` has them"""
    DELTA = 9
    """x, less what it is over the windows of index q without those of index p"""


class Numeric(NamedTuple):
    """A numeric feature: its formula, where its columns are, and its constants.

    `first` and `second` are the (table, column) of its partials; both are the same where it has one.
    """

    formula: Formula
    first: tuple[int, int]
    second: tuple[int, int]
    window_index: int
    window: Window
    constants: tuple[float, float, float]
    default: float | None


def formulas(numerics: Iterable[Numeric]) -> tuple[Ints, Floats]:
    """Numeric features as `finish` takes them: int64[features, 8] and float64[features, 4]."""
    plain, constants = [], []
    for each in numerics:
        window_ms = (each.window.width_ms, hop_ms(each.window.width_ms))
        plain.append((each.formula, *each.first, *each.second, each.window_index, *window_ms))
        constants.append((*each.constants, np.nan if each.default is None else each.default))
    return np.array(plain, np.int64).reshape(-1, 8), np.array(constants, np.float64).reshape(-1, 4)


@compiled
def _ratio(first: float, second: float, p: float, q: float) -> float:
    """Exactly the prior where there is nothing."""
    return p if first == 0 and second == 0 else (first + p * q) / (second + q)


@compiled
def _decayed(amplitude: float, at_ms: float, now_ms: int, half_life_ms: float) -> float:
    """An exponentially decayed sum at a time."""
    return amplitude * 2.0 ** ((at_ms - now_ms) / half_life_ms) if amplitude else 0.0


@compiled
def _value(totals: Floats, formula: int, x: int, y: int, z: int, p: float, begin_ms: int, now_ms: int) -> float:
    """One value of any other formula; x, y and z are places among the totals."""
    first, second = totals[x], totals[y]
    value = np.nan
    if formula == Formula.EXTREME:
        value = np.nan if np.isinf(first) else first
    elif formula == Formula.MEAN:
        value = second if first else np.nan
    elif formula == Formula.STD:
        value = np.sqrt(totals[z] / first) if first else np.nan
    elif formula == Formula.DECAYED:
        value = _decayed(second, first, now_ms, p)
    elif first >= begin_ms:
        value = second if formula == Formula.LATEST else max(now_ms - first, 0) / 1000
    return value


@compiled
def _rates(  # noqa: PLR0913, PLR0917  # compiled code takes arrays, not objects
    totals: Floats,
    x: int,
    y: int,
    other_x: int,
    other_y: int,
    constants: tuple[float, float, float],
    now_ms: Ints,
    rows: Ints,
    values: Floats,
) -> None:
    """Rates of two decayed sums, whose times and amplitudes are at these places among the totals."""
    p, q, half_life_ms = constants
    row_ms = now_ms[0]
    for at in range(len(values)):
        if len(now_ms) > 1:
            row_ms = now_ms[rows[at] if len(rows) else at]
        first = _decayed(totals[y + at], totals[x + at], row_ms, half_life_ms)
        second = _decayed(totals[other_y + at], totals[other_x + at], row_ms, half_life_ms)
        values[at] = _ratio(first, second, p, q)


@compiled
def tidy(values: Floats, default: float) -> int:
    """Puts null in place of infinite numbers, and the default in place of null; returns how many were infinite."""
    beyond = 0
    for at in range(len(values)):
        if not np.isfinite(values[at]):
            beyond += np.isinf(values[at])
            values[at] = default
    return beyond


@compiled
def _finish_one(
    totals: Floats,
    n_groups: Ints,
    shapes: Ints,
    plain: Ints,
    constants: Floats,
    now_ms: Ints,
    rows: Ints,
    values: Floats,
) -> int:
    formula, table, column, other_table, other_column, window, width_ms, hop_ms = plain
    p, q, r, default = constants
    place = other_place = 0
    for each in range(max(table, other_table)):
        size = shapes[each, 3] * shapes[each, 4] * n_groups[each]
        place += size if each < table else 0
        other_place += size if each < other_table else 0
    n, step = n_groups[table], shapes[table, 4] * n_groups[table]
    x = place + column * step + window * n
    # A partial of one column has no second one to look at.
    y = x + step if shapes[table, 3] > column + 1 else x
    z = y + step if shapes[table, 3] > column + 2 else y
    if formula == Formula.RATIO:
        y = other_place + (other_column * shapes[other_table, 4] + window) * n
    # Most features are one of the first two: a loop of its own decides nothing for each row.
    if formula == Formula.TOTAL:
        values[:] = totals[x : x + len(values)] + 0.0  # No event's sum is -0.0.
    elif formula == Formula.RATIO:
        for at in range(len(values)):
            values[at] = _ratio(totals[np.uint64(x + at)], totals[np.uint64(y + at)], p, q)
    elif formula == Formula.DELTA:
        begin, end = x + (int(q) - window) * n, x + (int(p) - window) * n
        for at in range(len(values)):
            values[at] = totals[x + at] - (totals[begin + at] - totals[end + at]) + 0.0
    elif formula == Formula.RATE:
        other = other_place + other_column * step
        _rates(totals, x, y, other, other + step, (p, q, r), now_ms, rows, values)
    else:
        row_ms, begin_ms = now_ms[0], tail_of(now_ms[0], width_ms, hop_ms) * TICK_MS
        for at in range(len(values)):
            if len(now_ms) > 1:
                row_ms = now_ms[rows[at] if len(rows) else at]
                begin_ms = tail_of(row_ms, width_ms, hop_ms) * TICK_MS
            values[at] = _value(totals, formula, x + at, y + at, z + at, p, begin_ms, row_ms)
    return tidy(values, default)


@compiled
def finish(
    totals: Floats,
    n_groups: Ints,
    shapes: Ints,
    plain: Ints,
    constants: Floats,
    now_ms: Ints,
    rows: Ints,
    values: Floats,
) -> int:
    """Computes features; returns how many numbers are null as they are beyond float64's range.

    Args:
        totals: as `features.fold.fold_tables` gives them, like the next.
        n_groups: int64[tables].
        shapes: int64[tables, 6], as `fold_tables` takes them.
        plain: see `formulas`.
        constants: see `formulas`.
        now_ms: int64[1 or rows], query time: one for all rows, or each row's own.
        rows: int64[groups], the row of each group where there are buckets; empty where a group is a row.
        values: float64[features, groups of their tables], NaN for null; written to.
    """
    beyond = 0
    for feature in range(len(plain)):
        given = (plain[feature], constants[feature], now_ms, rows, values[feature])
        beyond += _finish_one(totals, n_groups, shapes, *given)
    return beyond


@compiled
def look_ups(  # noqa: PLR0913, PLR0917  # compiled code takes arrays, not objects
    keys: Ints,
    plain: Ints,
    constants: Floats,
    nothing: Floats,
    totals: Floats,
    n_groups: Ints,
    firsts: Ints,
    shapes: Ints,
    pool: Ints,
    sizes: Ints,
    text_offsets: NDArray[np.int32],
    text_data: NDArray[np.uint8],
    owners: Ints,
    wanted: Floats,
    wanted_offsets: NDArray[np.int32],
    wanted_data: NDArray[np.uint8],
    now_ms: Ints,
    values: Floats,
) -> None:
    """Looks texts up in maps by bucket, whose numbers are finished here, or in lists of what was seen last.

    Args:
        keys: int64[lookups], which of the `wanted` texts each looks for.
        plain: int64[lookups, 8], the maps' formulas, see `formulas`; SINCE stands for a list.
        constants: float64[lookups, 4], as above.
        nothing: float64[lookups], the number of a text that is not in the map.
        totals: of the owners' bundle, as `fold_tables` gives them, like the next two.
        n_groups: int64[tables].
        firsts: int64[…].
        shapes: int64[tables, 6], as `fold_tables` takes them, like the next two.
        pool: int64[…].
        sizes: int64[tables].
        text_offsets: of the owners' texts, see `features.texts.buffers`, like the next.
        text_data: uint8[bytes].
        owners: int64[n], the row whose map to look in.
        wanted: float64[keys, n], the text to look for, by its place among the wanted texts; NaN for none.
        wanted_offsets: as `text_offsets`, of the wanted texts.
        wanted_data: uint8[bytes].
        now_ms: as of `finish`, of the owners' rows.
        values: float64[lookups, n], written to: the number, or whether the text is in the list.
    """
    for index in range(len(plain)):
        table = plain[index, 1]
        rows, buckets = groups_of(table, n_groups, firsts, shapes, pool, sizes)
        numbers = np.empty(n_groups[table])
        _finish_one(totals, n_groups, shapes, plain[index], constants[index], now_ms, rows, numbers)
        if plain[index, 0] == Formula.SINCE:
            numbers = np.where(np.isnan(numbers), 0.0, 1.0)
        look_up(
            rows,
            buckets,
            numbers,
            text_offsets,
            text_data,
            owners,
            wanted[keys[index]],
            wanted_offsets,
            wanted_data,
            nothing[index],
            values[index],
        )


@compiled
def fill(blocks: tuple[Floats, ...], places: Ints, pairs: tuple[Ints, ...], matrix: NDArray[np.float32]) -> int:
    """Writes a matrix of features; returns how many numbers are NaN as they are beyond float32's range.

    Args:
        blocks: values of each target, float64[features, rows].
        places: int64[columns, 2]: the block of each column, and its row there.
        pairs: for each block, the row of each line of the matrix, int64[lines].
        matrix: float32[lines, columns], written to.
    """
    beyond = 0
    for column in range(len(places)):
        block, row = places[column]
        values, rows = blocks[block][row], pairs[block]
        for line in range(len(matrix)):
            number = np.float32(values[rows[line]])
            if np.isinf(number):
                number, beyond = np.float32(np.nan), beyond + 1
            matrix[line, column] = number
    return beyond
