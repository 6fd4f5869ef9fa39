"""Bounded structures: what stays exact, what is evicted, and how far an estimate may be off."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import aggregations as kinds
from features import quantiles, sketch
from features.kernel import Events
from features.texts import hash64
from tests import oracle
from tests.properties.scenarios import BASE_MS, DAY_MS, HOUR_MS, MINUTE_MS, batches_of
from tests.support.states import State, plan_of, shuffled_batches

CLICK: dict[str, Any] = {"event": "Click"}


def events_of(n: int, n_values: int, rng: random.Random, within_ms: int = DAY_MS) -> list[dict[str, Any]]:
    """Clicks on `n_values` items and as many categories, some at equal times."""
    return [
        {
            "t": BASE_MS - rng.randrange(1, within_ms) // 100 * 100 - 1,
            "item_id": f"i{rng.randrange(n_values)}",
            "category": f"c{rng.randrange(n_values)}",
        }
        for _ in range(n)
    ]


@given(k=st.integers(1, 40), n_values=st.sampled_from([1, 5, 100, 3_000]), seed=st.integers(0, 1 << 32))
def test_last_k_is_exact_whatever_fell_out(k: int, n_values: int, seed: int) -> None:
    """Of any number of values, in any order and batches, the k latest are the k latest; and none counts as evicted.

    Keeping the k that *arrived* last would lose those before a late event.
    """
    rng = random.Random(seed)
    events = events_of(300, n_values, rng)
    state = State(plan_of(kinds.LastK(name="recent", field="item_id", k=k, over=("1h", "all"), **CLICK)), packed=True)
    for batch in shuffled_batches(events, rng):
        state.merge(batches_of(batch), rng.randint(BASE_MS - DAY_MS, BASE_MS))
    values = state.values(BASE_MS)
    for window in ("1h", "all"):
        # Of a window, those of the k latest that are in it.
        assert values[f"recent_{window}"] == [oracle.expected("last_k", events, BASE_MS, window, "item_id", k)]
    assert state.evicted == 0


@given(k=st.integers(1, 40), n_values=st.sampled_from([1, 5, 100, 3_000]), seed=st.integers(0, 1 << 32))
def test_first_k_is_exact_whatever_fell_out(k: int, n_values: int, seed: int) -> None:
    """The same of the k earliest, also when what was first arrives last.

    A table that kept those seen latest would have dropped them.
    """
    rng = random.Random(seed)
    events = events_of(300, n_values, rng)
    state = State(plan_of(kinds.FirstK(name="met", field="item_id", k=k, **CLICK)), packed=True)
    for batch in shuffled_batches(events, rng):
        state.merge(batches_of(batch), rng.randint(BASE_MS - DAY_MS, BASE_MS))
    assert state.values(BASE_MS)["met"] == [oracle.expected("first_k", events, BASE_MS, "all", "item_id", k)]
    assert state.evicted == 0


@given(
    k=st.integers(1, 12),
    n_values=st.sampled_from([1, 3, 40]),
    within_ms=st.sampled_from([500, HOUR_MS]),
    seed=st.integers(0, 1 << 32),
)
def test_a_sequence_is_exact_whatever_fell_out(k: int, n_values: int, within_ms: int, seed: int) -> None:
    """The k latest events, many of them at one time and many alike, in any order and batches; some fields are null.

    Entries evicted by their hashes, and not by time and values, would be others than those that are listed.
    """
    rng = random.Random(seed)
    events = events_of(60, n_values, rng, within_ms)
    for event in events:
        event["price"] = rng.choice([None, -1.5, 0.0, -2.5, 3.0])
        event["category"] = rng.choice([None, event["category"]])
    fields = ("price", "category", "item_id")
    given: dict[str, Any] = {"fields": fields, "texts": (False, True, True), "k": k, "over": ("1m", "all")}
    names = (*fields, "occurred_at")
    state = State(plan_of(*(kinds.Sequence(name=f"seq_{of}", of=of, **given, **CLICK) for of in names)), packed=True)
    for batch in shuffled_batches(events, rng):
        state.merge(batches_of(batch), rng.randint(BASE_MS - DAY_MS, BASE_MS))
    values = state.values(BASE_MS)
    for window in ("1m", "all"):
        for of in names:
            want = oracle.expected("sequence", events, BASE_MS, window, k=k, fields=fields, of=of)
            assert values[f"seq_{of}_{window}"] == [want]
    assert state.evicted == 0


TILED_OR_NOT = [("1h",), ("10m", "24h"), ("1h", "all"), ("all",)]


@given(buckets=st.integers(1, 8), over=st.sampled_from(TILED_OR_NOT), seed=st.integers(0, 1 << 32))
def test_exact_while_values_are_no_more_than_buckets(buckets: int, over: tuple[str, ...], seed: int) -> None:
    """As many values as buckets: nothing is evicted, and counts are brute force's."""
    rng = random.Random(seed)
    events = events_of(60, buckets, rng)
    top = kinds.TopK(name="top", field="category", k=3, over=over, buckets=buckets, **CLICK)
    count = kinds.Count(name="count", by="category", over=over, buckets=buckets, **CLICK)
    heat = kinds.Decayed(name="heat", by="category", half_life="6h", buckets=buckets, **CLICK)
    state = State(plan_of(top, count, heat), packed=True)
    for batch in shuffled_batches(events, rng):
        state.merge(batches_of(batch), rng.randint(BASE_MS - DAY_MS, BASE_MS))
    values = state.values(BASE_MS)
    assert state.evicted == 0
    assert set(values["heat"][0]) == {event["category"] for event in events}
    for window in over:
        inside = [event["category"] for event in oracle.within(events, window, BASE_MS)]
        assert values[f"top_{window}"] == [oracle.expected("top_k", events, BASE_MS, window, "category", 3)]
        assert values[f"count_{window}"] == [{category: float(inside.count(category)) for category in set(inside)}]


@pytest.mark.parametrize("over", [("1h",), ("10m", "1h"), ("all",)])
def test_what_is_evicted_was_seen_before_the_rest_and_is_counted(over: tuple[str, ...]) -> None:
    """Of five categories, a row of three buckets keeps those seen last, and two count as evicted, a row each."""
    state = State(plan_of(kinds.Count(name="count", by="category", over=over, buckets=3, **CLICK)), 2, packed=True)
    clicks = [{"t": BASE_MS - 6 * n * MINUTE_MS, "category": category} for n, category in enumerate("abcde")]
    state.merge(batches_of([{**click, "row": row} for click in reversed(clicks) for row in (0, 1)]), BASE_MS)
    assert state.values(BASE_MS + 1)[f"count_{over[-1]}"] == [{"a": 1.0, "b": 1.0, "c": 1.0}] * 2
    assert state.evicted == 4


@pytest.mark.parametrize("over", ["1h", "7d", "all"])
def test_the_newest_bucket_is_not_evicted_by_others_of_its_tile(over: str) -> None:
    """Of buckets seen within one hop (6 h of `7d`), it is still the earliest that goes.

    By the starts of their tiles they are all as old, and the tie-break by name would drop the click just made.
    """
    state = State(plan_of(kinds.Count(name="count", by="category", over=(over,), buckets=2, **CLICK)))
    for minute, category in enumerate("cba"):
        at_ms = BASE_MS + minute * MINUTE_MS
        state.merge(batches_of([{"t": at_ms, "category": category}]), at_ms)
    assert state.values(BASE_MS + 3 * MINUTE_MS)[f"count_{over}"] == [{"a": 1.0, "b": 1.0}]


def test_a_bucket_with_several_tiles_counts_once_when_evicted() -> None:
    """Evictions are buckets, not tiles."""
    state = State(plan_of(kinds.Count(name="count", by="category", over=("1h",), buckets=1, **CLICK)))
    old = [{"t": BASE_MS - minute * MINUTE_MS, "category": "old"} for minute in range(10, 50, 5)]
    state.merge(batches_of([*old, {"t": BASE_MS, "category": "new"}]), BASE_MS)
    assert (state.values(BASE_MS + 1), state.evicted) == ({"count_1h": [{"new": 1.0}]}, 1)


def test_what_every_window_has_left_takes_no_bucket() -> None:
    """Buckets whose tiles are gone make room without an eviction."""
    state = State(plan_of(kinds.Count(name="count", by="category", over=("1h",), buckets=2, **CLICK)), packed=True)
    for hour, category in enumerate("abcdefgh"):
        at_ms = BASE_MS + hour * HOUR_MS
        state.merge(batches_of([{"t": at_ms, "category": category}]), at_ms)
    assert state.evicted == 0


def test_the_bound_is_of_each_feature_not_of_those_it_shares_a_table_with() -> None:
    """Two categories clicked and two others liked fit `buckets=2` of each; one table of both must not evict any.

    The catalogue has such a pair: `category_affinity` of clicks and `category_likes`, by category with 32 buckets.
    """
    common: dict[str, Any] = {"by": "category", "over": ("1h",), "buckets": 2}
    clicks = kinds.Count(name="clicks", event="Click", **common)
    likes = kinds.Count(name="likes", event="Like", **common)
    state = State(plan_of(clicks, likes))
    which = (("Click", "a"), ("Click", "b"), ("Like", "c"), ("Like", "d"))
    events = [{"contract": contract, "t": BASE_MS, "category": category} for contract, category in which]
    state.merge(batches_of(events), BASE_MS)
    assert state.values(BASE_MS + 1) == {"clicks_1h": [{"a": 1.0, "b": 1.0}], "likes_1h": [{"c": 1.0, "d": 1.0}]}


def test_buckets_of_two_measures_are_evicted_by_the_later_time_of_either() -> None:
    """A bucket that only the other feature of the table saw, and saw last, stays.

    A table that holds the time of one of its measures only takes a bucket of the other for never seen.
    """
    heat = kinds.Decayed(name="heat", event="Click", by="category", half_life="1h", buckets=2)
    likes = kinds.Count(name="likes", event="Like", by="category", over=("all",), buckets=2)
    state = State(plan_of(heat, likes))
    clicks = [{"t": BASE_MS + second, "category": category} for second, category in enumerate("ab")]
    state.merge(batches_of(clicks), BASE_MS)
    state.merge(batches_of([{"contract": "Like", "t": BASE_MS + 9, "category": "c"}]), BASE_MS)
    assert state.values(BASE_MS + 10)["likes_all"] == [{"c": 1.0}]


def test_buckets_that_only_all_still_holds_are_evicted_by_time_too() -> None:
    """Three buckets seen one after the other, two fit: the first seen goes, though both others have left the hour.

    Tiles that only `all` holds start at 0, so their starts no longer tell which was seen first.
    """
    state = State(plan_of(kinds.Count(name="count", by="category", over=("1h", "all"), buckets=2, **CLICK)))
    # The order of names is against the order of times, so that no tie-break by name gets it right.
    for hour, category in ((0, "z"), (2, "y")):
        state.merge(batches_of([{"t": BASE_MS + hour * HOUR_MS, "category": category}]), BASE_MS + hour * HOUR_MS)
    state.merge({}, BASE_MS + 8 * HOUR_MS)
    state.merge(batches_of([{"t": BASE_MS + 9 * HOUR_MS, "category": "x"}]), BASE_MS + 9 * HOUR_MS)
    assert state.values(BASE_MS + 10 * HOUR_MS)["count_all"] == [{"x": 1.0, "y": 1.0}]


DISTINCT = plan_of(kinds.Distinct(name="distinct", field="item_id", over=("10m", "1h", "24h"), **CLICK))


@given(in_hour=st.integers(60, 70), in_day=st.integers(0, 200), seed=st.integers(0, 1 << 32))
def test_distinct_is_exact_to_64_in_each_window(in_hour: int, in_day: int, seed: int) -> None:
    """A window of up to 64 values is exact, however many an hour or a day around it holds; one of more says more."""
    rng = random.Random(seed)
    hour = [{"t": BASE_MS - rng.randrange(1, HOUR_MS), "item_id": f"i{i}"} for i in range(in_hour)]
    day = [{"t": BASE_MS - rng.randrange(2 * HOUR_MS, DAY_MS), "item_id": f"j{i}"} for i in range(in_day)]
    again = [{**event, "t": BASE_MS - rng.randrange(1, DAY_MS)} for event in rng.sample(hour, 20)]
    state = State(DISTINCT, packed=True)
    events = [*hour, *day, *again]
    for batch in shuffled_batches(events, rng):
        state.merge(batches_of(batch), rng.randint(BASE_MS - DAY_MS, BASE_MS))
    values = state.values(BASE_MS)
    for window in ("10m", "1h", "24h"):
        want, (got,) = oracle.expected("distinct", events, BASE_MS, window, "item_id"), values[f"distinct_{window}"]
        assert got == want if want <= 64 else 65 <= got <= 1.3 * want


@given(seed=st.integers(0, 1 << 32), n=st.sampled_from([300, 2_000]), n_values=st.sampled_from([100, 1_000]))
def test_the_sketch_does_not_depend_on_order_or_batches(seed: int, n: int, n_values: int) -> None:
    """The very same estimate of every window, as time goes on too.

    A sketch that forgot on eviction when a value was seen last, or that merged in expired values, would differ.
    """
    rng = random.Random(seed)
    events = events_of(n, n_values, rng)
    once, often = State(DISTINCT), State(DISTINCT, packed=True)
    once.merge(batches_of(events), BASE_MS)
    for batch in shuffled_batches(events, rng):
        often.merge(batches_of(batch), rng.randint(BASE_MS - DAY_MS, BASE_MS))
    for later_ms in (0, 5 * MINUTE_MS, HOUR_MS, 20 * HOUR_MS, 23 * HOUR_MS):
        assert often.values(BASE_MS + later_ms) == once.values(BASE_MS + later_ms)


@pytest.mark.parametrize("n", [100, 200, 1_000, 5_000, 50_000])
def test_standard_error_of_the_sketch_is_under_5_percent(n: int) -> None:
    """Over 300 sets of n texts: root mean square error at most 5 %, mean error at most 1 %."""
    seeds = 300
    rows, cells = [], []
    for seed in range(seeds):
        # Texts alike but for a number, as ids are: what the hash must spread.
        numbers = pa.array(np.arange(seed * n, (seed + 1) * n)).cast(pa.string())
        cells.append(np.unique(sketch.cells(hash64(pc.binary_join_element_wise("item_", numbers, "")))))
        rows.append(np.full(len(cells[-1]), seed, np.intp))
    no_values = (np.zeros(0, np.int64), np.zeros(0), np.zeros(0, np.uint64))
    found, tails = np.concatenate(cells), np.zeros((1, 1), np.int64)
    (estimates,) = sketch.counts(*no_values, np.concatenate(rows), np.zeros(len(found)), found, tails, -1, seeds)
    error = estimates / n - 1
    assert np.sqrt(np.mean(error**2)) <= 0.05
    assert abs(np.mean(error)) <= 0.01


@pytest.mark.parametrize("n", [200, 2_000])
def test_standard_error_of_an_hour_within_a_day(n: int) -> None:
    """A window's estimate is as good when the sketch also holds a day of other values, seen before.

    Of 40 rows, each with n values in the last hour and five times as many in the day before; a third of the hour's
    values were seen in the day too, so a cell's time must be the later one.
    """
    n_rows, rng = 40, np.random.default_rng(n)
    rows = np.repeat(np.arange(n_rows), 6 * n)
    value = np.tile(np.arange(6 * n) - n // 3, n_rows)
    # Values 0 to n/3 are both the first of the hour and, by the modulus, the last of the day.
    ids = rows * 10 * n + value % (6 * n - n // 3)
    in_hour = np.tile(np.arange(6 * n) >= 5 * n, n_rows)
    ids[in_hour] = (rows * 10 * n + np.tile(np.arange(6 * n) - 5 * n, n_rows))[in_hour]
    ages_ms = rng.integers(1, HOUR_MS, len(rows)), rng.integers(2 * HOUR_MS, 23 * HOUR_MS, len(rows))
    times_ms = BASE_MS - np.where(in_hour, *ages_ms)
    order = rng.permutation(len(rows))
    texts = pa.array(ids[order]).cast(pa.string())
    state = State(DISTINCT, n_rows, packed=True)
    for part in np.array_split(np.arange(len(rows)), 5):
        batch = Events(rows[order][part], times_ms[order][part], {"item_id": texts.take(pa.array(part))})
        state.merge({"Click": batch}, BASE_MS)
    values = state.values(BASE_MS)
    for window, inside in (("1h", in_hour), ("24h", np.ones(len(rows), bool))):
        true = np.array([len(np.unique(ids[inside & (rows == row)])) for row in range(n_rows)])
        error = np.array(values[f"distinct_{window}"]) / true - 1
        # The measured error of 40 rows has a standard error of its own, a ninth.
        assert np.sqrt(np.mean(error**2)) <= 0.05 * (1 + 2 / 9)
        assert abs(np.mean(error)) <= 0.025


@given(st.lists(st.floats(-1e38, 1e38), min_size=1, max_size=50), st.sampled_from([0.0, 0.1, 0.5, 0.99, 1.0]))
def test_a_quantile_is_within_1_percent_of_the_value_at_its_rank(values: list[float], q: float) -> None:
    """Of numbers of any sign and size from 1e-12 to 1e38; smaller ones are as good as 0."""
    state = State(plan_of(kinds.Quantile(name="p", field="price", q=q, over=("1h",), **CLICK)), packed=True)
    state.merge(batches_of([{"t": BASE_MS, "price": value} for value in values]), BASE_MS)
    want, (got,) = (
        oracle.expected("quantile", [{"t": BASE_MS, "x": x} for x in values], BASE_MS, "1h", "x", q=q),
        (state.values(BASE_MS + 1)["p_1h"]),
    )
    assert abs(got - want) <= 0.01 * abs(want) + 1e-12


def test_cells_of_numbers_are_the_same_in_every_version() -> None:
    """Stored rows depend on them; and they rise with the numbers, all of which they hold."""
    numbers = np.array([-1e300, -20.0, -1e-300, 0.0, 1e-12, 0.1, 1.0, 1.02, 20.0, 1e300, np.inf])
    assert quantiles.cells(numbers).tolist() == [298, 4592, 6144, 6144, 6149, 7428, 7545, 7545, 7696, 11990, 11990]
    many = np.sort(np.random.default_rng(7).normal(0, 1, 100_000) * 10.0 ** np.arange(-50, 50).repeat(1000))
    cells = quantiles.cells(many)
    assert np.all(np.diff(cells) >= 0)
    assert np.all((cells >= 0) & (cells < sketch.CELLS))


def test_hash_spreads_texts_over_all_cells() -> None:
    """Every register is as likely as another, and every level half as likely as the one before."""
    cells = sketch.cells(hash64(pa.array([f"user_{i}" for i in range(200_000)])))
    registers, levels = np.bincount(cells % 256, minlength=256), np.bincount(cells // 256)
    assert abs(registers / (200_000 / 256) - 1).max() < 0.2
    assert np.allclose(levels[:8] / 200_000, 0.5 ** np.arange(1, 9), rtol=0.1)


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16, 255])
def test_hash_tells_alike_texts_apart(length: int) -> None:
    """Prefixes, padding and slices of an array change no hash and make no two equal."""
    texts = ["a" * length, "a" * length + "\0", "a" * (length + 1), "é" * length + "b", "b" + "a" * length]
    hashes = hash64(pa.array(["other", *texts, "other"], pa.string()).slice(1, len(texts)))
    assert len(set(hashes.tolist())) == len(set(texts))
    assert [hash64(pa.array([text]))[0] for text in texts] == hashes.tolist()


def test_hash_is_the_same_in_every_version() -> None:
    """Stored dedupe sets and sketches depend on these numbers."""
    hashes = hash64(pa.array(["", "a", "12345678", "item_123456789", "😀"]))
    assert [f"{value:016x}" for value in hashes.tolist()] == [
        "6e789e6aa1b965f4",
        "8507f39e610a2cc8",
        "67872c29bafbe0a9",
        "4ec50a9456eb1884",
        "7723d04fa8a8ca29",
    ]
