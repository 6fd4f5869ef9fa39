"""What a request must pass before anything is done for it: its key, its size, its time, and a server that has time.

A request in work is one whose body is there and whose answer is not. Of these a process has as many at once as come
together, which is quick, since they are evaluated together. Only where more than `requests_max` are there on average
over `WINDOW_S` is there more than can be carried, or a hiccup to catch up with. Then a limit of three times as many is
set, and what comes beyond it is refused, at a tenth of the cost of an answer. A limit that was all but reached for a
window is tightened, down to `requests_max`; one that was not half reached is loosened, and at last given up. So a load
that can be carried over a few connections is never refused, and of too much, what is accepted soon waits for at most
`requests_max` others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope

from config.settings import Settings
from serving.keys import Key, Keys
from serving.problems import Problem

WINDOW_S: Final = 0.05
_FIRST: Final = 3
"""The first limit, over the last."""
_TIGHTER: Final = 2 / 3
_REACHED: Final = 0.7
"""Of the limit, on average: requests leave together, so the average is below the limit however much is asked."""
_SPARE: Final = 0.5
"""The same of a limit that is not needed any more."""
Headers = Sequence[tuple[bytes, bytes]]


class Gate:
    """Counts requests in work, and says whether one more is taken.

    Args:
        requests_max: how many are taken at once when there is too much for long.
    """

    def __init__(self, requests_max: int) -> None:
        self._most = requests_max
        self._limit = math.inf
        self.working = 0
        self._area = 0.0
        self._last_s = self._began_s = 0.0

    def __repr__(self) -> str:
        return f"<Gate working={self.working} limit={self._limit:g}>"

    def enter(self, now_s: float) -> bool:
        """Takes a request, which must `leave`; or refuses it."""
        self._advance(now_s)
        if now_s - self._began_s >= WINDOW_S:
            self._turn(now_s)
        if self.working >= self._limit:
            return False
        self.working += 1
        return True

    def leave(self, now_s: float) -> None:
        """A request's answer is there."""
        self._advance(now_s)
        self.working -= 1

    def _advance(self, now_s: float) -> None:
        self._area += self.working * (now_s - self._last_s)
        self._last_s = now_s

    def _turn(self, now_s: float) -> None:
        """Begins a window; its limit is learned from the last."""
        mean, first = self._area / (now_s - self._began_s), _FIRST * self._most
        if self._limit > first:
            self._limit = first if mean > self._most else math.inf
        elif mean > _REACHED * self._limit:
            self._limit = max(self._most, _TIGHTER * self._limit)
        elif mean < _SPARE * self._limit:
            self._limit *= 2
        self._area, self._began_s = 0.0, now_s


@dataclass(frozen=True)
class Guard:
    """What the server asks of every request, made once a process."""

    gate: Gate
    keys: Keys
    body_bytes_max: int
    deadline_s: float

    @classmethod
    def of(cls, settings: Settings, keys: Keys) -> Guard:
        """The guard that settings ask for."""
        return cls(Gate(settings.requests_max), keys, settings.body_bytes_max, settings.deadline_s)

    def key(self, headers: Headers, scope: str | None) -> Key | None:
        """The caller's key; None where none is needed.

        Raises:
            Problem: 401 without a key that is known, 403 without the scope, 429 beyond its rate.
        """
        if scope == "write" and self.keys.is_open:
            detail = (
                "without API keys all may read, and nobody may write: make some (`headrace keys add --scope write`)"
            )
            raise Problem(403, "Forbidden", detail)
        return None if scope is None else self.keys.admit(headers, scope)

    async def body(self, scope: Scope, receive: Receive) -> bytes:
        """The body of a request.

        Raises:
            Problem: 413 once it is, or says that it is, too large; nothing more of it is kept.
            ClientDisconnect: if the connection ends before it does.
        """
        for name, value in scope["headers"]:
            if name == b"content-length" and value.isdigit() and int(value) > self.body_bytes_max:
                raise self._too_large(int(value))
        body: bytes = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            if len(body) > self.body_bytes_max:
                raise self._too_large(len(body))
            if not message.get("more_body", False):
                return body

    def too_late(self, *, has_body: bool) -> Problem:
        """The deadline has passed: the caller's fault where the body is not there, otherwise ours."""
        if has_body:
            detail = f"there was no answer within {self.deadline_s:g} s (HEADRACE_DEADLINE_S)"
            return Problem(503, "Unavailable", detail, headers={"Retry-After": "1"})
        detail = f"body: it was not there within {self.deadline_s:g} s (HEADRACE_DEADLINE_S)"
        # What else is sent of it is no request.
        return Problem(408, "Request timeout", detail, headers={"Connection": "close"})

    def _too_large(self, n_bytes: int) -> Problem:
        detail = f"{n_bytes:,} bytes are more than the {self.body_bytes_max:,} of HEADRACE_BODY_BYTES_MAX; split it"
        return Problem(413, "Content too large", f"body: {detail}", errors=[{"field": "body", "detail": detail}])
