"""Totals: folded rows that can be kept, and until when."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import aggregations as kinds
from features.aggregations import Aggregation
from features.fold import NEVER_MS
from features.kernel import evaluate
from features.layout import Bundle, Family
from features.rows import Rows
from features.times import TICK_MS
from features.totals import Totals, flat, stay_until_ms
from store.codec import decode, encode
from tests import oracle
from tests.properties import scenarios
from tests.properties.scenarios import BASE_MS, DAY_MS, HOUR_MS, MINUTE_MS, Merge
from tests.support.states import State, plan_of

N_ROWS = 3


def bits(values: Any) -> list[Any]:
    """Values, numbers as their bits."""
    found: list[Any] = values.view(np.int64).tolist() if isinstance(values, np.ndarray) else values.array().to_pylist()
    return found


def of_events(own: list[Aggregation], *times_ms: int, now_ms: int = BASE_MS - DAY_MS) -> tuple[Family, Rows]:
    """The row that clicks at some times make of a view."""
    state = State(plan_of(*own))
    events = [{"contract": "Click", "row": 0, "t": at_ms, "price": 2.0} for at_ms in times_ms]
    state.merge(scenarios.batches_of(events), now_ms)
    return state.rows["view"]


def count(*over: str) -> list[Aggregation]:
    return [kinds.Count(name="clicks", event="Click", over=over)]


@st.composite
def states(draw: st.DrawFn, *, tops: bool) -> tuple[State, int]:
    """Rows of several families with a history, some with events of the future; and a time since their last merge."""
    make = draw(st.sampled_from([scenarios.plain, scenarios.conditional]))
    own = make(draw(scenarios.window_sets))
    state = State(
        plan_of(*(spec for spec in own if tops or not isinstance(spec, kinds.TopK | kinds.Entropy))),
        N_ROWS,
        packed=True,
    )
    merged_ms = BASE_MS
    for step in draw(scenarios.histories(N_ROWS, future_ms=draw(st.sampled_from([0, HOUR_MS, 2 * DAY_MS])))):
        if isinstance(step, Merge):
            scenarios.run(state, step)
            merged_ms = max(merged_ms, step.now_ms)
    return state, merged_ms + draw(st.one_of(st.just(0), scenarios.spans_ms(40 * DAY_MS)))


def edges_ms(bundle: Bundle, rows: Rows, row: int) -> Iterator[int]:
    """When each tile of a row begins, and when each window's tail passes it; by trying."""
    for layout, entries in zip(bundle.tables, rows.tables, strict=True):
        if not layout.table.starts:
            continue
        assert entries.starts is not None
        for start_ms in (entries.starts[entries.rows == row] * TICK_MS).tolist():
            yield start_ms
            for window in layout.table.windows:
                if not window.unbounded:
                    yield leaves_ms(window.name, start_ms)


def leaves_ms(window: str, start_ms: int) -> int:
    """The first time at which a window begins after a tile's start."""
    low, high = start_ms, start_ms + oracle.seconds(window) * 1000 + oracle.hop_ms(window)
    assert oracle.tail_ms(window, high) > start_ms
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if oracle.tail_ms(window, middle) > start_ms else (middle + 1, high)
    return low


@given(states(tops=True))
def test_totals_stay_until_the_first_tile_enters_or_leaves_a_window(of: tuple[State, int]) -> None:
    """To the millisecond, of every family by itself and of all read together, with buckets or without."""
    state, now_ms = of
    owned = [family for family, _ in state.rows.values()]
    bundles = [*(family.alone for family in owned), Bundle(tuple(owned))]
    for bundle in bundles:
        blobs = [blob for family in bundle.families for blob in encode(family, state.rows[family.name][1])]
        rows = decode(bundle, blobs)
        want = [
            min((edge for edge in edges_ms(bundle, rows, row) if edge > now_ms), default=NEVER_MS)
            for row in range(N_ROWS)
        ]
        # A window without end is left too, in a time that no float64 or clock will see.
        assert np.minimum(stay_until_ms(bundle, rows, now_ms), NEVER_MS).tolist() == want


@given(states(tops=False), st.data())
def test_totals_are_the_same_to_the_bit_as_long_as_they_stay(of: tuple[State, int], data: st.DataObject) -> None:
    """So what was folded once gives what folding afresh would; sums of floats included, whose order matters."""
    state, now_ms = of
    family, rows = state.rows["view"]
    kept, until_ms = flat(family.alone, rows, now_ms), stay_until_ms(family.alone, rows, now_ms)
    for row in range(N_ROWS):
        last_ms = min(int(until_ms[row]) - 1, now_ms + 200 * DAY_MS)
        for at_ms in (last_ms, data.draw(st.integers(now_ms, last_ms))):
            afresh = flat(family.alone, rows, at_ms)
            assert bits(afresh[:, row]) == bits(kept[:, row])


@given(states(tops=False), st.data())
def test_kept_totals_give_the_values_of_their_rows(of: tuple[State, int], data: st.DataObject) -> None:
    """Of any choice of rows, in any order and number, at any time at which they all stay."""
    state, now_ms = of
    family, rows = state.rows["view"]
    matrix = flat(family.alone, rows, now_ms)
    assert matrix.shape == (family.alone.n_totals.sum(), N_ROWS)
    until_ms = int(stay_until_ms(family.alone, rows, now_ms).min())
    at_ms = data.draw(st.integers(now_ms, min(until_ms - 1, now_ms + 200 * DAY_MS)))
    chosen = data.draw(st.lists(st.integers(0, N_ROWS - 1), max_size=6))
    columns = np.ascontiguousarray(matrix[:, chosen])
    totals = Totals.of_matrix(family.alone, columns, rows.last_event_ms[chosen], rows.texts)
    features = [
        (state.plan.features[name], slots) for name, (of_family, slots) in state.slots.items() if of_family == family
    ]
    blobs = encode(family, rows)
    want = evaluate(family, decode(family, [blobs[row] for row in chosen]), features, at_ms)
    got = evaluate(family, totals, features, at_ms)
    assert {name: bits(values) for name, values in got.items()} == {name: bits(values) for name, values in want.items()}


@pytest.mark.parametrize(
    ("own", "event_ms", "now_ms", "until_ms"),
    [
        # 10m moves by 1m:   |--- 10:00:30 … 10:10 ---|10:11
        (count("10m"), 30_000, 5 * MINUTE_MS, 11 * MINUTE_MS),
        (count("10m"), 30_000, 11 * MINUTE_MS - 1, 11 * MINUTE_MS),
        (count("10m"), 30_000, 11 * MINUTE_MS, None),
        # The shortest window that still holds it is the next to leave it: 1h moves by 5m.
        (count("10m", "1h"), 30_000, 5 * MINUTE_MS, 11 * MINUTE_MS),
        (count("10m", "1h"), 30_000, 11 * MINUTE_MS, 65 * MINUTE_MS),
        (count("10m", "1h"), 30_000, 65 * MINUTE_MS, None),
        # Ahead of its time: it enters with its tile, here of 5 s.
        (count("1m"), 30_000, 0, 30_000),
        (count("1m"), 34_999, 29_999, 30_000),
        (count("1m"), 34_999, 30_000, 95_000),
        # Nothing leaves what has no end, or no tiles.
        (count("all"), 30_000, 31_000, None),
        (count("1m", "all"), 30_000, 31_000, 95_000),
        (count("1m", "all"), 30_000, 95_000, None),
        ([kinds.Decayed(name="heat", event="Click", half_life="1m")], 30_000, 31_000, None),
        ([kinds.SecondsSince(name="idle", event="Click", over=("1m",))], 30_000, 31_000, None),
    ],
)
def test_worked_cases(own: list[Aggregation], event_ms: int, now_ms: int, until_ms: int | None) -> None:
    family, rows = of_events(own, BASE_MS + event_ms)
    (found,) = stay_until_ms(family.alone, rows, BASE_MS + now_ms).tolist()
    assert (found if found < NEVER_MS else None) == (None if until_ms is None else BASE_MS + until_ms)


def test_rows_do_not_concern_each_other() -> None:
    """Each has its own time, also one that was never seen."""
    state = State(plan_of(*count("10m")), 3)
    events = [{"contract": "Click", "row": row, "t": BASE_MS + row * MINUTE_MS} for row in (0, 2)]
    state.merge(scenarios.batches_of(events), BASE_MS - DAY_MS)
    family, rows = state.rows["view"]
    found = stay_until_ms(family.alone, rows, BASE_MS + 3 * MINUTE_MS)
    assert found.tolist() == [BASE_MS + 11 * MINUTE_MS, NEVER_MS, BASE_MS + 13 * MINUTE_MS]
    assert flat(family.alone, rows, BASE_MS + 11 * MINUTE_MS).tolist() == [[0, 0, 1]]


def test_the_earliest_of_several_tiles_and_tables_counts() -> None:
    """Not that of the last tile or table that was looked at."""
    own = [*count("1h"), kinds.Sum(name="spent", event="Click", field="price", over=("10m",)), *count("24h")]
    named = [spec if at < 2 else kinds.Count(name="day", event="Click", over=("24h",)) for at, spec in enumerate(own)]
    family, rows = of_events(named, BASE_MS + 2 * MINUTE_MS, BASE_MS, BASE_MS + 4 * MINUTE_MS)
    assert len(family.tables) == 3
    for now_ms, until_ms in ((5, 11), (11, 13), (13, 15), (15, 65), (65, 25 * 60)):
        (found,) = stay_until_ms(family.alone, rows, BASE_MS + now_ms * MINUTE_MS).tolist()
        assert (found - BASE_MS) / MINUTE_MS == until_ms
