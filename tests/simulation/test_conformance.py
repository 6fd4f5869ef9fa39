"""The simulated Redis is as the real one: the same commands, the same answers, the same keys left."""

from __future__ import annotations

import random
import time
from typing import Any

import redis
from redis.exceptions import NoScriptError, ResponseError

from store.commit import _COMMIT_LUA
from store.connect import connect
from tests.simulation.store import Client, Command, SimulatedRedis
from tests.support.effort import effort

KEYS = [f"{{t:user:{shard}}}:{name}".encode() for shard in range(2) for name in ("commit", "a:1", "a:2", "b:{}\0")]
LIST = b"{t}:forget"
VALUES = [b"", b"x", b"\x00\xff\r\n", b"1", b"record one", b"record two"]
ROUNDS = effort(500, 1_500)


def test_random_commands_do_the_same_as_on_a_real_redis(redis_url: str) -> None:
    """Commits that are right, stale or without a record, rows that are deleted, expired or new, forgotten scripts."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    now_ms = time.time_ns() // 1_000_000
    simulated = SimulatedRedis(lambda: now_ms)
    ours: Any = Client(lambda commands: [simulated.execute(each) for each in commands])
    seen: set[str] = set()
    with connect(redis_url, 5) as theirs:
        sha = ours.script_load(_COMMIT_LUA)
        assert theirs.script_load(_COMMIT_LUA) == sha
        for _ in range(ROUNDS):
            if rng.random() < 0.05:
                assert theirs.script_flush() == simulated.execute(("SCRIPT", "FLUSH"))
            elif rng.random() < 0.1:
                assert theirs.script_load(_COMMIT_LUA) == ours.script_load(_COMMIT_LUA)
            batch = [a_command(rng, sha, theirs, now_ms) for _ in range(rng.randint(1, 4))]
            answers = [sent(client, batch) for client in (theirs, ours)]
            assert answers[0] == answers[1], batch
            seen |= {
                f"{each[0]} {getattr(answer, '__name__', answer)}"
                for each, answer in zip(batch, answers[0], strict=True)
            }
            for words in (("RPUSH", LIST, rng.choice(VALUES)), ("LLEN", LIST), ("LRANGE", LIST, rng.randrange(9), -1)):
                assert theirs.execute_command(*words) == ours.execute_command(*words), words
            keys = rng.sample(KEYS, 3)
            assert theirs.mget(keys) == ours.mget(keys)
            assert theirs.get(keys[0]) == ours.get(keys[0])
            left = simulated.snapshot()
            assert sorted(left) == sorted(theirs.keys("*"))
            for key, (value, expire_at_ms) in left.items():
                assert key == LIST or theirs.get(key) == value
                lives_ms: Any = theirs.pttl(key)
                assert (lives_ms == -1) == (expire_at_ms is None)
                # What is left of it was looked up a while after `now_ms`.
                elapsed_ms = time.time_ns() // 1_000_000 - now_ms
                assert expire_at_ms is None or 0 <= expire_at_ms - now_ms - lives_ms <= elapsed_ms + 1
    for each in ("EVALSHA 1", "EVALSHA 0", "EVALSHA NoScriptError", "SET None", "SET True", "DEL 0", "DEL 1"):
        assert any(one.startswith(each) for one in seen), (each, seen)


def a_command(rng: random.Random, sha: str, theirs: redis.Redis, now_ms: int) -> Command:
    """A command of the stream or of those that tamper with its keys."""

    def expires_ms() -> int:
        """Long past, or far ahead: the two clocks are not quite the same."""
        return rng.choice([1, now_ms - 3_600_000, now_ms + 3_600_000, now_ms + 90 * 86_400_000])

    kind = rng.random()
    if kind < 0.15:
        return "SET", rng.choice(KEYS), rng.choice(VALUES), "NX"
    if kind < 0.25:
        return "SET", rng.choice(KEYS), rng.choice(VALUES), "PXAT", expires_ms()
    if kind < 0.4:
        return "DEL", *rng.choices(KEYS, k=rng.randint(1, 2))
    record, *rows = rng.sample(KEYS, rng.randint(1, len(KEYS)))
    stored: Any = theirs.get(record)
    expected = stored if stored is not None and rng.random() < 0.7 else rng.choice(VALUES)
    arguments = [each for _ in rows for each in (rng.choice(VALUES), expires_ms())]
    return "EVALSHA", sha, 1 + len(rows), record, *rows, expected, rng.choice(VALUES), *arguments


def sent(client: Any, batch: list[Command]) -> list[Any]:
    """The answers to a pipeline; of an error its kind."""
    pipeline = client.pipeline(transaction=False)
    for each in batch:
        pipeline.execute_command(*each)
    answers = pipeline.execute(raise_on_error=False)
    for each in answers:
        assert not isinstance(each, ResponseError) or isinstance(each, NoScriptError), each
    return [NoScriptError if isinstance(each, NoScriptError) else each for each in answers]
