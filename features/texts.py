"""Strings in bulk: everything that the kernel and the codec do with text, vectorised by Arrow and numpy.

The kernel computes with *codes*: int64 positions in a sorted array of unique texts, so that comparing codes compares
the texts by code point (UTF-8 bytes sort alike). -1 stands for null.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features.loops import compiled

Ints = NDArray[np.int64]
NO_TEXTS: Final = pa.StringArray.from_buffers(0, pa.py_buffer(bytes(4)), pa.py_buffer(b""))
_NO_OFFSETS: Final = np.frombuffer(bytes(4), np.int32)
_NO_BYTES: Final = np.frombuffer(b"", np.uint8)
_MIX_A: Final = np.uint64(0x9E3779B97F4A7C15)
_MIX_B: Final = np.uint64(0xBF58476D1CE4E5B9)
_MIX_C: Final = np.uint64(0x94D049BB133111EB)


def unify(arrays: list[pa.StringArray]) -> tuple[pa.StringArray, list[Ints]]:
    """One sorted array of the unique texts in `arrays`, and the codes of each array's elements in it."""
    encoded = pa.concat_arrays(arrays).dictionary_encode() if arrays else NO_TEXTS.dictionary_encode()
    order = np.asarray(pc.array_sort_indices(encoded.dictionary))
    # One extra slot: null (-1) looks up the last element, which stays -1.
    rank = np.full(len(order) + 1, -1, np.int64)
    rank[order] = np.arange(len(order))
    indices = encoded.indices.fill_null(-1) if encoded.null_count else encoded.indices
    codes = rank[np.asarray(indices)]
    bounds = pairwise([0, *accumulate(map(len, arrays))])
    return encoded.dictionary.take(pa.array(order)), [codes[begin:end] for begin, end in bounds]


def decimal_texts(column: Any) -> pa.StringArray:
    """Ids or texts of a column: whole numbers (of Arrow's, or float64, NaN for null) in decimal, texts as they are."""
    if not isinstance(column, np.ndarray):
        return column if pa.types.is_string(column.type) else pc.cast(column, pa.string())
    null = np.isnan(column)
    return pc.cast(pa.array(np.where(null, 0, column).astype(np.int64), mask=null), pa.string())


def buffers(texts: pa.StringArray) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
    """Offsets (int32[n + 1]) into the UTF-8 bytes (uint8[...]) of the texts, as Arrow has them."""
    _, offsets_buffer, data_buffer = texts.buffers()
    if offsets_buffer is None or len(texts) == 0:
        return _NO_OFFSETS, _NO_BYTES
    offsets = np.frombuffer(offsets_buffer, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = _NO_BYTES if data_buffer is None else np.frombuffer(data_buffer, np.uint8)
    # Loops are compiled for each kind of array that they meet: so there is one.
    offsets.flags.writeable = data.flags.writeable = False
    return offsets, data


def from_buffers(offsets: NDArray[np.int32], data: NDArray[np.uint8]) -> pa.StringArray:
    """The inverse of `buffers`."""
    return pa.StringArray.from_buffers(
        len(offsets) - 1,
        pa.py_buffer(offsets),
        pa.py_buffer(np.ascontiguousarray(data)),
    )


@compiled
def look_up(  # noqa: PLR0913, PLR0917  # compiled code takes arrays, not objects
    rows: Ints,
    codes: Ints,
    values: NDArray[np.float64],
    text_offsets: NDArray[np.int32],
    text_data: NDArray[np.uint8],
    owners: Ints,
    wanted: NDArray[np.float64],
    wanted_offsets: NDArray[np.int32],
    wanted_data: NDArray[np.uint8],
    nothing: float,
    found: NDArray[np.float64],
) -> None:
    """Looks texts up in maps from text to number.

    Args:
        rows: int64[entries], the map of each entry, ascending.
        codes: int64[entries], each one's text.
        values: float64[entries].
        text_offsets: int32[texts + 1] into `text_data`, as `buffers` gives both.
        text_data: uint8[bytes].
        owners: int64[n], the map to look in.
        wanted: float64[n], the text to look for, by its place among the wanted texts; NaN for none.
        wanted_offsets: as `text_offsets`, of the wanted texts.
        wanted_data: uint8[bytes].
        nothing: the number of a text that is not in the map.
        found: float64[n], written to.
    """
    firsts = np.zeros(max(owners.max() if len(owners) else 0, rows[-1] if len(rows) else 0) + 2, np.int64)
    for row in rows:
        firsts[row + 1] += 1
    for row in range(1, len(firsts)):
        firsts[row] += firsts[row - 1]
    words = np.empty(len(codes), np.int64)
    for place in range(len(codes)):
        words[place] = _word(text_offsets, text_data, codes[place])
    for index in range(len(wanted)):
        found[index] = nothing
        if not wanted[index] >= 0:
            continue
        code = int(wanted[index])
        word = _word(wanted_offsets, wanted_data, code)
        for place in range(firsts[owners[index]], firsts[owners[index] + 1]):
            if words[np.uint64(place)] == word and _same(
                text_offsets, text_data, codes[place], wanted_offsets, wanted_data, code
            ):
                found[index] = values[place]
                break


@compiled
def _word(offsets: NDArray[np.int32], data: NDArray[np.uint8], code: int) -> int:
    """A text's last seven bytes and its length, to tell most texts apart at once: ids differ in their last digits."""
    begin, end = offsets[code], offsets[code + 1]
    word = np.int64(end - begin)
    for at in range(max(begin, end - 7), end):
        word = word << 8 | data[np.uint64(at)]
    return int(word)


@compiled
def _same(
    offsets: NDArray[np.int32],
    data: NDArray[np.uint8],
    code: int,
    other_offsets: NDArray[np.int32],
    other_data: NDArray[np.uint8],
    other_code: int,
) -> bool:
    begin, other_begin = offsets[code], other_offsets[other_code]
    length = offsets[code + 1] - begin
    if length != other_offsets[other_code + 1] - other_begin:
        return False
    for at in range(length):  # noqa: SIM110  # numba compiles no generators
        if data[begin + at] != other_data[other_begin + at]:
            return False
    return True


def hash64(texts: pa.StringArray) -> NDArray[np.uint64]:
    """uint64[n]: a hash of each text's UTF-8 bytes, the same on every machine and in every version.

    Eight bytes at a time, each word mixed in with the finaliser of SplitMix64 (Steele, Lea, Flood, 2014); the length
    goes in first, so that padding can't collide. Stored state (dedupe sets, sketches) depends on it: never change it.
    """
    digests: NDArray[np.uint64] = _hashes(*buffers(texts))
    return digests


@compiled
def _hashes(offsets: NDArray[np.int32], data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    digests = np.empty(len(offsets) - 1, np.uint64)
    for text in range(len(digests)):
        digests[text] = _digest(data, offsets[text], offsets[text + 1], _MIX_A)
    return digests


@compiled
def keyed_hashes(offsets: NDArray[np.int32], data: NDArray[np.uint8], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """uint64[n, keys]: hashes of each text as `hash64`, by secret keys instead of a constant."""
    digests = np.empty((len(offsets) - 1, len(keys)), np.uint64)
    for text in range(len(digests)):
        for key in range(len(keys)):
            digests[text, key] = _digest(data, offsets[text], offsets[text + 1], keys[key])
    return digests


@compiled
def _digest(data: NDArray[np.uint8], begin: int, end: int, key: np.uint64) -> np.uint64:
    digest: np.uint64 = _mix(np.uint64(end - begin) + key)
    for first in range(begin, end, 8):
        word = np.uint64(0)
        for at in range(min(first + 8, end) - 1, first - 1, -1):
            word = word << np.uint64(8) | np.uint64(data[at])
        digest = _mix(digest ^ word)
    return digest


@compiled
def _mix(word: np.uint64) -> np.uint64:
    word = word + _MIX_A
    word = (word ^ (word >> np.uint64(30))) * _MIX_B
    word = (word ^ (word >> np.uint64(27))) * _MIX_C
    return word ^ (word >> np.uint64(31))
