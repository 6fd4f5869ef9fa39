"""Values of features for many rows at once: what `evaluate` answers with.

Numbers (also counts and bools) are float64[n] with NaN for null; the other shapes are here.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.texts import buffers

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Type = Literal["int", "float", "bool", "str", "list[str]", "list[int]", "list[float]", "map[str, float]", "any"]
"""The type of one feature's value; `any` is only read and handed on."""
_SMALL_BYTES: Final = 1 << 16
"""Texts that are no longer altogether are taken apart here, others by Arrow."""


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
    """A list of texts a row.

    Attributes:
        rows: int64[entries], the row of each entry, ascending; a row's entries are in order.
        n_rows: how many rows there are.
        codes: int64[entries], each one's place in `texts`.
        texts: what codes stand for.
        null: bool[rows], which rows have no list, not even an empty one; None if all have one.
        sparse: whether codes may be -1, for null.
    """

    rows: Ints
    n_rows: int
    codes: Ints
    texts: pa.StringArray
    null: NDArray[np.bool_] | None = field(default=None, kw_only=True)
    sparse: bool = field(default=False, kw_only=True)

    def array(self) -> pa.ListArray:
        """The lists as Arrow has them."""
        offsets = pa.array(offsets_of(self.rows, self.n_rows), pa.int32())
        mask = None if self.null is None else pa.array(self.null)
        codes = pa.array(self.codes, mask=self.codes < 0 if self.sparse else None)
        return pa.ListArray.from_arrays(offsets, self.texts.take(codes), mask=mask)


@dataclass(frozen=True)
class Maps(Lists):
    """A map from text to number a row, by bucket: entries as in `Lists`, each with a value (float64[entries])."""

    values: Floats

    def array(self) -> pa.MapArray:
        """The maps as Arrow has them."""
        offsets = pa.array(offsets_of(self.rows, self.n_rows), pa.int32())
        return pa.MapArray.from_arrays(offsets, self.texts.take(pa.array(self.codes)), pa.array(self.values))


@dataclass(frozen=True)
class NumberLists:
    """A list of numbers a row: entries as in `Lists`, each with a number (float64[entries], NaN for null).

    `whole` says that they are whole numbers.
    """

    rows: Ints
    n_rows: int
    numbers: Floats
    whole: bool = False

    def array(self) -> pa.ListArray:
        """The lists as Arrow has them."""
        offsets = pa.array(offsets_of(self.rows, self.n_rows), pa.int32())
        numbers = pa.array(self.numbers, pa.float64(), from_pandas=True)
        return pa.ListArray.from_arrays(offsets, numbers.cast(pa.int64()) if self.whole else numbers)

    def to_json(self) -> list[list[Any]]:
        """The lists as JSON has them."""
        numbers: list[Any] = self.numbers.astype(np.int64 if self.whole else np.float64).tolist()
        for at in np.flatnonzero(np.isnan(self.numbers)).tolist():
            numbers[at] = None
        return [numbers[slice(*ends)] for ends in pairwise(offsets_of(self.rows, self.n_rows).tolist())]

    def padded(self, k: int) -> Floats:
        """float64[n_rows, k]: each row's numbers, NaN behind them."""
        found = np.full((self.n_rows, k), np.nan)
        found[self.rows, np.arange(len(self.rows)) - offsets_of(self.rows, self.n_rows)[self.rows]] = self.numbers
        return found


@dataclass(frozen=True)
class Objects:
    """A value of any kind a row, as Python has it; None for null."""

    values: list[Any]

    def array(self) -> pa.Array:
        """The values as Arrow has them."""
        return pa.array(self.values)


Values = Floats | Texts | Lists | Maps | NumberLists | Objects


_ARROW: Final[dict[Type, pa.DataType]] = {
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "str": pa.string(),
    "list[str]": pa.list_(pa.string()),
    "list[int]": pa.list_(pa.int64()),
    "list[float]": pa.list_(pa.float64()),
    "map[str, float]": pa.map_(pa.string(), pa.float64()),
    "any": pa.null(),
}


def arrow_type(value_type: Type) -> pa.DataType:
    """The type of `to_arrow`'s arrays."""
    return _ARROW[value_type]


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
    if not isinstance(values, np.ndarray):
        return to_json(values, value_type)
    found, null = to_json(values, value_type), np.isnan(values)
    return [None if none else value for none, value in zip(null.tolist(), found, strict=True)] if null.any() else found


def to_json(values: Values, value_type: Type) -> list[Any]:  # noqa: PLR0911  # cases, one a shape
    """As `to_python`, with NaN for null: orjson writes it as null."""
    if isinstance(values, Texts):
        found: list[Any] = _strings(values.texts, values.codes)
        for at in np.flatnonzero(values.codes < 0).tolist():
            found[at] = None
        return found
    if isinstance(values, Objects):
        return [_as_json(each) for each in values.values]
    if isinstance(values, NumberLists):
        return values.to_json()
    if isinstance(values, Lists):
        strings: list[Any] = _strings(values.texts, values.codes)
        for at in np.flatnonzero(values.codes < 0).tolist() if values.sparse else ():
            strings[at] = None
        each = [slice(*ends) for ends in pairwise(offsets_of(values.rows, values.n_rows).tolist())]
        if isinstance(values, Maps):
            weights = values.values.tolist()
            return [dict(zip(strings[own], weights[own], strict=True)) for own in each]
        if values.null is not None:
            return [None if none else strings[own] for none, own in zip(values.null.tolist(), each, strict=True)]
        return [strings[own] for own in each]
    return numbers_to_json(values[np.newaxis], value_type)[0]


def _as_json(value: Any) -> Any:
    """A value of any kind with bytes as text."""
    match value:
        case bytes():
            return b64encode(value).decode()
        case list():
            return [_as_json(each) for each in value]
        case dict():
            return {name: _as_json(each) for name, each in value.items()}
        case _:
            return value


def numbers_to_json(values: Floats, value_type: Type) -> list[list[Any]]:
    """As `to_json`, for many features of a type at once: float64[features, n]."""
    found: list[list[Any]]
    if value_type == "float":
        found = values.tolist()
        return found
    null = np.isnan(values)
    found = np.where(null, 0, values).astype(np.int64 if value_type == "int" else np.bool_).tolist()
    for at in np.flatnonzero(null.any(axis=1)).tolist():
        found[at] = [np.nan if none else value for none, value in zip(null[at].tolist(), found[at], strict=True)]
    return found


def _strings(texts: pa.StringArray, codes: Ints) -> list[str]:
    """The texts of codes, anything for -1."""
    offsets, data = buffers(texts)
    if len(data) > _SMALL_BYTES:
        found: list[str] = texts.take(pa.array(codes, mask=codes < 0)).to_pylist()
        return found
    # Parts of one text: Arrow takes as long to begin as this for all.
    ends, whole = zip(offsets[codes].tolist(), offsets[codes + 1].tolist(), strict=True), data.tobytes()
    if whole.isascii():
        text = whole.decode()
        return [text[begin:end] for begin, end in ends]
    return [whole[begin:end].decode() for begin, end in ends]


def offsets_of(rows: NDArray[np.intp] | Ints, n_rows: int) -> Ints:
    """int64[n_rows + 1]: where each row's entries begin, for entries sorted by row."""
    return np.searchsorted(rows, np.arange(n_rows + 1)).astype(np.int64)
