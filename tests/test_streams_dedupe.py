"""Duplicates: the vectorised rule against the rule as it is written, and the same decisions after a restart."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streams.dedupe import BLOCK, Dedupe
from tests.properties import scenarios  # noqa: F401  # its profile prints what repeats a failure

T0_MS = 1_763_683_200_000


@dataclass(frozen=True)
class Record:
    """An accepted record: its offset, the hash of its event_id, and its timestamp."""

    offset: int
    hash: int
    ms: int


def by_the_rule(records: list[Record], horizon_ms: int, block: int) -> list[bool]:
    """The docstring of `streams.dedupe`, record by record.

    A duplicate has an earlier record, itself counted or not, with its id and a timestamp at most the horizon older;
    timestamps that run backwards are followed up to one more horizon behind the latest so far, and however far among
    records of the same block of offsets and the one before.
    """
    found = []
    latest_ms = -1
    for index, record in enumerate(records):
        latest_ms = max(latest_ms, record.ms)
        followed_ms = max(record.ms, latest_ms - horizon_ms)
        recent = record.offset // block - 1
        found.append(
            any(
                e.hash == record.hash
                and (record.ms if e.offset // block >= recent else followed_ms) - e.ms <= horizon_ms
                for e in records[:index]
            )
        )
    return found


def feed(dedupe: Dedupe, chunks: list[list[Record]]) -> list[bool]:
    """The decisions on all records."""
    found: list[bool] = []
    for chunk in chunks:
        hashes, times = np.array([r.hash for r in chunk], np.uint64), np.array([r.ms for r in chunk], np.int64)
        found += dedupe.duplicates(np.array([r.offset for r in chunk], np.int64), hashes, times).tolist()
    return found


def cut(records: list[Record], rng: random.Random) -> list[list[Record]]:
    """The records in chunks of random length, some of one record, some long."""
    chunks = []
    at = 0
    while at < len(records):
        size = rng.choice([1, 1, 2, 5, 20, 100])
        chunks.append(records[at : at + size])
        at += size
    return chunks


@st.composite
def logs(draw: st.DrawFn) -> tuple[int, int, list[Record]]:
    """A horizon, a block, and a partition's records: ids repeat, times mostly increase, disorder is up to about one
    horizon, but for a record now and then of long ago or far ahead.

    Offsets have holes; hashes are at both ends of what 64 bits hold.
    """
    horizon_ms = draw(st.sampled_from([0, 1, 7, 31, 32, 100, 300_000]))
    unit = max(horizon_ms, 1)
    ids = draw(st.integers(1, 12))
    steps = st.sampled_from([0, 0, 1, unit // 50 + 1, unit // 10 + 1, unit // 2, unit - 1, unit, unit + 1, 3 * unit])
    near = [0, 0, 0, 0, 1, unit // 2, unit - 1, unit, unit + 1, 2 * unit, 2 * unit + 1, 5 * unit]
    lags = st.sampled_from([*near, 5 * unit + 1, 50 * unit, -50 * unit])
    block = draw(st.sampled_from([1, 2, 7, 30, 200, BLOCK]))
    now_ms = draw(st.sampled_from([0, 1, T0_MS]))
    offset = draw(st.integers(0, 5))
    records = []
    for _ in range(draw(st.integers(1, 120))):
        now_ms += draw(steps)
        which = draw(st.integers(0, ids - 1))
        value = which if which % 2 else (1 << 64) - 1 - which
        records.append(Record(offset, value, max(0, now_ms - draw(lags))))
        offset += draw(st.sampled_from([1, 1, 1, 2, 50]))
    return horizon_ms, block, records


@settings(max_examples=300)
@given(logs(), st.integers(0, 1 << 32))
def test_decisions_are_those_of_the_rule(log: tuple[int, int, list[Record]], seed: int) -> None:
    """However the records are cut into chunks."""
    horizon_ms, block, records = log
    want = by_the_rule(records, horizon_ms, block)
    rng = random.Random(seed)
    assert feed(Dedupe(horizon_ms, block), cut(records, rng)) == want
    assert feed(Dedupe(horizon_ms, block), [records]) == want
    assert feed(Dedupe(horizon_ms, block), [[record] for record in records]) == want


@settings(max_examples=300)
@given(logs(), st.integers(0, 1 << 32))
def test_after_a_restart_the_decisions_are_the_same(log: tuple[int, int, list[Record]], seed: int) -> None:
    """Rewound to the horizon's offset, and cut into other chunks, again and again.

    A set that starts empty at the committed offset counts again what was counted before the restart.
    """
    horizon_ms, block, records = log
    want = dict(zip((record.offset for record in records), by_the_rule(records, horizon_ms, block), strict=True))
    rng = random.Random(seed)
    dedupe, pending = Dedupe(horizon_ms, block), cut(records, rng)
    fresh = 0
    while pending:
        chunk = pending.pop(0)
        for record, decision in zip(chunk, feed(dedupe, [chunk]), strict=True):
            assert record.offset < fresh or decision == want[record.offset]
        end = chunk[-1].offset + 1
        horizon = dedupe.horizon(end)
        assert horizon <= end
        if rng.random() < 0.4:
            fresh = max(fresh, end)
            dedupe = Dedupe(horizon_ms, block)
            pending = cut([record for record in records if record.offset >= horizon], rng)
        if end == records[-1].offset + 1:
            break


def test_a_restart_into_the_middle_of_a_long_log() -> None:
    """At scale: a hundred thousand records of which a third repeat, restarted every few chunks."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = np.random.default_rng(seed)
    n, horizon_ms, block = 100_000, 10_000, 1_000
    hashes = rng.integers(0, 1 << 63, n, np.uint64)
    back = rng.integers(1, 20_000, n)
    for index in np.flatnonzero(rng.random(n) < 0.33).tolist():
        hashes[index] = hashes[max(0, index - int(back[index]))]
    times = T0_MS + np.arange(n) + rng.integers(-3_000, 3_000, n)
    whole = Dedupe(horizon_ms, block).duplicates(np.arange(n), hashes, times)
    assert 10_000 < whole.sum() < 40_000
    found = np.zeros(n, bool)
    at = fresh = 0
    dedupe = Dedupe(horizon_ms, block)
    while at < n:
        end = min(n, at + int(rng.integers(1, 4_000)))
        decided = dedupe.duplicates(np.arange(at, end), hashes[at:end], times[at:end])
        new = max(at, fresh)
        found[new:end] = decided[new - at :]
        at = end
        if rng.random() < 0.2 and at > fresh:
            fresh, at = at, dedupe.horizon(at)
            assert fresh - at < 4 * horizon_ms + 8_000 + 2 * block
            dedupe = Dedupe(horizon_ms, block)
    assert np.array_equal(found, whole)


def one_by_one(*records: tuple[str, int], block: int = 1) -> list[bool]:
    """Decisions on (id, ms) with a horizon of 100 ms."""
    listed = [Record(index, sum(map(ord, name)), ms) for index, (name, ms) in enumerate(records)]
    chunked = feed(Dedupe(100, block), [[record] for record in listed])
    assert feed(Dedupe(100, block), [listed]) == chunked
    return chunked


def test_the_horizon_is_inclusive() -> None:
    #       0        100      200  201
    #       a ------- a ------- a
    #                           b ... a
    assert one_by_one(("a", 0), ("a", 100)) == [False, True]
    assert one_by_one(("a", 0), ("a", 101)) == [False, False]
    assert one_by_one(("a", 0), ("b", 200), ("a", 201)) == [False, False, False]


def test_a_duplicate_extends_the_horizon() -> None:
    """Itself counted or not: three retries, each within the horizon of the one before, count once.

    A set that remembers only what was counted would count the third.
    """
    #       0     80     160    240
    #       a     a      a      a
    assert one_by_one(("a", 0), ("a", 80), ("a", 160), ("a", 240)) == [False, True, True, True]


def test_an_earlier_record_with_a_later_time_makes_a_duplicate() -> None:
    """Record time runs backwards where producers stamp it."""
    assert one_by_one(("a", 500), ("a", 450)) == [False, True]
    assert one_by_one(("a", 500), ("a", 0)) == [False, True]


def test_backwards_records_are_followed_up_to_one_more_horizon() -> None:
    #       0 … 100 … 200 … 300      offsets in order of writing
    #           a           b        then a at 100, 200 behind the latest: found; at 99 the first a would be forgotten
    assert one_by_one(("a", 100), ("b", 300), ("a", 100)) == [False, False, True]
    assert one_by_one(("a", 99), ("b", 300), ("a", 99)) == [False, False, False]


def test_backwards_records_are_followed_however_far_among_the_last() -> None:
    """Data of months, sent at once and out of order: 1,663 of 1,667 repeats counted, as two horizons behind the latest
    time was all that was remembered. One time far ahead had nothing found until then.
    """
    #       offsets  0: a at 99     1: b at 300     2: a at 99
    #       blocks   [------- of 2 ----------]     [------- ...
    assert one_by_one(("a", 99), ("b", 300), ("a", 99), block=2) == [False, False, True]
    assert one_by_one(("a", 99), ("b", 300), ("c", 0), ("c", 0), ("a", 99), block=2) == [False] * 3 + [True, False]
    ahead = ("x", 1 << 50)
    found = one_by_one(("a", 99), ahead, ("a", 100), ("b", 101), ("b", 102), block=9)
    assert found == [False, False, True, False, True]
    assert one_by_one(("a", 0), ("b", 300), ("a", 101), block=9) == [False, False, False]


def test_the_latest_of_several_earlier_ones_counts() -> None:
    """Also where it is not the last one written."""
    assert one_by_one(("a", 0), ("a", 90), ("a", 40), ("a", 180)) == [False, True, True, True]


def test_ids_whose_hashes_are_at_the_ends() -> None:
    ends = [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
    records = [Record(index, value, T0_MS) for index, value in enumerate(ends * 2)]
    for chunks in ([records], [[record] for record in records], [records[:5], records[5:]]):
        assert feed(Dedupe(10), chunks) == [False] * 5 + [True] * 5


@pytest.mark.parametrize("scale", [1, 1000, 1_000_000])
def test_times_of_any_unit(scale: int) -> None:
    """A producer that stamps in micro- or nanoseconds: rarely right, but no duplicate is missed or made up."""
    n = 3_000
    times = (T0_MS + np.arange(n) % 7) * scale
    hashes = np.arange(n, dtype=np.uint64) // np.uint64(2)
    want = [number % 2 == 1 for number in range(n)]
    assert Dedupe(10 * scale).duplicates(np.arange(n), hashes, times).tolist() == want


def test_an_empty_chunk_decides_and_remembers_nothing() -> None:
    dedupe = Dedupe(100)
    empty: Any = np.zeros(0, np.uint64)
    assert dedupe.duplicates(np.zeros(0, np.int64), empty, np.zeros(0, np.int64)).tolist() == []
    assert dedupe.horizon(5) == 5
    assert len(dedupe) == 0
    feed(dedupe, [[Record(7, 1, T0_MS)]])
    dedupe.duplicates(np.zeros(0, np.int64), empty, np.zeros(0, np.int64))
    assert dedupe.horizon(20) == 7


def test_memory_is_that_of_the_horizon_in_few_runs() -> None:
    """Ids older than two horizons and blocks go; there are about log2(n) runs, however many chunks."""
    rng = np.random.default_rng(3)
    horizon_ms, per_chunk = 10_000, 50
    dedupe, block = Dedupe(horizon_ms, 500), 500
    longest = most = 0
    for chunk in range(4_000):
        times = np.full(per_chunk, T0_MS + chunk * 50)  # So 1 an ms: 20,000 within two horizons.
        offsets = np.arange(chunk * per_chunk, (chunk + 1) * per_chunk)
        dedupe.duplicates(offsets, rng.integers(0, 1 << 63, per_chunk, np.uint64), times)
        longest, most = max(longest, len(dedupe)), max(most, len(dedupe._runs))  # its memory
        rewind = (chunk + 1) * per_chunk - dedupe.horizon((chunk + 1) * per_chunk)
        assert rewind <= 2 * horizon_ms * 1.1 + 2 * per_chunk
        assert all(len(runs) <= np.log2(block) + 2 for _, _, runs in dedupe._blocks)
    assert longest <= 3 * 2 * horizon_ms + 2 * block
    assert len(dedupe._blocks) == 2
    assert most <= np.log2(longest) + 2
    assert len(dedupe._spans) < 2 * 32 + 4  # as above


def test_one_busy_id_takes_the_place_of_one() -> None:
    dedupe = Dedupe(1_000)
    for chunk in range(200):
        dedupe.duplicates(np.arange(100) + chunk * 100, np.ones(100, np.uint64), np.full(100, T0_MS + chunk))
    assert len(dedupe) <= 10


def test_a_burst_is_forgotten_in_a_quiet_time_after_it() -> None:
    """A hundred thousand ids of a flood must not stay for as long as it takes to see half as many more."""
    dedupe = Dedupe(1_000, 50)
    dedupe.duplicates(np.arange(100_000), np.arange(100_000, dtype=np.uint64), np.full(100_000, T0_MS))
    for chunk in range(100):
        dedupe.duplicates(
            np.full(1, 100_000 + chunk), np.array([chunk], np.uint64), np.array([T0_MS + 5_000 + 1_000 * chunk])
        )
    assert len(dedupe) < 1_000


def test_a_contract_of_which_nothing_comes_any_more_does_not_have_the_log_read_again() -> None:
    """Others on its topic go on: from two horizons of time and one block of offsets later there is nothing to tell."""
    dedupe = Dedupe(1000, block=10)
    dedupe.duplicates(np.array([3]), np.array([7], np.uint64), np.array([5000]))
    assert dedupe.horizon(4, 5000) == 3
    assert dedupe.horizon(1000, 7000) == 3  # Time holds it,
    assert dedupe.horizon(12, 9000) == 3  # or the block,
    assert dedupe.horizon(1000, 9000) == 1000  # and then neither.
