"""FastAPI's contract and documents, without its cost a request: routes are called straight from the server's front.

A FastAPI route that returns a constant takes 100 µs of processor time, of which uvicorn's share is 25. What FastAPI
adds (six layers of middleware, two exit stacks, the solving of dependencies) is more than reading an entity takes.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, get_type_hints

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Message, Receive, Scope, Send

from serving.metrics import Metrics
from serving.problems import MEDIA_TYPE, problem_of, refused

_PROBLEM: dict[str, Any] = {
    "description": "A problem document (RFC 9457)",
    "content": {
        MEDIA_TYPE: {
            "schema": {
                "type": "object",
                "required": ["type", "title", "status", "detail"],
                "properties": {
                    "type": {"type": "string"},
                    "title": {"type": "string"},
                    "status": {"type": "integer"},
                    "detail": {"type": "string"},
                    "errors": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "properties": {"field": {"type": "string"}, "detail": {"type": "string"}},
                        },
                    },
                },
            }
        }
    },
}


class Bytes(Response):
    """200 with a body and headers that are bytes already."""

    def __init__(self, body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
        # Instead of Response's own, which would look for and encode each of the headers.
        self.status_code = 200
        self.background = None
        self.body = body
        self.raw_headers = [*headers, (b"content-length", b"%d" % len(body))]


class DirectRoute(APIRoute):
    """A route that FastAPI documents by its endpoint's signature, and that is called without FastAPI.

    The endpoint takes the request, the path's parameters as texts, and at most one pydantic model, which is made of
    the body's JSON; of the query if there is no body. Whatever it raises is answered as a problem.
    """

    def __init__(
        self, method: str, path: str, endpoint: Callable[..., Awaitable[Response]], media_types: Sequence[str]
    ) -> None:
        answers: dict[int | str, dict[str, Any]] = {
            200: {"content": {media_type: {} for media_type in media_types}},
            "default": _PROBLEM,
        }
        super().__init__(path, endpoint, methods=[method], response_class=Response, responses=answers)
        self.app = self.answer
        self._models = [
            (name, hint)
            for name, hint in get_type_hints(endpoint).items()
            if isinstance(hint, type) and issubclass(hint, BaseModel)
        ]

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The endpoint's answer, or a problem: an ASGI application."""
        request = Request(scope, receive)
        try:
            given: dict[str, Any] = dict(scope["path_params"])
            for name, model in self._models:
                given[name] = await self._made(model, request)
            response = await self.endpoint(request, **given)
        except Exception as error:  # noqa: BLE001  # the last place where it can become an answer
            response = problem_of(error, request_line(request)).response()
        await response(scope, receive, send)

    async def _made(self, model: type[BaseModel], request: Request) -> BaseModel:
        try:
            if self.body_field is None:
                return model.model_validate(dict(request.query_params))
            return model.model_validate_json(await request.body())
        except ValidationError as error:
            raise refused(error) from error


class Server(FastAPI):
    """FastAPI whose direct routes are called before its middleware; every answer is counted as it starts.

    An answer that has reached a client is in the metrics, whichever process is asked for them.
    """

    def __init__(self, metrics: Metrics, routes: Sequence[DirectRoute], **options: Any) -> None:
        super().__init__(**options)
        self._metrics = metrics
        self._direct = routes
        self.router.routes.extend(routes)
        self.add_exception_handler(HTTPException, _not_found)

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
                await route.answer(scope, receive, counted)
                return
        await super().__call__(scope, receive, counted)


async def _not_found(request: Request, error: Exception) -> Response:
    return problem_of(error, request_line(request)).response()


def request_line(request: Request) -> str:
    """Method and path, for people."""
    return f"{request.method} {request.url.path}"
