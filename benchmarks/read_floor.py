"""`python -m benchmarks.read_floor`: a ranking request in process, against a bare MGET of its keys."""

from __future__ import annotations

import gc
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import redis
import uvloop

from benchmarks.harness import Benchmark, Options, Report, Series, main, say
from benchmarks.population import Asked, fill
from benchmarks.project import Project
from benchmarks.ranking import SERVICE, hit_rate, keys_read
from serving import wire
from serving.lookup import Lookup, pairs_of
from store.keys import Keyspace
from store.layouts import Layouts
from store.read import Request


@dataclass(frozen=True)
class Path:
    """What the server does for a request between its JSON and its answer; and the keys that it reads for it."""

    ask: Callable[[Asked], Awaitable[bytes]]
    keys: Callable[[Asked], list[bytes]]


@asynccontextmanager
async def in_process(project: Project, mirror_rows: int) -> AsyncIterator[Path]:
    """The server's own path, in this process: the only place here that knows how the server does it."""
    lookup = Lookup.connect(project.plan, project.redis.url, 60, mirror_rows)
    lookup.warm_up()
    program = lookup.service(SERVICE)
    keyspace, layouts = Keyspace.of(project.plan), Layouts(project.plan)
    try:

        async def ask(asked: Asked) -> bytes:
            ids = {"user": [asked.user_id], "item": asked.item_ids}
            now_ms = time.time_ns() // 1_000_000
            answer = await lookup.read(program, ids, pairs_of(len(asked.item_ids)), now_ms)
            return wire.ranking_npy(answer)

        def keys(asked: Asked) -> list[bytes]:
            ids = {"user": pa.array([asked.user_id]), "item": pa.array(asked.item_ids)}
            wanted = tuple((bundle, ids[bundle.entity]) for bundle in program.bundles)
            return list(Request(keyspace, layouts, wanted).keys)

        yield Path(ask, keys)
    finally:
        await lookup.connection.aclose()


def run(options: Options, report: Report) -> None:
    """Measures blocks of requests in turn: the floor, our path, and our path with the mirror."""
    with Project() as project:
        population = fill(project.client, project.plan, *options.pick((100_000, 50_000), (500, 600)))
        report.note(population.describe())
        asked = population.requests(options.pick(10_000, 100))
        uvloop.run(_measure(project, asked, options, report))


async def _measure(project: Project, asked: Sequence[Asked], options: Options, report: Report) -> None:
    mirror_rows = project.settings.mirror_rows
    floor_client: Any = redis.Redis.from_url(project.redis.url)
    async with in_process(project, 0) as plain, in_process(project, mirror_rows) as mirrored:
        keys = [plain.keys(each) for each in asked]
        await _check(project.client, plain, mirrored, asked[0], len(keys[0]))
        for each in asked[: options.pick(5000, 100)]:
            await mirrored.ask(each)
            await plain.ask(each)
        gc.collect()

        async def floor(at: int) -> None:
            floor_client.mget(keys[at])

        async def ours(at: int) -> None:
            await plain.ask(asked[at])

        async def mirror(at: int) -> None:
            await mirrored.ask(asked[at])

        sides = {"floor": floor, "ours": ours, "mirror": mirror}
        medians: dict[str, list[float]] = {name: [] for name in sides}
        blocks = options.pick(30, 3)
        block = options.pick(50, 5)
        read_by_mirror = place = 0
        for number in range(options.rounds):
            say(f"round {number + 1} of {options.rounds}: {blocks} blocks of {block} requests, each on every side")
            took_s: dict[str, list[float]] = {name: [] for name in sides}
            for turn in range(blocks):
                chosen = [(place + at) % len(asked) for at in range(block)]
                place += block
                # Who comes first finds the keys cold, so each does in its turn.
                for name in (list(sides) * 2)[turn % 3 : turn % 3 + 3]:
                    before = keys_read(project.client)
                    for at in chosen:
                        began = time.perf_counter()
                        await sides[name](at)
                        took_s[name].append(time.perf_counter() - began)
                    if name == "mirror":
                        read_by_mirror += keys_read(project.client) - before
            for name, values in took_s.items():
                medians[name].append(float(np.median(values)) * 1000)
    floor_client.close()
    with_mirror = read_by_mirror / (options.rounds * blocks * block)
    report.note(f"one process on uvloop, blocks of {block} requests on each side in turn")
    report.note(
        f"mirror of {mirror_rows:,} rows, the default; {hit_rate(len(keys[0]), with_mirror, len(asked[0].item_ids))}"
    )
    series = {name: Series.of(values) for name, values in medians.items()}
    report.add("from ids to npy matrix", series["ours"], "ms p50", key="p50_ms")
    report.add("from ids to npy matrix, mirror", series["mirror"], "ms p50")
    report.add("bare MGET of the same keys", series["floor"], "ms p50", key="floor_p50_ms")
    report.add("ours / floor", series["ours"] / series["floor"], "times", key="ratio", at_most=1.8)
    report.add("with mirror / floor", series["mirror"] / series["floor"], "times", key="mirror_ratio", at_most=0.75)


async def _check(client: Any, plain: Path, mirrored: Path, asked: Asked, n_keys: int) -> None:
    """Raises RuntimeError unless our path reads as many keys as the floor does, and the mirror answers the same."""
    before = keys_read(client)
    answers = [await plain.ask(asked)]
    read = keys_read(client) - before
    if read != n_keys:
        msg = f"a request reads {read} keys, but the floor {n_keys}: they are not the same"
        raise RuntimeError(msg)
    answers += [await mirrored.ask(asked) for _ in range(3)]
    first, *others = (np.load(io.BytesIO(answer)) for answer in answers)
    for other in others:
        # A little time passes between the answers, and decayed features with it.
        np.testing.assert_allclose(other, first, rtol=1e-3, equal_nan=True)


BENCHMARK: Final = Benchmark(
    name="read_floor",
    work="1 user + 200 items, ranking_v1, in process, from ids to matrix",
    peer="bare redis-py MGET (hiredis) of the same keys in the same process, no decoding",
    keys=("p50_ms", "floor_p50_ms", "ratio", "mirror_ratio"),
    run=run,
)

if __name__ == "__main__":
    main(BENCHMARK)
