"""The commit: a shard's changed rows and the Kafka offsets they include, written as one.

A shard's commit record holds the writer's random token and, for every topic partition, the next offset and the offset
at which the dedupe horizon begins. A writer may commit only while the stored record equals, byte for byte, the one
that it last read or wrote; so two writers can't both go on, and one that Redis fell behind (a lost second, a promoted
replica) notices before it writes. See docs/decisions/0003-compared-record.md.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from itertools import chain
from typing import Any, Final, NamedTuple

import msgspec
import redis
import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from features.evolve import taken_up_ms
from features.plan import Plan
from store.filling import KEPT_MS, encode_seam
from store.keys import Keyspace

VERSION: Final = 3
"""Of the commit record's layout."""

_COMMIT_LUA: Final = files("store").joinpath("commit.lua").read_text()
_UNAVAILABLE: Final = (RedisConnectionError, RedisTimeoutError, ConnectionError, TimeoutError)
_PATIENCE_S: Final = 30.0
"""How long a commit of unknown outcome is looked into before the writer gives up and is restarted."""

log = structlog.get_logger()


class FencedError(RuntimeError):
    """This writer has been superseded, or Redis holds other data than it last saw: it must stop.

    `superseded` says that another writer has the shard, so that starting again would take it back from that one.
    """

    def __init__(self, message: str, *, superseded: bool) -> None:
        super().__init__(message)
        self.superseded = superseded


class NotAppliedError(RuntimeError):
    """Redis has no commit record where there should be one."""


class RecordError(RuntimeError):
    """A commit record is of another version, or none at all: this worker must not touch its shard."""

    def __init__(self, key: bytes, stored: bytes) -> None:
        super().__init__(
            f"Redis key {key.decode()} holds no commit record of version {VERSION}, but {stored[:200]!r}: run the "
            "version of Headrace that wrote it, or a newer one; if none did, find out what else writes to this database"
        )


class Position(msgspec.Struct, frozen=True, array_like=True):
    """What of a topic partition a shard's rows include: all before `next`; duplicates are told from `horizon` on."""

    next: int
    horizon: int


class CommitRecord(msgspec.Struct, frozen=True, dict=True):
    """A shard's commit record.

    Attributes:
        writer: the token of who may write to the shard.
        positions: by `topic/partition`.
        topics: the ids of those whose broker gives any.
        plan: the number of the plan that `writer` runs.
        taken: numbers of plans, each with when a writer of it took the shard from one of another, ms since the epoch;
            of those plans that `writer`'s needs to know of.
        filled: if the plan is filled with history, how many batches of it the rows have: see `store.filling`.
        orders: how many orders to forget were carried out: see `store.forgotten`.
    """

    writer: str
    positions: dict[str, Position] = {}
    topics: dict[str, str] = {}
    plan: int = 0
    taken: tuple[tuple[int, int], ...] = ()
    version: int = VERSION
    filled: int | msgspec.UnsetType = msgspec.UNSET
    orders: int | msgspec.UnsetType = msgspec.UNSET

    def encode(self) -> bytes:
        """Canonical JSON: equal records are equal bytes."""
        return self._encoded

    @cached_property
    def _encoded(self) -> bytes:
        return msgspec.json.encode(self, order="sorted")

    def position(self, topic: str, partition: int) -> Position | None:
        """The position in a partition; None where the shard has not read any of it."""
        return self.positions.get(f"{topic}/{partition}")

    def advanced(
        self, writer: str, positions: dict[str, Position], topics: dict[str, str] | None = None
    ) -> CommitRecord:
        """The record under a writer's token, with some positions, and the ids of their topics, replaced."""
        topics = self.topics | (topics or {})
        return msgspec.structs.replace(self, writer=writer, positions=self.positions | positions, topics=topics)

    def claimed(self, writer: str, plan: int, needs: Collection[int], now_ms: int, *, fills: bool) -> CommitRecord:
        """The record in the hands of a writer of a plan, which needs to know when some plans were taken up."""
        taken, filled = dict(self.taken), self.filled
        if self.plan != plan:
            taken[plan] = now_ms
            filled = 0 if fills else msgspec.UNSET
        wanted = {*needs, *(number for number in taken if number >= plan)}
        found = tuple(sorted(_taken(taken, wanted).items()))
        return msgspec.structs.replace(self, writer=writer, plan=plan, taken=found, filled=filled)

    def of_other_topic(self, topic: str, topic_id: str) -> str | None:
        """The id of the topic that its positions are of, if it is another one than `topic_id`."""
        known = self.topics.get(topic, topic_id)
        return known if topic_id and known != topic_id else None

    def from_the_start_of(self, topic: str, topic_id: str) -> CommitRecord:
        """The record with nothing read of the topic, which has this id."""
        positions = {name: at for name, at in self.positions.items() if name.rpartition("/")[0] != topic}
        return msgspec.structs.replace(self, positions=positions, topics=self.topics | {topic: topic_id})


def common(records: Iterable[CommitRecord]) -> CommitRecord:
    """One record of what all of several, of the same topics, include."""
    every = list(records)
    names = set.intersection(*(set(each.positions) for each in every)) if every else set()
    positions = {
        name: Position(min(at.next for at in found), min(at.horizon for at in found))
        for name in sorted(names)
        if (found := [each.positions[name] for each in every])
    }
    return CommitRecord("", positions, {topic: topic_id for each in every for topic, topic_id in each.topics.items()})


def united(records: Iterable[CommitRecord]) -> CommitRecord:
    """One record of what several, each of topics of its own, include."""
    whole = CommitRecord("")
    for record in records:
        whole = whole.advanced("", record.positions, record.topics)
    return whole


def _taken(taken: Mapping[int, int], numbers: Iterable[int]) -> dict[int, int]:
    """When each plan was taken up, or else the first later one; nothing of those of which neither was."""
    found = {number: taken_up_ms(taken, number) for number in numbers}
    return {number: at_ms for number, at_ms in found.items() if at_ms is not None}


def taken_by_all(records: Iterable[CommitRecord | None], numbers: Collection[int]) -> dict[int, int]:
    """When the last shard's stream took up each plan, ms since the epoch; nothing of those that one has yet to."""
    every = [_taken(dict(record.taken), numbers) if record else {} for record in records]
    return {number: max(own[number] for own in every) for number in numbers if all(number in own for own in every)}


class RowWrite(NamedTuple):
    """A row's new bytes (empty to delete it) and when it expires, ms since the epoch."""

    key: bytes
    value: bytes
    expire_at_ms: int


@dataclass(frozen=True)
class ShardCommit:
    """One shard's commit: what its record must be, what it becomes, and the rows."""

    record_key: bytes
    expected: CommitRecord
    new: CommitRecord
    rows: Sequence[RowWrite] = field(default=())


class Writer:
    """Writes commits under one random token.

    Args:
        client: redis, with socket timeouts set: every call has a deadline.
        keyspace: the project's keys.
        sleep, clock: for waiting between attempts; tests pass their own.
        time_s: seconds since the epoch.
    """

    def __init__(
        self,
        client: redis.Redis,
        keyspace: Keyspace,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        time_s: Callable[[], float] = time.time,
    ) -> None:
        self._time_s = time_s
        self.token = secrets.token_hex(8)
        self._redis: Any = client
        self._keyspace = keyspace
        self._sleep = sleep
        self._clock = clock
        self._sha = ""
        self._predecessors: set[str] = set()

    def claim(
        self, entity: str, shard: int, plan: int = 0, needs: Collection[int] = (), *, fills: bool = False
    ) -> CommitRecord:
        """Takes a shard over: replaces the token in its record, and returns the record.

        Args:
            entity: of the shard.
            shard: its number.
            plan: the number of the plan that the writer runs.
            needs: of which plans it must be known when they were taken up.
            fills: whether the plan is filled with history: what comes before this claim, if it is the plan's first.

        Raises:
            NotAppliedError: if there is no record: `apply` never ran, or Redis has lost it.
        """
        key = self._keyspace.commit_record(entity, shard)

        def mine(stored: CommitRecord) -> tuple[CommitRecord, list[RowWrite]]:
            self._predecessors.add(stored.writer)
            # Later than all that the other writer has committed, or this claim would fail.
            now_ms = int(self._time_s() * 1000)
            new = stored.claimed(self.token, plan, needs, now_ms, fills=fills)
            if not fills or stored.plan == plan:
                return new, []
            # Where a writer of another plan had it in between, some rows have not what they had.
            again = plan in dict(stored.taken)
            positions = None if again else {name: position.next for name, position in stored.positions.items()}
            seam = RowWrite(self._keyspace.seam(entity, shard, plan), encode_seam(positions), now_ms + KEPT_MS)
            return new, [seam]

        return self._replace(key, mine)

    def accept_topic(self, entity: str, shard: int, topic: str, topic_id: str) -> bool:
        """Has a shard read a topic that was made anew from its beginning; returns False if it is the one it knows.

        Whoever writes to the shard finds another record than its own, and has to start again from this one.

        Raises:
            NotAppliedError: as `claim`.
        """
        changed = False

        def change(stored: CommitRecord) -> tuple[CommitRecord, list[RowWrite]]:
            nonlocal changed
            changed = stored.of_other_topic(topic, topic_id) is not None
            return stored.from_the_start_of(topic, topic_id) if changed else stored, []

        self._replace(self._keyspace.commit_record(entity, shard), change)
        return changed

    def _replace(
        self, key: bytes, change: Callable[[CommitRecord], tuple[CommitRecord, list[RowWrite]]]
    ) -> CommitRecord:
        while True:
            stored = read_record(self._redis, key)
            new, rows = change(stored)
            try:
                self.commit([ShardCommit(key, stored, new, rows)])
            except FencedError:
                continue  # Another writer committed or claimed in between: read again.
            return new

    def commit(self, commits: Sequence[ShardCommit]) -> None:
        """Commits several shards, each for itself, in one round trip.

        A lost answer is looked into: the record is read again; if it is the new one the commit was done, if it is the
        old one it is sent again.

        Raises:
            FencedError: if a shard's record is neither: another writer has it, or Redis has other data. Other shards of
                the call may have been committed.
        """
        pending = list(commits)
        deadline = self._clock() + _PATIENCE_S
        while pending:
            try:
                pending = self._send(pending)
            except _UNAVAILABLE as error:
                pending = self._unsettled(pending, deadline, error)

    def _send(self, commits: list[ShardCommit]) -> list[ShardCommit]:
        """Sends commits and returns those that must be sent again, as Redis did not know the script."""
        self._sha = self._sha or self._redis.script_load(_COMMIT_LUA)
        pipeline = self._redis.pipeline(transaction=False)
        for commit in commits:
            keys, values, expires = zip(*commit.rows, strict=True) if commit.rows else ((), (), ())
            records = (commit.expected.encode(), commit.new.encode())
            arguments = (commit.record_key, *keys, *records, *chain.from_iterable(zip(values, expires, strict=True)))
            pipeline.execute_command("EVALSHA", self._sha, 1 + len(keys), *arguments)
        answers = pipeline.execute(raise_on_error=False)
        again = []
        for commit, answer in zip(commits, answers, strict=True):
            if isinstance(answer, NoScriptError):
                self._sha = ""
                again.append(commit)
            elif isinstance(answer, Exception):
                raise answer
            elif answer != 1 and self._redis.get(commit.record_key) != commit.new.encode():
                # Had it been the new one, a first sending of this commit would only have arrived late.
                raise self.fenced(commit.record_key, commit.expected)
        return again

    def _unsettled(self, commits: list[ShardCommit], deadline: float, cause: Exception) -> list[ShardCommit]:
        """Of commits without an answer, those that did not happen."""
        while True:
            if self._clock() >= deadline:
                raise cause
            self._sleep(0.1)
            try:
                stored = self._redis.mget([commit.record_key for commit in commits]) if len(commits) else []
                break
            except (*_UNAVAILABLE, ResponseError) as error:
                log.warning("redis_unavailable", error=str(error))
        self._sha = ""
        again = []
        for commit, record in zip(commits, stored, strict=True):
            if record == commit.expected.encode():
                again.append(commit)
            elif record != commit.new.encode():
                raise self.fenced(commit.record_key, commit.expected)
        return again

    def fenced(self, record_key: bytes, expected: CommitRecord) -> FencedError:
        """The error that says why a shard's record is not the one that this writer last read or wrote."""
        stored = self._redis.get(record_key)
        name = record_key.decode()
        if stored is None:
            return FencedError(
                f"{name} is gone: Redis lost its data since writer {self.token} last wrote", superseded=False
            )
        record = _decoded(record_key, stored)
        # A successor goes on from what this writer left. What names one that this writer took over from, or includes
        # less, is older: taken for a successor's, it would stop the stream for good.
        behind = any(
            partition not in record.positions or record.positions[partition].next < known.next
            for partition, known in expected.positions.items()
        )
        if not behind and record.writer not in {self.token, *self._predecessors}:
            return FencedError(
                f"{name} was claimed by writer {record.writer}: writer {self.token} is superseded", superseded=True
            )
        return FencedError(
            f"{name} is not what writer {self.token} last wrote: Redis came back with older data", superseded=False
        )


def read_records(client: Any, keys: Sequence[bytes]) -> list[CommitRecord | None]:
    """Several shards' commit records, None where there is none.

    Raises:
        RecordError: if one is not of this version.
    """
    return decoded_records(keys, client.mget(keys) if keys else [])


def decoded_records(keys: Sequence[bytes], stored: Sequence[bytes | None]) -> list[CommitRecord | None]:
    """As `read_records`, of what Redis has."""
    return [None if each is None else _decoded(key, each) for key, each in zip(keys, stored, strict=True)]


def read_record(client: redis.Redis, key: bytes) -> CommitRecord:
    """A shard's commit record.

    Raises:
        NotAppliedError: if there is none.
        RecordError: if it is not of this version.
    """
    stored: Any = client.get(key)
    if stored is None:
        msg = (
            f"Redis has no commit record {key.decode()}: "
            "run `headrace apply` first (if it ran before, Redis has lost its data)"
        )
        raise NotAppliedError(msg)
    record = _decoded(key, stored)
    # Records are compared byte for byte: one that says more than is understood here could never be replaced.
    if record.encode() != stored:
        raise RecordError(key, stored)
    return record


def _decoded(key: bytes, stored: bytes) -> CommitRecord:
    try:
        record = msgspec.json.decode(stored, type=CommitRecord)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise RecordError(key, stored) from None
    if record.version != VERSION:
        raise RecordError(key, stored)
    return record


def initialise(client: redis.Redis, keyspace: Keyspace, entities: Iterable[str]) -> int:
    """Creates the commit records that aren't there yet; returns how many. Their shards read topics from the start."""
    return set_records(client, keyspace.commit_records(entities), CommitRecord(writer="apply"), "NX")


def join(client: redis.Redis, keyspace: Keyspace, entities: Iterable[str], plan: Plan, now_ms: int) -> int:
    """Has entities that a plan is the first to have go on from where the stream is; returns how many shards they have.

    The records that there are say where that is; to read topics from their start would keep all others waiting.

    Args:
        client: Redis.
        keyspace: the project's keys.
        entities: those that are new.
        plan: the one that comes next.
        now_ms: now: what happens from then on is known of them.
    """
    others = keyspace.commit_records(each for each in plan.stored_entities if each not in entities)
    there = read_records(client, others)
    taken = taken_by_all(there, plan.needs) | {plan.number: now_ms}
    record = CommitRecord("apply", plan=plan.number, taken=tuple(sorted(taken.items())))
    for each in filter(None, there):
        ahead = {
            name: position
            for name, position in each.positions.items()
            if name not in record.positions or position.next > record.positions[name].next
        }
        record = record.advanced(record.writer, ahead, each.topics)
    return set_records(client, keyspace.commit_records(entities), record)


def set_records(client: redis.Redis, keys: Iterable[bytes], record: CommitRecord, *how: str) -> int:
    """Gives shards that nobody writes to their record; returns how many (`how` is more of Redis's SET)."""
    pipeline: Any = client.pipeline(transaction=False)
    for key in keys:
        pipeline.execute_command("SET", key, record.encode(), *how)
    return sum(bool(done) for done in pipeline.execute())
