"""`python -m benchmarks.read`: ranking requests over HTTP, against Feast's server and a bare FastAPI route."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import orjson
import pandas as pd

from benchmarks.feast_peer import FeastPeer
from benchmarks.harness import Benchmark, Options, Report, Series, alternate, largest, main, smallest
from benchmarks.load import Load, http_request, measure, write_requests
from benchmarks.population import Asked, fill
from benchmarks.project import ROOT, Project, redis_server, server
from benchmarks.ranking import JSON, NPY, SERVICE, check_equal, hit_rate, hit_rates, http, keys_read

# After Feast is set up by our own package: see registry/__init__.py.
from benchmarks.catalogues.batch import views  # isort: skip
import feast  # isort: skip

BATCH_SERVICE: Final = "ranking_batch_v1"
_UNITS: Final = ("requests/s", "ms p50", "ms p99")


class Way(NamedTuple):
    """A way to ask: a server's address, the requests to send, and for how long."""

    address: str
    requests: Path
    seconds: float


def run(options: Options, report: Report) -> None:
    """Measures npy, JSON and the mirror at 1 and 16 connections, in turn with `feast serve` and a bare route."""
    connections = options.pick((1, 16), (1, 2))
    with ExitStack() as stack:
        project = stack.enter_context(Project(definitions="benchmarks.catalogues.batch"))
        peers_redis = [stack.enter_context(redis_server()) for _ in range(2)]
        population = fill(project.client, project.plan, *options.pick((100_000, 50_000), (500, 600)))
        report.note(population.describe())
        asked = population.requests(options.pick(20_000, 200))
        # The peer answers a few requests a second: it never gets to more than these, in any of its rounds.
        of_peer = asked[: options.pick(400, 20)]
        write_batch(project, asked)
        plain = stack.enter_context(project.serve(mirror_rows=0))
        mirrored = stack.enter_context(project.serve())
        feasts = []
        for service, redis in zip((SERVICE, BATCH_SERVICE), peers_redis, strict=True):
            peer = FeastPeer(project.folder / service, f"127.0.0.1:{redis.port}", project.plan, service)
            written = peer.write(plain, of_peer)
            feasts.append((peer, stack.enter_context(peer.serve(dict(os.environ)))))
            report.note(f"{peer.describe()}; {len(of_peer)} different requests, every value written and checked")
            check_equal(plain, feasts[-1][1], peer, written, of_peer[:5])
        bare = stack.enter_context(bare_route(project.folder))
        report.note(hit_rates(plain, asked[:50], demand=not options.quick))

        npy = write_requests(project.folder / "npy", http(asked, NPY))
        json = write_requests(project.folder / "json", http(asked, JSON))
        batch = write_requests(project.folder / "batch", http(asked, NPY, BATCH_SERVICE))
        of_feast = [
            write_requests(
                project.folder / f"{peer.service}.requests",
                [http_request("POST", "/get-online-features", orjson.dumps(peer.request(each))) for each in of_peer],
            )
            for peer, _ in feasts
        ]
        seconds = options.pick(4.0, 0.3)
        ways = {
            "npy": Way(plain, npy, seconds),
            "JSON": Way(plain, json, seconds),
            "npy, mirror": Way(mirrored, npy, seconds),
            "npy, 20 batch features more": Way(plain, batch, seconds),
            "feast serve": Way(feasts[0][1], of_feast[0], options.pick(7.0, 0.3)),
            "feast serve, 20 batch features more": Way(feasts[1][1], of_feast[1], options.pick(7.0, 0.3)),
            "bare route": Way(bare, write_requests(project.folder / "bare", [http_request("GET", "/")]), seconds),
        }
        # Rows that are asked for often are in the mirror before it counts.
        measure(mirrored, npy, connections[-1], options.pick(6.0, 0.3), 0.1)
        found, keys = _measure(ways, connections, project.client, options)
        mirror = hit_rate(keys["npy"], keys["npy, mirror"], len(asked[0].item_ids))
        report.note(f"mirror of {project.settings.mirror_rows:,} rows, the default; {mirror}")
    _tell(report, connections, found)


def write_batch(project: Project, asked: Sequence[Asked]) -> None:
    """Writes the rows of both batch views for all that are asked for, by Feast's own call."""
    store = feast.FeatureStore(str(project.folder))
    store.config.online_store.redis_url = project.redis.url
    users, items = {each.user_id for each in asked}, {item for each in asked for item in each.item_ids}
    for seed, (view, key, ids) in enumerate((("user_batch", "user_id", users), ("item_batch", "item_id", items))):
        every = sorted(ids)
        frame = pd.DataFrame({key: every, **dict(views.columns(every, seed))})
        store.write_to_online_store(view, frame)


def bare_route(folder: Path) -> AbstractContextManager[str]:
    """The bare FastAPI route as a server of its own, for the length of a `with` block."""
    argv = [sys.executable, "-m", "benchmarks.bare"]
    return server("bare", argv, folder, {**os.environ, "PYTHONPATH": str(ROOT)}, ready="/")


def _measure(
    ways: Mapping[str, Way], connections: Sequence[int], client: Any, options: Options
) -> tuple[dict[str, list[Load]], dict[str, float]]:
    """Every way at every concurrency, by `way, connections`; and how many of our Redis's keys a request takes."""
    keys, sent = Counter[str](), Counter[str]()

    def measure_way(name: str, n: int) -> Load:
        before = keys_read(client)
        load = measure(*ways[name][:2], n, ways[name].seconds, options.pick(1.5, 0.2))
        keys[name] += keys_read(client) - before
        sent[name] += load.sent
        return load

    sides = {f"{name}, {n}": partial(measure_way, name, n) for n in connections for name in ways}
    return alternate(sides, options), {name: keys[name] / sent[name] for name in ways}


def _tell(report: Report, connections: Sequence[int], found: Mapping[str, list[Load]]) -> None:
    rps = {name: Series.of(load.rps for load in loads) for name, loads in found.items()}
    p50 = {name: Series.of(load.p50_ms for load in loads) for name, loads in found.items()}
    p99 = {name: Series.of(load.p99_ms for load in loads) for name, loads in found.items()}
    many = connections[-1]
    keys = {f"npy, {many}": ("rps", "p50_ms", "p99_ms"), f"feast serve, {many}": ("peer_rps", None, "peer_p99_ms")}
    for name in found:
        what = f"{name} connection{'' if name.endswith(' 1') else 's'}"
        for series, unit, key in zip((rps, p50, p99), _UNITS, keys.get(name, (None,) * 3), strict=True):
            report.add(what, series[name], unit, key=key)

    per_request = largest(*(rps[f"npy, {n}"] / rps[f"npy, 20 batch features more, {n}"] for n in connections))
    report.add(
        "20 batch features more, npy: the time of one without", per_request, "times", key="ratio_batch", at_most=1.3
    )

    def against_feast(figures: Mapping[str, Series], way: str) -> list[Series]:
        return [figures[f"{way}, {n}"] / figures[f"feast serve, {n}"] for n in connections]

    for what, way, key, limit in (
        ("npy", "npy", "ratio_rps", 60),
        ("JSON", "JSON", "ratio_json", 40),
        ("npy with mirror", "npy, mirror", "ratio_mirror", 120),
    ):
        lower = smallest(*against_feast(rps, way))
        report.add(f"{what} / feast, the lower of both", lower, "times", key=key, at_least=limit)
    more = ", 20 batch features more"
    batch = smallest(*(rps[f"npy{more}, {n}"] / rps[f"feast serve{more}, {n}"] for n in connections))
    report.add(f"npy / feast{more}, the lower of both", batch, "times", key="ratio_batch_rps", at_least=60)
    higher = largest(*against_feast(p99, "npy"))
    report.add("p99 npy / p99 feast, the higher of both", higher, "times", key="ratio_p99", at_most=1 / 40)
    ratio = rps[f"npy, {many}"] / rps[f"bare route, {many}"]
    report.add(f"npy / bare route, {many} connections", ratio, "times", key="ratio_bare", at_least=0.12)


BENCHMARK: Final = Benchmark(
    name="read",
    work="HTTP, 1 user + 200 items, ranking_v1, one server process, 1 and 16 connections",
    peer="feast serve on Feast's own Redis store; a bare FastAPI route",
    keys=(
        *("rps", "p50_ms", "p99_ms", "peer_rps", "peer_p99_ms"),
        *("ratio_rps", "ratio_p99", "ratio_json", "ratio_mirror", "ratio_bare"),
        *("ratio_batch", "ratio_batch_rps"),
    ),
    run=run,
)

if __name__ == "__main__":
    main(BENCHMARK)
