"""Forget: the order, and what follows once the stream has carried it out. See docs/decisions/0023-forget.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from config.settings import Settings
from features.events import Kind
from features.plan import EventSpec, Plan
from features.texts import decimal_texts
from store.archive import archive_forgotten, table_names, tables_of
from store.forgotten import Times, order, read_forgotten
from store.keys import Keyspace
from streams.tail import letters_about
from training.run import Progress, events_of_tail, tail_of

_PATIENCE_S: Final = 60.0
"""A stream that carries out nothing for so long is taken for one that does not run."""
_LOOK_S: Final = 0.1


class ForgetError(RuntimeError):
    """An order that stands, and is not carried out: the message says what to do."""


@dataclass(frozen=True)
class Done:
    """What was done.

    Attributes:
        times_ms: by id, what happened until when does not count.
        letters: the dead letters that name one of them: where each is, and why it was refused.
    """

    times_ms: Times
    letters: Sequence[str]


def forget(
    settings: Settings,
    plan: Plan,
    client: Any,
    entity: str,
    ids: Sequence[str],
    *,
    on_progress: Progress = lambda _step, _done, _of: None,
    clock: Callable[[], float] = time.time,
    sleep: Callable[[float], None] = time.sleep,
) -> Done:
    """Has entities forgotten; returns once their rows are gone and the archive knows.

    Args:
        settings: where the archive and Kafka are.
        plan: the one that is applied.
        client: Redis.
        entity: what they are.
        ids: theirs.
        on_progress: is told how far it is.
        clock: seconds since the epoch.
        sleep: waits so many.

    Raises:
        ForgetError: if no stream carries it out.
    """
    now_ms = int(clock() * 1000)
    order(client, plan.project, entity, ids, now_ms)
    wanted = {each.encode() for each in ids}
    until_s, known = clock() + _PATIENCE_S, 0
    while True:
        times = read_forgotten(client, Keyspace.of(plan), [entity]).get(entity, {})
        done = {each: times[each] for each in wanted if times.get(each, -1) >= now_ms}
        on_progress("stream", len(done), len(wanted))
        if len(done) == len(wanted):
            break
        if len(done) > known:
            until_s, known = clock() + _PATIENCE_S, len(done)
        if clock() > until_s:
            msg = (
                f"{len(wanted) - len(done)} of {len(wanted)} are not forgotten after {_PATIENCE_S:g} s: does `headrace "
                "stream` run? The order stands, and is carried out when it does; run this again to see it done"
            )
            raise ForgetError(msg)
        sleep(_LOOK_S)
    archive_forgotten(settings, plan, client)
    on_progress("dead letters", 0, 1)
    letters = list(letters_about(settings, plan.topics, ids))
    on_progress("dead letters", 1, 1)
    return Done(done, letters)


def idle(settings: Settings, plan: Plan, entity: str, before_ms: int) -> list[str]:
    """The ids that the archive or Kafka has events of, all before a time, ms since the epoch."""
    key = plan.entity(entity).key

    def wanted(spec: EventSpec) -> dict[str, Kind]:
        return {key: spec.fields[key]} if key in spec.fields else {}

    tables = tables_of(settings, plan)
    read = [(spec, tables[name]) for spec in plan.events if wanted(spec) for name in table_names(spec)]
    latest = _latest(key, (events for spec, table in read for events in table.scan(wanted(spec))))
    with tail_of(settings, plan, [table for _, table in read]) as tail:
        latest = _latest(key, [latest, *(events for _, events in events_of_tail(tail, wanted, 0))])
    ids: list[str] = latest.filter(pc.field("_t") < before_ms)[key].to_pylist()
    return ids


def _latest(key: str, found: Iterable[pa.RecordBatch | pa.Table]) -> pa.Table:
    """Of each id its last event."""
    latest = pa.schema([(key, pa.string()), ("_t", pa.int64())]).empty_table()
    for events in found:
        columns = [decimal_texts(events[key]), events["_t"]]
        both = pa.concat_tables([latest, pa.table(columns, schema=latest.schema).drop_null()])
        grouped = both.group_by(key).aggregate([("_t", "max")])
        latest = grouped.select([key, "_t_max"]).rename_columns([key, "_t"])
    return latest
