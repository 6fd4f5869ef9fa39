"""The worked cases of the window rule; another file of the same form by `HEADRACE_VECTORS=FILE`."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from tests import oracle
from tests.support.states import State, columns, every_aggregation, plan_of, shuffled_batches

VECTORS = json.loads(Path(os.environ.get("HEADRACE_VECTORS", Path(__file__).parent / "windows.json")).read_text())
WINDOWS = [*VECTORS["hop_ms"], "all"]
PLAN = plan_of(*every_aggregation(WINDOWS))
LAST_K_MAX, TOP_K_MAX = 3, 2


def feature_of(case: dict[str, Any]) -> str:
    """The name of the feature that a case is about."""
    return f"decayed_{case['half_life']}" if case["agg"] == "decayed" else f"{case['agg']}_{case['window']}"


def check(values: dict[str, list[Any]], case: dict[str, Any]) -> None:
    """Every expected value of a case."""
    for want in case["expected"]:
        assert want.get("k", 0) <= (LAST_K_MAX if want["agg"] == "last_k" else TOP_K_MAX)
        got = values[feature_of(want)][0]
        got = got[: want["k"]] if "k" in want else got
        assert oracle.close(got, want["value"]), (want, got)


def test_hops_are_those_of_the_ladder() -> None:
    """The hop of every window is the one that the vectors state."""
    assert {window: oracle.hop_ms(window) for window in VECTORS["hop_ms"]} == VECTORS["hop_ms"]


@pytest.mark.parametrize("case", VECTORS["cases"], ids=range(len(VECTORS["cases"])))
def test_kernel_gives_the_worked_values(case: dict[str, Any]) -> None:
    """One merge of all events, then evaluate, gives every worked value."""
    state = State(PLAN)
    state.merge({"Click": columns(case["events"], [0] * len(case["events"]))}, case["query_time_ms"])
    check(state.values(case["query_time_ms"]), case)


@pytest.mark.parametrize("case", VECTORS["cases"], ids=range(len(VECTORS["cases"])))
def test_packed_rows_merged_in_any_order_give_the_worked_values(case: dict[str, Any]) -> None:
    """Random order and batches, each with a `now` of its own, through the codec after each: the same values."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    state = State(PLAN, packed=True)
    for batch in shuffled_batches(case["events"], rng):
        now_ms = rng.randint(max(event["t"] for event in batch), case["query_time_ms"])
        state.merge({"Click": columns(batch, [0] * len(batch))}, now_ms)
    check(state.values(case["query_time_ms"]), case)


def test_the_oracle_gives_the_worked_values() -> None:
    """The brute force that other tests trust agrees with every worked value."""
    for case in VECTORS["cases"]:
        for want in case["expected"]:
            options = {name: want[name] for name in ("field", "k", "half_life") if name in want}
            got = oracle.expected(want["agg"], case["events"], case["query_time_ms"], want["window"], **options)
            assert oracle.close(got, want["value"]), (want, got)
