"""Types for derived features."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
"""One number a row, NaN for null."""
BoolArray = NDArray[np.bool_]
"""One truth value a row."""
