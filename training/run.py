"""A training set from beginning to end: labels, events of the archive and of Kafka, the steps of the join."""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from config.settings import Settings
from features.events import NEWEST_MS, Kind
from features.plan import EventSpec, Plan
from features.program import Program
from features.texts import decimal_texts
from features.values import arrow_type
from store.archive import ArchiveTable, events_of, forgotten_of, table_names, tables_of, whole_record
from store.forgotten import Forgotten
from streams.tail import Tail
from training.point_in_time import (
    CHUNK_ROWS,
    Entities,
    Job,
    LabelsError,
    Questions,
    check,
    evaluate,
    make_rows,
    questions,
    times_of,
)
from training.split import PARTITION_EVENTS, Chosen, Splitter

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


def read_labels(path: Path, plan: Plan) -> Labels:
    """Labels in a file: Parquet, or CSV with a header. Ids are texts, whatever a CSV's look like.

    Raises:
        LabelsError: if it is neither.
    """
    try:
        if path.suffix != ".csv":
            return ParquetLabels(path)
        ids = {entity.key: pa.string() for entity in plan.entities}
        options = pa_csv.ConvertOptions(column_types=ids, strings_can_be_null=True)
        return TableLabels(pa_csv.read_csv(path, convert_options=options))
    except pa.ArrowInvalid as error:
        msg = f"{path}: {error}; labels are a Parquet file, or a CSV file with a header"
        raise LabelsError(msg) from error


@dataclass(frozen=True)
class Limits:
    """Events count from `since_ms` on, and labels with `start_ms <= time < end_ms`; ms since the epoch."""

    since_ms: int | None = None
    start_ms: int | None = None
    end_ms: int | None = None

    def of(self, labels: pa.RecordBatch, time_column: str) -> pa.RecordBatch:
        """The labels within."""
        if self.start_ms is None and self.end_ms is None:
            return labels
        times_ms = times_of(labels, time_column)
        return labels.filter(pa.array((times_ms >= (self.start_ms or 0)) & (times_ms < (self.end_ms or NEWEST_MS))))


@dataclass(frozen=True)
class Known:
    """All events, for who goes through them more than once.

    Attributes:
        tables: of the archive, as they were when Kafka's tail was read.
        tail: contract and events with all fields, as `events_of_tail` gives them.
        forgotten: whose events, until when, do not count.
    """

    tables: Mapping[str, ArchiveTable]
    tail: Sequence[tuple[str, pa.RecordBatch]]
    forgotten: Forgotten

    @classmethod
    def of(cls, settings: Settings, plan: Plan) -> Known:
        """What there is now."""
        tables = tables_of(settings, plan)
        with tail_of(settings, plan, list(tables.values())) as tail:
            events = list(events_of_tail(tail, lambda spec: spec.fields, 0, recorded=True))
        return cls(tables, events, forgotten_of(settings))


def training_set(  # noqa: PLR0913  # each is an option of its users
    settings: Settings,
    plan: Plan,
    full_names: Sequence[str],
    labels: Labels,
    *,
    time_column: str = TIME_COLUMN,
    limits: Limits = Limits(),
    with_tail: bool = True,
    settle_ms: int | None = None,
    known: Known | None = None,
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
        limits: of times.
        with_tail: whether to read what the archive has not yet from Kafka.
        settle_ms: as what had arrived by then made it: see `training.point_in_time.Job`.
        known: the events, if they were read before.
        run: runs the steps; by default in threads.
        folder: for files of the steps, seen by all who run them; by default one that is gone afterwards.
        on_progress: is told how far it is.

    Raises:
        LabelsError: if labels lack what is needed.
    """
    run = run or in_threads

    def chunks() -> Iterator[pa.RecordBatch]:
        return filter(len, (limits.of(chunk, time_column) for chunk in labels.chunks()))

    with tempfile.TemporaryDirectory(prefix="headrace-train-", dir=folder) as spill:
        given = (plan, tuple(full_names), time_column, 1, Path(spill), limits.since_ms or 0, 0, settle_ms)
        job = Job(*given, forgotten_of(settings) if known is None else known.forgotten)
        check(job, labels.schema)
        asked: dict[str, list[Questions]] = {entity: [] for entity in job.program.entities}
        n_chunks = until_ms = 0
        for chunk in chunks():
            for entity, each in questions(job, chunk).items():
                asked[entity].append(each)
            until_ms = max(until_ms, int(times_of(chunk, time_column).max()))
            n_chunks += 1
        if not n_chunks:
            return
        entities = {entity: Entities(asked.pop(entity)) for entity in tuple(asked)}
        tables = tables_of(settings, plan) if known is None else known.tables
        read = [(spec, tables[n]) for spec in plan.events if job.spill.fields_of(spec) for n in table_names(spec)]
        to_read = with_tail and known is None
        with tail_of(settings, plan, [table for _, table in read]) if to_read else nullcontext() as tail:
            n_events = sum(table.n_rows for _, table in read) + (tail.n_records if tail else 0)
            n_asked = max(len(each.numbers) for each in entities.values())
            partitions = 1 + max(n_events, n_asked) // PARTITION_EVENTS
            job = replace(job, partitions=partitions, until_ms=min(until_ms + (settle_ms or 0), NEWEST_MS))
            pieces = [(job, entities, spec, table, share) for spec, table in read for share in shares_of(table)]
            for done, _ in enumerate(run(_split, pieces), 1):
                on_progress("archive", done, len(pieces))
            found: Iterable[tuple[str, pa.RecordBatch]] = () if known is None else known.tail
            if tail:
                on_progress("Kafka", 0, 1)
                recorded = settle_ms is not None
                found = events_of_tail(tail, job.spill.fields_of, job.since_ms, recorded=recorded)
            with _splitter(job, entities, "tail") as splitter:
                for contract, events in found:
                    splitter.add(contract, events)
            if tail:
                on_progress("Kafka", 1, 1)
        todo = [(job, entity, entities[entity], number) for entity in job.bundles for number in range(partitions)]
        for done, _ in enumerate(run(make_rows, todo), 1):
            on_progress("rows", done, len(todo))
        for done, batch in enumerate(run(evaluate, ((job, chunk, at) for at, chunk in enumerate(chunks()))), 1):
            on_progress("features", done, n_chunks)
            yield batch


def interactions(
    settings: Settings, plan: Plan, full_names: Sequence[str], limits: Limits, *, with_tail: bool = True
) -> pa.Table:
    """Labels made of events: each that names every entity that the features are about, at its time, once.

    Args:
        settings: as of `training_set`, like the next two and the last.
        plan: declares the features.
        full_names: which features.
        limits: of the events' times.
        with_tail: whether to read what the archive has not yet from Kafka.
    """
    entities = Program(plan, full_names).entities
    keys = [plan.entity(entity).key for entity in entities]
    start_ms, end_ms = limits.start_ms or 0, limits.end_ms or NEWEST_MS

    def wanted(spec: EventSpec) -> Mapping[str, Kind]:
        return {key: spec.fields[key] for key in keys} if set(keys) <= spec.fields.keys() else {}

    tables = tables_of(settings, plan)
    read = [(spec, tables[name]) for spec in plan.events if wanted(spec) for name in table_names(spec)]
    found = [events for spec, table in read for events in table.scan(wanted(spec), start_ms, end_ms)]
    if with_tail:
        with tail_of(settings, plan, [table for _, table in read]) as tail:
            found += [events for _, events in events_of_tail(tail, wanted, start_ms)]
    schema, forgotten = pa.schema([*((key, pa.string()) for key in keys), ("_t", pa.int64())]), forgotten_of(settings)
    found = [_with_ids(events, keys) for events in found]
    for entity, key in zip(entities, keys, strict=True):
        found = [forgotten.counted(entity, key, events) for events in found]
    table = pa.Table.from_batches([batch.select(schema.names) for batch in found], schema).drop_null()
    table = table.filter((pc.field("_t") >= start_ms) & (pc.field("_t") < end_ms))
    table = table.group_by(schema.names).aggregate([]).sort_by([(name, "ascending") for name in ("_t", *keys)])
    times = pc.cast(table["_t"], pa.timestamp("ms", "UTC"))
    return table.drop_columns("_t").append_column(TIME_COLUMN, times)


def _with_ids(events: pa.RecordBatch, keys: Iterable[str]) -> pa.RecordBatch:
    """Events with their ids as texts."""
    for key in keys:
        place = events.schema.get_field_index(key)
        events = events.set_column(place, key, decimal_texts(events[key]))
    return events


@dataclass(frozen=True)
class Made:
    """What a training set has."""

    labels: int
    features: int

    def __str__(self) -> str:
        return f"{self.labels:,} labels with {self.features} features"


def write_training_set(  # as above
    settings: Settings,
    plan: Plan,
    full_names: Sequence[str],
    labels: Labels,
    path: Path,
    *,
    ray: str | None = None,
    **options: Any,
) -> Made:
    """Writes a training set to a Parquet file, which is there once it is whole.

    Args:
        settings: as of `training_set`, like the next three and the options.
        plan: declares the features.
        full_names: which features.
        labels: the labels.
        path: the file.
        ray: the address of a Ray cluster that runs the steps; `local` for one on this machine.
        options: more of `training_set`'s.
    """
    n_labels = 0
    part = path.with_name(f".{path.name}.part")
    with ExitStack() as stack:
        stack.callback(part.unlink, missing_ok=True)
        if ray is not None:
            try:
                from training.on_ray import on_ray
            except ImportError as error:
                msg = f"{error}: install Headrace with its extra `ray` (pip install headrace[ray])"
                raise RuntimeError(msg) from error

            options["run"] = stack.enter_context(on_ray(ray))
        schema = schema_of(plan, full_names, labels.schema)
        with pq.ParquetWriter(part, schema) as file:
            for batch in training_set(settings, plan, full_names, labels, **options):
                file.write_batch(batch)
                n_labels += len(batch)
        part.replace(path)
    return Made(n_labels, len(full_names))


def schema_of(plan: Plan, full_names: Sequence[str], labels: pa.Schema) -> pa.Schema:
    """The columns of a training set: the labels', and the features."""
    for name in full_names:
        labels = labels.append(pa.field(name, arrow_type(plan.features[name].value_type)))
    return labels


def shares_of(table: ArchiveTable) -> list[tuple[int, int]]:
    """In which shares a table is read: see `store.archive.ArchiveTable.scan`."""
    n = min(table.n_files, 8)
    return [(number, n) for number in range(n)]


def _split(
    job: Job, entities: dict[str, Entities], spec: EventSpec, table: ArchiveTable, share: tuple[int, int]
) -> None:
    with _splitter(job, entities, f"archive-{share[0]}") as splitter:
        recorded = job.settle_ms is not None
        for events in table.scan(job.spill.fields_of(spec), job.since_ms, job.until_ms, share, recorded=recorded):
            splitter.add(spec.name, events)


def _splitter(job: Job, entities: Mapping[str, Entities], name: str) -> Splitter:
    def choose(entity: str, _: str, events: pa.RecordBatch) -> Chosen:
        return entities[entity].chosen(decimal_texts(events[job.key(entity)]), job.partitions)

    return Splitter(job.spill, choose, name)


def tail_of(settings: Settings, plan: Plan, tables: Sequence[ArchiveTable]) -> Tail:
    """What tables of the archive have not yet."""
    topics = dict.fromkeys(table.topic for table in tables)
    has = {(table.contract, name): at.next for table in tables for name, at in table.record().positions.items()}
    return Tail(settings, plan, list(topics), whole_record((each.topic, each.record()) for each in tables), has)


def events_of_tail(
    tail: Tail, wanted: Callable[[EventSpec], Mapping[str, Kind]], since_ms: int, *, recorded: bool = False
) -> Iterator[tuple[str, pa.RecordBatch]]:
    """Contract and events, with the fields that are wanted: see `store.archive.events_of`."""
    for part in tail:
        fields = wanted(part.spec)
        for rows in part.rows.combine_chunks().to_batches() if part.rows is not None and fields else ():
            topic = part.spec.topics.index(part.partition.topic)
            yield part.spec.name, events_of(rows, fields, since_ms, NEWEST_MS, topic, recorded=recorded)


def in_threads(step: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """As many at once as there are processors: what takes long lets other threads run."""
    n = os.cpu_count() or 1
    todo = iter(arguments)
    with ThreadPoolExecutor(n) as pool:
        running = deque(pool.submit(step, *each) for each in islice(todo, n + 1))
        while running:
            result = running.popleft().result()
            running.extend(pool.submit(step, *each) for each in islice(todo, 1))
            yield result
