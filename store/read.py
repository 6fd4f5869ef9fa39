"""Bulk reads: the rows of many entities in several families, in one round trip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import pyarrow as pa

from features.given import Fields, Find, GivenRowError, GivenRows
from features.layout import Bundle
from features.program import GivenView
from features.rows import Rows
from store.codec import CorruptRowError, decode
from store.keys import Keyspace, given_keys
from store.layouts import Blob, Layouts
from store.resp import Arguments


class ForeignValueError(RuntimeError):
    """A key of ours holds something that is no row of ours; names the key."""


@dataclass(frozen=True)
class Request:
    """Which rows are wanted: bundles of some entities, by the entities' ids, and ordinary views of some."""

    keyspace: Keyspace
    layouts: Layouts
    wanted: tuple[tuple[Bundle, pa.StringArray], ...]
    given: tuple[tuple[GivenView, pa.StringArray], ...] = ()

    @cached_property
    def keys(self) -> Arguments:
        """All keys, bundle by bundle and family by family, then view by view: for one MGET."""
        project = self.keyspace.project
        of_bundles = [self.keyspace.arguments(bundle.families, ids) for bundle, ids in self.wanted]
        return Arguments.chain([*of_bundles, *(given_keys(project, view.view, ids) for view, ids in self.given)])

    def rows(self, blobs: Sequence[Blob]) -> dict[str, Rows | GivenRows]:
        """The answer of MGET as rows, by the name of the bundle or the ordinary view.

        Raises:
            ForeignValueError: if a value is no row.
        """
        found: dict[str, Rows | GivenRows] = {}
        at = 0
        for bundle, ids in self.wanted:
            end = at + len(ids) * len(bundle.families)
            found[bundle.name] = read_rows(bundle, blobs[at:end], partial(self._key, at), self.layouts)
            at = end
        for view, ids in self.given:
            end = at + len(ids)
            found[view.name] = given_rows(view.fields, blobs[at:end], partial(self._key, at), self.layouts.fields)
            at = end
        return found

    def _key(self, first: int, place: int) -> bytes:
        return self.keys[first + place]


def given_rows(given: Fields, blobs: Sequence[Blob], key_at: Callable[[int], bytes], find: Find) -> GivenRows:
    """Rows of given features, with an error that names the key by its place.

    Raises:
        ForeignValueError: if a value is no row.
    """
    try:
        return GivenRows(given, blobs, find)
    except GivenRowError as error:
        raise _foreign(key_at(error.place), error, "what else writes here?") from error


def _foreign(key: bytes, error: Exception, remedy: str) -> ForeignValueError:
    return ForeignValueError(f"Redis key {key.decode(errors='backslashreplace')!r}: {error}; {remedy}")


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
        remedy = "neither was it written by an applied plan: what else writes here?"
        raise _foreign(key_at(error.position), error, remedy) from error
