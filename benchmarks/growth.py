"""`growth`: how time grows with the entities in Redis, the features of a catalogue and the items of a request.

Projects of different sizes stand side by side and are measured in turn. A slope is the exponent of the power of size
that fits time best (least squares of the logarithms): 0 if time does not grow, 1 if it doubles with the size.

Rows are those of the population, of few events each; the larger sets are copies of the smallest under other ids.
Requests ask for users and items at random, all being as likely, so that nothing but the number of rows differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Final

import numpy as np

from benchmarks import population
from benchmarks.harness import Benchmark, Options, Report, Series, alternate, largest, main
from benchmarks.load import measure, write_requests
from benchmarks.plot import Panel, draw
from benchmarks.population import Asked
from benchmarks.project import Project
from benchmarks.ranking import NPY, http
from benchmarks.stream import SETTINGS, ends_of, fill_topics, measure_stream, rewound
from benchmarks.traffic import Traffic
from features.layout import families_of
from store.keys import Keyspace
from tests.support.kafka import RealKafka

USERS: Final = (10_000, 100_000, 1_000_000)
QUICK_USERS: Final = (2_000, 4_000, 8_000)
FEATURES: Final = (10, 50, 200)
ITEMS: Final = (10, 200, 1_000)
EVENTS: Final = 300_000
QUICK_EVENTS: Final = 60_000
EVENTS_A_USER: Final = 20
CONNECTIONS: Final = 16
_BULK: Final = 2_000
_EXPIRE_MS: Final = 8 * 86_400_000

Times = dict[int, Series]
"""Milliseconds a request, or microseconds an event, by size."""


def run(options: Options, report: Report) -> None:
    """Measures by entities and by items of a request, then by features."""
    read, read_items, stream = _by_entities(options, report)
    read_features, stream_features = _by_features(options, report)
    for what, unit, times in (
        ("read, {:,} users", "ms a request", read),
        ("read, {:,} items a request", "ms a request", read_items),
        ("read, {:,} features", "ms a request", read_features),
        ("stream, {:,} users", "µs an event", stream),
        ("stream, {:,} features", "µs an event", stream_features),
    ):
        for size, series in times.items():
            report.add(what.format(size), series, unit)
    fewest, *_, most = read.values()
    report.add("requests/s, most users / fewest", fewest / most, "times", at_least=0.85)
    report.add("read, slope by users", slope(read), "", key="slope_entities", at_most=1)
    report.add("stream, slope by users", slope(stream), "", at_most=1)
    worse = largest(slope(read_features), slope(stream_features))
    report.add("slope by features, the larger of read's and stream's", worse, "", key="slope_features", at_most=1)
    report.add("read, slope by items of a request", slope(read_items), "", key="slope_items", at_most=1)
    report.files["growth.svg"] = draw(
        [
            Panel("users", {"ms a request": read, "µs an event": stream}),
            Panel("features", {"ms a request": read_features, "µs an event": stream_features}),
            Panel("items of a request", {"ms a request": read_items}),
        ]
    )


def slope(times: Times) -> Series:
    """The exponent of the power of the size that fits each round's times best."""
    sizes = np.log(list(times))
    rounds = zip(*(series.values for series in times.values()), strict=True)
    return Series.of(np.polyfit(sizes, np.log(found), 1)[0] for found in rounds)


def _by_entities(options: Options, report: Report) -> tuple[Times, Times, Times]:
    """Times to read by the number of users, to read by the items of a request, and to stream by the number of users."""
    users, events = options.pick((USERS, EVENTS), (QUICK_USERS, QUICK_EVENTS))
    with ExitStack() as stack:
        kafkas = {n: stack.enter_context(RealKafka()) for n in users}
        projects = {n: stack.enter_context(Project(kafkas[n].bootstrap_servers, **SETTINGS)) for n in users}
        for n, project in projects.items():
            population.fill(project.client, project.plan, users[0], users[0] // 2, EVENTS_A_USER)
            copy_rows(project, users[0], n // users[0])
            fill_topics(kafkas[n].bootstrap_servers, Traffic(n, n // 2), events)
            report.note(f"{n:,} users, {n // 2:,} items: {project.client.dbsize():,} keys")
        with ExitStack() as servers:
            served = {n: servers.enter_context(project.serve(mirror_rows=0)) for n, project in projects.items()}
            read = _times(
                "read, {:,} users", {n: _reader(options, projects[n], served[n], n, 200) for n in users}, options
            )
            middle = users[1]
            read_items = _times(
                "read, {:,} items a request",
                {each: _reader(options, projects[middle], served[middle], middle, each) for each in ITEMS},
                options,
            )
        stream = _times("stream, {:,} users", {n: _streamer(projects[n], kafkas[n]) for n in users}, options)
    report.note(
        f"read: ranking_v1, npy, {CONNECTIONS} connections, 200 items unless said otherwise, no mirror; "
        f"stream: {events:,} events; rows of {EVENTS_A_USER} events a user in a week"
    )
    return read, read_items, stream


def _by_features(options: Options, report: Report) -> tuple[Times, Times]:
    """Times to read and to stream, by the number of features."""
    (users, *_), events = options.pick((USERS, EVENTS), (QUICK_USERS, QUICK_EVENTS))
    with ExitStack() as stack:
        kafka = stack.enter_context(RealKafka())
        projects = {
            n: stack.enter_context(
                Project(kafka.bootstrap_servers, definitions=f"benchmarks.catalogues.features_{n}", **SETTINGS)
            )
            for n in FEATURES
        }
        fill_topics(kafka.bootstrap_servers, Traffic(users, users // 2), events)
        for project in projects.values():
            population.fill(project.client, project.plan, users, users // 2, EVENTS_A_USER)
        with ExitStack() as servers:
            served = {n: servers.enter_context(project.serve(mirror_rows=0)) for n, project in projects.items()}
            read = _times(
                "read, {:,} features",
                {n: _reader(options, projects[n], served[n], users, 200) for n in FEATURES},
                options,
            )
        stream = _times(
            "stream, {:,} features", {n: _streamer(project, kafka) for n, project in projects.items()}, options
        )
    report.note(f"catalogues of {', '.join(map(str, FEATURES))} features, half of them users': {users:,} users")
    return read, stream


def copy_rows(project: Project, users: int, times: int) -> None:
    """Copies the rows of the users, of half as many items and of the sellers to ids further on, so that there are
    `times` as many.
    """
    keyspace, client = Keyspace.of(project.plan), project.client
    first = {"user": users, "item": users // 2, "seller": max(2, users // 2 // 15)}
    for family in (each for view in project.plan.views for each in families_of(project.plan, view)):
        letter, n = family.entity[0], first[family.entity]
        for start in range(0, n, _BULK):
            numbers = range(start, min(start + _BULK, n))
            blobs = client.mget(keyspace.rows(family, [b"%c%d" % (letter.encode(), number) for number in numbers]))
            for copy in range(1, times):
                ids = [b"%c%d" % (letter.encode(), number + copy * n) for number in numbers]
                with client.pipeline(transaction=False) as pipe:
                    for key, blob in zip(keyspace.rows(family, ids), blobs, strict=True):
                        if blob:
                            pipe.execute_command("SET", key, blob, "PX", _EXPIRE_MS)
                    pipe.execute()


def _reader(options: Options, project: Project, address: str, users: int, items_each: int) -> Callable[[], float]:
    """Measures milliseconds a request, for a user and items that are all as likely."""
    random = np.random.default_rng(items_each)
    asked = [
        Asked(f"u{user}", [f"i{item}" for item in random.choice(users // 2, items_each, replace=False).tolist()])
        for user in random.integers(0, users, options.pick(2_000, 50)).tolist()
    ]
    file = write_requests(project.folder / f"requests-{items_each}", http(asked, NPY))
    seconds, warm_s = options.pick((4.0, 1.5), (0.5, 0.2))
    return lambda: 1000 / measure(address, file, CONNECTIONS, seconds, warm_s).rps


def _streamer(project: Project, kafka: RealKafka) -> Callable[[], float]:
    """Measures microseconds an event."""
    ends = ends_of(kafka.bootstrap_servers)
    return lambda: 1e6 / measure_stream(rewound(project), ends)


def _times(what: str, sides: Mapping[int, Callable[[], float]], options: Options) -> Times:
    """What the sides measured in turn, by size; `what` is their names, with a place for the size."""
    found = alternate({what.format(size): side for size, side in sides.items()}, options)
    return {size: Series.of(found[what.format(size)]) for size in sides}


BENCHMARK: Final = Benchmark(
    "growth",
    work="reading and streaming by entities, features and items of a request",
    peer="itself at other sizes",
    keys=("slope_entities", "slope_features", "slope_items"),
    run=run,
)

if __name__ == "__main__":
    main(BENCHMARK)
