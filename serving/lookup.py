"""From a ranking request to values: what to read, and the frame that it evaluates to. Knows no HTTP framework."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from redis.exceptions import RedisError

from features.layout import families_of
from features.plan import Feature, Plan
from features.program import Asked, Frame, Program
from features.rows import Rows
from features.totals import Totals
from serving.problems import Problem, invalid, unavailable
from store.connection import Connection
from store.keys import Keyspace
from store.mirror import Mirror, Reading
from store.read import ForeignValueError, Request

MIRRORED: Final = "item"
"""Candidates are few and asked for again and again; users are many, and each asks for itself."""
Status = Literal["PRESENT", "NOT_FOUND", "UNAVAILABLE"]


@dataclass(frozen=True)
class Answer:
    """Values of some features for the entities that were asked for; `degraded` counts rows that could not be read."""

    program: Program
    states: Mapping[str, Rows | Totals]
    frame: Frame
    as_of_ms: int
    degraded: int

    @property
    def features(self) -> tuple[Feature, ...]:
        """What was asked for, in order."""
        return self.program.features

    def explain(self, entity: str, row: int) -> dict[str, Any]:
        """How the features of one row come about."""
        return self.program.explain(self.states, entity, row, self.as_of_ms)

    def statuses(self, entity: str) -> list[Status]:
        """Whether each row of an entity was found."""
        found = self.frame.found[entity]
        if self.degraded:
            return ["UNAVAILABLE"] * len(found)
        return ["PRESENT" if there else "NOT_FOUND" for there in found.tolist()]

    def last_event_ms(self, entity: str) -> list[int | None]:
        """When each row's last event was."""
        return [ms if ms >= 0 else None for ms in self.frame.last_event_ms[entity].tolist()]


class Lookup:
    """Reads and evaluates features of a plan; compiles each list of features once.

    Args:
        plan: the applied plan.
        connection: to Redis; see `connect`.
        mirrors: by family name.
        mirrored: is told of each request how many rows a mirror had, and how many not.
    """

    def __init__(
        self,
        plan: Plan,
        connection: Connection,
        mirrors: Mapping[str, Mirror],
        mirrored: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        self.plan = plan
        self.connection = connection
        self.mirrors = mirrors
        self._mirrored = mirrored
        self._keyspace = Keyspace(plan.project, plan.shards)
        self._families = [family.name for view in plan.views for family in families_of(plan, view)]
        self._programs: dict[tuple[tuple[str, ...], bool], Program] = {}

    @classmethod
    def connect(
        cls,
        plan: Plan,
        url: str,
        timeout_s: float,
        mirror_rows: int,
        mirrored: Callable[[int, int], None] = lambda *_: None,
    ) -> Lookup:
        """A lookup of its own connection, with mirrors of up to `mirror_rows` items (0 for none)."""
        families = [family for view in plan.views for family in families_of(plan, view)]
        mirrors = {
            family.name: Mirror(family, mirror_rows)
            for family in families
            if mirror_rows and family.entity == MIRRORED and not family.has_buckets
        }
        keyspace = Keyspace(plan.project, plan.shards)

        def forget(keys: Sequence[bytes] | None) -> None:
            if keys is None:
                for mirror in mirrors.values():
                    mirror.clear()
            else:
                for key in keys:
                    name, entity_id = keyspace.row_of(key)
                    mirrors[name].forget(entity_id.decode())

        connection = Connection(url, timeout_s, on_invalidated=forget if mirrors else None)
        return cls(plan, connection, mirrors, mirrored)

    def warm_up(self) -> None:
        """Compiles every service, and the loops that evaluate it: the first request shall wait for nothing."""
        for spec in self.plan.services:
            program = self.program(spec.features)
            ids = {entity: ["?"] for entity in program.entities}
            one = {entity: np.zeros(1, np.intp) for entity in program.entities}
            rows = {bundle.name: Rows.empty(bundle, 1) for bundle in program.bundles}
            program.evaluate(rows, Asked(ids, one, {}), 0)

    def program(self, full_names: tuple[str, ...], *, explain: bool = False) -> Program:
        """The features, ready to be evaluated; to be explained too, if asked."""
        if (full_names, explain) not in self._programs:
            alone = self._families if explain else self.mirrors
            self._programs[full_names, explain] = Program(self.plan, full_names, alone)
        return self._programs[full_names, explain]

    def service(self, name: str) -> Program:
        """A service's features, or a problem that lists the services there are."""
        for spec in self.plan.services:
            if spec.name == name:
                return self.program(spec.features)
        known = ", ".join(spec.name for spec in self.plan.services)
        raise Problem(404, "Unknown service", f"service: there is no {name!r}; applied are: {known}")

    def of_entity(self, entity: str, service: str | None) -> Program:
        """An entity's features, of a service or of all its views."""
        if entity not in {spec.name for spec in self.plan.entities}:
            known = ", ".join(spec.name for spec in self.plan.entities)
            raise Problem(404, "Unknown entity", f"entity: there is no {entity!r}; applied are: {known}")
        features = self.service(service).features if service else tuple(self.plan.features.values())
        own = tuple(feature.full_name for feature in features if feature.entities == (entity,))
        if not own:
            raise invalid("service", f"{service} has no feature of {entity} alone")
        return self.program(own)

    async def read(
        self,
        program: Program,
        ids: Mapping[str, Sequence[str]],
        pairs: Mapping[str, Any],
        now_ms: int,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        defaults_on_error: bool = False,
        explain: bool = False,
    ) -> Answer:
        """Reads all rows in one round trip and evaluates them; to `explain`, all of them from Redis, family by family.

        Raises:
            Problem: 503 when Redis is away, slow or holds what is no row, unless defaults were asked for.
        """
        if explain:
            program = self.program(tuple(feature.full_name for feature in program.features), explain=True)
        degraded = 0
        try:
            states = await self._states(program, ids, now_ms, mirrored=not explain)
        except (RedisError, OSError, ForeignValueError) as error:
            if not defaults_on_error:
                detail = (
                    str(error) if isinstance(error, ForeignValueError) else f"Redis: {type(error).__name__}: {error}"
                )
                raise unavailable(detail.rstrip(": ")) from error
            states = {bundle.name: Rows.empty(bundle, len(ids[bundle.entity])) for bundle in program.bundles}
            degraded = sum(map(len, ids.values()))
        frame = program.evaluate(states, Asked(ids, pairs, overrides or {}), now_ms)
        return Answer(program, states, frame, now_ms, degraded)

    async def _states(
        self,
        program: Program,
        ids: Mapping[str, Sequence[str]],
        now_ms: int,
        *,
        mirrored: bool,
    ) -> dict[str, Rows | Totals]:
        """The state of every bundle."""
        with ExitStack() as stack:
            readings: dict[str, Reading] = {}
            plain, tracked = [], []
            for bundle in program.bundles:
                mirror = self.mirrors.get(bundle.name) if mirrored else None
                if mirror is None:
                    plain.append((bundle, [text.encode() for text in ids[bundle.entity]]))
                else:
                    reading = stack.enter_context(mirror.reading(ids[bundle.entity], now_ms))
                    readings[bundle.name] = reading
                    self._mirrored(reading.hits, len(ids[bundle.entity]) - reading.hits)
                    tracked.append((bundle, [text.encode() for text in reading.missing]))
            request = Request(self._keyspace, (*plain, *tracked))
            n_plain = sum(len(own) * len(bundle.families) for bundle, own in plain)
            blobs = await self.connection.mget(request.keys[:n_plain], tracked=request.keys[n_plain:])
            rows = request.rows(blobs)
            return {name: readings[name].totals(state) if name in readings else state for name, state in rows.items()}


def pairs_of(n_items: int) -> dict[str, Any]:
    """One user with each of n items."""
    return {"user": np.zeros(n_items, np.intp), "item": np.arange(n_items)}
