"""Bulk reads: the rows of many entities in several families, in one round trip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import pyarrow as pa

from features.layout import Bundle
from features.rows import Rows
from store.codec import CorruptRowError, decode
from store.keys import Keyspace
from store.layouts import Blob, Layouts
from store.resp import Arguments


class ForeignValueError(RuntimeError):
    """A key of ours holds something that is no row of ours; names the key."""


@dataclass(frozen=True)
class Request:
    """Which rows are wanted: bundles of some entities, by the entities' ids."""

    keyspace: Keyspace
    layouts: Layouts
    wanted: tuple[tuple[Bundle, pa.StringArray], ...]

    @cached_property
    def keys(self) -> Arguments:
        """All keys, bundle by bundle and family by family: for one MGET."""
        return Arguments.chain([self.keyspace.arguments(bundle.families, ids) for bundle, ids in self.wanted])

    def rows(self, blobs: Sequence[Blob]) -> dict[str, Rows]:
        """The answer of MGET as rows, by the bundle's name.

        Raises:
            ForeignValueError: if a value is no row.
        """
        found = {}
        at = 0
        for bundle, ids in self.wanted:
            end = at + len(ids) * len(bundle.families)
            found[bundle.name] = read_rows(bundle, blobs[at:end], partial(self._key, at), self.layouts)
            at = end
        return found

    def _key(self, first: int, place: int) -> bytes:
        return self.keys[first + place]


def read_rows(bundle: Bundle, blobs: Sequence[Blob], key_at: Callable[[int], bytes], layouts: Layouts) -> Rows:
    """Rows of n entities, whatever plan they were written by, with an error that names the key by its place.

    Raises:
        ForeignValueError: if a value is no row.
    """
    try:
        try:
            return decode(bundle, blobs)
        except CorruptRowError as error:
            if not error.other:
                raise
            return decode(bundle, layouts.own(bundle, blobs))
    except CorruptRowError as error:
        key = key_at(error.position).decode(errors="backslashreplace")
        msg = f"Redis key {key!r}: {error}; neither was it written by an applied plan: what else writes here?"
        raise ForeignValueError(msg) from error
