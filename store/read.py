"""Bulk reads: the rows of many entities in several families, in one round trip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from features.layout import Bundle
from features.rows import Rows
from store.codec import CorruptRowError, decode
from store.keys import Keyspace

Blob = bytes | None


class ForeignValueError(RuntimeError):
    """A key of ours holds something that is no row of ours; names the key."""


@dataclass(frozen=True)
class Request:
    """Which rows are wanted: bundles of some entities, by the entities' ids in UTF-8."""

    keyspace: Keyspace
    wanted: tuple[tuple[Bundle, Sequence[bytes]], ...]

    @cached_property
    def keys(self) -> list[bytes]:
        """All keys, bundle by bundle and family by family: for one MGET."""
        return [
            key for bundle, ids in self.wanted for family in bundle.families for key in self.keyspace.rows(family, ids)
        ]

    def rows(self, blobs: Sequence[Blob]) -> dict[str, Rows]:
        """The answer of MGET as rows, by the bundle's name.

        Raises:
            ForeignValueError: if a value is no row.
        """
        found = {}
        at = 0
        for bundle, ids in self.wanted:
            end = at + len(ids) * len(bundle.families)
            found[bundle.name] = read_rows(bundle, blobs[at:end], self.keys[at:end].__getitem__)
            at = end
        return found


def read_rows(bundle: Bundle, blobs: Sequence[Blob], key_at: Callable[[int], bytes]) -> Rows:
    """Rows of n entities: `store.codec.decode`, with an error that names the key by its place.

    Raises:
        ForeignValueError: if a value is no row.
    """
    try:
        return decode(bundle, blobs)
    except CorruptRowError as error:
        key = key_at(error.position).decode(errors="backslashreplace")
        msg = f"Redis key {key!r}: {error}; it was written by something else or by another version of its view"
        raise ForeignValueError(msg) from error
