"""Features for rows of entity ids, a column each, as Feast asks for them: by its SDK, by its HTTP call, by `show`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from features.plan import NOBODY, Given, Plan
from features.program import Asked, Frame, Program
from features.values import to_arrow, to_python
from store.completeness import Completeness
from store.keys import Keyspace
from store.layouts import Layouts
from store.read import Request


class Reader:
    """Some features of a plan, for rows of entity ids as Feast gives them.

    Args:
        plan: the plan.
        full_names: of the features.
        layouts: of rows of other plans too.
        completeness: what the plan's features lack, kept up to date by who reads.
    """

    def __init__(
        self,
        plan: Plan,
        full_names: Sequence[str],
        layouts: Layouts | None = None,
        completeness: Completeness | None = None,
    ) -> None:
        self.plan = plan
        self._completeness = completeness or Completeness(plan)
        self.full_names = tuple(full_names)
        self.program = Program(plan, full_names)
        self._keyspace, self._layouts = Keyspace.of(plan), layouts or Layouts(plan)
        self._keys = {entity: plan.entity(entity).key for entity in self.program.entities}

    def read(
        self, mget: Callable[[Sequence[bytes]], Any], columns: Mapping[str, Sequence[Any]], now_ms: int, *, full: bool
    ) -> Response:
        """Reads and evaluates: `mget` is Redis's."""
        keys, respond = self.begin(columns, now_ms, full=full)
        return respond(mget(keys) if keys else [])

    def begin(
        self, columns: Mapping[str, Sequence[Any]], now_ms: int, *, full: bool
    ) -> tuple[Sequence[bytes], Callable[[Sequence[bytes | None]], Response]]:
        """The keys to read, and what makes the answer of their values.

        Raises:
            ValueError: if an entity's key is missing, columns differ in length, or short names collide.
        """
        asked, rows_of = self._ask(columns)
        wanted = tuple((bundle, asked.texts[bundle.entity]) for bundle in self.program.bundles)
        given = tuple((view, view.ids(asked)) for view in self.program.given)
        request = Request(self._keyspace, self._layouts, wanted, given)

        def respond(blobs: Sequence[bytes | None]) -> Response:
            frame = self.program.evaluate(request.rows(blobs), asked, now_ms)
            incomplete = self._completeness.incomplete(self.full_names, now_ms)
            return Response(self.plan, self.full_names, columns, frame, rows_of, incomplete, full=full)

        return request.keys, respond

    def _ask(self, columns: Mapping[str, Sequence[Any]]) -> tuple[Asked, dict[str, Any]]:
        """What to ask of the program, each id once, and each request row's place among the ids by entity."""
        if len({len(values) for values in columns.values()}) > 1:
            msg = "every entity key needs as many values as the others"
            raise ValueError(msg)
        ids, pairs = {}, {}
        if NOBODY.name in self._keys:
            columns = {**columns, NOBODY.key: [""] * max(map(len, columns.values()), default=1)}
        for entity, key in self._keys.items():
            if key not in columns:
                msg = f"entity rows lack {key!r}, the key of {entity}; they have: {', '.join(columns) or 'none'}"
                raise ValueError(msg)
            texts = pa.array([None if value is None else str(value) for value in columns[key]], pa.string())
            # A null id is that of an entity never seen: no event can have an empty one.
            encoded = texts.fill_null("").dictionary_encode()
            ids[entity] = encoded.dictionary.to_pylist()
            pairs[entity] = np.asarray(encoded.indices).astype(np.intp)
        return Asked(ids, pairs, {}), pairs


class Response:
    """What was read, turned into values as they are asked for.

    Attributes:
        columns: the request's ids, by entity key.
        names: of the features, full or short as asked.
        incomplete: see `store.completeness.Completeness.incomplete`.
    """

    def __init__(
        self,
        plan: Plan,
        full_names: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        frame: Frame,
        rows_of: Mapping[str, Any],
        incomplete: Mapping[str, int | None],
        *,
        full: bool,
    ) -> None:
        self.columns = columns
        self.incomplete = incomplete
        self._features = [plan.features[name] for name in full_names]
        self._frame = frame
        self._rows_of = rows_of
        self.names = [each.full_name if full else each.name for each in self._features]
        if len(set(self.names)) < len(self.names):
            msg = "two views of the request share a feature name: pass full_feature_names=True"
            raise ValueError(msg)
        if taken := [name for name in self.names if name in columns]:
            msg = f"{', '.join(taken)}: a feature and a key of the request share the name: pass full_feature_names=True"
            raise ValueError(msg)

    def to_dict(self) -> dict[str, list[Any]]:
        """Entity keys and features by name, a list each."""
        ids = {name: list(values) for name, values in self.columns.items()}
        return ids | dict(zip(self.names, map(self.values, range(len(self.names))), strict=True))

    def values(self, at: int) -> list[Any]:
        """Of the feature at a place, a value a row."""
        feature = self._features[at]
        values = to_python(self._frame.values[feature.full_name], feature.value_type)
        if len(feature.entities) > 1:
            return values
        return [values[row] for row in self._rows_of[feature.entities[0]].tolist()]

    def arrow(self, at: int) -> pa.Array:
        """As `values`, of the feature's own type."""
        feature = self._features[at]
        column = to_arrow(self._frame.values[feature.full_name], feature.value_type)
        return column if len(feature.entities) > 1 else column.take(pa.array(self._rows_of[feature.entities[0]]))

    def clock(self, at: int) -> tuple[str, ...]:
        """Features with the same have the same times: of entities, or of an ordinary view."""
        feature = self._features[at]
        return (f"@{feature.view}",) if isinstance(feature.spec, Given) else feature.entities

    def raw(self, at: int) -> tuple[str, list[Any]] | None:
        """Of a given feature its type, and a value a row as it was given: see `features.given.GivenRows.raw`."""
        feature = self._features[at]
        if not isinstance(feature.spec, Given):
            return None
        values = self._frame.given[feature.view].raw(feature.name)
        if len(feature.entities) == 1:
            values = [values[row] for row in self._rows_of[feature.entities[0]].tolist()]
        return feature.spec.dtype, values

    def event_us(self, at: int) -> Any:
        """int64[n]: the time of the last event of the feature's entities, the earlier one of two; of a given feature
        that of its row; -1 for none.
        """
        feature, latest = self._features[at], self._frame.last_event_ms
        entities = feature.entities
        if (given := self._frame.given.get(feature.view)) is not None:
            rows = self._rows_of[entities[0]] if len(entities) == 1 else slice(None)
            return np.where(given.found, given.event_us, -1)[rows]
        event_ms = np.minimum.reduce([latest[each][self._rows_of[each]] for each in entities if each in latest])
        return np.where(event_ms < 0, -1, event_ms * 1000)

    def statuses(self, at: int) -> list[str]:
        """PRESENT, NULL_VALUE or NOT_FOUND of every row, as Feast names them; OUTSIDE_MAX_AGE of what is incomplete."""
        feature = self._features[at]
        if (given := self._frame.given.get(feature.view)) is not None:
            rows = self._rows_of[feature.entities[0]] if len(feature.entities) == 1 else slice(None)
            # As Feast has it, what is null is there.
            names = np.array(["NOT_FOUND", "PRESENT", "OUTSIDE_MAX_AGE"])
            found: list[str] = names[given.found.astype(int) + given.outside][rows].tolist()
            return found
        seen = (self.event_us(at) >= 0).tolist()
        there = "OUTSIDE_MAX_AGE" if self._features[at].full_name in self.incomplete else "PRESENT"
        return [
            "NOT_FOUND" if not one else "NULL_VALUE" if value is None else there
            for one, value in zip(seen, self.values(at), strict=True)
        ]
