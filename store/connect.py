"""Blocking clients of Redis: every call has a deadline."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AskError, MovedError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel

from config.address import Address, Node
from store.slots import AGAIN_S, by_slot, is_elsewhere, is_moving, not_covered, owners_of, places_by_slot, slot_of

Words = tuple[Any, ...]

_SCRIPTS: Final = ("EVAL", "EVALSHA")
_LOST: Final = (RedisConnectionError, RedisTimeoutError, OSError)


def connect(url: str, timeout_s: float) -> redis.Redis:
    """A client of what the URL says; nothing is sent before its first call.

    Of a cluster it is a `ClusterClient`, which has those of redis-py's calls that Headrace makes.

    Raises:
        ValueError: if the URL is malformed.
    """
    address = Address.parse(url)
    if address.kind == "cluster":
        cluster: Any = ClusterClient(address, timeout_s)
        return cluster  # type: ignore[no-any-return]  # to callers it is one
    if address.kind == "sentinel":
        return _master(address, timeout_s)
    client: redis.Redis = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    return client


def servers(client: redis.Redis) -> list[redis.Redis]:
    """The servers behind a client, each by itself: one, or the masters of a cluster."""
    behind: Any = client
    return behind.masters() if isinstance(behind, ClusterClient) else [client]


def _master(address: Address, timeout_s: float) -> redis.Redis:
    """A client of the master that sentinels name, asked for each of its connections."""
    timeouts: dict[str, Any] = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    options: dict[str, Any] = redis.connection.parse_url(address.url_of(address.seeds[0]))  # type: ignore[no-untyped-call]  # redis-py's
    options = {name: value for name, value in options.items() if name not in {"host", "port"}}
    tls: dict[str, Any] = {"ssl": True} if options.pop("connection_class", None) else {}
    of_sentinel = tls | {name: value for name, value in options.items() if name.startswith("ssl_")}
    make: Any = Sentinel
    # A sentinel that is away is not asked again: there are others.
    sentinel = make(address.seeds, sentinel_kwargs={**of_sentinel, **timeouts, "retry": Retry(NoBackoff(), 0)})
    client: redis.Redis = sentinel.master_for(
        address.master, **options, **tls, **timeouts, redis_connect_func=_greet_master
    )
    return client


def _greet_master(connection: Any) -> None:
    """Begins a connection, unless the server is a master no longer, or not yet."""
    connection.on_connect()
    connection.send_command("ROLE")
    if connection.read_response()[0] not in {b"master", "master"}:
        msg = f"Redis at {connection.host}:{connection.port} is no master: sentinels have not agreed on another yet"
        raise RedisConnectionError(msg)


@dataclass(eq=False)
class _Call:
    """A command to the node that has its key, or to one that is about to get it."""

    words: Words
    slot: int
    importing: Node | None = None
    answer: Any = None


class ClusterClient:
    """A Redis Cluster. What several keys need takes one round trip, whichever nodes they are on.

    What a node refuses or does not answer is sent again, to the node that is the master by then, until `timeout_s`
    have passed since the call: all of it may be done twice. Threads can share a client.
    """

    def __init__(self, address: Address, timeout_s: float) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._servers: dict[Node, redis.Redis] = {}
        self._known = list(address.seeds)
        self._owners: list[Node | None] | None = None

    def __repr__(self) -> str:
        return f"<ClusterClient {self._address}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all connections; a later call opens them anew."""
        for server in list(self._servers.values()):
            server.close()

    def masters(self) -> list[redis.Redis]:
        """A client of each master."""
        return [self._server(node) for node in dict.fromkeys(self._slots()) if node is not None]

    def get(self, key: bytes) -> Any:
        """As redis-py's."""
        return self.execute_command("GET", key)

    def mget(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """As redis-py's, for keys of any slots."""
        calls, places = [], []
        for slot, own in places_by_slot(keys).items():
            calls.append(_Call(("MGET", *(keys[place] for place in own)), slot))
            places.append(own)
        self._run(calls)
        found: list[bytes | None] = [None] * len(keys)
        one_by_one: list[int] = []
        for call, own in zip(calls, places, strict=True):
            if is_moving(call.answer):
                # Of a slot that moves, a node has some keys and not others; it answers for one at a time.
                one_by_one += own
                continue
            for place, value in zip(own, _checked(call.answer), strict=True):
                found[place] = value
        values = self.execute(("GET", keys[place]) for place in one_by_one)
        for place, value in zip(one_by_one, values, strict=True):
            found[place] = _checked(value)
        return found

    def script_load(self, script: str) -> str:
        """As redis-py's, on all masters."""
        return {str(master.script_load(script)) for master in self.masters()}.pop()

    def pipeline(self, *, transaction: bool = False) -> _Pipeline:
        """As redis-py's, for commands whose second word is a key, or whose fourth, of scripts; without transactions."""
        return _Pipeline(self)

    def execute_command(self, *words: Any) -> Any:
        """As redis-py's, for commands with a key."""
        return _checked(self.execute([words])[0])

    def execute(self, commands: Iterable[Words]) -> list[Any]:
        """The answers of commands, errors among them."""
        calls = [_Call(words, slot_of(words[3 if words[0] in _SCRIPTS else 1])) for words in commands]
        self._run(calls)
        return [call.answer for call in calls]

    def _run(self, calls: Sequence[_Call]) -> None:
        """Answers calls; what could not be done in time is a ConnectionError."""
        until_s = time.monotonic() + self._timeout_s
        pending, times = calls, 0
        while pending:
            self._send(pending)
            again = [call for call in pending if is_elsewhere(call.answer) or _is_to_repeat(call)]
            for call in again:
                call.importing = _told(call.answer) if is_moving(call.answer) else None
            if time.monotonic() > until_s:
                for call in again:
                    call.answer = RedisConnectionError(f"Redis Cluster at {self._address}: {call.answer}")
                return
            # Where to is known at once, unless two nodes send it to each other.
            if times or not all(_told(call.answer) for call in again):
                time.sleep(AGAIN_S)
            pending, times = again, times + 1

    def _send(self, calls: Sequence[_Call]) -> None:
        """Sends each call once, in one round trip to every node."""
        try:
            slots = self._slots()
        except _LOST as error:
            for call in calls:
                call.answer = error
            return
        by_node: dict[Node, list[_Call]] = {}
        for call in calls:
            node = call.importing or slots[call.slot]
            if node is None:
                call.answer = not_covered(call.slot)
            else:
                by_node.setdefault(node, []).append(call)
        sent = [(node, own, connection) for node, own in by_node.items() if (connection := self._sent(node, own))]
        for node, own, connection in sent:
            self._receive(node, own, connection)
        if any(is_elsewhere(call.answer) for call in calls):
            self._owners = None

    def _sent(self, node: Node, calls: Sequence[_Call]) -> Any:
        """The connection over which calls were sent; None if they could not be, which is then their answer."""
        pool = self._server(node).connection_pool
        connection: Any = None
        try:
            connection = pool.get_connection()
            words = [each for call in calls for each in ([("ASKING",)] if call.importing else []) + [call.words]]
            connection.send_packed_command(connection.pack_commands(words), check_health=False)
        except _LOST as error:
            self._lost(node, calls, error)
            if connection is not None:
                connection.disconnect()
                pool.release(connection)
            return None
        return connection

    def _receive(self, node: Node, calls: Sequence[_Call], connection: Any) -> None:
        unanswered = list(calls)
        try:
            while unanswered:
                call = unanswered[0]
                if call.importing:
                    _answer(connection)
                call.answer = _answer(connection)
                if isinstance(call.answer, AskError):  # or MovedError
                    call.answer.host = call.answer.host or node[0]
                if isinstance(call.answer, MovedError):
                    self._first((call.answer.host, call.answer.port))
                unanswered.pop(0)
        except _LOST as error:
            self._lost(node, unanswered, error)
        finally:
            if unanswered:
                connection.disconnect()
            self._server(node).connection_pool.release(connection)

    def _lost(self, node: Node, calls: Sequence[_Call], error: Exception) -> None:
        for call in calls:
            call.answer = error
        # Others are asked before it where its slots are.
        self._known = [each for each in self._known if each != node] + [node]

    def _first(self, node: Node) -> None:
        self._known = [node] + [each for each in self._known if each != node]

    def _server(self, node: Node) -> redis.Redis:
        if node not in self._servers:
            timeouts: dict[str, Any] = {"socket_timeout": self._timeout_s, "socket_connect_timeout": self._timeout_s}
            self._servers[node] = redis.Redis.from_url(
                self._address.url_of(node), retry=Retry(NoBackoff(), 0), **timeouts
            )
        return self._servers[node]

    def _slots(self) -> list[Node | None]:
        """The master of each slot, asked of the first node that answers."""
        slots = self._owners
        if slots is None:
            owners = self._asked_for_owners()
            slots = self._owners = by_slot(owners)
            self._known = list(dict.fromkeys([*self._known, *(node for _, _, node in owners), *self._address.seeds]))
        return slots

    def _asked_for_owners(self) -> Any:
        errors = []
        for node in list(self._known):
            try:
                server: Any = self._server(node)
                return owners_of(server.execute_command("CLUSTER", "SLOTS"), node)
            except ResponseError as error:
                if "cluster support disabled" not in str(error):
                    raise
                msg = f"{node[0]}:{node[1]} is no node of a Redis Cluster: write redis:// in place of redis+cluster://"
                raise ResponseError(msg) from error
            except _LOST as error:
                errors.append(str(error))
        msg = f"no node of the Redis Cluster at {self._address} answers: {'; '.join(errors)}"
        raise RedisConnectionError(msg)


class _Pipeline:
    def __init__(self, client: ClusterClient) -> None:
        self._client = client
        self._commands: list[Words] = []

    def execute_command(self, *words: Any) -> None:
        """Adds a command."""
        self._commands.append(words)

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Runs all, in one round trip to every node."""
        answers = self._client.execute(self._commands)
        return [_checked(answer) for answer in answers] if raise_on_error else answers


def _is_to_repeat(call: _Call) -> bool:
    """Whether a call for a moving slot can be done by being sent again."""
    return is_moving(call.answer) and not (call.words[0] == "MGET" and len(call.words) > 2)


def _told(answer: Any) -> Node | None:
    """The node that an answer points to."""
    return (answer.host, answer.port) if isinstance(answer, AskError) else None


def _answer(connection: Any) -> Any:
    """The next answer, also if it is an error."""
    try:
        return connection.read_response()
    except ResponseError as error:
        return error


def _checked(answer: Any) -> Any:
    if isinstance(answer, RedisError | OSError):
        raise answer
    return answer
