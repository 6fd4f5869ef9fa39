"""The commit: all or nothing, for one writer at a time, whatever happens to its answers. The same on three Redises."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import fakeredis
import msgspec
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from features import catalog
from features.aggregations import Count
from features.compile import compile_plan
from features.layout import families_of
from features.plan import Plan, ViewSpec
from headrace.embedded import EmbeddedRedis, ServerError
from store import commit as commit_module
from store.commit import (
    CommitRecord,
    FencedError,
    NotAppliedError,
    Position,
    RecordError,
    RowWrite,
    ShardCommit,
    Writer,
    initialise,
    join,
    read_record,
    taken_by_all,
)
from store.connect import connect
from store.filling import decode_seam
from store.keys import Keyspace, expire_at_ms, shard_of
from tests.properties import scenarios  # noqa: F401  # its profile prints what repeats a failure
from tests.support import aof

SPACE = Keyspace("test", 4)
PLAN = compile_plan([vars(catalog)], "test", 4)
FAMILIES = [family for view in PLAN.views for family in families_of(PLAN, view)]
FAR_MS = 4_000_000_000_000


@pytest.fixture(params=["redis 6.2", "redis 7", "fakeredis"])
def client(request: pytest.FixtureRequest) -> Iterator[Any]:
    """An empty database with the records of the users."""
    if request.param == "fakeredis":
        found: Any = fakeredis.FakeRedis()
    elif request.param == "redis 6.2":
        found = connect(request.getfixturevalue("redis_url"), 5)
    else:
        found = connect(request.getfixturevalue("redis7_server").url, 5)
        found.flushall()
    initialise(found, SPACE, ["user"])
    with found:
        yield found


def key_of(shard: int) -> bytes:
    return SPACE.commit_record("user", shard)


def row(shard: int, name: str, value: bytes = b"row", expire_at: int = FAR_MS) -> RowWrite:
    """A row beside the shard's record."""
    return RowWrite(f"{{test:user:{shard}}}:view:{name}".encode(), value, expire_at)


def next_of(record: CommitRecord, writer: Writer, offset: int) -> CommitRecord:
    return record.advanced(writer.token, {"clicks/0": Position(offset, 0)})


def everything(client: Any) -> dict[bytes, bytes]:
    """All keys and their values."""
    return {key: client.get(key) for key in client.keys("*")}


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.slept.append(duration_s)
        self.now_s += duration_s


class Faulty:
    """A client of which chosen calls go wrong.

    Args:
        client: the real one.
        faults: what happens at each call of `execute`, one after the other: `lost` (it never arrives), `unanswered`
            (it is done, but the answer is lost), `late` (it seems lost, but is done just before the next call that
            arrives), or a function to be called first. After the last, all goes well.
        reads: as much for `mget`: an exception to raise, or None.
    """

    def __init__(self, client: Any, faults: list[Any], reads: list[Exception | None] | None = None) -> None:
        self._client = client
        self.faults = faults
        self.reads = reads or []
        self.late: list[Callable[[], Any]] = []
        self.executed = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def mget(self, keys: list[bytes]) -> Any:
        if self.reads and (error := self.reads.pop(0)) is not None:
            raise error
        return self._client.mget(keys)

    def pipeline(self, **options: Any) -> Any:
        pipeline = self._client.pipeline(**options)
        real = pipeline.execute

        def execute(**how: Any) -> Any:
            fault = self.faults.pop(0) if self.faults else None
            if fault == "lost":
                message = "lost"
                raise RedisTimeoutError(message)
            if fault == "late":
                self.late.append(partial(real, **how))
                message = "late"
                raise RedisTimeoutError(message)
            for each in self.late:
                each()
            self.late = []
            if callable(fault):
                fault()
            answer = real(**how)
            self.executed += 1
            if fault == "unanswered":
                message = "unanswered"
                raise RedisConnectionError(message)
            return answer

        pipeline.execute = execute
        return pipeline


def a_writer(client: Any, clock: Clock | None = None) -> Writer:
    clock = clock or Clock()
    return Writer(client, SPACE, clock.sleep, clock)


def test_a_commit_writes_rows_with_their_expiry_and_the_record(client: Any) -> None:
    writer = a_writer(client)
    before = writer.claim("user", 1)
    new = next_of(before, writer, 7)
    rows = [row(1, "a", b"\x00\xff\r\n", FAR_MS), row(1, "b", b"x" * 100_000, FAR_MS + 1)]
    writer.commit([ShardCommit(key_of(1), before, new, rows)])
    assert read_record(client, key_of(1)) == new
    for each in rows:
        assert client.get(each.key) == each.value
        # Redis 6.2 does not tell when a key expires, only how long it still lives: between two looks at its clock.
        earlier, lives_ms, later = client.time(), client.pttl(each.key), client.time()
        earlier_ms, later_ms = (1000 * seconds + micro // 1000 for seconds, micro in (earlier, later))
        assert each.expire_at_ms - later_ms - 1 <= lives_ms <= each.expire_at_ms - earlier_ms + 1
    assert client.ttl(key_of(1)) == -1  # The record stays for ever.


def test_a_commit_cut_short_in_the_append_only_file_never_comes_back() -> None:
    """Redis loses the end of its file, within a commit, and dies once more after the next one.

    With `aof-load-truncated yes`, Redis's default, the rows of the half that is left in the file are written by the
    second start, beside the record of the next commit: they count twice what is read again.
    """
    with EmbeddedRedis(appendonly=True) as server:
        client = redis.Redis.from_url(server.url)
        initialise(client, SPACE, ["user"])
        writer = Writer(client, SPACE)
        record = writer.claim("user", 0)
        lost = next_of(record, writer, 5)
        writer.commit([ShardCommit(key_of(0), record, lost, [row(0, "u1", b"lost"), row(0, "u2", b"cut short")])])
        server.kill()
        file = aof.file(server)
        os.truncate(file, file.read_bytes().index(b"cut short") + 3)
        with pytest.raises(ServerError):
            server.start()
        aof.bring_back(server)
        claimed = Writer(client, SPACE).claim("user", 0)
        server.kill()
        server.start()
        assert read_record(client, key_of(0)) == claimed
        assert client.keys("*:view:*") == []


def test_a_commit_of_thousands_of_rows(client: Any) -> None:
    writer = a_writer(client)
    before = writer.claim("user", 0)
    rows = [row(0, str(number), b"%d" % number) for number in range(9_000)]
    writer.commit([ShardCommit(key_of(0), before, next_of(before, writer, 1), rows)])
    assert client.mget([each.key for each in rows]) == [each.value for each in rows]


def test_an_empty_value_deletes_the_row(client: Any) -> None:
    writer = a_writer(client)
    first = writer.claim("user", 0)
    second, third = next_of(first, writer, 1), next_of(first, writer, 2)
    writer.commit([ShardCommit(key_of(0), first, second, [row(0, "a"), row(0, "b")])])
    writer.commit([ShardCommit(key_of(0), second, third, [row(0, "a", b""), row(0, "never", b"")])])
    assert client.exists(row(0, "a").key, row(0, "never").key) == 0
    assert client.get(row(0, "b").key) == b"row"


@pytest.mark.parametrize("expired_ms", [1, 1_000_000_000_000])
def test_a_row_that_has_expired_already_is_gone_at_once(client: Any, expired_ms: int) -> None:
    """An event so old that no window holds it takes the row that there was along."""
    writer = a_writer(client)
    first = writer.claim("user", 0)
    second, third = next_of(first, writer, 1), next_of(first, writer, 2)
    writer.commit([ShardCommit(key_of(0), first, second, [row(0, "a"), row(0, "b")])])
    writer.commit([ShardCommit(key_of(0), second, third, [row(0, "a", b"new", expired_ms), row(0, "b", b"new")])])
    assert client.get(row(0, "a").key) is None
    assert client.get(row(0, "b").key) == b"new"
    assert read_record(client, key_of(0)) == third


def test_the_last_millisecond_of_a_row_may_be_in_the_past(client: Any) -> None:
    writer = a_writer(client)
    before = writer.claim("user", 0)
    expire_at = time.time_ns() // 1_000_000 - 1
    writer.commit([ShardCommit(key_of(0), before, next_of(before, writer, 1), [row(0, "a", b"x", expire_at)])])
    assert client.get(row(0, "a").key) is None


def test_an_idle_shard_commits_its_offsets_alone(client: Any) -> None:
    writer = a_writer(client)
    before = writer.claim("user", 2)
    writer.commit([ShardCommit(key_of(2), before, next_of(before, writer, 9))])
    assert read_record(client, key_of(2)) == next_of(before, writer, 9)
    writer.commit([])


def test_the_claim_of_a_plan_that_is_filled_says_where_its_history_ends(client: Any) -> None:
    """The first claim alone; and that it is not known, once an older plan's writer has had the shard in between.

    A seam that moved with a later claim would have events before it in the rows already: they would count twice.
    """
    key = SPACE.seam("user", 0, 1)
    writer = a_writer(client)
    record = writer.claim("user", 0, 0)
    writer.commit([ShardCommit(key_of(0), record, next_of(record, writer, 5))])
    assert client.get(key) is None
    filled = a_writer(client)
    record = filled.claim("user", 0, 1, fills=True)
    assert (decode_seam(client.get(key)), record.filled) == ({"clicks/0": 5}, 0)
    later = msgspec.structs.replace(next_of(record, filled, 9), filled=3)
    filled.commit([ShardCommit(key_of(0), record, later)])
    assert a_writer(client).claim("user", 0, 1, fills=True).filled == 3
    assert decode_seam(client.get(key)) == {"clicks/0": 5}
    assert a_writer(client).claim("user", 0, 0).filled is msgspec.UNSET
    a_writer(client).claim("user", 0, 1, fills=True)
    assert decode_seam(client.get(key)) is None


# --- who may write


def test_a_superseded_writer_changes_nothing_and_is_told_by_whom(client: Any) -> None:
    """A counter in place of the token would not tell two writers that started at the same count apart."""
    zombie, successor = a_writer(client), a_writer(client)
    old = zombie.claim("user", 0)
    successor.claim("user", 0)
    before = everything(client)
    with pytest.raises(FencedError) as caught:
        zombie.commit([ShardCommit(key_of(0), old, next_of(old, zombie, 5), [row(0, "a"), row(0, "b", b"")])])
    assert str(caught.value) == (
        f"{{test:user:0}}:commit was claimed by writer {successor.token}: writer {zombie.token} is superseded"
    )
    assert caught.value.superseded
    assert everything(client) == before


def test_redis_that_came_back_with_older_data_is_noticed(client: Any) -> None:
    """The token is still the writer's own: comparing it alone would write on over a lost second."""
    writer = a_writer(client)
    first = writer.claim("user", 0)
    second = next_of(first, writer, 5)
    writer.commit([ShardCommit(key_of(0), first, second, [row(0, "a", b"5")])])
    third = next_of(second, writer, 9)
    writer.commit([ShardCommit(key_of(0), second, third, [row(0, "a", b"9")])])
    client.set(key_of(0), second.encode())
    client.set(row(0, "a").key, b"5")
    before = everything(client)
    with pytest.raises(FencedError) as caught:
        writer.commit([ShardCommit(key_of(0), third, next_of(third, writer, 12), [row(0, "a", b"12")])])
    assert str(caught.value) == (
        f"{{test:user:0}}:commit is not what writer {writer.token} last wrote: Redis came back with older data"
    )
    assert not caught.value.superseded
    assert everything(client) == before


@pytest.mark.parametrize("since", ["events", "no events"])
@pytest.mark.parametrize("writers", [1, 2], ids=["of its predecessor", "of the one before"])
def test_redis_that_came_back_as_an_earlier_writer_left_it_has_no_other_writer(
    client: Any, since: str, writers: int
) -> None:
    """A copy from before the last restart names an earlier writer: that one is gone, so this one must start again.

    To compare tokens alone took it for a successor: the supervisor left the stream down for good.
    """
    copy = b""
    for number in range(writers):
        earlier = Writer(client, SPACE)
        record = earlier.claim("user", 0)
        earlier.commit([ShardCommit(key_of(0), record, next_of(record, earlier, 10 * number))])
        copy = copy or client.get(key_of(0))
    writer = a_writer(client)
    record = writer.claim("user", 0)
    if since == "events":
        new = next_of(record, writer, 500)
        writer.commit([ShardCommit(key_of(0), record, new)])
        record = new
    client.set(key_of(0), copy)
    with pytest.raises(FencedError) as caught:
        writer.commit([ShardCommit(key_of(0), record, next_of(record, writer, 600))])
    assert not caught.value.superseded


def test_redis_that_came_back_empty_is_noticed(client: Any) -> None:
    writer = a_writer(client)
    first = writer.claim("user", 3)
    client.flushall()
    with pytest.raises(FencedError) as caught:
        writer.commit([ShardCommit(key_of(3), first, next_of(first, writer, 5), [row(3, "a")])])
    assert str(caught.value) == (
        f"{{test:user:3}}:commit is gone: Redis lost its data since writer {writer.token} last wrote"
    )
    assert not caught.value.superseded
    assert client.dbsize() == 0


def test_a_record_that_differs_in_one_byte_fences(client: Any) -> None:
    writer = a_writer(client)
    first = writer.claim("user", 0)
    client.set(key_of(0), first.encode() + b" ")
    with pytest.raises(FencedError):
        writer.commit([ShardCommit(key_of(0), first, next_of(first, writer, 5), [row(0, "a")])])
    assert client.get(row(0, "a").key) is None


def test_a_record_of_another_type_writes_nothing(client: Any) -> None:
    writer = a_writer(client)
    first = writer.claim("user", 0)
    client.delete(key_of(0))
    client.rpush(key_of(0), "x")
    with pytest.raises(ResponseError):
        writer.commit([ShardCommit(key_of(0), first, next_of(first, writer, 5), [row(0, "a")])])
    assert client.get(row(0, "a").key) is None


def test_each_shard_is_fenced_for_itself(client: Any) -> None:
    zombie = a_writer(client)
    old = {shard: zombie.claim("user", shard) for shard in range(3)}
    a_writer(client).claim("user", 1)
    commits = [ShardCommit(key_of(s), old[s], next_of(old[s], zombie, 5), [row(s, "a")]) for s in range(3)]
    with pytest.raises(FencedError, match="user:1"):
        zombie.commit(commits)
    assert client.get(row(1, "a").key) is None
    for shard in (0, 2):
        assert client.get(row(shard, "a").key) == b"row"
        assert read_record(client, key_of(shard)) == next_of(old[shard], zombie, 5)


def test_a_claim_keeps_the_offsets_and_replaces_the_token(client: Any) -> None:
    first, second = a_writer(client), a_writer(client)
    assert first.token != second.token
    record = next_of(first.claim("user", 0), first, 42)
    first.commit([ShardCommit(key_of(0), first.claim("user", 0), record)])
    claimed = second.claim("user", 0)
    assert claimed == CommitRecord(second.token, {"clicks/0": Position(42, 0)})
    assert client.get(key_of(0)) == claimed.encode()
    assert second.claim("user", 0) == claimed  # Again: nothing changes.


def test_a_topic_is_accepted_once_and_only_if_it_is_another(client: Any) -> None:
    """What was read of it since, and of other topics, stays: forgotten again, the new topic would count twice."""
    writer = a_writer(client)
    kept = {"likes/0": Position(5, 0), "more/clicks/0": Position(1, 0)}
    read = {"clicks/0": Position(42, 7), "clicks/1": Position(9, 0), **kept}
    old = writer.claim("user", 0).advanced(writer.token, read, {"clicks": "one", "likes": "other"})
    writer.commit([ShardCommit(key_of(0), writer.claim("user", 0), old)])
    assert not a_writer(client).accept_topic("user", 0, "clicks", "one")
    assert read_record(client, key_of(0)) == old
    assert a_writer(client).accept_topic("user", 0, "clicks", "two")
    accepted = read_record(client, key_of(0))
    assert accepted.positions == kept
    assert accepted.topics == {"clicks": "two", "likes": "other"}
    with pytest.raises(FencedError) as fenced:
        writer.commit([ShardCommit(key_of(0), old, next_of(old, writer, 50))])
    assert not fenced.value.superseded  # It starts again, and goes on from there.
    successor = a_writer(client)
    further = next_of(successor.claim("user", 0), successor, 3)
    successor.commit([ShardCommit(key_of(0), successor.claim("user", 0), further)])
    assert not a_writer(client).accept_topic("user", 0, "clicks", "two")
    assert read_record(client, key_of(0)) == further


def test_a_claim_wins_over_a_commit_that_comes_between(client: Any) -> None:
    """A writer that commits between the claim's read and its write is fenced next time, and loses nothing."""
    first = a_writer(client)
    old = first.claim("user", 0)
    new = next_of(old, first, 42)

    def between() -> None:
        first.commit([ShardCommit(key_of(0), old, new, [row(0, "a")])])

    second = a_writer(Faulty(client, [between]))
    assert second.claim("user", 0).positions == new.positions
    with pytest.raises(FencedError):
        first.commit([ShardCommit(key_of(0), new, next_of(new, first, 50))])


def test_a_claim_without_a_record_says_what_to_do(client: Any) -> None:
    client.flushall()
    with pytest.raises(NotAppliedError, match=re.escape("{test:user:0}:commit: run `headrace apply` first")):
        a_writer(client).claim("user", 0)
    with pytest.raises(NotAppliedError):
        a_writer(client).claim("item", 0)


@pytest.mark.parametrize(
    "stored",
    [
        b'{"positions":{},"version":2,"writer":"w"}',
        b'{"positions":{},"version":1,"writer":"w","since":3}',
        b"not ours \xff",
    ],
)
def test_a_record_that_is_not_understood_is_left_alone_by_its_name(client: Any, stored: bytes) -> None:
    """Claiming it would take from a newer version what it knows, or try for ever to replace what it can't write."""
    client.set(key_of(0), stored)
    with pytest.raises(RecordError, match=re.escape("Redis key {test:user:0}:commit holds no commit record of ver")):
        a_writer(client).claim("user", 0)
    assert client.get(key_of(0)) == stored


def test_initialise_makes_the_records_that_are_not_there(client: Any) -> None:
    writer = a_writer(client)
    mine = writer.claim("user", 0)
    client.delete(key_of(2))
    assert initialise(client, SPACE, ["user", "item"]) == 1 + SPACE.shards
    assert read_record(client, key_of(0)) == mine
    assert read_record(client, key_of(2)) == CommitRecord("apply")
    assert initialise(client, SPACE, ["user", "item"]) == 0
    assert initialise(client, SPACE, []) == 0


def test_equal_records_are_equal_bytes() -> None:
    """Whatever the order in which partitions were first heard of."""
    names = [f"clicks/{number}" for number in range(20)]
    one = CommitRecord("w", {name: Position(1, 0) for name in names})
    other = CommitRecord("w", {name: Position(1, 0) for name in reversed(names)})
    assert one.encode() == other.encode()
    assert one.advanced("w", {"clicks/3": Position(1, 0)}).encode() == one.encode()


# --- answers that don't come


def test_a_script_that_redis_forgot_is_sent_again(client: Any) -> None:
    writer = a_writer(client)
    records = {shard: writer.claim("user", shard) for shard in range(4)}
    for offset in range(1, 4):
        client.script_flush()
        new = {shard: next_of(record, writer, offset) for shard, record in records.items()}
        writer.commit([ShardCommit(key_of(s), records[s], new[s], [row(s, "a", b"%d" % offset)]) for s in range(4)])
        records = new
        assert [client.get(row(s, "a").key) for s in range(4)] == [b"%d" % offset] * 4
        assert [read_record(client, key_of(s)) for s in range(4)] == list(new.values())


def test_a_restart_without_data_between_two_sends_is_noticed(client: Any) -> None:
    """No script and no record: not a script to load and go on."""
    writer = a_writer(client)
    first = writer.claim("user", 0)
    client.flushall()
    client.script_flush()
    with pytest.raises(FencedError, match="gone"):
        writer.commit([ShardCommit(key_of(0), first, next_of(first, writer, 5), [row(0, "a")])])


@pytest.mark.parametrize(
    ("faults", "executed"),
    [
        (["lost"], 1),
        (["unanswered"], 1),
        (["lost", "lost", "lost"], 1),
        (["lost", "unanswered"], 1),
    ],
)
def test_a_lost_answer_is_looked_into_and_nothing_is_done_twice(client: Any, faults: list[Any], executed: int) -> None:
    clock, faulty = Clock(), Faulty(client, [])
    writer = a_writer(faulty, clock)
    first = writer.claim("user", 0)
    faulty.faults, faulty.executed = list(faults), 0
    new = next_of(first, writer, 5)
    writer.commit([ShardCommit(key_of(0), first, new, [row(0, "a")])])
    assert client.get(row(0, "a").key) == b"row"
    assert read_record(client, key_of(0)) == new
    assert faulty.executed == executed
    assert clock.slept


def test_a_commit_that_arrives_after_it_was_sent_again_is_done_and_no_rollback(client: Any) -> None:
    """A stalled Redis may serve the look at the record first and the old connection's commit then.

    The one sent again finds the new record: its own. To take this for older data stops a healthy stream.
    """
    clock, faulty = Clock(), Faulty(client, [])
    writer = a_writer(faulty, clock)
    first = writer.claim("user", 0)
    faulty.faults = ["late"]
    new = next_of(first, writer, 5)
    writer.commit([ShardCommit(key_of(0), first, new, [row(0, "a")])])
    assert client.get(row(0, "a").key) == b"row"
    assert read_record(client, key_of(0)) == new


def test_of_several_shards_only_those_not_done_are_sent_again(client: Any) -> None:
    clock, faulty = Clock(), Faulty(client, [])
    writer = a_writer(faulty, clock)
    old = {shard: writer.claim("user", shard) for shard in range(4)}
    new = {shard: next_of(record, writer, 5) for shard, record in old.items()}

    def half_done() -> None:
        Writer(client, SPACE).commit([ShardCommit(key_of(s), old[s], new[s], [row(s, "a")]) for s in (0, 2)])
        message = "the connection broke"
        raise RedisConnectionError(message)

    faulty.faults = [half_done]
    writer.commit([ShardCommit(key_of(s), old[s], new[s], [row(s, "a")]) for s in range(4)])
    for shard in range(4):
        assert client.get(row(shard, "a").key) == b"row"
        assert read_record(client, key_of(shard)) == new[shard]


@pytest.mark.parametrize("fault", ["lost", "unanswered"])
def test_an_answer_lost_to_a_successor_fences(client: Any, fault: str) -> None:
    faulty = Faulty(client, [])
    zombie, successor = a_writer(faulty), a_writer(client)
    old = zombie.claim("user", 0)
    faulty.faults = [fault]
    faulty.reads = []
    real_mget = faulty.mget
    faulty.mget = lambda keys: (successor.claim("user", 0), real_mget(keys))[1]  # type: ignore[method-assign]
    with pytest.raises(FencedError) as caught:
        zombie.commit([ShardCommit(key_of(0), old, next_of(old, zombie, 5), [row(0, "a")])])
    assert caught.value.superseded
    assert read_record(client, key_of(0)).position("clicks", 0) == (Position(5, 0) if fault == "unanswered" else None)


def test_an_answer_lost_with_the_data_fences(client: Any) -> None:
    faulty = Faulty(client, [])
    writer = a_writer(faulty)
    old = writer.claim("user", 0)
    faulty.faults = ["unanswered"]
    real_mget = faulty.mget
    faulty.mget = lambda keys: (client.flushall(), real_mget(keys))[1]  # type: ignore[method-assign]
    with pytest.raises(FencedError, match="gone") as caught:
        writer.commit([ShardCommit(key_of(0), old, next_of(old, writer, 5), [row(0, "a")])])
    assert not caught.value.superseded


def test_a_look_that_fails_is_repeated(client: Any) -> None:
    clock, faulty = Clock(), Faulty(client, [])
    writer = a_writer(faulty, clock)
    old = writer.claim("user", 0)
    faulty.faults = ["unanswered"]
    faulty.reads = [
        RedisTimeoutError("no"),
        RedisConnectionError("no"),
        ResponseError("LOADING"),
        ConnectionError("no"),
        None,
    ]
    writer.commit([ShardCommit(key_of(0), old, next_of(old, writer, 5), [row(0, "a")])])
    assert client.get(row(0, "a").key) == b"row"
    assert len(clock.slept) == 5


@pytest.mark.parametrize("readable", [True, False])
def test_patience_runs_out(client: Any, readable: bool) -> None:
    """Writing fails while reading works, or nothing works: after its patience the writer gives up, and is restarted."""
    clock, faulty = Clock(), Faulty(client, [])
    writer = a_writer(faulty, clock)
    old = writer.claim("user", 0)
    faulty.faults = ["lost"] * 10_000
    faulty.reads = [] if readable else [RedisTimeoutError("no")] * 10_000
    with pytest.raises((RedisTimeoutError, RedisConnectionError)):
        writer.commit([ShardCommit(key_of(0), old, next_of(old, writer, 5), [row(0, "a")])])
    patience_s = commit_module._PATIENCE_S
    assert patience_s <= clock.now_s < patience_s + 1


def test_random_faults_and_writers_leave_what_was_acknowledged(client: Any) -> None:
    """A model of one shard: what a commit returned for is there, once, in order, whoever wrote and whatever failed.

    Each commit appends its offset to the row; a commit done twice, or from a stale read, would show.
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    faulty = Faulty(client, [])
    writers: list[tuple[Writer, CommitRecord]] = []
    done = 0
    for _ in range(150):
        if not writers or rng.random() < 0.1:
            faulty.faults = [rng.choice([None, "lost", "unanswered"])]
            writer = a_writer(faulty)
            writers.append((writer, writer.claim("user", 0)))
        at = len(writers) - 1 if rng.random() < 0.8 else rng.randrange(len(writers))
        writer, known = writers[at]
        stored = (client.get(row(0, "a").key) or b"").split()
        new = next_of(known, writer, done + 1)
        faulty.faults = [rng.choice([None, None, "lost", "unanswered"]) for _ in range(rng.randrange(4))]
        value = b" ".join([*stored, b"%d" % (done + 1)])
        try:
            writer.commit([ShardCommit(key_of(0), known, new, [row(0, "a", value)])])
        except FencedError as error:
            assert error.superseded  # noqa: PT017  # being fenced is one of the ways it may go
            assert at < len(writers) - 1
            del writers[at]
        else:
            assert at == len(writers) - 1
            done += 1
            writers[at] = (writer, new)
        assert client.get(row(0, "a").key) == (b" ".join(b"%d" % n for n in range(1, done + 1)) or None)
    assert done > 50


# --- keys

ids = st.one_of(
    st.text(alphabet="{}:\0ab1é😀 \r\n*", max_size=12),
    st.sampled_from(["commit", ":commit", "}:commit", "{test:user:0}:commit", "{", "}", "{}", "\0", "a:b"]),
    st.text(max_size=8).filter(lambda text: not re.search("[\ud800-\udfff]", text)),
)


@settings(max_examples=300)
@given(st.lists(st.tuples(st.sampled_from(FAMILIES), ids), min_size=2, max_size=6))
def test_no_id_reaches_another_key(wanted: list[tuple[Any, str]]) -> None:
    """Rows have one key each, none is a commit record, and all of a shard are on its record's node of a cluster."""
    records = {SPACE.commit_record(entity.name, shard) for entity in PLAN.entities for shard in range(SPACE.shards)}
    found: dict[bytes, tuple[str, str]] = {}
    for family, text in wanted:
        (key,) = SPACE.rows(family, [text.encode()])
        assert key not in records
        assert found.setdefault(key, (family.name, text)) == (family.name, text)
        record = SPACE.commit_record(family.entity, shard_of(text.encode(), SPACE.shards))
        assert key_slot(key) == key_slot(record)
    assert len(found) == len({(family.name, text) for family, text in wanted})


def test_any_id_is_stored_and_read_under_its_own_key(client: Any) -> None:
    """On a real server too: no byte of an id ends or changes a key."""
    family = FAMILIES[0]
    texts = ["\0", "a\0", "a", "{", "}", "{x}", "}{", "é", "e\u0301", "\r\n", " ", "😀", "*", "commit", "a:b"]
    space = Keyspace("test", 1)
    initialise(client, space, [family.entity])
    writer = Writer(client, space)
    record_key = space.commit_record(family.entity, 0)
    before = writer.claim(family.entity, 0)
    keys = space.rows(family, [text.encode() for text in texts])
    rows = [RowWrite(key, text.encode(), FAR_MS) for key, text in zip(keys, texts, strict=True)]
    writer.commit([ShardCommit(record_key, before, next_of(before, writer, 1), rows)])
    assert [value.decode() for value in client.mget(keys)] == texts


def test_shards_of_ids_never_change() -> None:
    """Stored keys depend on them."""
    assert [shard_of(text.encode(), 16) for text in ("u1", "u42", "é", "", "i7")] == [6, 14, 14, 0, 14]
    (key,) = Keyspace("headrace", 16).rows(FAMILIES[0], [b"u42"])
    assert key == f"{{headrace:{FAMILIES[0].entity}:14}}:{FAMILIES[0].name}:u42".encode()


def test_a_row_expires_once_its_last_event_has_left_every_window() -> None:
    import numpy as np

    for family in FAMILIES:
        assert expire_at_ms(family, np.array([5])).tolist() == [5 + family.retention_ms]


def test_the_client_repeats_no_call_by_itself() -> None:
    """redis-py's own retries would send a commit twice behind the writer's back, and the second would look fenced."""
    client: redis.Redis = connect("redis://127.0.0.1:1/0", 1)
    connection: Any = client.connection_pool.make_connection()
    assert connection.retry.get_retries() == 0
    assert connection.socket_timeout == 1
    assert connection.socket_connect_timeout == 1


# Plans


def test_a_record_says_when_each_plan_was_taken_up(client: Any) -> None:
    """One that no stream ran is when a later one was; one that got the shard back is when it did."""
    now_s = iter([100.0, 200.0, 300.0, 400.0])

    def claim(plan: int, *needs: int) -> dict[int, int]:
        return dict(Writer(client, SPACE, time_s=lambda: next(now_s)).claim("user", 0, plan, needs).taken)

    assert Writer(client, SPACE).claim("user", 0).taken == ()
    assert claim(1) == {1: 100_000}
    assert claim(1, 1) == {1: 100_000}
    assert claim(3, 1, 2) == {1: 100_000, 2: 300_000, 3: 300_000}
    assert claim(1) == {1: 400_000, 2: 300_000, 3: 300_000}


def test_a_plan_is_taken_up_when_the_last_shard_is() -> None:
    one, other = CommitRecord("w", taken=((1, 10), (2, 20))), CommitRecord("w", taken=((2, 30),))
    assert taken_by_all([one, other], [1, 2, 3]) == {1: 30, 2: 30}
    assert taken_by_all([one, None], [1]) == {}


def test_a_new_entity_goes_on_from_where_the_others_are(client: Any) -> None:
    """It reads no topic from its beginning, for which all others would have to wait."""
    writer = a_writer(client)
    for shard, at in ((0, 7), (1, 9)):
        before = writer.claim("user", shard, 1)
        positions = {"clicks/0": Position(at, at - 5), "likes/0": Position(20 - at, 0)}
        writer.commit([ShardCommit(key_of(shard), before, before.advanced(writer.token, positions, {"clicks": "id"}))])
    client.set(SPACE.commit_record("seller", 0), CommitRecord("w", {"clicks/0": Position(3, 0)}).encode())
    view = ViewSpec("seller_view", ("seller",), (Count(name="clicks", event="Click"),))
    plan = Plan("test", SPACE.shards, (), (), (view, ViewSpec("user_view", ("user",), view.features)), (), number=2)
    assert join(client, SPACE, {"seller"}, plan, 5_000) == SPACE.shards
    record = read_record(client, SPACE.commit_record("seller", 0))
    assert record.positions == {"clicks/0": Position(9, 4), "likes/0": Position(13, 0)}
    assert (record.topics, record.plan, record.taken) == ({"clicks": "id"}, 2, ((2, 5_000),))
