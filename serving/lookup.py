"""From a ranking request to values: what to read, and the frame that it evaluates to. Knows no HTTP framework."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import redis.asyncio
from redis.exceptions import RedisError

from features.kernel import Rows
from features.plan import Feature, Plan
from features.program import Asked, Frame, Program
from serving.problems import Problem, invalid, unavailable
from store.keys import Keyspace
from store.read import ForeignValueError, Request

Status = Literal["PRESENT", "NOT_FOUND", "UNAVAILABLE"]


@dataclass(frozen=True)
class Answer:
    """Values of some features for the entities that were asked for; `degraded` counts rows that could not be read."""

    program: Program
    rows: dict[str, Rows]
    frame: Frame
    as_of_ms: int
    degraded: int

    @property
    def features(self) -> tuple[Feature, ...]:
        """What was asked for, in order."""
        return self.program.features

    def explain(self, entity: str, row: int) -> dict[str, Any]:
        """How the features of one row come about."""
        return self.program.explain(self.rows, entity, row, self.as_of_ms)

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
    """Reads and evaluates features of a plan; compiles each list of features once."""

    def __init__(self, plan: Plan, client: redis.asyncio.Redis, timeout_s: float) -> None:
        self.plan = plan
        self._redis: Any = client
        self._timeout_s = timeout_s
        self._keyspace = Keyspace(plan.project, plan.shards)
        self._programs: dict[tuple[str, ...], Program] = {}

    def program(self, full_names: tuple[str, ...]) -> Program:
        """The features, ready to be evaluated."""
        if full_names not in self._programs:
            self._programs[full_names] = Program(self.plan, full_names)
        return self._programs[full_names]

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
    ) -> Answer:
        """Reads all rows in one round trip and evaluates them.

        Raises:
            Problem: 503 when Redis is away, slow or holds what is no row, unless defaults were asked for.
        """
        asked = Asked({entity: pa.array(ids[entity], pa.string()) for entity in ids}, pairs, overrides or {})
        encoded = {entity: [text.encode() for text in ids[entity]] for entity in ids}
        request = Request(self._keyspace, tuple((family, encoded[family.entity]) for family in program.families))
        degraded = 0
        try:
            async with asyncio.timeout(self._timeout_s):
                blobs = await self._redis.mget(request.keys)
            rows = request.rows(blobs)
        except (RedisError, OSError, TimeoutError, ForeignValueError) as error:
            if not defaults_on_error:
                detail = (
                    str(error) if isinstance(error, ForeignValueError) else f"Redis: {type(error).__name__}: {error}"
                )
                raise unavailable(detail.rstrip(": ")) from error
            rows = {family.name: Rows.empty(family, len(encoded[family.entity])) for family in program.families}
            degraded = sum(len(each) for each in encoded.values())
        frame = program.evaluate(rows, asked, now_ms)
        return Answer(program, rows, frame, now_ms, degraded)


def pairs_of(n_items: int) -> dict[str, Any]:
    """One user with each of n items."""
    return {"user": np.zeros(n_items, np.intp), "item": np.arange(n_items)}
