"""The archiver: accepted events into the archive's tables, each once. Knows the archive, not Bytewax."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import redis

from config.settings import Settings
from features.plan import EventSpec, Plan
from store.archive import ArchiveTable, Complete, archive_forgotten, rows_of, table_name, tables_of, whole_record
from store.commit import CommitRecord
from store.forgotten import count_orders
from streams.chunk import Partition
from streams.decode import Checked
from streams.kafka import records_of
from streams.lane import GapError
from streams.metrics import METRICS

ORDERS_S = 10.0
"""It looks this often for who was forgotten."""
_ROWS_MAX = 200_000
"""So many events of a topic are committed, however recent."""


@dataclass(frozen=True)
class ArchivePart:
    """A chunk as a table takes it: its range, and a contract's events in it; the rest as of `streams.chunk.Part`."""

    spec: EventSpec
    partition: Partition
    start: int
    end: int
    horizon: int
    record_ms_max: int
    rows: pa.Table | None
    low: int | None
    topic_id: str

    def without(self, before: int) -> ArchivePart:
        """The part without the events before an offset."""
        if self.rows is None or before <= self.start:
            return self
        return replace(self, rows=self.rows.filter(pa.array(np.asarray(self.rows["_offset"]) >= before)))


def parts_of(checked: Checked) -> list[ArchivePart]:
    """A checked chunk as the archive takes it: for each contract of its topic."""
    chunk, found = checked.chunk, []
    start = max(chunk.start, chunk.fresh)
    range_ = (start, max(chunk.end, start), checked.horizon, int(chunk.record_ms.max(initial=-1)))
    for each in checked.events:
        rows, accepted, mine = None, each.accepted, each.mine
        if each.counted.any():
            fields = {name: column[mine] for name, column in accepted.fields.items()}
            given = (accepted.times_ms[mine], each.record_ms, chunk.partition.number, each.offsets, fields)
            rows = rows_of(each.spec, accepted.event_ids[mine], *given).filter(pa.array(each.counted))
        found.append(ArchivePart(each.spec, chunk.partition, *range_, rows, chunk.low, chunk.topic_id))
    return found


def archived(settings: Settings, plan: Plan, client: redis.Redis) -> list[CommitRecord]:
    """What of the log the archive has, as one record; of a topic made anew nothing, once the stream has accepted it."""
    accepted = _accepted(records_of(plan, client))
    records = []
    for table in tables_of(settings, plan).values():
        record, topic = table.record(), table.topic
        if topic in accepted and record.of_other_topic(topic, accepted[topic]):
            record = record.from_the_start_of(topic, accepted[topic])
        records.append((topic, record))
    return [whole_record(records)]


def _accepted(records: Iterable[CommitRecord]) -> dict[str, str]:
    """The id of each topic that the stream reads: that all shards have."""
    ids: dict[str, set[str]] = {}
    for record in records:
        for topic, topic_id in record.topics.items():
            ids.setdefault(topic, set()).add(topic_id)
    return {topic: found.pop() for topic, found in ids.items() if len(found) == 1}


class Archiver:
    """Writes the events of some topics. Making one claims their tables: from then on nobody else can write to them.

    Events are committed once there are many, or the first has waited for `archive_commit_s`. Before that it is asked by
    `confirm` whether topics still are those with the ids of the parts: see `streams.lane.Lane`.

    Raises:
        FencedError: if another archiver has claimed a table.
        GapError: if a part does not follow on what was received before.
    """

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        topics: Iterable[str],
        client: redis.Redis,
        clock: Callable[[], float] = time.monotonic,
        confirm: Callable[[Mapping[str, str]], Callable[[], None]] = lambda _: lambda: None,
    ) -> None:
        self._commit_s, self._clock, self._confirm = settings.archive_commit_s, clock, confirm
        self._settings, self._plan, self._redis = settings, plan, client
        self._orders, self._ordered_at_s = 0, clock()
        accepted = _accepted(records_of(plan, client))
        mine = set(topics)
        self._pending = {
            name: _Pending(table, accepted.get(table.topic, ""), clock())
            for name, table in tables_of(settings, plan).items()
            if table.topic in mine
        }

    def start(self, parts: Sequence[ArchivePart]) -> None:
        """Takes parts, and commits what is due."""
        for part in parts:
            self._pending[table_name(part.spec, part.partition.topic)].take(part)
        for pending in self._pending.values():
            due = self._clock() - pending.since_s >= self._commit_s or pending.n_rows >= _ROWS_MAX
            if due and pending.moved:
                self._commit(pending)
            elif not pending.moved:
                pending.since_s = self._clock()
        if self._clock() - self._ordered_at_s >= ORDERS_S:
            self._ordered_at_s = self._clock()
            self._learn_forgotten()

    def _learn_forgotten(self) -> None:
        """Whom the stream has forgotten: for when Redis has lost everything."""
        n_orders = count_orders(self._redis, self._plan.project)
        if n_orders != self._orders:
            carried_out = min(record.orders or 0 for record in records_of(self._plan, self._redis))
            archive_forgotten(self._settings, self._plan, self._redis)
            self._orders = carried_out

    def settle(self) -> None:
        """Commits all that was taken."""
        for pending in self._pending.values():
            if pending.moved:
                self._commit(pending)

    def _commit(self, pending: _Pending) -> None:
        self._confirm({pending.topic: pending.topic_id} if pending.topic_id else {})()
        pending.commit(self._clock())


class _Pending:
    """What of a topic is not committed yet.

    Attributes:
        since_s: when the first of it came.
        moved: whether there is anything.
        n_rows: how many events.
    """

    def __init__(self, table: ArchiveTable, accepted: str, now_s: float) -> None:
        self._table = table
        table.claim()
        self.topic_id = table.record().topics.get(table.topic, "")
        if accepted and self.topic_id and accepted != self.topic_id:
            table.accept_topic(accepted)
            self.topic_id = accepted
        self._complete = table.complete()
        self._horizons: dict[int, int] = {}
        self._rows: list[pa.Table] = []
        self.topic, self.since_s, self.n_rows = table.topic, now_s, 0

    @property
    def moved(self) -> bool:
        return bool(self._horizons)

    def take(self, part: ArchivePart) -> None:
        """Takes what of a part is new."""
        number = part.partition.number
        known = self._complete.get(number)
        if self.topic_id and part.topic_id and part.topic_id != self.topic_id:
            msg = f"a chunk of {self.topic} is of the topic {part.topic_id}, but the archive's is {self.topic_id}"
            raise GapError(msg)
        if part.topic_id and not self.topic_id:
            self._table.be_of_topic(part.topic_id)
            self.topic_id = part.topic_id
        at = known.next if known else part.start if part.low is None else part.low
        if part.start > at:
            msg = f"{part.partition}: a chunk starts at offset {part.start}, but the archive ends before {at}"
            raise GapError(msg)
        if part.end <= at:
            return
        rows = part.without(at).rows
        if rows is not None and len(rows):
            self._rows.append(rows)
            self.n_rows += len(rows)
        recorded_ms = max(part.record_ms_max, known.recorded_ms if known else 0)
        # What was there before the archive began is not in it, unless the log begins here too.
        begun = known is not None and known.since_ms >= 0
        since_ms = known.since_ms if known and begun else recorded_ms if part.start else 0
        self._complete[number] = Complete(part.end, recorded_ms, since_ms)
        self._horizons[number] = part.horizon

    def commit(self, now_s: float) -> None:
        """Writes all as one."""
        rows = pa.concat_tables(self._rows) if self._rows else None
        self._table.append(rows, {number: self._complete[number] for number in self._horizons}, self._horizons)
        METRICS.archived(self.topic, self.n_rows)
        self._rows, self._horizons, self.n_rows, self.since_s = [], {}, 0, now_s
