"""`python -m benchmarks.train`: a training set of `ranking_v1` from an archive, by `headrace train`.

Events are of a week: three quarters views, Zipf items, uniform users; a label is the user and the item of one of them,
a millisecond later. Everything is a process of its own, from its start to the written file, on the same machine; Kafka
is left out, as all events are archived.

Beside it what one would do without: row by row (each label's events looked up in an index, merged and evaluated by the
same kernel), which is measured on a sample and reckoned for all; and DuckDB's range joins over the same Parquet files,
which compute the counts of the same windows and means of prices, and of nothing else. Its counts are compared.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import Benchmark, Options, Report, Series, alternate, main, say
from benchmarks.project import Project
from features.kernel import Events, Rows, merge
from features.layout import families_of
from features.plan import Plan
from features.program import Asked, Program
from features.times import DAY_MS, Window, hop_ms
from store.archive import Complete, rows_of, tables_of

EVENTS: Final = 1_000_000
QUICK_EVENTS: Final = 20_000
LABELS: Final = 0.1
"""Of the events."""
TIMES: Final = 4
SAMPLE: Final = 200
NOW_MS: Final = 1_795_000_000_000
CONTRACTS: Final = {"Impression": 0.75, "Click": 0.2, "Like": 0.05}
WINDOWS: Final = ("10m", "1h", "24h", "7d")
SERVICE: Final = "ranking_v1"


@dataclass(frozen=True)
class Shop:
    """Events in order of time: int64[n] each, and what there is of items."""

    times_ms: Any
    users: Any
    items: Any
    kinds: Any
    n_items: int

    @classmethod
    def of(cls, n: int) -> Shop:
        """So many events, always the same."""
        rng = np.random.default_rng(1)
        n_items = max(n // 200, 50)
        return cls(
            np.sort(NOW_MS - rng.integers(0, 7 * DAY_MS, n)),
            rng.integers(0, n // 50, n),
            np.minimum(rng.zipf(1.3, n) - 1, n_items - 1),
            rng.choice(len(CONTRACTS), n, p=list(CONTRACTS.values())),
            n_items,
        )

    def columns(self, index: Any) -> dict[str, Any]:
        """Fields of some events, as `features.rows.Events` has them."""
        items = self.items[index]

        def texts(prefix: str, numbers: Any) -> pa.StringArray:
            return pa.array(np.char.add(prefix, numbers.astype(str)))

        return {
            "user_id": texts("u", self.users[index]),
            "item_id": texts("i", items),
            "seller_id": texts("s", items % 700),
            "category": texts("c", items % 30),
            "brand": pa.nulls(len(items), pa.string()),
            "price": (items % 97 + 1).astype(np.float64),
            "surface": texts("surface", items % 3),
        }

    def archive(self, settings: Any, plan: Plan) -> None:
        """Writes all to the archive, in ten commits a topic."""
        tables = tables_of(settings, plan)
        for kind, name in enumerate(CONTRACTS):
            spec = plan.event(name)
            table = tables[spec.topic]
            table.claim()
            for index in np.array_split(np.flatnonzero(self.kinds == kind), 10):
                times_ms, ids = self.times_ms[index], pa.array(np.char.add("e", index.astype(str)))
                rows = rows_of(spec, ids, times_ms, times_ms, 0, index, self.columns(index))
                table.append(rows, {0: Complete(int(index[-1]) + 1, int(times_ms[-1]))}, {0: 0})

    def labels(self) -> pa.Table:
        """A label of every tenth event or so."""
        rng = np.random.default_rng(2)
        index = np.sort(rng.integers(0, len(self.times_ms), int(len(self.times_ms) * LABELS)))
        columns = self.columns(index)
        return pa.table(
            {
                "label": np.arange(len(index)),
                "user_id": columns["user_id"],
                "item_id": columns["item_id"],
                "event_timestamp": pa.array((self.times_ms[index] + 1) * 1000).view(pa.timestamp("us", "UTC")),
            }
        )


@dataclass(frozen=True)
class Took:
    """Of one run: seconds by the clock, and the most memory that was resident."""

    seconds: float
    peak_gb: float = 0.0


def run(options: Options, report: Report) -> None:
    """Measures ours against both peers, and ours again with four times as much of everything."""
    n = options.pick(EVENTS, QUICK_EVENTS)
    with Project() as small, Project() as large:
        shops = {small: Shop.of(n), large: Shop.of(TIMES * n)}
        for project, shop in shops.items():
            say(f"archiving {len(shop.times_ms):,} events")
            shop.archive(project.settings, project.plan)
            pq.write_table(shop.labels(), project.folder / "labels.parquet")
        found = alternate(
            {
                "headrace train": partial(train, small),
                "of four times as much": partial(train, large),
                "row by row": partial(row_by_row, small.plan, shops[small], options.pick(SAMPLE, 20)),
                "DuckDB": partial(by_duckdb, small),
            },
            options,
        )
        same_counts(small)
    seconds = {side: Series.of(took.seconds for took in rounds) for side, rounds in found.items()}
    peaks = {side: Series.of(took.peak_gb for took in rounds) for side, rounds in found.items()}
    ours, more = "headrace train", "of four times as much"
    report.add(
        f"headrace train, {n:,} events, {int(n * LABELS):,} labels", seconds[ours], "s", key="seconds", at_most=60
    )
    report.add("its memory at most", peaks[ours], "GB", key="peak_gb", at_most=4)
    report.add("of four times as much", seconds[more], "s")
    report.add("its memory at most, against that of a quarter", peaks[more] / peaks[ours], "times", key="growth")
    report.add("row by row, reckoned", seconds["row by row"], "s")
    report.add("row by row / ours", seconds["row by row"] / seconds[ours], "times", key="ratio_rows", at_least=20)
    report.add("DuckDB, counts and means only", seconds["DuckDB"], "s")
    report.add("DuckDB / ours", seconds["DuckDB"] / seconds[ours], "times", key="ratio_duckdb")
    report.note("DuckDB's counts of the same windows were compared with ours, label by label: they are equal")


def train(project: Project) -> Took:
    """The command, from its start to the written file."""
    argv = [sys.executable, "-m", "headrace", "train", "labels.parquet", "--service", SERVICE, "--no-tail"]
    began = time.monotonic()
    process = subprocess.Popen([*argv, "--out", "training.parquet"], cwd=project.folder, env=project.environment())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        msg = f"headrace train ended with status {process.returncode}"
        raise RuntimeError(msg)
    return Took(time.monotonic() - began, usage.ru_maxrss / 1e6)


def row_by_row(plan: Plan, shop: Shop, sample: int) -> Took:
    """Every label by itself, reckoned from a sample: its entities' events before it, merged and evaluated."""
    families = [family.name for view in plan.views for family in families_of(plan, view)]
    program = Program(plan, plan.service(SERVICE).features, families)
    labels = shop.labels()
    every = {"user": shop.users, "item": shop.items}
    order = {entity: np.argsort(ids, kind="stable") for entity, ids in every.items()}
    columns = {entity: _by_contract(shop, every[entity], order[entity]) for entity in every}
    chosen = np.random.default_rng(3).choice(len(labels), sample, replace=False)
    one = {entity: np.zeros(1, np.intp) for entity in every}
    began = time.monotonic()
    for at in chosen.tolist():
        ids = {entity: labels[f"{entity}_id"][at].as_py() for entity in every}
        now_ms = labels["event_timestamp"][at].value // 1000
        events = {entity: _before(columns[entity], int(ids[entity][1:]), now_ms) for entity in every}
        states = {
            bundle.name: merge(bundle, Rows.empty(bundle, 1), events[bundle.entity], now_ms).rows
            for bundle in program.bundles
        }
        frame = program.evaluate(states, Asked({entity: [name] for entity, name in ids.items()}, one, {}), now_ms)
        frame.to_json(("user", "item"))
    return Took((time.monotonic() - began) / sample * len(labels))


def _by_contract(shop: Shop, entities: Any, order: Any) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """Of each contract: entity and time of its events, by entity and time, and their fields."""
    found = {}
    for kind, name in enumerate(CONTRACTS):
        index = order[shop.kinds[order] == kind]
        found[name] = entities[index], shop.times_ms[index], shop.columns(index)
    return found


def _before(columns: Mapping[str, tuple[Any, Any, dict[str, Any]]], number: int, now_ms: int) -> dict[str, Events]:
    found = {}
    for name, (entities, times_ms, fields) in columns.items():
        begin, end = np.searchsorted(entities, (number, number + 1)).tolist()
        end = begin + int(np.searchsorted(times_ms[begin:end], now_ms))
        mine = {field: column[begin:end] for field, column in fields.items()}
        found[name] = Events(np.zeros(end - begin, np.intp), times_ms[begin:end], mine)
    return found


def by_duckdb(project: Project) -> Took:
    """The counts of all windows, and means of prices, by a join of labels and events a contract and entity."""
    began = time.monotonic()
    with duckdb.connect(config={"threads": os.cpu_count() or 1}) as db:
        labels = f"'{project.folder}/labels.parquet'"
        db.execute(f"CREATE VIEW labels AS SELECT *, epoch_ms(event_timestamp) q FROM {labels}")  # noqa: S608  # our own
        for name in CONTRACTS:
            files = f"{project.settings.archive_url()}/{project.plan.event(name).topic}/*/*.parquet"
            db.execute(f"CREATE VIEW of_{name} AS SELECT *, epoch_ms(occurred_at) t FROM '{files}'")  # noqa: S608  # as above
        joins = " ".join(
            f"LEFT JOIN ({_counts(entity, name)}) AS {entity}_{name} ON labels.label = {entity}_{name}.label"
            for entity in ("user", "item")
            for name in CONTRACTS
        )
        counts = ", ".join(
            f"coalesce({entity}_{name}.n_{window}, 0) AS {entity}_{name}_{window}"
            for entity in ("user", "item")
            for name in CONTRACTS
            for window in WINDOWS
        )
        prices = ", ".join(f"user_Click.price_{window}" for window in WINDOWS)
        query = f"SELECT labels.*, {counts}, {prices} FROM labels {joins} ORDER BY labels.label"  # noqa: S608  # as above
        db.execute(f"COPY ({query}) TO '{project.folder}/duckdb.parquet'")
    return Took(time.monotonic() - began)


def _counts(entity: str, name: str) -> str:
    """Of each label, an entity's events of a contract in every window."""
    held = {window: f"t >= {_begin(window)}" for window in WINDOWS}
    sums = ", ".join(f"count(*) FILTER ({inside}) AS n_{window}" for window, inside in held.items())
    prices = ", ".join(f"avg(price) FILTER ({inside}) AS price_{window}" for window, inside in held.items())
    joined = f"labels JOIN of_{name} USING ({entity}_id)"
    return f"SELECT label, {sums}, {prices} FROM {joined} WHERE t < q AND {held['7d']} GROUP BY label"  # noqa: S608  # as above


def _begin(window: str) -> str:
    """Where a window begins, by the window rule."""
    width_ms = Window.parse(window).width_ms
    return f"(q - {width_ms}) // {hop_ms(width_ms)} * {hop_ms(width_ms)}"


def same_counts(project: Project) -> None:
    """Both computed the same counts, or neither's time means anything."""
    ours, theirs = (pq.read_table(project.folder / f"{name}.parquet") for name in ("training", "duckdb"))
    of_contract = {"Impression": "impressions", "Click": "clicks", "Like": "likes"}
    for entity in ("user", "item"):
        for name, plural in of_contract.items():
            for window in WINDOWS:
                mine = ours[f"{entity}_activity__{plural}_{window}"]
                if not mine.equals(theirs[f"{entity}_{name}_{window}"].cast(pa.int64())):
                    msg = f"DuckDB has other counts of {entity} {plural} {window}"
                    raise RuntimeError(msg)


BENCHMARK = Benchmark(
    "train",
    work="a training set of ranking_v1 (58 features) from a million archived events and 100,000 labels",
    peer="the same kernel row by row, and DuckDB's range joins",
    keys=("seconds", "peak_gb", "growth", "ratio_rows", "ratio_duckdb"),
    run=run,
)

if __name__ == "__main__":
    main(BENCHMARK)
