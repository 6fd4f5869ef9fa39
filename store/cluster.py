"""Reads from all masters of a Redis Cluster, for all tasks of an event loop: a `Connection` to each.

What several slots need is one write and one round trip to each node: an MGET a slot, sent together.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from redis.exceptions import AskError, MovedError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from config.address import Address, Node
from store.connection import GRACE_S, TRACK_NEXT, Argument, Connection, OnInvalidated
from store.resp import command
from store.slots import (
    AGAIN_S,
    Owners,
    by_slot,
    is_elsewhere,
    is_moving,
    not_covered,
    owners_of,
    places_by_slot,
)

LOOK_S: Final = 1.0
"""So often every node is asked whose the slots are, while keys are tracked."""
_VIEW: Final = command(b"CLUSTER", [b"SLOTS"]) + command(b"CLUSTER", [b"NODES"])
_VIEWS_S: Final = 0.1
"""Once one node has said whose the slots are, so long is waited for the others."""
_ASKING: Final = command(b"ASKING", [])


@dataclass(eq=False)
class _Part:
    """Keys of one slot, and where their values go; to be read from the slot's master or from one that imports it."""

    slot: int
    keys: list[bytes]
    places: list[int]
    tracked: bool
    importing: Node | None = None
    is_again: bool = False
    answer: Any = None

    @property
    def request(self) -> bytes:
        """What to send."""
        before = _ASKING if self.importing else TRACK_NEXT if self.tracked else b""
        return before + command(b"MGET", self.keys)

    @property
    def n_replies(self) -> int:
        """How many answers that has; the last one counts."""
        return 2 if self.importing or self.tracked else 1

    def again(self) -> list[_Part]:
        """What to ask in place of a part that was refused."""
        if is_moving(self.answer) and len(self.keys) > 1:
            # Of a slot that moves, a node has some keys and not others; it answers for one at a time.
            every = zip(self.keys, self.places, strict=True)
            return [_Part(self.slot, [key], [place], self.tracked) for key, place in every]
        importing = (self.answer.host, self.answer.port) if type(self.answer) is AskError else None
        return [_Part(self.slot, self.keys, self.places, self.tracked, importing, True, self.answer)]


@dataclass(frozen=True)
class _View:
    """What a node knows: since which epoch, whose the slots are, and which of its own it gives away."""

    epoch: int
    owners: Owners
    leaving: frozenset[bytes]


class Cluster:
    """Reads from a Redis Cluster as `Connection` does from one node.

    What a node refuses or does not answer is asked again of the node that is the master by then, within `timeout_s` of
    the call.

    **Tracking** is that of each node's connection. Besides, anything may have changed (`on_invalidated(None)`) when a
    slot has another master, or begins or ends to move. That is known when a node refuses a read, and otherwise within
    `LOOK_S` + `timeout_s`, as every node is asked: one may have been demoted, with its connections open. Values read
    from a node that only imports their slot are not to be kept, and so are invalidated before they are returned.
    """

    def __init__(self, url: str, timeout_s: float, *, on_invalidated: OnInvalidated | None = None) -> None:
        self._address = Address.parse(url)
        self._timeout_s = timeout_s
        self._on_invalidated = on_invalidated
        self._nodes: dict[Node, Connection] = {}
        self._view: _View | None = None
        self._slots: list[Node | None] = []
        self._leaving: dict[Node, frozenset[bytes]] = {}
        self._is_outdated = True
        self._first: list[Node] = []
        self._looking: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<Cluster {self._address} {self._nodes}>"

    async def everywhere(self, *words: Argument) -> list[Any]:
        """Runs a command on every master; see `Connection.execute`."""
        await self._look_if_outdated()
        return await asyncio.gather(*(self._node(node).execute(*words) for node in self._masters()))

    async def mget(self, keys: Sequence[bytes], *, tracked: Sequence[bytes] = ()) -> list[bytes | None]:
        """Reads keys in one round trip to each node that has some; see `Connection.mget`."""
        found: list[bytes | None] = [None] * (len(keys) + len(tracked))
        parts = [*_parts(keys, 0, tracked=False), *_parts(tracked, len(keys), tracked=True)]
        try:
            async with asyncio.timeout(self._timeout_s + GRACE_S):
                while parts:
                    parts = await self._read(parts, found)
        except TimeoutError as error:
            answers = {str(part.answer) for part in parts if part.answer is not None} or {"no answer"}
            msg = f"the Redis Cluster at {self._address}, for {self._timeout_s:g} s: {'; '.join(sorted(answers))}"
            raise RedisTimeoutError(msg) from error
        return found

    async def aclose(self) -> None:
        """Closes all connections for good."""
        self._closed = True
        tasks = [task for task in (self._watching, self._looking) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await asyncio.gather(*(node.aclose() for node in self._nodes.values()))

    async def _read(self, parts: Sequence[_Part], found: list[bytes | None]) -> list[_Part]:
        """Reads parts once; returns those that must be read again."""
        try:
            await self._look_if_outdated()
        except RedisConnectionError as error:
            for part in parts:
                part.answer = error
            await asyncio.sleep(AGAIN_S)
            return list(parts)
        by_node: dict[Node, list[_Part]] = {}
        for part in parts:
            node = part.importing or self._slots[part.slot]
            if node is None:
                part.answer = not_covered(part.slot)
            else:
                by_node.setdefault(node, []).append(part)
        await asyncio.gather(*(self._read_from(node, own) for node, own in by_node.items()))
        again: list[_Part] = []
        is_told = True
        for part in parts:
            answer = part.answer
            if not isinstance(answer, RedisError):
                for place, value in zip(part.places, answer, strict=True):
                    found[place] = value
                continue
            if not is_elsewhere(answer) and not is_moving(answer):
                raise answer
            is_told &= isinstance(answer, AskError) and not part.is_again
            again += part.again()
        if again and not is_told:
            await asyncio.sleep(AGAIN_S)
        return again

    async def _read_from(self, node: Node, parts: Sequence[_Part]) -> None:
        request, n_replies = b"".join([part.request for part in parts]), sum(part.n_replies for part in parts)
        try:
            replies = await self._node(node).ask(request, n_replies)
        except RedisError as error:
            replies = [error] * n_replies
        at = 0
        for part in parts:
            at += part.n_replies
            part.answer = replies[at - 1]
            if isinstance(part.answer, AskError):
                part.answer.host = part.answer.host or node[0]
            if isinstance(part.answer, MovedError):
                self._first.insert(0, (part.answer.host, part.answer.port))
            if part.importing and part.tracked and self._on_invalidated is not None:
                self._on_invalidated(part.keys)
        if any(is_elsewhere(part.answer) for part in parts):
            # What has moved is not where its changes were tracked.
            self._is_outdated = True
            self._invalidated()

    async def _look_if_outdated(self) -> None:
        if self._closed:
            msg = f"the connections to the Redis Cluster at {self._address} were closed; make a new one"
            raise RedisConnectionError(msg)
        if self._is_outdated:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.get_running_loop().create_task(self._look())
                self._looking.add_done_callback(lambda task: task.cancelled() or task.exception())
            # Shared: one who gives up leaves it to the others.
            await asyncio.shield(self._looking)
        if self._watching is None and self._on_invalidated is not None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """Looks now and then."""
        while True:
            await asyncio.sleep(LOOK_S)
            with suppress(RedisError):
                await self._look()

    async def _look(self) -> None:
        """Asks all masters whose the slots are, and takes the word of the one that knows the latest epoch."""
        views = await self._views([*self._first, *self._masters()]) or await self._views(self._address.seeds)
        self._first = []
        latest = max(views.values(), key=lambda view: view.epoch)
        leaving = {node: view.leaving for node, view in views.items() if view.leaving}
        before = self._view or latest
        if latest.epoch >= before.epoch:
            self._view, self._slots = latest, by_slot(latest.owners)
            if before.owners != latest.owners or leaving != self._leaving:
                self._invalidated()
        self._leaving = leaving
        self._is_outdated = False
        for node in self._nodes.keys() - set(self._masters()):
            await self._nodes.pop(node).aclose()

    async def _views(self, nodes: Sequence[Node]) -> dict[Node, _View]:
        """What nodes know; if none answers, an error when these are the seeds, which are asked last."""
        tasks = {asyncio.create_task(self._seen_by(node)): node for node in dict.fromkeys(nodes)}
        pending = set(tasks)
        views: dict[Node, _View] = {}
        errors: list[str] = []
        while pending:
            done, pending = await asyncio.wait(
                pending, timeout=_VIEWS_S if views else None, return_when=asyncio.FIRST_COMPLETED
            )
            for task in done:
                if error := task.exception():
                    errors.append(str(error))
                else:
                    views[tasks[task]] = task.result()
            if not done:
                break
        for task in pending:
            task.cancel()
        if not views and nodes is self._address.seeds:
            msg = f"no node of the Redis Cluster at {self._address} answers: {'; '.join(errors)}"
            raise RedisConnectionError(msg)
        return views

    async def _seen_by(self, node: Node) -> _View:
        slots, nodes = await self._node(node).ask(_VIEW, 2)
        if isinstance(slots, RedisError):
            if "cluster support disabled" in str(slots):
                msg = f"{node[0]}:{node[1]} is no node of a Redis Cluster: write redis:// in place of redis+cluster://"
                raise RedisConnectionError(msg)
            raise slots
        lines = [line.split() for line in nodes.splitlines()]
        own = next(line for line in lines if b"myself" in line[2])
        leaving = frozenset(re.findall(rb"\[\d+-[<>]-\w+\]", b" ".join(own)))
        return _View(max(int(line[6]) for line in lines), owners_of(slots, node), leaving)

    def _masters(self) -> list[Node]:
        return list(dict.fromkeys(node for _, _, node in self._view.owners)) if self._view else []

    def _node(self, node: Node) -> Connection:
        if node not in self._nodes:
            url = self._address.url_of(node)
            self._nodes[node] = Connection(url, self._timeout_s, on_invalidated=self._on_invalidated)
        return self._nodes[node]

    def _invalidated(self) -> None:
        if self._on_invalidated is not None:
            self._on_invalidated(None)


def _parts(keys: Sequence[bytes], first: int, *, tracked: bool) -> list[_Part]:
    return [
        _Part(slot, [keys[place] for place in places], [first + place for place in places], tracked)
        for slot, places in places_by_slot(keys).items()
    ]
