"""What commands say of many keys, in RESP: packed once, by a compiled loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from features.fold import compiled

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

    def __add__(self, others: Arguments) -> Arguments:
        return Arguments(len(self) + len(others), self.packed + others.packed)

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


def joined(prefixes: tuple[Offsets, Bytes], chosen: NDArray[np.int64], texts: tuple[Offsets, Bytes]) -> Arguments:
    """Each text behind some of the prefixes.

    Args:
        prefixes: offsets, int32[prefixes + 1], into their bytes, uint8[...].
        chosen: int64[m, texts], by text the prefix of each of its m arguments.
        texts: as `prefixes`.

    Returns:
        m * texts arguments: the first of every text, then the second …
    """
    packed: Any = _join(*prefixes, chosen, *texts)
    return Arguments(chosen.size, packed.tobytes())


@compiled  # type: ignore[untyped-decorator]  # numba has no types
def _join(
    prefix_offsets: Offsets, prefix_data: Bytes, chosen: NDArray[np.int64], text_offsets: Offsets, text_data: Bytes
) -> Bytes:
    n_each, n_texts = chosen.shape
    size = n_each * (text_offsets[-1] - text_offsets[0])
    for each in range(n_each):
        for text in range(n_texts):
            prefix = chosen[each, text]
            size += _LENGTH_BYTES_MAX + prefix_offsets[prefix + 1] - prefix_offsets[prefix]
    out = np.empty(size, np.uint8)
    end = 0
    for each in range(n_each):
        for text in range(n_texts):
            prefix = chosen[each, text]
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


@compiled  # type: ignore[untyped-decorator]  # as above
def _line_end(out: Bytes, at: int) -> int:
    out[at], out[at + 1] = 13, 10
    return at + 2
