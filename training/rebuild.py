"""Rebuild: all rows of a plan made anew from the archive and Kafka, under keys of their own, beside those served.

Nobody reads or writes these keys until their plan is applied: so rows are written as they are, and then the commit
records that say what of the log they include. From there a lane goes on as a stream's does, to where the log ends now.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from config.settings import Settings
from features.layout import family_of
from features.plan import History, Plan
from store.archive import archive_forgotten
from store.commit import read_records, set_records, united
from store.forgotten import count_orders, write_forgotten
from store.keys import Keyspace, expire_at_ms
from store.plans import layouts_of
from streams.chunk import Partition
from streams.decode import Decoder
from streams.kafka import WorkerReader, records_of
from streams.lane import Lane
from streams.tail import Tail
from training.history import Job, Past, Seams, make_rows
from training.run import Progress, in_threads

_WAIT_S: Final = 0.05
_NEAR_S: Final = 2.0
"""Who follows the log for so long, or less, is near enough its end."""
_FOLLOWS: Final = 5
_COMMANDS: Final = 2_000


def rebuild(
    settings: Settings,
    plan: Plan,
    history: History,
    client: Any,
    *,
    before: Plan | None = None,
    folder: Path | None = None,
    on_progress: Progress = lambda _step, _done, _of: None,
    clock: Callable[[], float] = time.time,
) -> dict[str, int]:
    """Writes all rows of a plan that was not applied yet, and its commit records.

    Args:
        settings: where the archive and Kafka are.
        plan: the plan, of a generation that nobody writes to.
        history: since when, in how many batches.
        client: Redis.
        before: the plan that is applied, if any is: its writers know who is forgotten.
        folder: for files in between, by default one that is gone afterwards.
        on_progress: is told how far it is.
        clock: seconds since the epoch.

    Returns:
        Of each contract of which not all events are known, how long before now what is known begins, ms: see
        `features.evolve.rebuilt`.
    """
    keyspace = Keyspace.of(plan)
    with tempfile.TemporaryDirectory(prefix="headrace-rebuild-", dir=folder) as spill:
        n_orders = count_orders(client, plan.project)  # First: what is ordered later, the writers to come carry out.
        forgotten = archive_forgotten(settings, before or plan, client)
        job = Job(plan, plan, history, Path(spill), forgotten)
        past = Past(settings, job, on_progress)
        past.sort_archive()
        past.sort_tail()
        now_ms = int(clock() * 1000)
        positions = {name: position.next for name, position in past.record.positions.items()}
        seams = {(entity, shard): positions for entity in plan.stored_entities for shard in range(plan.shards)}
        todo = [
            (job, seams, past.now_ms, entity, number, client, now_ms)
            for number in range(history.batches)
            for entity in job.bundles
        ]
        for done, _ in enumerate(in_threads(_write_rows, todo), 1):
            on_progress("rows", done, len(todo))
    write_forgotten(client, keyspace, forgotten)
    record = msgspec.structs.replace(past.record, writer="rebuild", plan=plan.number, taken=((plan.number, now_ms),))
    record = msgspec.structs.replace(record, orders=n_orders or msgspec.UNSET)
    set_records(client, keyspace.commit_records(plan.stored_entities), record)
    return past.lead_ms(now_ms)


def _write_rows(job: Job, seams: Seams, as_of_ms: int, entity: str, number: int, client: Any, now_ms: int) -> None:
    made, keyspace = make_rows(job, seams, as_of_ms, entity, number), Keyspace.of(job.plan)
    for name, blobs in made.rows.items():
        family = family_of(job.plan, name)
        assert family is not None  # noqa: S101  # for the type checker: rows are of the plan's families
        expires_ms = expire_at_ms(family, made.latest_ms[name]).tolist()
        rows = zip(keyspace.rows(family, made.ids), blobs, expires_ms, strict=True)
        kept = [row for row in rows if row[1] and row[2] > now_ms]
        for begin in range(0, len(kept), _COMMANDS):
            pipeline = client.pipeline(transaction=False)
            for key, blob, expire_ms in kept[begin : begin + _COMMANDS]:
                pipeline.set(key, blob, pxat=expire_ms)
            pipeline.execute()


def follow(settings: Settings, plan: Plan, client: Any, clock: Callable[[], float] = time.time) -> None:
    """Goes on from the commit records as the stream would, until the log's end is near."""
    topics = list(plan.topics)
    lane = Lane(plan, 0, 1, client, clock, layouts=layouts_of(client, plan))
    decoder = Decoder(plan, 1, settings.dedupe_s * 1000)
    records = partial(records_of, plan, client)
    reader = WorkerReader(settings, plan, lambda _: True, records)
    at: dict[Partition, int] = {}
    try:
        for _ in range(_FOLLOWS):
            began_s = clock()
            with Tail(settings, plan, topics, united(records())) as tail:
                ends = tail.ends
            while any(at.get(each, 0) < end for each, end in ends.items()):
                # What is refused was refused before.
                decoded = decoder.decode_all(reader.next_chunks(_WAIT_S))
                parts = [part for each in decoded for part in each.parts]
                at |= {part.partition: part.end for part in parts}
                lane.write(parts)
            if clock() - began_s < _NEAR_S:
                break
    finally:
        reader.close()


def discard_others(client: Any, plan: Plan) -> int:
    """Deletes all rows of other generations; returns how many keys there were."""
    own, found, n = Keyspace.of(plan).prefix.encode(), [], 0
    for key in client.scan_iter(match=f"{{{plan.project}[:~]*", count=_COMMANDS):
        if not key.startswith(own):
            found.append(key)
        if len(found) >= _COMMANDS:
            n += _unlink(client, found)
            found = []
    return n + _unlink(client, found)


def _unlink(client: Any, keys: list[bytes]) -> int:
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.unlink(key)
    return sum(pipeline.execute()) if keys else 0


def writers_of(client: Any, plan: Plan) -> set[str]:
    """Who writes to a plan's shards."""
    keys = Keyspace.of(plan).commit_records(plan.stored_entities)
    return {record.writer for record in read_records(client, keys) if record}
