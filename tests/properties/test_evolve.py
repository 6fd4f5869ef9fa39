"""Plans that follow on each other: what goes on stays exact, and what is new is exact from when it says so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from hypothesis import given, note
from hypothesis import strategies as st

from features import aggregations as kinds
from features.aggregations import Aggregation
from features.evolve import (
    as_declared,
    backfilled,
    backfilling,
    columns_from,
    complete_from_ms,
    filling_alone,
    move,
    succeed,
)
from features.kernel import Rows, add, evaluate, merge
from features.layout import Family, families_of, family_of, slots_of
from features.plan import EntitySpec, History, Plan
from features.values import to_python
from store.codec import decode, encode
from store.layouts import Layouts
from tests.properties.scenarios import (
    BASE_MS,
    DAY_MS,
    HOUR_MS,
    MINUTE_MS,
    agree,
    batches_of,
    brute,
    by_bucket,
    conditional,
    events_at,
    instants,
    plain,
    ratio_by_bucket,
    scale_of,
    spans_ms,
    window_sets,
)
from tests.support.states import OracleEvent, plan_of

N_ROWS = 3


def twins(over: list[str]) -> list[Aggregation]:
    """Several of the same events: what has equal windows shares its columns, and may part again."""
    windows = tuple(over)
    return [
        kinds.Count(name="other_count", event="Click", over=windows),
        kinds.Delta(name="other_delta", event="Click", over=("5m",), before="1h"),
        kinds.Count(name="third_count", event="Click", over=windows),
        kinds.Mean(name="other_mean", event="Click", field="price", over=windows),
        kinds.Std(name="other_std", event="Click", field="price", over=windows),
        kinds.LastK(name="last_k", event="Click", field="item_id", k=5),
        kinds.FirstK(name="first_k", event="Click", field="item_id", k=5),
        kinds.First(name="other_first", event="Click", field="item_id", kind="str", over=windows),
        kinds.SinceFirst(name="known", event="Click", over=("all",)),
        kinds.SecondsSince(name="idle", event="Click"),
        kinds.Decayed(name="decayed_30m", event="Click", half_life="20m"),
        kinds.Count(name="other_by", event="Click", over=windows, by="category", buckets=32),
        kinds.Count(name="other_by_ever", event="Click", over=("all",), by="category", buckets=64),
    ]


EVERY = (plain, conditional, by_bucket, ratio_by_bucket, twins)


@st.composite
def declarations(draw: st.DrawFn, before: Plan | None) -> Plan:
    """Some aggregations over some windows; of those there were before, most go on, some with other windows."""
    kept: list[Aggregation] = []
    for spec in before.views[0].aggregations if before else ():
        fate = draw(st.sampled_from(["keep", "keep", "keep", "widen", "drop"]))
        over = tuple(draw(window_sets)) if fate == "widen" and spec.over else spec.over
        if isinstance(spec, kinds.Delta):
            over = spec.over  # It has one, and no end of time.
        if fate != "drop":
            kept.append(msgspec.structs.replace(spec, over=over, origin=""))
    names = {spec.name for spec in kept}
    for _ in range(draw(st.integers(0 if kept else 1, 4))):
        offered = draw(st.sampled_from(EVERY))(draw(window_sets))
        spec = draw(st.sampled_from(offered))
        if spec.name not in names:
            names.add(spec.name)
            kept.insert(draw(st.integers(0, len(kept))), spec)
    return plan_of(*kept)


class World:
    """The bytes of some rows, written by streams of plans that follow on each other."""

    def __init__(self) -> None:
        self.plans: list[Plan] = []
        self.taken_ms: dict[int, int] = {}
        self.blobs: dict[tuple[str, int], bytes] = {}

    def apply(self, declared: Plan, now_ms: int) -> Plan:
        """The plan that follows."""
        plan = succeed(self.plans[-1] if self.plans else None, declared, self.taken_ms, now_ms)
        if not self.plans or plan.number > self.plans[-1].number:
            self.plans.append(plan)
        return plan

    def rows(self, plan: Plan, family: Family, of: list[int]) -> Any:
        """Rows as a plan reads them."""
        layouts = Layouts(plan, lambda first, last: self.plans[first : last + 1])
        return decode(family, layouts.own(family.alone, [self.blobs.get((family.name, row)) for row in of]))

    def merge(self, plan: Plan, events: Sequence[OracleEvent], now_ms: int) -> None:
        """Only the rows that events concern are read and written."""
        for family in {family.name: family for family, _ in slots_of(plan).values()}.values():
            mine = [event for event in events if event["contract"] in family.events]
            touched = sorted({event["row"] for event in mine})
            moved = [dict(event) | {"row": touched.index(event["row"])} for event in mine]
            merged = merge(family, self.rows(plan, family, touched), batches_of(moved), now_ms)
            for row, blob in zip(touched, encode(family, merged.rows), strict=True):
                self.blobs[family.name, row] = blob

    def fill(self, plan: Plan, events: Sequence[OracleEvent], now_ms: int) -> None:
        """Adds events to what is filled alone, as rows that were made apart."""
        alone = filling_alone(plan)
        for view in alone.views:
            for family in families_of(alone, view):
                mine = [event for event in events if event["contract"] in family.events]
                touched = sorted({event["row"] for event in mine})
                moved = [dict(event) | {"row": touched.index(event["row"])} for event in mine]
                rows = merge(family, Rows.empty(family, len(touched)), batches_of(moved), now_ms).rows
                own = family_of(plan, family.name)
                assert own is not None
                history = move(rows, family, own, columns_from(alone, plan, family.name))
                added = add(own, self.rows(plan, own, touched), history, 0)
                for row, blob in zip(touched, encode(own, added.rows), strict=True):
                    self.blobs[family.name, row] = blob

    def check(self, plan: Plan, seen: Sequence[OracleEvent], query_ms: int, exact: set[str]) -> None:
        """Features are what brute force gives."""
        for full_name, (family, slots) in slots_of(plan).items():
            feature = plan.features[full_name]
            if full_name not in exact:
                continue
            assert isinstance(feature.spec, Aggregation)
            assert feature.window is not None
            values = evaluate(family, self.rows(plan, family, list(range(N_ROWS))), [(feature, slots)], query_ms)[
                full_name
            ]
            for row, got in enumerate(to_python(values, feature.value_type)):
                of_row = [event for event in seen if event["row"] == row]
                want = brute(feature.spec, of_row, query_ms, feature.window.name)
                if isinstance(feature.spec, kinds.Decayed | kinds.Rate) and feature.spec.by:
                    # What has faded may be gone.
                    faint, nothing = 2.0**-50 * scale_of(of_row), feature.spec.without_events
                    want = {name: value for name, value in want.items() if name in got or abs(value - nothing) > faint}
                assert agree(got, want, scale_of(of_row)), (plan.number, full_name, row, got, want)


@given(data=st.data())
def test_whatever_is_applied_each_feature_is_what_brute_force_gives_once_it_is_complete(data: st.DataObject) -> None:
    """Windows and aggregations come and go; rows that nobody touched are of plans long ago.

    A server of the plan before reads the same rows: what is in both plans is exact there too. A window that was filled
    from tiles too coarse for it, a gap taken for none, a column that two share, would fail.
    """
    world, now_ms = World(), BASE_MS
    seen: list[OracleEvent] = []
    for step in range(data.draw(st.integers(2, 5))):
        declared = data.draw(declarations(world.plans[-1] if world.plans else None))
        plan = world.apply(declared, now_ms)
        note(f"plan {plan.number}: {plan.views[0].aggregations}, known {plan.known}")
        if step and data.draw(st.booleans()):  # A plan that no stream takes up.
            continue
        world.taken_ms.setdefault(plan.number, now_ms)
        for _ in range(data.draw(st.integers(1, 3))):
            reach = data.draw(st.sampled_from([MINUTE_MS, HOUR_MS, 3 * DAY_MS]))
            batch = data.draw(st.lists(events_at(instants(now_ms - reach, now_ms), N_ROWS), max_size=8))
            now_ms += data.draw(spans_ms(40 * DAY_MS)) + 1
            world.merge(plan, batch, now_ms)
            seen += batch
            complete = complete_from_ms(plan, world.taken_ms)
            late = {name for name, at in complete.items() if at is None or at > now_ms}
            exact = set(plan.features) - late
            world.check(plan, seen, now_ms, exact)
            for older in world.plans[:-1]:
                world.check(older, seen, now_ms, exact & _unchanged(older, plan, world.plans))


@given(data=st.data())
def test_history_is_added_while_events_go_on_and_then_nothing_is_missing(data: st.DataObject) -> None:
    """Whatever lacked events has them all, whatever else goes on; and before that nothing is other than it was.

    The plan is one with gaps: some aggregations are new, some have longer windows. History, the events before the plan
    was taken up, comes by rows in several parts, while later events, some of them late, are merged. A tile that is
    added to the wrong column, an event on both sides of the seam, a row of the plan before taken for a filled one,
    would fail.
    """
    world, now_ms = World(), BASE_MS
    seen: list[OracleEvent] = []

    def flow(plan: Plan, reach_ms: int) -> None:
        nonlocal now_ms
        batch = data.draw(st.lists(events_at(instants(now_ms - reach_ms, now_ms), N_ROWS), max_size=8))
        now_ms += data.draw(spans_ms(20 * DAY_MS)) + 1
        world.merge(plan, batch, now_ms)
        seen.extend(batch)

    for _ in range(data.draw(st.integers(1, 3))):
        before = world.apply(data.draw(declarations(world.plans[-1] if world.plans else None)), now_ms)
        world.taken_ms.setdefault(before.number, now_ms)
        flow(before, 40 * DAY_MS)
    late = {name: at for name, at in complete_from_ms(before, world.taken_ms).items() if at is None or at > now_ms}
    chosen = data.draw(st.lists(st.sampled_from(sorted(before.features)), max_size=2)) + sorted(late)
    plan = backfilling(before, chosen, History(4))
    assert succeed(plan, as_declared(before)) is plan
    world.plans.append(plan)
    world.taken_ms[plan.number] = now_ms
    note(f"{before.views[0].aggregations} is filled: {plan.views[0].filling}")
    # A few rows to a part, and some events of a row apart from its others: parts of rows add up.
    history = [(event, data.draw(st.integers(0, 3))) for event in seen]
    for number in range(4):
        world.fill(plan, [event for event, part in history if part == number], now_ms)
        flow(plan, 40 * DAY_MS)
        world.check(plan, seen, now_ms, set(plan.features) - late.keys())
    whole = backfilled(plan, {})
    world.plans.append(whole)
    world.taken_ms[whole.number] = now_ms
    assert as_declared(whole) == as_declared(before)
    for _ in range(2):
        world.check(whole, seen, now_ms, {name for name in whole.features if name not in late or name in chosen})
        world.check(plan, seen, now_ms, set(plan.features) - late.keys())
        flow(whole, 40 * DAY_MS)
    if chosen:
        assert not set(chosen) & complete_from_ms(whole, world.taken_ms).keys()
        begins_ms = complete_from_ms(backfilled(plan, {"Click": DAY_MS}), world.taken_ms)
        for name in set(chosen) & begins_ms.keys():
            at_ms = begins_ms[name]
            assert at_ms is None or at_ms > world.taken_ms[plan.number] - DAY_MS


def test_distinct_values_stay_while_history_is_added_beside_them() -> None:
    """While it is filled there are two of one table: an entry is forgotten once both have not seen it for the window.

    By the time of the first of them alone, all that only the second knows would be gone with the next merge.
    """
    world, event = World(), {"contract": "Click", "row": 0, "t": BASE_MS, "price": None, "category": None}
    world.apply(plan_of(kinds.Count(name="n", event="Click", over=("1h",))), BASE_MS)
    more = kinds.Distinct(name="items", event="Click", field="item_id", over=("1h",))
    plan = world.apply(plan_of(*world.plans[0].views[0].aggregations, more), BASE_MS)
    filled = backfilling(plan, ["view__items_1h"], History(1))
    world.plans += [filled, backfilled(filled, {})]
    events = [{**event, "t": BASE_MS + at, "item_id": name} for at, name in enumerate("ab")]
    world.fill(filled, events[:1], BASE_MS + 2)
    world.merge(filled, events[1:], BASE_MS + 2)
    world.check(world.plans[-1], events, BASE_MS + 3, {"view__items_1h"})


def _unchanged(older: Plan, newer: Plan, plans: list[Plan]) -> set[str]:
    """The features that all plans from one to another have, declared in the same words."""
    between = plans[older.number : newer.number + 1]
    names = set.intersection(*({_state(plan, name) for name in plan.features} for plan in between))
    return {name for name, *_ in names}


def _state(plan: Plan, name: str) -> tuple[Any, ...]:
    spec = plan.features[name].spec
    assert isinstance(spec, Aggregation)
    return name, msgspec.structs.replace(spec, origin="")


@given(data=st.data())
def test_what_is_declared_again_is_the_plan_that_runs(data: st.DataObject) -> None:
    """Applying a second time makes no plan; going back makes one, that declares what the first did."""
    first = succeed(None, data.draw(declarations(None)))
    other = succeed(first, data.draw(declarations(first)))
    assert succeed(first, as_declared(first)) is first
    again = succeed(other, as_declared(first))
    assert as_declared(again) == as_declared(first)
    assert again.number == (0 if other is first else 2)


def test_a_shorter_window_waits_for_itself_and_a_longer_one_for_what_is_new_of_it() -> None:
    """Tiles of 24 h are an hour wide, too coarse for 1 h; of 48 h, 24 h are there at once."""
    one = succeed(None, plan_of(kinds.Count(name="n", event="Click", over=("24h",))))
    two = succeed(one, plan_of(kinds.Count(name="n", event="Click", over=("1h", "12h", "24h", "48h"))))
    at = complete_from_ms(two, {0: 0, 1: BASE_MS})
    assert at == {
        "view__n_1h": BASE_MS + HOUR_MS + 5 * MINUTE_MS,
        "view__n_48h": BASE_MS + 25 * HOUR_MS,
    }


def test_without_a_window_nothing_waits_long_enough() -> None:
    """A list that gets longer, and a count of all events, lack for ever what was before; a decayed sum forgets it."""
    one = succeed(None, plan_of(kinds.LastK(name="recent", event="Click", field="item_id", k=3)))
    two = succeed(
        one,
        plan_of(
            kinds.LastK(name="recent", event="Click", field="item_id", k=5),
            kinds.Count(name="ever", event="Click", over=("all",)),
            kinds.Decayed(name="heat", event="Click", half_life="1h"),
        ),
    )
    at = complete_from_ms(two, {1: BASE_MS})
    assert at == {"view__recent": None, "view__ever_all": None, "view__heat": BASE_MS + 64 * HOUR_MS}


def test_a_view_of_another_entity_goes_on_from_nothing() -> None:
    """Also when it is given back to the first: rows of the first plan lack what happened since."""
    one = succeed(None, plan_of(kinds.Count(name="n", event="Click", over=("all",))))
    view = msgspec.structs.replace(as_declared(one).views[0], entities=("item",))
    entities = (*one.entities, EntitySpec("item", "item_id"))
    two = succeed(one, msgspec.structs.replace(as_declared(one), entities=entities, views=(view,)))
    three = succeed(two, as_declared(one))
    assert complete_from_ms(two, {1: 0}) == complete_from_ms(three, {1: 0, 2: 0}) == {"view__n_all": None}
    plans = [one, two, three]
    layouts = Layouts(three, lambda first, last: plans[first : last + 1])
    (family,) = {family for family, _ in slots_of(three).values()}
    (old,) = {family for family, _ in slots_of(one).values()}
    (blob,) = encode(old, merge(old, Rows.empty(old, 1), batches_of([{"t": BASE_MS}]), BASE_MS).rows)
    assert layouts.own(family.alone, [blob]) == [b""]


def test_a_row_of_a_plan_long_ago_is_read() -> None:
    """Older plans are read a block at a time, each once: also where one can't be read, and for a tag that none has."""
    plans: list[Plan] = []
    for at in range(100):
        plans.append(succeed(plans[-1] if plans else None, plan_of(*twins(["1h"])[: 2 + at % 2])))
    count = kinds.Count(name="other_count", event="Click", over=("1h", "2h"))
    plans.append(succeed(plans[-1], plan_of(count)))
    asked: list[tuple[int, int]] = []

    def fetch(first: int, last: int) -> list[Plan | None]:
        asked.append((first, last))
        return [None if plan.number == 3 else plan for plan in plans[first : last + 1]]

    layouts = Layouts(plans[-1], fetch)
    (family,) = {family for family, _ in slots_of(plans[-1]).values()}
    (old,) = {family for family, _ in slots_of(plans[0]).values()}
    (blob,) = encode(old, merge(old, Rows.empty(old, 1), batches_of([{"t": BASE_MS}]), BASE_MS).rows)
    (own,) = layouts.own(family.alone, [blob])
    assert own is not None
    assert own.startswith(family.tag)
    foreign = b"\0\1\2\3" + blob[4:]
    for _ in range(2):
        assert layouts.own(family.alone, [foreign]) == [foreign]
    older = [pair for pair in asked if pair[0] <= 100]
    assert older == [(68, 99), (36, 67), (4, 35), (0, 3)]
