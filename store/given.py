"""Rows of given features in Redis: who writes them is no stream of ours, and a rebuild leaves them alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from itertools import islice, product
from typing import Any, Final, TypeVar

import pyarrow as pa
import redis
from redis.exceptions import NoScriptError

from features.given import Fields, GivenRows
from store.connect import servers
from store.keys import given_fields_key, given_key, given_keys, given_pattern
from store.read import given_rows
from store.slots import slot_of

_WRITE_LUA: Final = files("store").joinpath("given.lua").read_text()
_TOGETHER: Final = 1_000
T = TypeVar("T")


class GivenStore:
    """The rows of given features of one project."""

    def __init__(self, client: redis.Redis, project: str) -> None:
        self._redis: Any = client
        self._project = project
        self._known: dict[bytes, Fields] = {}
        self._sha = ""

    def declare(self, given: Fields) -> None:
        """Makes fields known to readers, before rows that have them are written."""
        if given.tag not in self._known:
            self._redis.execute_command("HSET", given_fields_key(self._project), given.tag, given.encode())
            self._known[given.tag] = given

    def find(self, tag: bytes) -> Fields | None:
        """The fields that a tag names."""
        if tag not in self._known:
            data = self._redis.execute_command("HGET", given_fields_key(self._project), tag)
            if data is None:
                return None
            self._known[tag] = Fields.decode(data)
        return self._known[tag]

    def write(self, view: str, rows: Iterable[tuple[bytes, bytes, int]]) -> Iterator[tuple[int, int]]:
        """Writes rows, each unless there is a newer one; of the same time the later written stays.

        Args:
            view: the view's name.
            rows: of each the entity's id, the row itself (see `features.given.Fields.pack`), and when it expires, ms
                since the epoch, or 0.

        Yields:
            how many rows were dealt with, and how many of them were written.
        """
        for some in _batches(rows):
            of_slots: dict[int, list[tuple[bytes, bytes, int]]] = {}
            for entity_id, row, expire_ms in some:
                key = given_key(self._project, view, entity_id)
                of_slots.setdefault(slot_of(key), []).append((key, row, expire_ms))
            yield len(some), self._send(list(of_slots.values()))

    def _send(self, groups: list[list[tuple[bytes, bytes, int]]]) -> int:
        self._sha = self._sha or self._redis.script_load(_WRITE_LUA)
        pipeline = self._redis.pipeline(transaction=False)
        for group in groups:
            keys = [key for key, _, _ in group]
            pipeline.execute_command(
                "EVALSHA", self._sha, len(keys), *keys, *(each for _, *pair in group for each in pair)
            )
        answers = pipeline.execute(raise_on_error=False)
        again = [group for group, answer in zip(groups, answers, strict=True) if isinstance(answer, NoScriptError)]
        written = 0
        for answer in answers:
            if isinstance(answer, int):
                written += answer
            elif not isinstance(answer, NoScriptError):
                raise answer
        if again:  # Redis has restarted.
            self._sha = ""
            written += self._send(again)
        return written

    def read(self, view: str, given: Fields, ids: Sequence[bytes]) -> GivenRows:
        """The rows of some entities.

        Raises:
            ForeignValueError: if a key holds what is no row; it names the key.
        """
        keys = given_keys(self._project, view, pa.array(ids, pa.binary()))
        return given_rows(given, self._redis.mget(list(keys)) if keys else [], keys.__getitem__, self.find)

    def forget(self, views: Iterable[str], ids: Iterable[bytes]) -> None:
        """Deletes what views have of some entities, until it is written again."""
        keys = [given_key(self._project, view, each) for view, each in product(views, ids)]
        for some in _batches(keys):
            self._unlink(self._redis, some)

    def delete(self, view: str) -> int:
        """Deletes all rows of a view; returns how many there were."""
        deleted = 0
        for server in servers(self._redis):
            for keys in _batches(server.scan_iter(match=given_pattern(self._project, view), count=_TOGETHER)):
                deleted += self._unlink(server, keys)
        return deleted

    @staticmethod
    def _unlink(client: Any, keys: Iterable[bytes]) -> int:
        commands = client.pipeline(transaction=False)
        for key in keys:
            commands.execute_command("UNLINK", key)
        return sum(commands.execute())


def _batches(things: Iterable[T]) -> Iterator[list[T]]:
    every = iter(things)
    while some := list(islice(every, _TOGETHER)):
        yield some
