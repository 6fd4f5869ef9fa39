"""The mirror on a real Redis: writers and readers race, connections are lost, and every answer is checked."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import pytest
import uvloop
from redis.exceptions import ConnectionError as RedisConnectionError

from headrace.embedded import EmbeddedRedis
from serving.lookup import Answer, Lookup
from serving.problems import Problem
from store.commit import Position, RowWrite, ShardCommit, Writer, initialise
from store.connect import connect
from store.connection import Connection
from store.keys import shard_of
from tests.properties.scenarios import BASE_MS
from tests.support import served
from tests.support.miniature import (
    FAR_MS,
    MIRRORED,
    SHARDS,
    SPACE,
    Reading,
    Truth,
    differences,
    everything,
    families,
    racing,
    reading,
    version_of,
)

DEADLINE_S: Final = 20


class Side:
    """A lookup with a connection of its own.

    `known` says of each row's key how far it has come, as its reader must know: what had been acknowledged when
    something was asked that has been answered since, and what was in an answer.
    """

    def __init__(self, url: str, mirror_rows: int) -> None:
        self.lookup = Lookup.connect(racing()[0], url, DEADLINE_S, mirror_rows)
        self.known: dict[bytes, int] = defaultdict(int)

    def knows(self, acknowledged: Mapping[bytes, int]) -> None:
        for key, at in acknowledged.items():
            self.known[key] = max(self.known[key], at)


class Race:
    """Writers, each of some shards, and readers with mirrors of several sizes, all at once on a real Redis.

    How far a key has come is counted by twos: 2 n is what the n-th change made of it, 2 n + 1 that this has expired.
    """

    def __init__(self, url: str, rng: random.Random, mirror_rows: Sequence[int]) -> None:
        self.truth, self.rng, self.url = Truth(), rng, url
        self.sides = [Side(url, rows) for rows in mirror_rows]
        self.counts: Counter[str] = Counter()
        self.is_over = False
        self.now_ms = BASE_MS
        self.ids = [f"i{at}" for at in range(40)]
        self._families = families(self.truth.plan)
        self._keys = {
            (family, own): SPACE.rows(self._families[family], [own.encode()])[0]
            for family in self._families
            for own in self.ids
        }
        # Of each key, its versions and whether they expire soon; the last may not have arrived yet.
        self._history: dict[bytes, list[tuple[int, bool]]] = {key: [(0, False)] for key in self._keys.values()}
        self._acknowledged = dict.fromkeys(self._history, 0)
        self._next_version = 1
        names = list(self.truth.plan.features)
        self._asked = [names, [name for name in names if name.partition("__")[0] in MIRRORED]]

    async def write(self, number: int, writers: int, n: int) -> None:
        """Commits as the stream makes them, and whatever else one can do to a key."""
        shards = range(number, SHARDS, writers)
        plain = self.sides[0].lookup.connection
        with connect(self.url, DEADLINE_S) as client:
            writer = Writer(client, SPACE)
            records = {shard: await asyncio.to_thread(writer.claim, "item", shard) for shard in shards}
            for _ in range(n):
                shard = self.rng.choice(shards)
                mine = [own for own in self.ids if shard_of(own.encode(), SHARDS) == shard]
                version, self._next_version = self._next_version, self._next_version + 1
                if self.rng.random() < 0.6:
                    some = self.rng.sample(mine, self.rng.randint(1, min(4, len(mine))))
                    blobs = {
                        self._keys[of, own]: self.truth.versions[version][of] for of in self._families for own in some
                    }
                    for key in blobs:
                        self._history[key].append((version, False))
                    before = records[shard]
                    records[shard] = before.advanced(writer.token, {"clicks/0": Position(version, 0)})
                    rows = [RowWrite(key, blob, FAR_MS) for key, blob in blobs.items()]
                    commit = ShardCommit(SPACE.commit_record("item", shard), before, records[shard], rows)
                    await asyncio.to_thread(writer.commit, [commit])
                    self._done(*blobs)
                else:
                    family = self.rng.choice(list(self._families))
                    key = self._keys[family, self.rng.choice(mine)]
                    await self._disturb(plain, key, self.truth.versions[version][family], version)
                    self._done(key)
                self.counts["writes"] += 1
                if self.rng.random() < 0.5:
                    await asyncio.sleep(self.rng.random() * 0.002)

    async def _disturb(self, plain: Connection, key: bytes, blob: bytes, version: int) -> None:
        history, soon_ms = self._history[key], self.rng.randint(1, 20)
        match self.rng.randrange(4):
            case 0:
                history.append((version, False))
                await plain.execute("SET", key, blob)
            case 1:
                history.append((version, True))
                await plain.execute("SET", key, blob, "PX", soon_ms)
            case 2:
                history.append((0, False))
                await plain.execute("DEL", key)
            case 3:
                history.append((history[-1][0], True))
                await plain.execute("PEXPIRE", key, soon_ms)

    def _done(self, *keys: bytes) -> None:
        for key in keys:
            self._acknowledged[key] = 2 * len(self._history[key]) - 2

    async def read(self, side: Side) -> None:
        """Reads until all is written; now and then asks something first, so that all that was written is known."""
        connection = side.lookup.connection
        while not self.is_over:
            if self.rng.random() < 0.2:
                before = dict(self._acknowledged)
                try:
                    await connection.execute("PING")
                except RedisConnectionError:
                    continue
                side.knows(before)
            ids = self.rng.choices(self.ids, weights=range(len(self.ids), 0, -1), k=self.rng.randint(1, 10))
            sent, known = dict(self._acknowledged), dict(side.known)
            task = asyncio.create_task(self._ask(side, ids, self.rng.choice(self._asked)))
            if self.rng.random() < 0.03:
                for _ in range(self.rng.randint(0, 3)):
                    await asyncio.sleep(0)
                task.cancel()
            await asyncio.wait([task])
            if task.cancelled():
                self.counts["given up"] += 1
            elif isinstance(task.exception(), Problem):
                self.counts["failed"] += 1
            else:
                self._check(side, task.result(), ids, sent, known)

    def _check(
        self, side: Side, answer: Answer, ids: Sequence[str], sent: Mapping[bytes, int], known: Mapping[bytes, int]
    ) -> None:
        """An answer to what was asked when that was acknowledged, and this known."""
        found = self.truth.check(answer, ids)
        for family, versions in found.items():
            is_mirrored = family in side.lookup.mirrors
            for own, version in zip(ids, versions, strict=True):
                key = self._keys[family, own]
                side.knows({key: self._place(key, version, known.get(key, 0) if is_mirrored else sent[key])})
        if "tops" in found:
            # Its rows are always read from Redis, so Redis has answered.
            side.knows(sent)
        self.counts["answers"] += 1

    def _ask(self, side: Side, ids: Sequence[str], names: Sequence[str]) -> Reading:
        self.now_ms += int(self.rng.expovariate(1 / 500))
        at_ms = self.now_ms - self.rng.choice([0, 0, 0, 0, 1, 10_000])
        return reading(side.lookup, ids, at_ms, side.lookup.program(tuple(names)))

    def _place(self, key: bytes, version: int, since: int) -> int:
        """How far a key has come that reads as this version, at least."""
        history = self._history[key]
        for place in range(since, 2 * len(history)):
            made, expires = history[place // 2]
            if (place % 2 == 0 and made == version) or (place % 2 and expires and version == 0):
                return place
        raise AssertionError((key, version, since, self._acknowledged[key], history))

    async def lose(self) -> None:
        """Connections that track keys are closed, now and then."""
        with connect(self.url, DEADLINE_S) as client:
            admin: Any = client
            while not self.is_over:
                await asyncio.sleep(0.1 + self.rng.random() * 0.2)
                tracking = [each["id"] for each in admin.client_list() if "t" in each["flags"]]
                for number in self.rng.sample(tracking, min(1, len(tracking))):
                    self.counts["lost"] += admin.client_kill_filter(_id=number)

    async def run(self, n: int) -> None:
        """All of it, and at the end, when nothing changes any more, a comparison of everybody's answers."""
        with connect(self.url, DEADLINE_S) as client:
            initialise(client, SPACE, ["item"])
        try:
            async with asyncio.timeout(5 * DEADLINE_S), asyncio.TaskGroup() as group:
                for side in self.sides:
                    for _ in range(5):
                        group.create_task(self.read(side))
                group.create_task(self.lose())
                await asyncio.gather(*(self.write(number, 2, n // 2) for number in range(2)))
                self.is_over = True
            await asyncio.sleep(0.03)  # Until everything has expired that will; whoever reads it, makes Redis say so.
            plain = self.sides[0].lookup
            want = await reading(plain, self.ids, self.now_ms, everything(plain))
            for side in self.sides:
                await side.lookup.connection.execute("PING")
                for _ in range(2):
                    got = await reading(side.lookup, self.ids, self.now_ms, everything(side.lookup))
                    assert differences(got, want) == []
        finally:
            for side in self.sides:
                await side.lookup.connection.aclose()


@pytest.mark.parametrize(
    ("server", "loop"),
    [("redis_server", asyncio.new_event_loop), ("redis7_server", uvloop.new_event_loop)],
    ids=["redis 6.2, asyncio", "redis 7, uvloop"],
)
def test_answers_are_what_redis_held(
    request: pytest.FixtureRequest, server: str, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Writers and readers race, and every answer is checked: it is no older than what had been acknowledged before
    the last thing that its connection has answered was asked, and no newer than what was sent to Redis.
    """
    seed = random.randrange(2**32)
    print(f"seed={seed}")
    url = request.getfixturevalue(server).url
    with connect(url, DEADLINE_S) as client:
        client.flushall()

    async def race() -> None:
        running = Race(url, random.Random(seed), (0, 5, 25, 200))
        await running.run(700)
        mirrors = [mirror for side in running.sides for mirror in side.lookup.mirrors.values()]
        print(dict(running.counts), mirrors)
        assert min(running.counts[name] for name in ("failed", "given up", "lost")) > 0
        assert all(mirror.hits > 50 for mirror in mirrors)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(race())


@pytest.fixture
def victim() -> Iterator[EmbeddedRedis]:
    """A Redis of the test's own, to be maltreated."""
    with EmbeddedRedis() as found:
        yield found


def write_all(url: str, ids: Sequence[str], version: int) -> None:
    """Gives every item's mirrored rows a version, in one go."""
    truth = Truth()
    with connect(url, DEADLINE_S) as client:
        client.mset(
            {
                key: truth.versions[version][name]
                for name, family in families(truth.plan).items()
                if name in MIRRORED
                for key in SPACE.rows(family, [own.encode() for own in ids])
            }
        )


class Watcher:
    """One who reads the same items again and again, from mirrors alone once they have them, and notes what it sees.

    `seen` has the versions in each answer, none where Redis could not be read; one after the other without repetition.
    """

    def __init__(self, url: str, ids: Sequence[str]) -> None:
        self.lookup, self._ids = Lookup.connect(racing()[0], url, DEADLINE_S, 100), ids
        names = [name for name in self.lookup.plan.features if name.partition("__")[0] in MIRRORED]
        self._program = self.lookup.program(tuple(names))
        self.seen: list[set[int]] = []

    async def look(self) -> set[int]:
        """Reads once."""
        found: set[int] = set()
        with suppress(Problem):
            answer = await reading(self.lookup, self._ids, BASE_MS, self._program)
            found = {version for family in MIRRORED for version in version_of(answer, family)}
        if self.seen[-1:] != [found]:
            self.seen.append(found)
        return found

    async def until(self, condition: Callable[[], object]) -> None:
        """Reads until it holds."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await self.look()
                await asyncio.sleep(0)

    @property
    def n_kept(self) -> int:
        return sum(map(len, self.lookup.mirrors.values()))


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_after_a_crash_nothing_old_is_answered(
    victim: EmbeddedRedis, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Redis is killed and comes back with other data. Mirrors are empty once the loss is noticed; whoever has had an
    error, or a newer answer, is never again given what was kept before.
    """

    async def crash() -> None:
        ids = [f"i{at}" for at in range(20)]
        write_all(victim.url, ids, 1)
        watcher = Watcher(victim.url, ids)
        connection = watcher.lookup.connection
        try:
            for _ in range(3):
                assert await watcher.look() == {1}
            assert watcher.n_kept == 40
            victim.kill()
            await watcher.until(lambda: not connection.connected)
            assert watcher.n_kept == 0
            await watcher.until(lambda: watcher.seen[-1] == set())
            assert watcher.seen == [{1}, set()]
            await asyncio.to_thread(victim.start)
            await watcher.until(lambda: watcher.seen[-1] == {0})
            write_all(victim.url, ids, 2)
            await watcher.until(lambda: watcher.seen[-1] == {2})
            assert all(1 not in seen for seen in watcher.seen[1:]), watcher.seen
            assert watcher.n_kept == 40
        finally:
            await connection.aclose()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(crash())


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_nothing_outlives_a_connection_that_redis_closed(
    redis_url: str, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """Rows change while nobody tells of it: after whatever the connection answers next, or fails to, they are new."""

    async def close(times: int) -> None:
        ids = [f"i{at}" for at in range(20)]
        write_all(redis_url, ids, 1)
        watcher = Watcher(redis_url, ids)
        connection = watcher.lookup.connection
        try:
            with connect(redis_url, DEADLINE_S) as client:
                admin: Any = client
                for version in range(2, 2 + times):
                    for _ in range(2):
                        await watcher.look()
                    assert watcher.n_kept == 40
                    assert admin.client_kill_filter(_type="normal", skipme=True) > 0
                    write_all(redis_url, ids, version)
                    with suppress(RedisConnectionError):
                        await connection.execute("PING")
                    assert await watcher.look() == {version}
        finally:
            await connection.aclose()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(close(10))


async def test_a_redis_that_hangs_is_not_trusted_for_long(victim: EmbeddedRedis) -> None:
    """Within a second and the timeout all is forgotten, although nothing was asked of Redis and nothing was closed."""
    ids = ["a", "b"]
    write_all(victim.url, ids, 1)
    watcher = Watcher(victim.url, ids)
    watcher.lookup.connection._timeout_s = 0.2
    try:
        assert await watcher.look() == await watcher.look() == {1}
        os.kill(victim.pid, signal.SIGSTOP)
        try:
            await watcher.until(lambda: watcher.seen[-1] == set())
            assert watcher.n_kept == 0
        finally:
            os.kill(victim.pid, signal.SIGCONT)
        write_all(victim.url, ids, 2)
        await watcher.until(lambda: watcher.seen[-1] == {2})
        assert all(1 not in seen for seen in watcher.seen[1:]), watcher.seen
    finally:
        await watcher.lookup.connection.aclose()


async def test_everything_is_forgotten_when_everything_is_deleted(redis_url: str) -> None:
    write_all(redis_url, ["a", "b"], 1)
    watcher = Watcher(redis_url, ["a", "b"])
    try:
        for version, command in enumerate(("FLUSHALL", "FLUSHDB"), 2):
            assert watcher.n_kept == 0 or await watcher.look() == {version - 1}
            await watcher.look()
            with connect(redis_url, DEADLINE_S) as client:
                client.execute_command(command)
            await watcher.lookup.connection.execute("PING")
            assert watcher.n_kept == 0
            assert await watcher.look() == {0}
            write_all(redis_url, ["a", "b"], version)
            await watcher.lookup.connection.execute("PING")
            assert await watcher.look() == {version}
    finally:
        await watcher.lookup.connection.aclose()


async def test_without_rows_redis_tracks_nothing(redis_url: str) -> None:
    """`mirror_rows=0`: no mirror, and no key that Redis would have to remember."""
    with connect(redis_url, DEADLINE_S) as client:
        admin: Any = client
        tracked = []
        for mirror_rows in (0, 1):
            lookup = Lookup.connect(racing()[0], redis_url, DEADLINE_S, mirror_rows)
            await reading(lookup, ["a", "b"], BASE_MS)
            info = await lookup.connection.execute("CLIENT", "TRACKINGINFO")
            tracked.append((len(lookup.mirrors), {*info[b"flags"]}, admin.info("stats")["tracking_total_keys"]))
            await lookup.connection.aclose()
    assert tracked == [(0, {b"off"}, 0), (2, {b"on", b"optin"}, 4)]


@pytest.mark.parametrize(("mirror_rows", "n_tracking"), [(0, 0), (10, 1)])
async def test_a_server_without_mirror_tracks_nothing(redis_url: str, mirror_rows: int, n_tracking: int) -> None:
    """The setting reaches the connection, and both answer alike."""
    plan = served.catalogue()
    rows = served.Rows(plan, redis_url, served.Clock())
    rows.write("clicks", [{"t": served.NOW_MS - 5_000, "user_id": "u", "item_id": "i", "price": 3.0}])
    asked = {"service": "ranking_v1", "user_id": "u", "item_ids": ["i", "j"]}
    async with served.served(served.settings_of(redis_url, mirror_rows=mirror_rows), plan, served.Clock()) as http:
        for _ in range(2):
            answer = (await http.post("/v1/features", json=asked)).json()
            assert [item["status"] for item in answer["items"]] == ["PRESENT", "NOT_FOUND"]
            assert served.values_of(answer)["item_activity__clicks_1h"] == 1
        assert rows.client.info("clients")["tracking_clients"] == n_tracking
