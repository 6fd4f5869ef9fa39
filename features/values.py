"""Values of features for many rows at once: what `evaluate` answers with.

Numbers (also counts and bools) are float64[n] with NaN for null; the three other shapes are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Type = Literal["int", "float", "bool", "str", "list[str]", "map[str, float]"]
"""The type of one feature's value."""


@dataclass(frozen=True)
class Texts:
    """One text a row: codes int64[n] into `texts`, -1 for null."""

    codes: Ints
    texts: pa.StringArray

    def array(self) -> pa.StringArray:
        """The texts themselves, null where there is none."""
        return self.texts.take(pa.array(self.codes, mask=self.codes < 0))


@dataclass(frozen=True)
class Lists:
    """A list of texts a row: row i has `codes[offsets[i]:offsets[i + 1]]`."""

    offsets: Ints
    codes: Ints
    texts: pa.StringArray

    def array(self) -> pa.ListArray:
        """The lists as Arrow has them."""
        return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), self.texts.take(pa.array(self.codes)))


@dataclass(frozen=True)
class Maps:
    """A map from text to number a row, by bucket: entries as in `Lists`, each with a value.

    `nothing` is what a bucket that isn't there stands for: 0 of a count, NaN of a mean.
    """

    offsets: Ints
    codes: Ints
    texts: pa.StringArray
    values: Floats
    nothing: float

    def array(self) -> pa.MapArray:
        """The maps as Arrow has them."""
        keys = self.texts.take(pa.array(self.codes))
        return pa.MapArray.from_arrays(pa.array(self.offsets, pa.int32()), keys, pa.array(self.values))


Values = Floats | Texts | Lists | Maps
EachWindow = Floats | Sequence[Values]
"""Values over several windows, shortest first: numbers as one array, float64[windows, n]."""


def to_arrow(values: Values, value_type: Type) -> pa.Array:
    """The values as an Arrow array of the feature's own type, NaN as null."""
    if not isinstance(values, np.ndarray):
        return values.array()
    null = np.isnan(values)
    if value_type == "int":
        return pa.array(np.where(null, 0, values).astype(np.int64), mask=null)
    if value_type == "bool":
        return pa.array(values == 1, mask=null)
    return pa.array(values, mask=null)


def to_python(values: Values, value_type: Type) -> list[Any]:
    """The values as JSON has them: whole numbers as int, null as None, lists and maps."""
    result: list[Any] = to_arrow(values, value_type).to_pylist(
        maps_as_pydicts="strict" if isinstance(values, Maps) else None
    )
    return result


def offsets_of(rows: NDArray[np.intp] | Ints, n_rows: int) -> Ints:
    """int64[n_rows + 1]: where each row's entries begin, for entries sorted by row."""
    return np.searchsorted(rows, np.arange(n_rows + 1)).astype(np.int64)
