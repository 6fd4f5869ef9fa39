"""From a ranking request to values: what to read, and the frame that it evaluates to. Knows no HTTP framework."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from redis.exceptions import RedisError

from config.address import Address
from features.given import GivenRows
from features.layout import Family, families_of
from features.plan import NOBODY, Feature, Plan
from features.program import Asked, Frame, Program, States
from features.rows import Rows
from features.values import to_arrow
from serving.problems import Problem, invalid, unavailable
from store.cluster import Cluster
from store.completeness import Completeness
from store.connection import Connection
from store.keys import Keyspace
from store.layouts import Layouts
from store.mirror import Mirror, Reading
from store.read import ForeignValueError, Request

MIRRORED: Final = "item"
"""Candidates are few and asked for again and again; users are many, and each asks for itself."""
_ROWS_TOGETHER_MAX: Final = 1000
"""Questions are answered together up to so many rows: more save nothing, and make everybody wait."""
_ROWS_READ_TOGETHER_MAX: Final = 100
"""The same where there is no mirror: Redis works on the rows of one question while another's are evaluated."""
_UNREADABLE: Final = (RedisError, OSError, ForeignValueError)
_NOBODY: Final = (NOBODY.name,)
Status = Literal["PRESENT", "NOT_FOUND", "UNAVAILABLE"]


@dataclass(frozen=True)
class Answer:
    """Values of some features for the entities that were asked for, which may be some of those that were evaluated.

    Attributes:
        program: what was asked for.
        states: all rows that were evaluated.
        frame: what they evaluate to.
        as_of_ms: when.
        rows: by entity, which of all rows are the answer's.
        pairs: which of all pairs are.
        degraded: how many rows could not be read.
        made: values of all rows as JSON and Arrow have them, once somebody asked for them.
        incomplete: see `store.completeness.Completeness.incomplete`.
    """

    program: Program
    states: States
    frame: Frame
    as_of_ms: int
    rows: Mapping[str, slice]
    pairs: slice
    degraded: int
    made: dict[tuple[str, Any], Any]
    incomplete: Mapping[str, int | None]

    @property
    def features(self) -> tuple[Feature, ...]:
        """What was asked for, in order."""
        return self.program.features

    def row(self, entity: str) -> dict[str, Any]:
        """Values of an entity's own features in its only row, by full name, as JSON has them."""
        key = ("rows", entity)
        if key not in self.made:
            own = {each.full_name: self._json(each) for each in self.features if each.entities == (entity,)}
            self.made[key] = [dict(zip(own, values, strict=True)) for values in zip(*own.values(), strict=True)]
        rows: list[dict[str, Any]] = self.made[key]
        return rows[self.rows[entity].start] if rows else {}

    def column(self, feature: Feature) -> list[Any]:
        """One feature's values, as JSON has them; of what is about nobody one for each pair."""
        values = self._json(feature)[self._own(feature)]
        return values * self._n_pairs if feature.entities == _NOBODY else values

    def arrow(self, feature: Feature) -> pa.Array:
        """One feature's values; of what is about nobody one for each pair."""
        key = ("arrow", feature.full_name)
        if key not in self.made:
            self.made[key] = to_arrow(self.frame.values[feature.full_name], feature.value_type)
        values = self.made[key][self._own(feature)]
        return values.take(pa.array(np.zeros(self._n_pairs, np.intp))) if feature.entities == _NOBODY else values

    def matrix(self) -> NDArray[np.float32]:
        """float32[pairs, features]: see `features.program.Frame.matrix`."""
        key = ("matrix", "")
        if key not in self.made:
            self.made[key] = self.frame.matrix()
        matrix: NDArray[np.float32] = self.made[key][self.pairs]
        return matrix

    def explain(self, entity: str, row: int) -> dict[str, Any]:
        """How the features of one row come about; of what lacks something, until when."""
        found = self.program.explain(self.states, entity, row, self.as_of_ms)
        for name in found.keys() & self.incomplete.keys():
            found[name]["complete_from"] = self.incomplete[name]
        return found

    def statuses(self, entity: str) -> list[Status]:
        """Whether each row of an entity was found."""
        found = self.frame.found[entity][self.rows[entity]].tolist()
        if self.degraded:
            return ["UNAVAILABLE"] * len(found)
        return ["PRESENT" if there else "NOT_FOUND" for there in found]

    def last_event_ms(self, entity: str) -> list[int | None]:
        """When each row's last event was."""
        return [ms if ms >= 0 else None for ms in self.frame.last_event_ms[entity][self.rows[entity]].tolist()]

    @property
    def _n_pairs(self) -> int:
        return int(self.pairs.stop - self.pairs.start)

    def _json(self, feature: Feature) -> list[Any]:
        key = ("json", feature.entities)
        if key not in self.made:
            self.made[key] = self.frame.to_json(feature.entities)
        values: list[Any] = self.made[key][feature.full_name]
        return values

    def _own(self, feature: Feature) -> slice:
        return self.rows[feature.entities[0]] if len(feature.entities) == 1 else self.pairs


@dataclass
class _Question:
    """What somebody asks; the `answer` is None for who asks alone."""

    asked: Asked
    now_ms: int
    answer: asyncio.Future[Answer | None]
    defaults_on_error: bool


@dataclass
class _Together:
    """Questions to one program, to be answered at once."""

    program: Program
    questions: list[_Question]
    n_rows: int = 0


def mirrored_families(plan: Plan) -> list[Family]:
    """Whose rows a server keeps: of items, and with totals of a fixed size."""
    families = [family for view in plan.views for family in families_of(plan, view)]
    return [family for family in families if family.entity == MIRRORED and not family.has_buckets]


class Lookup:
    """Reads and evaluates features of a plan; compiles each list of features once.

    Args:
        plan: the applied plan.
        connection: to Redis, or a `Cluster`, which reads as one does; see `connect`.
        mirrors: by family name.
        mirrored: is told of each request how many rows a mirror had, and how many not.
        layouts: of rows, those of other plans too.

    Attributes:
        completeness: what the plan's features lack, to be kept up to date.
    """

    def __init__(
        self,
        plan: Plan,
        connection: Connection,
        mirrors: Mapping[str, Mirror],
        mirrored: Callable[[int, int], None] = lambda *_: None,
        layouts: Layouts | None = None,
    ) -> None:
        self.plan = plan
        self.completeness = Completeness(plan)
        self.connection = connection
        self.mirrors = mirrors
        self._mirrored = mirrored
        self._keyspace, self._layouts = Keyspace.of(plan), layouts or Layouts(plan)
        self._families = [family.name for view in plan.views for family in families_of(plan, view)]
        self._programs: dict[tuple[tuple[str, ...], bool], Program] = {}
        self._open: dict[tuple[Program, tuple[str, ...]], _Together] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def connect(
        cls,
        plan: Plan,
        url: str,
        timeout_s: float,
        mirror_rows: int,
        mirrored: Callable[[int, int], None] = lambda *_: None,
        layouts: Layouts | None = None,
    ) -> Lookup:
        """A lookup of its own connection, with mirrors of up to `mirror_rows` items (0 for none)."""
        mirrors = {family.name: Mirror(family, mirror_rows) for family in mirrored_families(plan) if mirror_rows}
        keyspace = Keyspace.of(plan)

        def forget(keys: Sequence[bytes] | None) -> None:
            if keys is None:
                for mirror in mirrors.values():
                    mirror.clear()
            else:
                for key in keys:
                    name, entity_id = keyspace.row_of(key)
                    mirrors[name].forget(entity_id.decode())

        kind = Cluster if Address.parse(url).kind == "cluster" else Connection
        connection: Any = kind(url, timeout_s, on_invalidated=forget if mirrors else None)
        return cls(plan, connection, mirrors, mirrored, layouts)

    def warm_up(self) -> None:
        """Compiles every service, and the loops that evaluate it: the first request shall wait for nothing."""
        for spec in self.plan.services:
            program = self.program(spec.features)
            ids = {entity: ["?"] for entity in program.entities}
            one = {entity: np.zeros(1, np.intp) for entity in program.entities}
            asked = Asked(ids, one, {})
            program.evaluate(_nothing(program, asked), asked, 0)

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
        ids, pairs = _with_nobody(program, ids, pairs)
        asked = Asked(ids, pairs, overrides or {})
        if explain:
            program = self.program(tuple(feature.full_name for feature in program.features), explain=True)
        try:
            return await self._evaluated(program, asked, now_ms, mirrored=not explain)
        except _UNREADABLE as error:
            return self._without_rows(program, asked, now_ms, error, defaults_on_error=defaults_on_error)

    async def ask(
        self,
        program: Program,
        ids: Mapping[str, Sequence[str]],
        pairs: Mapping[str, Any],
        now_ms: int,
        *,
        defaults_on_error: bool = False,
    ) -> Answer:
        """As `read`, together with all who ask the same program about the same entities in this turn of the event loop.

        What a request costs is mostly by the call and hardly by the row.
        """
        ids, pairs = _with_nobody(program, ids, pairs)
        loop = asyncio.get_running_loop()
        n_rows = sum(map(len, ids.values()))
        kind = (program, tuple(ids))
        together = self._open.get(kind)
        n_rows_max = _ROWS_TOGETHER_MAX if self.mirrors else _ROWS_READ_TOGETHER_MAX
        if together is None or together.n_rows + n_rows > n_rows_max:
            together = self._open[kind] = _Together(program, [])
            # By then all whose requests arrived with this one have asked.
            loop.call_soon(self._begin, kind, together)
        question = _Question(Asked(ids, pairs, {}), now_ms, loop.create_future(), defaults_on_error)
        together.questions.append(question)
        together.n_rows += n_rows
        return await question.answer or await self.read(
            program, ids, pairs, now_ms, defaults_on_error=defaults_on_error
        )

    def _begin(self, kind: tuple[Program, tuple[str, ...]], together: _Together) -> None:
        if self._open.get(kind) is together:
            del self._open[kind]
        if len(together.questions) == 1:
            (question,) = together.questions
            if not question.answer.done():
                question.answer.set_result(None)
            return
        task = asyncio.get_running_loop().create_task(self._answer(together))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, together: _Together) -> None:
        """Answers all questions at once; if that fails, each by itself, as one's failure is no other's."""
        program, questions = together.program, together.questions
        error: Exception | None = None
        try:
            asked, parts = _joined([each.asked for each in questions])
            answer = await self._evaluated(program, asked, max(each.now_ms for each in questions))
        except Exception as raised:  # noqa: BLE001  # every question gets its own answer, whatever went wrong
            error = raised
        for number, question in enumerate(questions):
            if question.answer.done():
                continue
            if error is None:
                question.answer.set_result(replace(answer, rows=parts[number][0], pairs=parts[number][1]))
            elif not isinstance(error, RedisError | OSError):
                question.answer.set_result(None)
            else:
                # Asking Redis again would only take the time for it again.
                given = (program, question.asked, question.now_ms, error)
                try:
                    question.answer.set_result(self._without_rows(*given, defaults_on_error=question.defaults_on_error))
                except Problem as problem:
                    question.answer.set_exception(problem)

    async def _evaluated(self, program: Program, asked: Asked, now_ms: int, *, mirrored: bool = True) -> Answer:
        states = await self._states(program, asked, now_ms, mirrored=mirrored)
        return self._evaluate(program, states, asked, now_ms)

    def _without_rows(
        self, program: Program, asked: Asked, now_ms: int, error: Exception, *, defaults_on_error: bool
    ) -> Answer:
        """The answer for entities never seen, or a problem, because of an error."""
        if not defaults_on_error:
            detail = str(error) if isinstance(error, ForeignValueError) else f"Redis: {type(error).__name__}: {error}"
            raise unavailable(detail.rstrip(": ")) from error
        return self._evaluate(
            program, _nothing(program, asked), asked, now_ms, degraded=sum(map(len, asked.ids.values()))
        )

    def _evaluate(self, program: Program, states: States, asked: Asked, now_ms: int, *, degraded: int = 0) -> Answer:
        frame = program.evaluate(states, asked, now_ms)
        rows = {entity: slice(0, len(own)) for entity, own in asked.ids.items()}
        pairs = slice(0, len(next(iter(asked.pairs.values()), ())))
        incomplete = self.completeness.incomplete((each.full_name for each in program.features), now_ms)
        return Answer(program, states, frame, now_ms, rows, pairs, degraded, {}, incomplete)

    async def _states(
        self,
        program: Program,
        asked: Asked,
        now_ms: int,
        *,
        mirrored: bool,
    ) -> States:
        """The state of every bundle, and the rows of ordinary views."""
        with ExitStack() as stack:
            readings: dict[str, Reading] = {}
            plain, tracked = [], []
            for bundle in program.bundles:
                mirror = self.mirrors.get(bundle.name) if mirrored else None
                ids = asked.texts[bundle.entity]
                if mirror is None:
                    plain.append((bundle, ids))
                else:
                    reading = stack.enter_context(mirror.reading(ids, now_ms))
                    readings[bundle.name] = reading
                    self._mirrored(reading.hits, len(ids) - reading.hits)
                    tracked.append((bundle, reading.missing))
            where = (self._keyspace, self._layouts)
            given = tuple((view, view.ids(asked)) for view in program.given)
            known, remembered = Request(*where, tuple(plain), given), Request(*where, tuple(tracked))
            blobs = await self.connection.mget(known.keys, tracked=remembered.keys)
            states: dict[str, Any] = known.rows(blobs)
            missed: dict[str, Any] = remembered.rows(blobs[len(known.keys) :])
            return states | {name: readings[name].totals(state) for name, state in missed.items()}


def _with_nobody(
    program: Program, ids: Mapping[str, Sequence[str]], pairs: Mapping[str, Any]
) -> tuple[Mapping[str, Sequence[str]], Mapping[str, Any]]:
    """What is asked, and of whom ordinary views without an entity are, if there are such."""
    if NOBODY.name not in program.entities:
        return ids, pairs
    n_pairs = len(next(iter(pairs.values()), ()))
    return {**ids, NOBODY.name: [""]}, {**pairs, NOBODY.name: np.zeros(n_pairs, np.intp)}


def _nothing(program: Program, asked: Asked) -> States:
    """The states of entities never seen."""
    states: dict[str, Rows | GivenRows] = {
        bundle.name: Rows.empty(bundle, len(asked.ids[bundle.entity])) for bundle in program.bundles
    }
    return states | {view.name: GivenRows(view.fields, [None] * len(view.ids(asked))) for view in program.given}


def _joined(questions: Sequence[Asked]) -> tuple[Asked, list[tuple[dict[str, slice], slice]]]:
    """All that is asked, and each question's share: its rows by entity, and its pairs."""
    ids: dict[str, list[str]] = {entity: [] for entity in questions[0].ids}
    pairs: dict[str, list[Any]] = {entity: [] for entity in questions[0].pairs}
    parts: list[tuple[dict[str, slice], slice]] = []
    n_pairs = 0
    for question in questions:
        for entity, rows in question.pairs.items():
            pairs[entity].append(rows + len(ids[entity]))
        own_rows = {}
        for entity, own in question.ids.items():
            own_rows[entity] = slice(len(ids[entity]), len(ids[entity]) + len(own))
            ids[entity] += own
        own_pairs = slice(n_pairs, n_pairs + len(next(iter(question.pairs.values()))))
        n_pairs = own_pairs.stop
        parts.append((own_rows, own_pairs))
    return Asked(ids, {entity: np.concatenate(rows) for entity, rows in pairs.items()}, {}), parts


def pairs_of(n_items: int) -> dict[str, Any]:
    """One user with each of n items."""
    return {"user": np.zeros(n_items, np.intp), "item": np.arange(n_items)}
