"""History: the rows of entities as they were at many times, from all their events.

For each entity its events and the times asked for are gone through in order: what came since the last time is merged
as the stream merges it, by the same loop, and the row is copied. So the work grows with events and times, and not with
their product; and what is evaluated afterwards, of all times at once, are the very rows that would have been served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from features.kernel import Batch
from features.layout import Family
from features.loops import compiled
from features.rows import Events, Index, Ints, Rows
from features.tiles import merge_tables

WORDS_MAX: Final = 1 << 21
"""So many numbers of rows are made at once: 16 MB."""
_NONE: Final = np.zeros(0, np.int64)


class Arrived(NamedTuple):
    """What had arrived when, for rows as the stream made them: late events too, in the order in which they came.

    Attributes:
        events_ms: by contract, int64[events], when each event arrived.
        until_ms: int64[n], what had arrived before then is in a row; ascending for each entity.
    """

    events_ms: Mapping[str, Ints]
    until_ms: Ints


def rows_at(
    family: Family,
    events: Mapping[str, Events],
    rows: Index,
    times_ms: Ints,
    words_max: int = WORDS_MAX,
    arrived: Arrived | None = None,
) -> Iterator[tuple[slice, Rows]]:
    """The rows of entities at some times, each from its events strictly before.

    A row whose entity was idle for the family's retention is forgotten, as Redis forgets it.

    Args:
        family: what the rows are.
        events: by contract, of entities by number; those of contracts that are not read are ignored.
        rows: intp[n], of which entity; ascending.
        times_ms: int64[n], as of when; ascending for each entity, unless `arrived` says otherwise.
        words_max: about how many numbers of rows to give at once.
        arrived: when events arrived; by default each at its own time, and what had by the time asked for counts.

    Yields:
        Consecutive slices of the n, and their rows.
    """
    bundle = family.alone
    events = {name: events[name] for name in bundle.events if name in events}
    batch = Batch(bundle, events)
    texts = batch.texts
    arrived = arrived or Arrived({}, times_ms)
    arrives_ms = np.concatenate([_NONE, *(arrived.events_ms.get(name, each.times_ms) for name, each in events.items())])
    arrives_ms = arrives_ms[batch.sources]
    # No row is evaluated before the time that was its latest when it was merged.
    slack_ms = (arrived.until_ms - times_ms).max(initial=0)
    order = np.lexsort((arrives_ms, batch.rows))
    measured = [np.ascontiguousarray(each[:, order]) for each in (batch.takes, batch.values, batch.buckets)]
    has_bucket = np.ascontiguousarray(batch.has_bucket[:, order])
    of_rows = np.append(np.arange(len(texts)), -1), *bundle.merging, family.retention_ms
    happened = batch.rows[order], arrives_ms[order], batch.times_ms[order], *measured, has_bucket
    state: Any = _NONE, np.zeros(len(bundle.tables), np.int64), -1, 0
    done = 0
    while done < len(rows):
        asked: Any = (*of_rows, *happened, rows, times_ms, arrived.until_ms, slack_ms, done, *state, words_max)
        end, *state, pools, sizes, latest_ms = _advance(*asked)
        pool, totals = _together(pools, sizes, bundle.merging.shapes)
        yield slice(done, end), Rows.of_pool(bundle, latest_ms[np.newaxis], pool, totals, texts)
        done = end


def without_forgotten(family: Family, events: Mapping[str, Events]) -> Mapping[str, Events]:
    """The events that a family's rows still have after the last of them: those since a row was last forgotten.

    It is, as `rows_at` has it, once its entity was idle for the family's retention.

    Args:
        family: what the rows are.
        events: by contract, all of some entities.
    """
    events = {name: events[name] for name in family.events if name in events}
    rows = np.concatenate([_NONE, *(each.rows for each in events.values())])
    times_ms = np.concatenate([_NONE, *(each.times_ms for each in events.values())])
    if not len(rows) or times_ms.max() - times_ms.min() < family.retention_ms:
        return events
    order = np.lexsort((times_ms, rows))
    paused = (np.diff(rows[order]) == 0) & (np.diff(times_ms[order]) >= family.retention_ms)
    begins_ms = np.full(rows.max() + 1, np.iinfo(np.int64).min)
    np.maximum.at(begins_ms, rows[order[1:][paused]], times_ms[order[1:][paused]])
    return {name: each.take(each.times_ms >= begins_ms[each.rows]) for name, each in events.items()}


@compiled
def _advance(  # noqa: PLR0913, PLR0917  # compiled code takes arrays, not objects
    recode: Ints,
    shapes: Ints,
    operations: Ints,
    empty: Ints,
    measures: Ints,
    kinds: Ints,
    ageing: Ints,
    recency: Ints,
    is_text: NDArray[np.bool_],
    retention_ms: int,
    rows: Ints,
    arrives_ms: Ints,
    times_ms: Ints,
    takes: NDArray[np.bool_],
    values: Ints,
    buckets: Ints,
    has_bucket: NDArray[np.bool_],
    asked_rows: Ints,
    asked_ms: Ints,
    until_ms: Ints,
    slack_ms: int,
    asked: int,
    pool: Ints,
    sizes: Ints,
    latest_ms: int,
    event: int,
    words_max: int,
) -> tuple[int, Ints, Ints, int, int, Ints, Ints, Ints]:
    """Goes through times asked for, from `asked` on, until the copies of rows are about `words_max` numbers.

    Args:
        recode: see `features.tiles.merge_tables`, like the next eight.
        shapes: int64[tables, 6].
        operations: int64[partials, 3].
        empty: int64[columns].
        measures: int64[partials].
        kinds: int64[tables, 6].
        ageing: int64[windows, 3].
        recency: int64[…].
        is_text: bool[lines].
        retention_ms: a row without events for so long is gone.
        rows: int64[events], the entity of each; ascending.
        arrives_ms: int64[events], ascending for each entity.
        times_ms: int64[events].
        takes: bool[measures, events], as `merge_tables` takes it, like the next three.
        values: int64[measures, events].
        buckets: int64[fields, events].
        has_bucket: bool[fields, events].
        asked_rows: int64[n], see `rows_at`, like the next.
        asked_ms: int64[n].
        until_ms: int64[n], see `Arrived`; ascending for each entity.
        slack_ms: by how much they may be later than the times asked for.
        asked: which of them is next.
        pool: the row of the entity of the one before, like the next.
        sizes: int64[tables].
        latest_ms: its last event.
        event: the first event that is not in it.
        words_max: see `rows_at`.

    Returns:
        What is then next, the row and its last event, and the first event that is not in it; the pools of all rows
        asked for, one after the other, their sizes (int64[n, tables]) and last events (int64[n]).
    """
    first = asked
    pools = np.empty(words_max, np.int64)
    all_sizes = np.empty((len(asked_rows) - first, len(shapes)), np.int64)
    all_latest_ms = np.full(len(asked_rows) - first, -1)
    used = 0
    while asked < len(asked_rows) and used < words_max:
        row, now_ms = asked_rows[asked], asked_ms[asked]
        if asked == 0 or row != asked_rows[asked - 1]:
            pool, latest_ms = pool[:0], -1
            sizes = np.zeros(len(shapes), np.int64)
            while event < len(rows) and rows[event] < row:
                event += 1
        begin = event
        while event < len(rows) and rows[event] == row and arrives_ms[event] < until_ms[asked]:
            if latest_ms >= 0 and times_ms[event] >= latest_ms + retention_ms:
                pool, begin = pool[:0], event
                sizes = np.zeros(len(shapes), np.int64)
            latest_ms = max(latest_ms, times_ms[event])
            event += 1
        if event > begin:
            pool, sizes, _ = merge_tables(
                pool,
                sizes,
                recode,
                1,
                until_ms[asked] - slack_ms,
                shapes,
                operations,
                empty,
                measures,
                kinds,
                ageing,
                recency,
                is_text,
                np.zeros(event - begin, np.int64),
                times_ms[begin:event],
                takes[:, begin:event].copy(),
                values[:, begin:event].copy(),
                buckets[:, begin:event].copy(),
                has_bucket[:, begin:event].copy(),
            )
        all_sizes[asked - first] = 0
        if latest_ms >= 0 and now_ms < latest_ms + retention_ms:
            if used + len(pool) > len(pools):
                pools = np.concatenate((pools[:used], np.empty(len(pools) + len(pool), np.int64)))
            pools[used : used + len(pool)] = pool
            used += len(pool)
            all_sizes[asked - first] = sizes
            all_latest_ms[asked - first] = latest_ms
        asked += 1
    n = asked - first
    return asked, pool, sizes, latest_ms, event, pools[:used], all_sizes[:n], all_latest_ms[:n]


@compiled
def _together(pools: Ints, sizes: Ints, shapes: Ints) -> tuple[Ints, Ints]:
    """One pool of the pools of n single rows: their tables, each row's with its number in the first line."""
    totals = sizes.sum(axis=0)
    pool = np.empty(len(pools), np.int64)
    source = 0
    ends = np.zeros(len(totals), np.int64)
    for row in range(len(sizes)):
        first = 0
        for table in range(len(totals)):
            size = sizes[row, table]
            for line in range(shapes[table, 0]):
                to = first + line * totals[table] + ends[table]
                if line:
                    pool[to : to + size] = pools[source : source + size]
                else:
                    pool[to : to + size] = row
                source += size
            ends[table] += size
            first += shapes[table, 0] * totals[table]
    return pool, totals
