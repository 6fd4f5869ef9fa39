"""How many distinct values a window holds, from a sketch with times in its cells.

A value's 64-bit hash picks a register (8 bits) and a level (one more than the number of trailing zeros of the rest:
level l with probability 2^-l). A cell is such a pair, and keeps the time of the latest value that fell on it. So the
cells with a time inside a window are just those that the window's values fall on, whatever the window, and merging
two sketches is the later time a cell. This is the probabilistic counting of Flajolet and Martin (1985), with a
time for each bit; the estimate is the maximum of the likelihood of all cells (as in Ertl, "New cardinality
estimation algorithms for HyperLogLog sketches", 2017), whose standard error with 256 registers is about 4 %.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from features.loops import compiled

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_REGISTERS: Final = 256
_LEVELS: Final = 48
CELLS: Final = _REGISTERS * _LEVELS
"""How many cells a sketch has."""


@compiled
def cells(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    """int64[n]: the cell of each hash, below 256 * 48."""
    found = np.empty(len(hashes), np.int64)
    for at in range(len(hashes)):
        rest = (hashes[at] >> np.uint64(8)) | np.uint64(1 << (_LEVELS - 1))
        level = 0
        while not rest & np.uint64(1):
            rest >>= np.uint64(1)
            level += 1
        found[at] = level * _REGISTERS + np.int64(hashes[at] & np.uint64(_REGISTERS - 1))
    return found


@compiled
def _estimate(found: Ints, times: Floats, tail: int) -> float:
    """How many distinct values fell on the cells since `tail`."""
    occupied = np.zeros(_LEVELS)
    for at in range(len(found)):
        occupied[found[at] // _REGISTERS] += times[at] >= tail
    # With n values, a cell of level l is empty with probability exp(-n * share of l). The log likelihood's slope falls
    # with n: Newton's method on log n finds its root, held within the bounds that it has found.
    low, high = 0.0, _LEVELS * np.log(2.0)
    log_n = min(np.log(max(occupied.sum(), 1.0)), high)
    for _ in range(100):
        slope = bend = 0.0
        for level in range(_LEVELS):
            expected = np.exp(log_n) * 2.0 ** -min(level + 1, _LEVELS - 1) / _REGISTERS
            odds = expected / np.expm1(min(expected, 700.0))
            slope += occupied[level] * odds - (_REGISTERS - occupied[level]) * expected
            bend += occupied[level] * odds * (1 - expected - odds) - (_REGISTERS - occupied[level]) * expected
        low, high = (log_n, high) if slope > 0 else (low, log_n)
        step = slope / bend if bend < 0 else 0.0
        after = log_n - step if low < log_n - step < high else (low + high) / 2
        if abs(after - log_n) < 1e-13 * max(log_n, 1.0):
            break
        log_n = after
    n: float = np.exp(log_n)
    return n


@compiled
def counts(  # noqa: PLR0913, PLR0917  # compiled code takes arrays, not objects
    rows: Ints,
    ticks: Floats,
    hashes: NDArray[np.uint64],
    cell_rows: Ints,
    cell_ticks: Floats,
    spilled: Ints,
    tails: Ints,
    exact_max: int,
    n_rows: int,
) -> Floats:
    """How many distinct values each window of each row holds: float64[windows, n_rows].

    Args:
        rows: int64[values], the row of each value that is kept, ascending.
        ticks: float64[values], when it was seen last.
        hashes: uint64[values].
        cell_rows: int64[cells], the row of each cell of what is not kept, ascending.
        cell_ticks: float64[cells], when a value fell on it last.
        spilled: int64[cells], which cell.
        tails: int64[1 or n_rows, windows], the first tick inside each: for all rows, or for each.
        exact_max: up to so many, the values that are kept are all there are.
        n_rows: how many rows.
    """
    n_windows = tails.shape[1]
    found = np.zeros((n_windows, n_rows))
    for at in range(len(rows)):
        t = rows[at] if len(tails) > 1 else 0
        for window in range(n_windows):
            found[window, rows[at]] += ticks[at] >= tails[t, window]
    kept, latest = cells(hashes), np.full(CELLS, -1.0)
    first = first_cell = 0
    for row in range(n_rows):
        last, last_cell = _end(rows, first, row), _end(cell_rows, first_cell, row)
        if found[:, row].max() > exact_max:
            touched = np.concatenate((kept[first:last], spilled[first_cell:last_cell]))
            times = np.concatenate((ticks[first:last], cell_ticks[first_cell:last_cell]))
            n = _once(touched, times, latest)
            for window in range(n_windows):
                if found[window, row] > exact_max:
                    tail = tails[row if len(tails) > 1 else 0, window]
                    estimated = np.rint(_estimate(touched[:n], times[:n], tail))
                    found[window, row] = max(estimated, exact_max + 1)
        first, first_cell = last, last_cell
    return found


@compiled
def _end(rows: Ints, first: int, row: int) -> int:
    """Where the entries of a row end that begin at `first`."""
    while first < len(rows) and rows[first] == row:
        first += 1
    return first


@compiled
def _once(touched: Ints, times: Floats, latest: Floats) -> int:
    """Puts each cell once, with its latest time, at the front of both; returns how many. `latest` is -1 everywhere."""
    for at in range(len(touched)):
        latest[touched[at]] = max(latest[touched[at]], times[at])
    n = 0
    for at in range(len(touched)):
        cell = touched[at]
        if latest[cell] >= 0:
            touched[n], times[n], latest[cell] = cell, latest[cell], -1.0
            n += 1
    return n
