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

from features.fold import compiled

_REGISTERS: Final = 256
_LEVELS: Final = 48
CELLS: Final = _REGISTERS * _LEVELS
"""How many cells a sketch has."""


@compiled  # type: ignore[untyped-decorator]  # numba has no types
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


def estimate(rows: NDArray[np.intp], found: NDArray[np.int64], n_rows: int) -> NDArray[np.float64]:
    """float64[n_rows]: how many distinct values made the cells in `found` (int64[m]), each of its row in `rows`.

    A cell listed twice in a row counts once.
    """
    pairs = np.unique(rows * (_REGISTERS * _LEVELS) + found)
    occupied = np.zeros((n_rows, _LEVELS))
    np.add.at(occupied, (pairs // (_REGISTERS * _LEVELS), pairs % (_REGISTERS * _LEVELS) // _REGISTERS), 1)
    # With n values, a cell of level l is empty with probability exp(-n * share[l]). The log likelihood's slope falls
    # with n, so bisection on log n finds its root.
    share = np.exp2(-np.minimum(np.arange(1, _LEVELS + 1), _LEVELS - 1)) / _REGISTERS
    low, high = np.zeros(n_rows), np.full(n_rows, 48 * np.log(2))
    for _ in range(48):
        middle = (low + high) / 2
        expected = np.exp(middle)[:, None] * share
        slope = np.sum(
            occupied * expected / np.expm1(np.minimum(expected, 700.0)) - (_REGISTERS - occupied) * expected, axis=1
        )
        low, high = np.where(slope > 0, middle, low), np.where(slope > 0, high, middle)
    count: NDArray[np.float64] = np.exp((low + high) / 2)
    return count
