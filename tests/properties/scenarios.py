"""Random histories of rows, and what brute force makes of them.

Importing this chooses the profile of Hypothesis: a failure prints a blob that repeats it anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from hypothesis import strategies as st

from features import aggregations as kinds
from features.aggregations import Aggregation
from features.expressions import Condition, col
from tests import oracle
from tests.support.states import OracleEvent, State, columns, every_aggregation

BASE_MS: Final = 1_763_683_200_000
"""2025-11-21T00:00:00Z: an edge of every hop."""
MINUTE_MS: Final = 60_000
HOUR_MS: Final = 3_600_000
DAY_MS: Final = 86_400_000

WINDOWS: Final = (
    *("1m", "5m", "7m", "10m", "59m", "1h", "60m", "3h", "10h", "24h", "36h", "60h"),
    *("7d", "11d", "30d", "90d", "all"),
)
"""Every hop of the ladder, widths just above and below a step, odd ones, and two names for one width."""
WORDS: Final = ("a", "b", "A", "aa", "é", "e\u0301", "中", "\uffff", "😀", "\U0010ffff", "ü" * 256)
"""By code point 😀 comes after U+FFFF; sorted as UTF-16 it would come before."""

EDGES_MS: Final = (5_000, 30_000, MINUTE_MS, 5 * MINUTE_MS, HOUR_MS, 6 * HOUR_MS, DAY_MS)
NUDGES_MS: Final = (-5_000, -1, 0, 1, 4_999)


@st.composite
def instants(draw: st.DrawFn, since_ms: int, until_ms: int) -> int:
    """A time in a range, often an edge of some hop or a millisecond beside it."""
    at = draw(st.integers(since_ms, until_ms))
    if draw(st.booleans()):
        edge = draw(st.sampled_from(EDGES_MS))
        at = at // edge * edge + draw(st.sampled_from(NUDGES_MS))
    return min(max(at, since_ms), until_ms)


def spans_ms(longest_ms: int) -> st.SearchStrategy[int]:
    """A length of time, of any order of magnitude."""
    steps = [step for step in (0, 1, *EDGES_MS, 7 * DAY_MS, 40 * DAY_MS) if step <= longest_ms]
    return st.one_of(st.sampled_from(steps), st.integers(0, longest_ms))


prices = st.one_of(
    st.none(),
    st.integers(0, 3).map(float),
    st.integers(0, 50_000).map(lambda cents: cents / 100),
    st.integers(-50_000, -1).map(lambda cents: cents / 100),
    st.integers(0, 1_000).map(lambda thousandths: 1e9 + thousandths / 1000),
    st.sampled_from([0.0, -0.0, 1.0, -1.0]),  # Sums that are nought, of something.
)
words = st.one_of(st.none(), st.sampled_from(WORDS))


@st.composite
def events_at(draw: st.DrawFn, times: st.SearchStrategy[int], n_rows: int) -> dict[str, Any]:
    """One event of one of two contracts, of one of the rows."""
    return {
        "contract": draw(st.sampled_from(["Click", "Click", "Like"])),
        "row": draw(st.integers(0, n_rows - 1)),
        "t": draw(times),
        "price": draw(prices),
        "item_id": draw(words),
        "category": draw(words),
    }


@dataclass(frozen=True)
class Merge:
    """One call of `merge`: its events and its `now`."""

    events: tuple[dict[str, Any], ...]
    now_ms: int


@dataclass(frozen=True)
class Query:
    """One call of `evaluate`."""

    at_ms: int


Step = Merge | Query


@st.composite
def histories(draw: st.DrawFn, n_rows: int, *, future_ms: int = 0) -> list[Step]:
    """Merges and queries: queries move on, and no merge's `now` is later than any query after it.

    Events are of any age up to 100 days, and up to `future_ms` ahead of the query that follows.
    """
    steps: list[Step] = []
    query_ms = BASE_MS + draw(st.sampled_from([0, 1, -1, 2_500, 12 * HOUR_MS]))
    for _ in range(draw(st.integers(1, 4))):
        for _ in range(draw(st.integers(0, 3))):
            reach = draw(st.sampled_from([MINUTE_MS, HOUR_MS, DAY_MS, 100 * DAY_MS]))
            times = instants(query_ms - reach, query_ms - 1 + future_ms)
            batch = draw(st.lists(events_at(times, n_rows), max_size=12))
            now_ms = query_ms - draw(st.one_of(st.just(0), spans_ms(DAY_MS)))
            steps.append(Merge(tuple(batch), now_ms))
        steps.append(Query(query_ms))
        query_ms += draw(spans_ms(40 * DAY_MS))
    return steps


window_sets = st.lists(st.sampled_from(WINDOWS), min_size=1, max_size=4, unique=True)


# Each condition beside what it means, in plain Python.
CONDITIONS: Final[Mapping[str, tuple[Any, Any]]] = {
    "dear": (col("price") >= 2, lambda e: e["price"] is not None and e["price"] >= 2),
    "not_dear": (~(col("price") >= 2), lambda e: not (e["price"] is not None and e["price"] >= 2)),
    "not_two": (col("price") != 2, lambda e: e["price"] is not None and e["price"] != 2),
    "priceless": (col("price").is_null(), lambda e: e["price"] is None),
    "one_of": (
        col("category").one_of("a", "é", "😀") | (col("price") < 0),
        lambda e: e["category"] in ("a", "é", "😀") or (e["price"] is not None and e["price"] < 0),
    ),
    "after_a": (
        (col("category") > "a") & ~col("item_id").is_null(),
        lambda e: e["category"] is not None and e["category"] > "a" and e["item_id"] is not None,
    ),
}


def sequences(name: str, over: tuple[str, ...], where: Any = None) -> list[Aggregation]:
    """The lists of a sequence."""
    given: dict[str, Any] = {"fields": ("category", "price", "item_id"), "texts": (True, False, True), "k": 4}
    names = (*given["fields"], "occurred_at")
    return [kinds.Sequence(name=f"{name}_{of}", event="Click", of=of, over=over, where=where, **given) for of in names]


def plain(over: Sequence[str]) -> list[Aggregation]:
    """One of each kind, and what the shared list leaves out."""
    windows = tuple(over)
    return [
        *every_aggregation(windows),
        kinds.Last(name="last_price", event="Click", field="price", kind="float", over=windows),
        kinds.Last(name="latest", event="Click", field="price", kind="float"),
        kinds.First(name="first_price", event="Click", field="price", kind="float", over=windows),
        kinds.First(name="earliest", event="Click", field="price", kind="float"),
        kinds.First(name="first_item", event="Click", field="item_id", kind="str"),
        kinds.SinceFirst(name="known", event="Click"),
        kinds.Decayed(name="spent", event="Click", field="price", half_life="2d"),
        kinds.Distinct(name="prices", event="Click", field="price", over=windows),
        kinds.Ratio(name="ratio", event="Click", of="Like", over=windows, prior=0.25, strength=3.0),
        kinds.Rate(name="rate", event="Click", of="Like", half_life="6h", prior=0.25, strength=3.0),
        kinds.Rate(name="worth", event="Click", field="price", of="Like", half_life="2d", prior=-2.0, strength=0.5),
        kinds.Entropy(name="variety", event="Click", field="category", over=windows, buckets=64),
        *sequences("last_events", over=windows),
        *sequences("ever", over=()),
        kinds.Quantile(name="p50", event="Click", field="price", q=0.5, over=windows),
        kinds.Quantile(name="p90", event="Click", field="price", q=0.9, over=windows),
        kinds.Distinct(name="pairs", event="Click", field="item_id+price", over=windows),
        kinds.Delta(name="delta", event="Click", over=("1h",), before="24h"),
        kinds.Delta(name="pace", event="Click", over=("10m",), before="10m"),
        kinds.Delta(name="trend", event="Click", field="price", over=("7d",), before="1h"),
    ]


def conditional(over: Sequence[str]) -> list[Aggregation]:
    """Several conditions beside each other in shared tables, and two contracts."""
    common: dict[str, Any] = {"over": tuple(over)}
    found: list[Aggregation] = []
    for name, (where, _) in CONDITIONS.items():
        found += [
            kinds.Count(name=f"count_{name}", event="Click", where=where, **common),
            kinds.Sum(name=f"sum_{name}", event="Like", field="price", where=where, **common),
            kinds.Std(name=f"std_{name}", event="Click", field="price", where=where, **common),
            kinds.Distinct(name=f"distinct_{name}", event="Like", field="item_id", where=where, **common),
            kinds.LastK(name=f"last_k_{name}", event="Like", field="item_id", k=2, where=where),
            kinds.Last(name=f"last_{name}", event="Like", field="item_id", kind="str", where=where),
            kinds.SecondsSince(name=f"since_{name}", event="Click", where=where),
            kinds.First(name=f"first_{name}", event="Like", field="item_id", kind="str", where=where, **common),
            kinds.FirstK(name=f"first_k_{name}", event="Like", field="item_id", k=2, where=where),
            *sequences(f"seq_{name}", (), where),
            kinds.Quantile(name=f"p10_{name}", event="Click", field="price", q=0.1, where=where, **common),
            kinds.SinceFirst(name=f"since_first_{name}", event="Click", where=where, **common),
        ]
    dear, cheap = CONDITIONS["dear"][0], CONDITIONS["not_dear"][0]
    found.append(
        kinds.Ratio(
            name="ratio", event="Click", of="Like", where=dear, of_where=cheap, prior=0.5, strength=2.0, **common
        )
    )
    return found


def by_bucket(over: Sequence[str]) -> list[Aggregation]:
    """Maps: of one contract and of two, over windows and without."""
    windows = tuple(over)
    common: dict[str, Any] = {"event": "Click", "by": "category", "buckets": 64}
    return [
        kinds.Count(name="count", over=windows, **common),
        kinds.Count(name="likes", over=windows, **{**common, "event": "Like"}),
        kinds.Sum(name="sum", field="price", over=windows, **common),
        kinds.Mean(name="mean", field="price", over=windows, **common),
        kinds.Min(name="min", field="price", over=windows, **common),
        kinds.Max(name="max", field="price", over=windows, **common),
        kinds.Std(name="std", field="price", over=windows, **common),
        kinds.Count(name="by_item", over=windows, **{**common, "by": "item_id"}),
        kinds.Decayed(name="decayed", half_life="6h", **common),
        kinds.Decayed(name="spent", field="price", half_life="3d", **{**common, "event": "Like"}),
        kinds.Rate(name="rate", of="Like", half_life="6h", prior=0.5, strength=3.0, **common),
    ]


def ratio_by_bucket(over: Sequence[str]) -> list[Aggregation]:
    """A map whose buckets have a prior."""
    common: dict[str, Any] = {"of": "Like", "by": "category", "buckets": 64}
    return [kinds.Ratio(name="ratio", event="Click", over=tuple(over), prior=0.25, strength=3.0, **common)]


LISTS: Final = {
    "plain": plain,
    "conditional": conditional,
    "by bucket": by_bucket,
    "ratio by bucket": ratio_by_bucket,
}


def batches_of(events: Iterable[OracleEvent]) -> dict[str, Any]:
    """Events by contract, as `merge` takes them."""
    found: dict[str, list[OracleEvent]] = {}
    for event in events:
        found.setdefault(event.get("contract", "Click"), []).append(event)
    return {name: columns(of, [event.get("row", 0) for event in of]) for name, of in found.items()}


def run(state: State, step: Step) -> None:
    """One merge."""
    assert isinstance(step, Merge)
    state.merge(batches_of(step.events), step.now_ms)


def is_tiled(spec: Aggregation) -> bool:
    """Whether it keeps tiles: `last`, `last_k`, `distinct`, … keep times instead, `all` neither."""
    untiled = (
        kinds.Last | kinds.LastK | kinds.Sequence | kinds.SecondsSince | kinds.Decayed | kinds.Rate | kinds.Distinct
    )
    return not isinstance(spec, untiled) and spec.over not in ((), ("all",))


def has_begun(spec: Aggregation, event: OracleEvent, query_ms: int) -> bool:
    """Whether an event counts although it may be later than the query: when its tile holds the query.

    An event of the future is in the finest tile that the aggregation has.
    """
    if not is_tiled(spec):
        return True
    finest_ms = min(oracle.hop_ms(window) for window in spec.over if window != "all")
    return bool(event["t"] // finest_ms <= query_ms // finest_ms)


def holds(where: Condition | None, event: OracleEvent) -> bool:
    """The condition's meaning in plain Python."""
    return where is None or any(condition is where and meaning(event) for condition, meaning in CONDITIONS.values())


def brute(spec: Aggregation, events: Iterable[OracleEvent], query_ms: int, window: str) -> Any:
    """What the window rule gives for one row; for a map, of all buckets with an event in the window."""
    begun = [event for event in events if has_begun(spec, event, query_ms)]
    if spec.by is None:
        return _number(spec, begun, query_ms, window)
    counted = [
        event
        for event in oracle.within(begun, window, query_ms)
        if any(
            event["contract"] == measure.event
            and holds(measure.where, event)
            and (measure.field is None or event[measure.field] is not None)
            for measure in spec.measures
        )
    ]
    names = {event[spec.by] for event in counted if event[spec.by] is not None}
    return {
        name: _number(spec, [event for event in begun if event[spec.by] == name], query_ms, window) for name in names
    }


def _number(spec: Aggregation, events: Sequence[OracleEvent], query_ms: int, window: str) -> Any:
    hits = [e for e in events if e["contract"] == spec.event and holds(spec.where, e)]
    if isinstance(spec, kinds.Ratio):
        trials = [e for e in events if e["contract"] == spec.of and holds(spec.of_where, e)]
        n_hits, n_trials = (len(oracle.within(each, window, query_ms)) for each in (hits, trials))
        return (n_hits + spec.prior * spec.strength) / (n_trials + spec.strength)
    if isinstance(spec, kinds.Rate):
        trials = [e for e in events if e["contract"] == spec.of and holds(spec.of_where, e)]
        both = ((hits, spec.field), (trials, None))
        a, b = (
            oracle.expected("decayed", *(of, query_ms, "all", field), half_life=spec.half_life) for of, field in both
        )
        return (a + spec.prior * spec.strength) / (b + spec.strength)
    values = [e["price"] for e in oracle.within(hits, window, query_ms) if e["price"] is not None]
    if isinstance(spec, kinds.Std):
        return exact_std(values)
    options = {
        name: getattr(spec, name) for name in ("k", "half_life", "before", "q", "fields", "of") if hasattr(spec, name)
    }
    tag = str(type(spec).__struct_config__.tag)
    return oracle.expected(tag, hits, query_ms, window, spec.field, **options)


def exact_std(values: Sequence[float]) -> float | None:
    """The population's standard deviation in exact fractions, rounded once at the end."""
    if not values:
        return None
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    return math.sqrt(sum((value - mean) ** 2 for value in exact) / len(exact))


def near(got: Any, want: Any, scale: float = 0.0) -> bool:
    """Equal; floats to 1e-9, and to the rounding of float64 at the scale of what went in."""
    if isinstance(want, oracle.About):
        return isinstance(got, float) and math.isclose(got, want, rel_tol=0.0100001, abs_tol=1e-12)
    if isinstance(want, float) and isinstance(got, float):
        return math.isclose(got, want, rel_tol=1e-9, abs_tol=64 * 2.0**-53 * scale + 1e-300)
    if isinstance(want, list) and isinstance(got, list) and len(want) == len(got):
        return all(near(*pair, scale) for pair in zip(got, want, strict=True))
    return bool(got == want and type(got) is type(want))


def agree(got: Any, want: Any, scale: float) -> bool:
    """`near`; of maps bucket by bucket."""
    if not isinstance(want, dict):
        return near(got, want, scale)
    return got.keys() == want.keys() and all(near(got[name], float(want[name]), scale) for name in want)


def scale_of(events: Iterable[OracleEvent]) -> float:
    """The size of the numbers that go into sums."""
    return math.fsum(abs(event["price"] or 0.0) + 1 for event in events)


def check(state: State, seen: Sequence[OracleEvent], query_ms: int, n_rows: int) -> None:
    """Every feature of every row is what brute force gives."""
    values = state.values(query_ms)
    for feature in state.plan.features.values():
        spec, window = feature.spec, feature.window
        assert isinstance(spec, Aggregation)
        assert window is not None
        for row in range(n_rows):
            of_row = [event for event in seen if event["row"] == row]
            got = values[feature.name][row]
            want = brute(spec, of_row, query_ms, window.name)
            assert agree(got, want, scale_of(of_row)), (feature.name, row, got, want)
