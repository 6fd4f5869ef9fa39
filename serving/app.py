"""The HTTP server: routes, and nothing that they could not be replaced without."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import cache, lru_cache, partial
from typing import Annotated, Any, Literal

import numpy as np
import orjson
import structlog
from fastapi import FastAPI, Query, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from redis.exceptions import RedisError

from config.settings import Settings
from features.events import TEXT_LENGTH_MAX
from features.kernel import SLACK_MS
from features.plan import NOBODY, Plan
from features.program import Frame, Program
from serving import contract, feast, wire
from serving.feast import FeastProblem, FeastRequest, Others
from serving.front import Bytes, DirectRoute, Errors, Server
from serving.guard import Guard
from serving.keys import Keys
from serving.keys import Scope as KeyScope
from serving.lookup import Lookup, pairs_of
from serving.metrics import Metrics
from serving.problems import Problem, invalid, unavailable
from serving.sample import Sampler
from store.commit import RecordError
from store.connect import connect
from store.forgotten import order
from store.keys import Keyspace
from store.plans import layouts_of
from store.read import ForeignValueError
from store.reader import Reader

Id = Annotated[str, StringConstraints(min_length=1, max_length=TEXT_LENGTH_MAX, pattern=r"^[^\x00]*$")]
_NAMES_HEADER_BYTES_MAX = 4096
_EXPLAINED_ITEMS_MAX = 5
_ROWS_AT_ONCE = 1000
"""Feast's requests are read and evaluated so many rows at a time: others are answered in between."""
_LOOK_S = 1.0
"""Features that lack something are looked at so often."""
_ONE_ROW = np.zeros(1, np.intp)
_QUOTED = re.compile(r'"(?:[^"\\]|\\.?)*"?')  # Whatever follows a quote matches: never looked at twice.
_WEIGHT = re.compile(r"\s*q=(0?\.\d+|0\.?|1(?:\.0*)?)\s*", re.ASCII)
_RANGES = frozenset({*wire.FORMATS, "application/*", "*/*"})


log = structlog.get_logger()


class Item(BaseModel):
    """A candidate, with what the caller knows of it in place of what its row does."""

    model_config = ConfigDict(extra="forbid")

    id: Id
    category: str | None = None
    seller_id: str | None = None
    price: float | None = Field(None, ge=0, allow_inf_nan=False)


class FeaturesRequest(BaseModel):
    """One user, candidate items, one service."""

    model_config = ConfigDict(extra="forbid")

    service: str
    user_id: Id | None = None
    item_ids: list[Id] | None = None
    items: list[Item] | None = None
    context: dict[str, Any] = {}
    as_of: int | None = Field(None, description="Query time, ms, within the last 10 s")
    on_error: Literal["fail", "defaults"] = "fail"
    explain: bool = Field(default=False, description="Say how each feature comes about: JSON, at most 5 items")

    @model_validator(mode="after")
    def _one_of_both(self) -> FeaturesRequest:
        if (self.item_ids is None) == (self.items is None):
            msg = "give either item_ids or items"
            raise ValueError(msg)
        return self


class EntityQuery(BaseModel):
    """What may follow an entity's path."""

    service: str | None = None
    as_of: int | None = Field(None, description="Query time, ms, within the last 10 s")


class ServiceQuery(BaseModel):
    """What may follow a service's path."""

    plan: str | None = Field(None, description="Fingerprint: answer only if this plan runs")


def create_app(
    settings: Settings, plan: Plan, clock: Callable[[], float] = time.time, others: Others | None = None
) -> Server:
    """The server of an applied plan.

    Args:
        settings: the settings.
        plan: the plan.
        clock: gives seconds since the epoch.
        others: answers Feast's call where the plan does not know what is asked for.
    """
    metrics = Metrics()
    routes = _Routes(settings, plan, metrics, clock, others)
    direct = [
        DirectRoute(
            "GET", "/v1/entities/{entity}/{entity_id:path}", routes.entity, [wire.JSON], answers=contract.ENTITY
        ),
        DirectRoute(
            "DELETE",
            "/v1/entities/{entity}/{entity_id:path}",
            routes.forget,
            [wire.JSON],
            answers=contract.FORGET,
            status=202,
            scope="write",
        ),
        DirectRoute("POST", "/v1/features", routes.features, wire.FORMATS, answers=contract.RANKING),
        DirectRoute(
            "POST",
            "/get-online-features",
            routes.get_online_features,
            [wire.JSON],
            answers=contract.FEAST,
            errors=Errors(feast.refusal, wire.JSON, contract.FEAST_ERROR, "An error of Feast's"),
        ),
        DirectRoute("GET", "/v1/services/{name}", routes.service, [wire.JSON], answers=contract.SERVICE),
        DirectRoute("GET", "/healthz", routes.healthz, [wire.JSON], answers=contract.HEALTH, scope=None, is_vital=True),
        # As Feast's clients ask for it.
        DirectRoute("GET", "/health", routes.healthz, [wire.JSON], answers=contract.HEALTH, scope=None, is_vital=True),
        DirectRoute("GET", "/readyz", routes.readyz, [wire.JSON], answers=contract.READY, scope=None, is_vital=True),
    ]
    if settings.metrics != "off":
        scope: KeyScope | None = "admin" if settings.metrics == "admin" else None
        direct.append(
            DirectRoute("GET", "/metrics", routes.prometheus, [CONTENT_TYPE_LATEST], scope=scope, is_vital=True)
        )
    return Server(
        metrics,
        Guard.of(settings, Keys(settings.api_keys_file, metrics.keys_read)),
        direct,
        title="Headrace",
        version="1",
        lifespan=routes.running,
    )


class _Routes:
    """What each route asks of lookup and wire."""

    def __init__(
        self, settings: Settings, plan: Plan, metrics: Metrics, clock: Callable[[], float], others: Others | None
    ) -> None:
        self._settings = settings
        self._others = others
        self._plan = plan
        self._metrics = metrics
        self._clock = clock
        of_plan = (b"x-plan", plan.fingerprint.encode())
        self._headers = {format_: [(b"content-type", format_.encode()), of_plan] for format_ in wire.FORMATS}

    @asynccontextmanager
    async def running(self, _app: FastAPI) -> AsyncIterator[None]:
        """Ready to answer: connected, every service compiled."""
        settings = self._settings
        layouts = layouts_of(connect(settings.redis_url.get_secret_value(), settings.request_timeout_s), self._plan)
        self._lookup = Lookup.connect(
            self._plan,
            settings.redis_url.get_secret_value(),
            settings.request_timeout_s,
            settings.mirror_rows,
            self._metrics.mirrored,
            layouts,
        )
        self._redis = self._lookup.connection
        self._of_entity = cache(self._lookup.of_entity)  # It raises where there is no such, so it holds what there is.
        self._ranking = cache(self._ranking_of)
        given: Any = {"layouts": layouts, "completeness": self._lookup.completeness}
        self._reader = lru_cache(maxsize=256)(partial(Reader, self._plan, **given))
        self._long = asyncio.Lock()
        self._lookup.warm_up()
        self._sampler = Sampler(settings, self._plan, self._metrics.sample_dropped)
        looking = asyncio.create_task(self._keep_looking())
        yield
        looking.cancel()
        await asyncio.to_thread(self._sampler.close)
        await self._redis.aclose()

    async def _keep_looking(self) -> None:
        """Learns what features lack, for as long as any does."""
        completeness = self._lookup.completeness
        while completeness.keys:
            now_ms = self._now_ms()
            if completeness.due(now_ms):
                try:
                    completeness.learn(await self._redis.mget(completeness.keys), now_ms)
                except (RedisError, OSError, RecordError) as error:
                    log.warning("completeness_unknown", error=str(error))
            await asyncio.sleep(_LOOK_S)

    async def entity(
        self, _request: Request, entity: str, entity_id: str, query: Annotated[EntityQuery, Query()]
    ) -> Response:
        """One entity's features, of a service or of all its views."""
        _check_id(entity_id)
        program = self._of_entity(entity, query.service)
        given = (program, {entity: [entity_id]}, {entity: _ONE_ROW}, self._now_ms(query.as_of))
        answer = await (self._lookup.ask(*given) if query.as_of is None else self._lookup.read(*given))
        self._sampler.offer(query.service, answer, given[1])
        content = wire.entity_json(answer, entity, entity_id, query.service, self._plan.fingerprint)
        return self._answer(content, frame=answer.frame)

    async def forget(self, _request: Request, entity: str, entity_id: str) -> Response:
        """Has an entity forgotten: the stream does it within seconds, and nothing until then counts ever again."""
        _check_id(entity_id)
        self._of_entity(entity, None)  # It says whether there is such.
        ordered_at = self._now_ms()
        try:
            await asyncio.to_thread(self._order, entity, entity_id, ordered_at)
        except (RedisError, OSError) as error:
            raise unavailable(f"Redis: {type(error).__name__}: {error}") from error
        document = {"entity": entity, "id": entity_id, "ordered_at": ordered_at}
        return self._answer(orjson.dumps(document), status=202)

    def _order(self, entity: str, entity_id: str, at_ms: int) -> None:
        # A connection of its own: those of the event loop's thread are its alone.
        with connect(self._settings.redis_url.get_secret_value(), self._settings.request_timeout_s) as client:
            order(client, self._plan.project, entity, [entity_id], at_ms)

    async def features(self, request: Request, body: FeaturesRequest) -> Response:
        """The features of one user and candidate items, as JSON, Arrow or npy by `Accept`."""
        accept = [value for name, value in request.scope["headers"] if name == b"accept"]
        accepted = _format(b",".join(accept)) if accept else wire.JSON
        program, names = self._ranking(body.service)
        if body.context:
            raise invalid("context", f"{body.service} declares no context; it was given {', '.join(body.context)}")
        item_ids = body.item_ids if body.item_ids is not None else [item.id for item in body.items or []]
        if len(item_ids) > self._settings.items_max:
            raise invalid(
                "item_ids",
                f"{len(item_ids)} items are more than the {self._settings.items_max} of one request; split it",
            )
        if body.explain and (accepted != wire.JSON or len(item_ids) > _EXPLAINED_ITEMS_MAX):
            raise invalid("explain", f"is for {wire.JSON} and at most {_EXPLAINED_ITEMS_MAX} items")
        overrides = {}
        if body.items:
            overrides["item"] = {
                name: [getattr(item, name) for item in body.items] for name in ("category", "seller_id", "price")
            }
        # An anonymous user is one whose id no event can have.
        ids = {"user": [body.user_id or ""], "item": item_ids}
        given = (program, ids, pairs_of(len(item_ids)), self._now_ms(body.as_of))
        defaults = body.on_error == "defaults"
        if body.as_of is None and not overrides and not body.explain:
            answer = await self._lookup.ask(*given, defaults_on_error=defaults)
        else:
            answer = await self._lookup.read(*given, overrides, defaults_on_error=defaults, explain=body.explain)
        self._sampler.offer(body.service, answer, ids, overrides)
        if accepted == wire.NPY:
            named = [(b"x-feature-names", names)] if len(names) < _NAMES_HEADER_BYTES_MAX else []
            if answer.incomplete:
                lacking = [str(at) for at, name in enumerate(program.matrix_names) if name in answer.incomplete]
                named.append((b"x-incomplete-columns", ",".join(lacking).encode()))
            return self._answer(wire.ranking_npy(answer), wire.NPY, named, answer.frame)
        if accepted == wire.ARROW:
            return self._answer(wire.ranking_arrow(answer, item_ids), wire.ARROW, frame=answer.frame)
        content = wire.ranking_json(
            answer, body.service, self._plan.fingerprint, body.user_id, item_ids, explain=body.explain
        )
        return self._answer(content, frame=answer.frame)

    def _ranking_of(self, service: str) -> tuple[Program, bytes]:
        """A service that is about users and items, and the names of a matrix's columns."""
        program = self._lookup.service(service)
        if "item" not in program.entities or not set(program.entities) <= {"user", "item", NOBODY.name}:
            about = " and ".join(program.entities)
            raise invalid(
                "service", f"{service} is about {about}: read it at /v1/entities/{program.entities[0]}/{{id}}"
            )
        return program, ",".join(program.matrix_names).encode()

    async def service(self, _request: Request, name: str, query: Annotated[ServiceQuery, Query()]) -> Response:
        """Names, types and order of a service's features."""
        runs = self._plan.fingerprint
        if query.plan not in (None, runs):
            raise Problem(404, "Unknown plan", f"plan: {query.plan!r} is not what this server runs, which is {runs}")
        program = self._lookup.service(name)
        document: dict[str, Any] = {
            "service": name,
            "plan": runs,
            "features": [
                {"name": each.full_name, "type": each.value_type, "entities": each.entities, "doc": each.doc}
                for each in program.features
            ],
            "matrix": program.matrix_names,
        }
        names = (each.full_name for each in program.features)
        if incomplete := self._lookup.completeness.incomplete(names, self._now_ms()):
            document["incomplete"] = incomplete
        return self._answer(orjson.dumps(document))

    async def get_online_features(self, _request: Request, body: FeastRequest) -> Response:
        """Feast's own request and answer: for its unmodified `remote` online store."""
        try:
            names = feast.names_of(self._plan, body)
        except FeastProblem as problem:
            n_rows = max(map(len, body.entities.values()), default=0)
            if self._others is None or not problem.elsewhere or n_rows * len(body.features) > self._settings.values_max:
                raise
            async with self._long:  # One at a time: it is made by Feast, in a thread.
                return self._answer(await asyncio.to_thread(self._others, body))
        columns = feast.columns_of(self._plan, body)
        n_rows = len(next(iter(columns.values()), ()))
        if n_rows * len(names) > self._settings.values_max:
            raise invalid(
                "entities",
                f"{n_rows} rows of {len(names)} features are more than the {self._settings.values_max} values of "
                "HEADRACE_VALUES_MAX; split it",
            )
        reader, now_ms, answer = self._reader(names), self._now_ms(), wire.FeastAnswer()
        try:
            # Of the long ones, one is put together at a time: what they hold is then bounded by one of them.
            async with self._long if n_rows > _ROWS_AT_ONCE else nullcontext():
                for start in range(0, n_rows or 1, _ROWS_AT_ONCE):
                    some = {key: values[start : start + _ROWS_AT_ONCE] for key, values in columns.items()}
                    keys, respond = reader.begin(some, now_ms, full=body.full_feature_names)
                    answer.add(respond(await self._redis.mget(keys)))
        except ValueError as error:
            raise invalid("entities", str(error)) from error
        except ForeignValueError as error:
            raise unavailable(str(error)) from error
        except (RedisError, OSError) as error:
            raise unavailable(f"Redis: {type(error).__name__}: {error}") from error
        return self._answer(answer.content())

    async def healthz(self, _request: Request) -> Response:
        """Whether the process lives."""
        return self._answer(orjson.dumps({"status": "ok"}))

    async def readyz(self, _request: Request) -> Response:
        """Whether it can answer exactly: Redis is there, keeps every row, and the plan's streams were initialised."""
        try:
            reasons = await self._unready()
        except (RedisError, OSError) as error:
            reasons = [f"Redis: {type(error).__name__}: {error}"]
        if reasons:
            raise unavailable("; ".join(reasons))
        return self._answer(orjson.dumps({"status": "ready", "plan": self._plan.fingerprint}))

    async def _unready(self) -> list[str]:
        memory = [each.decode() for each in await self._redis.everywhere("INFO", "memory")]
        policies = {each.partition("maxmemory_policy:")[2].partition("\r\n")[0] for each in memory}
        reasons = [
            f"Redis has maxmemory-policy {policy}, which drops single rows and so breaks counts; set noeviction"
            for policy in sorted(policies - {"", "noeviction"})
        ]
        records = Keyspace.of(self._plan).commit_records(self._plan.stored_entities)
        if missing := (await self._redis.mget(records)).count(None):
            reasons.append(
                f"Redis lacks {missing} of {len(records)} commit records of this project; run `headrace apply`"
            )
        return reasons

    async def prometheus(self, _request: Request) -> Response:
        """Counters and latencies, for Prometheus."""
        return Bytes(self._metrics.text(), [(b"content-type", CONTENT_TYPE_LATEST.encode())])

    def _answer(
        self,
        content: bytes,
        media_type: str = wire.JSON,
        more: Sequence[tuple[bytes, bytes]] = (),
        frame: Frame | None = None,
        status: int = 200,
    ) -> Response:
        if frame is not None and frame.beyond:
            # Once: those who asked together share it.
            self._metrics.beyond(frame.beyond)
            frame.beyond = 0
        return Bytes(content, [*self._headers[media_type], *more], status)

    def _now_ms(self, as_of: int | None = None) -> int:
        """The query time, or a problem when `as_of` is not within the last 10 s."""
        now = int(self._clock() * 1000)
        if as_of is not None and not now - SLACK_MS <= as_of <= now:
            raise invalid(
                "as_of", f"{as_of} is not within the last {SLACK_MS // 1000} s before {now} (ms since the epoch)"
            )
        return now if as_of is None else as_of


def _check_id(entity_id: str) -> None:
    if not 1 <= len(entity_id) <= TEXT_LENGTH_MAX or "\0" in entity_id:
        raise invalid("id", f"an id has 1 to {TEXT_LENGTH_MAX} characters and no NUL")


@lru_cache(maxsize=16)
def _format(accept: bytes) -> str:
    """The format that an Accept header wants most (RFC 9110, 12.5.1); of equals the one that it has first."""
    text = _QUOTED.sub("", accept.decode("latin-1")).lower()
    ranges: dict[str, tuple[float, int]] = {}
    for place, part in enumerate(text.split(",")):
        media_type, *parameters = part.split(";")
        if (named := media_type.strip()) in _RANGES:
            # A weight that is none counts as not given.
            weights = (found[1] for each in parameters if (found := _WEIGHT.fullmatch(each)))
            ranges.setdefault(named, (-float(next(weights, 1)), place))
    # The most specific range decides on a format, also where another would have it more.
    wanted = {
        each: next((ranges[of] for of in (each, "application/*", "*/*") if of in ranges), (0.0, 0))
        for each in wire.FORMATS
    }
    best = min(wire.FORMATS, key=wanted.__getitem__)
    if not wanted[best][0]:
        raise Problem(
            406, "Not acceptable", f"Accept: {accept.decode('latin-1')!r}; there is: {', '.join(wire.FORMATS)}"
        )
    return best
