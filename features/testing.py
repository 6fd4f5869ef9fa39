"""Tests of features without any server: events, an instant, and what features are then.

>>> from features.catalog import Click, UserActivity
>>> from headrace.testing import Scenario, events
>>> clicks = events(Click, user_id="u1", item_id="i1")
>>> shop = Scenario(UserActivity, clicks("11:58", every="30s", times=3), clicks("12:05"))
>>> shop.at("12:00", user_id="u1").has(clicks_10m=3, idle_s=60.0)
>>> shop.at("12:08:59", user_id="u1")["clicks_10m"], shop.at("12:20", user_id="u1")["clicks_10m"]
(4, 0)

Values come from the kernel that serves, by the rule of training sets: of events strictly before the instant. Times are
texts of one day, UTC (`12:00`, `12:00:30.250`), of days before and after it (`-7d 12:00`), or datetimes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import cached_property
from itertools import count
from typing import Any, Final

import numpy as np

from features.aggregations.base import Aggregation
from features.compile import compile_plan
from features.events import Event, column_of, plainly, value_of
from features.history import rows_at
from features.kernel import Events
from features.language import VIEWS, Service
from features.layout import families_of
from features.plan import At, Contains, Derived, Feature, Plan, features_of
from features.program import Asked, Frame, Program
from features.times import DAY_MS, TICK_MS, duration_ms
from features.values import to_python

DAY: Final = datetime(2025, 11, 21, tzinfo=UTC)
"""The day of times that name none."""
When = str | datetime
_TIME: Final = re.compile(r"(?:([+-]\d+)d )?(\d\d):(\d\d)(?::(\d\d(?:\.\d{1,3})?))?")
_numbers = count(1)


def milliseconds(when: When) -> int:
    """Epoch milliseconds of a time.

    Raises:
        ValueError: if it is none.

    >>> milliseconds("+1d 00:00:00.250") - milliseconds("00:00")
    86400250
    """
    if isinstance(when, datetime):
        if when.tzinfo is None:
            msg = f"{when!r} has no time zone: write datetime(…, tzinfo=UTC)"
            raise ValueError(msg)
        return round(when.timestamp() * 1000)
    match = _TIME.fullmatch(when)
    if match is None:
        msg = f"{when!r} is no time: write '12:00', '12:00:30.250', '-7d 12:00', or a datetime"
        raise ValueError(msg)
    days, hours, minutes, seconds = match.groups(default="0")
    since_midnight = (int(hours) * 60 + int(minutes)) * 60_000 + round(float(seconds) * 1000)
    return round(DAY.timestamp() * 1000) + int(days) * DAY_MS + since_midnight


def events(contract: type[Event], **fields: Any) -> Callable[..., list[Event]]:
    """Makes events of a contract, with some fields the same in all.

    The function that it gives takes a time, of the first event; `every` and `times`, for more of them; and fields.

    >>> from features.catalog import Like
    >>> likes = events(Like, user_id="u1", item_id="i1")
    >>> [like.price for like in likes("12:00", every="10s", times=2, price=5.0)]
    [5.0, 5.0]
    """

    def make(at: When, *, every: str = "1s", times: int = 1, **more: Any) -> list[Event]:
        first, step = milliseconds(at), duration_ms(every)
        given = {**fields, **more}
        return [
            contract.of(event_id=f"test-{next(_numbers)}", occurred_at=first + number * step, **given)
            for number in range(times)
        ]

    return make


class Scenario:
    """What happened, and what features are at any time.

    Args:
        of: a view or a service, or several in a tuple.
        happened: events, or lists of them, in any order.
    """

    def __init__(self, of: Any, *happened: Event | Iterable[Event]) -> None:
        wanted = of if isinstance(of, tuple) else (of,)
        self.plan = compile_plan([{str(number): each for number, each in enumerate(wanted)}], "testing", 1)
        named = [name for each in wanted for name in _names(each)]
        self.names = tuple(dict.fromkeys(named))
        self.events: list[Event] = []
        for each in happened:
            self.add(each)

    def __repr__(self) -> str:
        return f"<Scenario events={len(self.events)} features={len(self.names)}>"

    def add(self, happened: Event | Iterable[Event]) -> None:
        """More events, at any time; one whose event_id was there is a duplicate, and counts no more."""
        known = {(type(event), event.event_id) for event in self.events}
        for event in [happened] if isinstance(happened, Event) else happened:
            if (type(event), event.event_id) not in known:
                known.add((type(event), event.event_id))
                self.events.append(event)

    def at(self, when: When, **ids: Any) -> Moment:
        """The features of some entities at a time.

        Args:
            when: the time.
            ids: of each entity, by its key (`user_id="u1"`); `item__price=9.0` stands in for the price that the item
                is known by.

        Raises:
            TypeError: if a key is of no entity here.
        """
        return Moment(self, milliseconds(when), ids)


class Moment(Mapping[str, Any]):
    """Features by name at a time: short names, or full ones where two views share them."""

    def __init__(self, scenario: Scenario, now_ms: int, ids: Mapping[str, Any]) -> None:
        self._scenario, self._now_ms = scenario, now_ms
        plan = scenario.plan
        keys = {entity.key: entity.name for entity in plan.entities}
        self._ids = {keys[name]: value for name, value in ids.items() if name in keys}
        self._overrides: dict[str, dict[str, Any]] = {}
        for name, value in ids.items():
            entity, _, field = name.partition("__")
            if name not in keys and (not field or entity not in self._ids):
                msg = f"{name} is no entity's key; there are: {', '.join(keys)}"
                raise TypeError(msg)
            if name not in keys:
                self._overrides.setdefault(entity, {})[field] = [value]
        of_these = [plan.features[name] for name in scenario.names]
        self._features = [feature for feature in of_these if set(feature.entities) <= self._ids.keys()]
        short = [feature.name for feature in self._features]
        self._named = {each.full_name: each for each in self._features}
        self._named |= {each.name: each for each in self._features if short.count(each.name) == 1}

    def __getitem__(self, name: str) -> Any:
        if name not in self._named:
            alike = [each for each in self if each.endswith(f"__{name}")]
            alike = alike or get_close_matches(name, [*self, *self._named]) or list(self)
            who = " and ".join(self._ids)
            msg = f"{name!r} is no feature of {who} here, or one of each of two views; try {', '.join(alike)}"
            raise KeyError(msg)
        return self._value(self._named[name])

    def __iter__(self) -> Iterator[str]:
        return (each.full_name for each in self._features)

    def __len__(self) -> int:
        return len(self._features)

    def __repr__(self) -> str:
        values = "\n".join(f"  {name} = {self[name]!r}" for name in self)
        return f"{self._who(self._ids)} at {_clock(self._now_ms)}\n{values}"

    def has(self, **expected: Any) -> None:
        """Checks features, floats to nine digits; what can be told from a number only by `==` is compared so.

        Raises:
            AssertionError: if one is another; with the events, and which of them its window holds.
        """
        wrong = [name for name, value in expected.items() if not _same(self[name], value)]
        if wrong:
            raise AssertionError("\n".join(self._explained(name, expected[name]) for name in wrong))

    def _explained(self, name: str, expected: Any) -> str:
        feature = self._named[name]
        who = self._who({entity: self._ids[entity] for entity in feature.entities})
        first = f"{feature.full_name} of {who} at {_clock(self._now_ms)} is {self[name]!r}, not {expected!r}"
        return "\n".join([first, *(f"    {line}" for line in self._timeline(feature))])

    def _timeline(self, feature: Feature) -> Iterator[str]:
        """How a feature came about: the events that it looks at, and its window around them; or what it is made of."""
        spec = feature.spec
        if not isinstance(spec, Aggregation):
            parts = spec.args if isinstance(spec, Derived) else (spec,)
            for name in dict.fromkeys(name for part in parts for name in _inputs(part)):
                of = self._scenario.plan.features[name]
                yield f"{name} is {self._value(of)!r}"
                yield from (f"    {line}" for line in self._timeline(of))
            return
        assert feature.window is not None  # noqa: S101  # for the type checker: every aggregation has one
        begin_ms = 0 if feature.window.unbounded else feature.window.tail_ticks(self._now_ms) * TICK_MS
        entity = self._scenario.plan.entity(feature.entities[0])
        read = {measure.event for measure in spec.measures}
        mine = [
            event
            for event in sorted(self._scenario.events, key=lambda event: event.occurred_at)
            if type(event).__name__ in read and _is(getattr(event, entity.key, None), self._ids[entity.name])
        ]
        if not mine:
            yield f"no {' or '.join(sorted(read))} of {entity.name} {self._ids[entity.name]}"
        lines = [(event.occurred_at, 1, _shown(event, entity.key)) for event in mine]
        lines += [(self._now_ms, 0, f"<- now, where window {feature.window.name} ends")]
        if not feature.window.unbounded:
            lines += [(begin_ms, 0, f"<- where window {feature.window.name} begins")]
        for at_ms, is_event, text in sorted(lines):
            mark = "o" if is_event and begin_ms <= at_ms < self._now_ms else "." if is_event else "-"
            yield f"{_clock(at_ms)} {mark} {text}"

    def _value(self, feature: Feature) -> Any:
        values = self._frame.values[feature.full_name]
        (value,) = to_python(values, feature.value_type)
        return value

    @staticmethod
    def _who(ids: Mapping[str, Any]) -> str:
        return ", ".join(f"{entity} {entity_id}" for entity, entity_id in ids.items())

    @cached_property
    def _frame(self) -> Frame:
        plan = self._scenario.plan
        alone = {family.name for view in plan.views for family in families_of(plan, view)}
        program = Program(plan, [each.full_name for each in self._features], alone)
        times_ms = np.array([self._now_ms])
        states = {}
        for bundle in program.bundles:
            (family,) = bundle.families
            happened = _columns(plan, self._scenario.events, family.key, self._ids[family.entity])
            ((_, states[bundle.name]),) = rows_at(family, happened, np.zeros(1, np.intp), times_ms)
        ids = {entity: [str(self._ids[entity])] for entity in program.entities}
        pairs = {entity: np.zeros(1, np.intp) for entity in program.entities}
        return program.evaluate(states, Asked(ids, pairs, self._overrides), dict.fromkeys(ids, times_ms))


def _names(of: Any) -> Iterable[str]:
    """The features of a view or a service."""
    if isinstance(of, Service):
        return of.spec.features
    if of in VIEWS:
        return (feature.full_name for feature in features_of(VIEWS[of].spec))
    msg = f"{of!r} is no view and no service: give a class that @view or @cross made, or what service(…) gave"
    raise TypeError(msg)


def _columns(plan: Plan, happened: Iterable[Event], key: str, entity_id: Any) -> dict[str, Events]:
    """The events of one entity as the kernel takes them."""
    found: dict[str, Events] = {}
    for spec in plan.events:
        mine = [
            event
            for event in happened
            if type(event).__name__ == spec.name and _is(getattr(event, key, None), entity_id)
        ]
        if not mine:
            continue
        columns = {
            name: column_of(leaf.kind, [value_of(event, leaf.attributes) for event in mine])
            for name, leaf in type(mine[0]).leaves().items()
        }
        times_ms = np.array([event.occurred_at for event in mine], np.int64)
        found[spec.name] = Events(np.zeros(len(mine), np.intp), times_ms, columns)
    return found


def _is(found: Any, entity_id: Any) -> bool:
    """Whether an event's field names an entity: a whole number is its decimal text."""
    return found is not None and str(plainly(found)) == str(entity_id)


def _inputs(part: str | At | Contains) -> tuple[str, ...]:
    match part:
        case At():
            return part.of, part.key
        case Contains():
            return (part.of,)
        case _:
            return (part,)


def _same(value: Any, expected: Any) -> bool:
    if isinstance(expected, float) and isinstance(value, int | float):
        return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12)
    return bool(expected == value)


def _clock(ms: int) -> str:
    at = datetime.fromtimestamp(0, UTC) + timedelta(milliseconds=ms)
    days = (at.date() - DAY.date()).days
    clock = at.strftime("%H:%M:%S") + (f".{at.microsecond // 1000:03}" if at.microsecond else "")
    return f"{days:+}d {clock}" if days else clock


def _shown(event: Event, key: str) -> str:
    values = event.model_dump(exclude={"event_id", "occurred_at", key}, exclude_none=True)
    return " ".join([type(event).__name__, *(f"{name}={value}" for name, value in values.items())])
