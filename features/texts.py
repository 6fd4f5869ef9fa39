"""Strings in bulk: everything that the kernel and the codec do with text, vectorised by Arrow and numpy.

The kernel computes with *codes*: int64 positions in a sorted array of unique texts, so that comparing codes compares
the texts by code point (UTF-8 bytes sort alike). -1 stands for null.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features.fold import compiled

Ints = NDArray[np.int64]
NO_TEXTS: Final = pa.array([], pa.string())
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
    codes = rank[np.asarray(encoded.indices.fill_null(-1))]
    ends = np.cumsum([len(array) for array in arrays])
    return encoded.dictionary.take(pa.array(order)), np.split(codes, ends[:-1]) if arrays else []


def buffers(texts: pa.StringArray) -> tuple[Ints, NDArray[np.uint8]]:
    """Offsets (int64[n + 1]) into the UTF-8 bytes (uint8[...]) of the texts."""
    _, offsets_buffer, data_buffer = texts.buffers()
    if offsets_buffer is None or len(texts) == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    offsets = np.frombuffer(offsets_buffer, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.zeros(0, np.uint8)
    return offsets.astype(np.int64) - int(offsets[0]), data[offsets[0] : offsets[-1]]


def from_buffers(offsets: NDArray[np.int32], data: NDArray[np.uint8]) -> pa.StringArray:
    """The inverse of `buffers`."""
    return pa.StringArray.from_buffers(
        len(offsets) - 1,
        pa.py_buffer(offsets),
        pa.py_buffer(np.ascontiguousarray(data)),
    )


@compiled  # type: ignore[untyped-decorator]  # numba has no types
def find(
    offsets: Ints,
    codes: Ints,
    text_offsets: Ints,
    text_data: NDArray[np.uint8],
    lists: Ints,
    wanted: Ints,
    wanted_offsets: Ints,
    wanted_data: NDArray[np.uint8],
) -> Ints:
    """Looks texts up in lists of texts.

    Args:
        offsets: int64[lists + 1], where each list begins in `codes`.
        codes: int64[…], the lists' texts.
        text_offsets: int64[texts + 1] into `text_data`, as `buffers` gives both.
        text_data: uint8[bytes].
        lists: int64[n], the list to look in.
        wanted: int64[n], the text to look for, by its place among the wanted texts; -1 for none.
        wanted_offsets: as `text_offsets`, of the wanted texts.
        wanted_data: uint8[bytes].

    Returns:
        int64[n], the first place in `codes`, -1 where the text is not in the list.
    """
    places = np.full(len(wanted), -1, np.int64)
    for index in range(len(wanted)):
        if wanted[index] < 0:
            continue
        first = wanted_offsets[wanted[index]]
        length = wanted_offsets[wanted[index] + 1] - first
        for place in range(offsets[lists[index]], offsets[lists[index] + 1]):
            begin = text_offsets[codes[place]]
            if text_offsets[codes[place] + 1] - begin != length:
                continue
            same = 0
            while same < length and text_data[begin + same] == wanted_data[first + same]:
                same += 1
            if same == length:
                places[index] = place
                break
    return places


def hash64(texts: pa.StringArray) -> NDArray[np.uint64]:
    """uint64[n]: a hash of each text's UTF-8 bytes, the same on every machine and in every version.

    Eight bytes at a time, each word mixed in with the finaliser of SplitMix64 (Steele, Lea, Flood, 2014); the length
    goes in first, so that padding can't collide. Stored state (dedupe sets, sketches) depends on it: never change it.
    """
    offsets, data = buffers(texts)
    lengths = np.diff(offsets).astype(np.uint64)
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    words = np.ndarray((len(padded) - 7,), "<u8", padded, strides=(1,))
    digest = _mix(lengths + _MIX_A)
    for position in range(0, int(lengths.max(initial=0)), 8):
        live = np.flatnonzero(lengths > position)
        left = np.minimum(lengths[live] - np.uint64(position), np.uint64(8))
        # A whole word has nothing to mask, and shifting by 64 bits is undefined.
        mask = np.where(
            left == 8, ~np.uint64(0), (np.uint64(1) << (left * np.uint64(8) % np.uint64(64))) - np.uint64(1)
        )
        digest[live] = _mix(digest[live] ^ (words[offsets[live] + position] & mask))
    return digest


def _mix(word: NDArray[np.uint64]) -> NDArray[np.uint64]:
    word = word + _MIX_A
    word = (word ^ (word >> np.uint64(30))) * _MIX_B
    word = (word ^ (word >> np.uint64(27))) * _MIX_C
    return word ^ (word >> np.uint64(31))
