"""What `plan` says of each change: of which kind it is, what follows from it, and what has to be done first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import msgspec
import pytest

from features import aggregations as kinds
from features.changes import Change, changes, in_the_way, when
from features.compile import compile_plan
from features.events import Event
from features.evolve import succeed
from features.expressions import col
from features.plan import EntitySpec, Plan
from headrace import Entity, agg, view
from tests.support.served import catalogue

replace = msgspec.structs.replace
NOW_MS = 1_763_719_200_000
HOUR_MS = 3_600_000

Turn = Callable[[Plan], Plan]


def found(turn: Turn, before: Plan | None = None) -> list[Change]:
    """What is said of what comes after the catalogue."""
    before = before or catalogue()
    return changes(before, succeed(before, turn(before), now_ms=NOW_MS), NOW_MS)


def stopped(said: list[Change], replace: tuple[str, ...], plan: Plan | None = None) -> list[Change]:
    """What is not applied."""
    return in_the_way(plan or catalogue(), said, replace)


def of_view(plan: Plan, name: str, **changed: Any) -> Plan:
    return replace(plan, views=tuple(replace(view, **changed) if view.name == name else view for view in plan.views))


def of_service(plan: Plan, name: str, **changed: Any) -> Plan:
    return replace(
        plan, services=tuple(replace(each, **changed) if each.name == name else each for each in plan.services)
    )


def of_feature(plan: Plan, view: str, feature: str, **changed: Any) -> Plan:
    features = tuple(replace(spec, **changed) if spec.name == feature else spec for spec in plan.view(view).features)
    return of_view(plan, view, features=features)


def with_feature(plan: Plan, view: str, spec: Any) -> Plan:
    return of_view(plan, view, features=(*plan.view(view).features, spec))


def without_feature(plan: Plan, view: str, feature: str) -> Plan:
    return of_view(plan, view, features=tuple(spec for spec in plan.view(view).features if spec.name != feature))


def read_by_nobody(plan: Plan) -> Plan:
    return replace(plan, services=())


KINDS: list[tuple[Turn, str, list[str]]] = [
    (lambda plan: of_view(plan, "user_activity", owner="feed"), "describes view user_activity", ["owner"]),
    (
        lambda plan: of_view(plan, "user_activity", tags={"a": "b"}, doc="New"),
        "describes view user_activity",
        ["another doc, another tags"],
    ),
    (lambda plan: of_service(plan, "seller_v1", owner="x"), "describes service seller_v1", ["owner"]),
    (
        lambda plan: of_feature(plan, "user_activity", "price_mean", doc="x"),
        "describes feature user_activity.price_mean",
        [],
    ),
    (
        lambda plan: of_view(plan, "user_taste", features=plan.view("user_taste").features[::-1]),
        "describes view user_taste",
        ["another order"],
    ),
    (
        lambda plan: of_feature(plan, "user_activity", "search_clicks", over=("24h", "7d")),
        "adds feature user_activity.search_clicks_7d",
        [f"complete from {when(NOW_MS + (6 * 24 + 6) * HOUR_MS)} if streams take it up now"],
    ),
    (
        lambda plan: of_feature(plan, "user_activity", "search_clicks", over=("12h", "24h")),
        "adds feature user_activity.search_clicks_12h",
        ["complete at once"],
    ),
    (
        lambda plan: with_feature(plan, "user_activity", kinds.Count(name="ever", event="Click", over=("all",))),
        "adds feature user_activity.ever_all",
        ["with what comes from then on only"],
    ),
    (
        lambda plan: of_feature(plan, "user_history", "liked", k=200),
        "adds feature user_history.liked",
        ["k 20 -> 200", "from then on only"],
    ),
    (
        lambda plan: replace(plan, entities=(*plan.entities, EntitySpec("shop", "shop_id", "90d"))),
        "adds entity shop",
        ["by shop_id"],
    ),
    (lambda plan: replace(plan, services=plan.services[1:]), "removes service feed_v1", ["404"]),
    (
        lambda plan: of_service(plan, "ranking_v1", features=plan.service("ranking_v1").features[:-1]),
        "removes service ranking_v1",
        [catalogue().service("ranking_v1").features[-1]],
    ),
    (
        lambda plan: of_service(
            plan, "seller_v1", features=(*plan.service("seller_v1").features, "user_activity__pace")
        ),
        "adds service seller_v1",
        ["user_activity__pace"],
    ),
]


def test_the_first_plan_adds_everything_and_all_of_it_is_complete() -> None:
    said = changes(None, catalogue(), NOW_MS)
    assert {each.kind for each in said} == {"adds"}
    assert not stopped(said, ())
    views = {each.name: each.consequence for each in said if each.what == "view"}
    for spec in catalogue().views:
        assert ("which others write" if spec.given else "complete at once") in views[spec.name]


def test_nothing_is_said_of_what_is_applied() -> None:
    assert found(lambda plan: plan) == []


@pytest.mark.parametrize(("turn", "head", "words"), KINDS)
def test_what_needs_no_consent_is_one_change_that_names_what_it_is_of(turn: Turn, head: str, words: list[str]) -> None:
    (said,) = found(turn)
    assert str(said).partition(":")[0] == head
    assert all(word in said.consequence for word in words), said
    assert not stopped([said], ())


ASKS: list[tuple[Turn, str, list[str]]] = [
    (
        lambda plan: of_feature(plan, "user_activity", "price_mean", default=30.0),
        "changes meaning feature user_activity.price_mean",
        ["default 25.0 -> 30.0", "complete at once", "service ranking_v1"],
    ),
    (
        lambda plan: of_feature(plan, "user_activity", "search_clicks", where=col("surface") == "feed"),
        "changes meaning feature user_activity.search_clicks",
        ["search", "feed", "starts empty", "complete from"],
    ),
    (
        lambda plan: of_feature(plan, "item_activity", "popularity_30m", half_life="1h"),
        "changes meaning feature item_activity.popularity_30m",
        ["half_life 30m -> 1h", "starts empty"],
    ),
    (
        lambda plan: of_feature(plan, "user_history", "liked", k=5),
        "changes meaning feature user_history.liked",
        ["k 20 -> 5", "complete at once"],
    ),
    (
        lambda plan: of_feature(plan, "user_activity", "pace", fingerprint="0" * 12),
        "changes meaning feature user_activity.pace",
        ["other code"],
    ),
    (
        lambda plan: replace(
            plan, entities=tuple(replace(each, forget_after="1d") for each in plan.entities[:1]) + plan.entities[1:]
        ),
        "changes meaning entity item",
        ["forget_after"],
    ),
    (
        lambda plan: of_service(plan, "ranking_v1", features=plan.service("ranking_v1").features[::-1]),
        "changes meaning service ranking_v1",
        ["another order"],
    ),
]


@pytest.mark.parametrize(("turn", "head", "words"), ASKS)
def test_what_changes_meaning_is_refused_until_it_is_named(turn: Turn, head: str, words: list[str]) -> None:
    """By its own name or its view's, and by no other's."""
    said = found(turn)
    (change,) = said
    assert str(change).partition(":")[0] == head
    assert all(word in change.consequence for word in words), change
    assert stopped(said, ()) == stopped(said, ("Click", "user_taste.category_clicks")) == said
    assert f"--replace {change.name}" in str(change)
    assert stopped(said, (change.name,)) == stopped(said, (change.name.partition(".")[0],)) == []


def test_a_view_of_another_entity_or_key_starts_anew() -> None:
    (said,) = found(
        lambda plan: of_view(read_by_nobody(plan), "seller_activity", entities=("user",)), read_by_nobody(catalogue())
    )
    assert (said.kind, said.what, said.consent) == ("changes meaning", "view", True)
    assert "start empty" in said.consequence

    def other_key(plan: Plan) -> Plan:
        return replace(
            plan,
            entities=tuple(replace(each, key="user_id") if each.name == "seller" else each for each in plan.entities),
        )

    before = catalogue()
    after = succeed(before, other_key(before), now_ms=NOW_MS)
    own = {name for name in after.features if name.startswith("seller_activity__")}
    assert own <= set(after.known)
    (said,) = changes(before, after, NOW_MS)
    assert (said.kind, said.name) == ("changes meaning", "seller")
    assert "key seller_id -> user_id" in said.consequence


def test_what_an_applied_service_names_is_not_removed() -> None:
    """Not even by who takes it out of the service at once: servers of both plans run side by side for a while."""
    plan = catalogue()
    name = "user_activity__likes_1h"
    view = "user_activity"
    spec = plan.features[name].spec.name

    def out_of_both(plan: Plan) -> Plan:
        services = tuple(
            replace(each, features=tuple(other for other in each.features if plan.features[other].spec.name != spec))
            for each in plan.services
        )
        return without_feature(replace(plan, services=services), view, spec)

    said = found(out_of_both)
    refused = stopped(said, (view, f"{view}.{spec}"))
    assert {each.kind for each in refused} == {"removes"}
    assert "services name it: feed_v1, ranking_v1" in str(refused[0])
    once = out_of_both(plan)
    assert not stopped(found(lambda _: once, replace(plan, services=once.services)), ())
    rest = tuple(each for each in plan.views if each.name != "seller_activity")
    services = tuple(each for each in plan.services if each.name != "seller_v1")
    whole = found(lambda plan: replace(plan, views=rest, services=services))
    assert [(each.what, each.name) for each in stopped(whole, ())] == [("view", "seller_activity")]


def test_who_computes_with_what_changes_is_told() -> None:
    """A derived feature, and a service that has only that."""
    plan = catalogue()
    pace = plan.features["user_activity__pace"].spec
    argument = pace.args[0]  # type: ignore[union-attr]
    spec = plan.features[str(argument)].spec
    only = of_service(plan, "seller_v1", features=("user_activity__pace",))
    only = replace(only, services=tuple(each for each in only.services if each.name == "seller_v1"))
    (said,) = found(lambda plan: of_feature(plan, "user_activity", spec.name, default=7.0), only)
    assert said.consequence.endswith("read by service seller_v1")


@pytest.mark.parametrize("name", ["user_activty", "user_activity.clicks_10m", "user_activity.gone", ""])
def test_what_is_to_be_replaced_is_there(name: str) -> None:
    """A slip of the pen would else be taken for consent that is not needed."""
    with pytest.raises(ValueError, match=f"--replace {name}"):
        stopped([], (name,))


# Contracts

USER = Entity("user", key="user_id")


class Seen(Event, topic="seen"):
    user_id: str
    place: str | None = None
    price: float


def plan_with(event: type[Event]) -> Plan:
    """A plan whose only contract is `event`, under the name of Seen."""
    event.__name__ = event.__qualname__ = "Seen"

    @view(USER)
    class UserSights:
        sights = agg.count(event, over="1h")

    return compile_plan([{"view": UserSights}], "test", 8)


class Fuller(Event, topic="seen"):
    user_id: str
    place: str | None = None
    price: float
    shade: str | None = None


class Looser(Event, topic="seen"):
    user_id: str
    place: str | None = None
    price: float | None = None


class Shorter(Event, topic="seen"):
    user_id: str
    price: float


class Stricter(Event, topic="seen"):
    user_id: str
    place: str
    price: float


class Needier(Event, topic="seen"):
    user_id: str
    place: str | None = None
    price: float
    shade: str


class Other(Event, topic="seen"):
    user_id: str
    place: Literal["home", "search"] | None = None
    price: float


class Whole(Event, topic="seen"):
    user_id: str
    place: str | None = None
    price: int


class Elsewhere(Event, topic="sights"):
    user_id: str
    place: str | None = None
    price: float


@pytest.mark.parametrize(
    ("event", "kind", "words"),
    [
        (Fuller, "adds", ["field shade"]),
        (Looser, "adds", ["field price may be left out"]),
        (Shorter, "breaks producers", ["field place is gone", "unread"]),
        (Stricter, "breaks producers", ["field place is required", "dead letters"]),
        (Needier, "breaks producers", ["field shade is new and required", "dead letters"]),
        (Other, "breaks producers", ["field place takes", "search", "dead letters"]),
        (Whole, "breaks producers", ["field price takes type integer", "no longer type number"]),
        (Elsewhere, "breaks producers", ["topic sights", "unread in seen is lost"]),
    ],
)
def test_a_contract_that_producers_may_not_meet_takes_consent(event: type[Event], kind: str, words: list[str]) -> None:
    """It says what becomes of records that are in the topic."""
    said = [each for each in found(lambda _: plan_with(event), plan_with(Seen)) if each.kind != "describes"]
    (change,) = said
    assert (change.kind, change.what, change.name) == (kind, "contract", "Seen")
    assert all(word in change.consequence for word in words), change
    assert bool(stopped(said, ())) == (kind == "breaks producers")
    assert not stopped(said, ("Seen",), plan_with(Seen))
