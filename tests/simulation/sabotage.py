"""Breaks of the real code, one line each: what the simulation must notice."""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

from store import commit
from streams import decode, kafka, lane


@dataclass(frozen=True)
class Break:
    """One line of a function, or of the Lua script, and what stands there instead."""

    what: str
    where: Callable[..., Any] | str
    line: str
    instead: str

    @contextmanager
    def made(self) -> Iterator[None]:
        """While the code is broken."""
        if isinstance(self.where, str):
            home, name = self.where.rsplit(".", 1)
            with mock.patch(self.where, self._replaced(getattr(sys.modules[home], name))):
                yield
            return
        module = sys.modules[self.where.__module__]
        source = textwrap.dedent(inspect.getsource(self.where))
        found: dict[str, Any] = {}
        code = compile("from __future__ import annotations\n" + self._replaced(source), f"<{self.what}>", "exec")
        exec(code, vars(module), found)  # noqa: S102  # it is our own source, but for a line
        owner: Any = module
        *path, name = self.where.__qualname__.split(".")
        for each in path:
            owner = getattr(owner, each)
        with mock.patch.object(owner, name, found[name]):
            yield

    def _replaced(self, source: str) -> str:
        lines = source.split("\n")
        places = [at for at, each in enumerate(lines) if each.strip() == self.line]
        assert len(places) == 1, (
            f"{self.what}: the line is {len(places)} times in the code, and must be once: {self.line}"
        )
        before = lines[places[0]]
        lines[places[0]] = before[: len(before) - len(before.lstrip())] + self.instead
        return "\n".join(lines)


BREAKS: Final = (
    Break(
        "the script does not compare the record",
        "store.commit._COMMIT_LUA",
        "if redis.call('GET', KEYS[1]) ~= ARGV[1] then",
        "if false then",
    ),
    Break(
        "the script compares the writer alone",
        "store.commit._COMMIT_LUA",
        "if redis.call('GET', KEYS[1]) ~= ARGV[1] then",
        "if string.match(redis.call('GET', KEYS[1]) or '', 'writer.*') ~= string.match(ARGV[1], 'writer.*') then",
    ),
    Break(
        "a refused commit is taken for done",
        commit.Writer._send,
        "elif answer != 1 and self._redis.get(commit.record_key) != commit.new.encode():",
        "elif False:",
    ),
    Break(
        "rows and record are not written as one",
        commit.Writer._send,
        'pipeline.execute_command("EVALSHA", self._sha, 1 + len(keys), *arguments)',
        (
            'pipeline.execute_command("EVALSHA", self._sha, 1, commit.record_key, *records); '
            "rows = self._redis.pipeline(transaction=False); "
            '[rows.execute_command("SET", each[0], each[1], "PXAT", each[2]) for each in commit.rows]; rows.execute()'
        ),
    ),
    Break(
        "a row is read without its record",
        lane.Lane._read,
        "if stored not in (shard.record.encode(), shard.before.encode()):",
        "if False:",
    ),
    Break(
        "rows on their way are read again",
        lane.Lane._do,
        "self._cache.keep(keys, rows)",
        "pass",
    ),
    Break(
        "committed offsets are not skipped",
        lane.Lane._new,
        "claimed[number] = position.next if position else 0",
        "claimed[number] = 0",
    ),
    Break(
        "received offsets are not skipped",
        lane.Lane._new,
        "return [each.take(each.offsets >= np.maximum(claimed[each.shards], at)) for each in happened]",
        "return [each.take(each.offsets >= claimed[each.shards]) for each in happened]",
    ),
    Break(
        "a gap is passed over",
        lane.Lane._receive,
        "if part.start > at:",
        "if False:",
    ),
    Break(
        "a shard that has read nothing takes whatever comes first",
        lane.Lane._receive,
        "first = part.start if part.low is None else part.low",
        "first = part.start",
    ),
    Break(
        "offsets go back",
        lane._advanced,
        "if known and known.next > position.next:",
        "if False:",
    ),
    Break(
        "a part claims a range that is there only to tell duplicates apart",
        decode.Decoder._parts,
        "start = max(chunk.start, chunk.fresh)",
        "start = chunk.start",
    ),
    Break(
        "the stream starts at the highest offset",
        kafka.start_of,
        "behind = min((position.next for position in known), default=low)",
        "behind = max((position.next for position in known), default=low)",
    ),
    Break(
        "the start forgets shards that have read nothing",
        kafka.start_of,
        "fresh = low if len(known) < len(positions) else max(behind, low)",
        "fresh = max(behind, low)",
    ),
    Break(
        "the start does not rewind to the horizon",
        kafka.start_of,
        "return Start(min(max(horizon, low), fresh), fresh, (behind, low) if behind < low else None)",
        "return Start(fresh, fresh, (behind, low) if behind < low else None)",
    ),
    Break(
        "an event that is forgotten counts if it meets a later one",
        lane.Lane.start,
        "late = (each.take(each.times_ms > forgotten_ms) for each in read)",
        "late = iter(read)",
    ),
    Break(
        "what happened before somebody was forgotten counts",
        lane.Lane.start,
        "counted = (each.take(self._forgotten.counts(bundle.entity, each.ids, each.times_ms)) for each in late)",
        "counted = late",
    ),
    Break(
        "who is forgotten is not known after a start",
        lane.Lane.__init__,
        "shard.forgotten = decode_forgotten(data)",
        "pass",
    ),
    Break(
        "duplicates count",
        decode.Decoder._checked,
        "repeated[own] = dedupe.duplicates(offsets[own], hashes[within], record_ms[own])",
        "repeated[own] = dedupe.duplicates(offsets[own], hashes[within], record_ms[own]) & False",
    ),
)
