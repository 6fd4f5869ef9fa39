"""Every feature of a plan by brute force: aggregations by the oracle, derived and cross ones by their own functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from features.aggregations import Aggregation
from features.expressions import Compare
from features.plan import At, Contains, Derived, Feature, Plan, find_function
from tests.properties.scenarios import agree, brute, scale_of

Event = Mapping[str, Any]


class Expected:
    """What features must be, given all events by contract: each with its effective time `t` (ms), and fields."""

    def __init__(self, plan: Plan, events: Mapping[str, Sequence[Event]]) -> None:
        self._plan = plan
        self._known: dict[tuple[Any, ...], Any] = {}
        self._of: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for entity in plan.entities:
            own = self._of[entity.name] = defaultdict(list)
            for contract, many in events.items():
                names = plan.event(contract).fields
                for event in many:
                    if event.get(entity.key) is not None:
                        whole = {name: event.get(name) for name in names} | {"t": event["t"], "contract": contract}
                        own[event[entity.key]].append(whole)

    def before(self, entity: str, entity_id: str | None, query_ms: int) -> list[dict[str, Any]]:
        """The events of an entity strictly before a time."""
        if entity_id is None:
            return []
        return [event for event in self._of[entity].get(entity_id, ()) if event["t"] < query_ms]

    def value(self, feature: Feature, ids: Mapping[str, str | None], query_ms: int) -> Any:
        """A feature's value for some entities at a time, from the events before it."""
        asked = (feature.full_name, *(ids[entity] for entity in feature.entities), query_ms)
        if asked not in self._known:
            self._known[asked] = self._value(feature, ids, query_ms)
        return self._known[asked]

    def _value(self, feature: Feature, ids: Mapping[str, str | None], query_ms: int) -> Any:
        spec = feature.spec
        if isinstance(spec, Aggregation):
            assert feature.window is not None
            events = self.before(feature.entities[0], ids[feature.entities[0]], query_ms)
            events = [event for event in events if _counts(spec, event)]
            found = brute(msgspec.structs.replace(spec, where=None), events, query_ms, feature.window.name)
            return spec.default if found is None else found
        if isinstance(spec, Derived):
            args = [self._argument(arg, ids, query_ms) for arg in spec.args]
            with np.errstate(all="ignore"):
                (number,) = np.asarray(find_function(spec)(*(np.array([_number(arg)]) for arg in args)), np.float64)
            return float(number) if np.isfinite(number) else spec.default
        return self._argument(spec, ids, query_ms)

    def differences(
        self, features: Iterable[Feature], ids: Mapping[str, str | None], query_ms: int, got: Mapping[str, Any]
    ) -> list[str]:
        """What of some values is not as it must be."""
        scale = sum(scale_of(self.before(entity, entity_id, query_ms)) for entity, entity_id in ids.items())
        wrong = []
        for feature in features:
            want, value = self.value(feature, ids, query_ms), got[feature.full_name]
            if isinstance(want, dict):  # Of Arrow's maps Python makes lists of pairs.
                value = dict(value)
            if not agree(value, want, scale):
                wrong.append(f"{feature.full_name} of {ids} at {query_ms}: {value!r} is not {want!r}")
        return wrong

    def _argument(self, arg: Any, ids: Mapping[str, str | None], query_ms: int) -> Any:
        of: Callable[[str], Any] = lambda name: self.value(self._plan.features[name], ids, query_ms)  # noqa: E731
        match arg:
            case At():
                spec, key = self._plan.features[arg.of].spec, of(arg.key)
                assert isinstance(spec, Aggregation)
                return float(of(arg.of).get(key, spec.without_events)) if key is not None else spec.without_events
            case Contains():
                return ids[arg.entity] in of(arg.of)
            case _:
                return of(arg)


def _counts(spec: Aggregation, event: Event) -> bool:
    """Whether a condition holds, if there is one: catalogues here have `field == value` only."""
    if spec.where is None:
        return True
    assert isinstance(spec.where, Compare)
    assert spec.where.sign == "=="
    return bool(event.get(spec.where.field) == spec.where.value)


def _number(value: Any) -> float:
    return np.nan if value is None else float(value)
