"""FastAPI's contract and documents, without its cost a request: routes are called straight from the server's front.

A FastAPI route that returns a constant takes 100 µs of processor time, of which uvicorn's share is 25. What FastAPI
adds (six layers of middleware, two exit stacks, the solving of dependencies) is more than reading an entity takes.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import Any, Final, NamedTuple, get_type_hints

import structlog
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.datastructures import QueryParams
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from serving import contract
from serving.guard import Guard
from serving.keys import Key
from serving.keys import Scope as KeyScope
from serving.metrics import Metrics
from serving.problems import MEDIA_TYPE, Problem, problem_of, refused
from serving.protocol import BEYOND

log = structlog.get_logger()


class Errors(NamedTuple):
    """The form of a route's errors: how one is answered, and what the OpenAPI document says of them."""

    response: Callable[[Problem], Response]
    media_type: str
    schema: contract.Schema
    description: str


PROBLEMS: Final = Errors(Problem.response, MEDIA_TYPE, contract.PROBLEM, "A problem document (RFC 9457)")


class Bytes(Response):
    """A body and headers that are bytes already."""

    def __init__(self, body: bytes, headers: Sequence[tuple[bytes, bytes]], status: int = 200) -> None:
        # Instead of Response's own, which would look for and encode each of the headers.
        self.status_code = status
        self.background = None
        self.body = body
        self.raw_headers = [*headers, (b"content-length", b"%d" % len(body))]


_AGAIN: Final = {"Retry-After": "1"}
_TOO_MUCH: Final = Problem(503, "Overloaded", "more is asked than this process can answer in time", headers=_AGAIN)
_TOO_MANY: Final = Problem(
    503,
    "Overloaded",
    "there are more connections than this process has room for (HEADRACE_CONNECTIONS_MAX)",
    headers={**_AGAIN, "Connection": "close"},
)


class DirectRoute(APIRoute):
    """A route that FastAPI documents by its endpoint's signature, and that is called without FastAPI.

    The endpoint takes the request, the path's parameters as texts, and at most one pydantic model, which is made of
    the body's JSON; of the query if there is no body. Whatever it raises is answered as a problem.

    Args:
        method, path, endpoint: as FastAPI has them.
        media_types: of its answers.
        answers: the schema of those that are JSON.
        status: theirs.
        scope: what a key must be good for to call it; None if no key is needed. A call for `write` is audited.
        is_vital: never refused for want of time: operators must see what is the matter.
        errors: their form.
    """

    def __init__(  # noqa: PLR0913  # all that a route is, named
        self,
        method: str,
        path: str,
        endpoint: Callable[..., Awaitable[Response]],
        media_types: Sequence[str],
        *,
        answers: contract.Schema | None = None,
        status: int = 200,
        scope: KeyScope | None = "read",
        is_vital: bool = False,
        errors: Errors = PROBLEMS,
    ) -> None:
        content: dict[str, Any] = {media_type: {} for media_type in media_types}
        if answers is not None:
            content["application/json"] = {"schema": answers}
        responses: dict[int | str, dict[str, Any]] = {
            status: {"content": content},
            "default": {
                "description": errors.description,
                "content": {errors.media_type: {"schema": errors.schema}},
            },
        }
        given: Any = {"response_class": Response, "responses": responses, "status_code": status}
        super().__init__(path, endpoint, methods=[method], **given)
        # Starlette's `.*$` ends before a line feed: it finds nothing of `a\nb`, and in `a\n` the row of `a`.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z", re.DOTALL)
        self.scope = scope
        self.is_vital = is_vital
        self._errors = errors
        # Made once: refusing must be cheap.
        self._too_much, self._too_many = errors.response(_TOO_MUCH), errors.response(_TOO_MANY)
        self._models = [
            (name, hint)
            for name, hint in get_type_hints(endpoint).items()
            if isinstance(hint, type) and issubclass(hint, BaseModel)
        ]

    async def answer(self, request: Request, guard: Guard) -> Response:
        """The endpoint's answer, or a problem."""
        key: Key | None = None
        body: bytes | None = None
        response: Response | None = None
        deadline = asyncio.timeout(guard.deadline_s)
        try:
            async with deadline:
                key = guard.key(request.scope["headers"], self.scope)
                # It may be long in coming: until it is there, nothing is held up and nothing is in work.
                body = b"" if self.body_field is None else await guard.body(request.scope, request.receive)
                response = await self._answer(request, body, guard)
        except Exception as error:  # noqa: BLE001  # the last place where it can become an answer
            late = guard.too_late(has_body=body is not None) if deadline.expired() else error
            response = self._errors.response(problem_of(late, request_line(request)))
        finally:
            if self.scope == "write":
                status = None if response is None else response.status_code
                log.info("audit", action=request_line(request), key=key.id if key else None, status=status)
        return response

    def has_shed(self, response: Response) -> bool:
        """Whether it refused a request for want of time or room."""
        return response is self._too_much or response is self._too_many

    async def _answer(self, request: Request, body: bytes, guard: Guard) -> Response:
        if self.is_vital:
            return await self._called(request, body)
        if BEYOND in request.scope:
            return self._too_many
        if not guard.gate.enter(time.perf_counter()):
            return self._too_much
        try:
            return await self._called(request, body)
        finally:
            guard.gate.leave(time.perf_counter())

    async def _called(self, request: Request, body: bytes) -> Response:
        given: dict[str, Any] = dict(request.scope["path_params"])
        for name, model in self._models:
            given[name] = self._made(model, request, body)
        response: Response = await self.endpoint(request, **given)
        return response

    def _made(self, model: type[BaseModel], request: Request, body: bytes) -> BaseModel:
        try:
            if self.body_field is None:
                return _of_query(model, request.scope["query_string"])
            return model.model_validate_json(body)
        except ValidationError as error:
            raise refused(error) from error


@lru_cache(maxsize=256)
def _of_query(model: type[BaseModel], query: bytes) -> BaseModel:
    """Callers ask for the same again and again, and reading it takes longer than reading a row."""
    return model.model_validate(dict(QueryParams(query)))


class Server(FastAPI):
    """FastAPI whose direct routes are called before its middleware; every answer is counted as it starts.

    An answer that has reached a client is in the metrics, whichever process is asked for them.
    """

    def __init__(self, metrics: Metrics, guard: Guard, routes: Sequence[DirectRoute], **options: Any) -> None:
        super().__init__(**options)
        self._metrics = metrics
        self._guard = guard
        self._direct = routes
        self.router.routes.extend(routes)
        self.add_exception_handler(HTTPException, _not_found)

    def openapi(self) -> dict[str, Any]:
        """The contract, with the keys that the server asks for."""
        if self.openapi_schema is None and not self._guard.keys.is_open:
            document = super().openapi()
            document["components"]["securitySchemes"] = contract.SECURITY
            for route in self._direct:
                if route.scope is not None:
                    operations = document["paths"][route.path_format]
                    for operation in operations.values():
                        operation["security"] = [{name: []} for name in contract.SECURITY]
        return super().openapi()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102  # ASGI's
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        began = time.perf_counter()

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = getattr(scope.get("route"), "path", "unknown")
                self._metrics.answered(route, message["status"], time.perf_counter() - began)
            await send(message)

        for route in self._direct:
            match, found = route.matches(scope)
            if match is Match.FULL:
                scope.update(found)
                response = await route.answer(Request(scope, receive), self._guard)
                if route.has_shed(response):
                    self._metrics.shed()
                await response(scope, receive, counted)
                return
        await super().__call__(scope, receive, counted)


async def _not_found(request: Request, error: Exception) -> Response:
    return problem_of(error, request_line(request)).response()


def request_line(request: Request) -> str:
    """Method and path, for people."""
    return f"{request.method} {request.url.path}"
