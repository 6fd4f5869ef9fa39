"""The mirror: rows that are asked for again and again, kept in the process that serves them.

What is kept of a row is not its bytes but its totals: the partials over every window, in one line of an array. They
stay as they are until an event comes, of which Redis tells (client tracking, see `store.connection`), or until a tile
enters or leaves a window, at a time that is known when they are folded. What changes all the time (decayed sums, times
since) aggregations compute from them in any case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.layout import Family
from features.loops import compiled
from features.rows import Rows
from features.texts import NO_TEXTS, from_buffers
from features.totals import Totals, flat, stay_until_ms
from store.keys import expire_at_ms
from store.places import PlaceIndex

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_TEXTS_A_ROW: Final = 8
"""So many texts for each row that is kept; when there are more, everything is forgotten."""
_TEXT_BYTES: Final = 64
"""So long are texts on average; when all together are longer, everything is forgotten as well."""
_PASSED_MAX: Final = 64
"""So many rows that were used are passed over for one that was not."""


class Mirror:
    """The totals of up to `rows_max` rows of a family without buckets; those used least lately make room.

    A row is used from when it was read to when Redis says that its key has changed: `forget` must be called for every
    key then, in the order of the answers. `hits` and `misses` count the rows asked for.
    """

    def __init__(self, family: Family, rows_max: int) -> None:
        if family.has_buckets:
            msg = f"{family.name} has tables with buckets, whose totals have no fixed size"
            raise ValueError(msg)
        self.hits = self.misses = 0
        self._family = family
        self._rows_max = rows_max
        # After the totals: the row's last event, and from when to when it may be used; all in ms.
        self._lines = np.zeros((rows_max, int(family.alone.n_totals.sum()) + 3))
        self._used = np.zeros(rows_max, bool)
        self._index = PlaceIndex(rows_max)
        self._digests_at = np.zeros((rows_max, 2), np.uint64)
        self._free = list(range(rows_max))
        self._hand = 0
        self._readings: list[Reading] = []
        self._texts = _Texts()
        self._text_lines = _text_lines(family)

    def __len__(self) -> int:
        return self._rows_max - len(self._free)

    def __repr__(self) -> str:
        return f"<Mirror {self._family.name} rows={len(self)}/{self._rows_max} hits={self.hits} misses={self.misses}>"

    def forget(self, entity_id: str) -> None:
        """The entity's row has changed."""
        place = self._index.remove(self._index.digests(pa.array([entity_id]))[0])
        if place >= 0:
            self._free.append(place)
        for reading in self._readings:
            reading.fresh.discard(entity_id)

    def clear(self) -> None:
        """Any row may have changed."""
        self._index.clear()
        self._free = list(range(self._rows_max))
        self._texts = _Texts()
        for reading in self._readings:
            reading.fresh.clear()

    def reading(self, ids: pa.StringArray, now_ms: int) -> Reading:
        """Begins to read rows: those that the mirror has are taken at once. To be used by `with`."""
        return Reading(self, ids, now_ms)

    def _keep(self, ids: pa.StringArray, lines: Floats, fresh: set[str]) -> None:
        digests = self._index.digests(ids)
        places = self._index.find(digests).tolist()
        for at, entity_id in enumerate(ids.to_pylist()):
            if entity_id in fresh:
                place = places[at]
                # Making room may have taken the place that another of these had.
                if place < 0 or not np.array_equal(self._digests_at[place], digests[at]):
                    place = self._room()
                    self._index.put(digests[at], place)
                    self._digests_at[place] = digests[at]
                self._lines[place] = lines[at]
        texts_max = _TEXTS_A_ROW * self._rows_max + 1024
        if len(self._texts) > texts_max or self._texts.n_bytes > _TEXT_BYTES * texts_max:
            self.clear()

    def _room(self) -> int:
        """A place for one more row: a free one, or the next that was not used since the hand of the clock came by last.

        Without regard to free ones the hand would throw out rows while up to half of the places were empty.
        """
        if self._free:
            return self._free.pop()
        for _ in range(_PASSED_MAX):
            if not self._used[self._hand]:
                break
            self._used[self._hand] = False
            self._hand = (self._hand + 1) % self._rows_max
        place = self._hand
        self._index.remove(self._digests_at[place])
        self._hand = (place + 1) % self._rows_max
        return place


class Reading:
    """Some rows on their way from the mirror and Redis to their totals.

    Attributes:
        hits: how many rows the mirror had.
        missing: the ids to read from Redis, each once; text.
        fresh: those of them whose rows have not changed since.
    """

    def __init__(self, mirror: Mirror, ids: pa.StringArray, now_ms: int) -> None:
        self._mirror, self._now_ms = mirror, now_ms
        # A mirror that is emptied begins new ones; what was taken from it before is still as of then.
        self._texts = mirror._texts
        places = mirror._index.find(mirror._index.digests(ids))
        self._columns, self._absent = _take(mirror._lines, places, now_ms, mirror._used)
        self.hits = len(ids) - len(self._absent)
        mirror.hits += self.hits
        mirror.misses += len(self._absent)
        self.missing, self._missing_at = NO_TEXTS, self._absent
        if len(self._absent):
            missing = ids.take(pa.array(self._absent)).dictionary_encode()
            self.missing, self._missing_at = missing.dictionary, np.asarray(missing.indices)
        self.fresh = set(self.missing.to_pylist())

    def __enter__(self) -> Self:
        self._mirror._readings.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._mirror._readings.remove(self)

    def totals(self, rows: Rows) -> Totals:
        """The totals of all rows, given the rows of the missing ones."""
        mirror = self._mirror
        if len(self.missing):
            lines = self._fold(rows)
            mirror._keep(self.missing, lines, self.fresh)
            self._columns[:, self._absent] = lines[self._missing_at].T
        last_event_ms = self._columns[-3].astype(np.int64)
        return Totals.of_matrix(mirror._family.alone, self._columns[:-3], last_event_ms, self._texts.array())

    def _fold(self, rows: Rows) -> Floats:
        """float64[n, totals + 3]: the lines of rows, as in `Mirror._lines`."""
        family, now_ms = self._mirror._family, self._now_ms
        totals = flat(family.alone, rows, now_ms)
        if len(rows.texts):
            codes = self._texts.codes(rows.texts.to_pylist())
            for line in self._mirror._text_lines:
                own = totals[line].astype(np.int64)
                totals[line] = np.where(own < 0, -1, codes[own])
        until_ms = stay_until_ms(family.alone, rows, now_ms)
        seen = rows.last_event_ms >= 0
        until_ms[seen] = np.minimum(until_ms, expire_at_ms(family, rows.last_event_ms))[seen]
        return np.vstack([totals, rows.last_event_ms, np.full(rows.n, now_ms), until_ms]).T


@compiled
def _take(lines: Floats, places: Ints, now_ms: int, used: NDArray[np.bool_]) -> tuple[Floats, Ints]:
    """The lines at the places, as columns; and which of them are missing: not held, or not valid at `now_ms`."""
    n_columns, n = lines.shape[1], len(places)
    columns = np.empty((n_columns, n))
    missing = np.empty(n, np.int64)
    n_missing = 0
    for at in range(n):
        place = places[at]
        if place < 0 or not lines[place, n_columns - 2] <= now_ms < lines[place, n_columns - 1]:
            missing[n_missing] = at
            n_missing += 1
            continue
        used[place] = True
        for column in range(n_columns):
            columns[column, at] = lines[place, column]
    return columns, missing[:n_missing]


class _Texts:
    """Texts that only ever grow in number, each once, as Arrow has them."""

    def __init__(self) -> None:
        self._code_of: dict[str, int] = {}
        self._offsets = np.zeros(1024, np.int32)
        self._data = np.zeros(16_384, np.uint8)

    def __len__(self) -> int:
        return len(self._code_of)

    @property
    def n_bytes(self) -> int:
        """The length of all together."""
        return int(self._offsets[len(self)])

    def codes(self, texts: Sequence[str]) -> Ints:
        """int64[n]: the place of each text."""
        return np.array([self._code_of[text] if text in self._code_of else self._add(text) for text in texts], np.int64)

    def array(self) -> pa.StringArray:
        """All texts by their codes, without a copy: bytes once written stay."""
        n = len(self)
        return from_buffers(self._offsets[: n + 1], self._data[: self._offsets[n]])

    def _add(self, text: str) -> int:
        code, encoded = len(self), text.encode()
        begin = int(self._offsets[code])
        end = begin + len(encoded)
        if code + 2 > len(self._offsets):
            self._offsets = np.concatenate([self._offsets, np.zeros_like(self._offsets)])
        if end > len(self._data):
            self._data = np.concatenate([self._data, np.zeros(max(len(self._data), len(encoded)), np.uint8)])
        self._data[begin:end] = np.frombuffer(encoded, np.uint8)
        self._offsets[code + 1] = end
        self._code_of[text] = code
        return code


def _text_lines(family: Family) -> list[int]:
    """Which totals are codes of texts."""
    kinds = [kind for layout in family.tables for kind in layout.physical for _ in range(layout.totals_shape[1])]
    return [line for line, kind in enumerate(kinds) if kind == "text"]
