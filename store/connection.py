"""One pipelined connection to a Redis node, which all tasks of an event loop share.

A pool of connections costs a task two switches and a lock for every call, and its reads race with the news that a
key has changed. Here each call is one write, the answers come back in the order of the calls, and what Redis says of
changed keys (client tracking) arrives in order between them.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import hiredis
import redis.asyncio
from redis.asyncio.connection import SSLConnection, UnixDomainSocketConnection
from redis.connection import DefaultParser
from redis.exceptions import AuthenticationError, InvalidResponse, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from config.address import Address, Node
from store.resp import command

OnInvalidated = Callable[[Sequence[bytes] | None], None]
Argument = bytes | str | int

CLIENT_NAME: Final = "headrace"
IDLE_S: Final = 0.9
"""A connection that tracks keys and has heard nothing for so long is pinged."""
SENTINEL_S: Final = 1.0
"""So often sentinels are asked whether a master still is it."""
GRACE_S: Final = 0.05
"""A late answer gets so much more: after a stall of this process it may lie in the socket, not yet read."""
TRACKING_VERSION_MIN: Final = (6, 2, 7)
"""Before, an invalidation could stand inside the answer of MGET (redis/redis#8935) and shift all that follow."""

_pack: Final[Callable[[tuple[Argument, ...]], bytes]] = hiredis.pack_command  # type: ignore[assignment]  # stub: 1-tuple
_PING: Final = _pack(("PING",))
TRACK_NEXT: Final = _pack(("CLIENT", "CACHING", "YES"))
"""Before a command, in the same request: the keys that it reads are tracked. It has an answer of its own."""
_MORE: Final = object()


class Connection:
    """Reads from one Redis node (6.2 or later, a primary), for all tasks of one event loop.

    The first call connects, and so does the next call after the connection was lost; many at once share one attempt.
    Every call has an answer or an error within `timeout_s`
    of being made, connecting included, with `GRACE_S` more for each late answer that still comes in. A call that got
    none shows that the connection hangs: it is dropped, and all that wait on it fail. Nothing is sent twice; a call
    whose answer was lost may have been done.

    A task that is cancelled while it waits disturbs nobody: its answer is dropped when it comes.

    Commands that change the connection for everybody, or that hold up its answers, don't belong here: SELECT, MULTI,
    SUBSCRIBE, CLIENT, BLPOP and their like.

    **Tracking.** With `on_invalidated`, Redis remembers the keys read by `mget(tracked=...)` and says once when each
    has changed, by whatever way (also expiry, when Redis carries it out). The callback runs in the order of the stream:

    - with keys, after every answer that Redis gave before the change and before every later one;
    - with None ("anything may have changed") at FLUSHDB and FLUSHALL, and when the connection is lost, dropped or
      closed: before a waiting call fails and before a later connection answers.

    Redis says nothing of SWAPDB, and a replica nothing of being synchronised anew.

    An answer and the news that outdate it can be handled in one go, before the task that awaits the answer runs. So
    who keeps values must note a key as wanted before calling `mget`, unmark it when the callback names it (all of them
    at None), and after `mget` keep only the values of keys still marked. Of several calls at once for one key, each
    needs its own mark.

    While tracking, an idle connection is pinged. When Redis or the network falls silent, the callback has None within
    1 s + `timeout_s`: with an event loop that runs, kept values are never staler than that.

    Args:
        url: `redis://`, `rediss://` or `unix://` with redis-py's options, those for timeouts aside; or
            `redis+sentinel://`: every connection is to whom the sentinels then name as the master, is refused by one
            that is none, and ends when they name another.
        timeout_s: The time that a call has.
        on_invalidated: Called with the keys that changed, or None for all; it must be quick and must not raise.

    Raises:
        ValueError: For a URL that redis-py refuses (TypeError for an option that it does not know).
    """

    def __init__(self, url: str, timeout_s: float, *, on_invalidated: OnInvalidated | None = None) -> None:
        tracking = on_invalidated is not None
        is_named = url.partition("://")[0].endswith("+sentinel")
        self._node = _Master(url, timeout_s, tracking=tracking) if is_named else _Node(url, tracking=tracking)
        self._timeout_s = timeout_s
        self._on_invalidated = on_invalidated
        self._link: _Link | None = None
        self._links: set[asyncio.Task[None]] = set()
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "connected" if self.connected else "away"
        return f"<Connection {self._node} {state}>"

    @property
    def connected(self) -> bool:
        """Whether calls go out at once; False before the first."""
        return self._link is not None and self._link.is_ready

    async def execute(self, *words: Argument) -> Any:
        """Runs one command.

        Args:
            words: A command's name and arguments; a name of two words is two of them.

        Returns:
            The answer as RESP3 has it: bytes, int, float, None, list, dict (of CONFIG GET, HGETALL), set.

        Raises:
            redis.exceptions.ResponseError: Redis refused it; subclasses as redis-py has them. (BusyLoadingError
                and AuthenticationError are ConnectionErrors there.)
            redis.exceptions.ConnectionError: Redis is away, or went away before it answered.
            redis.exceptions.TimeoutError: There was no answer in time.
        """
        if not words:
            msg = "execute() needs a command, such as execute('PING')"
            raise ValueError(msg)
        (reply,) = await self._call(_pack(words), 1)
        return reply

    async def mget(self, keys: Sequence[bytes], *, tracked: Sequence[bytes] = ()) -> list[bytes | None]:
        """Reads keys in one write and one round trip; no keys, no round trip.

        Args:
            keys: Keys to read; `store.resp.Arguments` are packed already.
            tracked: More keys to read, of whose next change `on_invalidated` is told; see the class for what to heed.

        Returns:
            The values of `keys`, then those of `tracked`; None where there is none.

        Raises:
            ValueError: `tracked` was given to a connection without `on_invalidated`.
            redis.exceptions.RedisError: As `execute`.
        """
        if not tracked:
            if not keys:
                return []
            (values,) = await self._call(command(b"MGET", keys), 1)
            return values  # type: ignore[no-any-return]  # an answer of Redis
        if self._on_invalidated is None:
            msg = "mget(tracked=...) needs a Connection made with on_invalidated=, which is told of their changes"
            raise ValueError(msg)
        request = TRACK_NEXT + command(b"MGET", tracked)
        if not keys:
            return (await self._call(request, 2))[1]  # type: ignore[no-any-return]  # an answer of Redis
        plain, _, remembered = await self._call(command(b"MGET", keys) + request, 3)
        return plain + remembered  # type: ignore[no-any-return]  # answers of Redis

    async def everywhere(self, *words: Argument) -> list[Any]:
        """Runs a command on every master, which is this one; see `execute`."""
        return [await self.execute(*words)]

    async def ask(self, request: bytes, n_replies: int) -> list[Any]:
        """Sends packed commands in one write; returns all their answers, errors that Redis gave among them."""
        link = self._link or self._connect()
        return await link.send(request, n_replies)

    async def aclose(self) -> None:
        """Closes the connection for good; calls that wait fail, as later ones do."""
        self._closed = True
        if self._link is not None:
            self._link.end(RedisConnectionError(f"the connection to Redis at {self._node} was closed"))
        if self._links:
            await asyncio.wait(self._links)
        await self._node.aclose()

    async def _call(self, request: bytes, n_replies: int) -> list[Any]:
        """Sends and returns the answers, or raises the first that is an error."""
        link = self._link or self._connect()
        replies = await link.send(request, n_replies)
        for reply in replies:
            if isinstance(reply, RedisError):
                raise reply
        return replies

    def _connect(self) -> _Link:
        """A new link; calls may be sent on it at once."""
        if self._closed:
            msg = f"the connection to Redis at {self._node} was closed; make a new one"
            raise RedisConnectionError(msg)
        self._link = link = _Link(self._node, self._timeout_s, self._on_invalidated, self._ended)
        self._links.add(link.task)
        link.task.add_done_callback(self._links.discard)
        return link

    def _ended(self) -> None:
        self._link = None


class _Node:
    """Where Redis is, and what is said there first; everything that is read from the URL."""

    def __init__(self, url: str, *, tracking: bool) -> None:
        # Never connected: it is redis-py's reading of the URL, options of TLS included.
        pool: Any = redis.asyncio.ConnectionPool.from_url(url, client_name=CLIENT_NAME)
        self._parsed = pool.make_connection()
        self.tracking = tracking
        self._is_unix = isinstance(self._parsed, UnixDomainSocketConnection)
        hello: list[Argument] = ["HELLO", 3]
        if self._parsed.username or self._parsed.password:
            hello += ["AUTH", self._parsed.username or "default", self._parsed.password or ""]
        greeting: list[tuple[Argument, ...]] = [(*hello, "SETNAME", self._parsed.client_name)]
        if self._parsed.db:
            greeting.append(("SELECT", self._parsed.db))
        if tracking:
            greeting.append(("CLIENT", "TRACKING", "ON", "OPTIN"))
        self.greeting = b"".join(map(_pack, greeting))
        self.n_greetings = len(greeting)

    def __str__(self) -> str:
        """The address without user and password, for messages."""
        parsed = self._parsed
        return f"{parsed.path if self._is_unix else f'{parsed.host}:{parsed.port}'}/{parsed.db}"

    async def connect(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.BaseProtocol) -> None:
        """Opens the socket, with TLS where the URL asks for it."""
        parsed = self._parsed
        if self._is_unix:
            await loop.create_unix_connection(lambda: protocol, parsed.path)
        else:
            tls = parsed.ssl_context.get() if isinstance(parsed, SSLConnection) else None
            await loop.create_connection(lambda: protocol, parsed.host, int(parsed.port), ssl=tls)

    async def stay(self, closed: asyncio.Future[None]) -> None:
        """Returns once the socket is closed; raises when it should be."""
        await closed

    async def aclose(self) -> None:
        """Closes what was opened to find it."""

    def refusal(self, greeted: Sequence[Any]) -> RedisError | None:
        """What is wrong with the answers to the greeting, if anything is."""
        error = next((reply for reply in greeted if isinstance(reply, RedisError)), None)
        if isinstance(error, AuthenticationError):
            return type(error)(f"Redis at {self}: {error}; check the user and the password in its URL")
        if error is not None and "unknown command" in str(error):
            # Its text repeats the arguments, and so the password.
            return ResponseError(f"Redis at {self} does not know HELLO or CLIENT TRACKING: it must be 6.2 or later")
        if error is not None:
            return type(error)(f"Redis at {self} refused the connection: {error}")
        if self.tracking and greeted and isinstance(greeted[0], dict):
            version = greeted[0].get(b"version", b"").decode(errors="replace")
            found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
            if found and tuple(map(int, found.groups())) < TRACKING_VERSION_MIN:
                needed = ".".join(map(str, TRACKING_VERSION_MIN))
                return ResponseError(
                    f"Redis at {self} is {version}, which mixes news of changed keys into answers: "
                    f"update it to {needed} or later, or read without tracking"
                )
        return None


class _Master(_Node):
    """The master that sentinels know by a name."""

    def __init__(self, url: str, timeout_s: float, *, tracking: bool) -> None:
        address = Address.parse(url)
        super().__init__(address.url_of(address.seeds[0]), tracking=tracking)
        self.greeting += _pack(("ROLE",))
        self.n_greetings += 1
        self._address = address
        # All of them, and the master then, within the time of a call.
        own_s = timeout_s / (len(address.seeds) + 1)
        self._sentinels = [Connection(address.url_of_sentinel(each), own_s) for each in address.seeds]

    def __str__(self) -> str:
        return f"{super().__str__()} ({self._address})"

    async def connect(self, loop: asyncio.AbstractEventLoop, protocol: asyncio.BaseProtocol) -> None:
        self._parsed.host, self._parsed.port = await self._named()
        await super().connect(loop, protocol)

    async def stay(self, closed: asyncio.Future[None]) -> None:
        """A master that is cut off from the sentinels is not told that it is one no longer."""
        while not closed.done():
            await asyncio.wait([closed], timeout=SENTINEL_S)
            with suppress(RedisError):
                if not closed.done() and await self._named() != (self._parsed.host, self._parsed.port):
                    break
        if not closed.done():
            msg = "the sentinels name another master"
            raise RedisConnectionError(msg)

    async def aclose(self) -> None:
        for sentinel in self._sentinels:
            await sentinel.aclose()

    def refusal(self, greeted: Sequence[Any]) -> RedisError | None:
        if (refused := super().refusal(greeted)) or len(greeted) < self.n_greetings or greeted[-1][0] == b"master":
            return refused
        return RedisConnectionError(f"Redis at {self} is no master: the sentinels have not agreed on another yet")

    async def _named(self) -> Node:
        """The address of the master, from the first sentinel that has one."""
        told = []
        for sentinel in self._sentinels:
            try:
                found = await sentinel.execute("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._address.master)
            except RedisError as error:
                told.append(str(error))
                continue
            if found is not None:
                return found[0].decode(), int(found[1])
            told.append(f"{sentinel} knows no master {self._address.master!r}")
        raise RedisConnectionError("; ".join(told))


class _Call:
    """What was asked and is not yet answered. Its place in line outlives the task that asked."""

    __slots__ = ("deadline_s", "future", "n_replies", "replies")

    def __init__(self, future: asyncio.Future[list[Any]], deadline_s: float, n_replies: int) -> None:
        self.future = future
        self.deadline_s = deadline_s
        self.n_replies = n_replies
        self.replies: list[Any] = []


class _Link(asyncio.Protocol):
    """One socket from its opening to its end. It ends once, and whoever waits on it then fails.

    The first call in line is the greeting; requests made before it was answered wait in `_unsent`, so that nothing runs
    without the right user or in the wrong database. One timer serves all calls, since they are answered in order.
    """

    def __init__(
        self,
        node: _Node,
        timeout_s: float,
        on_invalidated: OnInvalidated | None,
        on_ended: Callable[[], None],
    ) -> None:
        self.is_ready = False
        self._node = node
        self._timeout_s = timeout_s
        self._on_invalidated = on_invalidated
        self._on_ended = on_ended
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader(
            protocolError=InvalidResponse,
            replyError=DefaultParser.parse_error,
            errors="replace",
            notEnoughData=_MORE,
        )
        self._calls: deque[_Call] = deque()
        self._unsent: list[bytes] = []
        self._transport: asyncio.Transport | None = None
        self._socket_closed: asyncio.Future[None] = self._loop.create_future()
        self._has_ended = False
        self._timer: asyncio.TimerHandle | None = None
        self._tick_at_s = math.inf
        self._heard_at_s = -math.inf
        self._late: _Call | None = None
        self.send(node.greeting, node.n_greetings).add_done_callback(self._greeted)
        self._greeting = self._calls[0]
        self.task = self._loop.create_task(self._run())

    def send(self, request: bytes, n_replies: int) -> asyncio.Future[list[Any]]:
        """Writes at once, or once the greeting is answered."""
        call = _Call(self._loop.create_future(), time.monotonic() + self._timeout_s, n_replies)
        self._calls.append(call)
        if self.is_ready:
            self._transport.write(request)  # type: ignore[union-attr]  # there is one while ready
        else:
            self._unsent.append(request)
        if call.deadline_s < self._tick_at_s:
            self._tick_at(call.deadline_s)
        return call.future

    def end(self, error: RedisError) -> None:
        """Drops the socket; says that anything may have changed; fails what waits, in this order."""
        if self._has_ended:
            return
        self._has_ended = True
        self._on_ended()
        self.is_ready = False
        if self._timer is not None:
            self._timer.cancel()
        if self._transport is not None:
            self._transport.abort()
        else:
            self.task.cancel()
        try:
            if self._on_invalidated is not None:
                self._on_invalidated(None)
        finally:
            for call in self._calls:
                if not call.future.done():
                    call.future.set_exception(_copy(error))
            self._calls.clear()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a stream has no other
        """Greets."""
        self._transport = transport
        if self._has_ended:
            transport.abort()
        else:
            transport.write(self._unsent.pop(0))

    def data_received(self, data: bytes) -> None:
        """Hands out answers and news of changed keys, in the order of the stream."""
        self._heard_at_s = time.monotonic()
        reader = self._reader
        try:
            reader.feed(data)
            while not self._has_ended and (reply := reader.gets()) is not _MORE:
                if type(reply) is hiredis.PushNotification:
                    self._pushed(reply)
                else:
                    self._answered(reply)
        except InvalidResponse as error:
            self.end(RedisConnectionError(f"what answers at {self._node} does not speak Redis' protocol: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        """Ends the link, unless it ended of itself."""
        if not self._socket_closed.done():  # Cancelled by a loop that is shut down with the connection open.
            self._socket_closed.set_result(None)
        refusal = None if self.is_ready else self._node.refusal(self._greeting.replies)
        why = error or "Redis closed it"
        self.end(refusal or RedisConnectionError(f"the connection to Redis at {self._node} was lost: {why}"))

    async def _run(self) -> None:
        """Connects, and returns once the socket is closed."""
        try:
            await self._node.connect(self._loop, self)
            await self._node.stay(self._socket_closed)
        except Exception as error:  # noqa: BLE001  # whatever it is, the calls that wait must hear of it
            self.end(RedisConnectionError(f"Redis at {self._node} can't be reached: {error}"))

    def _greeted(self, greeting: asyncio.Future[list[Any]]) -> None:
        if greeting.exception() or self._has_ended:
            return
        if refusal := self._node.refusal(greeting.result()):
            self.end(refusal)
            return
        self.is_ready = True
        if self._node.tracking:
            self._tick_at(min(self._tick_at_s, time.monotonic() + IDLE_S))
        if self._unsent:
            self._transport.write(b"".join(self._unsent))  # type: ignore[union-attr]  # the greeting went that way
            self._unsent.clear()

    def _pushed(self, push: Sequence[Any]) -> None:
        if push[0] == b"invalidate" and self._on_invalidated is not None:
            self._on_invalidated(push[1])

    def _answered(self, reply: Any) -> None:
        if not self._calls:
            self.end(
                RedisConnectionError(f"Redis at {self._node} sent an answer that nobody asked for: {reply!r:.100}")
            )
            return
        call = self._calls[0]
        call.replies.append(reply)
        if len(call.replies) == call.n_replies:
            self._calls.popleft()
            if not call.future.done():  # Else its task was cancelled.
                call.future.set_result(call.replies)

    def _tick_at(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._tick_at_s = at_s
        # Loops round to milliseconds; a tick too early would only be repeated.
        self._timer = self._loop.call_later(max(at_s - time.monotonic(), 0) + 0.001, self._tick)

    def _tick(self) -> None:
        """Ends a link that hangs, pings one that is idle while it tracks, and sets the timer for the next look."""
        now_s = time.monotonic()
        next_s = math.inf
        self._timer, self._tick_at_s = None, math.inf
        if self._node.tracking:
            next_s = now_s + IDLE_S
            if not self._calls and now_s < self._heard_at_s + IDLE_S:
                next_s = self._heard_at_s + IDLE_S
            elif not self._calls:
                self.send(_PING, 1).cancel()  # Nobody waits for the answer, but its place in line has a deadline.
        if self._calls:
            first = self._calls[0]
            if now_s < first.deadline_s:
                next_s = min(next_s, first.deadline_s)
            elif first is not self._late:
                self._late = first
                next_s = now_s + GRACE_S
            else:
                did = "gave no answer" if self._transport else "could not be reached"
                self.end(RedisTimeoutError(f"Redis at {self._node} {did} in {self._timeout_s:g} s; connection dropped"))
                return
        if next_s < math.inf:
            self._tick_at(next_s)


def _copy(error: RedisError) -> RedisError:
    """One for each task: raised in several, an exception would collect the tracebacks of all."""
    return type(error)(*error.args)
