"""The rows of entities at many times at once are those that a merge of all earlier events gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import aggregations as kinds
from features.aggregations import Aggregation
from features.history import rows_at
from features.kernel import evaluate
from features.layout import slots_of
from features.plan import EntitySpec, Plan, ViewSpec
from features.values import to_python
from tests.properties.scenarios import (
    BASE_MS,
    DAY_MS,
    LISTS,
    agree,
    batches_of,
    brute,
    events_at,
    instants,
    scale_of,
    window_sets,
)
from tests.support.states import plan_of

N_ROWS = 3
Asked = list[tuple[int, int]]
"""Entity and time."""


def values_at(plan: Plan, events: list[dict[str, Any]], asked: Asked, words_max: int) -> dict[str, list[Any]]:
    """Every feature, at each of the times asked for."""
    rows, times_ms = (np.array(each, np.int64) for each in zip(*asked, strict=True))
    found: dict[str, list[Any]] = {feature.name: [] for feature in plan.features.values()}
    for full_name, (family, slots) in slots_of(plan).items():
        feature = plan.features[full_name]
        for part, state in rows_at(family, batches_of(events), rows, times_ms, words_max):
            values = evaluate(family, state, [(feature, slots)], times_ms[part])[full_name]
            found[feature.name] += to_python(values, feature.value_type)
    return found


@pytest.mark.parametrize("listed", LISTS.values(), ids=list(LISTS))
@given(data=st.data(), over=window_sets, words_max=st.sampled_from([1, 100, 1 << 20]))
def test_every_time_has_what_brute_force_gives_for_the_events_before_it(
    listed: Any, data: st.DataObject, over: list[str], words_max: int
) -> None:
    """Many times an entity, the same one twice, times of events themselves, before all, and after long pauses."""
    times = instants(BASE_MS - 100 * DAY_MS, BASE_MS)
    events = data.draw(st.lists(events_at(times, N_ROWS), max_size=20))
    moments = st.one_of(times, st.sampled_from([event["t"] for event in events])) if events else times
    asked: Asked = sorted(data.draw(st.lists(st.tuples(st.integers(0, N_ROWS - 1), moments), min_size=1, max_size=12)))
    plan = plan_of(*listed(over))
    values = values_at(plan, events, asked, words_max)
    for feature in plan.features.values():
        assert isinstance(feature.spec, Aggregation)
        assert feature.window is not None
        for at, (row, query_ms) in enumerate(asked):
            before = [event for event in events if event["row"] == row and event["t"] < query_ms]
            want, got = brute(feature.spec, before, query_ms, feature.window.name), values[feature.name][at]
            assert agree(got, want, scale_of(before)), (feature.name, row, query_ms, got, want)


def test_an_entity_that_was_idle_too_long_begins_anew() -> None:
    """As Redis lets its row expire: what it did before does not come back with its next event.

    ::

        day 0    1        90.999   91                   150      151
          |item a  q: [a]    q: [a]  q: []                |item b  q: [b]
    """
    history = kinds.LastK(name="items", event="Click", field="item_id", k=5)
    plan = Plan("test", 4, (EntitySpec("user", "user_id", "90d"),), (), (ViewSpec("view", ("user",), (history,)),), ())
    click = {"contract": "Click", "row": 0, "price": None, "category": None}
    clicks = [
        {**click, "t": BASE_MS + DAY_MS, "item_id": "a"},
        {**click, "t": BASE_MS + 150 * DAY_MS, "item_id": "b"},
    ]
    days = [2.0, 91 - 1 / DAY_MS, 91.0, 151.0]
    asked = [(0, BASE_MS + round(day * DAY_MS)) for day in days]
    assert values_at(plan, clicks, asked, 1)["items"] == [["a"], ["a"], [], ["b"]]
