"""The language: what a declaration becomes, and what a mistake says."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from features import catalog, language
from features import plan as plans
from features.aggregations import Aggregation
from features.compile import compile_plan
from features.plan import CodeChangedError, Plan
from headrace import DeclarationError, Entity, Event, agg, col, cross, derived, service, view
from headrace.types import Array, BoolArray
from tests.properties.scenarios import LISTS
from tests.support.states import plan_of

ROOT = Path(__file__).parent.parent

# As design.md has it, to the letter.
EXAMPLE = '''\
from pydantic import Field
from headrace import Entity, Event, agg, col, cross, derived, service, view
from headrace.types import Array     # NDArray[float64], one value a row

user = Entity("user", key="user_id", forget_after="90d")
item = Entity("item", key="item_id", forget_after="90d")

class Click(Event, topic="clicks"):
    """A user opened an item."""
    user_id: str
    item_id: str
    category: str | None = None
    price: float | None = Field(None, ge=0)
    surface: str | None = None

@view(user, owner="ranking", tags={"tier": "1"})
class UserActivity:
    """What a user has been doing lately."""
    clicks = agg.count(Click, over=["10m", "1h", "24h"], doc="Items opened")
    search_clicks = agg.count(Click, where=col("surface") == "search", over="24h")
    taste = agg.decayed(Click, by="category", half_life="7d", buckets=32)
    price = agg.mean(Click, "price", over="24h", default=25.0)
    recent_items = agg.last_k(Click, "item_id", k=20)

    @derived(clicks["10m"], clicks["1h"], doc="Pace against the hour")
    def pace(ten: Array, hour: Array) -> Array:
        return 6 * ten / (hour + 1)

@view(item, owner="ranking")
class ItemActivity:
    """What happens to an item."""
    clicks = agg.count(Click, over=["1h", "24h"])
    price = agg.last(Click, "price")

@cross(user, item, owner="ranking")
class UserItem:
    """What this user and this item have to do with each other."""
    @derived(UserActivity.price["24h"], ItemActivity.price)
    def price_ratio(mean: Array, price: Array) -> Array:
        return price / mean

ranking_v1 = service("ranking_v1", UserActivity, ItemActivity, UserItem)
'''


@pytest.fixture(autouse=True)
def _own_views() -> Iterator[None]:
    """Views declared by a test are forgotten after it."""
    before = dict(language.VIEWS)
    yield
    language.VIEWS.clear()
    language.VIEWS.update(before)


@pytest.fixture
def module_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Imports a text as a module."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(text: str, name: str = "definitions_of_a_test") -> ModuleType:
        # A folder of its own, so that no cached bytecode or source of an earlier text is taken for it.
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        module = importlib.import_module(name)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return load


# What a declaration becomes.


def test_the_example_compiles_to_the_features_that_the_design_names(module_of: Any) -> None:
    plan = compile_plan([vars(module_of(EXAMPLE))], "example", 8)
    found = {feature.full_name: (feature.value_type, feature.entities) for feature in plan.features.values()}
    user, item, pair = ("user",), ("item",), ("user", "item")
    assert found == {
        "user_activity__clicks_10m": ("int", user),
        "user_activity__clicks_1h": ("int", user),
        "user_activity__clicks_24h": ("int", user),
        "user_activity__search_clicks_24h": ("int", user),
        "user_activity__taste": ("map[str, float]", user),
        "user_activity__price_24h": ("float", user),
        "user_activity__recent_items": ("list[str]", user),
        "user_activity__pace": ("float", user),
        "item_activity__clicks_1h": ("int", item),
        "item_activity__clicks_24h": ("int", item),
        "item_activity__price": ("float", item),
        "user_item__price_ratio": ("float", pair),
    }
    assert set(plan.service("ranking_v1").features) == set(found)
    assert plan.features["user_activity__price_24h"].default == 25.0
    assert plan.features["user_activity__pace"].doc == "Pace against the hour"
    view_spec = plan.view("user_activity")
    assert (view_spec.owner, view_spec.tags) == ("ranking", {"tier": "1"})
    assert view_spec.doc == "What a user has been doing lately."
    (click,) = plan.events
    assert (click.name, click.topic, click.fields["price"]) == ("Click", "clicks", "float")


def mypy(path: Path) -> str:
    """What mypy --strict says of a user's file, with no plugin and no setting of ours."""
    options = ["--strict", "--config-file=", "--follow-imports=silent", "--no-error-summary"]
    cache = f"--cache-dir={ROOT / '.mypy_cache' / 'example'}"
    command = [sys.executable, "-m", "mypy", *options, cache, str(path)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=path.parent)
    return done.stdout + done.stderr


def test_the_example_passes_mypy_strict(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(EXAMPLE)
    assert mypy(tmp_path / "example.py") == ""


def test_mypy_sees_a_mistyped_declaration(tmp_path: Path) -> None:
    """That the example passes means something: what is wrong in it is reported."""
    wrong = EXAMPLE.replace('over="24h", default', "over=24, default").replace("price / mean", "str(price)")
    (tmp_path / "wrong.py").write_text(wrong)
    report = mypy(tmp_path / "wrong.py")
    assert "[arg-type]" in report
    assert "[return-value]" in report


def test_text_can_be_compared_by_order_too(tmp_path: Path) -> None:
    """`col("category") > "a"` is a condition that works; the type checker must not refuse it."""
    text = 'from headrace import col\n\ncondition = (col("category") > "a") & (col("category") <= "b")\n'
    (tmp_path / "condition.py").write_text(text)
    assert mypy(tmp_path / "condition.py") == ""


@pytest.mark.parametrize(
    ("class_name", "view_name"),
    [
        ("UserActivity", "user_activity"),
        ("User", "user"),
        ("User2Item", "user2_item"),
        ("UserV2", "user_v2"),
        ("HTTPStats", "httpstats"),
    ],
)
def test_a_view_is_named_after_its_class(class_name: str, view_name: str) -> None:
    declare({"clicks": agg.count(Click, over="1h")}, name=class_name)
    assert next(iter(reversed(language.VIEWS.values()))).name == view_name


def test_windows_are_served_shortest_first_under_the_names_declared() -> None:
    """`24h` stays `24h` and is not made `1d`; a name without window has none."""
    declared = declare({"n": agg.count(Click, over=["24h", "all", "90m", "10m"]), "since": agg.seconds_since(Click)})
    names = [feature.name for feature in compile_plan([{"v": declared}], "p", 1).features.values()]
    assert names == ["n_10m", "n_90m", "n_24h", "n_all", "since"]


def test_a_service_keeps_the_order_it_is_given_and_names_each_feature_once() -> None:
    declared: Any = declare(
        {"a": agg.count(Click, over=["1h", "24h"]), "b": agg.last(Click, "price"), "c": agg.count(Click, over="7d")}
    )
    spec = service("s", declared.b, declared.a["24h"], declared, without=[declared.c]).spec
    assert spec.features == ("shown__b", "shown__a_24h", "shown__a_1h")


def test_a_service_brings_the_views_that_its_features_are_computed_from() -> None:
    """Also through another derived feature: what computes it is in the plan."""
    base: Any = declare({"n": agg.count(Click, over="1h")}, name="Base")
    middle: Any = declare({"twice": derived(base.n["1h"])(double)}, name="Middle")
    top = declare({"four": derived(middle.twice)(double)}, name="Top")
    plan = compile_plan([{"only": service("s", top)}], "p", 1)
    assert {spec.name for spec in plan.views} == {"base", "middle", "top"}


# The plan.


def shipped() -> Plan:
    return compile_plan([vars(catalog)], "headrace", 64)


def every_plan() -> dict[str, Plan]:
    lists = {name: plan_of(*listed(["10m", "24h", "all"])) for name, listed in LISTS.items()}
    return {"catalogue": shipped(), **lists}


@pytest.mark.parametrize("name", ["catalogue", *LISTS])
def test_a_plan_read_back_is_the_same_plan(name: str) -> None:
    """To the last byte and with the same fingerprint: what is applied is what workers and servers run and report.

    A number declared as 40 and read back as 40.0 would name another plan.
    """
    plan = every_plan()[name]
    back = Plan.decode(plan.encode())
    assert back == plan
    assert back.encode() == plan.encode()
    assert back.fingerprint == plan.fingerprint


@pytest.mark.parametrize(
    "options",
    [{"default": 25}, {"where": col("price") > 5}, {"where": col("price") > 5.0}, {"where": col("sold") == True}],  # noqa: E712  # as users write it
    ids=["default", "int", "float", "bool"],
)
def test_whole_numbers_in_options_survive_the_plan(options: dict[str, Any]) -> None:
    plan = compile_plan([{"v": declare({"m": agg.mean(Click, "price", over="1h", **options)})}], "p", 1)
    assert Plan.decode(plan.encode()).fingerprint == plan.fingerprint


def test_the_fingerprint_does_not_depend_on_the_hash_seed() -> None:
    """Sets and dictionaries may be walked in another order in every process."""
    program = (
        "from features import catalog, compile;print(compile.compile_plan([vars(catalog)], 'headrace', 64).fingerprint)"
    )
    seen = set()
    for seed in ("0", "1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        seen.add(subprocess.check_output(command, text=True, env=environment, cwd=ROOT).strip())
    assert seen == {shipped().fingerprint}
    assert re.fullmatch("[0-9a-f]{12}", shipped().fingerprint)


def test_the_fingerprint_does_not_depend_on_where_things_are_found() -> None:
    """The same definitions in another order, or met twice, are the same plan."""
    backwards = dict(reversed(vars(catalog).items()))
    assert compile_plan([backwards, vars(catalog)], "headrace", 64).encode() == shipped().encode()


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"project": 3}', b"\xff\xfe", '"plan"'])
def test_what_is_no_plan_says_what_to_do(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"can't be read by this version .* run `headrace apply`"):
        Plan.decode(text)


def test_a_plan_of_a_later_version_is_refused() -> None:
    """Its fields may mean something else, even if they can be read."""
    later = json.loads(shipped().encode()) | {"version": plans.VERSION + 1}
    with pytest.raises(ValueError, match="headrace apply"):
        Plan.decode(json.dumps(later))


def test_names_that_are_not_in_the_plan_are_answered_with_those_that_are() -> None:
    with pytest.raises(KeyError, match=r"no service 'x' in the plan; there is: feed_v1, ranking_v1, seller_v1"):
        shipped().service("x")


# Code that a plan names.

CODE = '''
from headrace import Entity, Event, agg, derived, view
from headrace.types import Array

class Click(Event, topic="clicks"):
    """A click."""
    user_id: str
    price: float | None = None

@view(Entity("user", key="user_id"))
class Pace:
    clicks = agg.count(Click, over=["10m", "1h"])

    @derived(clicks["10m"], clicks["1h"], doc="Pace")
    def pace(ten: Array, hour: Array) -> Array:
        return 6 * ten / (hour + 1)
'''


def pace_of(module: ModuleType) -> Any:
    (found,) = (spec for spec in compile_plan([vars(module)], "p", 1).views[0].features if spec.name == "pace")
    return found


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return 6 * ten / (hour + 1)", "return 6*ten/(hour+1)  # an hour's worth"),
        ("        return 6", "        # Six times ten minutes.\n\n        return 6"),
        ("return 6 * ten / (hour + 1)", "return (\n            (6 * ten)\n            / (hour + 1)\n        )"),
        ("    @derived(", "    # Above.\n    @derived("),
        ('doc="Pace"', 'doc="Another text"'),
    ],
    ids=["spaces", "comment", "lines", "above", "doc"],
)
def test_layout_and_comments_do_not_change_a_derived_feature(module_of: Any, old: str, new: str) -> None:
    assert pace_of(module_of(CODE)).fingerprint == pace_of(module_of(CODE.replace(old, new))).fingerprint


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("6 * ten", "7 * ten"),
        ("hour + 1", "hour - 1"),
        ("ten: Array, hour", "hour: Array, ten"),
        ("return 6", "ten = ten + 1\n        return 6"),
    ],
)
def test_code_changes_a_derived_feature(module_of: Any, old: str, new: str) -> None:
    before = module_of(CODE)
    spec = pace_of(before)
    assert plans.find_function(spec) is before.Pace.pace.function
    changed = module_of(CODE.replace(old, new))
    assert pace_of(changed).fingerprint != spec.fingerprint
    with pytest.raises(CodeChangedError, match=r"pace .* run `headrace plan`, then `headrace apply`"):
        plans.find_function(spec)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("class Pace:", "class Other:"),
        ("    def pace(", "    def speed("),
        ('@derived(clicks["10m"], clicks["1h"], doc="Pace")', "@staticmethod"),
    ],
)
def test_code_that_is_gone_is_reported_as_such(module_of: Any, old: str, new: str) -> None:
    """Also where something else has taken its name."""
    spec = pace_of(module_of(CODE))
    module_of(CODE.replace(old, new))
    with pytest.raises(CodeChangedError, match="headrace apply"):
        plans.find_function(spec)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("price: float | None", "price: int | None"),
        ("price: float | None = None", "price: float"),
        ('topic="clicks"', 'topic="other"'),
        ('class Click(Event, topic="clicks")', "class Click"),
        ("    price: float | None = None", ""),
    ],
    ids=["type", "required", "topic", "no contract", "field"],
)
def test_a_changed_contract_is_reported_as_such(module_of: Any, old: str, new: str) -> None:
    (spec,) = compile_plan([vars(module_of(CODE))], "p", 1).events
    assert plans.find_contract(spec).__name__ == "Click"
    changed = CODE.replace(old, new)
    module_of(changed if new != "class Click" else changed.split("@view")[0])
    with pytest.raises(CodeChangedError, match=r"Click .* run `headrace plan`, then `headrace apply`"):
        plans.find_contract(spec)


def test_the_text_about_a_contract_is_no_part_of_it(module_of: Any) -> None:
    """A better docstring makes no worker refuse to start."""
    texts = (CODE, CODE.replace("A click.", "Someone clicked."))
    (before,), (after,) = (compile_plan([vars(module_of(text))], "p", 1).events for text in texts)
    assert before.fingerprint == after.fingerprint


@pytest.mark.parametrize(
    "path", ["no_such_module:X", "features:NoSuch", "features.no_such:X.y", "features.language:View.no.such"]
)
def test_code_that_is_not_there_is_none(path: str) -> None:
    assert plans.find_code(path) is None


# Mistakes. Each is an error at import that names where, what, and what would be right.

user = Entity("user", key="user_id", forget_after="90d")
item = Entity("item", key="item_id", forget_after="90d")
seller = Entity("seller", key="seller_id")


class Click(Event, topic="clicks"):
    user_id: str
    item_id: str
    category: str | None = None
    price: float | None = None
    quantity: int | None = None
    sold: bool | None = None
    seller_id: str | None = None


class Like(Event, topic="likes"):
    user_id: str
    item_id: str


def declare(attributes: dict[str, Any], entity: Any = user, name: str = "Shown") -> type:
    """A view with these attributes, declared and compiled as at import."""
    made: type = view(entity)(type(name, (), attributes))
    compile_plan([{name: made}], "p", 1)
    return made


def double(values: Array) -> Array:
    return 2 * values


def both(one: Array, other: Array) -> Array:
    return one + other


def unannotated(values):
    return values


def of_ints(values: Array) -> int:
    return len(values)


def undefined(values: Array) -> NoSuchName:  # type: ignore[name-defined]  # noqa: F821  # on purpose
    return values


async def later(values: Array) -> Array:
    return values


def is_large(values: Array) -> BoolArray:
    return values > 1


@view(user)
class Known:
    """What derived features below take."""

    n = agg.count(Click, over=["1h", "24h"])
    price = agg.last(Click, "price")
    category = agg.last(Click, "category")
    taste = agg.count(Click, by="category", over="7d")
    recent = agg.last_k(Click, "item_id", 3)


@view(item)
class KnownItem:
    """Of another entity."""

    price = agg.last(Click, "price")
    category = agg.last(Click, "category")


@view(Entity("seller", key="seller_id", forget_after="9d"))
class KnownSeller:
    """Of a third entity."""

    price = agg.last(Click, "price")


NAN, INF = float("nan"), float("inf")

# What is declared, and what the message must hold besides `shown.f`: the bad value, and the way out.
AGGREGATIONS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "unknown field": (lambda: agg.sum(Click, "prize", over="1h"), ["field='prize'", "Click", "it has:", "price"]),
    "text for number": (lambda: agg.sum(Click, "category", over="1h"), ["field='category' is str", "int or float"]),
    "number for text": (lambda: agg.last_k(Click, "price", 3), ["field='price' is float", "str"]),
    "top_k of number": (lambda: agg.top_k(Click, "price", 3, over="1h"), ["field='price' is float", "str"]),
    "field no text": (lambda: agg.sum(Click, ["price"], over="1h"), ["field=['price']", "it has:"]),  # type: ignore[arg-type]  # on purpose
    "unknown by": (lambda: agg.count(Click, over="1h", by="brand"), ["by='brand'", "it has:", "category"]),
    "by a number": (lambda: agg.count(Click, over="1h", by="price"), ["by='price' is float", "str"]),
    "by no text": (lambda: agg.count(Click, over="1h", by=["category"]), ["by=['category']"]),  # type: ignore[arg-type]  # on purpose
    "by not in the other": (
        lambda: agg.ratio(Click, Like, over="1h", by="category", prior=0.1, strength=2),
        ["by='category'", "Like", "it has:"],
    ),
    "no duration": (lambda: agg.count(Click, over="1 hour"), ["'1 hour'", "'24h'"]),
    "window too short": (lambda: agg.count(Click, over="30s"), ["'30s'", "1m to 90d"]),
    "window too long": (lambda: agg.count(Click, over=["1h", "91d"]), ["'91d'", "1m to 90d"]),
    "window twice": (lambda: agg.count(Click, over=["1h", "1h"]), ["twice", "once"]),
    "window a number": (lambda: agg.count(Click, over=[3600]), ["3600", "'24h'"]),  # type: ignore[list-item]  # on purpose
    "over a number": (lambda: agg.count(Click, over=3600), ["3600", "'24h'"]),  # type: ignore[arg-type]  # on purpose
    "no windows": (lambda: agg.count(Click, over=[]), ["over", "'all'"]),
    "half-life": (lambda: agg.decayed(Click, half_life="soon"), ["half_life", "'soon'", "'24h'"]),
    "half-life a number": (lambda: agg.decayed(Click, half_life=3600), ["half_life", "3600", "'24h'"]),  # type: ignore[arg-type]  # on purpose
    "k 0": (lambda: agg.last_k(Click, "item_id", 0), ["k=0", "1 to 1000"]),
    "k 1001": (lambda: agg.last_k(Click, "item_id", 1001), ["k=1001", "1 to 1000"]),
    "k text": (lambda: agg.last_k(Click, "item_id", "5"), ["k='5'", "1 to 1000"]),  # type: ignore[arg-type]  # on purpose
    "k a half": (lambda: agg.last_k(Click, "item_id", 2.5), ["k=2.5", "1 to 1000"]),  # type: ignore[arg-type]  # on purpose
    "buckets 0": (lambda: agg.count(Click, over="1h", by="category", buckets=0), ["buckets=0", "1 to 1000"]),
    "buckets a half": (lambda: agg.top_k(Click, "category", 1, over="1h", buckets=1.5), ["buckets=1.5", "1 to 1000"]),  # type: ignore[arg-type]  # on purpose
    "prior": (lambda: agg.ratio(Click, Like, over="1h", prior=2, strength=2), ["prior=2", "0 to 1"]),
    "prior nan": (lambda: agg.ratio(Click, Like, over="1h", prior=NAN, strength=2), ["prior=nan", "0 to 1"]),
    "prior text": (lambda: agg.ratio(Click, Like, over="1h", prior="1", strength=2), ["prior='1'", "0 to 1"]),  # type: ignore[arg-type]  # on purpose
    "strength 0": (lambda: agg.ratio(Click, Like, over="1h", prior=0.1, strength=0), ["strength=0", "above 0"]),
    "strength infinite": (lambda: agg.ratio(Click, Like, over="1h", prior=0.1, strength=INF), ["strength=inf"]),
    "default text": (lambda: agg.mean(Click, "price", over="1h", default="0"), ["default='0'", "number"]),  # type: ignore[arg-type]  # on purpose
    "default number": (lambda: agg.last(Click, "category", default=0), ["default=0", "text"]),
    "default bool": (lambda: agg.mean(Click, "price", over="1h", default=True), ["default=True", "number"]),
    "default nan": (lambda: agg.mean(Click, "price", over="1h", default=NAN), ["default=nan", "number"]),
    "default infinite": (lambda: agg.mean(Click, "price", over="1h", default=INF), ["default=inf", "number"]),
    "default of a map": (
        lambda: agg.mean(Click, "price", over="1h", by="category", default=1.0),
        ["default=1.0", "by"],
    ),
    "where unknown": (lambda: agg.count(Click, over="1h", where=col("surface") == "x"), ["'surface'", "it has:"]),
    "where text": (lambda: agg.count(Click, over="1h", where=col("price") > "x"), ["'price' with 'x'", "float"]),
    "where number": (lambda: agg.count(Click, over="1h", where=col("category") == 3), ["'category' with 3", "str"]),
    "where nan": (lambda: agg.count(Click, over="1h", where=col("price") > NAN), ["nan"]),
    "where infinite": (lambda: agg.count(Click, over="1h", where=col("price") < INF), ["inf"]),
    "where no condition": (lambda: agg.count(Click, over="1h", where="price > 1"), ["'price > 1'", "where=col("]),  # type: ignore[arg-type]  # on purpose
    "where a column": (lambda: agg.count(Click, over="1h", where=col("sold")), ["no condition", "where=col("]),  # type: ignore[arg-type]  # on purpose
    "where a list": (lambda: agg.count(Click, over="1h", where=col("category").one_of(["a"])), ["['a']", "str"]),  # type: ignore[arg-type]  # on purpose
    "of_where unknown": (
        lambda: agg.ratio(Click, Like, over="1h", prior=0.1, strength=1, of_where=col("price") > 1),
        ["of_where='price'", "Like", "it has:"],
    ),
    "no contract": (lambda: agg.count("Click", over="1h"), ["'Click'", "Event"]),  # type: ignore[arg-type]  # on purpose
    "of no contract": (lambda: agg.ratio(Click, "Like", over="1h", prior=0.1, strength=1), ["'Like'", "Event"]),  # type: ignore[arg-type]  # on purpose
}
DERIVED: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "unknown window": (lambda: derived(Known.n["3h"])(double), ["known.n", "'3h'", "declared: 1h, 24h"]),
    "window of none": (lambda: derived(Known.price["1h"])(double), ["known.price", "'1h'", "no window"]),
    "no window": (lambda: derived(Known.n)(double), ["known.n", 'n["1h"]']),
    "too few": (lambda: derived(Known.price)(both), ["takes 2 arrays", "1 feature"]),
    "too many": (lambda: derived(Known.price, Known.n["1h"])(double), ["takes 1 array", "2 features"]),
    "not annotated": (lambda: derived(Known.price)(unannotated), ["-> Array"]),
    "of ints": (lambda: derived(Known.price)(of_ints), ["int", "-> Array"]),  # type: ignore[arg-type]  # on purpose
    "undefined name": (lambda: derived(Known.price)(undefined), ["NoSuchName", "-> Array"]),
    "async": (lambda: derived(Known.price)(later), ["later", "def"]),  # type: ignore[arg-type]  # on purpose
    "lambda": (lambda: derived(Known.price)(lambda values: values), ["lambda", "def"]),
    "no source": (lambda: derived(Known.price)(eval("lambda values: values")), ["def"]),  # noqa: S307  # on purpose
    "of numpy": (lambda: derived(Known.price)(np.log1p), ["log1p", "def"]),
    "name for feature": (lambda: derived("known__price")(double), ["'known__price'"]),  # type: ignore[arg-type]  # on purpose
    "of text": (lambda: derived(Known.category)(double), ["known__category", "str", "int or float"]),
    "of a map": (lambda: derived(Known.taste["7d"])(double), ["known__taste_7d", "map[str, float]"]),
    "of a list": (lambda: derived(Known.recent)(double), ["known__recent", "list[str]"]),
    "default nan": (lambda: derived(Known.price, default=NAN)(double), ["default=nan", "number"]),
    "default text": (lambda: derived(Known.price, default="0")(double), ["default='0'", "number"]),  # type: ignore[arg-type]  # on purpose
    "other entity": (lambda: derived(KnownItem.price)(double), ["known_item__price", "item", "cross"]),
}
CROSS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "aggregation": (lambda: agg.count(Click, over="1h"), ["cross", "view of one entity"]),
    "at of a number": (lambda: Known.n["1h"].at(KnownItem.category), ["known__n_1h", "map[str, float]"]),
    "at a number": (lambda: Known.taste["7d"].at(KnownItem.price), ["known_item__price", "str"]),
    "at without window": (lambda: Known.taste.at(KnownItem.category), ["known.taste", 'taste["7d"]']),
    "at a name": (lambda: Known.taste["7d"].at("category"), ["'category'"]),  # type: ignore[arg-type]  # on purpose
    "contains of a number": (lambda: Known.n["1h"].contains(item), ["known__n_1h", "list[str]"]),
    "contains a third": (lambda: Known.recent.contains(seller), ["seller", "user", "item"]),
    "contains a name": (lambda: Known.recent.contains("item"), ["'item'"]),  # type: ignore[arg-type]  # on purpose
    "of a third": (lambda: derived(KnownSeller.price)(double), ["known_seller__price", "seller"]),
}


def mistake(make: Callable[[], Any], *parts: str) -> None:
    """A DeclarationError of one line whose text has all these parts."""
    with pytest.raises(DeclarationError) as caught:
        make()
    text = str(caught.value)
    assert "\n" not in text
    assert [part for part in parts if part not in text] == [], text


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_a_mistake_in_an_aggregation(name: str) -> None:
    make, parts = AGGREGATIONS[name]
    mistake(lambda: declare({"f": make()}), "shown.f", *parts)


@pytest.mark.parametrize("name", DERIVED)
def test_a_mistake_in_a_derived_feature(name: str) -> None:
    make, parts = DERIVED[name]
    mistake(lambda: declare({"f": make()}), *parts)


@pytest.mark.parametrize("name", CROSS)
def test_a_mistake_in_a_cross_view(name: str) -> None:
    make, parts = CROSS[name]

    def declared() -> None:
        made: type = cross(user, item)(type("Pair", (), {"f": make()}))
        compile_plan([{"Pair": made}], "p", 1)

    mistake(declared, *parts)


def test_an_unknown_window_is_an_error_in_the_class_body_too() -> None:
    """Where the handle does not know its name yet, the view says it a moment later."""

    def body() -> None:
        @view(user)
        class Inside:
            clicks = agg.count(Click, over=["1h", "24h"])

            @derived(clicks["3h"])
            def pace(values: Array) -> Array:
                return values

    mistake(body, "inside.clicks", "'3h'", "declared: 1h, 24h")


@pytest.mark.parametrize("name", ["Clicks", "a__b", "1st", "_x", "x" * 65, "größe", "a_"])
def test_a_mistake_in_the_name_of_a_feature(name: str) -> None:
    """`a_` too: `a__1h` could not be told from a view's feature."""
    mistake(lambda: declare({name: agg.count(Click, over="1h")}), "shown", repr(name), "small letters")


KEY_1H = Entity("user", key="user_1h", forget_after="90d")
NAMED_AS_KEYS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "an aggregation": (lambda: declare({"user_id": agg.last(Click, "user_id")}), "shown.user_id", "user"),
    "one of two windows": (
        lambda: declare({"user": agg.count(Click, over=["10m", "1h"])}, KEY_1H),
        "shown.user_1h",
        "user",
    ),
    "a derived feature": (
        lambda: declare({"user_id": derived(Known.price)(double)}),
        "shown.user_id",
        "user",
    ),
    "the first of a pair": (
        lambda: cross(user, item)(type("Pair", (), {"user_id": derived(Known.price)(double)})),
        "pair.user_id",
        "user",
    ),
    "the second of a pair": (
        lambda: cross(user, item)(type("Pair", (), {"item_id": Known.recent.contains(item)})),
        "pair.item_id",
        "item",
    ),
}


@pytest.mark.parametrize("name", NAMED_AS_KEYS)
def test_a_feature_can_not_have_the_name_of_its_views_key(name: str) -> None:
    """Feast takes the column for the id: without the check `plan` passes, and `apply` fails with Feast's own words.

    A check of attributes' names instead of features' misses the window; one of the first entity misses the pair.
    """
    make, place, entity = NAMED_AS_KEYS[name]
    mistake(make, f"{place}: is also the key of {entity}", "rename the feature")


def test_a_feature_may_have_the_name_of_another_views_key() -> None:
    """A check against all keys would refuse what a user's rows hold of items."""
    declare({"item_id": agg.last(Click, "item_id"), "seller_id": agg.last(Click, "seller_id")})


COUNT = SimpleNamespace(make=lambda: agg.count(Click, over="1h"))
VIEWS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no feature": (lambda: declare({}), ["shown", "no feature", "agg.count("]),
    "two of one name": (
        lambda: declare({"n": agg.count(Click, over="1h"), "n_1h": agg.seconds_since(Click)}),
        ["shown", "n_1h", "rename"],
    ),
    "one handle twice": (lambda: declare(dict.fromkeys(("a", "b"), agg.count(Click, over="1h"))), ["shown", "b_1h"]),
    "no key": (
        lambda: declare({"n": agg.count(Like, over="1h")}, seller),
        ["shown", "Like", "'seller_id'", "add the field"],
    ),
    "never expires": (lambda: declare({"p": agg.last(Click, "price")}, seller), ["shown.p", 'forget_after="90d"']),
    "never expires, all": (
        lambda: declare({"p": agg.count(Click, over=["1h", "all"])}, seller),
        ["shown.p", "forget_after"],
    ),
    "forgotten early": (
        lambda: declare({"n": agg.count(Click, over="7d")}, Entity("user", key="user_id", forget_after="7d")),
        ["shown.n", "7d", "forget_after='7d'"],
    ),
    "no entity": (lambda: declare({"n": COUNT.make()}, "user"), ["'user'", "Entity"]),
    "not called": (lambda: view(type("Shown", (), {"n": COUNT.make()})), ["Entity"]),  # type: ignore[arg-type]  # on purpose
    "derived not called": (lambda: derived(double), ["double", "@derived("]),  # type: ignore[arg-type]  # on purpose
    "name of class": (lambda: declare({"n": COUNT.make()}, name="Größe"), ["größe", "small letters"]),
    "underscore of class": (lambda: declare({"n": COUNT.make()}, name="User_"), ["user_", "small letters"]),
    "cross of one": (
        lambda: cross(user, user)(type("Pair", (), {"f": derived(Known.price)(double)})),
        ["pair", "user"],
    ),
}
ENTITIES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "name": (lambda: Entity("User", key="user_id"), ["'User'", "small letters"]),
    "no name": (lambda: Entity("", key="user_id"), ["''", "small letters"]),
    "name None": (lambda: Entity(None, key="user_id"), ["None", "small letters"]),  # type: ignore[arg-type]  # on purpose
    "key": (lambda: Entity("user", key="user id"), ["'user id'", "small letters"]),
    "forget_after": (
        lambda: Entity("user", key="user_id", forget_after="long"),
        ["'user'", "forget_after", "'long'", "'24h'"],
    ),
    "forget_after a number": (
        lambda: Entity("user", key="u", forget_after=90),  # type: ignore[arg-type]  # on purpose
        ["'user'", "forget_after", "90", "'24h'"],
    ),
}
SERVICES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "name": (lambda: service("Ranking", Known), ["'Ranking'", "small letters"]),
    "nothing": (lambda: service("s"), ["service s", "feature"]),
    "nothing left": (lambda: service("s", Known.price, without=[Known.price]), ["service s", "feature"]),
    "no view": (lambda: service("s", int), ["service s", "int", "@view"]),
    "a name": (lambda: service("s", "known"), ["service s", "'known'", "@view"]),  # type: ignore[arg-type]  # on purpose
    "a list": (lambda: service("s", [Known]), ["service s", "@view"]),  # type: ignore[arg-type]  # on purpose
    "unknown window": (lambda: service("s", Known.n["3h"]), ["known.n", "'3h'", "1h, 24h"]),
    "of no view": (lambda: service("s", agg.count(Click, over="1h")), ["service s", "view"]),
    "without another's": (lambda: service("s", Known, without=[KnownItem.price]), ["service s", "known_item__price"]),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_mistake_in_a_view(name: str) -> None:
    make, parts = VIEWS[name]
    mistake(make, *parts)


@pytest.mark.parametrize("name", ENTITIES)
def test_a_mistake_in_an_entity(name: str) -> None:
    make, parts = ENTITIES[name]
    mistake(make, *parts)


@pytest.mark.parametrize("name", SERVICES)
def test_a_mistake_in_a_service(name: str) -> None:
    make, parts = SERVICES[name]
    mistake(make, *parts)


def of_one_name() -> dict[str, Callable[[], dict[str, Any]]]:
    """Pairs of definitions that go by the same name but are not the same."""

    class Other(Event, topic="other"):
        user_id: str

    Other.__name__ = "Click"
    older = Entity("user", key="item_id", forget_after="1d")
    return {
        "shown": lambda: {"a": declare({"n": COUNT.make()}), "b": declare({"m": COUNT.make()})},
        "Click": lambda: {
            "a": declare({"n": COUNT.make()}),
            "b": declare({"n": agg.count(Other, over="1h")}, name="Two"),
        },
        "user": lambda: {"a": declare({"n": COUNT.make()}), "b": declare({"n": COUNT.make()}, older, name="Two")},
        "s": lambda: {"a": service("s", Known), "b": service("s", KnownItem)},
    }


@pytest.mark.parametrize("name", ["shown", "Click", "user", "s"])
def test_two_definitions_of_one_name_are_a_mistake(name: str) -> None:
    """Views, contracts, entities, services: to take the last one found is to compute the other's features from it."""
    mistake(lambda: compile_plan([of_one_name()[name]()], "p", 1), name)


def test_a_service_reads_the_view_that_it_is_given() -> None:
    """Not another one, declared since, of the same name."""
    first = declare({"n": COUNT.make()})
    declare({"m": COUNT.make()})
    (read,) = service("s", first).views
    assert [feature.name for feature in read.spec.features] == ["n"]


CONDITIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "and": (lambda: (col("price") > 1) and (col("price") < 2), "combine conditions with & | ~"),
    "not": (lambda: not (col("price") > 1), "combine conditions with & | ~"),
    "chained": (lambda: 1 < col("price") < 3, "combine conditions with & | ~"),
    "none": (lambda: col("price") == None, r"col\('price'\) == None: .* use .is_null\(\)"),  # noqa: E711  # on purpose
    "list": (lambda: col("price") == [1], r"\[1\]: compare with text, a number or a bool"),
    "other column": (lambda: col("price") == col("quantity"), "compare with text, a number or a bool"),
    "and a bool": (lambda: (col("price") > 1) & True, "True"),  # type: ignore[operator]  # on purpose
    "or a column": (lambda: (col("price") > 1) | col("sold"), "col"),  # type: ignore[operator]  # on purpose
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_mistake_in_a_condition(name: str) -> None:
    """A TypeError, as it comes before any view is there to be named."""
    make, text = CONDITIONS[name]
    with pytest.raises(TypeError, match=text):
        declare({"f": agg.count(Click, over="1h", where=make())})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "class Bad(Event):\n    user_id: str",
            r"Bad: topic='' is no Kafka topic name; declare `class Bad\(Event, topic=\"clicks\"\)`",
        ),
        ("class Bad(Event, topic='a b'):\n    user_id: str", "'a b' is no Kafka topic name"),
        ("class Bad(Event, topic='..'):\n    user_id: str", "is no Kafka topic name"),
        (
            "class Bad(Event, topic='t'):\n    tags: list[int]",
            r"Bad.tags: type .*list\[int\].* of lists only list\[str\]",
        ),
        ("class Bad(Event, topic='t'):\n    tags: str | int", "Bad.tags: type .*use str, int, float or bool"),
        ("class Bad(Event, topic='t'):\n    inner: Event", "Bad.inner: type .*use str, int, float or bool"),
    ],
)
def test_a_mistake_in_a_contract(module_of: Any, text: str, message: str) -> None:
    """An error of the class itself, before any feature reads it."""
    with pytest.raises(TypeError, match=message):
        module_of(f"from headrace import Event\n{text}\n")


def test_kinds_of_the_fields_of_a_contract(module_of: Any) -> None:
    """Optional, annotated, literal and constrained fields are of the kind that is inside."""
    text = """
        from typing import Annotated, Literal, Optional
        from pydantic import Field
        from headrace import Event

        class Every(Event, topic="t"):
            a: str
            b: Optional[int] = None
            c: Annotated[float, Field(ge=0)] | None = None
            d: Annotated[float | None, Field(ge=0)] = None
            e: Literal["x", "y"] = "x"
            f: bool | None = None
            g: Literal["x"] | None = None
        """
    kinds = module_of(textwrap.dedent(text)).Every.kinds()
    assert {name: kinds[name] for name in "abcdefg"} == {
        "a": "str",
        "b": "int",
        "c": "float",
        "d": "float",
        "e": "str",
        "f": "bool",
        "g": "str",
    }
    assert [*kinds][:2] == ["event_id", "occurred_at"]


def test_aggregations_are_frozen() -> None:
    """A declaration is plain data that nothing changes later."""
    for spec in shipped().views[0].aggregations:
        assert isinstance(spec, Aggregation)
        with pytest.raises(AttributeError):
            spec.name = "other"  # type: ignore[misc]  # on purpose


def test_a_view_whose_rows_could_hold_more_texts_than_a_row_can_number_is_refused() -> None:
    """The packed row counts its texts in two bytes: without the check row 65,536 would read as empty of texts."""
    tops = {
        f"top_{number}": agg.top_k(Click, "item_id", k=3, over="7d", where=col("price") > number, buckets=1000)
        for number in range(66)
    }
    with pytest.raises(DeclarationError, match=r"wide: keeps up to 66,066 texts a row.*lower buckets="):
        view(user)(type("Wide", (), tops))
