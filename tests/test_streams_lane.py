"""Lanes over real Redis: whatever crashes, is replayed or comes back late, rows are those of one undisturbed pass."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import numpy as np
import pytest
import redis
from confluent_kafka import KafkaError

from config.settings import Settings
from features import agg
from features.compile import compile_plan
from features.events import Event
from features.evolve import backfilled, backfilling, columns_from, filling_alone, move
from features.given import Fields
from features.kernel import SLACK_MS, Events, Rows, merge
from features.language import Entity, view
from features.layout import families_of
from features.plan import Given, History, Plan, ViewSpec
from headrace.embedded import EmbeddedRedis
from store.codec import encode
from store.commit import (
    CommitRecord,
    FencedError,
    NotAppliedError,
    Position,
    ShardCommit,
    Writer,
    initialise,
    read_record,
)
from store.connect import connect
from store.filling import Batch
from store.forgotten import order, read_forgotten
from store.given import GivenStore
from store.keys import Keyspace, shard_of
from store.layouts import Layouts
from store.reader import Reader
from streams import kafka
from streams import lane as lane_module
from streams.chunk import Chunk, Part, Partition
from streams.decode import Decoder
from streams.kafka import LogLostError, PartitionReader, records_of
from streams.lane import IDLE_COMMIT_S, Committer, GapError, Lane
from tests import oracle
from tests.support.log import Clock, Log, Message

SHARDS = 6
HORIZON_MS = 60_000

user = Entity("user", key="user_id", forget_after="90d")
item = Entity("item", key="item_id", forget_after="90d")


class Click(Event, topic="clicks"):
    user_id: str
    item_id: str | None = None
    category: str | None = None
    price: float | None = None


class Like(Event, topic="likes"):
    user_id: str
    item_id: str


@view(user)
class Activity:
    clicks = agg.count(Click, over=["10m", "1h", "24h"])
    likes = agg.count(Like, over=["1h"])
    spent = agg.sum(Click, "price", over="24h")
    spread = agg.std(Click, "price", over="1h")
    taste = agg.decayed(Click, by="category", half_life="1h", buckets=16)
    seen = agg.last_k(Click, "item_id", 5)
    items = agg.distinct(Click, "item_id", over=["1h"])


@view(item)
class Popularity:
    clicks = agg.count(Click, over=["10m", "24h"])
    ever = agg.count(Like, over="all")
    price = agg.last(Click, "price")
    top = agg.top_k(Click, "category", 2, over="24h", buckets=16)


def plan_called(project: str) -> Plan:
    return compile_plan([{"Activity": Activity, "Popularity": Popularity}], project, SHARDS)


PLAN = plan_called("test")
SPACE = Keyspace("test", SHARDS)
CLICKS = Partition("clicks", 0)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """Redis 6.2 with the records of the plan."""
    with connect(redis_url, 5) as found:
        initialise(found, SPACE, ["user", "item"])
        yield found


def a_log(rng: random.Random, now_ms: int, n: int) -> tuple[Log, dict[str, list[dict[str, Any]]]]:
    """Records up to now with holes, retries, late events and malformed ones; and the events that count, by topic."""
    partitions = [Partition("clicks", 0), Partition("clicks", 1), Partition("clicks", 2), Partition("likes", 0)]
    records: dict[Partition, list[Message]] = {partition: [] for partition in partitions}
    events: dict[str, list[dict[str, Any]]] = {"clicks": [], "likes": []}
    offsets = dict.fromkeys(partitions, 0)
    recent: dict[Partition, list[tuple[bytes, int]]] = {partition: [] for partition in partitions}
    step_ms = 2 * 3_600_000 // n
    for number in range(n):
        at_ms = now_ms - 10 - (n - number) * step_ms
        partition = rng.choice(partitions)
        offsets[partition] += rng.choice([0, 0, 0, 1, 7])
        again = [value for value, ms in recent[partition] if at_ms - ms <= HORIZON_MS]
        if again and rng.random() < 0.15:
            value: bytes | None = rng.choice(again)
            recent[partition].append((value or b"", at_ms))
        elif rng.random() < 0.05:
            value = rng.choice([None, b"bad", b'{"event_id": 3}'])
        else:
            t = at_ms - rng.choice([0, 5, 1000, 60_000, 3_600_000])
            event: dict[str, Any] = {"event_id": f"e{number}", "occurred_at": t, "user_id": f"u{rng.randrange(12)}"}
            event["item_id"] = f"i{rng.randrange(8)}"
            if partition.topic == "clicks":
                event |= {"category": rng.choice([None, "a", "b", "ü"]), "price": rng.randrange(1, 500) / 4}
            events[partition.topic].append({**event, "t": t})
            value = json.dumps(event).encode()
            recent[partition].append((value, at_ms))
        records[partition].append(Message(offsets[partition], value, at_ms))
        offsets[partition] += 1
    return Log(records), events


class Worker:
    """A process of the stream: a reader a partition, a decoder, and all lanes, each step when the test says so."""

    def __init__(self, plan: Plan, lanes: int, client: redis.Redis, log: Log, clock: Clock, chunk_events: int) -> None:
        settings = Settings(chunk_events=chunk_events)
        self.readers = {p: PartitionReader(settings, p, partial(records_of, plan, client), clock) for p in log.records}
        self.lanes = [Lane(plan, lane, lanes, client, clock) for lane in range(lanes)]
        self.decoder = Decoder(plan, lanes, HORIZON_MS)
        self.queues: list[list[Part]] = [[] for _ in range(lanes)]

    def read(self, partition: Partition) -> None:
        chunk = self.readers[partition].next_chunk()
        if chunk is not None:
            for queue, part in zip(self.queues, self.decoder.decode(chunk).parts, strict=True):
                queue.append(part)

    def write(self, lane: int, count: int) -> int:
        """Writes some of what waits for a lane; returns how many rows."""
        parts, self.queues[lane] = self.queues[lane][:count], self.queues[lane][count:]
        return self.lanes[lane].write(parts).rows

    def drain(self, log: Log, clock: Clock) -> None:
        """Until every shard has everything."""
        for _ in range(10_000):
            clock.now_ms += 1100
            for partition in log.records:
                self.read(partition)
            for lane in range(len(self.lanes)):
                self.write(lane, 1000)
            if all(
                (at := shard.record.position(*partition)) is not None and at.next >= high
                for lane in self.lanes
                for shard in lane._shards.values()
                for partition, high in log.high.items()
            ):
                return
        message = "not drained"
        raise AssertionError(message)


def evaluated(plan: Plan, client: redis.Redis, query_ms: int) -> dict[str, dict[str, list[Any]]]:
    """Every feature of every entity, as served."""
    found = {}
    for entity, ids in (("user", [f"u{n}" for n in range(12)]), ("item", [f"i{n}" for n in range(8)])):
        names = [name for name, feature in plan.features.items() if feature.entities == (entity,)]
        columns = {f"{entity}_id": ids}
        found[entity] = Reader(plan, names).read(client.mget, columns, query_ms, full=True).to_dict()
    return found


def check_by_brute_force(
    answer: dict[str, dict[str, list[Any]]], events: dict[str, list[dict[str, Any]]], query_ms: int
) -> None:
    """What the window rule gives, from the events alone."""
    for number, name in enumerate(answer["user"]["user_id"]):
        clicks = [event for event in events["clicks"] if event["user_id"] == name]
        likes = [event for event in events["likes"] if event["user_id"] == name]
        want = {
            **{
                f"activity__clicks_{over}": oracle.expected("count", clicks, query_ms, over)
                for over in ("10m", "1h", "24h")
            },
            "activity__likes_1h": oracle.expected("count", likes, query_ms, "1h"),
            "activity__spent_24h": oracle.expected("sum", clicks, query_ms, "24h", "price"),
            "activity__seen": oracle.expected("last_k", clicks, query_ms, field="item_id", k=5),
            "activity__items_1h": oracle.expected("distinct", clicks, query_ms, "1h", "item_id"),
        }
        for feature, value in want.items():
            assert oracle.close(answer["user"][feature][number], value), (name, feature)
    for number, name in enumerate(answer["item"]["item_id"]):
        clicks = [event for event in events["clicks"] if event["item_id"] == name]
        likes = [event for event in events["likes"] if event["item_id"] == name]
        want = {
            "popularity__clicks_24h": oracle.expected("count", clicks, query_ms, "24h"),
            "popularity__ever_all": oracle.expected("count", likes, query_ms),
            "popularity__price": oracle.expected("last", clicks, query_ms, field="price"),
            "popularity__top_24h": oracle.expected("top_k", clicks, query_ms, "24h", "category", k=2),
        }
        for feature, value in want.items():
            assert oracle.close(answer["item"][feature][number], value), (name, feature)


def differences(got: dict[str, dict[str, list[Any]]], want: dict[str, dict[str, list[Any]]]) -> list[str]:
    """Names of features that differ by more than rounding."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, dict) and isinstance(other, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        return oracle.close(one, other)

    return [
        f"{name}[{number}]: {one!r} is not {other!r}"
        for entity, columns in want.items()
        for name, values in columns.items()
        for number, (one, other) in enumerate(zip(got[entity][name], values, strict=True))
        if not same(one, other)
    ]


@pytest.mark.parametrize("attempt", range(6))
def test_crashes_zombies_and_other_numbers_of_lanes_leave_the_rows_of_one_undisturbed_pass(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch, attempt: int
) -> None:
    """Each round a worker starts from the records alone, goes a random way, and dies or lives on as a zombie.

    Offsets stored apart from rows, a start that forgets shards which have no offset yet, or a duplicate set that starts
    empty would each leave counts that differ.
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    now_ms = time.time_ns() // 1_000_000  # Rows expire by the clock of Redis.
    log, events = a_log(rng, now_ms, 350)
    log.rng = rng
    monkeypatch.setattr(kafka, "consumer_of", lambda _: log.consumer())
    plain = plan_called("undisturbed")
    initialise(client, Keyspace("undisturbed", SHARDS), ["user", "item"])
    calm = Clock(now_ms)
    Worker(plain, 1, client, log, calm, 10_000).drain(log, calm)

    clock = Clock(now_ms - 3 * 3_600_000)
    zombies: list[Worker] = []
    fenced = 0
    for _ in range(8):
        lanes = rng.choice([1, 2, 3, SHARDS, SHARDS + 2])
        if rng.random() < 0.2:  # It dies while it claims.
            Lane(PLAN, 0, lanes, client, clock)
        worker = Worker(PLAN, lanes, client, log, clock, rng.choice([1, 5, 40, 1000]))
        for _ in range(rng.choice([1, 3, 10, 60])):
            clock.now_ms = min(now_ms, clock.now_ms + rng.choice([0, 10, 500, 1100, 300_000]))
            if rng.random() < 0.6:
                worker.read(rng.choice(list(log.records)))
            else:
                worker.write(rng.randrange(lanes), rng.choice([1, 2, 100]))
            if zombies and rng.random() < 0.2:
                zombie = rng.choice(zombies)
                zombie.read(rng.choice(list(log.records)))
                try:
                    assert zombie.write(rng.randrange(len(zombie.lanes)), 100) == 0
                except FencedError as error:
                    assert error.superseded  # noqa: PT017  # being fenced is one of the ways it may go
                    zombies.remove(zombie)
                    fenced += 1
        zombies.append(worker)
    clock.now_ms = now_ms
    last = Worker(PLAN, rng.choice([1, 2, 4]), client, log, clock, 100)
    for zombie in zombies:
        for partition in log.records:
            clock.now_ms += 1100
            zombie.read(partition)
        for lane in range(len(zombie.lanes)):
            try:
                assert zombie.write(lane, 1000) == 0  # It had all that there is, and has nothing to say.
            except FencedError as error:
                assert error.superseded  # noqa: PT017  # as above
                fenced += 1
    print(fenced, "writes fenced")
    assert fenced
    last.drain(log, clock)

    query_ms = now_ms + 5
    got, want = evaluated(PLAN, client, query_ms), evaluated(plain, client, query_ms)
    check_by_brute_force(want, events, query_ms)
    assert differences(got, want) == []


# --- where a worker starts


def a_reader(monkeypatch: pytest.MonkeyPatch, client: redis.Redis, log: Log, plan: Plan = PLAN) -> PartitionReader:
    monkeypatch.setattr(kafka, "consumer_of", lambda _: log.consumer())
    return PartitionReader(Settings(chunk_events=1000), CLICKS, partial(records_of, plan, client), Clock(0))


def clicks(*users: str, at_ms: int, step_ms: int = 0) -> list[Message]:
    return [
        Message(
            offset,
            json.dumps({"event_id": f"e{offset}", "occurred_at": at_ms + offset * step_ms, "user_id": name}).encode(),
            at_ms + offset * step_ms,
        )
        for offset, name in enumerate(users)
    ]


def set_positions(client: redis.Redis, positions: Mapping[tuple[str, int], Position | None]) -> None:
    """Records of all shards; those not named are at offset 1000."""
    for entity in ("user", "item"):
        for shard in range(SHARDS):
            at = positions.get((entity, shard), Position(1000, 900))
            client.set(SPACE.commit_record(entity, shard), CommitRecord("w", {"clicks/0": at} if at else {}).encode())


def first_chunk(reader: PartitionReader) -> Chunk:
    for _ in range(1000):
        chunk = reader.next_chunk()
        if chunk is not None:
            return chunk
    message = "no chunk"
    raise AssertionError(message)


def test_a_crash_before_every_shard_has_an_offset_loses_nothing(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One lane has committed its first rows, the other has committed nothing when the worker dies.

    The shards without an offset have read nothing, so the log must be read from its start: the minimum over only those
    that have one loses the other lane's events, for good and without a word.
    """
    now_ms = time.time_ns() // 1_000_000
    users = [f"u{number}" for number in range(40)]
    log = Log({CLICKS: clicks(*users, at_ms=now_ms - 1000)})
    log.rng = random.Random(1)
    monkeypatch.setattr(kafka, "consumer_of", lambda _: log.consumer())
    clock = Clock(now_ms)
    first = Worker(PLAN, 2, client, log, clock, 1000)
    while not first.queues[0] or first.queues[0][-1].end < len(users):
        first.read(CLICKS)
    assert first.write(0, 1000)  # Lane 0 only: then the process is killed.
    second = Worker(PLAN, 2, client, log, clock, 1000)
    second.drain(log, clock)
    names = ["activity__clicks_1h"]
    answer = Reader(PLAN, names).read(client.mget, {"user_id": users}, now_ms + 1, full=True).to_dict()
    assert answer["activity__clicks_1h"] == [1] * len(users)


def test_shards_of_a_new_kind_of_entity_read_the_log_from_its_start(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `initialise` says; shards that are further on skip what they have."""
    log = Log({CLICKS: clicks(*["u"] * 1500, at_ms=1_763_683_200_000)})
    log.low[CLICKS] = 20
    set_positions(client, {("item", shard): None for shard in range(SHARDS)})
    chunk = first_chunk(a_reader(monkeypatch, client, log))
    assert (chunk.start, chunk.fresh) == (20, 20)


def test_a_worker_starts_at_the_lowest_offset_and_rewinds_to_the_horizon(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log({CLICKS: clicks(*["u"] * 1500, at_ms=1_763_683_200_000)})
    set_positions(client, {("user", 2): Position(700, 650), ("item", 0): Position(800, 600)})
    chunk = first_chunk(a_reader(monkeypatch, client, log))
    assert (chunk.start, chunk.fresh) == (600, 700)


def test_what_retention_took_is_passed_over_by_an_empty_range(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log({CLICKS: clicks(*["u"] * 1500, at_ms=1_763_683_200_000)})
    log.low[CLICKS] = 1200
    set_positions(client, {("user", 2): Position(700, 650)})
    reader = a_reader(monkeypatch, client, log)
    lost = reader.next_chunk()
    assert lost is not None
    assert (lost.start, lost.end, lost.values) == (700, 1200, [])
    assert first_chunk(reader).start == 1200


def test_records_that_come_with_the_news_that_the_next_are_gone_are_counted(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Librdkafka gives both at once. Starting again first would take them for records that were counted before."""
    log = Log({CLICKS: clicks(*["u"] * 1500, at_ms=1_763_683_200_000)})
    set_positions(client, {})
    reader = a_reader(monkeypatch, client, log)
    gone = Message(0, None, 0)
    monkeypatch.setattr(gone, "error", lambda: KafkaError(KafkaError._AUTO_OFFSET_RESET))
    came = [*log.records[CLICKS][900:1010], gone]
    monkeypatch.setattr(reader._consumer, "consume", lambda *_, **__: [came.pop(0) for _ in range(len(came))])
    log.low[CLICKS] = 1200
    first, lost = reader.next_chunk(), reader.next_chunk()
    assert first is not None
    assert lost is not None
    assert (first.start, first.end, first.fresh, len(first.values)) == (900, 1010, 1000, 110)
    assert (lost.start, lost.end, lost.fresh, lost.values) == (1010, 1200, 1010, [])


def test_a_topic_that_ends_before_what_was_committed_stops_the_stream(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Log({CLICKS: clicks(*["u"] * 999, at_ms=1_763_683_200_000)})
    set_positions(client, {})
    with pytest.raises(LogLostError, match="clicks/0 ends at offset 999, but offsets up to 1000 were committed"):
        a_reader(monkeypatch, client, log)


# --- one lane


NOW_MS = time.time_ns() // 60_000_000_000 * 60_000
"""The start of a minute: what is read now has what comes some seconds later too, as it is of the same bucket."""


def parts_of(
    start: int,
    users: Sequence[str],
    *,
    lanes: int = 1,
    at_ms: int = NOW_MS - 60_000,
    record_ms: int = NOW_MS,
    plan: Plan = PLAN,
) -> list[Part]:
    """The parts of a chunk with a click of each user."""
    decoder = Decoder(plan, lanes, HORIZON_MS)
    values: list[bytes | None] = [
        json.dumps({"event_id": f"e{start + n}", "occurred_at": at_ms, "user_id": name}).encode()
        for n, name in enumerate(users)
    ]
    offsets = np.arange(start, start + len(users))
    times = np.full(len(users), record_ms, np.int64)
    chunk = Chunk(CLICKS, start, start + len(users), 0, values, [None] * len(users), offsets, times)
    return decoder.decode(chunk).parts


def empty_range(start: int, end: int) -> Part:
    return Decoder(PLAN, 1, HORIZON_MS).decode(Chunk(CLICKS, start, end)).parts[0]


def a_lane(client: redis.Redis, clock: Clock | None = None) -> tuple[Lane, Clock]:
    clock = clock or Clock(NOW_MS)
    return Lane(PLAN, 0, 1, client, clock), clock


def nexts(client: redis.Redis) -> set[int | None]:
    """The offsets at which shards are."""
    keys = [SPACE.commit_record(entity, shard) for entity in ("user", "item") for shard in range(SHARDS)]
    return {at.next if (at := read_record(client, key).position(*CLICKS)) else None for key in keys}


def topic_ids(client: redis.Redis) -> set[str]:
    """Of which topics of clicks the shards are."""
    keys = [SPACE.commit_record(entity, shard) for entity in ("user", "item") for shard in range(SHARDS)]
    return {topics["clicks"] for key in keys if (topics := read_record(client, key).topics)}


def test_evictions_are_told_apart_by_view_and_feature(client: redis.Redis) -> None:
    """One number for all says that some bound is too tight, and not which."""
    lane, _ = a_lane(client)
    values: list[bytes | None] = [
        json.dumps(
            {
                "event_id": f"e{n}",
                "occurred_at": NOW_MS - 60_000 + n,
                "user_id": "u1",
                "item_id": "i1",
                "category": f"c{n}",
            }
        ).encode()
        for n in range(40)
    ]
    chunk = Chunk(CLICKS, 0, 40, 0, values, [None] * 40, np.arange(40), np.full(40, NOW_MS, np.int64))
    written = lane.write(Decoder(PLAN, 1, HORIZON_MS).decode(chunk).parts)
    assert written.evicted == {("popularity", "top"): 24, ("activity", "taste"): 24}
    assert lane.write([empty_range(40, 41)]).evicted == {}


def test_a_chunk_of_a_topic_that_is_no_more_is_refused(client: redis.Redis) -> None:
    """It may have been read before the new topic was accepted: at its offsets there are other events now."""
    lane, _ = a_lane(client)
    old, new = (replace(parts_of(0, ["u1"])[0], topic_id=topic_id) for topic_id in ("old", "new"))
    lane.write([old])
    assert topic_ids(client) == {"old"}
    for shard in range(SHARDS):
        for entity in ("user", "item"):
            Writer(client, SPACE).accept_topic(entity, shard, "clicks", "new")
    lane, _ = a_lane(client)
    with pytest.raises(GapError, match="a chunk of clicks is of the topic old, but the shards are of new"):
        lane.write([old])
    lane, _ = a_lane(client)
    lane.write([new])
    assert topic_ids(client) == {"new"}


def everything(client: Any) -> dict[bytes, bytes]:
    """All keys and their values."""
    return {key: client.get(key) for key in client.keys("*") if client.type(key) == b"string"}


def counts(client: redis.Redis, *names: str) -> list[Any]:
    reader = Reader(PLAN, ["activity__clicks_1h"])
    answer = reader.read(client.mget, {"user_id": list(names)}, NOW_MS + 1, full=True).to_dict()
    found: list[Any] = answer["activity__clicks_1h"]
    return found


def test_a_gap_between_chunks_stops_the_lane(client: redis.Redis) -> None:
    lane, _ = a_lane(client)
    lane.write(parts_of(0, ["u1", "u2"]))
    with pytest.raises(GapError, match=r"clicks/0: a chunk starts at offset 3, but .* what comes before 2"):
        lane.write(parts_of(3, ["u3"]))
    assert counts(client, "u1", "u2", "u3") == [1, 1, 0]


def test_a_gap_within_one_write_writes_nothing(client: redis.Redis) -> None:
    lane, _ = a_lane(client)
    with pytest.raises(GapError):
        lane.write([*parts_of(0, ["u1"]), *parts_of(2, ["u2"])])
    assert counts(client, "u1", "u2") == [0, 0]


def test_a_gap_after_what_was_committed_before_the_claim_stops_the_lane(client: redis.Redis) -> None:
    first, clock = a_lane(client)
    first.write(parts_of(0, ["u1", "u2"]))
    clock.now_ms += 2000
    first.write([empty_range(2, 2)])
    second, _ = a_lane(client)
    with pytest.raises(GapError):
        second.write(parts_of(3, ["u3"]))
    a_lane(client)[0].write(parts_of(1, ["u2", "u3"]))
    assert counts(client, "u1", "u2", "u3") == [1, 1, 1]


def test_what_a_shard_has_is_skipped_and_what_its_neighbour_lacks_is_not(client: redis.Redis) -> None:
    """After a crash between two shards' commits the same chunk comes again."""
    names = [f"u{number}" for number in range(30)]
    behind = {shard_of(name.encode(), SHARDS) for name in names[:3]}
    lane, _ = a_lane(client)
    lane.write(parts_of(0, names))
    for shard in behind:  # As if their commits had not been.
        key = SPACE.commit_record("user", shard)
        client.set(key, CommitRecord("w", {"clicks/0": Position(0, 0)}).encode())
        mine = [name.encode() for name in names if shard_of(name.encode(), SHARDS) == shard]
        for view_spec in PLAN.views:
            for family in families_of(PLAN, view_spec):
                if family.entity == "user":
                    client.delete(*SPACE.rows(family, mine))
    again, _ = a_lane(client)
    for _ in range(2):
        again.write(parts_of(0, names))
    assert counts(client, *names) == [1] * len(names)


def test_an_empty_range_moves_idle_shards_on_once_a_second(client: redis.Redis) -> None:
    lane, clock = a_lane(client)
    lane.write([empty_range(0, 7)])
    assert nexts(client) == {None}  # Not yet: it would be a commit of every shard for every chunk.
    clock.now_ms += int(IDLE_COMMIT_S * 1000)
    lane.write([empty_range(7, 7)])
    assert nexts(client) == {7}
    clock.now_ms += 5000
    before = everything(client)
    lane.write([empty_range(7, 7)])
    assert everything(client) == before


def test_a_shard_with_rows_commits_at_once(client: redis.Redis) -> None:
    lane, _ = a_lane(client)
    assert lane.write(parts_of(0, ["u1"])).rows == 1
    assert nexts(client) == {None, 1}


def test_a_lost_range_advances_every_shard_and_the_stream_goes_on(client: redis.Redis) -> None:
    lane, clock = a_lane(client)
    lane.write(parts_of(0, ["u1"]))
    clock.now_ms += 2000
    lane.write([empty_range(1, 5_000_000_000)])
    assert nexts(client) == {5_000_000_000}
    lane.write(parts_of(5_000_000_000, ["u1"]))
    assert counts(client, "u1") == [2]


def test_offsets_never_go_back(client: redis.Redis) -> None:
    """A replay from further back commits nothing lower than what is committed."""
    lane, clock = a_lane(client)
    lane.write(parts_of(0, ["u1", "u2", "u3"]))
    clock.now_ms += 2000
    lane.write([empty_range(3, 3)])
    again, _ = a_lane(client, clock)
    clock.now_ms += 2000
    again.write(parts_of(0, ["u1"]))
    assert nexts(client) == {3}
    clock.now_ms += 2000
    again.write(parts_of(1, ["u2", "u3", "u4"]))
    clock.now_ms += 2000
    again.write([empty_range(4, 4)])
    assert nexts(client) == {4}
    assert counts(client, "u1", "u2", "u3", "u4") == [1, 1, 1, 1]


def test_several_chunks_in_one_write_are_merged_once(client: redis.Redis) -> None:
    lane, _ = a_lane(client)
    written = lane.write([*parts_of(0, ["u1"] * 3), empty_range(3, 9), *parts_of(9, ["u1", "u2"])])
    assert written.rows == 2
    assert counts(client, "u1", "u2") == [4, 1]
    assert lane.write([]).rows == 0


@pytest.mark.parametrize(
    ("clock_ms", "record_ms"), [(NOW_MS, NOW_MS - 5000), (NOW_MS - 5000, NOW_MS)], ids=["ahead", "behind"]
)
def test_merge_stays_behind_both_clocks(
    client: redis.Redis, monkeypatch: pytest.MonkeyPatch, clock_ms: int, record_ms: int
) -> None:
    """`now` too large rounds tiles that a query shortly before still needs apart."""
    seen = []

    def spy(family: Any, rows: Any, events: Any, now_ms: int) -> Any:
        seen.append(now_ms)
        return merge(family, rows, events, now_ms)

    monkeypatch.setattr(lane_module, "merge", spy)
    lane, _ = a_lane(client, Clock(clock_ms))
    older = parts_of(0, ["u1"], record_ms=record_ms - 1000)
    lane.write([*older, *parts_of(1, ["u1"], record_ms=record_ms)])
    assert seen
    assert set(seen) == {NOW_MS - 5000 - SLACK_MS}


def test_rows_expire_after_their_last_event_and_retention(redis7_server: EmbeddedRedis) -> None:
    """On Redis 7, which tells when: the last event, late or not, decides."""
    with connect(redis7_server.url, 5) as client:
        client.flushall()
        initialise(client, SPACE, ["user", "item"])
        lane, _ = a_lane(client)
        lane.write([*parts_of(0, ["u1", "u2"]), *parts_of(2, ["u1"], at_ms=NOW_MS - 50_000)])
        lane.write(parts_of(3, ["u2"], at_ms=NOW_MS - 3_000_000))
        for view_spec in PLAN.views:
            for family in families_of(PLAN, view_spec):
                if family.entity == "user" and family.name == "activity":
                    keys = SPACE.rows(family, [b"u1", b"u2"])
                    expire: list[Any] = [client.pexpiretime(key) for key in keys]
                    last = [NOW_MS - 50_000, NOW_MS - 60_000]
                    assert expire == [ms + family.retention_ms for ms in last]
                    assert family.retention_ms == 90 * 86_400_000


@view(Entity("user", key="user_id", forget_after="2d"))
class Ever:
    clicks = agg.count(Click, over="all")


FORGETFUL = compile_plan([{"Ever": Ever}], "forgetful", SHARDS)
TWO_DAYS_MS = 2 * 86_400_000


@pytest.fixture
def ever(client: redis.Redis) -> Callable[[], Any]:
    """What is served of u1, who is forgotten after two days; None if it is not found."""
    initialise(client, Keyspace("forgetful", SHARDS), ["user"])
    key = Keyspace("forgetful", SHARDS).rows(families_of(FORGETFUL, FORGETFUL.views[0])[0], [b"u1"])[0]

    def served() -> Any:
        found = Reader(FORGETFUL, ["ever__clicks_all"]).read(client.mget, {"user_id": ["u1"]}, now_ms(), full=True)
        return found.to_dict()["ever__clicks_all"][0] if client.exists(key) else None

    return served


def now_ms() -> int:
    """By the clock of Redis, which decides when a row expires."""
    return time.time_ns() // 1_000_000


def forgetful(client: redis.Redis, clock: Clock) -> Lane:
    return Lane(FORGETFUL, 0, 1, client, clock, cache_bytes_max=1_000_000)


@pytest.mark.parametrize("restarts", [False, True])
@pytest.mark.parametrize("left_ms", [-TWO_DAYS_MS // 2, 700, 5_000])
def test_what_is_forgotten_does_not_depend_on_what_a_worker_remembers(
    client: redis.Redis, ever: Callable[[], Any], left_ms: int, restarts: bool
) -> None:
    """A row that Redis never kept, let expire, or is about to: a new event begins a new one.

    A lane that goes on from a row it remembers counts 2 until it is killed; and one that goes by the moment of expiry
    does so while Redis's clock is ahead, or between its reading the clock and the commit.
    """
    clock = Clock(now_ms() - 60_000)
    lane = forgetful(client, clock)
    old_ms = now_ms() - TWO_DAYS_MS + left_ms
    lane.write(parts_of(0, ["u1"], at_ms=old_ms, plan=FORGETFUL))
    assert ever() == (1 if left_ms > 0 else None)
    if left_ms < 1_000:
        while ever() is not None:
            time.sleep(0.05)
    clock.now_ms = now_ms()
    if restarts:
        lane = forgetful(client, clock)
    lane.write(parts_of(1, ["u1"], at_ms=clock.now_ms - 1_000, plan=FORGETFUL))
    assert ever() == 1
    lane.write(parts_of(2, ["u1"], at_ms=clock.now_ms - 1_000, plan=FORGETFUL))
    assert ever() == 2


def test_a_lane_adds_history_once_and_says_how_much(client: redis.Redis) -> None:
    """Batch by batch, each in a commit with its number; what Redis would have forgotten by now stays forgotten.

    A batch that is added in another commit than its number is added again after a crash between them.
    """
    initialise(client, Keyspace("forgetful", SHARDS), ["user"])
    plan = backfilling(FORGETFUL, list(FORGETFUL.features), History(2))
    (family,) = families_of(plan, plan.views[0])
    alone = filling_alone(plan)
    keyspace, clock = Keyspace.of(plan), Clock(NOW_MS)
    lane = Lane(plan, 0, 1, client, clock)
    shard = shard_of(b"u1", SHARDS)

    def put(number: int, age_ms: int, n: int, forgotten: dict[bytes, int] | None = None) -> None:
        before = families_of(alone, alone.views[0])[0]
        events = {"Click": Events(np.zeros(n, np.intp), np.full(n, NOW_MS - age_ms), {})}
        rows = merge(before, Rows.empty(before, 1), events, 0).rows
        blobs = encode(family, move(rows, before, family, columns_from(alone, plan, family.name)))
        data = Batch([b"u1"], {family.name: blobs}, forgotten or {}).encode()
        client.set(keyspace.filling("user", shard, plan.number, number), data)

    def filled() -> Any:
        whole = backfilled(plan, {})
        layouts = Layouts(whole, lambda first, last: [plan][first - 1 : last])
        name = next(iter(whole.features))
        reader = Reader(whole, [name], layouts)
        return reader.read(client.mget, {"user_id": ["u1"]}, NOW_MS + 60_000, full=True).to_dict()[name][0]

    def added() -> Any:
        return read_record(client, keyspace.commit_record("user", shard)).filled

    lane.write([])
    assert (filled(), added()) == (0, 0)
    put(1, 60_000, 3)
    lane.write([])
    assert (filled(), added()) == (0, 0)  # The first is waited for.
    put(0, 60_000, 2)
    clock.now_ms += 1_000
    lane.write(parts_of(0, ["u1"], plan=plan))
    assert (filled(), added()) == (3, 1)
    clock.now_ms += 1_000
    lane.write([])
    assert (filled(), added()) == (6, 2)
    put(0, 60_000, 2)
    put(2, 200 * TWO_DAYS_MS, 5)
    clock.now_ms += 1_000
    lane.write([])
    assert (filled(), added()) == (6, 3)
    assert not client.exists(keyspace.filling("user", shard, plan.number, 2))

    put(3, 60_000, 5)  # Made before u1 was to be forgotten.
    order(client, "forgetful", "user", ["u1"], clock.now_ms)
    clock.now_ms += 1_000
    lane.write([])
    assert (filled(), added()) == (0, 4)
    put(4, -1_500, 2, {b"u1": clock.now_ms})
    clock.now_ms += 1_000
    lane.write([])
    assert (filled(), added()) == (2, 5)


def test_who_is_forgotten_stays_so(client: redis.Redis) -> None:
    """Rows go, of views that only older plans have too; what comes late does not count, and what is new does.

    Also to a lane that was not there when it was ordered; it orders nothing again, and nobody else is touched.
    """
    older = compile_plan([{"Ever": Ever}], "test", SHARDS)
    lane, clock = a_lane(client)
    lane._layouts = Layouts(PLAN, lambda _first, _last: [older])
    (ever,) = SPACE.rows(families_of(older, older.views[0])[0], [b"u1"])
    client.set(ever, b"of an older plan")
    lane.write(parts_of(0, ["u1", "u1", "u2"]))
    order(client, "test", "user", ["u1", "never seen"], clock.now_ms - 500)
    order(client, "test", "item", ["u1"], clock.now_ms)
    lane.write([])
    assert counts(client, "u1", "u2") == [2, 1]  # It looks once a second.

    clock.now_ms += 1_000
    lane.write([])
    assert counts(client, "u1", "u2") == [0, 1]
    assert [key for key in everything(client) if key.endswith(b":u1")] == []
    known = read_forgotten(client, SPACE, ["user"])["user"]
    assert known == {b"u1": NOW_MS + 1_000, b"never seen": NOW_MS + 1_000}

    later = NOW_MS + 2_000
    lane.write([*parts_of(3, ["u1", "u2"]), *parts_of(5, ["u1"], at_ms=later, record_ms=later)])
    assert counts(client, "u1", "u2") == [1, 2]
    clock.now_ms += 1_000
    lane.write([])
    successor, _ = a_lane(client, clock)
    successor.write([*parts_of(6, ["u1", "u2"]), *parts_of(8, ["u1"], at_ms=later, record_ms=later)])
    assert counts(client, "u1", "u2") == [2, 3]
    assert read_forgotten(client, SPACE, ["user"])["user"] == known


def test_who_is_forgotten_is_so_in_ordinary_views_too(client: redis.Redis) -> None:
    """Of that entity alone; what is written afterwards is there."""
    profile = ViewSpec("profile", ("user",), (Given("age", "Int64"),))
    plan = msgspec.structs.replace(PLAN, views=(*PLAN.views, profile))
    fields, store = Fields.of([("age", "Int64")]), GivenStore(client, plan.project)

    def ages() -> list[Any]:
        return store.read("profile", fields, [b"u1", b"u2"]).raw("age")

    rows = [(each, fields.pack({"age": 30}, 1, 0), 0) for each in (b"u1", b"u2")]
    list(store.write("profile", rows))
    clock = Clock(NOW_MS)
    lane = Lane(plan, 0, 1, client, clock)
    order(client, "test", "user", ["u1"], clock.now_ms)
    lane.write([])
    assert ages() == [None, 30]
    clock.now_ms += 1_000
    list(store.write("profile", rows))
    lane.write([])
    assert ages() == [30, 30]


def test_what_a_row_has_is_of_before_it_is_forgotten_whoever_has_the_wrong_time(client: redis.Redis) -> None:
    """Else an event of the broker's future would be gone, and count again for who makes the rows anew."""
    lane, clock = a_lane(client)
    ahead_ms = NOW_MS + 60_000
    lane.write(parts_of(0, ["u1"], at_ms=ahead_ms, record_ms=ahead_ms))
    order(client, "test", "user", ["u1"], NOW_MS)
    clock.now_ms += 1_000
    lane.write([])
    assert read_forgotten(client, SPACE, ["user"]) == {"user": {b"u1": ahead_ms}}


@pytest.mark.parametrize(
    "order", [("old", "new"), ("new", "old"), ("old", "restart", "new"), ("new", "restart", "old")]
)
@pytest.mark.parametrize("together", [False, True])
def test_an_event_older_than_its_entity_is_kept_never_counts(
    client: redis.Redis, ever: Callable[[], Any], order: Sequence[str], together: bool
) -> None:
    """However a worker happens to cut the log, and whichever partition it reads first.

    Counted if it meets the row of a later event, in Redis or in the same merge, the answer would depend on both.
    """
    clock = Clock(now_ms())
    lane = forgetful(client, clock)
    parts: list[Part] = []
    for each in order:
        if each == "restart":
            lane.write(parts)
            lane, parts = forgetful(client, clock), []
            continue
        at_ms = clock.now_ms - (TWO_DAYS_MS + 1 if each == "old" else 1_000)
        start = sum(other != "restart" for other in order[: order.index(each)])
        parts += parts_of(start, ["u1"], at_ms=at_ms, plan=FORGETFUL)
        if not together:
            lane.write(parts)
            parts = []
    lane.write(parts)
    assert ever() == 1


def test_an_event_within_what_its_entity_is_kept_counts(client: redis.Redis, ever: Callable[[], Any]) -> None:
    """Also a late one; one that forgets too much would leave it out."""
    clock = Clock(now_ms())
    lane = forgetful(client, clock)
    for start, age_ms in enumerate((1_000, TWO_DAYS_MS - 20_000, 1_000)):
        lane.write(parts_of(start, ["u1"], at_ms=clock.now_ms - age_ms, plan=FORGETFUL))
    assert ever() == 3


def test_a_zombie_is_fenced_and_changes_nothing(client: redis.Redis) -> None:
    zombie, _ = a_lane(client)
    zombie.write(parts_of(0, ["u1"]))
    successor, _ = a_lane(client)
    with pytest.raises(FencedError) as caught:
        zombie.write(parts_of(1, ["u1"]))
    assert caught.value.superseded
    assert counts(client, "u1") == [1]
    successor.write(parts_of(1, ["u1"]))
    assert counts(client, "u1") == [2]


def test_a_zombie_that_reads_before_its_last_commit_is_done_is_superseded_not_rolled_back(client: redis.Redis) -> None:
    """Its successor lacks that commit, and always will. A supervisor that took it for lost data would start the zombie
    again, and the two would take the shards from each other for ever.
    """

    class Held(Committer):
        """Commits nothing."""

        def submit(self, commits: Sequence[ShardCommit], confirmed: object = None) -> Future[None]:
            return Future()

    shard = shard_of(b"u1", SHARDS)
    neighbour = next(name for n in range(2, 100) if shard_of((name := f"u{n}").encode(), SHARDS) == shard)
    zombie = Lane(PLAN, 0, 1, client, Clock(NOW_MS), committer=Held)
    zombie.start(parts_of(0, ["u1"]))
    a_lane(client)
    with pytest.raises(FencedError) as caught:
        zombie.start(parts_of(1, [neighbour]))
    assert caught.value.superseded


def test_a_lane_after_a_rollback_is_fenced_and_its_successor_replays_the_difference(client: redis.Redis) -> None:
    """Redis comes back with the second before: the token is still this writer's, the record is not."""
    lane, _ = a_lane(client)
    lane.write(parts_of(0, ["u1"]))
    saved: dict[bytes, bytes] = {key: client.dump(key) for key in client.keys("*")}  # type: ignore[misc, union-attr]
    lane.write(parts_of(1, ["u1"]))
    client.flushall()
    for key, value in saved.items():
        client.restore(key, 0, value)
    with pytest.raises(FencedError, match="older data") as caught:
        lane.write(parts_of(2, ["u1"]))
    assert not caught.value.superseded
    successor, _ = a_lane(client)
    successor.write(parts_of(1, ["u1", "u1"]))
    assert counts(client, "u1") == [3]


def test_a_lane_needs_what_apply_makes(client: redis.Redis) -> None:
    client.flushall()
    with pytest.raises(NotAppliedError, match="headrace apply"):
        a_lane(client)


@pytest.mark.parametrize("lanes", [1, 2, SHARDS, SHARDS + 3])
def test_every_shard_is_in_one_lane(client: redis.Redis, lanes: int) -> None:
    """Also where there are more lanes than shards: some then have nothing to do, and take their parts all the same."""
    clock = Clock(NOW_MS)
    names = [f"u{number}" for number in range(50)]
    all_lanes = [Lane(PLAN, number, lanes, client, clock) for number in range(lanes)]
    for lane, part in zip(all_lanes, parts_of(0, names, lanes=lanes), strict=True):
        lane.write([part])
    assert counts(client, *names) == [1] * len(names)
