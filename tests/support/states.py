"""One view with every aggregation, and the ways to bring events into its rows: for vectors and property tests."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from features import aggregations as kinds
from features.aggregations import Aggregation
from features.kernel import Events, Rows, evaluate, merge
from features.layout import Family, slots_of
from features.plan import EntitySpec, Plan, ViewSpec
from features.values import to_python
from store.codec import decode, encode

OracleEvent = Mapping[str, Any]
TEXTS = ("item_id", "category")


def plan_of(*aggregations: Aggregation) -> Plan:
    """A plan with one view of these aggregations."""
    view = ViewSpec("view", ("user",), aggregations)  # type: ignore[arg-type]  # every Aggregation is in the union
    return Plan("test", 4, (EntitySpec("user", "user_id", "900d"),), (), (view,), ())


def columns(events: Sequence[OracleEvent], rows: Sequence[int]) -> Events:
    """Events as the kernel takes them."""
    fields: dict[str, Any] = {name: pa.array([event.get(name) for event in events], pa.string()) for name in TEXTS}
    fields["price"] = np.array(
        [np.nan if event.get("price") is None else event["price"] for event in events], np.float64
    )
    return Events(np.array(rows, np.intp), np.array([event["t"] for event in events], np.int64), fields)


class State:
    """Rows of all families of a plan; `packed` sends them through the codec after every merge."""

    def __init__(self, plan: Plan, n_rows: int = 1, *, packed: bool = False) -> None:
        self.plan = plan
        self.slots = slots_of(plan)
        self.packed = packed
        families = {family.name: family for family, _ in self.slots.values()}
        self.rows: dict[str, tuple[Family, Rows]] = {
            name: (family, Rows.empty(family, n_rows)) for name, family in families.items()
        }
        self.evicted = 0

    def merge(self, batches: Mapping[str, Events], now_ms: int) -> None:
        """Merges one batch into every family."""
        for name, (family, rows) in self.rows.items():
            merged = merge(family, rows, batches, now_ms)
            self.evicted += int(merged.evicted.sum())
            new = merged.rows
            if self.packed:
                new = decode(family, [blob or None for blob in encode(family, new)])
            self.rows[name] = family, new

    def values(self, query_ms: int) -> dict[str, list[Any]]:
        """Every feature's value for every row."""
        found: dict[str, list[Any]] = {}
        for full_name, (family, slots) in self.slots.items():
            feature = self.plan.features[full_name]
            value = evaluate(family, self.rows[family.name][1], [(feature, slots)], query_ms)[full_name]
            found[feature.name] = to_python(value, feature.value_type)
        return found


def shuffled_batches(events: Sequence[OracleEvent], rng: random.Random) -> Iterable[list[OracleEvent]]:
    """The events in random order, in random batches."""
    remaining = list(events)
    rng.shuffle(remaining)
    while remaining:
        size = rng.randint(1, len(remaining))
        yield remaining[:size]
        remaining = remaining[size:]


def every_aggregation(windows: Sequence[str]) -> list[Aggregation]:
    """One of each kind over the windows, named after its kind."""
    over = tuple(windows)
    common: dict[str, Any] = {"event": "Click"}
    return [
        kinds.Count(name="count", over=over, **common),
        kinds.Sum(name="sum", field="price", over=over, **common),
        kinds.Mean(name="mean", field="price", over=over, **common),
        kinds.Min(name="min", field="price", over=over, **common),
        kinds.Max(name="max", field="price", over=over, **common),
        kinds.Std(name="std", field="price", over=over, **common),
        kinds.Distinct(name="distinct", field="item_id", over=over, **common),
        kinds.Last(name="last", field="item_id", kind="str", over=over, **common),
        kinds.LastK(name="last_k", field="item_id", k=3, over=over, **common),
        kinds.SecondsSince(name="seconds_since", over=over, **common),
        kinds.First(name="first", field="item_id", kind="str", over=over, **common),
        kinds.FirstK(name="first_k", field="item_id", k=3, **common),
        kinds.SinceFirst(name="since_first", over=over, **common),
        kinds.TopK(name="top_k", field="category", k=2, over=over, buckets=64, **common),
        kinds.Decayed(name="decayed_30m", half_life="30m", **common),
        kinds.Decayed(name="decayed_24h", half_life="24h", **common),
    ]
