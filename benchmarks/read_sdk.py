"""`python -m benchmarks.read_sdk`: ranking requests by the Feast SDK, on our store and on Feast's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.feast_peer import FeastPeer
from benchmarks.harness import Benchmark, Options, Report, Series, alternate, main
from benchmarks.population import fill
from benchmarks.project import ROOT, Project, redis_server
from benchmarks.ranking import SERVICE, check_same, check_written, hit_rates


def run(options: Options, report: Report) -> None:
    """Measures the same call on both stores in turn, each time in a fresh process."""
    with ExitStack() as stack:
        project = stack.enter_context(Project())
        peer_redis = stack.enter_context(redis_server())
        population = fill(project.client, project.plan, *options.pick((100_000, 50_000), (500, 600)))
        report.note(population.describe())
        asked = population.requests(options.pick(1000, 20))
        peer = FeastPeer(project.folder / "peer", f"127.0.0.1:{peer_redis.port}", project.plan, SERVICE)
        with project.serve() as address:
            written = peer.write(address, asked)
            report.note(hit_rates(address, asked[:50], demand=not options.quick))
        report.note(f"{peer.describe()}; {len(asked):,} different requests, every value written and checked")
        requests = project.folder / "requests"
        requests.write_bytes(msgspec.msgpack.encode(asked))
        times = options.pick((5.0, 1.5), (0.5, 0.1))
        found = alternate(
            {
                "headrace": partial(_read, project.folder, project.environment(), requests, *times),
                "feast": partial(_read, peer.folder, {**os.environ, "PYTHONPATH": str(ROOT)}, requests, *times),
            },
            options,
        )
    for ours, theirs in zip(found["headrace"], found["feast"], strict=True):
        check_written(peer, written, theirs["first"])
        check_same(peer.plan, ours["first"], theirs["first"])
    series = {
        (side, name): Series.of(each[name] for each in measured)
        for side, measured in found.items()
        for name in ("p50_ms", "p99_ms")
    }
    report.note("each measurement in a fresh process, headrace and feast in turn")
    report.add("headrace", series["headrace", "p50_ms"], "ms p50", key="p50_ms", at_most=3)
    report.add("headrace", series["headrace", "p99_ms"], "ms p99", key="p99_ms")
    report.add("feast", series["feast", "p50_ms"], "ms p50", key="peer_p50_ms")
    report.add("feast", series["feast", "p99_ms"], "ms p99")
    ratio = series["feast", "p50_ms"] / series["headrace", "p50_ms"]
    report.add("times as fast, by p50", ratio, "times", key="ratio", at_least=10)


def _read(repo: Path, env: Mapping[str, str], requests: Path, seconds: float, warm_s: float) -> dict[str, Any]:
    argv = [sys.executable, "-W", "ignore", "-m", "benchmarks.sdk_client", "--repo", str(repo), "--service", SERVICE]
    argv += ["--requests", str(requests), "--seconds", str(seconds), "--warm", str(warm_s)]
    done = subprocess.run(
        argv, env={**env, "TMPDIR": str(requests.parent)}, capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode:
        msg = f"reading {repo} by the SDK failed: {done.stderr.strip()[-2000:]}"
        raise RuntimeError(msg)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


BENCHMARK: Final = Benchmark(
    name="read_sdk",
    work="Feast SDK, get_online_features(…).to_dict(), 1 user + 200 items, ranking_v1",
    peer="the same call on Feast's own Redis store",
    keys=("p50_ms", "p99_ms", "peer_p50_ms", "ratio"),
    run=run,
)

if __name__ == "__main__":
    main(BENCHMARK)
