"""What commands say of many keys, in RESP: packed once, by a compiled loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from features.loops import compiled

Bytes = NDArray[np.uint8]
Offsets = NDArray[np.int32]

_LENGTH_BYTES_MAX: Final = 24
"""Of what stands around an argument: `$`, its length, and two line ends."""


class Arguments(Sequence[bytes]):
    """Arguments of a command, packed as they are sent; taken apart only for those who ask."""

    def __init__(self, n: int, packed: bytes) -> None:
        self.packed = packed
        self._n = n

    @classmethod
    def of(cls, values: Sequence[bytes]) -> Arguments:
        """Any values; those that are packed stay as they are."""
        if isinstance(values, cls):
            return values
        return cls(len(values), b"".join([b"$%d\r\n%b\r\n" % (len(value), value) for value in values]))

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        return self._values[index]

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._values)

    @classmethod
    def chain(cls, parts: Sequence[Arguments]) -> Arguments:
        """All of them, one after the other."""
        return cls(sum(map(len, parts)), b"".join([part.packed for part in parts]))

    @cached_property
    def _values(self) -> list[bytes]:
        found, at = [], 0
        while at < len(self.packed):
            begin = self.packed.index(b"\r\n", at) + 2
            end = begin + int(self.packed[at + 1 : begin])
            found.append(self.packed[begin:end])
            at = end + 2
        return found


def command(name: bytes, arguments: Sequence[bytes]) -> bytes:
    """A command and its arguments."""
    return b"*%d\r\n$%d\r\n%b\r\n%b" % (len(arguments) + 1, len(name), name, Arguments.of(arguments).packed)


def joined(
    prefixes: tuple[Offsets, Bytes], n_groups: int, chosen: NDArray[np.int64], texts: tuple[Offsets, Bytes]
) -> Arguments:
    """Each text behind one prefix of each group.

    Args:
        prefixes: offsets, int32[groups * size + 1], into their bytes, uint8[...]: all of the first group, then all of
            the next …
        n_groups: how many groups there are.
        chosen: int64[texts], by text which prefix of a group.
        texts: as `prefixes`.

    Returns:
        groups * texts arguments: every text behind its prefix of the first group, then of the second …
    """
    packed: Any = _join(*prefixes, n_groups, chosen, *texts)
    return Arguments(n_groups * len(chosen), packed.tobytes())


@compiled
def _join(
    prefix_offsets: Offsets,
    prefix_data: Bytes,
    n_groups: int,
    chosen: NDArray[np.int64],
    text_offsets: Offsets,
    text_data: Bytes,
) -> Bytes:
    n_texts = len(chosen)
    group_size = (len(prefix_offsets) - 1) // n_groups
    size = n_groups * (text_offsets[-1] - text_offsets[0])
    for group in range(n_groups):
        for text in range(n_texts):
            prefix = group * group_size + chosen[text]
            size += _LENGTH_BYTES_MAX + prefix_offsets[prefix + 1] - prefix_offsets[prefix]
    out = np.empty(size, np.uint8)
    end = 0
    for group in range(n_groups):
        for text in range(n_texts):
            prefix = group * group_size + chosen[text]
            first, last = prefix_offsets[prefix], prefix_offsets[prefix + 1]
            begin, stop = text_offsets[text], text_offsets[text + 1]
            length = last - first + stop - begin
            out[end] = 36  # $
            end += 1
            digits = 1
            while length >= 10**digits:
                digits += 1
            for digit in range(digits):
                out[end + digits - 1 - digit] = 48 + length // 10**digit % 10
            end = _line_end(out, end + digits)
            for at in range(first, last):
                out[end] = prefix_data[at]
                end += 1
            for at in range(begin, stop):
                out[end] = text_data[at]
                end += 1
            end = _line_end(out, end)
    return out[:end]


@compiled
def _line_end(out: Bytes, at: int) -> int:
    out[at], out[at + 1] = 13, 10
    return at + 2
