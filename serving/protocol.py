"""uvicorn's HTTP protocol with limits on what a connection may hold: bytes of a head, time, and connections at all.

uvicorn itself takes a head of any size, waits for the rest of one for ever, and keeps an answer for ever for a client
that does not take it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from config.settings import Settings
from serving.problems import MEDIA_TYPE, Problem

BEYOND: Final = "headrace.beyond"
"""In a request's ASGI scope if its connection is one too many."""
_REFUSED_MAX: Final = 100
"""So many connections too many get an answer; for more, idle ones make room, or else they are dropped."""
_HALF, _NEVER_ASKED, _IDLE = range(3)
_Waits = tuple[float, int]
"""Since when, and for what: the rest of a head, a first request, or another."""
_LINGER_S: Final = 1.0
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
    return type(
        "LimitedProtocol", (_LimitedProtocol,), {"_limits": limits, "_waiting": {}, "_leaving": set(), "leaving": False}
    )


class _LimitedProtocol(HttpToolsProtocol):
    """One connection. A timer looks at it a few times within the deadline: that costs a request nothing.

    Times are of the system's clock: uvloop's has milliseconds, in which several connections can begin to wait.
    """

    _limits: Limits
    _waiting: dict[tuple[int, ...], deque[tuple[_Waits, _LimitedProtocol]]]
    """Of all connections: those that may do nothing but wait for their client, by what for, the oldest first."""
    _leaving: set[_LimitedProtocol]
    """Of all connections: those that made room, and that the event loop has not ended yet."""
    leaving: bool
    """Whether every connection is to be closed with its next answer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head = True
        self._head_bytes = 0
        self._begun_s: float | None = None  # The message that is being received.
        self._idle = (time.monotonic(), _NEVER_ASKED)
        self._unsent_s: float | None = None  # What the client has not taken.
        self._refusal: Problem | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        if self._beyond() > 0:
            self._make_room((_HALF, _NEVER_ASKED))
        if self._beyond() > _REFUSED_MAX:
            self._make_room((_IDLE,))
        n_beyond = self._beyond()
        self._is_beyond = n_beyond > 0
        if n_beyond > _REFUSED_MAX:
            transport.abort()
            return
        # A connection on which nothing was asked yet is idle, as one on which nothing is asked any more.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        self._look_again()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._leaving.discard(self)
        self._unset_keepalive_if_required()
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        if self._begun_s is None:
            self._begun_s = time.monotonic()
        if self._in_head:
            self._head_bytes += len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > self._limits.header_bytes_max and not self.transport.is_closing():
            self._refuse(self._too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._begun_s is None:  # It came with the end of another.
            self._begun_s = time.monotonic()
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
        if self.leaving and self.cycle is not None:
            self.cycle.keep_alive = False

    def on_message_complete(self) -> None:
        self._in_head, self._begun_s = True, None
        self._idle = (time.monotonic(), _IDLE)
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

    def _beyond(self) -> int:
        return len(self.connections) - len(self._leaving) - self._limits.connections_max

    def _make_room(self, kinds: tuple[int, ...]) -> None:
        """Lets the first of those go that do nothing but wait for their client, for what is of these kinds.

        Who sends no more than half a head, or nothing, would else keep everybody out, a liveness probe too.
        """
        waiting = self._waiting.setdefault(kinds, deque())
        if not waiting:  # Looked for once for many: those that wait later are younger than all of these.
            ours = [each for each in self.connections if isinstance(each, _LimitedProtocol) and each is not self]
            found = [(*waits, at) for at, each in enumerate(ours) if (waits := each._waits()) and waits[1] in kinds]
            waiting.extend(((since_s, kind), ours[at]) for since_s, kind, at in sorted(found))
        while waiting:
            waits, first = waiting.popleft()
            if first._waits() == waits:
                if waits[1] == _HALF:
                    detail = "headers: they were not there when others needed the connection (HEADRACE_CONNECTIONS_MAX)"
                    first._refuse(Problem(408, "Request timeout", detail))
                else:
                    first.transport.close()
                self._leaving.add(first)
                # TLS would wait for the client to say goodbye, and it no longer counts.
                self.loop.call_later(_LINGER_S, first.transport.abort)
                return

    def _waits(self) -> _Waits | None:
        """Since when it waits for its client, and for what; None if it does something else."""
        is_owed = bool(self.cycle) and not self.cycle.response_complete
        if not self._in_head or is_owed or self.transport.is_closing() or self.transport.get_write_buffer_size():
            return None
        return self._idle if self._begun_s is None else (self._begun_s, _HALF)

    def _too_large(self) -> Problem:
        detail = f"headers: they are more than the {self._limits.header_bytes_max:,} bytes of HEADRACE_HEADER_BYTES_MAX"
        return Problem(431, "Request header fields too large", detail)

    def _look_again(self) -> None:
        self._timer = self.loop.call_later(self._limits.deadline_s / _LOOKS, self._look)

    def _look(self) -> None:
        """Ends a connection whose client is too slow."""
        now_s, deadline_s = time.monotonic(), self._limits.deadline_s
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
