"""Which node of a Redis Cluster has which slot, and what a node's refusal means: for both of our clients.

Everything that Headrace sends may be sent twice: reads, commits (which compare), records that are made where there are
none. So a client sends again whatever was refused or lost, until the time of the call is over.
"""

from __future__ import annotations

from binascii import crc_hqx
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

from redis.exceptions import (
    AskError,
    AuthenticationError,
    ClusterDownError,
    MovedError,
    ReadOnlyError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from config.address import Node

SLOTS: Final = 16_384
AGAIN_S: Final = 0.05
"""After so long a call is sent again that could not be done."""
Owners = tuple[tuple[int, int, Node], ...]
"""First and last slot, and the master that has them; sorted."""


def slot_of(key: bytes) -> int:
    """The slot of a key: that of what stands in its first pair of braces, if anything does."""
    begin = key.find(b"{")
    end = key.find(b"}", begin + 1) if begin >= 0 else -1
    return _slot_of_tag(key[begin + 1 : end] if end > begin + 1 else key)


@lru_cache(maxsize=65_536)
def _slot_of_tag(tag: bytes) -> int:
    return crc_hqx(tag, 0) % SLOTS


def places_by_slot(keys: Sequence[bytes]) -> dict[int, list[int]]:
    """Which of the keys are in each slot."""
    found: dict[int, list[int]] = {}
    for place, key in enumerate(keys):
        found.setdefault(slot_of(key), []).append(place)
    return found


def owners_of(reply: Sequence[Any], asked: Node) -> Owners:
    """The answer of CLUSTER SLOTS; a node that does not know its own address is where it was asked."""

    def node(told: Sequence[Any]) -> Node:
        return (told[0] or b"").decode() or asked[0], int(told[1])

    return tuple(sorted((int(first), int(last), node(master)) for first, last, master, *_ in reply))


def by_slot(owners: Owners) -> list[Node | None]:
    """The master of each slot; None for a slot that nobody has."""
    found: list[Node | None] = [None] * SLOTS
    for first, last, node in owners:
        found[first : last + 1] = [node] * (last + 1 - first)
    return found


def is_moving(error: object) -> bool:
    """Whether a slot is on its way to another node, so that its keys are partly here and partly there."""
    return isinstance(error, AskError | TryAgainError) and not isinstance(error, MovedError)


def is_elsewhere(error: object) -> bool:
    """Whether it says that a node is gone, or is not, or not yet, the master of a slot."""
    gone = (RedisConnectionError, RedisTimeoutError, MovedError, ClusterDownError, ReadOnlyError)
    return isinstance(error, gone) and not isinstance(error, AuthenticationError)


def not_covered(slot: int) -> ClusterDownError:
    """What is wrong when no node has a slot."""
    return ClusterDownError(f"no node of the Redis Cluster has slot {slot}")
