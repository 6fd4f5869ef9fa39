"""`worked`: one aggregation over a few events, for the examples in docstrings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from features.aggregations.base import Aggregation
from features.kernel import Events, Rows, evaluate, merge
from features.layout import slots_of
from features.plan import EntitySpec, Plan, ViewSpec
from features.values import to_python

_MIDNIGHT_MS = 1_763_683_200_000
"""2025-11-21T00:00:00Z."""


def worked(aggregation: Aggregation, events: Mapping[str, Mapping[str, Any]], at: str) -> Any:
    """The first window's value at the time `at` (HH:MM) after the events, each keyed by its time."""
    view = ViewSpec("example", ("user",), (aggregation,))  # type: ignore[arg-type]  # every Aggregation is in the union
    plan = Plan("example", 1, (EntitySpec("user", "user_id", "90d"),), (), (view,), ())
    feature = next(iter(plan.features.values()))
    family, slots = slots_of(plan)[feature.full_name]
    now_ms = _clock_ms(at)
    times_ms = np.array([_clock_ms(clock) for clock in events], np.int64)
    names = {name for event in events.values() for name in event}
    fields = {name: _column([event.get(name) for event in events.values()]) for name in names}
    batch = {aggregation.event: Events(np.zeros(len(events), np.intp), times_ms, fields)} if events else {}
    rows = merge(family, Rows.empty(family, 1), batch, now_ms).rows
    return to_python(evaluate(family, rows, [(feature, slots)], now_ms)[feature.full_name], feature.value_type)[0]


def _clock_ms(clock: str) -> int:
    hours, minutes = clock.split(":")
    return _MIDNIGHT_MS + (int(hours) * 60 + int(minutes)) * 60_000


def _column(values: list[Any]) -> Any:
    if any(isinstance(value, str) for value in values):
        return pa.array(values, pa.string())
    return np.array([np.nan if value is None else value for value in values], np.float64)
