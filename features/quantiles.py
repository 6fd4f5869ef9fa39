"""Logarithmic cells for numbers: what `quantile` counts its values by.

A cell is all numbers between two bounds whose ratio is at most (1 + e) / (1 - e), e = 1 %, so that one number of it,
the harmonic mean of its bounds, is off from any by at most e of itself. Counts of cells add up, whatever the order:
this is DDSketch (Masson, Rim and Lee, VLDB 2019). As its fastest implementations do, we take for the logarithm a
cubic of the mantissa, which is made of sums and products alone and so the same on every machine; it takes 1 % more
cells.

Numbers under 2^-40 (1e-12) count as 0, those from 2^127 (1.7e38) on as that. Stored rows depend on it: never change it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from features.sketch import CELLS

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

ERROR: Final = 0.01
"""How far a number of a cell may be from the one that stands for it, of itself."""
_A, _B, _C = 6 / 35, -3 / 5, 10 / 7
_EXPONENT_MIN, _EXPONENT_MAX = -40, 127
_SCALE: Final = 35.0
"""Cells to the doubling: 1 / (log2((1 + e) / (1 - e)) * c * ln 2) is 34.99, c ln 2 being the cubic's least slope."""
_ZERO: Final = CELLS // 2
_FIRST: Final = int(_EXPONENT_MIN * _SCALE)
_LAST: Final = int(_EXPONENT_MAX * _SCALE)


def cells(values: Floats) -> Ints:
    """int64[n]: the cell of each number, any for NaN; the larger the number, the larger its cell."""
    mantissa, exponent = np.frexp(np.abs(values))
    part = 2 * mantissa - 1
    log = ((_A * part + _B) * part + _C) * part + (exponent - 1)
    cell = np.floor(np.clip(np.nan_to_num(log * _SCALE), _FIRST - 1, _LAST)).astype(np.int64) - _FIRST + 1
    found: Ints = np.where(np.abs(values) < 2.0**_EXPONENT_MIN, _ZERO, _ZERO + np.where(values < 0, -cell, cell))
    return found


def _numbers() -> Floats:
    """float64[CELLS]: the number that stands for each cell."""
    log = np.arange(_FIRST, _LAST + 2) / _SCALE
    exponent = np.floor(log)
    rest = log - exponent
    part = rest.copy()
    for _ in range(8):
        slope = (3 * _A * part + 2 * _B) * part + _C
        part -= (((_A * part + _B) * part + _C) * part - rest) / slope
    bounds = 2.0**exponent * (1 + part)
    numbers = 2 * bounds[:-1] * bounds[1:] / (bounds[:-1] + bounds[1:])
    found = np.zeros(CELLS)
    found[_ZERO + 1 : _ZERO + 1 + len(numbers)] = numbers
    found[_ZERO - len(numbers) : _ZERO] = -numbers[::-1]
    return found


NUMBERS: Final = _numbers()
"""float64[CELLS]: the number that stands for each cell."""
