"""How values are distributed: quantiles, and how far a distribution has moved from another."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Floats = NDArray[np.float64]

QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_BINS: Final = 10
_SHARE_MIN: Final = 1e-4
"""An empty bin counts as so much, or the index would be infinite."""


def is_nested(kind: pa.DataType) -> bool:
    """Whether values are lists or maps."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind))


def is_empty(column: pa.Array) -> NDArray[np.bool_]:
    """bool[n]: which values are null, or lists and maps with nothing in them."""
    null = np.asarray(column.is_null())
    return null | (_lengths(column) == 0) if is_nested(column.type) else null


def numbers_of(column: pa.Array) -> Floats | None:
    """float64[n], NaN for null: numbers themselves, the lengths of lists and maps; None of texts and truth values."""
    if is_nested(column.type):
        return np.where(np.asarray(column.is_null()), np.nan, _lengths(column))
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        return np.asarray(pc.fill_null(column.cast(pa.float64()), np.nan))
    return None


def _lengths(column: pa.Array) -> NDArray[np.int64]:
    return np.diff(np.asarray(column.offsets))


def quantiles(numbers: Floats) -> dict[str, float]:
    """By each of `QUANTILES`, the smallest number that so large a share of the numbers does not exceed; none of none.

    Each is a number that is there, so that the quantiles of counts are counts (the inverse of the distribution
    function, type 1 of Hyndman and Fan, Sample Quantiles in Statistical Packages, 1996). NaN is no number.
    """
    there = numbers[~np.isnan(numbers)]
    if not len(there):
        return {}
    found = np.quantile(there, QUANTILES, method="inverted_cdf").tolist()
    return dict(zip(map(str, QUANTILES), found, strict=True))


def stability_index(reference: pa.Array, actual: pa.Array) -> float | None:
    """The population stability index of values against a reference: 0 for the same distribution, never below.

    The sum over bins of (a - r) ln(a / r), with the bin's shares a of the values and r of the reference. Below 0.1 is
    usually taken for no change and above 0.25 for a large one (Siddiqi, Credit Risk Scorecards, 2006). Two samples of n
    and m values of one distribution give about (bins - 1) (1 / n + 1 / m) (Yurdakul and Naranjo, Statistical
    properties of the population stability index, 2020): of less than some hundreds it says little.

    Bins of numbers (see `numbers_of`) end at the reference's deciles; a number that several deciles fall on has one of
    its own. Of anything else, each of the reference's ten most frequent values has one, and all others together. Null
    is a bin too.

    Args:
        reference: what is compared with.
        actual: of the same type.

    Returns:
        The index, or None if either has no values at all.
    """
    if not len(reference) or not len(actual):
        return None
    numbers, others = numbers_of(reference), numbers_of(actual)
    if numbers is not None and others is not None:
        edges = _edges(numbers)
        n_bins, codes = len(edges) + 2, [_binned(each, edges) for each in (numbers, others)]
    else:
        texts = [each.cast(pa.string()) for each in (reference, actual)]
        frequent = _most_frequent(texts[0])
        n_bins, codes = len(frequent) + 2, [_coded(each, frequent) for each in texts]
    before, now = (np.maximum(np.bincount(each, minlength=n_bins) / len(each), _SHARE_MIN) for each in codes)
    return float(((now - before) * np.log(now / before)).sum())


def _edges(numbers: Floats) -> Floats:
    """Where bins end, the end included: ascending, each once."""
    there = numbers[~np.isnan(numbers)]
    if not len(there):
        return there
    deciles = np.quantile(there, np.arange(1, _BINS) / _BINS, method="inverted_cdf")
    values, times = np.unique(deciles, return_counts=True)
    # One more just below: what is between it and the number is the number alone.
    with np.errstate(all="ignore"):  # The least float64 has infinity below it.
        below = np.nextafter(values, -np.inf)
    return np.unique([values, np.where(times > 1, below, values)])


def _binned(numbers: Floats, edges: Floats) -> NDArray[np.intp]:
    return np.where(np.isnan(numbers), len(edges) + 1, np.searchsorted(edges, numbers))


def _most_frequent(texts: pa.StringArray) -> pa.StringArray:
    counted = pa.table({"text": texts.drop_null()}).group_by("text").aggregate([("text", "count")])
    ranked = counted.sort_by([("text_count", "descending"), ("text", "ascending")])
    return ranked["text"].slice(0, _BINS).combine_chunks()


def _coded(texts: pa.StringArray, frequent: pa.StringArray) -> NDArray[np.intp]:
    codes = np.asarray(pc.fill_null(pc.index_in(texts, frequent), len(frequent)))
    return np.where(np.asarray(texts.is_null()), len(frequent) + 1, codes)
