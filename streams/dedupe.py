"""Duplicates: an event_id seen again in its partition within a horizon of record time counts once.

A record is a duplicate if any earlier record of its partition that its contract accepts, itself counted or not, has
its event_id and a record timestamp at most `horizon_ms` older. So it can be decided from the log alone: after a restart
the set is filled again from the horizon's offset on. Record timestamps that run backwards (topics with the producer's
own) are followed up to one more horizon behind the latest, and however far among the last records: those of the same
block of `BLOCK` offsets, and of the one before. Without such bounds nothing could ever be forgotten. Where a topic has
several contracts, the hash of an event_id is mixed with its contract's.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Final

import numpy as np
from numpy.typing import NDArray

from features.loops import compiled

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
_Run = tuple[Hashes, Ints, int]
"""Sorted hashes, the latest time of each, and the latest of these."""

BLOCK: Final = 32_768
_SPAN_PART = 32
"""Start offsets are remembered in steps of this part of the horizon."""


class Dedupe:
    """The event_ids of one partition, as 64-bit hashes in sorted arrays, the newer ones shorter."""

    def __init__(self, horizon_ms: int, block: int = BLOCK) -> None:
        self._horizon_ms, self._block = horizon_ms, block
        self._runs: list[_Run] = []
        self._blocks: deque[tuple[int, int, list[_Run]]] = deque()
        """Of this block and the one before: its number, the offset of its first record, and its own runs."""
        self._spans: deque[tuple[int, int, int]] = deque()
        self._latest_ms = -1

    def __len__(self) -> int:
        return sum(len(hashes) for runs in (self._runs, *self._recent) for hashes, _, _ in runs)

    @property
    def _recent(self) -> list[list[_Run]]:
        return [runs for _, _, runs in self._blocks]

    def duplicates(self, offsets: Ints, hashes: Hashes, record_ms: Ints) -> NDArray[np.bool_]:
        """bool[n]: which records repeat an earlier one. Remembers them all; offsets ascend."""
        bounds = np.flatnonzero(np.diff(offsets // self._block, prepend=-1, append=-1)).tolist()
        found = [self._of_block(offsets[own], hashes[own], record_ms[own]) for own in map(slice, bounds, bounds[1:])]
        return np.concatenate([np.zeros(0, bool), *found])

    def horizon(self, end: int, record_ms: int = -1) -> int:
        """The offset from which the log must be read again to decide on records from `end` on.

        The last records, whosever they are, were not before `record_ms`: a contract of which nothing came for long does
        not have the log read again from then on.
        """
        forgotten_ms, block = record_ms - 2 * self._horizon_ms, end // self._block
        spans = (first for first, latest_ms, _ in self._spans if latest_ms >= forgotten_ms)
        blocks = (first for number, first, _ in self._blocks if number >= block - 1)
        return min([*islice(spans, 1), *islice(blocks, 1)], default=end)

    def _of_block(self, offsets: Ints, hashes: Hashes, record_ms: Ints) -> NDArray[np.bool_]:
        first, block = int(offsets[0]), int(offsets[0]) // self._block
        if not self._blocks or self._blocks[-1][0] != block:
            self._blocks.append((block, first, []))
        while self._blocks[0][0] < block - 1:
            # From now on only time counts.
            for run in self._blocks.popleft()[2]:
                self._keep(self._runs, *run[:2], self._latest_ms - 2 * self._horizon_ms)
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        seen_ms, recent_ms = (np.full(len(hashes), -1, np.int64) for _ in range(2))
        for known, known_ms, _ in self._runs:
            _look_up(known, known_ms, ordered, seen_ms)
        for runs in self._recent:
            for known, known_ms, _ in runs:
                _look_up(known, known_ms, ordered, recent_ms)
        duplicate: NDArray[np.bool_]
        duplicate, distinct, times, self._latest_ms = _judge(
            ordered, order, seen_ms, recent_ms, record_ms, self._latest_ms, self._horizon_ms
        )
        self._remember(first, distinct, times)
        return duplicate

    def _remember(self, first: int, hashes: Hashes, times: Ints) -> None:
        forgotten_ms = self._latest_ms - 2 * self._horizon_ms
        latest = int(times.max())
        if self._spans and self._latest_ms - self._spans[-1][2] < self._horizon_ms // _SPAN_PART:
            span_first, span_latest, begun = self._spans.pop()
            self._spans.append((span_first, max(span_latest, latest), begun))
        else:
            self._spans.append((first, latest, self._latest_ms))
        while self._spans and self._spans[0][1] < forgotten_ms:
            self._spans.popleft()
        self._runs = [run for run in self._runs if run[2] >= forgotten_ms]
        self._keep(self._blocks[-1][2], hashes, times, -1)

    @staticmethod
    def _keep(runs: list[_Run], hashes: Hashes, times: Ints, forgotten_ms: int) -> None:
        """Adds a run to others, without what is forgotten."""
        # Runs of about the same length are merged, so that there are only ever about log2(n) of them.
        while runs and len(runs[-1][0]) <= 2 * len(hashes):
            hashes, times = _merged(*runs.pop()[:2], hashes, times, forgotten_ms)
        if len(hashes) and (latest := int(times.max())) >= forgotten_ms:
            runs.append((hashes, times, latest))


@compiled
def _look_up(known: Hashes, known_ms: Ints, hashes: Hashes, seen_ms: Ints) -> None:
    """Brings `seen_ms` up to the time of each hash that is known; both are sorted."""
    for index in range(len(hashes)):
        low, high = 0, len(known)
        while low < high:
            middle = (low + high) // 2
            if known[middle] < hashes[index]:
                low = middle + 1
            else:
                high = middle
        if low < len(known) and known[low] == hashes[index]:
            seen_ms[index] = max(seen_ms[index], known_ms[low])


@compiled
def _judge(
    ordered: Hashes,
    order: Ints,
    seen_ms: Ints,
    recent_ms: Ints,
    record_ms: Ints,
    latest_ms: int,
    horizon_ms: int,
) -> tuple[NDArray[np.bool_], Hashes, Ints, int]:
    """Which records are duplicates; their distinct hashes and the latest time of each; the latest time so far.

    Args:
        ordered: the hashes, sorted; equal ones as they came.
        order: which record each is of.
        seen_ms: the latest time of each among what came before the last records; -1 for none.
        recent_ms: the same among the last records.
        record_ms: of the records, as they came.
        latest_ms: of all records before.
        horizon_ms: how much older an earlier one may be.
    """
    oldest_ms = np.empty(len(order), np.int64)
    for index in range(len(order)):
        latest_ms = max(latest_ms, record_ms[index])
        oldest_ms[index] = max(record_ms[index], latest_ms - horizon_ms) - horizon_ms
    duplicate = np.empty(len(order), np.bool_)
    distinct, times = np.empty(len(order), np.uint64), np.empty(len(order), np.int64)
    count = 0
    for place in range(len(order)):
        index, recently_ms = order[place], recent_ms[place]
        time_ms = record_ms[index]
        if count and distinct[count - 1] == ordered[place]:
            recently_ms = max(recently_ms, times[count - 1])
            times[count - 1] = max(times[count - 1], time_ms)
        else:
            distinct[count], times[count] = ordered[place], time_ms
            count += 1
        duplicate[index] = seen_ms[place] >= max(oldest_ms[index], 0) or recently_ms >= max(time_ms - horizon_ms, 0)
    return duplicate, distinct[:count], times[:count], latest_ms


@compiled
def _merged(hashes: Hashes, times: Ints, others: Hashes, other_times: Ints, forgotten_ms: int) -> tuple[Hashes, Ints]:
    """Two sorted runs as one, the later time of each hash, without those that are forgotten."""
    size = len(hashes) + len(others)
    merged, merged_ms = np.empty(size, np.uint64), np.empty(size, np.int64)
    count = left = right = 0
    while left < len(hashes) or right < len(others):
        has_left = right == len(others) or (left < len(hashes) and hashes[left] <= others[right])
        has_right = left == len(hashes) or (right < len(others) and others[right] <= hashes[left])
        merged[count] = hashes[left] if has_left else others[right]
        merged_ms[count] = max(times[left] if has_left else -1, other_times[right] if has_right else -1)
        left, right = left + has_left, right + has_right
        count += merged_ms[count] >= forgotten_ms
    return merged[:count].copy(), merged_ms[:count].copy()
