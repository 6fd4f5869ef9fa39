"""Duplicates: an event_id seen again in its partition within a horizon of record time counts once.

A record is a duplicate if any earlier record of its partition that its contract accepts, itself counted or not, has its
event_id and a record timestamp at most `horizon_ms` older. So it can be decided from the log alone: after a restart the
set is filled again from the horizon's offset on. Record timestamps that run backwards (topics with the producer's own)
are followed up to one more horizon, and no further: without such a bound nothing could ever be forgotten.
"""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from features.fold import compiled

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

_SPAN_PART = 32
"""Start offsets are remembered in steps of this part of the horizon."""


class Dedupe:
    """The event_ids of one partition, as 64-bit hashes in sorted arrays, the newer ones shorter."""

    def __init__(self, horizon_ms: int) -> None:
        self._horizon_ms = horizon_ms
        self._runs: list[tuple[Hashes, Ints, int]] = []
        """Sorted hashes, the latest time of each, and the latest of these."""
        self._spans: deque[tuple[int, int, int]] = deque()
        self._latest_ms = -1

    def __len__(self) -> int:
        return sum(len(hashes) for hashes, _, _ in self._runs)

    def duplicates(self, start: int, hashes: Hashes, record_ms: Ints) -> NDArray[np.bool_]:
        """bool[n]: which records repeat an earlier one. Remembers them all; `start` is the first one's offset."""
        if len(hashes) == 0:
            return np.zeros(0, bool)
        latest_ms = np.maximum.accumulate(np.maximum(record_ms, self._latest_ms))
        oldest_ms = np.maximum(record_ms, latest_ms - self._horizon_ms) - self._horizon_ms
        order = np.argsort(hashes, kind="stable")
        ordered, times = hashes[order], record_ms[order]
        seen_ms = np.full(len(hashes), -1, np.int64)
        for known, known_ms, _ in self._runs:
            _look_up(known, known_ms, ordered, seen_ms)
        first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
        if len(first) < len(ordered):
            # The latest earlier time in the same run of equal hashes: a running maximum that starts anew with each run.
            # On ranks of the times, as times of any size would overflow.
            run = np.repeat(np.arange(len(first)), np.diff(first, append=len(ordered)))
            distinct, rank = np.unique(times, return_inverse=True)
            highest = np.maximum.accumulate(run * len(distinct) + rank)
            before = distinct[highest[:-1] % len(distinct)]
            seen_ms[1:] = np.maximum(seen_ms[1:], np.where(run[1:] == run[:-1], before, -1))
        duplicate = np.zeros(len(hashes), bool)
        duplicate[order] = seen_ms >= np.maximum(oldest_ms[order], 0)
        self._latest_ms = int(latest_ms[-1])
        self._remember(start, ordered[first], np.maximum.reduceat(times, first))
        return duplicate

    def horizon(self, end: int) -> int:
        """The offset from which the log must be read again to decide on records from `end` on."""
        return self._spans[0][0] if self._spans else end

    def _remember(self, start: int, hashes: Hashes, times: Ints) -> None:
        forgotten_ms = self._latest_ms - 2 * self._horizon_ms
        latest = int(times.max())
        if self._spans and self._latest_ms - self._spans[-1][2] < self._horizon_ms // _SPAN_PART:
            first, span_latest, begun = self._spans.pop()
            self._spans.append((first, max(span_latest, latest), begun))
        else:
            self._spans.append((start, latest, self._latest_ms))
        while self._spans and self._spans[0][1] < forgotten_ms:
            self._spans.popleft()
        self._runs = [run for run in self._runs if run[2] >= forgotten_ms]
        # Runs of about the same length are merged, so that there are only ever about log2(n) of them.
        while self._runs and len(self._runs[-1][0]) <= 2 * len(hashes):
            known, known_ms, _ = self._runs.pop()
            hashes, times = _merged(np.concatenate([known, hashes]), np.concatenate([known_ms, times]), forgotten_ms)
            if len(hashes) == 0:
                break
        if len(hashes):
            self._runs.append((hashes, times, int(times.max())))


@compiled  # type: ignore[untyped-decorator]  # numba has no types
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


def _merged(hashes: Hashes, times: Ints, forgotten_ms: int) -> tuple[Hashes, Ints]:
    kept = times >= forgotten_ms
    hashes, times = hashes[kept], times[kept]
    if len(hashes) == 0:
        return hashes, times
    order = np.argsort(hashes, kind="stable")
    hashes, times = hashes[order], times[order]
    first = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
    return hashes[first], np.maximum.reduceat(times, first)
