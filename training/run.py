"""A training set from beginning to end: labels, events of the archive and of Kafka, the steps of the join."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from config.settings import Settings
from features.plan import EventSpec, Plan
from store.archive import ArchiveTable, events_of, tables_of
from store.commit import CommitRecord
from training.point_in_time import (
    CHUNK_ROWS,
    PARTITION_EVENTS,
    Entities,
    Job,
    LabelsError,
    Questions,
    Splitter,
    check,
    evaluate,
    fields_of,
    make_rows,
    questions,
    times_of,
)

TIME_COLUMN: Final = "event_timestamp"
Run = Callable[..., Iterator[Any]]
"""`run(step, arguments)`: what a step gives for each tuple of arguments, in order; many at once, wherever."""
Progress = Callable[[str, int, int], object]
"""Is told of each step how much is done, and of how much."""


class Labels(Protocol):
    """A table that can be read again and again, the same chunks each time."""

    schema: pa.Schema

    def chunks(self) -> Iterator[pa.RecordBatch]:
        """At most `CHUNK_ROWS` at once."""
        ...


class TableLabels:
    """Labels in memory."""

    def __init__(self, table: pa.Table) -> None:
        self.schema = table.schema
        self._table = table

    def chunks(self) -> Iterator[pa.RecordBatch]:
        """See `Labels.chunks`."""
        for begin in range(0, len(self._table), CHUNK_ROWS):
            yield from self._table.slice(begin, CHUNK_ROWS).combine_chunks().to_batches()


class ParquetLabels:
    """Labels in a Parquet file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.schema = pq.read_schema(path)

    def chunks(self) -> Iterator[pa.RecordBatch]:
        """See `Labels.chunks`."""
        with pq.ParquetFile(self._path) as file:
            yield from file.iter_batches(batch_size=CHUNK_ROWS)


def read_labels(path: Path) -> Labels:
    """Labels in a file: Parquet, or CSV with a header.

    Raises:
        LabelsError: if it is neither.
    """
    try:
        return TableLabels(pa_csv.read_csv(path)) if path.suffix == ".csv" else ParquetLabels(path)
    except pa.ArrowInvalid as error:
        msg = f"{path}: {error}; labels are a Parquet file, or a CSV file with a header"
        raise LabelsError(msg) from error


@dataclass(frozen=True)
class Limits:
    """Which events and labels count: events from `since_ms` on, labels with `start_ms <= time < end_ms`."""

    since_ms: int = 0
    start_ms: int | None = None
    end_ms: int | None = None


def training_set(  # noqa: PLR0913  # each is an option of its users
    settings: Settings,
    plan: Plan,
    full_names: Sequence[str],
    labels: Labels,
    *,
    time_column: str = TIME_COLUMN,
    since_ms: int = 0,
    with_tail: bool = True,
    run: Run | None = None,
    folder: Path | None = None,
    on_progress: Progress = lambda _step, _done, _of: None,
) -> Iterator[pa.RecordBatch]:
    """Every label with every feature as of its time, from the events strictly before: see `training.point_in_time`.

    Args:
        settings: where the archive and Kafka are.
        plan: declares the features.
        full_names: which features, in order.
        labels: a row each, with the ids of the entities, a time, and anything else, which is kept; `item__price` stands
            in for the price that the item's row knows.
        time_column: the label's time.
        since_ms: no event before it counts.
        with_tail: whether to read what the archive has not yet from Kafka.
        run: runs the steps; by default in threads.
        folder: for files of the steps, seen by all who run them; by default one that is gone afterwards.
        on_progress: is told how far it is.

    Raises:
        LabelsError: if labels lack what is needed.
    """
    run = run or _in_threads
    with tempfile.TemporaryDirectory(prefix="headrace-train-", dir=folder) as spill:
        job = Job(plan, tuple(full_names), time_column, 1, Path(spill), since_ms, 0)
        check(job, labels.schema)
        asked: dict[str, list[Questions]] = {entity: [] for entity in job.program.entities}
        n_chunks, until_ms = 0, 0
        for chunk in labels.chunks():
            for entity, each in questions(job, chunk).items():
                asked[entity].append(each)
            until_ms = max(until_ms, int(times_of(chunk, time_column).max()))
            n_chunks += 1
        if not n_chunks:
            return
        entities = {entity: Entities(each) for entity, each in asked.items()}
        tables = tables_of(settings, plan)
        contracts = [spec for spec in plan.events if any(spec.name in bundle.events for bundle in job.bundles.values())]
        n_events = sum(tables[spec.topic].n_rows for spec in contracts)
        partitions = 1 + n_events // PARTITION_EVENTS
        job = Job(plan, tuple(full_names), time_column, partitions, Path(spill), since_ms, until_ms)
        read = [(spec, tables[spec.topic]) for spec in contracts]
        pieces = [(job, entities, spec, table, share) for spec, table in read for share in _shares(table)]
        for done, _ in enumerate(run(_split, pieces), 1):
            on_progress("events of the archive", done, len(pieces))
        if with_tail:
            record = CommitRecord("")
            for table in tables.values():
                record = record.advanced("", table.record().positions, table.record().topics)
            _split_tail(job, entities, settings, record)
            on_progress("events of Kafka", 1, 1)
        todo = [(job, entity, of, number) for entity, of in entities.items() for number in range(partitions)]
        todo = [each for each in todo if each[1] in job.bundles]
        for done, _ in enumerate(run(make_rows, todo), 1):
            on_progress("rows", done, len(todo))
        numbered = ((job, chunk, number) for number, chunk in enumerate(labels.chunks()))
        for done, batch in enumerate(run(evaluate, numbered), 1):
            on_progress("features", done, n_chunks)
            yield batch


def _shares(table: ArchiveTable) -> list[tuple[int, int]]:
    n = min(table.n_files, 8)
    return [(number, n) for number in range(n)]


def _split(
    job: Job, entities: dict[str, Entities], spec: EventSpec, table: ArchiveTable, share: tuple[int, int]
) -> None:
    with Splitter(job, entities, f"archive-{share[0]}") as splitter:
        for events in table.scan(fields_of(job, spec.name), job.since_ms, job.until_ms, share):
            splitter.add(spec.name, events)


def _split_tail(job: Job, entities: dict[str, Entities], settings: Settings, record: CommitRecord) -> int:
    from streams.tail import tail

    n_events = 0
    with Splitter(job, entities, "tail") as splitter:
        for part in tail(settings, job.plan, record):
            fields = fields_of(job, part.spec.name)
            for rows in part.rows.combine_chunks().to_batches() if part.rows is not None and fields else ():
                n_events += len(rows)
                splitter.add(part.spec.name, events_of(rows, fields, job.since_ms, job.until_ms))
    return n_events


def _in_threads(step: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """As many at once as there are processors: what takes long lets other threads run."""
    n = os.cpu_count() or 1
    todo = iter(arguments)
    with ThreadPoolExecutor(n) as pool:
        running = deque(pool.submit(step, *each) for each in islice(todo, n + 1))
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(step, *each) for each in islice(todo, 1))
            yield result
