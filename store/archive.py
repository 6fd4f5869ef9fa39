"""The archive: every accepted event, in a Delta Lake table for each topic of a contract, with what of it it includes.

A table's rows and the positions that they bring it to are one Delta commit, by the protocol's application transactions.
Whoever commits says so in one more of them, under a name that all writers share: so of two that begin at the same
version one fails, and a writer that was killed, hung or replaced repeats nothing. Tables are partitioned by the day of
the event (UTC), and readable by whatever reads Delta Lake.

    event_id, occurred_at (as sent), the contract's fields,
    _recorded_at (the broker's), _partition, _offset, _day

One more table, `_forgotten`, says who is, and since when: `entity`, `id`, `at`.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, SchemaMismatchError, TableNotFoundError
from numpy.typing import NDArray

from config.settings import Settings
from features.events import NEWEST_MS, Kind
from features.plan import EventSpec, Plan
from features.times import DAY_MS
from store.commit import CommitRecord, FencedError, Position, common, united
from store.forgotten import Forgotten, Times, orders, read_forgotten
from store.keys import Keyspace

_TIME: Final = pa.timestamp("us", "UTC")
_TYPES: Final[dict[Kind, pa.DataType]] = {
    "str": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "list[str]": pa.list_(pa.string()),
}
_TIMES: Final = ("occurred_at", "_recorded_at")
_WRITER: Final = "headrace/writer"
_PARTITIONS: Final = "headrace/partitions"
_KEPT: Final = "headrace/kept_since_ms"
_TOPIC_ID: Final = "headrace.topic_id"
_FORGOTTEN: Final = "_forgotten"
_FORGOTTEN_SCHEMA: Final = pa.schema([("entity", pa.string()), ("id", pa.string()), ("at", _TIME)])
_SCAN_ROWS: Final = 1 << 17
_NOTHING_READ: Final = -1
_ATTEMPTS: Final = 10


@dataclass(frozen=True)
class Complete:
    """What a table has of a partition: everything before an offset; the last of it was recorded then (ms).

    If it does not begin with the log, it has what was recorded from `since_ms` on.
    """

    next: int
    recorded_ms: int
    since_ms: int = 0


class ArchiveTable:
    """The events of a contract from one topic, as of when this was made or last written to.

    Args:
        url: of all tables: a folder, or whatever delta-rs takes (`s3://bucket/events`).
        spec: the contract.
        options: delta-rs's `storage_options`.
        version: of the table, to read it as it was; by default the newest.
        topic: the topic; by default the contract's first.
    """

    def __init__(
        self,
        url: str,
        spec: EventSpec,
        options: Mapping[str, str] | None = None,
        version: int | None = None,
        topic: str = "",
    ) -> None:
        self.topic = topic or spec.topic
        self.contract, self.name = spec.name, table_name(spec, self.topic)
        self.url = f"{url.rstrip('/')}/{self.name}"
        self._base, self._spec, self._options = url, spec, dict(options or {})
        self._version = version
        self._table = self._open()
        self._token: int | None = None

    def __repr__(self) -> str:
        version = "none" if self._table is None else self._table.version()
        return f"<ArchiveTable {self.url} version={version}>"

    @property
    def exists(self) -> bool:
        """Whether anything was ever archived of the topic."""
        return self._table is not None

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is now, for another process."""
        version = self._table and self._table.version()
        return ArchiveTable, (self._base, self._spec, self._options, version, self.topic)

    @property
    def n_files(self) -> int:
        """How many files the events are in."""
        return 0 if self._table is None else len(self._table.file_uris())

    @property
    def n_rows(self) -> int:
        """About how many events there are."""
        if self._table is None:
            return 0
        files = pa.table(self._table.get_add_actions(flatten=True))
        return int(pc.sum(files["num_records"]).as_py() or 0) if "num_records" in files.column_names else 0

    def complete(self) -> dict[int, Complete]:
        """By partition, what the table has of it."""
        found = {}
        for partition in range(self._said(_PARTITIONS) or 0):
            at = self._said(_name(partition, "next"))
            if at is not None and at != _NOTHING_READ:
                since_ms = self._said(_name(partition, "since_ms")) or 0
                found[partition] = Complete(at, self._said(_name(partition, "recorded_ms")) or 0, since_ms)
        return found

    @property
    def since_ms(self) -> int:
        """Since when it has all events; 0 if it has all that the topic ever had."""
        every = [each.since_ms for each in self.complete().values()]
        return max([self._said(_KEPT) or 0, *every])

    def record(self) -> CommitRecord:
        """What the table includes, as a shard's commit record says it of its rows."""
        positions = {
            f"{self.topic}/{partition}": Position(at.next, self._said(_name(partition, "horizon")) or 0)
            for partition, at in self.complete().items()
        }
        topics = {self.topic: self._topic_id} if self._topic_id else {}
        return CommitRecord("", positions, topics)

    # Writing

    def claim(self) -> None:
        """Makes this the table's writer: whoever was, is not any more. Creates the table if there is none."""
        if self._table is None:
            # Who comes second finds it made.
            schema = _schema(self._spec)
            made: Any = {"partition_by": ["_day"], "mode": "ignore", "storage_options": self._options}
            with self._done("made"):
                DeltaTable.create(self.url, schema, description=self._spec.doc, **made)
        while True:
            self._table = self._open()
            try:
                self._commit(_schema(self._spec).empty_table(), {})
            except FencedError:
                continue  # Whoever writes has done so since it was opened.
            return

    def append(self, rows: pa.Table | None, complete: Mapping[int, Complete], horizons: Mapping[int, int]) -> None:
        """Writes events (see `rows_of`), if there are any, and what the table is then complete to, as one.

        Raises:
            FencedError: if another writer has claimed the table.
        """
        said = {_PARTITIONS: 1 + max(self.complete().keys() | complete.keys(), default=-1)}
        for partition, at in complete.items():
            said[_name(partition, "next")] = at.next
            said[_name(partition, "recorded_ms")] = at.recorded_ms
            said[_name(partition, "since_ms")] = at.since_ms
            said[_name(partition, "horizon")] = horizons[partition]
        self._commit(_schema(self._spec).empty_table() if rows is None else rows, said)

    def be_of_topic(self, topic_id: str) -> None:
        """Remembers Kafka's id of the topic, if none is known."""
        if topic_id and not self._topic_id:
            self._set_topic_id(topic_id)

    def accept_topic(self, topic_id: str) -> None:
        """The topic was made anew: the table goes on with its beginning, and keeps what it has of the old one."""
        read = {_name(partition, "next"): _NOTHING_READ for partition in self.complete()}
        self._commit(_schema(self._spec).empty_table(), read)
        self._set_topic_id(topic_id)

    def compact(self) -> dict[str, Any]:
        """Writes the small files of each day as few large ones; readers see no difference. Returns what was done."""
        with self._done("compacted"):
            return self._there.optimize.compact()

    def vacuum(self, retention_hours: int | None = None) -> list[str]:
        """Deletes files that no version of the last days (7 by default) names; returns which."""
        with self._done("vacuumed"):
            return self._there.vacuum(
                retention_hours, dry_run=False, enforce_retention_duration=retention_hours is None
            )

    def forget_before(self, ms: int) -> int:
        """Deletes the events of all days before the one that this is in; returns how many."""
        kept = CommitProperties(app_transactions=[Transaction(_KEPT, ms - ms % DAY_MS)])
        before = f"_day < '{_day(ms).isoformat()}'"
        found = self._changed("deleted from", lambda table: table.delete(before, commit_properties=kept))
        return int(found["num_deleted_rows"] or 0)

    def erase(self, keys: Mapping[str, str], forgotten: Forgotten) -> int:
        """Takes whom it names out of events until they were forgotten; returns of how many.

        An event that names others too is theirs as well: it stays, without the id and its own. Others go.

        Args:
            keys: by kind of entity, the field with its ids.
            forgotten: who is.
        """
        mine = {entity: key for entity, key in keys.items() if key in self._spec.fields}
        n_events = 0
        for entity, key in mine.items() if self._table is not None else ():
            if times := forgotten.get(entity):
                others = [f"t.{other} IS NOT NULL" for other in mine.values() if other != key]
                n_events += self._erase(key, " OR ".join(others) or "false", _forgotten_rows(entity, times))
        return n_events

    def _erase(self, key: str, is_of_others: str, rows: pa.Table) -> int:
        matched = f"CAST(t.{key} AS VARCHAR) = s.id AND (t.occurred_at <= s.at OR t._recorded_at <= s.at)"

        def merge(table: DeltaTable) -> dict[str, Any]:
            merged = table.merge(rows, matched, "s", "t")
            return (
                merged.when_matched_update({key: "NULL", "event_id": "NULL"}, is_of_others)
                .when_matched_delete()
                .execute()
            )

        found = self._changed("changed", merge)
        return int(found["num_target_rows_updated"] + found["num_target_rows_deleted"])

    def _changed(self, what: str, change: Callable[[DeltaTable], dict[str, Any]]) -> dict[str, Any]:
        """Does it to the newest version; if events came meanwhile, what it is about is looked for again."""
        with self._done(what):
            for attempts_left in reversed(range(_ATTEMPTS)):
                self._table = self._open()
                try:
                    found = change(self._there)
                except CommitFailedError:
                    if attempts_left:
                        continue
                    raise
                break
        return found

    # Reading

    def scan(
        self,
        fields: Mapping[str, Kind],
        since_ms: int = 0,
        until_ms: int = NEWEST_MS,
        share: tuple[int, int] = (0, 1),
        *,
        recorded: bool = False,
    ) -> Iterator[pa.RecordBatch]:
        """The events of a time, in parts: see `events_of`. Of several shares (number, of how many) only one."""
        if self._table is None:
            return
        dataset = self._table.to_pyarrow_dataset()
        # Under their own names, whatever columns they are in.
        columns = {name: ds.field(name) for name in (*_TIMES, "_partition", "_offset")}
        for name, kind in fields.items():
            if (column := _column(_flat(name), kind, dataset.schema)) in dataset.schema.names:
                columns[_flat(name)] = ds.field(column)
        topic = self._spec.topics.index(self.topic)
        days = (ds.field("_day") >= _day(since_ms)) & (ds.field("_day") <= _day(until_ms))
        fragments = sorted(dataset.get_fragments(filter=days), key=lambda fragment: fragment.path)
        for fragment in fragments[share[0] :: share[1]]:
            options: Any = {"batch_size": _SCAN_ROWS, "batch_readahead": 2, "fragment_readahead": 1}
            for batch in fragment.scanner(dataset.schema, columns=columns, filter=days, **options).to_batches():
                yield events_of(batch, fields, since_ms, until_ms, topic, recorded=recorded)

    def _open(self) -> DeltaTable | None:
        with self._done("read"):
            try:
                return DeltaTable(self.url, version=self._version, storage_options=self._options)
            except TableNotFoundError:
                if self._version is not None:
                    raise  # It was there where this was made.
                return None

    @property
    def _there(self) -> DeltaTable:
        if self._table is None:
            msg = f"there is no archive at {self.url}: run `headrace archive`"
            raise LookupError(msg)
        return self._table

    @property
    def _topic_id(self) -> str:
        return "" if self._table is None else self._table.metadata().configuration.get(_TOPIC_ID, "")

    def _said(self, name: str) -> int | None:
        return None if self._table is None else self._table.transaction_version(name)

    def _commit(self, rows: pa.Table, said: Mapping[str, int]) -> None:
        """Writes both as one, and this writer's next token.

        Raises:
            FencedError: if another writer's token is there.
        """
        token, own = secrets.randbits(62), {_flat(name): kind for name, kind in _own(self._spec).items()}
        transactions = [Transaction(name, version) for name, version in {**said, _WRITER: token}.items()]
        properties = CommitProperties(app_transactions=transactions)
        with self._done("written to"):
            for attempts_left in reversed(range(_ATTEMPTS)):
                there = pa.schema(self._there.schema().to_arrow())
                named = rows.rename_columns([_column(n, own[n], there) if n in own else n for n in rows.column_names])
                options: Any = {"mode": "append", "schema_mode": "merge", "commit_properties": properties}
                try:
                    write_deltalake(self._there, named, **options)
                except CommitFailedError as error:
                    # By another writer, or by who looks after the table.
                    self._table = self._open()
                    found = self._said(_WRITER)
                    if found != token:  # It is, where the answer to what was done was lost.
                        if self._token is None or found != self._token:
                            raise self._fenced() from error
                        if not attempts_left:
                            raise
                        continue
                self._token = token
                return

    def _set_topic_id(self, topic_id: str) -> None:
        """Like `_commit`; but this can't be written with a token, so it is looked at before and after."""
        with self._done("written to"):
            for attempts_left in reversed(range(_ATTEMPTS)):
                self._table = self._open()
                if self._said(_WRITER) != self._token:
                    break
                try:
                    self._there.alter.set_table_properties({_TOPIC_ID: topic_id}, raise_if_not_exists=False)
                except CommitFailedError:
                    if not attempts_left:
                        raise
                    continue
                break
        if self._said(_WRITER) != self._token:
            raise self._fenced()

    def _fenced(self) -> FencedError:
        return FencedError(f"{self.url} was written to by another archiver", superseded=True)

    @contextmanager
    def _done(self, what: str) -> Iterator[None]:
        """What the object store or another writer stands in the way of may be done again: it will pass."""
        try:
            yield
        except SchemaMismatchError:
            raise
        except (DeltaError, OSError) as error:
            msg = f"the archive at {self.url} can't be {what} now: {error}"
            raise ConnectionError(msg) from error


def tables_of(settings: Settings, plan: Plan) -> dict[str, ArchiveTable]:
    """The archive's tables of a plan, by name."""
    where, options = settings.archive_url(), settings.archive_options
    every = (ArchiveTable(where, spec, options, topic=topic) for spec in plan.events for topic in spec.topics)
    return {table.name: table for table in every}


def table_name(spec: EventSpec, topic: str) -> str:
    """The name of the table of a contract from a topic: no other contract has the topic, or each has a part of it."""
    return f"{topic}~{spec.name}" if spec.reads.when else topic


def table_names(spec: EventSpec) -> tuple[str, ...]:
    """The names of a contract's tables."""
    return tuple(table_name(spec, topic) for topic in spec.topics)


def whole_record(records: Iterable[tuple[str, CommitRecord]]) -> CommitRecord:
    """What tables include, from each one's topic and record: of a topic what all of its tables do."""
    of_topics: dict[str, list[CommitRecord]] = {}
    for topic, record in records:
        of_topics.setdefault(topic, []).append(record)
    return united(map(common, of_topics.values()))


def forgotten_of(settings: Settings) -> Forgotten:
    """Who is forgotten, as the archive has it."""
    found = Forgotten()
    with suppress(TableNotFoundError):
        rows = DeltaTable(_forgotten_url(settings), storage_options=settings.archive_options).to_pyarrow_table()
        for entity in pc.unique(rows["entity"]).to_pylist():
            mine = rows.filter(pc.equal(rows["entity"], entity)).sort_by("at")
            ids = (each.encode() for each in mine["id"].to_pylist())
            found.add(entity, dict(zip(ids, _ms(mine["at"].combine_chunks()).tolist(), strict=True)))
    return found


def archive_forgotten(settings: Settings, plan: Plan, client: Any) -> Forgotten:
    """Has the archive know who is forgotten, as Redis says it, also by orders that still stand; returns all.

    Whoever makes rows of the archive goes by what it knows.
    """
    known, told = forgotten_of(settings), read_forgotten(client, Keyspace.of(plan), plan.stored_entities)
    for each in orders(client, plan.project, 0):
        told.add(each.entity, dict.fromkeys(each.ids, each.at_ms))
    for entity, times in told.items():
        mine = known.get(entity, {})
        if new := {each: at_ms for each, at_ms in times.items() if mine.get(each, -1) < at_ms}:
            options: Any = {"mode": "append", "storage_options": settings.archive_options}
            write_deltalake(_forgotten_url(settings), _forgotten_rows(entity, new), **options)
            known.add(entity, new)
    return known


def _forgotten_url(settings: Settings) -> str:
    return f"{settings.archive_url().rstrip('/')}/{_FORGOTTEN}"


def _forgotten_rows(entity: str, times: Times) -> pa.Table:
    ids = pa.array([each.decode() for each in times], pa.string())
    at = _times(np.array(list(times.values()), np.int64))
    return pa.table([pa.array([entity] * len(ids)), ids, at], schema=_FORGOTTEN_SCHEMA)


def rows_of(  # a column each
    spec: EventSpec,
    event_ids: pa.StringArray,
    occurred_ms: NDArray[np.int64],
    recorded_ms: NDArray[np.int64],
    partition: int,
    offsets: NDArray[np.int64],
    fields: Mapping[str, Any],
) -> pa.Table:
    """Events of one partition as a table holds them; columns as `features.rows.Events` has them."""
    days = np.minimum(occurred_ms, recorded_ms) // DAY_MS
    columns: dict[str, Any] = {"event_id": event_ids, "occurred_at": _times(occurred_ms)}
    for name, kind in _own(spec).items():
        columns[_flat(name)] = _typed(fields[name], kind)
    columns["_recorded_at"] = _times(recorded_ms)
    columns["_partition"] = pa.array(np.full(len(offsets), partition, np.int32))
    columns["_offset"] = pa.array(offsets)
    columns["_day"] = pa.array(days.astype(np.int32)).view(pa.date32())
    return pa.table(columns, schema=_schema(spec))


def _schema(spec: EventSpec) -> pa.Schema:
    fields = [(_flat(name), _TYPES[kind]) for name, kind in _own(spec).items()]
    return pa.schema(
        [
            ("event_id", pa.string()),
            ("occurred_at", _TIME),
            *fields,
            ("_recorded_at", _TIME),
            ("_partition", pa.int32()),
            ("_offset", pa.int64()),
            ("_day", pa.date32()),
        ]
    )


def _own(spec: EventSpec) -> dict[str, Kind]:
    """The contract's fields but for those that every contract has."""
    return {name: kind for name, kind in spec.fields.items() if name not in ("event_id", "occurred_at")}


def _flat(name: str) -> str:
    """The column of a field: of one in a model without the dots, which SQL reads otherwise."""
    return name.replace(".", "__")


def _name(partition: int, what: str) -> str:
    return f"headrace/{partition}/{what}"


def _column(name: str, kind: Kind, there: pa.Schema) -> str:
    """The column of a field; one that has another type than before has one of its own."""
    return name if name not in there.names or there.field(name).type == _TYPES[kind] else f"{name}__{kind}"


def _day(ms: int) -> date:
    return (datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=ms)).date()


def _times(ms: NDArray[np.int64]) -> pa.Array:
    return pa.array(ms * 1000).view(_TIME)


def _ms(times: pa.Array) -> NDArray[np.int64]:
    return np.asarray(times.view(pa.int64())) // 1000


def _typed(column: Any, kind: Kind) -> pa.Array:
    """A column of events, float64 with NaN for null if it is no text, as the type that its field has."""
    if kind in ("str", "list[str]"):
        return column
    null = np.isnan(column)
    if kind == "float":
        return pa.array(column, mask=null)
    values = np.where(null, 0, column)
    return pa.array(values == 1 if kind == "bool" else values.astype(np.int64), mask=null)


def events_of(
    rows: pa.RecordBatch,
    fields: Mapping[str, Kind],
    since_ms: int = 0,
    until_ms: int = NEWEST_MS,
    topic: int = 0,
    *,
    recorded: bool = False,
) -> pa.RecordBatch:
    """Rows of a table as events with `since_ms <= t < until_ms`: fields, `_t` (int64, ms), `_topic`, `_partition` and
    `_offset`.

    `_topic` says which of its contract's the table's is. `_t` is the event's time by the window rule; if it is asked
    for, `_recorded` (int64, ms) is the broker's. A field that the table has not (yet) is null.
    """
    t = np.minimum(*(_ms(rows[name]) for name in _TIMES))
    found: dict[str, Any] = {}
    for name, kind in fields.items():
        column = _flat(name)
        found[name] = rows[column] if column in rows.schema.names else pa.nulls(len(rows), _TYPES[kind])
    found |= {"_t": pa.array(t), "_topic": pa.array(np.full(len(rows), topic, np.int16))}
    found |= {"_partition": rows["_partition"], "_offset": rows["_offset"]}
    if recorded:
        found["_recorded"] = pa.array(_ms(rows["_recorded_at"]))
    inside = (t >= since_ms) & (t < until_ms)
    events = pa.record_batch(found)
    return events if inside.all() else events.filter(pa.array(inside))
