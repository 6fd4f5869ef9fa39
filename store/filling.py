"""What a backfill and a shard's writer leave for each other: where the shard's history ends, and its rows in batches.

The writer's claim, when it takes up a plan that is filled, also writes the positions that it goes on from: history are
all events before. Whoever has them makes rows of them, in batches that are numbered; the writer adds batch after batch
to its rows, each in one commit with the number of the next and the deletion of the batch. See
docs/decisions/0020-backfill.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from features.times import DAY_MS

KEPT_MS: Final = 30 * DAY_MS
"""A backfill that takes longer has to begin again."""


class Batch(msgspec.Struct, frozen=True, array_like=True):
    """Rows of some entities of a shard: their ids, in UTF-8, and by family the row of each, empty for none.

    Of those that are forgotten it says since when: nothing before is in the rows.
    """

    ids: list[bytes]
    rows: dict[str, list[bytes]]
    forgotten: dict[bytes, int] = {}

    def encode(self) -> bytes:
        """As Redis keeps it."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Batch:
        """The inverse of `encode`."""
        return msgspec.msgpack.decode(data, type=cls)


def encode_seam(positions: Mapping[str, int] | None) -> bytes:
    """Where a shard's history ends: by `topic/partition`, the first offset that is not part of it.

    None says that this will never be known, as an older plan ran in between.
    """
    return msgspec.json.encode(positions)


def decode_seam(data: bytes) -> dict[str, int] | None:
    """The inverse of `encode_seam`."""
    return msgspec.json.decode(data, type=dict[str, int] | None)
