"""One run: a log, a Redis, a clock, and workers of whom anything may happen between any two steps, all from one seed.

The real `PartitionReader`, `Decoder`, `Lane` and `Writer` are driven as the dataflow drives them: a worker reads the
partitions `(topic + number) % workers`, decodes chunks, and hands their parts to the lanes, each with one worker; a
lane starts a commit and goes on while it is on its way. Whether the answer of Redis arrives, and what others do
meanwhile, is drawn; so is how often each kind of fault happens in a run.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from copy import copy
from functools import cache, partial
from itertools import chain
from typing import Any, Final

from confluent_kafka import KafkaError, KafkaException
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from structlog.testing import capture_logs

from config.settings import Settings
from features.evolve import as_declared, succeed
from store.commit import FencedError, ShardCommit, Writer, initialise, read_record, taken_by_all
from store.forgotten import count_orders, order
from store.keys import Keyspace
from store.layouts import Layouts
from streams.chunk import Chunk, Part, Partition
from streams.decode import Decoder
from streams.kafka import PartitionReader, records_of
from streams.lane import Commit, Committer, GapError, Lane
from tests.simulation.marketplace import (
    BASE_MS,
    HORIZON_MS,
    IDS,
    PARTITIONS,
    SKEW_MS,
    a_log,
    differences,
    plan_of,
    varied,
)
from tests.simulation.store import Client, Command, SimulatedRedis, Values
from tests.support.log import Clock, Consumer, Log, Message

ENTITIES: Final = ("item", "seller", "user")
TOPICS: Final = ("clicks", "likes")
_STEPS = 90
_DRAIN_ROUNDS_MAX = 100
_ZOMBIES_MAX = 2
_STARTS_MAX = 9
_DEATHS = (FencedError, GapError, KafkaException, RedisConnectionError, RedisTimeoutError)
"""What ends a worker in production, too; anything else is a mistake."""


class Crash(BaseException):
    """The process is gone."""


class Faults:
    """How likely each fault is in this run; some don't occur in it at all."""

    def __init__(self, rng: random.Random) -> None:
        def chance(*values: float) -> float:
            return rng.choice((0.0, *values))

        self.write = chance(0.05, 0.2, 0.4)
        """A commit's answer is lost, or the commit is, or it is late, or its connection breaks half-way."""
        self.read = chance(0.005, 0.02)
        self.crash = chance(0.005, 0.03)
        """The process dies at a call of Redis, before or after it."""
        self.between = chance(0.02, 0.1)
        """Somebody else acts between two commands of a process."""
        self.kill = chance(0.01, 0.03)
        self.restart = chance(0.01, 0.03)
        """Others are started while the old ones live on."""
        self.zombie = chance(0.1, 0.3)
        self.rollback = chance(0.005, 0.03)
        self.rollback_at_start = chance(0.03, 0.1)
        """Readers and lanes of the same start then find different records."""
        self.stale = chance(0.02, 0.1)
        """A lagging replica answers what is read, and then the old master is back."""
        self.forget_scripts = chance(0.02)
        self.redeliver = chance(0.1)
        self.apply = 0.0
        """Another plan is applied: processes that start run it, beside those of the one before."""
        self.retention = chance(0.3)
        self.forget = 0.0
        """Somebody is to be forgotten."""


class World:
    """Everything there is in a run of a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.faults = Faults(rng)
        # By a generator of its own, and in a third of all runs: what is rare elsewhere stays as likely.
        self._applying = random.Random(seed + 1)
        self.faults.apply = self._applying.choice((0.0, 0.0, 0.05))
        self._forgetting = random.Random(seed + 2)
        self.faults.forget = self._forgetting.choice((0.0, 0.0, 0.05))
        self.counts: Counter[str] = Counter()
        self.shards = rng.randint(2, 3)
        self.clock = Clock(BASE_MS - 1_000)
        self.redis = SimulatedRedis(lambda: self.clock.now_ms)
        self.direct = Client(lambda commands: [self.redis.execute(each) for each in commands])
        """Of the test: nothing goes wrong on it."""
        self.records = a_log(rng)
        self._arriving = deque(self.records)
        self.log = Log({each: [r.message for r in self.records if r.partition == each] for each in PARTITIONS})
        self.log.rng = rng
        for partition, messages in self.log.records.items():
            self.log.low[partition] = self.log.high[partition] = messages[0].offset() if messages else 0
        initialise(self.direct, Keyspace("sim", self.shards), ENTITIES)  # type: ignore[arg-type]  # as much as is used
        self.plans = [plan_of(self.shards)]
        self.snapshots: list[Values] = [self.redis.snapshot()]
        self.late: list[Sequence[Command]] = []
        self.workers: list[Worker] = []
        self.zombies: list[Worker] = []
        self.starts = 0
        self._depth = 0

    # --- the run

    def run(self) -> list[str]:
        """What is wrong at the end: nothing."""
        for _ in range(_STEPS):
            self.step()
        self.faults = Faults(_NoChance())
        self._drain()
        return differences(self.records, self.direct.mget, self.plans, self.clock.now_ms + 5)

    def step(self) -> None:
        """Anything may happen."""
        rng, faults = self.rng, self.faults
        if rng.random() < 0.15:
            self.pass_ms(rng.choice([1, 20, 300, 1_100, 5_000, 30_000, 400_000]))
        if rng.random() < 0.05:
            self.snapshots = [*self.snapshots[-3:], self.redis.snapshot()]
        if self.late and rng.random() < 0.2:
            self._late_arrives()
        if rng.random() < faults.rollback:
            self.roll_back()
        if rng.random() < faults.forget_scripts:
            self.redis.execute(("SCRIPT", "FLUSH"))
        if rng.random() < faults.retention:
            self._delete_old_records()
        if self.workers and rng.random() < faults.kill:
            self.dies(rng.choice(self.workers), "kill")
        if self._applying.random() < faults.apply:
            self._apply()
        if self._forgetting.random() < faults.forget:
            self.counts["forget"] += 1
            entity = self._forgetting.choice(ENTITIES)
            ids = self._forgetting.choices(IDS[entity], k=2)
            order(self.direct, "sim", entity, ids, self.clock.now_ms + self._forgetting.choice([0, 0, -SKEW_MS]))
        is_broken = len(self.workers) < (self.workers[0].n_workers if self.workers else 1)
        if rng.random() < (0.3 if is_broken else faults.restart if self.starts < _STARTS_MAX else 0):
            self._start()
        for worker in self.rng.sample(self.workers, len(self.workers)):
            worker.step()
        for zombie in list(self.zombies):
            if rng.random() < faults.zombie:
                zombie.step()

    def _apply(self) -> None:
        """Another plan, or one that was there before; it knows what Redis says of those before it."""
        self.counts["apply"] += 1
        applied, rng = self.plans[-1], self._applying
        declared = as_declared(rng.choice(self.plans)) if rng.random() < 0.2 else varied(self.shards, rng)
        records = [read_record(self.direct, key) for key in Keyspace.of(applied).commit_records(ENTITIES)]  # type: ignore[arg-type]  # as much as is used
        plan = succeed(applied, declared, taken_by_all(records, applied.needs), self.clock.now_ms - 2 * SKEW_MS)
        if plan.number > applied.number:
            self.plans.append(plan)

    def pass_ms(self, ms: int) -> None:
        """Time passes, and records that were sent meanwhile arrive."""
        self.clock.now_ms += ms
        while self._arriving and self._arriving[0].arrives_ms <= self.clock.now_ms:
            record = self._arriving.popleft()
            self.log.high[record.partition] = record.message.offset() + 1

    def between(self, worker: Worker) -> None:
        """Others act, or Redis comes back with less, while a worker is in the midst of something."""
        if self._depth < 2 and self.rng.random() < self.faults.between:
            self._depth += 1
            others = [each for each in (*self.workers, *self.zombies) if not each.is_busy]
            if others and self.rng.random() < 0.8:
                self.rng.choice(others).step()
            elif self.late and self.rng.random() < 0.5:
                self._late_arrives()
            elif self.faults.rollback and self.rng.random() < 0.3:
                self.roll_back()
            self._depth -= 1

    def dies(self, worker: Worker, why: str) -> None:
        """A process is gone, with all that it had not committed."""
        self.counts[why] += 1
        worker.is_dead = True
        self.workers = [each for each in self.workers if each is not worker]
        self.zombies = [each for each in self.zombies if each is not worker]

    def _start(self, chunk_events: Sequence[int] = (1, 3, 3, 10)) -> None:
        """New workers in place of the old, which may live on without knowing."""
        self.starts += 1
        self.counts["start"] += 1
        zombies = [*self.zombies, *self.workers] if self.faults.zombie else []
        self.zombies = self.rng.sample(zombies, min(len(zombies), _ZOMBIES_MAX))
        self.counts["zombie"] += len(self.zombies)
        n_workers = self.rng.randint(1, 3)
        lanes = max(n_workers, self.rng.randint(1, 4))
        queues = Queues(lanes)
        size = self.rng.choice(chunk_events)
        cache_bytes_max = self.rng.choice([0, 0, 2_000, 1_000_000])
        self.workers = [Worker(self, at, n_workers, queues, size, cache_bytes_max) for at in range(n_workers)]

    def _drain(self) -> None:
        """Nothing goes wrong any more: the workers there are, or new ones, bring every shard up to the log's end.

        Workers whom Redis has left behind must notice by themselves, and make room for others.
        """
        while self.late:
            self._late_arrives()
        self.zombies = [each for each in self.zombies if not each.starting]
        self.faults.zombie = 1.0  # Those that there are stay.
        self.pass_ms(max(0, self.records[-1].arrives_ms - self.clock.now_ms) + 1)
        renewed = self.rng.random() < 0.5 or any(each.starting for each in self.workers)
        mine: list[Worker] = [] if renewed else list(self.workers)
        self.workers, fresh = mine, not mine
        for _ in range(_DRAIN_ROUNDS_MAX):
            if not mine or len(mine) < mine[0].n_workers or any(each.is_dead for each in mine):
                self.workers = [each for each in self.workers if not each.starting]
                self._start((1_000,))
                fresh, mine = True, list(self.workers)
            self.pass_ms(1_100)
            for worker in mine:
                worker.everything()
            for zombie in self.zombies:
                zombie.step()
            dead = [each.why for each in mine if each.is_dead]
            assert not (fresh and dead), f"a worker without faults stopped: {dead}"
            if self._is_drained():
                return
        message = "not drained"
        raise AssertionError(message)

    def _is_drained(self) -> bool:
        ends = {partition: many[-1].offset() + 1 for partition, many in self.log.records.items() if many}
        at = self._positions(self.direct.get)
        keys = Keyspace("sim", self.shards).commit_records(ENTITIES)
        orders = [read_record(self.direct, key).orders or 0 for key in keys]  # type: ignore[arg-type]  # as much as is used
        carried_out = min(orders) == count_orders(self.direct, "sim")
        return carried_out and all(each is not None and each.next >= ends.get(where, 0) for where, each in at)

    def _positions(self, get: Callable[[bytes], bytes | None]) -> list[tuple[Partition, Any]]:
        """Of all shards, by partition."""
        keys = Keyspace("sim", self.shards).commit_records(ENTITIES)
        found: Any = Client(lambda commands: [get(command[1]) for command in commands])
        records = [read_record(found, key) for key in keys]
        return [(where, record.position(*where)) for record in records for where in PARTITIONS]

    # --- faults of Redis and the broker

    def _late_arrives(self) -> None:
        self.counts["late"] += 1
        for command in self.late.pop(self.rng.randrange(len(self.late))):
            self.redis.execute(command)

    def roll_back(self) -> None:
        """To an earlier state: all of it, or what one node of a cluster has."""
        self.counts["rollback"] += 1
        number = self.rng.choice([-1, -1, *range(len(self.snapshots))]) % len(self.snapshots)
        old = self.snapshots[number]
        if self.rng.random() < 0.5:
            node = self.rng.randrange(2)
            now = self.redis.snapshot()
            old = {key: each for key, each in now.items() if _node_of(key) != node} | {
                key: each for key, each in old.items() if _node_of(key) == node
            }
        else:
            self.snapshots = self.snapshots[: number + 1]
        self.redis.restart(old)

    def _delete_old_records(self) -> None:
        """Retention: only of what nobody needs any more, whatever Redis comes back with."""
        floor = dict(self.log.high)
        self.snapshots = self.snapshots[-1:]
        for values in (*self.snapshots, self.redis.snapshot()):
            for where, position in self._positions(lambda key, own=values: own[key][0]):  # type: ignore[misc]  # bound now
                floor[where] = min(floor[where], position.horizon if position else 0)
        for where, offset in floor.items():
            if offset > self.log.low[where] and self.rng.random() < 0.5:
                self.counts["retention"] += 1
                self.log.low[where] = offset


class Queues:
    """Parts on their way to lanes: in order within a partition. They are lost with the process that they go to."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        self.of = [{partition: deque[Part]() for partition in PARTITIONS} for _ in range(lanes)]
        self.delivered: list[list[Part]] = [[] for _ in range(lanes)]


class Worker:
    """One process of the stream."""

    def __init__(
        self, world: World, number: int, n_workers: int, queues: Queues, chunk_events: int, cache_bytes_max: int
    ) -> None:
        self._world = world
        self.n_workers = n_workers
        self._queues = queues
        self._client: Any = Client(self._roundtrip)
        self.is_busy = self.is_dead = False
        self.why = ""
        self._readers: list[PartitionReader] = []
        self._chunks: list[Chunk] = []
        self._lanes: dict[int, Lane] = {}
        self._commits: dict[int, Later] = {}
        self._plan, plans = world.plans[-1], world.plans
        self._layouts = Layouts(self._plan, lambda first, last: plans[first : last + 1])
        self._skew_ms = world.rng.choice([0, 0, -SKEW_MS, SKEW_MS])
        mine = [each for each in PARTITIONS if (TOPICS.index(each.topic) + each.number) % n_workers == number]
        own_lanes = range(number, queues.lanes, n_workers)
        self.starting: list[Callable[[], None]] = [
            *(partial(self._open, each, chunk_events) for each in mine),
            *(partial(self._claim, lane, cache_bytes_max) for lane in own_lanes),
        ]
        world.rng.shuffle(self.starting)
        self._decoder = _decoder(world.shards, queues.lanes)

    def clock(self) -> float:
        """The time of this machine."""
        return (self._world.clock.now_ms + self._skew_ms) / 1000

    def _open(self, partition: Partition, chunk_events: int) -> None:
        consumer = _Consumer(self._world.log)
        reader = PartitionReader(
            _settings(chunk_events), partition, partial(records_of, self._plan, self._client), self.clock, consumer
        )
        assert reader._lost is None, f"records lost: {reader._lost}"
        self._readers.append(reader)

    def _claim(self, lane: int, cache_bytes_max: int) -> None:
        writer = Writer(self._client, Keyspace("sim", self._world.shards), self._sleep, self.clock, self.clock)
        writer.token = f"{self._world.rng.getrandbits(64):016x}"
        self._lanes[lane] = Lane(
            self._plan,
            lane,
            self._queues.lanes,
            self._client,
            self.clock,
            layouts=self._layouts,
            cache_bytes_max=cache_bytes_max,
            writer=writer,
            committer=lambda commit: self._commits.setdefault(lane, Later(commit)),
        )

    def step(self) -> None:
        """One step of the worker, which may be its last."""
        if self.starting and self._world.rng.random() < self._world.faults.rollback_at_start:
            self._world.roll_back()
        if not self.starting:
            choices = [self._read, self._read, self._decode, self._deliver, self._deliver, self._finish]
            self._try(self._world.rng.choice(choices))
        else:
            self._try(self.starting.pop())

    def everything(self) -> None:
        """All that there is to do."""
        steps = [*self.starting] or [self._read, self._decode, self._deliver, self._finish]
        self.starting.clear()
        for step in steps:
            self._try(step)

    def _try(self, action: Callable[[], None]) -> None:
        if self.is_dead or self.is_busy:
            return
        self.is_busy = True
        try:
            action()
        except (*_DEATHS, Crash) as error:
            self.why = f"{type(error).__name__}: {error}"
            self._world.dies(self, type(error).__name__)
        finally:
            self.is_busy = False

    def _read(self) -> None:
        if len(self._chunks) < 4:
            chunks = [reader.next_chunk() for reader in self._readers]
            self._chunks += [chunk for chunk in chunks if chunk]

    def _decode(self) -> None:
        """Some of what was read; one chunk a partition at a time, as the source gives them."""
        mine: list[Chunk] = []
        while self._chunks and self._chunks[0].partition not in {each.partition for each in mine}:
            mine.append(self._chunks.pop(0))
        for chunk, decoded in zip(mine, self._decoder.decode_all(mine) if mine else (), strict=True):
            for queues, part in zip(self._queues.of, decoded.parts, strict=True):
                queues[chunk.partition].append(part)

    def _deliver(self) -> None:
        """Starts a commit of some of what waits for each lane: in order within a partition, in any order among them."""
        rng = self._world.rng
        for lane, own in self._lanes.items():
            waiting = [queue for queue in self._queues.of[lane].values() if queue]
            rng.shuffle(waiting)
            parts = list(chain.from_iterable(_some(rng, queue) for queue in waiting))
            delivered = self._queues.delivered[lane]
            if delivered and rng.random() < self._world.faults.redeliver:
                self._world.counts["redelivered"] += 1
                parts.insert(0, rng.choice(delivered))
            if parts:
                delivered += parts
                own.start(parts)

    def _finish(self) -> None:
        for commits in self._commits.values():
            commits.carry_out()

    # --- between the worker and Redis

    def _sleep(self, duration_s: float) -> None:
        self._world.pass_ms(round(duration_s * 1000))
        for _ in range(3):
            self._world.between(self)

    def _roundtrip(self, commands: Sequence[Command]) -> list[Any]:
        world, rng = self._world, self._world.rng
        world.between(self)
        if self.is_dead or rng.random() < world.faults.crash:
            if rng.random() < 0.5:
                self._execute(commands)
            raise Crash
        commits = commands[0][0] == "EVALSHA"
        if commits and rng.random() < world.faults.write:
            fault = rng.choice(["lost", "unanswered", "broken", "late"])
            world.counts[fault] += 1
            if fault == "late":
                world.late.append(commands)
            if fault in ("unanswered", "broken"):
                self._execute(commands if fault == "unanswered" else commands[: rng.randrange(len(commands))])
                raise RedisConnectionError(fault)
            raise RedisTimeoutError(fault)
        if not commits and rng.random() < world.faults.read:
            world.counts["unread"] += 1
            msg = "unread"
            raise RedisTimeoutError(msg)
        if not commits and rng.random() < world.faults.stale:
            world.counts["stale"] += 1
            now = world.redis.snapshot()
            world.redis.restart(rng.choice(world.snapshots))
            answers = [world.redis.execute(each) for each in commands]
            world.redis.restart(now)
            return answers
        return self._execute(commands)

    def _execute(self, commands: Sequence[Command]) -> list[Any]:
        """One after the other: others may act between them."""
        answers = []
        for command in commands:
            answers.append(self._world.redis.execute(command))
            self._world.between(self)
        return answers


class Later(Committer):
    """Commits that are carried out when the driver says so, or when one is waited for."""

    def __init__(self, commit: Commit) -> None:
        self._commit = commit
        self._last: _Deferred | None = None

    def submit(self, commits: Sequence[ShardCommit], confirmed: object = None) -> _Deferred:
        self._last = _Deferred(partial(self._commit, commits))
        return self._last

    def carry_out(self) -> None:
        """What was submitted last, unless it is done."""
        if self._last is not None:
            self._last.carry_out()


class _Deferred(Future[Any]):
    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__()
        self._action: Callable[[], Any] | None = action

    def carry_out(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            try:
                self.set_result(action())
            except BaseException as error:
                self.set_exception(error)
                if isinstance(error, Crash):
                    raise

    def result(self, timeout: float | None = None) -> Any:
        self.carry_out()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self.carry_out()
        return super().exception(timeout)


class _Consumer(Consumer):
    """As Kafka with `auto.offset.reset=error`: what retention has taken can't be passed over unnoticed."""

    def consume(self, count: int, timeout: float) -> list[Message]:
        if self._at < self._log.low[self._partition]:
            raise KafkaException(KafkaError(KafkaError._AUTO_OFFSET_RESET))
        return super().consume(count, timeout)


class _NoChance(random.Random):
    def choice(self, seq: Any) -> Any:
        return seq[0]


@cache
def _settings(chunk_events: int) -> Settings:
    return Settings(chunk_events=chunk_events)


@cache
def _compiled(shards: int, lanes: int) -> Decoder:
    return Decoder(plan_of(shards), lanes, HORIZON_MS)


def _decoder(shards: int, lanes: int) -> Decoder:
    """A new one: but for its contracts, which take longer to compile than a run does, and don't change."""
    decoder = copy(_compiled(shards, lanes))
    decoder._dedupes = {}
    return decoder


def _node_of(key: bytes) -> int:
    """By the hash tag, as in Redis Cluster: all keys of a shard are on one node."""
    return sum(key[: key.index(b"}")]) % 2


def _some(rng: random.Random, queue: deque[Part]) -> list[Part]:
    return [queue.popleft() for _ in range(rng.randint(0, len(queue)))]


def simulate(seed: int) -> tuple[list[str], Counter[str]]:
    """What is wrong after a run of the seed, and how often each fault happened."""
    world = World(seed)
    with capture_logs():
        try:
            wrong = world.run()
        except Exception as error:  # noqa: BLE001  # whatever it is, the seed is to be told
            wrong = [f"{type(error).__name__}: {error}"]
    return wrong, world.counts
