"""Backfill: rows of what happened before the stream took a plan up, left for the plan's shards to add.

Nothing is written but batches that a shard's writer adds and deletes, in a commit that counts them: see
`store.filling`. A batch has some entities with all that happened before the seam, so that who was stopped makes the
same batches again, and goes on where each shard is.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from config.settings import Settings
from features.evolve import filling_alone
from features.plan import Plan
from store.archive import archive_forgotten
from store.commit import read_records, taken_by_all
from store.filling import KEPT_MS, Batch, decode_seam
from store.keys import Keyspace
from training.history import Job, Past, Seams, Shard, make_rows
from training.run import Progress, in_threads

_AHEAD: Final = 2
"""So many batches of a shard wait to be added."""
_PATIENCE_S: Final = 60.0
"""A stream that adds nothing for so long is taken for one that does not run."""
_LOOK_S: Final = 0.05


class BackfillError(RuntimeError):
    """History can't be added: the message says what to do."""


class SeamError(BackfillError):
    """Where a shard's history ends can't be known: it takes another plan."""


def fill(
    settings: Settings,
    plan: Plan,
    client: Any,
    *,
    folder: Path | None = None,
    on_progress: Progress = lambda _step, _done, _of: None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, int]:
    """Adds the history of a plan that is filled to all shards; returns once they have it.

    Args:
        settings: where the archive and Kafka are.
        plan: the plan, which a stream runs.
        client: Redis.
        folder: for files in between, by default one that is gone afterwards.
        on_progress: is told how far it is.
        clock: seconds.
        sleep: waits so many.

    Returns:
        Of each contract of which the history does not have all events, how long before the stream took the plan up it
        begins: see `features.evolve.backfilled`.

    Raises:
        SeamError: if where the history ends can't be known.
        BackfillError: if no stream adds it.
    """
    assert plan.history is not None  # noqa: S101  # for the type checker: there is one where anything is filled
    shards, n_batches = _Shards(plan, client, clock, sleep), plan.history.batches
    first = shards.begun()
    with tempfile.TemporaryDirectory(prefix="headrace-backfill-", dir=folder) as spill:
        job = Job(plan, filling_alone(plan), plan.history, Path(spill), archive_forgotten(settings, plan, client))
        past = Past(settings, job, on_progress)
        if first < n_batches:
            past.sort_archive()  # Meanwhile: it takes the stream some seconds to take the plan up.
        seams = shards.seams()
        if unread := [each for each in past.archived if any(each not in seam for seam in seams.values())]:
            msg = f"the stream had not read {unread[0]} yet when it took up plan {plan.number}"
            raise SeamError(msg)
        past.sort_tail()
        todo = [
            (job, seams, past.now_ms, entity, number) for number in range(first, n_batches) for entity in job.bundles
        ]
        for (*_, number), batches in zip(todo, in_threads(_make_batch, todo), strict=True):
            on_progress("rows", shards.wait(number - _AHEAD), n_batches)
            shards.put(number, batches)
        while (done := shards.added()) < n_batches:
            on_progress("rows", shards.wait(done + 1), n_batches)
    return past.lead_ms(shards.taken_ms())


def _make_batch(job: Job, seams: Seams, now_ms: int, entity: str, number: int) -> dict[Shard, bytes]:
    made = make_rows(job, seams, now_ms, entity, number)
    found = {}
    for shard, mine in enumerate(made.by_shard(job.plan.shards)):
        blobs = {family: [every[at] for at in mine] for family, every in made.rows.items()}
        ids, forgotten = [made.ids[at] for at in mine], job.forgotten.get(entity, {})
        told = {each: forgotten[each] for each in ids if each in forgotten} if forgotten else {}
        found[entity, shard] = Batch(ids, blobs, told).encode()
    return found


class _Shards:
    """The shards of a plan that is filled: what their writers say, and what is left for them."""

    def __init__(self, plan: Plan, client: Any, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._plan, self._redis, self._clock, self._sleep = plan, client, clock, sleep
        self._keyspace = Keyspace.of(plan)
        entities = sorted({view.entities[0] for view in plan.views if view.filling})
        self._names = [(entity, shard) for entity in entities for shard in range(plan.shards)]
        self._records = self._keyspace.commit_records(entities)

    def begun(self) -> int:
        """How many batches all of them have, whether or not their writers have taken the plan up."""
        records = read_records(self._redis, self._records)
        mine = [each.filled for each in records if each is not None and each.plan == self._plan.number]
        return min(each if isinstance(each, int) else 0 for each in mine) if len(mine) == len(records) else 0

    def seams(self) -> dict[Shard, dict[str, int]]:
        """Where the history of each ends, once its writer has taken the plan up."""
        keys = [self._keyspace.seam(*name, self._plan.number) for name in self._names]
        found = self._until(lambda: _all_there(self._redis.mget(keys)), lambda found: found is not None)
        seams = {}
        for name, data in zip(self._names, found or (), strict=True):
            seam = decode_seam(data)
            if seam is None:
                msg = f"an older plan ran on shard {name[1]} of {name[0]} after plan {self._plan.number}"
                raise SeamError(msg)
            seams[name] = seam
        return seams

    def added(self) -> int:
        """How many batches all of them have."""
        found = []
        for record in read_records(self._redis, self._records):
            if record is None or record.plan != self._plan.number or not isinstance(record.filled, int):
                msg = (
                    f"the stream runs plan {record.plan if record else 'none'}, no longer plan {self._plan.number}, "
                    "which history is added to; see `headrace history`, then run `headrace backfill` again"
                )
                raise BackfillError(msg)
            found.append(record.filled)
        return min(found)

    def wait(self, n: int) -> int:
        """Returns once all have so many batches; says how many they have."""
        added: int = self._until(self.added, lambda added: added >= n)
        return added

    def put(self, number: int, batches: Mapping[Shard, bytes]) -> None:
        """Leaves a batch for each."""
        pipeline = self._redis.pipeline(transaction=False)
        for name, data in batches.items():
            pipeline.set(self._keyspace.filling(*name, self._plan.number, number), data, px=KEPT_MS)
        pipeline.execute()

    def taken_ms(self) -> int:
        """When the last of them took the plan up."""
        return taken_by_all(read_records(self._redis, self._records), [self._plan.number])[self._plan.number]

    def _until(self, look: Callable[[], Any], enough: Callable[[Any], bool]) -> Any:
        """What a look finds once it is enough; while it finds ever more, there is hope."""
        found, since_s = look(), self._clock()
        while not enough(found):
            self._sleep(_LOOK_S)
            now_s, before, found = self._clock(), found, look()
            if found != before:
                since_s = now_s
            elif now_s - since_s > _PATIENCE_S:
                msg = (
                    f"no stream has taken up plan {self._plan.number}, or added any history, for {_PATIENCE_S:g} s: "
                    "does `headrace stream` run? Then run `headrace backfill` again: it goes on where it was"
                )
                raise BackfillError(msg)
        return found


def _all_there(found: Sequence[bytes | None]) -> list[bytes] | None:
    there = [each for each in found if each is not None]
    return there if len(there) == len(found) else None
