"""uvicorn's HTTP protocol with limits on what a connection may hold: bytes of a head, time, and connections at all.

uvicorn itself takes a head of any size, waits for the rest of one for ever, and keeps an answer for ever for a client
that does not take it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from registry.settings import Settings
from serving.problems import MEDIA_TYPE, Problem

BEYOND: Final = "headrace.beyond"
"""In a request's ASGI scope if its connection is one too many."""
_REFUSED_MAX: Final = 100
"""So many connections too many get an answer; more are dropped."""
_LOOKS: Final = 4


@dataclass(frozen=True)
class Limits:
    """What one connection may take, and how many there may be in a process."""

    connections_max: int
    header_bytes_max: int
    deadline_s: float

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """The limits that settings ask for."""
        return cls(settings.connections_max, settings.header_bytes_max, settings.deadline_s)


def limited(limits: Limits) -> type[HttpToolsProtocol]:
    """The protocol with these limits, for uvicorn's `http=`."""
    return type("LimitedProtocol", (_LimitedProtocol,), {"_limits": limits})


class _LimitedProtocol(HttpToolsProtocol):
    """One connection. A timer looks at it a few times within the deadline: that costs a request nothing."""

    _limits: Limits

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head = True
        self._head_bytes = 0
        self._begun_s: float | None = None  # The message that is being received.
        self._unsent_s: float | None = None  # What the client has not taken.
        self._refusal: Problem | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        n_beyond = len(self.connections) - self._limits.connections_max
        self._is_beyond = n_beyond > 0
        if n_beyond > _REFUSED_MAX:
            transport.abort()
            return
        # A connection on which nothing was asked yet is idle, as one on which nothing is asked any more.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self._look_again()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._begun_s is None:
            self._begun_s = self.loop.time()
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self._limits.header_bytes_max and not self.transport.is_closing():
            self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._begun_s is None:  # It came with the end of another.
            self._begun_s = self.loop.time()
        if self._is_beyond:
            self.scope[BEYOND] = True  # type: ignore[typeddict-unknown-key]  # ASGI lets servers add their own

    def on_headers_complete(self) -> None:
        n_bytes, self._head_bytes, self._in_head = self._head_bytes, 0, False
        if n_bytes > self._limits.header_bytes_max:  # With what came of the body.
            exact = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if exact > self._limits.header_bytes_max:
                self._refusal = self._too_large()
                raise ValueError  # Ends the parsing, and so in `send_400_response`.
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._begun_s = True, None
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, or too much of it, is a problem too."""
        self._refuse(self._refusal or Problem(400, "Bad request", msg))

    def _refuse(self, problem: Problem) -> None:
        response = problem.response()
        head = [STATUS_LINE[problem.status], f"content-type: {MEDIA_TYPE}\r\n".encode()]
        head.append(b"content-length: %d\r\nconnection: close\r\n\r\n" % len(response.body))
        self.transport.write(b"".join([*head, bytes(response.body)]))
        self.transport.close()

    def _too_large(self) -> Problem:
        detail = f"headers: they are more than the {self._limits.header_bytes_max:,} bytes of HEADRACE_HEADER_BYTES_MAX"
        return Problem(431, "Request header fields too large", detail)

    def _look_again(self) -> None:
        self._timer = self.loop.call_later(self._limits.deadline_s / _LOOKS, self._look)

    def _look(self) -> None:
        """Ends a connection whose client is too slow."""
        now_s, deadline_s = self.loop.time(), self._limits.deadline_s
        if not self.transport.get_write_buffer_size():
            self._unsent_s = None
        elif self._unsent_s is None:
            self._unsent_s = now_s
        elif now_s - self._unsent_s >= deadline_s:
            self.transport.abort()
            return
        if self._begun_s is not None and not self.transport.is_closing():
            late_s = now_s - self._begun_s - deadline_s
            if self._in_head and late_s >= 0:
                detail = f"headers: they were not there within {deadline_s:g} s (HEADRACE_DEADLINE_S)"
                self._refuse(Problem(408, "Request timeout", detail))
            elif late_s >= deadline_s:  # The app, too, has waited for the body, and said so.
                self.transport.abort()
                return
        self._look_again()
