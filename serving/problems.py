"""Errors as RFC 9457 problem documents that name the field and the remedy. Never a stack trace."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response


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
        return Response(json.dumps(self.document), self.status, self.headers, "application/problem+json")


def invalid(field: str, detail: str) -> Problem:
    """422: a field of the request is not what it should be."""
    return Problem(422, "Invalid request", f"{field}: {detail}", errors=[{"field": field, "detail": detail}])


def unavailable(detail: str) -> Problem:
    """503: what is needed to answer is away; try again."""
    return Problem(503, "Unavailable", detail, headers={"Retry-After": "1"})
