"""Errors as RFC 9457 problem documents that name the field and the remedy. Never a stack trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import structlog
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from features.plan import CodeChangedError
from features.program import DerivedFeatureError

MEDIA_TYPE = "application/problem+json"

log = structlog.get_logger()


class Problem(Exception):  # noqa: N818  # the RFC's word; it is an answer as much as an error
    """An answer that is no features: raised anywhere below a route."""

    def __init__(
        self, status: int, title: str, detail: str, *, headers: dict[str, str] | None = None, **members: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.headers = headers or {}
        self.document = {"type": "about:blank", "title": title, "status": status, "detail": detail, **members}

    def response(self) -> Response:
        """The problem as an HTTP answer."""
        # json writes what orjson refuses: halves of surrogate pairs that a request may have held.
        return Response(json.dumps(self.document), self.status, self.headers, MEDIA_TYPE)


def invalid(field: str, detail: str) -> Problem:
    """422: a field of the request is not what it should be."""
    return _refused([{"field": field, "detail": detail}])


def refused(error: ValidationError) -> Problem:
    """422: what a body or a query is made into does not take it."""
    return _refused(
        [
            # Where JSON is broken, pydantic says at which byte, in place of a field's name.
            {
                "field": "body" if each["type"] == "json_invalid" else ".".join(map(str, each["loc"])) or "body",
                "detail": each["msg"],
            }
            for each in error.errors(include_url=False, include_context=False, include_input=False)
        ]
    )


def _refused(errors: Sequence[dict[str, str]]) -> Problem:
    detail = "; ".join(f"{each['field']}: {each['detail']}" for each in errors[:3])
    return Problem(422, "Invalid request", detail, errors=errors)


def unavailable(detail: str) -> Problem:
    """503: what is needed to answer is away; try again."""
    return Problem(503, "Unavailable", detail, headers={"Retry-After": "1"})


def problem_of(error: Exception, request: str) -> Problem:
    """What to answer after any error; `request` is its method and path. What nobody foresaw is logged."""
    match error:
        case Problem():
            return error
        case HTTPException():
            return Problem(error.status_code, str(error.detail), request, headers=dict(error.headers or {}))
        case CodeChangedError():
            return Problem(500, "Code changed", str(error))
        case DerivedFeatureError():
            return Problem(500, "Derived feature failed", str(error))
        case ClientDisconnect():
            return Problem(400, "Incomplete request", f"{request}: the connection was closed within the body")
        case _:
            log.error("request_failed", request=request, exc_info=error)
            return Problem(500, "Internal error", f"{request}: see the server's log")
