"""Formulas: what numeric aggregations make of their totals, for all features of a program in one compiled loop."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.fold import compiled
from features.times import TICK_MS, Window, hop_ms

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class Formula(IntEnum):
    """How a number follows from the columns x, y, z of an aggregation's partials, and its constants p and q."""

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


class Numeric(NamedTuple):
    """A numeric feature: its formula, where its columns are, and its constants.

    `first` and `second` are the (table, column) of its partials; both are the same where it has one.
    """

    formula: Formula
    first: tuple[int, int]
    second: tuple[int, int]
    window_index: int
    window: Window
    constants: tuple[float, float]
    default: float | None


def formulas(numerics: Iterable[Numeric]) -> tuple[Ints, Floats]:
    """Numeric features as `finish` takes them: int64[features, 8] and float64[features, 3]."""
    plain, constants = [], []
    for each in numerics:
        window_ms = (each.window.width_ms, hop_ms(each.window.width_ms))
        plain.append((each.formula, *each.first, *each.second, each.window_index, *window_ms))
        constants.append((*each.constants, np.nan if each.default is None else each.default))
    return np.array(plain, np.int64).reshape(-1, 8), np.array(constants, np.float64).reshape(-1, 3)


@compiled  # type: ignore[untyped-decorator]  # numba has no types
def finish(  # noqa: PLR0912  # a list of cases, one a formula
    totals: Floats, n_groups: Ints, shapes: Ints, plain: Ints, constants: Floats, now_ms: int, n: int
) -> Floats:
    """The values of features.

    Args:
        totals: as `features.fold.fold_tables` gives them, like the next.
        n_groups: int64[tables].
        shapes: int64[tables, 6], as `fold_tables` takes them.
        plain: see `formulas`.
        constants: see `formulas`.
        now_ms: query time.
        n: how many groups the features' tables have.

    Returns:
        float64[features, n], NaN for null.
    """
    places = np.zeros(len(shapes) + 1, np.int64)
    for table in range(len(shapes)):
        places[table + 1] = places[table] + shapes[table, 3] * shapes[table, 4] * n_groups[table]
    values = np.empty((len(plain), n))
    for feature in range(len(plain)):
        formula, table, column, other_table, other_column, window, width_ms, hop_ms = plain[feature]
        p, q, default = constants[feature]
        step = shapes[table, 4] * n_groups[table]
        x = places[table] + column * step + window * n_groups[table]
        if formula == Formula.RATIO:
            y = places[other_table] + (other_column * shapes[other_table, 4] + window) * n_groups[other_table]
        else:
            y = x + step
        begin_ms = max(0, (now_ms - width_ms) // hop_ms * (hop_ms // TICK_MS)) * TICK_MS
        for at in range(n):
            value = np.nan
            first = totals[x + at]
            if formula == Formula.TOTAL:
                value = first
            elif formula == Formula.EXTREME:
                value = np.nan if np.isinf(first) else first
            elif formula == Formula.MEAN:
                value = totals[y + at] if first else np.nan
            elif formula == Formula.STD:
                value = np.sqrt(totals[y + step + at] / first) if first else np.nan
            elif formula == Formula.RATIO:
                second = totals[y + at]
                # Exactly the prior where there is nothing: `by` leaves such buckets out.
                value = p if first == 0 and second == 0 else (first + p * q) / (second + q)
            elif formula == Formula.DECAYED:
                value = totals[y + at]
                if value != 0:
                    value *= 2.0 ** ((first - now_ms) / p)
            elif first >= max(begin_ms, 0):
                value = totals[y + at] if formula == Formula.LATEST else max(now_ms - first, 0) / 1000
            values[feature, at] = default if np.isnan(value) else value
    return values
