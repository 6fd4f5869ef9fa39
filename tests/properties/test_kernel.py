"""Whatever happens to rows, every feature is what brute force over all events gives."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import random
import typing
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import agg
from features import aggregations as kinds
from features.aggregations import Aggregation, AnyAggregation
from features.kernel import Events, Rows, merge
from tests import oracle
from tests.properties.scenarios import (
    BASE_MS,
    DAY_MS,
    HOUR_MS,
    LISTS,
    MINUTE_MS,
    Merge,
    batches_of,
    by_bucket,
    check,
    events_at,
    exact_std,
    histories,
    instants,
    near,
    plain,
    run,
    scale_of,
    window_sets,
)
from tests.support.states import State, plan_of, shuffled_batches

N_ROWS = 4
each_list = pytest.mark.parametrize("listed", LISTS.values(), ids=list(LISTS))


def test_every_aggregation_is_listed() -> None:
    """A new aggregation, also one that nobody imports yet, is in the lists that these tests run."""
    for module in pkgutil.iter_modules(kinds.__path__):
        importlib.import_module(f"{kinds.__name__}.{module.name}")
    every = set(Aggregation.__subclasses__())
    assert {type(spec) for spec in plain(["1h"])} == every
    assert set(typing.get_args(AnyAggregation)) == every


def test_every_aggregation_that_takes_buckets_is_listed_with_them() -> None:
    """What `agg` offers `by` for is run by bucket too."""
    functions = {name: value for name, value in vars(agg).items() if inspect.isfunction(value)}
    offered = {name for name, function in functions.items() if "by" in inspect.signature(function).parameters}
    run_here = [*by_bucket(["1h"]), *LISTS["ratio by bucket"](["1h"])]
    # By the values of a field is what entropy is of: it is one number.
    assert offered - {"_declare", "entropy"} == {str(type(spec).__struct_config__.tag) for spec in run_here}


@each_list
@given(data=st.data(), over=window_sets, packed=st.booleans())
def test_any_history_gives_what_brute_force_gives(
    listed: Any, data: st.DataObject, over: list[str], packed: bool
) -> None:
    """Late events, equal times, hop edges, any order and batches, queries that move on.

    Each merge has a `now` of its own, which may go back: only no later query may be before it.
    """
    seen: list[dict[str, Any]] = []
    state = State(plan_of(*listed(over)), N_ROWS, packed=packed)
    for step in data.draw(histories(N_ROWS)):
        if isinstance(step, Merge):
            run(state, step)
            seen += step.events
        else:
            check(state, seen, step.at_ms, N_ROWS)
    assert state.evicted == 0


@each_list
@given(data=st.data(), over=window_sets)
def test_events_ahead_of_the_query_count_from_when_their_tile_begins(
    listed: Any, data: st.DataObject, over: list[str]
) -> None:
    """An event later than the query counts if the query is in its tile, and always once the query has passed it.

    What keeps no tiles (`last`, `last_k`, `distinct`, `decayed`, `all`) counts it at once.
    """
    seen: list[dict[str, Any]] = []
    state = State(plan_of(*listed(over)), N_ROWS, packed=True)
    for step in data.draw(histories(N_ROWS, future_ms=2 * HOUR_MS)):
        if isinstance(step, Merge):
            run(state, step)
            seen += step.events
        else:
            check(state, seen, step.at_ms, N_ROWS)


def test_a_window_moves_over_tiles_without_a_merge() -> None:
    """The count falls by itself as the window's start passes tile after tile.

    ::

        12:00     12:01     12:02                   12:10     12:11     12:12     12:13
          |a        |b        |c                      |         |         |         |
          [---------------- 10m at 12:10:59.999 ------------)
                    [---------------- 10m at 12:11:00 ----------)
    """
    noon = BASE_MS + 12 * HOUR_MS
    state = State(plan_of(kinds.Count(name="clicks", event="Click", over=("10m",))))
    clicks = [{"t": noon + minute * MINUTE_MS} for minute in range(3)]
    state.merge(batches_of(clicks), noon + 2 * MINUTE_MS)
    at = [noon + 10 * MINUTE_MS, *(noon + minute * MINUTE_MS + ms for minute in (11, 12, 13) for ms in (-1, 0))]
    assert [state.values(query_ms)["clicks_10m"][0] for query_ms in at] == [3, 3, 2, 2, 1, 1, 0]


def test_an_event_ahead_counts_in_the_tile_that_holds_the_query() -> None:
    """As `as_of` moves towards an event, it counts from the beginning of its tile.

    ::

        12:00:00      12:00:05          12:00:10
          |             |        x        |
                 q -> 0 |q -> 1     q -> 1
    """
    noon = BASE_MS + 12 * HOUR_MS
    state = State(plan_of(kinds.Count(name="clicks", event="Click", over=("1m", "24h"))))
    state.merge(batches_of([{"t": noon + 7_500}]), noon)
    for name in ("clicks_1m", "clicks_24h"):
        assert state.values(noon + 4_999)[name] == [0]
        assert state.values(noon + 5_000)[name] == [1]
        assert state.values(noon + 7_501)[name] == [1]


@each_list
@given(data=st.data(), over=window_sets, seed=st.integers(0, 1 << 32))
def test_order_and_grouping_change_nothing(listed: Any, data: st.DataObject, over: list[str], seed: int) -> None:
    """All events in one merge, or one by one backwards, or in random batches: the same values, also ahead of time.

    A merge that relied on events being sorted, or that let the last batch win, would fail.
    """
    query_ms = BASE_MS + 7_777
    times = instants(query_ms - 2 * DAY_MS, query_ms + MINUTE_MS)
    events = data.draw(st.lists(events_at(times, N_ROWS), max_size=20))
    plan, rng = plan_of(*listed(over)), random.Random(seed)
    states = [State(plan, N_ROWS, packed=packed) for packed in (False, True, True)]
    states[0].merge(batches_of(events), query_ms)
    for event in sorted(events, key=lambda event: -event["t"]):
        states[1].merge(batches_of([event]), rng.randint(query_ms - DAY_MS, query_ms))
    for batch in shuffled_batches(events, rng):
        states[2].merge(batches_of(batch), rng.randint(query_ms - DAY_MS, query_ms))
    for at_ms in (query_ms, query_ms + 5_000, query_ms + HOUR_MS):
        same(states[0].values(at_ms), states[1].values(at_ms), scale_of(events))
        same(states[0].values(at_ms), states[2].values(at_ms), scale_of(events))


@each_list
@given(data=st.data(), over=window_sets, later_ms=st.integers(0, 100 * DAY_MS))
def test_merging_nothing_changes_nothing(listed: Any, data: st.DataObject, over: list[str], later_ms: int) -> None:
    """Ageing alone, at any time up to the query, changes no value: nor what is in a map."""
    times = instants(BASE_MS - 2 * DAY_MS, BASE_MS - 1)
    events = data.draw(st.lists(events_at(times, N_ROWS), max_size=12))
    query_ms = BASE_MS + later_ms
    state = State(plan_of(*listed(over)), N_ROWS)
    state.merge(batches_of(events), BASE_MS)
    before = state.values(query_ms)
    state.merge({}, data.draw(st.integers(BASE_MS, query_ms)))
    same(state.values(query_ms), before, scale_of(events))
    state.merge({**batches_of([]), "Other": batches_of([{"t": BASE_MS, "row": 0}])["Click"]}, query_ms)
    same(state.values(query_ms), before, scale_of(events))


def same(got: dict[str, list[Any]], want: dict[str, list[Any]], scale: float) -> None:
    """Equal values, floats as `near` has it."""
    for name, values in want.items():
        for one, other in zip(got[name], values, strict=True):
            if isinstance(other, dict):
                assert one.keys() == other.keys(), (name, one, other)
                assert all(near(one[key], other[key], scale) for key in one), (name, one, other)
            else:
                assert near(one, other, scale), (name, one, other)


def test_rows_never_seen_read_as_documented() -> None:
    """0, null or empty, the same in a row without events as in one that is not there."""
    state = State(plan_of(*plain(["1h"])), 2, packed=True)
    documented: dict[str, Any] = {
        "count_1h": 0,
        "sum_1h": 0.0,
        "distinct_1h": 0,
        "prices_1h": 0,
        "decayed_30m": 0.0,
        "decayed_24h": 0.0,
        "spent": 0.0,
        "last_k_1h": [],
        "first_k": [],
        "top_k_1h": [],
        "ratio_1h": 0.25,
        "pairs_1h": 0,
        **{f"last_events_{of}_1h": [] for of in ("item_id", "category", "price", "occurred_at")},
        **{f"ever_{of}": [] for of in ("item_id", "category", "price", "occurred_at")},
        "rate": 0.25,
        "worth": -2.0,
        "delta_1h": 0,
        "pace_10m": 0,
        "trend_7d": 0.0,
    }
    got = {name: value for name, (_, value) in state.values(BASE_MS).items()}
    nulls = ("mean_1h", "min_1h", "max_1h", "std_1h", "last_1h", "last_price_1h", "latest", "seconds_since_1h")
    of_first = (
        "first_1h",
        "first_price_1h",
        "earliest",
        "first_item",
        "since_first_1h",
        "known",
        "variety_1h",
        "p50_1h",
        "p90_1h",
    )
    assert got == documented | dict.fromkeys((*nulls, *of_first))


def test_buckets_never_seen_read_as_documented() -> None:
    """A map of a row never seen is empty, and a lookup of a bucket that isn't there gives what no events give.

    For a ratio that is its prior: with 0, an item's category that the user never saw would rank below one that the
    user saw a hundred times and never clicked.
    """
    plan = plan_of(*by_bucket(["1h"]), *LISTS["ratio by bucket"](["1h"]))
    state = State(plan)
    assert all(value == [{}] for value in state.values(BASE_MS).values())
    specs = {feature.name: feature.spec for feature in plan.features.values()}
    stands_for = {name: spec.without_events for name, spec in specs.items() if isinstance(spec, kinds.Aggregation)}
    null = {name for name, nothing in stands_for.items() if np.isnan(nothing)}
    assert null == {"mean_1h", "min_1h", "max_1h", "std_1h"}
    assert (stands_for.pop("ratio_1h"), stands_for.pop("rate")) == (0.25, 0.5)
    assert all(nothing == 0 for name, nothing in stands_for.items() if name not in null)


@pytest.mark.parametrize("packed", [False, True])
def test_a_map_has_the_buckets_with_an_event_whatever_their_number_is(packed: bool) -> None:
    """Five clicks and a like are the prior; prices may add up to 0. Of those, a map that knew numbers only had no more
    than of a bucket that was never seen. An event without the value is none of a sum's.
    """
    common: dict[str, Any] = {"event": "Click", "by": "category", "buckets": 8, "over": ("1h",)}
    plan = plan_of(
        kinds.Count(name="count", **common),
        kinds.Sum(name="sum", field="price", **common),
        kinds.Mean(name="mean", field="price", default=3.0, **common),
        kinds.Ratio(name="ratio", of="Like", prior=0.2, strength=1, **common),
        kinds.Decayed(name="decayed", field="price", half_life="1h", **{**common, "over": ()}),
    )
    state = State(plan, packed=packed)
    clicks = [*((10.0, "sums"), (-10.0, "sums")), (0.0, "nought"), (-0.0, "nought"), (None, "bare"), (1.0, "prior")]
    events: list[dict[str, Any]] = [
        {"contract": "Click", "t": BASE_MS, "price": price, "category": name} for price, name in clicks
    ]
    events += [{"contract": "Like", "t": BASE_MS, "price": None, "category": "prior"} for _ in range(5)]
    for event in [*events, {"contract": "Click", "t": BASE_MS - 2 * HOUR_MS, "price": 5.0, "category": "old"}]:
        state.merge(batches_of([event]), BASE_MS)
    (got,) = ({name.removesuffix("_1h"): value[0] for name, value in state.values(BASE_MS + 1).items()},)
    assert got["count"] == {"sums": 2, "nought": 2, "bare": 1, "prior": 1}
    assert got["sum"] == {"sums": 0, "nought": 0, "prior": 1}
    assert got["mean"] == {"sums": 0, "nought": 0, "prior": 1}
    assert got["ratio"].keys() == {"sums", "nought", "bare", "prior"}
    assert got["ratio"]["prior"] == pytest.approx(0.2)
    assert got["decayed"].keys() == {"sums", "nought", "prior", "old"}
    assert got["decayed"]["sums"] == 0
    assert not any(math.copysign(1, value) < 0 for name in ("sum", "decayed") for value in got[name].values())


def test_a_bucket_whose_events_left_the_window_reads_like_one_never_seen() -> None:
    """Whether a merge has already dropped a bucket's tiles can't be seen in a ratio's map."""
    state = State(plan_of(*LISTS["ratio by bucket"](["1h"])))
    state.merge(batches_of([{"t": BASE_MS, "category": "a"}]), BASE_MS)
    before = state.values(BASE_MS + 3 * HOUR_MS)
    state.merge({}, BASE_MS + 3 * HOUR_MS)
    assert state.values(BASE_MS + 3 * HOUR_MS) == before == {"ratio_1h": [{}]}


def test_defaults_stand_for_null_only() -> None:
    """`default` replaces null, not nought."""
    number = kinds.Mean(name="mean", event="Click", field="price", over=("1h",), default=25.0)
    text = kinds.Last(name="last", event="Click", field="item_id", kind="str", default="none")
    state = State(plan_of(number, text), 2)
    state.merge(batches_of([{"t": BASE_MS, "row": 1, "price": 0.0, "item_id": "a"}]), BASE_MS)
    assert state.values(BASE_MS + 1) == {"mean_1h": [25.0, 0.0], "last": ["none", "a"]}


@given(
    offset=st.sampled_from([0.0, 1e3, 1e6, 1e9, 1e12, -1e9]),
    spread=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 1 << 32),
)
def test_std_of_large_values_with_a_small_spread(offset: float, spread: float, seed: int) -> None:
    """Off by 1e-9 and 2e-15 of the largest value, whatever the tiles, as `agg.std` says: by brute force in fractions.

    The difference of mean square and square mean is off by the root of one rounding: 1e-8 of the offset, not 1e-15.
    """
    rng = random.Random(seed)
    events = [{"t": BASE_MS - rng.randrange(1, DAY_MS), "price": offset + spread * rng.random()} for _ in range(40)]
    state = State(plan_of(kinds.Std(name="std", event="Click", field="price", over=("1h", "24h"))), packed=True)
    for batch in shuffled_batches(events, rng):
        state.merge(batches_of(batch), rng.randint(BASE_MS - DAY_MS, BASE_MS))
    want = exact_std([event["price"] for event in oracle.within(events, "24h", BASE_MS)])
    (got,) = state.values(BASE_MS)["std_24h"]
    assert want is not None
    assert abs(got - want) <= 1e-9 * want + 2e-15 * abs(offset)


@given(value=st.floats(-1e300, 1e300), n=st.integers(1, 30), seed=st.integers(0, 1 << 32))
def test_equal_values_have_no_spread(value: float, n: int, seed: int) -> None:
    """The mean of n equal values is that value and their spread 0, to the last bit, in any batches."""
    rng = random.Random(seed)
    common: dict[str, Any] = {"event": "Click", "field": "price", "over": ("1h",)}
    state = State(plan_of(kinds.Mean(name="mean", **common), kinds.Std(name="std", **common)), packed=True)
    events = [{"t": BASE_MS - rng.randrange(1, HOUR_MS), "price": value} for _ in range(n)]
    for batch in shuffled_batches(events, rng):
        state.merge(batches_of(batch), BASE_MS)
    assert state.values(BASE_MS) == {"mean_1h": [value], "std_1h": [0.0]}


@pytest.mark.parametrize("n", [255, 256, 65_535, 65_536, 70_000])
def test_many_events_of_one_tile(n: int) -> None:
    """Counts are exact where a narrow integer would wrap around."""
    count = kinds.Count(name="n", event="Click", over=("1h",))
    mean = kinds.Mean(name="mean", event="Click", field="price", over=("1h",))
    state = State(plan_of(count, mean), packed=True)
    event = Events(np.zeros(n, np.intp), np.full(n, BASE_MS), {"price": np.full(n, 0.1)})
    state.merge({"Click": event}, BASE_MS)
    state.merge({"Click": event}, BASE_MS)
    assert state.values(BASE_MS + 1) == {"n_1h": [2 * n], "mean_1h": [0.1]}


@pytest.mark.parametrize("before", [(1 << 24) - 1, 1 << 24, (1 << 32) - 1, 1 << 40])
def test_large_counts_go_on_counting(before: int) -> None:
    """One more event is one more, where float32 has stopped (16,777,216) and where 32 bits end."""
    state = State(plan_of(kinds.Count(name="n", event="Click", over=("1h",))), packed=True)
    state.merge(batches_of([{"t": BASE_MS}]), BASE_MS)
    (family, rows), name = state.rows["view"], "view"
    rows.tables[0].columns[0][:] = before
    state.rows[name] = family, rows
    state.merge(batches_of([{"t": BASE_MS}]), BASE_MS)
    assert state.values(BASE_MS + 1) == {"n_1h": [before + 1]}


@pytest.mark.parametrize("price", [0.0, -0.0])
def test_nought_is_one_value(price: float) -> None:
    """0.0 and -0.0 are equal, so they are one distinct value: hashing their texts or bits tells them apart."""
    state = State(plan_of(kinds.Distinct(name="prices", event="Click", field="price", over=("1h",))))
    state.merge(batches_of([{"t": BASE_MS, "price": 0.0}, {"t": BASE_MS, "price": price}]), BASE_MS)
    assert state.values(BASE_MS + 1) == {"prices_1h": [1]}


@given(data=st.data())
def test_a_row_knows_its_latest_event(data: st.DataObject) -> None:
    """The greatest time of any event of the row, whichever came last; -1 for none."""
    state, seen = State(plan_of(*plain(["90d", "all"])), N_ROWS, packed=data.draw(st.booleans())), []
    for _ in range(3):
        seen += data.draw(st.lists(events_at(instants(BASE_MS - DAY_MS, BASE_MS), N_ROWS), max_size=4))
        state.merge(batches_of(seen), BASE_MS)
    latest = [max((event["t"] for event in seen if event["row"] == row), default=-1) for row in range(N_ROWS)]
    clicked = {event["row"] for event in seen if event["contract"] == "Click"}
    found = state.rows["view"][1].last_event_ms.tolist()
    assert [found[row] for row in clicked] == [latest[row] for row in clicked]
    assert all(found[row] == -1 for row in range(N_ROWS) if latest[row] == -1)


def test_no_rows_and_no_events() -> None:
    """Nothing in, nothing out, no error."""
    state = State(plan_of(*plain(["1h"])), 0, packed=True)
    state.merge(batches_of([]), BASE_MS)
    assert set(map(len, state.values(BASE_MS).values())) == {0}


def test_merge_leaves_its_arguments_alone() -> None:
    """Rows may be kept by a cache and events handed to several families: merge writes to neither."""
    state = State(plan_of(*plain(["1h", "24h"])), 2)
    events = batches_of([{"t": BASE_MS + i, "row": i % 2, "price": 1.0 * i, "item_id": "ab"[i % 2]} for i in range(9)])
    for family, _ in state.rows.values():
        rows = merge(family, Rows.empty(family, 2), events, BASE_MS).rows
        arrays = [rows.last_event_ms, *(array for table in rows.tables for array in (table.rows, *table.columns))]
        arrays += [array for each in events.values() for array in (each.rows, each.times_ms, each.fields["price"])]
        for array in arrays:
            array.flags.writeable = False
        merge(family, rows, events, BASE_MS + DAY_MS)
