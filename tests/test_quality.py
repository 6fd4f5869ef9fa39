"""Shares, quantiles, the stability index and expectations against brute force; what a mistake in one says."""

from __future__ import annotations

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from config.settings import Settings
from features.changes import changes, in_the_way
from features.compile import compile_plan
from features.events import Event
from features.evolve import succeed
from features.plan import Derived, Plan
from headrace import DeclarationError, Entity, agg, col, rate, service, share, share_null, view
from store.archive import tables_of
from store.served import write
from tests.support.archived import archive
from training.distribution import QUANTILES, is_empty, numbers_of, quantiles, stability_index
from training.quality import Checked, FeatureQuality, Quality, _count, _wanted, quality, write_metrics

NOW_MS = 1_763_719_200_000
HOUR_MS = 3_600_000
NAN = float("nan")
USER, ITEM = Entity("user", key="user_id", forget_after="90d"), Entity("item", key="item_id", forget_after="90d")


def contract(*expect: Any) -> type[Event]:
    class Seen(Event, topic="seen", expect=list(expect)):
        """Something was seen."""

        user_id: str
        item_id: str
        place: str | None = None
        price: float | None = None
        sold: bool | None = None

    return Seen


def plan_of(*expect: Any) -> Plan:
    """A plan of a contract that expects this."""
    seen = contract(*expect)

    @view(USER)
    class UserSights:
        sights = agg.count(seen, over="1h")
        price = agg.mean(seen, "price", over="1h", default=25.0)
        dearest = agg.max(seen, "price", over="1h")
        places = agg.last_k(seen, "place", k=5)

    @view(ITEM)
    class ItemSights:
        sights = agg.count(seen, by="place", over="1h")
        place = agg.last(seen, "place")

    return compile_plan([{"s": service("sights_v1", UserSights, ItemSights)}], "test", 8)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(repo=tmp_path)


@pytest.fixture
def rng() -> random.Random:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    return random.Random(seed)


# What is expected

Declared = Callable[[], Any]


@pytest.mark.parametrize(
    ("expected", "text"),
    [
        (share_null("place") < 0.05, 'share_null("place") < 0.05'),
        (share((col("price") > 3) | ~col("place").one_of("a", 'b"')) <= 0.5, None),
        (share((col("sold") == True) & (col("price") <= 3.5)) > 0, None),  # noqa: E712  # as users write it
        (rate >= "600/m", 'rate >= "600/m"'),
    ],
)
def test_an_expectation_is_read_back_from_the_plan_as_it_was_declared(expected: Any, text: str | None) -> None:
    """Its text is Python, and says the same; so does the plan that is applied."""
    names = {"share_null": share_null, "share": share, "col": col, "rate": rate}
    assert eval(str(expected), names) == expected  # noqa: S307  # a test's own text
    assert text in (None, str(expected))
    plan = plan_of(expected)
    back = Plan.decode(plan.encode())
    assert back == plan
    assert back.fingerprint == plan.fingerprint
    assert back.event("Seen").expect == (expected,)


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        (lambda: [share_null("plaice") < 0.05], ["'plaice'", "it has: ", "place"]),
        (lambda: [share(col("price") > "x") < 0.05], ["'price' with 'x'", "float"]),
        (lambda: [share("price > 3") < 0.05], ["'price > 3' is no condition", 'col("']),  # type: ignore[arg-type]  # on purpose
        (lambda: [share_null("place") < 5], ["< 5.0", "from 0 to 1"]),
        (lambda: [share_null("place") < True], ["< True", "from 0 to 1"]),
        (lambda: [share_null("place") < NAN], ["nan", "from 0 to 1"]),
        (lambda: [share_null("place") < "5 %"], ["'5 %'", "from 0 to 1"]),  # type: ignore[operator]  # on purpose
        (lambda: [share_null("event_id") < 0.1], ["'event_id'", "every event has"]),
        (lambda: [rate > 10], ["rate > 10", "'10/s'"]),  # type: ignore[operator]  # on purpose
        (lambda: [rate > "10"], ["'10' is no rate", "'10/s'"]),
        (lambda: [rate > "10/min"], ["'10/min' is no rate", "'600/m'"]),
        (lambda: [rate], ["rate, which expects nothing", "10/s"]),
        (lambda: [col("price") > 3], ["expects nothing", "share("]),
        (lambda: share_null("place") < 0.05, ['expect=share_null("place") < 0.05 is no list', "expect=["]),
        (lambda: [rate > "1/s", rate > "1/s"], ['rate > "1/s" twice', "once"]),
    ],
)
def test_a_mistake_names_the_contract_the_value_and_what_would_be_right(expect: Declared, words: list[str]) -> None:
    with pytest.raises(DeclarationError) as caught:

        class Seen(Event, topic="seen", expect=expect()):
            user_id: str
            place: str | None = None
            price: float | None = None

    assert str(caught.value).startswith("Seen: ")
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_expectation_between_two_bounds_is_two() -> None:
    """Python would else keep only the second half."""
    with pytest.raises(TypeError, match="declare two"):
        _ = 0.1 < share_null("place") < 0.2


def test_a_plan_that_expects_nothing_is_the_same_as_before_there_were_expectations() -> None:
    """To the byte, so that its fingerprint, which answers and logs carry, is."""
    assert '"expect"' not in plan_of().encode()
    old = msgspec.json.encode(plan_of(rate > "1/s"))
    without = json.loads(old)
    del without["events"][0]["expect"]
    assert Plan.decode(json.dumps(without)) == plan_of()


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ((), (rate > "1/s",), 'rate > "1/s" is expected'),
        ((rate > "1/s",), (rate > "2/s", share_null("place") < 0.5), 'rate > "2/s", share_null("place") < 0.5 is'),
        ((rate > "1/s",), (), "nothing is expected"),
    ],
)
def test_another_expectation_describes_the_contract(before: Any, after: Any, words: str) -> None:
    """It refuses no event, so it needs no consent; and the stream's code is that of the same contract."""
    old, new = plan_of(*before), plan_of(*after)
    (said,) = changes(old, succeed(old, new, now_ms=NOW_MS), NOW_MS)
    assert (said.kind, said.what, said.name) == ("describes", "contract", "Seen")
    assert words in said.consequence
    assert not in_the_way(new, [said], ())
    assert old.event("Seen").fingerprint == new.event("Seen").fingerprint


EVENTS = st.lists(
    st.fixed_dictionaries(
        {
            "place": st.sampled_from(["a", "b", None]),
            "price": st.one_of(st.none(), st.floats(-5, 5)),
            "sold": st.sampled_from([True, False, None]),
            "_t": st.integers(0, 9),
        }
    ),
    max_size=40,
)


@given(EVENTS, st.integers(0, 10), st.integers(1, 5))
def test_events_are_counted_as_brute_force_counts_them(events: list[Any], until_ms: int, parts: int) -> None:
    """Nulls of every kind of field; a comparison with null is false; in any number of batches, before a time."""
    expected = {
        share_null("place") < 0.5: lambda each: each["place"] is None,
        share_null("price") < 0.5: lambda each: each["price"] is None,
        share_null("sold") < 0.5: lambda each: each["sold"] is None,
        share(col("price") > 0) < 0.5: lambda each: each["price"] is not None and each["price"] > 0,
        share(~(col("place") == "a")) < 0.5: lambda each: each["place"] != "a",
        share(col("sold") == True) < 0.5: lambda each: each["sold"] is True,  # noqa: E712  # as users write it
        rate > "1/s": lambda _: True,
    }
    (spec,) = plan_of(*expected).events
    kinds = {"place": pa.string(), "price": pa.float64(), "sold": pa.bool_(), "_t": pa.int64()}
    batches = [
        pa.record_batch(
            {name: pa.array([each[name] for each in events[at::parts]], kind) for name, kind in kinds.items()}
        )
        for at in range(parts)
    ]
    before = [each for each in events if each["_t"] < until_ms]
    n_events, *counted = _count(spec, batches, until_ms).tolist()
    assert n_events == len(before)
    assert counted == [sum(map(holds, before)) for holds in expected.values()]
    for each, n in zip(expected, counted, strict=True):
        value = each.value(n_events, n, 2.0)
        if each.of is rate:
            assert value == len(before) / 2
            assert each.is_met(value) == (len(before) > 2)
        else:
            assert value == (n / len(before) if before else None)
            assert each.is_met(value) == (not before or 2 * n < len(before))


def test_of_a_contract_that_expects_only_a_rate_events_are_counted_too(tmp_path: Path, rng: random.Random) -> None:
    """No field is of interest then, and in the archive as in Kafka's tail there are none without."""
    plan = plan_of(rate > "1/s")
    settings, (spec,) = Settings(archive=str(tmp_path)), plan.events
    archive(settings, plan, {"Seen": [{"t": NOW_MS + at, "user_id": "u1", "item_id": "i1"} for at in range(9)]}, rng)
    table = tables_of(settings, plan)["seen"]
    assert _wanted(spec)
    assert _count(spec, table.scan(_wanted(spec), NOW_MS + 2), NOW_MS + 7).tolist() == [5, 5]
    (spec,) = plan_of().events
    assert not _wanted(spec)


def test_rates_are_events_a_second() -> None:
    for text, is_met in {"1/s": True, "61/m": False, "60/m": True, "3600/h": True, "86401/d": False}.items():
        assert (rate >= text).is_met(1.0) is is_met, text


# Distributions

NUMBERS = st.one_of(st.none(), st.integers(-3, 3).map(float), st.floats(allow_nan=False, allow_infinity=False))
TEXTS = st.one_of(st.none(), st.sampled_from("abcdefghijklmno"))


def rank(values: list[float], share: float) -> float:
    """The smallest value that so large a share of the values does not exceed."""
    return next(each for each in sorted(values) if sum(other <= each for other in values) >= share * len(values) - 1e-9)


def slow_index(reference: list[Any], actual: list[Any]) -> float:
    """The index by the name of each value's bin."""
    there = [each for each in reference if each is not None]
    is_text = any(isinstance(each, str) for each in (*reference, *actual))
    top = [text for text, _ in sorted(Counter(there).items(), key=lambda each: (-each[1], each[0]))[:10]]
    ends = Counter([] if is_text or not there else [rank(there, tenth / 10) for tenth in range(1, 10)])

    def named(value: Any) -> tuple[str, Any]:
        if value is None:
            return "null", None
        if is_text:
            return ("is", value) if value in top else ("is none of them", None)
        if ends[value] > 1:
            return "is", value
        return "up to", min((end for end in ends if value <= end), default=math.inf)

    total = 0.0
    for each in {named(value) for value in (*reference, *actual)}:
        before, now = (max(sum(named(value) == each for value in of) / len(of), 1e-4) for of in (reference, actual))
        total += (now - before) * math.log(now / before)
    return total


@pytest.mark.parametrize(("values", "kind"), [(NUMBERS, pa.float64()), (TEXTS, pa.string())])
def test_the_stability_index_is_that_of_brute_force(values: Any, kind: pa.DataType) -> None:
    """Ties, constants, few values and nulls on either side; finite, and nothing for the distribution itself."""

    @given(st.lists(values, min_size=1, max_size=60), st.lists(values, min_size=1, max_size=60))
    def check(reference: list[Any], actual: list[Any]) -> None:
        arrays = pa.array(reference, kind), pa.array(actual, kind)
        found = stability_index(*arrays)
        assert found is not None
        assert math.isclose(found, slow_index(reference, actual), rel_tol=1e-9, abs_tol=1e-12)
        assert 0 <= found < math.inf
        assert stability_index(arrays[0], arrays[0]) == 0

    check()


@pytest.mark.parametrize(
    ("reference", "actual"),
    [
        ([-sys.float_info.max] * 90, [sys.float_info.max] * 90),
        ([5.0] * 90, [4.0] * 90),
        ([5.0] * 90, [6.0] * 90),
        ([5.0] * 90, [None] * 90),
        ([0.0] * 90 + [1.0] * 10, [0.0] * 10 + [1.0] * 90),
        ([-1.0] * 30 + [0.0] * 60, [-1.0] * 30 + [-0.5] * 60),
        (["a"] * 90, ["b"] * 90),
        ([True] * 90, [False] * 90),
        ([["a"]] * 90, [["a", "b"]] * 90),
        ([["a"]] * 90, [[]] * 90),
    ],
)
def test_what_is_altogether_elsewhere_is_far(reference: list[Any], actual: list[Any]) -> None:
    """Also where the reference is a constant, or most of it: bins between distinct deciles alone would not see it."""
    found = stability_index(pa.array(reference), pa.array(actual))
    assert found is not None
    assert found > 1


def test_without_values_there_is_no_index() -> None:
    none: Any = pa.array([], pa.float64())
    assert stability_index(none, pa.array([1.0])) is None
    assert stability_index(pa.array([1.0]), none) is None


@given(st.lists(NUMBERS, max_size=60))
def test_quantiles_are_numbers_that_are_there(values: list[Any]) -> None:
    numbers = numbers_of(pa.array(values, pa.float64()))
    assert numbers is not None
    there = [float(each) for each in values if each is not None]
    expected = {str(share): rank(there, share) for share in QUANTILES} if there else {}
    assert quantiles(numbers) == expected


@given(st.lists(st.one_of(st.none(), st.lists(st.text(max_size=2), max_size=3)), max_size=20), st.integers(0, 5))
def test_lists_and_maps_count_by_their_length(values: list[Any], start: int) -> None:
    """Also of a slice, whose offsets do not begin at 0."""
    maps = [None if each is None else [(str(at), 1.0) for at, _ in enumerate(each)] for each in values]
    own = values[start:]
    for column in (
        pa.array(values, pa.list_(pa.string())).slice(start),
        pa.array(maps, pa.map_(pa.string(), pa.float64())).slice(start),
    ):
        numbers = numbers_of(column)
        assert numbers is not None
        np.testing.assert_array_equal(numbers, [math.nan if each is None else len(each) for each in own])
        assert is_empty(column).tolist() == [not each for each in own]


# What was served


OF_USER: dict[str, tuple[pa.DataType, list[Any], Any]] = {
    "user_sights__sights_1h": (pa.int64(), [0, 0, 1, 7], 0),
    "user_sights__price_1h": (pa.float64(), [25.0, 25.0, 3.5], 25.0),
    "user_sights__dearest_1h": (pa.float64(), [None, 4.0, 5.0], None),
    "user_sights__places": (pa.list_(pa.string()), [[], ["a"], ["a", "b"]], []),
}
OF_ITEM: dict[str, tuple[pa.DataType, list[Any], Any]] = {
    "item_sights__sights_1h": (pa.map_(pa.string(), pa.float64()), [[], [("a", 1.0)], [("a", 1.0), ("b", 2.0)]], []),
    "item_sights__place": (pa.string(), [None, "a", "b"], None),
}
"""The features of `plan_of`: type, values to choose from, and the one of an entity never seen."""
KINDS = {
    "user_id": pa.string(),
    "item_id": pa.string(),
    "event_timestamp": pa.int64(),
    "_plan": pa.int64(),
    "user_sights__pace": pa.float64(),
    **{name: kind for name, (kind, _, _) in (OF_USER | OF_ITEM).items()},
}


def random_answers(rng: random.Random, n: int) -> list[list[dict[str, Any]]]:
    """Rows of answers as they are kept: of a user (now and then nobody) and some items, or of one of them alone.

    Now and then an item was asked for twice.
    """

    def values(features: Any) -> dict[str, Any]:
        return {name: rng.choice(choices) for name, (_, choices, _) in features.items()}

    answers = []
    for at in range(n):
        about = rng.choice(["user", "item", "both", "both"])
        whole: dict[str, Any] = {"event_timestamp": NOW_MS + at, "_plan": 0}
        if about != "item":
            whole |= {"user_id": rng.choice(["u1", "u2", *([""] if about == "both" else [])]), **values(OF_USER)}
        rows = [whole]
        if about != "user":
            rows = [whole | {"item_id": f"i{rng.randrange(9)}", **values(OF_ITEM)} for _ in range(rng.randint(1, 4))]
            rows = [next(row for row in rows if row["item_id"] == each["item_id"]) for each in rows]
        answers.append(rows)
    return answers


def batch_of(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in KINDS.items() if name in rows[0]}
    columns["event_timestamp"] = columns["event_timestamp"].view(pa.timestamp("ms", "UTC"))
    return pa.record_batch(columns)


def looked_at(settings: Settings, plan: Plan, **options: Any) -> Quality:
    return quality(settings, plan, {0: plan}.get, NOW_MS - HOUR_MS, NOW_MS + HOUR_MS, **options)


def test_what_was_served_is_counted_as_brute_force_counts_it(settings: Settings, rng: random.Random) -> None:
    """Each feature of its own entities, once an answer: a user's does not count as often as there were items.

    What an answer was not about is no null; an answer about nobody has values like any other. A reference counts alike.
    """
    plan = plan_of()
    answers, others = random_answers(rng, 300), random_answers(rng, 200)
    for at in range(0, 300, 100):
        write(settings.sample_path(), "sights_v1", [batch_of(each) for each in answers[at : at + 100]], NOW_MS, 7)
    reference = settings.repo / "reference.parquet"
    columns = [name for name in KINDS if name not in ("_plan", "user_sights__pace", "user_sights__places")]
    tables = [pa.Table.from_batches([batch_of(each)]) for each in others if {"user_id", "item_id"} <= each[0].keys()]
    pq.write_table(pa.concat_tables(tables).select(columns), reference)

    found = looked_at(settings, plan, reference=reference)
    assert {each.feature for each in found.features} == plan.features.keys()
    for each in found.features:
        feature = {**OF_USER, **OF_ITEM}[each.feature]

        def once(answers: list[Any], name: str = each.feature) -> list[Any]:
            """Of each answer, by what the feature is about."""
            own = "user_id" if name in OF_USER else "item_id"
            return [
                value for rows in answers if own in rows[0] for value in {row[own]: row[name] for row in rows}.values()
            ]

        _, _, unseen = feature
        values = once(answers)
        assert each.rows == len(values)
        assert each.null == sum(value in (None, []) for value in values) / len(values)
        assert each.default == sum(value == unseen for value in values) / len(values)
        lengths = [len(value) if isinstance(value, list) else value for value in values]
        if each.feature == "item_sights__place":
            assert each.quantiles == {}
        else:
            there = [value for value in lengths if value is not None]
            assert each.quantiles == {str(share): rank(there, share) for share in QUANTILES}
        if each.feature == "user_sights__places":
            assert each.psi is None
        else:
            before = once([rows for rows in others if {"user_id", "item_id"} <= rows[0].keys()])
            before = [len(value) if isinstance(value, list) else value for value in before]
            assert each.psi is not None
            assert math.isclose(each.psi, slow_index(before, lengths), abs_tol=1e-9)


def test_rows_of_a_plan_that_can_not_be_read_are_left_out_and_counted(settings: Settings, rng: random.Random) -> None:
    """Nor of one whose code is gone: after another derived feature was applied, the command goes on."""
    plan, answers = plan_of(), random_answers(rng, 60)
    for at in range(40):
        answers[at] = [row | {"_plan": 2 + at % 2} for row in answers[at]]
    answers[0] = [row | {"user_sights__pace": 1.0} for row in answers[0]]
    gone = Derived("pace", ("user_sights__sights_1h",), code="nowhere:Sights.pace", fingerprint="0")
    view = msgspec.structs.replace(plan.view("user_sights"), features=(*plan.view("user_sights").features, gone))
    with_gone = msgspec.structs.replace(plan, views=(plan.view("item_sights"), view))
    write(settings.sample_path(), "sights_v1", [batch_of(each) for each in answers], NOW_MS, 7)
    found = quality(settings, plan, {0: plan, 2: with_gone}.get, NOW_MS - HOUR_MS, NOW_MS)
    assert found.unknown == sum(map(len, answers[:40]))
    assert {each.feature for each in found.features} == plan.features.keys()


def test_what_stands_in_the_way_says_what_to_do(settings: Settings, rng: random.Random) -> None:
    plan, reference = plan_of(), settings.repo / "reference.parquet"
    with pytest.raises(LookupError, match=r"HEADRACE_SAMPLE.* expect=\["):
        looked_at(settings, plan)
    rows = [row for each in random_answers(rng, 50) for row in each if {"user_id", "item_id"} <= row.keys()]
    write(settings.sample_path(), "sights_v1", [batch_of(rows)], NOW_MS, 7)
    with pytest.raises(LookupError, match=r"HEADRACE_SAMPLE"):
        looked_at(settings, plan, services=["other_v1"])
    reference.write_text("user_id,price\n")
    with pytest.raises(ValueError, match=r"reference\.parquet: .* as `headrace train` writes it"):
        looked_at(settings, plan, reference=reference)
    pq.write_table(pa.table({"price": [1.0]}), reference)
    with pytest.raises(LookupError, match=r"no column of the features served.* --service sights_v1"):
        looked_at(settings, plan, reference=reference)
    pq.write_table(pa.table({"user_sights__price_1h": ["dear"]}), reference)
    with pytest.raises(ValueError, match=r"user_sights__price_1h is string, the feature float"):
        looked_at(settings, plan, reference=reference)


def test_metrics_hold_all_that_was_found(tmp_path: Path) -> None:
    """In the text format that Prometheus reads, checks with quotes in them too; what is not known is left out."""
    check = str(share(col("place") == "a") < 0.05)
    found = Quality(
        [
            FeatureQuality("s", "f", 8, 0.25, 0.5, {"0.5": 3.0}, 0.125),
            FeatureQuality("s", "g", 8, 0.0, 0.0, {}),
        ],
        [Checked("Seen", check, 9, 0.5, breached=True), Checked("Seen", "other", 0, None, breached=False)],
    )
    path = tmp_path / "quality.prom"
    write_metrics(found, path)
    assert [each.name for each in tmp_path.iterdir()] == ["quality.prom"]
    samples = {
        (sample.name.removeprefix("headrace_quality_"), *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(path.read_text())
        for sample in family.samples
    }
    assert samples == {
        ("rows", "f", "s"): 8,
        ("null_ratio", "f", "s"): 0.25,
        ("default_ratio", "f", "s"): 0.5,
        ("psi", "f", "s"): 0.125,
        ("value", "0.5", "f", "s"): 3,
        ("rows", "g", "s"): 8,
        ("null_ratio", "g", "s"): 0,
        ("default_ratio", "g", "s"): 0,
        ("check_value", "Seen", check): 0.5,
        ("breach", "Seen", check): 1,
        ("breach", "Seen", "other"): 0,
    }
    assert found.breaches() == [f"Seen: {check}, it is 0.5"]
    assert found.breaches(psi_max=0.1)[1:] == ["s: f has a psi of 0.125"]
    assert found.breaches(psi_max=0.125) == found.breaches()
