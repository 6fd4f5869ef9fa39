"""`python -m benchmarks.read_one`: one user's features over HTTP, against Feast's server and a bare FastAPI route."""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import Final

import orjson

from benchmarks.feast_peer import FeastPeer
from benchmarks.harness import Benchmark, Options, Report, Series, alternate, main
from benchmarks.load import http_request, measure, write_requests
from benchmarks.population import fill
from benchmarks.project import Project, redis_server
from benchmarks.ranking import SERVICE, check_users
from benchmarks.read import bare_route

CONNECTIONS: Final = 8


def run(options: Options, report: Report) -> None:
    """Measures `GET /v1/entities/user/…` in turn with `feast serve` and a bare route, 8 connections each."""
    with ExitStack() as stack:
        project = stack.enter_context(Project())
        peer_redis = stack.enter_context(redis_server())
        population = fill(project.client, project.plan, *options.pick((100_000, 50_000), (500, 600)))
        report.note(population.describe())
        # Requests that only ask for the user.
        asked = population.requests(options.pick(20_000, 200), items_each=0)
        of_peer = asked[: options.pick(10_000, 100)]
        peer = FeastPeer(
            project.folder / "peer", f"127.0.0.1:{peer_redis.port}", project.plan, SERVICE, entities=("user",)
        )
        ours = stack.enter_context(project.serve())
        written = peer.write(ours, of_peer)
        feast = stack.enter_context(peer.serve(dict(os.environ)))
        bare = stack.enter_context(bare_route(project.folder))
        report.note(f"{peer.describe()}; {len(of_peer):,} different users, every value written and checked")
        check_users(ours, feast, peer, written, of_peer[:20])

        paths = [f"/v1/entities/user/{each.user_id}?service={SERVICE}" for each in asked]
        files = {
            ours: [http_request("GET", path) for path in paths],
            feast: [http_request("POST", "/get-online-features", orjson.dumps(peer.request(each))) for each in of_peer],
            bare: [http_request("GET", "/")],
        }
        names = {"headrace serve": ours, "feast serve": feast, "bare route": bare}
        seconds, warm_s = options.pick((4.0, 1.5), (0.3, 0.2))
        found = alternate(
            {
                name: partial(
                    measure,
                    address,
                    write_requests(project.folder / f"{name}.requests", files[address]),
                    CONNECTIONS,
                    seconds,
                    warm_s,
                )
                for name, address in names.items()
            },
            options,
        )
    rps = {name: Series.of(load.rps for load in loads) for name, loads in found.items()}
    for name, key in (("headrace serve", "rps"), ("feast serve", "peer_rps"), ("bare route", "bare_rps")):
        report.add(name, rps[name], "requests/s", key=key)
        report.add(name, Series.of(load.p50_ms for load in found[name]), "ms p50")
        report.add(name, Series.of(load.p99_ms for load in found[name]), "ms p99")
    report.add("headrace / feast", rps["headrace serve"] / rps["feast serve"], "times", key="ratio_peer", at_least=6)
    report.add("headrace / bare", rps["headrace serve"] / rps["bare route"], "times", key="ratio_bare", at_least=0.5)


BENCHMARK: Final = Benchmark(
    name="read_one",
    work=f"GET /v1/entities/user/…, ranking_v1, one server process, {CONNECTIONS} connections",
    peer="feast serve on Feast's own Redis store, same features; a bare FastAPI route",
    keys=("rps", "peer_rps", "bare_rps", "ratio_peer", "ratio_bare"),
    run=run,
)

if __name__ == "__main__":
    main(BENCHMARK)
