"""The packed row: bytes to `Rows` and back, for thousands of rows at once.

    byte 0-3    tag: of this format and the family's layout
    4-9         time of the last event: seconds (u4), milliseconds (u2)
    10-11       number of texts
    5 a table   number of entries (u4), width of its small integers and whether its ticks are near (u1)
    …           the tables' entries, one packed record each
    …           the texts: their lengths (u2 each), then their UTF-8 bytes

Counts, buckets and text indices are unsigned integers of the width that the row's largest needs (1, 2, 4 or 8 bytes);
a text index is one more than its position in the row's texts, 0 for null. Ticks, of tiles' starts and of when a bucket
was seen, are u4; or near, if all of a table can be: how long before the row's last event, starts in minutes (u2),
others in ticks (3 bytes). Little-endian throughout. Records stand at any byte. The loops over them are compiled:
`store.packing`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.kernel import Rows
from features.layout import Bundle, Family
from features.partials import Physical
from features.texts import NO_TEXTS, buffers, from_buffers
from store import packing

Ints = NDArray[np.int64]


class CorruptRowError(ValueError):
    """Bytes that are no row of the family; `position` is the place of the bytes in what was decoded.

    `other` says that they may be one of another layout.
    """

    def __init__(self, family: Family, position: int, reason: str, *, other: bool = False) -> None:
        super().__init__(f"not a row of {family.name}: {reason}")
        self.family = family
        self.position = position
        self.reason = reason
        self.other = other


def decode(rows_of: Family | Bundle, blobs: Sequence[bytes | None]) -> Rows:
    """Rows of n entities from their bytes; None is an entity never seen.

    Of a bundle, all rows of its first family, then all of the next.

    Raises:
        CorruptRowError: if bytes have another layout or length than they should.
    """
    bundle = rows_of.alone if isinstance(rows_of, Family) else rows_of
    n, shape = len(blobs) // len(bundle.families), _shape(bundle)
    there = [blob or b"" for blob in blobs]
    data = np.frombuffer(b"".join(there), np.uint8)
    if len(data) == 0:
        return Rows.empty(bundle, n)
    lengths = np.fromiter(map(len, there), np.int64, len(there))
    bad, reason, latest_ms, pool, entries, offsets, text_data, text_counts = packing.unpack(data, lengths, n, *shape)
    if bad >= 0:
        family = bundle.families[bad // n]
        raise CorruptRowError(family, bad, _reason(family, there[bad], reason), other=reason == packing.OTHER_LAYOUT)
    return Rows.of_pool(bundle, latest_ms, pool, entries, _texts(bundle, offsets, text_data, text_counts))


def encode(rows_of: Family | Bundle, rows: Rows) -> list[bytes]:
    """The bytes of each row; empty ones for a row with no entry in any table. Of a bundle, as `decode` takes them."""
    bundle = rows_of.alone if isinstance(rows_of, Family) else rows_of
    data, ends = packing.pack(*_shape(bundle), rows.latest_ms, rows.pool, rows.sizes, *buffers(rows.texts))
    whole, ends_at = data.tobytes(), ends.tolist()
    return [whole[start:end] for start, end in zip([0, *ends_at], ends_at, strict=False)]


def tag_of(blob: bytes) -> bytes:
    """What a row says of its layout."""
    return blob[: packing.TAG_BYTES]


class _Shape(NamedTuple):
    """A bundle as `store.packing.unpack` takes it."""

    tags: NDArray[np.uint8]
    parts: Ints
    sizes: Ints
    places: Ints
    lines: Ints


_KINDS: Final[dict[Physical, int]] = {
    "count": packing.COUNT,
    "float": packing.WORD,
    "time": packing.TIME,
    "tick": packing.TICK,
    "text": packing.TEXT,
}
_BUCKETS: Final = {
    "text": packing.BUCKET,
    "hash": packing.WORD,
    "cell": packing.CELL,
    "log": packing.CELL,
    "event": packing.WORD,
}
_BYTES: Final = [
    {packing.START: start, packing.TICK: tick, packing.TIME: 6, packing.WORD: 8}
    for start, tick in zip(packing.START_BYTES, packing.TICK_BYTES, strict=True)
]


@lru_cache(maxsize=1024)
def _shape(bundle: Bundle) -> _Shape:
    fields = []
    for layout in bundle.tables:
        own = [packing.START] if layout.table.starts else []
        own += [_BUCKETS[layout.table.bucket]] if layout.table.bucket else []
        fields.append([*own, *(_KINDS[kind] for kind in layout.physical)])
    longest = max(map(len, fields))
    return _Shape(
        np.array([list(family.tag) for family in bundle.families], np.uint8),
        np.cumsum([len(family.tables) for family in bundle.families]),
        np.array(
            [
                [sum(sizes.get(kind, width) for kind in own) for sizes in _BYTES for width in packing.WIDTHS]
                for own in fields
            ]
        ),
        np.array([own + [-1] * (longest - len(own)) for own in fields], np.int64),
        np.array([layout.n_lines for layout in bundle.tables]),
    )


def _reason(family: Family, blob: bytes, reason: int) -> str:
    if reason == packing.TOO_SHORT:
        return f"{len(blob)} bytes are too few"
    if reason == packing.OTHER_LAYOUT:
        return f"layout {tag_of(blob).hex()} where layout {family.tag.hex()} is expected"
    return packing.REASONS[reason]


def _texts(bundle: Bundle, offsets: NDArray[np.int32], data: NDArray[np.uint8], counts: Ints) -> pa.StringArray:
    """All rows' texts."""
    if len(offsets) == 1:
        return NO_TEXTS
    texts = from_buffers(offsets, data)
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        first = np.concatenate([[0], np.cumsum(counts)])
        where = next(blob for blob in range(len(counts)) if not _is_utf8(texts[first[blob] : first[blob + 1]]))
        family = bundle.families[where // (len(counts) // len(bundle.families))]
        raise CorruptRowError(family, where, f"it holds text that is not UTF-8: {error}") from error
    return texts


def _is_utf8(texts: pa.StringArray) -> bool:
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True
