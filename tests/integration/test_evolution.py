"""Features change, again and again, and nothing stops: every answer is right for its plan, whoever gives it."""

from __future__ import annotations

import importlib
import linecache
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from headrace.embedded import end
from registry.apply import apply
from store.commit import read_record
from tests import oracle
from tests.support.feed import Sender, an_event
from tests.support.stack import Stack, children_of, wait_for

pytestmark = pytest.mark.kafka

MODULE = "evolving"
HEAD = """
from headrace import Entity, Event, agg, col, derived, service, view
from headrace.types import Array

user = Entity("user", key="user_id", forget_after="90d")
item = Entity("item", key="item_id", forget_after="90d")
seller = Entity("seller", key="seller_id", forget_after="90d")
"""


class Feature(NamedTuple):
    """A declared feature, as text and as brute force."""

    agg: str
    over: tuple[str, ...] = ()
    field: str | None = None
    event: str = "Click"
    category: str | None = None
    k: int = 0
    half_life: str = "1h"
    default: float | None = None
    doc: str = ""
    times: float = 0
    """Of a derived one: how many times the clicks of an hour it is."""

    def line(self, name: str) -> str:
        if self.agg == "derived":
            return (
                f'    @derived(clicks["1h"], doc={self.doc!r})\n'
                f"    def {name}(clicks: Array) -> Array:\n        return clicks * {self.times}"
            )
        options = [self.event]
        options += [repr(self.field)] if self.field else []
        options += [str(self.k)] if self.k else []
        options += [f"over={list(self.over)!r}"] if self.over else []
        options += [f'where=col("category") == {self.category!r}'] if self.category else []
        options += [f"half_life={self.half_life!r}"] if self.agg == "decayed" else []
        options += [f"default={self.default}"] if self.default is not None else []
        return f"    {name} = agg.{self.agg}({', '.join([*options, f'doc={self.doc!r}'])})"

    def expected(self, own: Mapping[str, list[Any]], query_ms: int) -> dict[str, Any]:
        """Its values by window ("" for none), of the events by topic of one entity."""
        events = [
            each
            for each in own.get("clicks" if self.event == "Click" else "likes", ())
            if self.category in (None, each["category"])
        ]
        if self.agg == "derived":
            return {"": self.times * oracle.expected("count", events, query_ms, "1h")}
        options: dict[str, Any] = {"field": self.field, "k": self.k, "half_life": self.half_life}
        found = {
            window: oracle.expected(self.agg, events, query_ms, window or "all", **options)
            for window in self.over or ("",)
        }
        if self.default is not None:
            found = {window: self.default if value is None else value for window, value in found.items()}
        return found


@dataclass
class Definitions:
    """What is declared: the contracts' fields, each view's features by name, each service's features."""

    clicks: dict[str, str]
    views: dict[str, tuple[str, dict[str, Feature]]]
    services: dict[str, list[str]]
    likes: bool = False
    docs: dict[str, str] = field(default_factory=dict)

    def text(self) -> str:
        """The module."""
        lines = [
            HEAD,
            'class Click(Event, topic="clicks"):',
            *(f"    {name}: {kind}" for name, kind in self.clicks.items()),
        ]
        if self.likes:
            lines += [
                'class Like(Event, topic="likes"):',
                *(f"    {name}: {kind}" for name, kind in self.clicks.items()),
            ]
        for name, (entity, features) in self.views.items():
            lines += [
                f"@view({entity}, owner={self.docs.get(name, 'us')!r})",
                f"class {_title(name)}:",
                '    """Features."""',
            ]
            lines += [each.line(own) for own, each in features.items()]
        for name, full_names in self.services.items():
            members = [_member(*full_name.split("__")) for full_name in full_names]
            lines.append(f"{name} = service({name!r}, {', '.join(members)})")
        return "\n".join(lines) + "\n"

    def expected(self, entity: str, own: Mapping[str, list[Any]], query_ms: int) -> dict[str, Any]:
        """All values of an entity, by full name."""
        return {
            f"{view}__{name}{'_' if window else ''}{window}": value
            for view, (of, features) in self.views.items()
            if of == entity
            for name, feature in features.items()
            for window, value in feature.expected(own, query_ms).items()
        }

    def keeps(self, other: Definitions, full_name: str) -> bool:
        """Whether a feature of earlier definitions is still there, and means the same."""
        view, _, rest = full_name.partition("__")
        for name, feature in other.views[view][1].items():
            window = rest.removeprefix(name).removeprefix("_")
            if rest.startswith(name) and (window in feature.over or rest == name):
                mine = self.views[view][1].get(name) if view in self.views else None
                same = mine is not None and mine._replace(over=(), doc="", k=0) == feature._replace(
                    over=(), doc="", k=0
                )
                return bool(same and mine and mine.k >= feature.k and (not window or window in mine.over))
        return False


def _title(view: str) -> str:
    return "".join(part.title() for part in view.split("_"))


def _member(view: str, name: str) -> str:
    feature, _, window = name.rpartition("_")
    return f"{_title(view)}.{feature}[{window!r}]"


FIRST = Definitions(
    clicks={
        "user_id": "str",
        "item_id": "str",
        "category": "str | None = None",
        "seller_id": "str | None = None",
        "price": "float | None = None",
    },
    views={
        "user_things": (
            "user",
            {
                "clicks": Feature("count", ("1h", "24h")),
                "spent": Feature("sum", ("1h",), "price"),
                "price_mean": Feature("mean", ("24h",), "price", default=1.0),
                "price_max": Feature("max", ("24h",), "price"),
                "price_std": Feature("std", ("1h",), "price"),
                "kinds": Feature("distinct", ("1h",), "category"),
                "idle": Feature("seconds_since"),
                "last_price": Feature("last", (), "price"),
                "recent": Feature("last_k", (), "item_id", k=5),
                "top": Feature("top_k", ("24h",), "category", k=3),
                "heat": Feature("decayed", half_life="30m"),
            },
        ),
        "item_things": (
            "item",
            {
                "clicks": Feature("count", ("1h",)),
                "likely": Feature("decayed", half_life="1h"),
                "price": Feature("last", (), "price"),
            },
        ),
    },
    services={"ranking_v1": ["user_things__clicks_1h", "item_things__clicks_1h"]},
)

Change = Callable[[Definitions], object]


def of_user(name: str, **changed: Any) -> Change:
    """A feature of the users' view, other than it was."""

    def change(now: Definitions) -> None:
        features = now.views["user_things"][1]
        features[name] = features[name]._replace(**changed) if name in features else Feature(**changed)

    return change


def widened(now: Definitions) -> None:
    """Every aggregation gets another layout."""
    for view, (entity, features) in now.views.items():
        now.views[view] = (
            entity,
            {
                name: each._replace(over=(*each.over, "12h"))
                if each.over
                else each._replace(k=each.k + 3 if each.k else 0)
                for name, each in features.items()
            },
        )


def without(view: str, name: str) -> Change:
    return lambda now: now.views[view][1].pop(name)


def with_view(name: str, entity: str, **features: Feature) -> Change:
    return lambda now: now.views.update({name: (entity, features)})


def with_likes(now: Definitions) -> None:
    now.likes = True
    of_user("likes", agg="count", over=("1m", "1h"), event="Like")(now)


MINUTE = Feature("count", ("1m",))
CHANGES: list[tuple[str, Change | None, tuple[str, ...]]] = [
    ("a longer window", of_user("clicks", over=("1h", "2h", "24h")), ()),
    ("a shorter window", of_user("clicks", over=("10m", "1h", "2h", "24h")), ()),
    ("other words", lambda now: now.docs.update(user_things="them"), ()),
    ("a feature", of_user("fresh", agg="count", over=("1m",), category="c1"), ()),
    # The new ones of a minute come early: they are complete a minute later, while other changes are made.
    ("a new entity", with_view("seller_things", "seller", clicks=Feature("count", ("1m", "1h"))), ()),
    ("a roll-back", None, ()),
    ("the same again", None, ()),
    ("another topic", with_likes, ()),
    ("another condition", of_user("fresh", category="c2"), ("user_things.fresh",)),
    ("another layout of every aggregation", widened, ()),
    ("a view", with_view("user_more", "user", clicks=MINUTE, spent=Feature("sum", ("1m",), "price")), ()),
    ("a service", lambda now: now.services.update(ranking_v2=["user_things__spent_1h", "item_things__clicks_1h"]), ()),
    ("another half-life", of_user("heat", half_life="1h"), ("user_things.heat",)),
    ("a smaller k", of_user("recent", k=4), ("user_things.recent",)),
    ("another default", of_user("price_mean", default=2.0), ("user_things",)),
    ("a window gone", of_user("clicks", over=("10m", "1h", "24h")), ()),
    ("an optional field", lambda now: now.clicks.update(shade="str | None = None"), ()),
    ("a view gone", lambda now: now.views.pop("user_more"), ()),
    ("a derived feature", of_user("doubled", agg="derived", times=2.0), ()),
    ("other code of it", of_user("doubled", times=3.0), ("user_things.doubled",)),
    ("a service with more", lambda now: now.services["ranking_v2"].append("user_things__clicks_24h"), ()),
    ("a service gone", lambda now: now.services.pop("ranking_v2"), ()),
    ("a field that producers must send", lambda now: now.clicks.update(category="str"), ("Click", "Like")),
    ("a feature gone", without("item_things", "likely"), ()),
    (
        "another order",
        lambda now: now.views.update(item_things=("item", dict(reversed(now.views["item_things"][1].items())))),
        (),
    ),
]
CODE = {
    "an optional field",
    "another topic",
    "a derived feature",
    "other code of it",
    "a field that producers must send",
}
"""Before the code of what runs is changed, everybody must have taken up the plan that it is of."""


class Evolution:
    """A project whose definitions change, events that flow, and what was answered meanwhile."""

    def __init__(self, stack: Stack, folder: Path, rng: random.Random) -> None:
        self.stack, self.folder, self.rng = stack, folder, rng
        self.of_plan: dict[str, Definitions] = {}
        self.events: dict[str, list[dict[str, Any]]] = {"clicks": [], "likes": []}
        self.quiet: dict[str, list[dict[str, Any]]] = {"clicks": []}
        self.wrong: list[str] = []
        self.answers: Counter[str] = Counter()
        self.compared: Counter[str] = Counter()
        self.mended: set[str] = set()
        """Features that were incomplete once and complete later."""
        self._was_incomplete: set[str] = set()
        self._number = 0
        self.sender = Sender(stack.kafka.bootstrap_servers)
        self.stop, self.flows = threading.Event(), threading.Event()
        self.pouring = threading.Lock()
        self.addresses: list[str] = []
        self.stream: Any = None

    def declare(self, definitions: Definitions, replace: tuple[str, ...] = ()) -> None:
        """Applies what is declared, as a `headrace apply` that starts anew would."""
        (self.folder / f"{MODULE}.py").write_text(definitions.text())
        sys.modules.pop(MODULE, None)
        importlib.invalidate_caches()
        linecache.clearcache()
        plan = apply(self.stack.settings, self.stack.client, replace=replace).plan
        self.of_plan[plan.fingerprint] = deepcopy(definitions)
        self.fingerprint, self.number = plan.fingerprint, plan.number
        self.topics = ["clicks", "clicks", "likes"] if definitions.likes else ["clicks"]

    def send(self, n: int, topics: list[str], *, quiet: bool = False) -> None:
        for _ in range(n):
            self._number += 1
            topic = self.rng.choice(topics)
            event = an_event(self.rng, self._number, users=20, items=15)
            event["shade"] = "red"
            if quiet:
                event |= {
                    "user_id": f"q{event['user_id']}",
                    "item_id": f"q{event['item_id']}",
                    "seller_id": f"q{event['seller_id']}",
                }
            (self.quiet if quiet else self.events)[topic].append(event | {"t": event["occurred_at"]})
            self.sender.send(topic, event["user_id"], event)
        self.sender.flush()

    def flow(self) -> None:
        """Events, for as long as `flows`."""
        while not self.stop.is_set():
            if self.flows.wait(0.1):
                with self.pouring:
                    self.send(5, self.topics)
                time.sleep(0.05)

    def ask(self) -> None:
        """Asks of what no events come to any more: its values follow from the time alone."""
        rng = random.Random(1)
        while not self.stop.wait(0.02):
            self.compare(rng.choice(self.addresses), *self._somebody(rng, self.quiet), self.quiet)

    def _somebody(self, rng: random.Random, events: Mapping[str, list[Any]]) -> tuple[str, str]:
        kind = rng.choice(["user", "user", "item"])
        return kind, rng.choice(events["clicks"])[f"{kind}_id"]

    def compare(self, address: str, kind: str, entity_id: str, events: Mapping[str, list[Any]]) -> dict[str, Any]:
        """Asks, and compares all that is complete with brute force."""
        try:
            answer = httpx.get(f"{address}/v1/entities/{kind}/{entity_id}", timeout=30)
        except httpx.HTTPError as error:
            self.answers[f"{type(error).__name__}"] += 1
            self.wrong.append(f"{address}: {error!r}")
            return {}
        self.answers[str(answer.status_code)] += 1
        if answer.status_code != 200:
            self.wrong.append(answer.text)
            return {}
        got: dict[str, Any] = answer.json()
        # A server may be quicker to take up a plan than we are to write down what it is.
        wait_for("the plan is known", lambda: got["plan"] in self.of_plan)
        own = {
            topic: [each for each in many if each[f"{kind}_id"] == entity_id and each["t"] < got["as_of"]]
            for topic, many in events.items()
        }
        incomplete = got.get("incomplete", {})
        newest, its = self.of_plan[self.fingerprint], self.of_plan[got["plan"]]
        for name, value in its.expected(kind, own, got["as_of"]).items():
            if not newest.keeps(its, name):
                continue  # Rows that the newer stream has written no longer have it.
            if name in incomplete:
                self._was_incomplete.add(name)
            elif not oracle.close(got["features"][name], value):
                self.wrong.append(f"{kind} {entity_id} {name}: {got['features'][name]!r} is not {value!r}")
            else:
                self.compared[name] += 1
                if name in self._was_incomplete:
                    self.mended.add(name)
        return got

    def settle(self) -> None:
        """With all that was sent committed, everybody's answers are right."""
        self.flows.clear()
        with self.pouring:
            self.stack.wait_until_committed()
            for kind in ("user", "item", "seller"):
                for entity_id in sorted({each[f"{kind}_id"] for each in self.events["clicks"]}):
                    address = self.rng.choice(self.addresses)
                    its = self.of_plan[self._served(address)]
                    if kind in {entity for entity, _ in its.views.values()}:
                        self.compare(address, kind, entity_id, self.events)
        self.flows.set()

    def disturb(self, at: int) -> None:
        """After some changes somebody is restarted, or killed."""
        if at == 8:
            print("a worker is killed")
            os.kill(children_of(self.stream)[0], signal.SIGKILL)
        elif at in (5, 17):
            print("the stream is restarted")
            end(self.stream)
            self.stream = self.stack.start_stream(1, f"stream-{at}")
        elif at == 11:
            print("a server is restarted")
            self.addresses.pop()
            time.sleep(0.5)  # Who asks it has its answer.
            self.stack.stop("other")
            self.addresses.append(self.stack.start_server("other-again"))

    def wait_until_taken_up(self) -> None:
        """Until everybody runs the newest plan."""
        record = self.stack.keyspace.commit_record("user", 0)
        wait_for("the stream has taken it up", lambda: read_record(self.stack.client, record).plan == self.number)
        wait_for("it is served", lambda: {self._served(each) for each in self.addresses} == {self.fingerprint})

    def _served(self, address: str) -> str:
        found: str = httpx.get(f"{address}/readyz", timeout=30).json()["plan"]
        return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of code that this process imports too."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / f"{MODULE}.py").write_text(FIRST.text())
    yield tmp_path
    sys.modules.pop(MODULE, None)


def test_features_change_and_nothing_stops(folder: Path) -> None:
    """Events flow and clients ask throughout; definitions change in every way, streams and servers are restarted.

    No answer but 200; every feature that is not said to be incomplete equals brute force, in every answer; what
    completes by waiting is complete in the end.
    """
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    with Stack(code=folder, definitions=MODULE, shards=8, standby=True) as stack:
        evolution = Evolution(stack, folder, rng)
        now = deepcopy(FIRST)
        evolution.declare(now)
        evolution.send(300, ["clicks"], quiet=True)
        evolution.stream = stack.start_stream(1)
        stack.wait_until_committed()
        evolution.addresses = [stack.start_server("server"), stack.start_server("other")]
        threads = [threading.Thread(target=each) for each in (evolution.flow, evolution.ask, evolution.ask)]
        for thread in threads:
            thread.start()
        evolution.flows.set()
        try:
            before = after = now
            for at, (what, change, replace) in enumerate(CHANGES):
                if what in CODE:
                    evolution.wait_until_taken_up()
                if what == "a roll-back":
                    now, after = deepcopy(before), now
                elif what == "the same again":
                    now = after
                else:
                    before, now = now, deepcopy(now)
                    assert change is not None
                    change(now)
                evolution.declare(now, replace)
                print(f"{at}: {what}, plan {evolution.number}", flush=True)
                evolution.disturb(at)
                time.sleep(rng.uniform(0, 2))
                if at % 4 == 3:
                    evolution.settle()
                assert not evolution.wrong, (what, evolution.wrong[:5])
            evolution.wait_until_taken_up()
            evolution.settle()
            soon = {"user_things__likes_1m", "seller_things__clicks_1m", "user_things__fresh_1m"}
            wait_for("what is new is complete", partial(completed, evolution, soon))
            evolution.settle()
        finally:
            evolution.stop.set()
            for thread in threads:
                thread.join()
        print(evolution.answers, sum(evolution.compared.values()), sorted(evolution.mended))
        assert not evolution.wrong, evolution.wrong[:5]
        assert set(evolution.answers) == {"200"}
        unchanged = {"user_things__clicks_1h", "user_things__price_max_24h", "item_things__price"}
        assert min(evolution.compared[name] for name in unchanged) > 100
        assert not evolution.mended & unchanged


def completed(evolution: Evolution, names: set[str]) -> bool:
    """Whether features were found to be right once they were complete."""
    evolution.settle()
    return all(evolution.compared[name] for name in names)
