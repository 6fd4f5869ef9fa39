"""Rows of every applied plan, read as those of one of them: see docs/decisions/0018-rows-outlive-plans.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from features.evolve import Column, columns_from, move
from features.given import Find
from features.layout import Bundle, Family, families_of, family_of
from features.plan import Plan
from store.codec import CorruptRowError, decode, encode, tag_of

Blob = bytes | None
Fetch = Callable[[int, int], Sequence[Plan | None]]
"""The applied plans from one number to another, both counted; fewer where there are fewer, None for one of another
version of Headrace."""

_BLOCK: Final = 32
_LAST: Final = 1 << 40


class _Past(NamedTuple):
    """A layout that rows were written with, and where the columns of the one that is wanted come from."""

    family: Family
    columns: Mapping[Column, Column]


class Layouts:
    """The layouts of a plan's rows, and of those that other applied plans left.

    Other plans are read when a row is met that is not of this one: by `fetch`, at first the newer ones, whose streams
    may run already, then ever older ones.

    Attributes:
        fields: finds those of rows of given features, by tag.
    """

    def __init__(self, plan: Plan, fetch: Fetch = lambda _first, _last: (), fields: Find = lambda _tag: None) -> None:
        self._plan = plan
        self._fetch = fetch
        self.fields = fields
        self._older: list[Plan | None] = []
        self._found: dict[tuple[str, bytes], _Past | None] = {}

    def families(self, entity: str) -> set[str]:
        """The names of all families that there may be rows of, of an entity: those of every plan that can be read."""
        plans = [self._plan, *filter(None, self._fetch(0, _LAST))]
        return {
            family.name
            for plan in plans
            for view in plan.views
            for family in families_of(plan, view)
            if family.entity == entity
        }

    def own(self, bundle: Bundle, blobs: Sequence[Blob]) -> list[Blob]:
        """The rows, those of other layouts as of this plan's; what is of none is left as it is.

        Raises:
            CorruptRowError: if bytes have another length than their layout says.
        """
        n, found = len(blobs) // len(bundle.families), list(blobs)
        for at, family in enumerate(bundle.families):
            others: dict[bytes, list[int]] = {}
            for place in range(at * n, at * n + n):
                if (blob := blobs[place]) and not blob.startswith(family.tag):
                    others.setdefault(tag_of(blob), []).append(place)
            for tag, places in others.items():
                past = self._past(family, tag)
                if past is None:
                    continue
                try:
                    rows = decode(past.family, [blobs[place] for place in places])
                except CorruptRowError as error:
                    raise CorruptRowError(family, places[error.position], error.reason) from error
                own = encode(family, move(rows, past.family, family, past.columns))
                for place, blob in zip(places, own, strict=True):
                    found[place] = blob
        return found

    def _past(self, family: Family, tag: bytes) -> _Past | None:
        key = (family.name, tag)
        past = self._found.get(key)
        if past is None:
            past = self._search(family, tag, self._fetch(self._plan.number + 1, _LAST))
            if past is None and key not in self._found:  # Older plans stay what they were: they are searched once.
                past = self._search(family, tag, self._older_plans())
            self._found[key] = past
        return past

    def _search(self, family: Family, tag: bytes, plans: Iterable[Plan | None]) -> _Past | None:
        """The layout with this tag in the first of the plans that has it; each is a neighbour of the one before."""
        nearer, near = self._plan, family_of(self._plan, family.name)
        columns = {column: column for column in _columns(family)}
        for plan in plans:
            if plan is None:
                return None  # What went on by way of a plan that can't be read, nobody knows.
            its = family_of(plan, family.name)
            if its is not near:
                step = columns_from(plan, nearer, family.name)
                columns = {column: step[via] for column, via in columns.items() if via in step}
            if its is not None and its.tag == tag:
                return _Past(its, columns)
            nearer, near = plan, its
        return None

    def _older_plans(self) -> Iterator[Plan | None]:
        yield from self._older
        while (last := self._plan.number - 1 - len(self._older)) >= 0:
            block = list(reversed(self._fetch(max(last - _BLOCK + 1, 0), last)))
            if not block:
                return
            self._older += block
            yield from block


def _columns(family: Family) -> Iterator[Column]:
    for table, layout in enumerate(family.tables):
        for column in range(len(layout.physical)):
            yield table, column
