"""A service compiled: which rows to read, and every value of a request computed for all its rows and pairs at once."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Final

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features.aggregations import Last, LastK
from features.aggregations import Sequence as EventSequence
from features.aggregations.base import Aggregation, Table
from features.formulas import Formula, Numeric, fill, formulas, tidy
from features.given import Fields, GivenRows
from features.kernel import Evaluator, Wanted, numeric
from features.layout import Bundle, Family, slots_of
from features.plan import At, Contains, Derived, Feature, Given, Plan, arguments, find_function
from features.rows import Entries, Rows
from features.texts import buffers, look_up
from features.times import TICK_MS
from features.totals import Totals
from features.values import Floats, Lists, NumberLists, Texts, Type, Values, numbers_to_json, to_json

Ints = NDArray[np.int64]
Index = NDArray[np.intp]
Target = tuple[str, ...]
"""What values are about: the rows of one entity, or pairs of two."""
States = Mapping[str, Rows | Totals | GivenRows]
"""What is read, by the name of the bundle or the ordinary view."""
_NUMBERS: Final = ("int", "float", "bool")


class DerivedFeatureError(RuntimeError):
    """A derived feature's function raised, or answered with something else than one value a row."""


@dataclass(frozen=True)
class Asked:
    """What is asked of a program.

    `ids` has the entities' ids by entity name; `pairs` the rows (intp[p]) of each entity that make up the pairs that
    cross features are about; `overrides` values by entity and event field that stand in for what `last` knows.
    """

    ids: Mapping[str, Sequence[str]]
    pairs: Mapping[str, Index]
    overrides: Mapping[str, Mapping[str, Any]]

    @cached_property
    def texts(self) -> Mapping[str, pa.StringArray]:
        """The ids as Arrow has them."""
        return {entity: pa.array(ids, pa.string()) for entity, ids in self.ids.items()}


@dataclass(frozen=True, eq=False)
class GivenView:
    """An ordinary view of a program: what its rows are about and have, and the features that are wanted of it.

    `by_key` are the entities sorted by the names of their keys: so their ids stand in the view's own.
    """

    view: str
    target: Target
    fields: Fields
    ttl_us: int
    features: Mapping[str, Feature]
    by_key: tuple[str, ...]

    @property
    def name(self) -> str:
        """What its rows are called among those of bundles."""
        return f"@{self.view}"

    def ids(self, asked: Asked) -> pa.StringArray:
        """Of whom the rows are, one for each row of the entity, or for each pair: see `features.plan.id_of`."""
        if len(self.by_key) == 1:
            return asked.texts[self.by_key[0]]
        parts = [asked.texts[entity].take(pa.array(asked.pairs[entity])) for entity in self.by_key]
        words = (word for part in parts for word in (pc.binary_length(part).cast(pa.string()), ":", part))
        return pc.binary_join_element_wise(*words, "")


class Program:
    """Some features of a plan, ready to be evaluated. Families named in `alone` are read apart from the others.

    Attributes:
        features: what was asked for, in order.
        bundles: the rows that are read.
        given: the ordinary views that are read.
        entities: what they are about.

    Raises:
        CodeChangedError: if the code of a derived feature is not what was applied.
    """

    def __init__(self, plan: Plan, full_names: Iterable[str], alone: Container[str] = ()) -> None:
        self.features = tuple(plan.features[name] for name in full_names)
        needed: dict[str, Feature] = {}
        for feature in self.features:
            _collect(plan, feature, needed)
        self.entities = tuple(dict.fromkeys(entity for feature in needed.values() for entity in feature.entities))
        self._targets: dict[str, Target] = {name: feature.entities for name, feature in needed.items()}
        self._row_of: dict[str, int] = {}
        """Of numbers (and codes of texts): the row in their target's block."""
        self._n_rows: dict[Target, int] = {}
        self._stages = _stages(plan, needed, alone)
        self._stage_of = {name: stage for stage in self._stages for name in stage.names}
        for stage in self._stages:
            stage.first_row = self._n_rows.setdefault((stage.bundle.entity,), 0)
            for name in stage.evaluator.names:
                self._place(name, (stage.bundle.entity,))
        self.given = _given(plan, needed)
        self._given_of = {name: view for view in self.given for name in view.features}
        for name, view in self._given_of.items():
            if needed[name].value_type in _NUMBERS:
                self._place(name, view.target)
        computed = [feature for name, feature in needed.items() if name not in self._stage_of]
        self._look_ups = self._gather_look_ups(plan, computed)
        self._derived: list[tuple[Feature, Derived, Callable[..., Any], list[tuple[Target, int | str]]]] = []
        for feature in computed:
            if isinstance(feature.spec, Derived):
                self._place(feature.full_name, feature.entities)
                args = [self._argument(arg, feature.entities) for arg in feature.spec.args]
                self._derived.append((feature, feature.spec, find_function(feature.spec), args))
        self._last = {
            (feature.entities[0], feature.spec.field): feature.full_name
            for feature in needed.values()
            if isinstance(feature.spec, Last) and not feature.spec.over
        }

    @cached_property
    def matrix_places(self) -> tuple[list[Target], Ints]:
        """The blocks that a matrix is made of, and each column's (block, row)."""
        targets = list(self._n_rows)
        places = [(targets.index(self._targets[name]), self._row_of[name]) for name in self.matrix_names]
        return targets, np.array(places, np.int64).reshape(-1, 2)

    @cached_property
    def numbers(self) -> dict[Target, dict[Type, tuple[list[str], Index]]]:
        """The features that are numbers, by what they are about and their type: names, and rows in the block."""
        found: dict[Target, dict[Type, list[str]]] = {}
        for each in self.features:
            # A given whole number may be one that no float64 is.
            if each.full_name in self.matrix_names and (each.value_type != "int" or not isinstance(each.spec, Given)):
                found.setdefault(each.entities, {}).setdefault(each.value_type, []).append(each.full_name)
        return {
            target: {kind: (names, np.array([self._row_of[name] for name in names])) for kind, names in kinds.items()}
            for target, kinds in found.items()
        }

    @property
    def overridable(self) -> dict[tuple[str, str], Type]:
        """The (entity, event field) that a value can be given for instead of what is known (`Asked`), and its type."""
        of_last = ((entity, str(field), name) for (entity, field), name in self._last.items())
        return {(entity, field): self._stage_of[name].type_of(name) for entity, field, name in of_last}

    @property
    def bundles(self) -> tuple[Bundle, ...]:
        """What is read: families of one entity together."""
        return tuple(stage.bundle for stage in self._stages)

    def evaluate(self, states: States, asked: Asked, now_ms: int | Mapping[str, Ints]) -> Frame:
        """All features at `now_ms`, from the rows of every bundle by name, or their totals as of then.

        `now_ms` is one time for all, or a time for each row of each entity (int64[n]); the entities of a pair have the
        same.
        """
        return Frame(self, states, asked, now_ms)

    def explain(self, states: States, entity: str, row: int, now_ms: int) -> dict[str, dict[str, Any]]:
        """How each stored feature of one row comes about: window bounds, entries, buckets kept and at most, last event,
        version of the row.

        The program must have been made with every family `alone`, and the states be rows.
        """
        found: dict[str, dict[str, Any]] = {}
        for stage in self._stages:
            if stage.bundle.entity != entity:
                continue
            state, (family,) = states[stage.bundle.name], stage.bundle.families
            assert isinstance(state, Rows)  # noqa: S101  # for the type checker: who asks for this reads rows
            last_ms = int(state.last_event_ms[row])
            for feature, slots in stage.features:
                assert feature.window is not None  # noqa: S101  # for the type checker: every aggregation has one
                entries, tail = state.tables[slots[0][0]], feature.window.tail_ticks(now_ms)
                inside = entries.rows == row
                if entries.starts is not None:
                    inside &= (entries.starts >= tail) & (entries.starts <= now_ms // TICK_MS)
                found[feature.full_name] = {
                    "from": None if feature.window.unbounded else tail * TICK_MS,
                    "to": now_ms,
                    "entries": int(inside.sum()),
                    **_buckets(stage.bundle.tables[slots[0][0]].table, entries, row),
                    "last_event_at": last_ms if last_ms >= 0 else None,
                    "row": f"{family.name}:{family.tag.hex()}",
                }
        return found

    def _place(self, name: str, target: Target) -> None:
        """Gives a number its row."""
        self._targets[name] = target
        self._row_of[name] = self._n_rows.get(target, 0)
        self._n_rows[target] = self._row_of[name] + 1

    def _argument(self, arg: str | At | Contains, target: Target) -> tuple[Target, int | str]:
        """Where an argument of a derived feature stands: its row in the block, or of a sequence its name."""
        name = arg if isinstance(arg, str) else _anonymous(arg, target)
        if name in self._stage_of and isinstance(self._stage_of[name].names[name][0].spec, EventSequence):
            return self._targets[name], name
        if name not in self._row_of or (name in self._stage_of and self._stage_of[name].is_text(name)):
            msg = f"{name} is no number"
            raise TypeError(msg)
        return self._targets[name], self._row_of[name]

    @cached_property
    def matrix_names(self) -> tuple[str, ...]:
        """The features that a matrix holds: numbers and truth values, in order."""
        return tuple(each.full_name for each in self.features if each.value_type in _NUMBERS)

    def _gather_look_ups(self, plan: Plan, computed: list[Feature]) -> list[_LookUps]:
        """Lookups, those together that look in the same bundle for texts of the same kind."""
        found: dict[Any, _LookUps] = {}
        for feature in computed:
            inner = feature.spec.args if isinstance(feature.spec, Derived) else (feature.spec,)
            for spec in inner:
                if isinstance(spec, At | Contains):
                    stage, key = self._stage_of.get(spec.of), spec.key if isinstance(spec, At) else None
                    of = plan.features[spec.of].entities
                    holder = spec.entity if isinstance(spec, Contains) else self._targets[spec.key][0]
                    name = feature.full_name if spec is feature.spec else _anonymous(spec, feature.entities)
                    compiled = stage.look_up(spec) if stage else None
                    # What has to be ranked first, or is given, is looked up by itself.
                    alone = name if compiled is None else None
                    kind = (stage and stage.bundle.name, feature.entities, holder, key is None, alone)
                    group = found.setdefault(kind, _LookUps(stage, of, feature.entities, holder))
                    group.add(name, spec, key, compiled)
        for group in found.values():
            group.first_row = self._n_rows.get(group.target, 0)
            for name in group.names:
                self._place(name, group.target)
        return list(found.values())


class Frame:
    """The answer: an entity's features have a value for each of its rows, cross features one for each pair.

    Attributes:
        found: by entity, bool[n]: which rows have ever had an event, or are in an ordinary view.
        last_event_ms: by entity, int64[n]: the last event's time; -1 for none.
        given: by ordinary view, its rows.
        beyond: how many numbers are null as they are beyond float64's range, or NaN in the matrix as beyond float32's.
    """

    def __init__(self, program: Program, states: States, asked: Asked, now_ms: int | Mapping[str, Ints]) -> None:
        self.found: dict[str, NDArray[np.bool_]] = {}
        self.last_event_ms: dict[str, Ints] = {}
        self._program, self._asked = program, asked
        if isinstance(now_ms, int):
            now_ms = dict.fromkeys(asked.ids, np.array([now_ms]))
        self._now_ms = now_ms
        self._totals: dict[str, Totals] = {}
        self._others: dict[str, Values] = {}
        self.beyond = 0
        n_pairs = len(next(iter(asked.pairs.values()), ()))
        self._blocks: dict[Target, Floats] = {
            target: np.empty((n_rows, len(asked.ids[target[0]]) if len(target) == 1 else n_pairs))
            for target, n_rows in program._n_rows.items()
        }
        for stage in program._stages:
            state, entity = states[stage.bundle.name], stage.bundle.entity
            assert not isinstance(state, GivenRows)  # noqa: S101  # for the type checker: a bundle has rows of ours
            latest = state.last_event_ms
            if entity in self.last_event_ms:
                latest = np.maximum(latest, self.last_event_ms[entity])
            self.last_event_ms[entity], self.found[entity] = latest, latest >= 0
            totals = self._totals[stage.bundle.name] = stage.evaluator.fold(state, now_ms[entity])
            self.beyond += stage.evaluator.write(totals, now_ms[entity], self._block_of(stage))
        self.given: dict[str, GivenRows] = {}
        for view in program.given:
            self._take(view, states[view.name])
        for entity, fields in asked.overrides.items():
            for field, column in fields.items():
                if (name := program._last.get((entity, field))) is not None:
                    self._override(name, column)
        for group in program._look_ups:
            self._look_up(group)
        if program._derived:
            with np.errstate(all="ignore"):
                for derived in program._derived:
                    self._derive(*derived)

    @property
    def values(self) -> Mapping[str, Values]:
        """Values by full name; lists and maps are made when they are asked for."""
        return _FrameValues(self)  # Kept, it would be a cycle: large, and seldom looked for.

    def to_json(self, target: Target) -> dict[str, list[Any]]:
        """Values of all features about a target, by full name: see `features.values.to_json`."""
        program = self._program
        found: dict[str, list[Any]] = {}
        for kind, (names, rows) in program.numbers.get(target, {}).items():
            found.update(zip(names, numbers_to_json(self._blocks[target][rows], kind), strict=True))
        for each in program.features:
            if each.entities == target and each.full_name not in found:
                found[each.full_name] = to_json(self._value(each.full_name), each.value_type)
        return found

    def matrix(self) -> NDArray[np.float32]:
        """float32[pairs, features]: numbers, each pair's in a row; those of an entity stand in all of its pairs."""
        targets, places = self._program.matrix_places
        pairs = self._asked.pairs
        n = len(next(iter(pairs.values())))
        blocks = tuple(self._blocks[target] for target in targets)
        rows = tuple(pairs[target[0]] if len(target) == 1 else np.arange(n) for target in targets)
        matrix = np.empty((n, len(places)), np.float32)
        if len(places):
            self.beyond += fill(blocks, places, rows, matrix)
        return matrix

    def _take(self, view: GivenView, rows: Any) -> None:
        """Takes the numbers out of an ordinary view's rows."""
        now_ms = self._now_ms[view.target[0]]
        if len(view.target) > 1 and len(now_ms) > 1:
            now_ms = now_ms[self._asked.pairs[view.target[0]]]
        self.given[view.view] = rows = rows.limited(now_ms * 1000, view.ttl_us)
        for name, feature in view.features.items():
            if name in self._program._row_of:
                self._number(name)[:] = rows.number(feature.name)
        if len(view.target) == 1:
            (entity,) = view.target
            self.last_event_ms.setdefault(entity, np.full(len(rows.found), -1))
            self.found[entity] = rows.found | self.found.get(entity, False)

    def _number(self, name: str) -> Floats:
        program = self._program
        row: Floats = self._blocks[program._targets[name]][program._row_of[name]]
        return row

    def _block_of(self, stage: _Stage) -> Floats:
        first = stage.first_row
        return self._blocks[stage.bundle.entity,][first : first + len(stage.evaluator.names)]

    def _value(self, name: str) -> Values:
        program = self._program
        if name in self._others:
            return self._others[name]
        if name in program._given_of:
            view = program._given_of[name]
            given = self.given[view.view].value(view.features[name].name)
            if isinstance(given, np.ndarray):
                return self._number(name)
            self._others[name] = given
            return given
        stage = program._stage_of.get(name)
        if stage is None or (name in program._row_of and not stage.is_text(name)):
            return self._number(name)
        totals = self._totals[stage.bundle.name]
        now_ms = self._now_ms[stage.bundle.entity]
        value = stage.evaluator.value(name, totals, now_ms, self._block_of(stage))
        if not isinstance(value, np.ndarray):
            self._others[name] = value
        return value

    def _override(self, name: str, column: Any) -> None:
        """Puts the values of `column` (None for none) in place of a feature's."""
        values = self._value(name)
        if isinstance(values, Texts):
            given = pa.array(column, pa.string())
            own = np.arange(len(column)) + len(values.texts)
            self._others[name] = Texts(
                np.where(np.asarray(given.is_valid()), own, values.codes),
                pa.concat_arrays([values.texts, given.fill_null("")]),
            )
        else:
            numbers = np.array([np.nan if value is None else value for value in column], np.float64)
            row = self._number(name)
            row[:] = np.where(np.isnan(numbers), row, numbers)

    def _look_up(self, group: _LookUps) -> None:
        asked, target = self._asked, group.target
        n = self._blocks[target].shape[1]
        owners = np.arange(n) if target == group.of or len(group.of) > 1 else asked.pairs[group.of[0]]
        texts, codes = zip(*(self._texts(key, group.holder) for key in group.keys), strict=True)
        if any(each is not texts[0] for each in texts):
            # Overridden ones have texts of their own.
            codes = tuple(
                each + start for each, start in zip(codes, accumulate([0, *map(len, texts[:-1])]), strict=True)
            )
            texts = (pa.concat_arrays(texts),)
        wanted = np.array(codes)
        if target != (group.holder,):
            wanted = wanted.take(asked.pairs[group.holder], axis=1)
        block = self._blocks[target][group.first_row : group.first_row + len(group.names)]
        if group.stage is not None and group.ranked is None:
            totals, now_ms = self._totals[group.stage.bundle.name], self._now_ms[group.stage.bundle.entity]
            totals.look_ups(group.arrays, owners, wanted, buffers(texts[0]), now_ms, block)
        else:
            assert group.ranked is not None  # noqa: S101  # as below
            lists = self._value(group.ranked)
            assert isinstance(lists, Lists)  # noqa: S101  # as above
            known = lists.codes >= 0
            look_up(
                lists.rows[known],
                lists.codes[known],
                np.ones(np.count_nonzero(known)),
                *buffers(lists.texts),
                owners,
                wanted[0],
                *buffers(texts[0]),
                0.0,
                block[0],
            )

    def _texts(self, key: str | None, holder: str) -> tuple[pa.StringArray, Floats]:
        """The texts of a feature, or the ids of an entity: what codes stand for, and float64[n], NaN for null."""
        if key is None:
            ids = self._asked.texts[holder]
            return ids, np.arange(len(ids), dtype=np.float64)
        stage = self._program._stage_of.get(key)
        if stage is not None and key not in self._others and not stage.has_default(key):
            return self._totals[stage.bundle.name].texts, self._number(key)
        values = self._value(key)
        assert isinstance(values, Texts)  # noqa: S101  # for the type checker: checked when the plan is compiled
        return values.texts, np.where(values.codes < 0, np.nan, values.codes)

    def _derive(
        self, feature: Feature, spec: Derived, function: Callable[..., Any], places: list[tuple[Target, int | str]]
    ) -> None:
        target, blocks = feature.entities, self._blocks
        arrays = [(own, blocks[own][row] if isinstance(row, int) else self._padded(row)) for own, row in places]
        args = [array if own == target else array[self._asked.pairs[own[0]]] for own, array in arrays]
        out = self._number(feature.full_name)
        try:
            result = np.asarray(function(*args), np.float64)
            if result.shape != out.shape:
                result = np.broadcast_to(result, out.shape)
        except Exception as error:
            msg = f"{feature.full_name}: its function failed on {len(out)} rows: {type(error).__name__}: {error}"
            raise DerivedFeatureError(msg) from error
        out[:] = result
        self.beyond += tidy(out, np.nan if spec.default is None else spec.default)

    def _padded(self, name: str) -> Floats:
        """float64[n, k]: a sequence of numbers, NaN behind the last."""
        lists, spec = self._value(name), self._program._stage_of[name].names[name][0].spec
        assert isinstance(lists, NumberLists)  # noqa: S101  # for the type checker: checked when the plan is compiled
        assert isinstance(spec, EventSequence)  # noqa: S101  # as above
        return lists.padded(spec.k)


class _FrameValues(Mapping[str, Values]):
    """See `Frame.values`."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame

    def __getitem__(self, name: str) -> Values:
        if name not in self._frame._program._targets:
            raise KeyError(name)
        return self._frame._value(name)

    def __iter__(self) -> Iterator[str]:
        program = self._frame._program
        numbers = (name for name in program._row_of if "(" not in name)
        return iter(dict.fromkeys([*program._stage_of, *program._given_of, *numbers]))

    def __len__(self) -> int:
        return len(list(iter(self)))


class _Stage:
    """A bundle of a program, and what is evaluated of it; `first_row` is where its numbers stand in the block."""

    def __init__(self, bundle: Bundle, features: Sequence[Wanted]) -> None:
        self.bundle, self.features = bundle, features
        self.evaluator = Evaluator(bundle, features)
        self.names = {feature.full_name: (feature, slots) for feature, slots in features}
        self.first_row = 0

    def type_of(self, name: str) -> Type:
        """The type of a feature."""
        return self.names[name][0].value_type

    def is_text(self, name: str) -> bool:
        """Whether a feature is a text."""
        return self.names[name][0].value_type == "str"

    def has_default(self, name: str) -> bool:
        """Whether a feature has a default."""
        return self.names[name][0].default is not None

    def look_up(self, spec: At | Contains) -> tuple[Numeric, float] | None:
        """The number that a lookup finds, and the one where it finds nothing; None if a list must be ranked first."""
        feature, slots = self.names[spec.of]
        of = feature.spec
        assert isinstance(of, Aggregation)  # noqa: S101  # for the type checker: stages have no others
        assert feature.window is not None  # noqa: S101  # as above
        if isinstance(spec, At):
            return numeric(self.bundle, of, feature.window, slots), of.without_events
        if not isinstance(of, LastK):
            return None
        table, partial = slots[0]
        place = (table, self.bundle.tables[table].slices[partial].start)
        return Numeric(Formula.SINCE, place, place, 0, feature.window, (0.0, 0.0, 0.0), None), 0.0


class _LookUps:
    """Lookups in the maps and lists of one bundle, for one target; `first_row` is where they stand in its block.

    Attributes:
        stage: of the bundle; None of a given list.
        of: what the maps or lists are about.
        keys: features whose texts are looked for; None for the ids of the holder.
        ranked: the list feature that must be ranked first, if there is one.
    """

    def __init__(self, stage: _Stage | None, of: Target, target: Target, holder: str) -> None:
        self.stage, self.of, self.target, self.holder = stage, of, target, holder
        self.names: list[str] = []
        self.keys: list[str | None] = []
        self.ranked: str | None = None
        self.first_row = 0
        self._found: list[tuple[int, Numeric, float]] = []

    def add(self, name: str, spec: At | Contains, key: str | None, compiled: tuple[Numeric, float] | None) -> None:
        """One more lookup."""
        if name in self.names:
            return
        self.names.append(name)
        if key not in self.keys:
            self.keys.append(key)
        if compiled is None:
            self.ranked = spec.of
        else:
            self._found.append((self.keys.index(key), *compiled))

    @cached_property
    def arrays(self) -> tuple[Ints, Ints, Floats, Floats]:
        """As `features.formulas.look_ups` takes them."""
        keys, numerics, nothing = zip(*self._found, strict=True)
        return np.array(keys), *formulas(numerics), np.array(nothing, np.float64)


def _buckets(table: Table, entries: Entries, row: int) -> dict[str, int]:
    """How many buckets a row keeps, and at most: those beyond were evicted, the ones seen longest ago first."""
    if entries.buckets is None or table.bound is None:
        return {}
    return {"buckets": len(np.unique(entries.buckets[entries.rows == row])), "buckets_max": table.bound}


def _stages(plan: Plan, needed: Mapping[str, Feature], alone: Container[str]) -> list[_Stage]:
    slots = slots_of(plan)
    together: dict[str, dict[Family, None]] = {}
    for name in needed:
        if name in slots:
            family = slots[name][0]
            together.setdefault(family.name if family.name in alone else family.entity, {})[family] = None
    stages = []
    for families in together.values():
        ends = accumulate(len(family.tables) for family in families)
        first_table = dict(zip(families, [0, *ends], strict=False))
        features = [
            (feature, [(first_table[slots[name][0]] + table, partial) for table, partial in slots[name][1]])
            for name, feature in needed.items()
            if name in slots and slots[name][0] in first_table
        ]
        stages.append(_Stage(Bundle(tuple(families)), features))
    return stages


def _given(plan: Plan, needed: Mapping[str, Feature]) -> tuple[GivenView, ...]:
    found: dict[str, dict[str, Feature]] = {}
    for name, feature in needed.items():
        if isinstance(feature.spec, Given):
            found.setdefault(feature.view, {})[name] = feature
    views = []
    for name, features in found.items():
        view = plan.view(name)
        fields = Fields.of((spec.name, spec.dtype) for spec in view.given)
        ttl_us = 0 if view.ttl_ms is msgspec.UNSET else view.ttl_ms * 1000
        by_key = tuple(sorted(view.entities, key=lambda entity: plan.entity(entity).key))
        views.append(GivenView(name, view.entities, fields, ttl_us, features, by_key))
    return tuple(views)


def _collect(plan: Plan, feature: Feature, needed: dict[str, Feature]) -> None:
    """Adds a feature after all that it is computed from."""
    for name in arguments(feature.spec):
        if name not in needed:
            _collect(plan, plan.features[name], needed)
    needed.setdefault(feature.full_name, feature)


def _anonymous(spec: At | Contains, target: Target) -> str:
    """What a lookup that is only an argument is called: as no feature can be."""
    return f"{spec}({','.join(target)})"
