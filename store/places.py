"""Which place each id has: a hash table that finds hundreds at once, without touching an object for each."""

from __future__ import annotations

import secrets
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.loops import compiled
from features.texts import buffers, keyed_hashes

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

_FREE: Final = np.uint64(0)


class PlaceIndex:
    """Up to `size` ids, each with a place.

    Ids are known by 128 bits of their digest, keyed anew for each index: two of a million different ones have the same
    once in 10^26 times, and nobody can make such. Open addressing with linear probing, at most half full; what is
    removed leaves no mark (Knuth, The Art of Computer Programming 3, 6.4, algorithm R).
    """

    def __init__(self, size: int) -> None:
        # Digest, and the place plus one: 0 is free.
        self._slots = np.zeros((1 << max(2 * size - 1, 1).bit_length(), 3), np.uint64)
        self._keys = np.array([secrets.randbits(64), secrets.randbits(64)], np.uint64)

    def digests(self, ids: pa.StringArray) -> Words:
        """uint64[n, 2]: what ids are known by."""
        digests: Words = keyed_hashes(*buffers(ids), self._keys)
        return digests

    def find(self, digests: Words) -> Ints:
        """int64[n]: the place of each; -1 for none."""
        places: Ints = find(self._slots, digests)
        return places

    def put(self, digest: Words, place: int) -> None:
        """Gives one that has none a place."""
        put(self._slots, digest, place)

    def remove(self, digest: Words) -> int:
        """Takes one out; the place that it had, -1 for none."""
        place: Any = remove(self._slots, digest)
        return int(place)

    def clear(self) -> None:
        """Takes all out."""
        self._slots[:] = _FREE


@compiled
def _slot_of(slots: Words, first: np.uint64, second: np.uint64) -> np.uint64:
    """Where a digest is, or where it would go."""
    mask = np.uint64(len(slots) - 1)
    slot = first & mask
    while slots[slot, 2] != _FREE and not (slots[slot, 0] == first and slots[slot, 1] == second):
        slot = (slot + np.uint64(1)) & mask
    return slot


@compiled
def find(slots: Words, digests: Words) -> Ints:
    """See `PlaceIndex.find`."""
    places = np.empty(len(digests), np.int64)
    for at in range(len(digests)):
        slot = _slot_of(slots, digests[at, 0], digests[at, 1])
        places[at] = np.int64(slots[slot, 2]) - 1
    return places


@compiled
def put(slots: Words, digest: Words, place: int) -> None:
    """See `PlaceIndex.put`."""
    slot = _slot_of(slots, digest[0], digest[1])
    slots[slot, 0], slots[slot, 1], slots[slot, 2] = digest[0], digest[1], place + 1


@compiled
def remove(slots: Words, digest: Words) -> int:
    """See `PlaceIndex.remove`."""
    mask = np.uint64(len(slots) - 1)
    hole = _slot_of(slots, digest[0], digest[1])
    place = np.int64(slots[hole, 2]) - 1
    if place < 0:
        return -1
    slot = (hole + np.uint64(1)) & mask
    while slots[slot, 2] != _FREE:
        # It moves back unless that would put it before where a search for it begins.
        if (slot - slots[slot, 0]) & mask >= (slot - hole) & mask:
            slots[hole] = slots[slot]
            hole = slot
        slot = (slot + np.uint64(1)) & mask
    slots[hole, 2] = _FREE
    return int(place)
