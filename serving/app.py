"""The HTTP server: routes, and nothing that they could not be replaced without."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

import numpy as np
import orjson
import redis.asyncio
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from redis.exceptions import RedisError
from starlette.exceptions import HTTPException

from features.events import TEXT_LENGTH_MAX
from features.kernel import SLACK_MS
from features.plan import CodeChangedError, Plan
from features.program import DerivedFeatureError
from registry.online import Reader
from registry.settings import Settings
from serving import wire
from serving.lookup import Lookup, pairs_of
from serving.problems import Problem, invalid, unavailable
from store.connect import connect_async
from store.keys import Keyspace
from store.read import ForeignValueError

Id = Annotated[str, StringConstraints(min_length=1, max_length=TEXT_LENGTH_MAX, pattern=r"^[^\x00]*$")]
_NAMES_HEADER_BYTES_MAX = 4096
_EXPLAINED_ITEMS_MAX = 5


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


class FeastRequest(BaseModel):
    """Feast's own request."""

    model_config = ConfigDict(extra="ignore")

    entities: dict[str, list[str | int | None]]
    features: list[str] | None = None
    feature_service: str | None = None
    full_feature_names: bool = False


@dataclass
class Context:
    """What routes share: made once, when the app is."""

    plan: Plan
    client: redis.asyncio.Redis
    lookup: Lookup
    feast: Callable[[tuple[str, ...]], Reader]
    items_max: int
    timeout_s: float
    clock: Callable[[], float]

    def now_ms(self, as_of: int | None = None) -> int:
        """The query time, or a problem when `as_of` is not within the last 10 s."""
        now = int(self.clock() * 1000)
        if as_of is not None and not now - SLACK_MS <= as_of <= now:
            raise invalid(
                "as_of", f"{as_of} is not within the last {SLACK_MS // 1000} s before {now} (ms since the epoch)"
            )
        return now if as_of is None else as_of


def create_app(settings: Settings, plan: Plan, clock: Callable[[], float] = time.time) -> FastAPI:
    """The server of an applied plan; `clock` gives seconds since the epoch."""
    metrics = CollectorRegistry()
    requests = Counter("headrace_requests", "Requests answered", ["route", "status"], registry=metrics)
    seconds = Histogram("headrace_request_seconds", "Time to answer", ["route"], registry=metrics, buckets=_BUCKETS)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        client = connect_async(settings.redis_url.get_secret_value(), settings.redis_timeout_s)
        lookup = Lookup(plan, client, settings.request_timeout_s)
        for service in plan.services:
            lookup.service(service.name)
        app.state.context = Context(
            plan,
            client,
            lookup,
            lru_cache(maxsize=256)(partial(Reader, plan)),
            settings.items_max,
            settings.request_timeout_s,
            clock,
        )
        yield
        await client.aclose()

    app = FastAPI(title="Headrace", version="1", lifespan=lifespan)

    @app.middleware("http")
    async def measure(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        began = time.perf_counter()
        response = await call_next(request)
        route = getattr(request.scope.get("route"), "path", "unknown")
        requests.labels(route, response.status_code).inc()
        seconds.labels(route).observe(time.perf_counter() - began)
        return response

    _add_problems(app)
    _add_ranking(app)
    _add_reads(app)
    _add_operations(app, metrics)
    return app


_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


def _add_problems(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def problem(_request: Request, error: Problem) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def refused(_request: Request, error: RequestValidationError) -> Response:
        errors = [
            {
                "field": "body"
                if each["type"] == "json_invalid"
                else ".".join(str(part) for part in each["loc"][1:]) or "body",
                "detail": each["msg"],
            }
            for each in error.errors()
        ]
        return Problem(
            422,
            "Invalid request",
            "; ".join(f"{each['field']}: {each['detail']}" for each in errors[:3]),
            errors=errors,
        ).response()

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return Problem(
            error.status_code,
            str(error.detail),
            f"{request.method} {request.url.path}",
            headers=dict(error.headers or {}),
        ).response()

    @app.exception_handler(CodeChangedError)
    async def changed(_request: Request, error: CodeChangedError) -> Response:
        return Problem(500, "Code changed", str(error)).response()

    @app.exception_handler(DerivedFeatureError)
    async def derived(_request: Request, error: DerivedFeatureError) -> Response:
        return Problem(500, "Derived feature failed", str(error)).response()


def _add_ranking(app: FastAPI) -> None:
    @app.post("/v1/features")
    async def features(body: FeaturesRequest, request: Request) -> Response:
        """The features of one user and candidate items, as JSON, Arrow or npy by `Accept`."""
        context: Context = request.app.state.context
        accepted = _format(request.headers.get("accept", wire.JSON))
        program = context.lookup.service(body.service)
        if "item" not in program.entities or not set(program.entities) <= {"user", "item"}:
            about = " and ".join(program.entities)
            raise invalid(
                "service", f"{body.service} is about {about}: read it at /v1/entities/{program.entities[0]}/{{id}}"
            )
        if body.context:
            raise invalid("context", f"{body.service} declares no context; it was given {', '.join(body.context)}")
        item_ids = body.item_ids if body.item_ids is not None else [item.id for item in body.items or []]
        if len(item_ids) > context.items_max:
            raise invalid(
                "item_ids", f"{len(item_ids)} items are more than the {context.items_max} of one request; split it"
            )
        if body.explain and (accepted != wire.JSON or len(item_ids) > _EXPLAINED_ITEMS_MAX):
            raise invalid("explain", f"is for {wire.JSON} and at most {_EXPLAINED_ITEMS_MAX} items")
        overrides = {}
        if body.items:
            overrides["item"] = {
                name: [getattr(item, name) for item in body.items] for name in ("category", "seller_id", "price")
            }
        answer = await context.lookup.read(
            program,
            # An anonymous user is one whose id no event can have.
            {"user": [body.user_id or ""], "item": item_ids},
            pairs_of(len(item_ids)),
            context.now_ms(body.as_of),
            overrides,
            defaults_on_error=body.on_error == "defaults",
        )
        headers = {"X-Plan": context.plan.fingerprint}
        if accepted == wire.NPY:
            names = ",".join(feature.full_name for feature in wire.matrix_features(answer.features))
            if len(names) < _NAMES_HEADER_BYTES_MAX:
                headers["X-Feature-Names"] = names
            return Response(wire.ranking_npy(answer, len(item_ids)), headers=headers, media_type=wire.NPY)
        if accepted == wire.ARROW:
            return Response(wire.ranking_arrow(answer, item_ids), headers=headers, media_type=wire.ARROW)
        content = wire.ranking_json(
            answer, body.service, context.plan.fingerprint, body.user_id, item_ids, explain=body.explain
        )
        return Response(content, headers=headers, media_type=wire.JSON)


def _add_reads(app: FastAPI) -> None:
    @app.get("/v1/entities/{entity}/{entity_id:path}")
    async def entity(
        entity: str,
        entity_id: str,
        request: Request,
        service: str | None = None,
        as_of: Annotated[int | None, Query()] = None,
    ) -> Response:
        """One entity's features, of a service or of all its views."""
        context: Context = request.app.state.context
        if not 1 <= len(entity_id) <= TEXT_LENGTH_MAX or "\0" in entity_id:
            raise invalid("id", f"an id has 1 to {TEXT_LENGTH_MAX} characters and no NUL")
        program = context.lookup.of_entity(entity, service)
        answer = await context.lookup.read(
            program, {entity: [entity_id]}, {entity: np.zeros(1, np.intp)}, context.now_ms(as_of)
        )
        content = wire.entity_json(answer, entity, entity_id, service, context.plan.fingerprint)
        return Response(content, headers={"X-Plan": context.plan.fingerprint}, media_type=wire.JSON)

    @app.get("/v1/services/{name}")
    async def service(name: str, request: Request, plan: str | None = None) -> Response:
        """Names, types and order of a service's features."""
        context: Context = request.app.state.context
        if plan is not None and plan != context.plan.fingerprint:
            raise Problem(
                404, "Unknown plan", f"plan: {plan!r} is not what this server runs, which is {context.plan.fingerprint}"
            )
        made = context.lookup.service(name).features
        document = {
            "service": name,
            "plan": context.plan.fingerprint,
            "features": [
                {"name": each.full_name, "type": each.value_type, "entities": each.entities, "doc": each.doc}
                for each in made
            ],
            "matrix": [each.full_name for each in wire.matrix_features(made)],
        }
        return Response(orjson.dumps(document), media_type=wire.JSON)

    @app.post("/get-online-features")
    async def get_online_features(body: FeastRequest, request: Request) -> Response:
        """Feast's own request and answer: for its unmodified `remote` online store."""
        context: Context = request.app.state.context
        if body.feature_service is not None:
            names = [feature.full_name for feature in context.lookup.service(body.feature_service).features]
        elif body.features:
            names = [reference.replace(":", "__", 1) for reference in body.features]
        else:
            raise invalid("features", "name features as view:feature, or a feature_service")
        unknown = [name for name in names if name not in context.plan.features]
        if unknown:
            raise Problem(404, "Unknown feature", f"features: not applied: {', '.join(unknown)}")
        try:
            reader = context.feast(tuple(names))
            async with asyncio.timeout(context.timeout_s):
                document = await reader.answer(
                    context.client.mget, body.entities, context.now_ms(), full=body.full_feature_names
                )
        except ValueError as error:
            raise invalid("entities", str(error)) from error
        except ForeignValueError as error:
            raise unavailable(str(error)) from error
        except (RedisError, OSError, TimeoutError) as error:
            raise unavailable(f"Redis: {type(error).__name__}: {error}") from error
        return Response(orjson.dumps(document), headers={"X-Plan": context.plan.fingerprint}, media_type=wire.JSON)


def _add_operations(app: FastAPI, metrics: CollectorRegistry) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Whether the process lives."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz(request: Request) -> dict[str, str]:
        """Whether it can answer exactly: Redis is there, keeps every row, and the plan's streams were initialised."""
        context: Context = request.app.state.context
        try:
            async with asyncio.timeout(context.timeout_s):
                reasons = await _unready(context)
        except (RedisError, OSError, TimeoutError) as error:
            reasons = [f"Redis: {type(error).__name__}: {error}"]
        if reasons:
            raise unavailable("; ".join(reasons))
        return {"status": "ready", "plan": context.plan.fingerprint}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """Counters and latencies, for Prometheus."""
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)


async def _unready(context: Context) -> list[str]:
    memory: Any = await context.client.info("memory")
    reasons = []
    policy = memory.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        reasons.append(
            f"Redis has maxmemory-policy {policy}, which drops single rows and so breaks counts; set noeviction"
        )
    keyspace = Keyspace(context.plan.project, context.plan.shards)
    entities = {view.entities[0] for view in context.plan.views if len(view.entities) == 1}
    records = [keyspace.commit_record(entity, shard) for entity in entities for shard in range(context.plan.shards)]
    if missing := len(records) - await context.client.exists(*records):
        reasons.append(f"Redis lacks {missing} of {len(records)} commit records of this project; run `headrace apply`")
    return reasons


def _format(accept: str) -> str:
    """The first format of the Accept header that there is."""
    for part in accept.split(","):
        media_type = part.split(";")[0].strip()
        if media_type in wire.FORMATS:
            return media_type
        if media_type in ("*/*", "application/*"):
            return wire.JSON
    raise Problem(406, "Not acceptable", f"Accept: {accept!r}; there is: {', '.join(wire.FORMATS)}")
