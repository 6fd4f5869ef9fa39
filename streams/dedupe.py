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
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        seen_ms = np.full(len(hashes), -1, np.int64)
        for known, known_ms, _ in self._runs:
            _look_up(known, known_ms, ordered, seen_ms)
        duplicate: NDArray[np.bool_]
        duplicate, distinct, times, self._latest_ms = _judge(
            ordered, order, seen_ms, record_ms, self._latest_ms, self._horizon_ms
        )
        self._remember(start, distinct, times)
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
            hashes, times = _merged(known, known_ms, hashes, times, forgotten_ms)
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


@compiled  # type: ignore[untyped-decorator]  # numba has no types
def _judge(
    ordered: Hashes, order: Ints, seen_ms: Ints, record_ms: Ints, latest_ms: int, horizon_ms: int
) -> tuple[NDArray[np.bool_], Hashes, Ints, int]:
    """Which records are duplicates; their distinct hashes and the latest time of each; the latest time so far.

    Args:
        ordered: the hashes, sorted; equal ones as they came.
        order: which record each is of.
        seen_ms: the latest time of each among what is remembered; -1 for none.
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
        index, earlier_ms = order[place], seen_ms[place]
        time_ms = record_ms[index]
        if count and distinct[count - 1] == ordered[place]:
            earlier_ms = max(earlier_ms, times[count - 1])
            times[count - 1] = max(times[count - 1], time_ms)
        else:
            distinct[count], times[count] = ordered[place], time_ms
            count += 1
        duplicate[index] = earlier_ms >= max(oldest_ms[index], 0)
    return duplicate, distinct[:count], times[:count], latest_ms


@compiled  # type: ignore[untyped-decorator]  # numba has no types
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
