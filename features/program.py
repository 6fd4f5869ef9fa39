"""A service compiled: which rows to read, and every value of a request computed for all its rows and pairs at once."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from features.aggregations import Last
from features.kernel import Evaluator, fill_default
from features.layout import Bundle, Family, slots_of
from features.plan import At, Contains, Derived, Feature, Plan, arguments, find_function
from features.rows import Rows
from features.texts import buffers, look_up
from features.times import TICK_MS
from features.totals import Totals
from features.values import Floats, Lists, Maps, Texts, Values

Index = NDArray[np.intp]


class DerivedFeatureError(RuntimeError):
    """A derived feature's function raised, or answered with something else than one value a row."""


@dataclass(frozen=True)
class Frame:
    """The answer: an entity's features have a value for each of its rows, cross features one for each pair."""

    found: dict[str, NDArray[np.bool_]]
    last_event_ms: dict[str, NDArray[np.int64]]
    values: dict[str, Values]


@dataclass(frozen=True)
class Asked:
    """What is asked of a program.

    `ids` has the entities' ids by entity name; `pairs` the rows (intp[p]) of each entity that make up the pairs that
    cross features are about; `overrides` values by entity and event field that stand in for what `last` knows.
    """

    ids: Mapping[str, pa.StringArray]
    pairs: Mapping[str, Index]
    overrides: Mapping[str, Mapping[str, Any]]
    _buffers: dict[int, tuple[pa.StringArray, Any]] = field(default_factory=dict)

    def buffers(self, texts: pa.StringArray) -> Any:
        """`features.texts.buffers`, made once a request: several features look texts up in the same ones."""
        if id(texts) not in self._buffers:
            self._buffers[id(texts)] = texts, buffers(texts)
        return self._buffers[id(texts)][1]


class Program:
    """Some features of a plan, ready to be evaluated. Families named in `alone` are read apart from the others.

    Raises:
        CodeChangedError: if the code of a derived feature is not what was applied.
    """

    def __init__(self, plan: Plan, full_names: Iterable[str], alone: Container[str] = ()) -> None:
        self.features = tuple(plan.features[name] for name in full_names)
        needed: dict[str, Feature] = {}
        for feature in self.features:
            _collect(plan, feature, needed)
        slots = slots_of(plan)
        families = {slots[name][0].name: slots[name][0] for name in needed if name in slots}
        together: dict[str, list[Family]] = {}
        for family in families.values():
            together.setdefault(family.name if family.name in alone else family.entity, []).append(family)
        self.bundles = tuple(Bundle(tuple(own)) for own in together.values())
        self._stored = []
        for bundle in self.bundles:
            first_table = dict(
                zip(
                    bundle.families, accumulate((len(each.tables) for each in bundle.families), initial=0), strict=False
                )
            )
            own = [
                (feature, [(first_table[slots[name][0]] + table, partial) for table, partial in slots[name][1]])
                for name, feature in needed.items()
                if name in slots and slots[name][0] in first_table
            ]
            self._stored.append((bundle, own, Evaluator(bundle, own)))
        self._computed = tuple(feature for name, feature in needed.items() if name not in slots)
        self._entities = {name: feature.entities for name, feature in needed.items()}
        self._functions: dict[str, Callable[..., Any]] = {
            feature.full_name: find_function(feature.spec)
            for feature in self._computed
            if isinstance(feature.spec, Derived)
        }
        self._last = {
            (feature.entities[0], feature.spec.field): feature
            for feature in needed.values()
            if isinstance(feature.spec, Last) and not feature.spec.over
        }
        self.entities = tuple(dict.fromkeys(entity for feature in needed.values() for entity in feature.entities))

    def evaluate(self, states: Mapping[str, Rows | Totals], asked: Asked, now_ms: int) -> Frame:
        """All features at `now_ms`, from the rows of every bundle by name, or their totals as of then."""
        found: dict[str, NDArray[np.bool_]] = {}
        last_event_ms: dict[str, NDArray[np.int64]] = {}
        values: dict[str, Values] = {}
        for bundle, _, evaluator in self._stored:
            state, entity = states[bundle.name], bundle.entity
            latest = np.maximum(last_event_ms.get(entity, -1), state.last_event_ms)
            last_event_ms[entity], found[entity] = latest, latest >= 0
            values |= evaluator(state, now_ms)
        for entity, fields in asked.overrides.items():
            for event_field, column in fields.items():
                if (entity, event_field) in self._last:
                    name = self._last[entity, event_field].full_name
                    values[name] = _override(values[name], column)
        with np.errstate(all="ignore"):
            for feature in self._computed:
                values[feature.full_name] = self._compute(feature, values, asked)
        return Frame(found, last_event_ms, values)

    def explain(
        self, states: Mapping[str, Rows | Totals], entity: str, row: int, now_ms: int
    ) -> dict[str, dict[str, Any]]:
        """How each stored feature of one row comes about: window bounds, entries, last event, version of the row.

        The program must have been made with every family `alone`, and the states be rows.
        """
        found: dict[str, dict[str, Any]] = {}
        for bundle, features, _ in self._stored:
            if bundle.entity != entity:
                continue
            state, (family,) = states[bundle.name], bundle.families
            assert isinstance(state, Rows)  # noqa: S101  # for the type checker: who asks for this reads rows
            last_ms = int(state.last_event_ms[row])
            for feature, slots in features:
                assert feature.window is not None  # noqa: S101  # for the type checker: every aggregation has one
                entries, tail = state.tables[slots[0][0]], feature.window.tail_ticks(now_ms)
                inside = entries.rows == row
                if entries.starts is not None:
                    inside &= (entries.starts >= tail) & (entries.starts <= now_ms // TICK_MS)
                found[feature.full_name] = {
                    "from": None if feature.window.unbounded else tail * TICK_MS,
                    "to": now_ms,
                    "entries": int(inside.sum()),
                    "last_event_at": last_ms if last_ms >= 0 else None,
                    "row": f"{family.name}:{family.tag:04x}",
                }
        return found

    def _compute(self, feature: Feature, values: Mapping[str, Values], asked: Asked) -> Values:
        spec, target = feature.spec, feature.entities
        if isinstance(spec, At | Contains):
            return self._look_up(spec, target, values, asked)
        assert isinstance(spec, Derived)  # noqa: S101  # for the type checker: nothing else is computed
        args = [
            _gather(values[arg], arg, self._entities[arg], target, asked)
            if isinstance(arg, str)
            else self._look_up(arg, target, values, asked)
            for arg in spec.args
        ]
        n = len(args[0]) if args else 0
        try:
            result = np.asarray(self._functions[feature.full_name](*args), np.float64)
            column = result if result.shape == (n,) else np.broadcast_to(result, (n,))
        except Exception as error:
            msg = f"{feature.full_name}: its function failed on {n} rows: {type(error).__name__}: {error}"
            raise DerivedFeatureError(msg) from error
        return fill_default(np.where(np.isinf(column), np.nan, column), spec.default)

    def _look_up(
        self, spec: At | Contains, target: tuple[str, ...], values: Mapping[str, Values], asked: Asked
    ) -> Floats:
        """A map's value at a text, or whether a list holds an id, for each row or pair of the target."""
        of, owner = values[spec.of], self._entities[spec.of][0]
        assert isinstance(of, Maps | Lists)  # noqa: S101  # for the type checker: checked when the plan is compiled
        if isinstance(spec, Contains):
            holder, wanted = spec.entity, asked.ids[spec.entity]
            codes = np.arange(len(wanted))
        else:
            key, holder = values[spec.key], self._entities[spec.key][0]
            assert isinstance(key, Texts)  # noqa: S101  # as above
            wanted, codes = key.texts, key.codes
        if target != (holder,):
            codes = codes[asked.pairs[holder]]
        owners = np.arange(len(asked.ids[owner])) if target == (owner,) else asked.pairs[owner]
        numbers, nothing = (of.values, of.nothing) if isinstance(of, Maps) else (np.ones(len(of.codes)), 0.0)
        found: Floats = look_up(
            of.rows, of.codes, numbers, *asked.buffers(of.texts), owners, codes, *asked.buffers(wanted), nothing
        )
        return found


def _override(values: Values, column: Any) -> Values:
    """The values, with those of `column` (None for none) in their place."""
    if isinstance(values, Texts):
        given = pa.array(column, pa.string())
        own = np.arange(len(column)) + len(values.texts)
        return Texts(
            np.where(np.asarray(given.is_valid()), own, values.codes),
            pa.concat_arrays([values.texts, given.fill_null("")]),
        )
    assert isinstance(values, np.ndarray)  # noqa: S101  # for the type checker: `last` is a text or a number
    numbers = np.array([np.nan if value is None else value for value in column], np.float64)
    return np.where(np.isnan(numbers), values, numbers)


def _collect(plan: Plan, feature: Feature, needed: dict[str, Feature]) -> None:
    """Adds a feature after all that it is computed from."""
    for name in arguments(feature.spec):
        if name not in needed:
            _collect(plan, plan.features[name], needed)
    needed.setdefault(feature.full_name, feature)


def _gather(values: Values, name: str, entities: tuple[str, ...], target: tuple[str, ...], asked: Asked) -> Floats:
    """Numbers of one entity's rows as numbers of the target's rows or pairs."""
    if not isinstance(values, np.ndarray):
        msg = f"{name} is no number"
        raise TypeError(msg)
    return values if entities == target else values[asked.pairs[entities[0]]]
