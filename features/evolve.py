"""From one plan to the next: what of a row's state goes on, and since when features know all their events.

A row is read by the layout that it was written with, and its columns become those of another layout that hold the same:
the same partial of the same events, whatever windows and neighbours it has. From a plan to one much later that goes
step by step, as each plan in between says what went on. See docs/decisions/0018-rows-outlive-plans.md.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Final, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from features.aggregations.base import Aggregation, Slot
from features.kernel import Rows, merge
from features.layout import Family, TableLayout, family_of, locate, view_of
from features.partials import Decay, Earliest, Seen
from features.plan import Feature, FeatureSpec, History, Known, Plan, ViewSpec, arguments, features_of
from features.times import Window

Column = tuple[int, int]
"""A table of a family, and a column of it."""

_ALWAYS_MS: Final = -1 << 62
_HALF_LIVES: Final = 64
"""After so many, what a decayed sum lacks is less than 2^-64 of an event each."""


class _Held(NamedTuple):
    """A slot of an aggregation, and what tells it from others of its view, whatever their windows."""

    spec: Aggregation
    slot: Slot

    @property
    def key(self) -> tuple[object, ...]:
        table, measure = self.slot.table, self.slot.measure
        return table.row, table.by, table.bucket, table.only, self.slot.partial, replace(measure, origin="")


Sources = Mapping[Aggregation, Sequence[_Held | None]]
"""By aggregation, what each of its slots goes on from."""


def succeed(applied: Plan | None, declared: Plan, taken_ms: Mapping[int, int] | None = None, now_ms: int = 0) -> Plan:
    """What is declared, as the plan that comes after the applied one: that one itself if nothing changes.

    It is numbered, and says of each aggregation with which plan its state began (`origin`), so that state that lacks
    what happened while nobody kept it is never taken for one without such a gap; and of each feature what it still
    lacks (`known`).

    Args:
        applied: the plan that runs, if there is any.
        declared: the plan of what is declared, never applied.
        taken_ms: when streams took up each plan, by its number: see `complete_from_ms`.
        now_ms: now, before any stream takes up the new plan.
    """
    if applied is None:
        return declared
    if as_declared(applied) == declared:
        return applied
    number = applied.number + 1
    successors: list[ViewSpec] = []
    known: dict[str, tuple[Known, ...]] = {}
    for view in declared.views:
        before = _predecessor(applied, declared, view)
        sources = _sources(before, view)
        successors.append(_with_origins(view, sources, str(number)))
        known.update(_Lacks(applied, before, number, dict(taken_ms or {}), now_ms).of_view(view, sources))
    generation = applied.generation
    return msgspec.structs.replace(declared, number=number, generation=generation, views=tuple(successors), known=known)


def as_declared(plan: Plan) -> Plan:
    """A plan without what its predecessors gave it."""
    views = [
        msgspec.structs.replace(
            view,
            features=tuple(
                msgspec.structs.replace(spec, origin="") if isinstance(spec, Aggregation) else spec
                for spec in view.features
            ),
            filling=(),
        )
        for view in plan.views
    ]
    return msgspec.structs.replace(plan, number=0, views=tuple(views), known={}, history=None, generation=0)


def backfilling(applied: Plan, full_names: Collection[str], history: History) -> Plan:
    """The plan after the applied one in which what some features are made of is kept a second time, from nothing.

    So each shard's stream gives it the events from where it takes this plan up, whatever their times; and what history
    must add are all events before, whatever the rows have of them. Features are served as before.

    Args:
        applied: the plan that runs.
        full_names: of features that keep state.
        history: what is added.
    """
    number = applied.number + 1
    specs = {id(applied.features[name].spec) for name in full_names}

    def begun(view: ViewSpec) -> ViewSpec:
        found = [spec for spec in view.features if isinstance(spec, Aggregation) and id(spec) in specs]
        filling = tuple(msgspec.structs.replace(spec, origin=str(number)) for spec in found)
        return msgspec.structs.replace(view, filling=filling)

    views = tuple(map(begun, applied.views))
    return msgspec.structs.replace(applied, number=number, views=views, history=history)


def backfilled(plan: Plan, lead_ms: Mapping[str, int]) -> Plan:
    """The plan after one of `backfilling`, once history was added: what was filled is what is served.

    Args:
        plan: the plan that runs.
        lead_ms: of each contract whose history does not have all events, how long before streams took up `plan` it
            begins.
    """
    views, known = [], dict(plan.known)
    for view in plan.views:
        filled = {spec.name: spec for spec in view.filling}
        features = tuple(filled.get(spec.name, spec) for spec in view.features)
        views.append(msgspec.structs.replace(view, features=features, filling=()))
        for feature in features_of(views[-1]):
            if feature.spec.name in filled:
                known.pop(feature.full_name, None)
                known |= _known(feature, plan.number, lead_ms)
    return msgspec.structs.replace(plan, number=plan.number + 1, views=tuple(views), known=known, history=None)


def rebuilt(declared: Plan, number: int, generation: int, lead_ms: Mapping[str, int]) -> Plan:
    """A plan whose rows were all made anew.

    Args:
        declared: the plan of what is declared, never applied.
        number: how many plans were applied before.
        generation: of the rows.
        lead_ms: as of `backfilled`, before streams take up this plan.
    """
    known: dict[str, tuple[Known, ...]] = {}
    for feature in declared.features.values():
        known |= _known(feature, number, lead_ms)
    return msgspec.structs.replace(declared, number=number, generation=generation, known=known)


def _known(feature: Feature, number: int, lead_ms: Mapping[str, int]) -> dict[str, tuple[Known, ...]]:
    """What a feature of contracts of which not all events are known says of itself."""
    measures = feature.spec.measures if isinstance(feature.spec, Aggregation) else ()
    leads = [lead_ms[each.event] for each in measures if each.event in lead_ms]
    return {feature.full_name: (Known(number, min(leads)),)} if leads else {}


def filling_alone(plan: Plan) -> Plan:
    """The plan with what is filled and nothing else: what history is to be added to."""
    views = [msgspec.structs.replace(view, features=()) for view in plan.views if view.filling]
    return msgspec.structs.replace(plan, views=tuple(views), services=())


def complete_from_ms(plan: Plan, taken_ms: Mapping[int, int]) -> dict[str, int | None]:
    """Since when each feature that lacks something is, or will be, what all its events give; None for never.

    One that is computed of others is complete when they all are.

    Args:
        plan: the plan.
        taken_ms: when streams took up each plan, by its number; one that none has taken up yet is not there.
    """
    found: dict[str, int | None] = {}
    for name, known in plan.known.items():
        since_ms, of_ms = _since_ms(known, taken_ms), span_ms(plan.features[name])
        found[name] = None if since_ms is None or of_ms is None else since_ms + of_ms
    for name in plan.features:
        _add_computed(plan, name, found)
    return found


def _add_computed(plan: Plan, name: str, found: dict[str, int | None]) -> None:
    """Adds when a feature is complete that is computed of others, and when they are."""
    for other in (others := arguments(plan.features[name].spec)):
        _add_computed(plan, other, found)
    if lacking := [found[other] for other in others if other in found]:
        found[name] = None if None in lacking else max(at_ms for at_ms in lacking if at_ms is not None)


def _since_ms(known: Iterable[Known], taken_ms: Mapping[int, int]) -> int | None:
    """Since when a feature knows all its events; None while no stream has taken up a plan that it names."""
    found = []
    for each in known:
        at_ms = taken_up_ms(taken_ms, each.plan)
        if at_ms is None:
            return None
        found.append(at_ms - each.lead_ms)
    return max(found, default=_ALWAYS_MS)


def taken_up_ms(taken_ms: Mapping[int, int], number: int) -> int | None:
    """When a plan was taken up: if no stream ran it, when the first later one was; None if none was."""
    if number in taken_ms:
        return taken_ms[number]
    return min((at_ms for other, at_ms in taken_ms.items() if other > number), default=None)


def span_ms(feature: Feature) -> int | None:
    """How long after the time since when a feature knows all its events it is complete; None for never."""
    spec, window = feature.spec, feature.window
    assert isinstance(spec, Aggregation)  # noqa: S101  # for the type checker: only these keep state
    assert window is not None  # noqa: S101  # as above
    if not window.unbounded:
        return spec.reach(window).width_ms + window.hop_ms
    half_lives = [slot.partial.half_life_ms for slot in spec.slots() if isinstance(slot.partial, Decay)]
    return _HALF_LIVES * max(half_lives) if half_lives else None


def _predecessor(applied: Plan, declared: Plan, view: ViewSpec) -> ViewSpec | None:
    """The view that had this one's rows: of the same entities, by the same keys."""
    before = next((each for each in applied.views if each.name == view.name), None)
    if before is None or before.entities != view.entities:
        return None
    same = all(applied.entity(name).key == declared.entity(name).key for name in view.entities)
    return before if same else None


def _sources(before: ViewSpec | None, after: ViewSpec) -> dict[Aggregation, list[_Held | None]]:
    """For each aggregation of a view, which slot of its predecessor each of its slots goes on from.

    First the one whose history was added for it; then the aggregation's own; then that of any other: of several the one
    with the longest window.
    """
    held: dict[object, list[_Held]] = {}
    for each in _held_by(before) if before else ():
        held.setdefault(each.key, []).append(each)

    def source(spec: Aggregation, slot: Slot) -> _Held | None:
        filled = [each for each in filling if each.origin == spec.origin]
        every = [
            each
            for each in held.get(_Held(spec, slot).key, ())
            if each.spec in filled or not (each.spec in filling or spec in after.filling)
        ]
        return max(
            every,
            key=lambda each: (each.spec in filled, each.spec.name == spec.name, each.slot.table.windows[-1]),
            default=None,
        )

    filling = before.filling if before else ()
    return {spec: [source(spec, slot) for slot in spec.slots()] for spec in after.aggregations}


def _held_by(view: ViewSpec) -> Iterator[_Held]:
    for spec in view.aggregations:
        for slot in spec.slots():
            yield _Held(spec, slot)


def _with_origins(view: ViewSpec, sources: Sources, fresh: str) -> ViewSpec:
    """The view, each aggregation with the origin of what it goes on from, or a fresh one.

    Two that would share a column from now on, and go on from different ones, are kept apart by a fresh one as well.
    """
    feeds: dict[Slot, Slot | None] = {}
    specs: list[FeatureSpec] = []
    for spec in view.features:
        if not isinstance(spec, Aggregation):
            specs.append(spec)
            continue
        own = [source.slot if source else None for source in sources[spec]]
        origins = {slot.measure.origin if slot else fresh for slot in own}
        origin = origins.pop() if len(origins) == 1 else fresh
        found = msgspec.structs.replace(spec, origin=origin)
        if any(feeds.setdefault(*pair) != pair[1] for pair in zip(found.slots(), own, strict=True)):
            found = msgspec.structs.replace(spec, origin=f"{fresh}.{spec.name}")
        specs.append(found)
    return msgspec.structs.replace(view, features=tuple(specs))


class _Lacks:
    """What features of a view lack that comes after one that is applied."""

    def __init__(
        self, applied: Plan, before: ViewSpec | None, number: int, taken_ms: dict[int, int], now_ms: int
    ) -> None:
        self._applied, self._number, self._now_ms = applied, number, now_ms
        # The new plan will be taken up later, so that what can be complete now must be without it.
        self._taken_ms = taken_ms | {number: now_ms}
        self._names: dict[str, dict[Window, str]] = {}
        for feature in features_of(before) if before else ():
            if isinstance(feature.spec, Aggregation) and feature.window is not None:
                reach = feature.spec.reach(feature.window)
                self._names.setdefault(feature.spec.name, {})[reach] = feature.full_name

    def of_view(self, view: ViewSpec, sources: Sources) -> Iterator[tuple[str, tuple[Known, ...]]]:
        """The features that lack something, by full name."""
        for feature in features_of(view):
            spec, window = feature.spec, feature.window
            if isinstance(spec, Aggregation) and window is not None:
                slots, reach = zip(spec.slots(), sources[spec], strict=True), spec.reach(window)
                every = dict.fromkeys(known for slot, source in slots for known in self._of_slot(slot, source, reach))
                if every and not self._is_complete(every, span_ms(feature)):
                    yield feature.full_name, tuple(every)

    def _of_slot(self, slot: Slot, source: _Held | None, window: Window) -> tuple[Known, ...]:
        nothing = (Known(self._number, 0),)
        if source is None:
            return nothing
        before, bound = source.slot.table, slot.table.bound
        if before.bound is not None and (bound is None or bound > before.bound):
            return nothing
        names = self._names[source.spec.name]
        without_tiles = not before.starts and not before.windows[0].unbounded
        if before.windows[0].unbounded and slot.table.windows == before.windows:
            # One state, whatever windows the aggregation has.
            return tuple(dict.fromkeys(known for name in names.values() for known in self._applied.known.get(name, ())))
        ways = [nothing]
        for each, name in names.items():
            # Tiles that `each` holds are as fine as those of `window`; what keeps no tiles knows all times.
            if each.hop_ticks > window.hop_ticks and not without_tiles:
                continue
            reach = () if each.width_ms >= window.width_ms else (Known(self._number, each.width_ms),)
            ways.append((*self._applied.known.get(name, ()), *reach))
        return min(ways, key=self._since_ms)

    def _since_ms(self, known: Iterable[Known]) -> int:
        since_ms = _since_ms(known, self._taken_ms)
        assert since_ms is not None  # noqa: S101  # for the type checker: the new plan stands for any that none took up
        return since_ms

    def _is_complete(self, known: Iterable[Known], span_ms: int | None) -> bool:
        if span_ms is None or any(each.plan == self._number for each in known):
            return False
        return self._since_ms(known) + span_ms <= self._now_ms


def columns_from(before: Plan, after: Plan, family: str) -> dict[Column, Column]:
    """For each column of a family of `after` that goes on from one of `before`, which one that is.

    The two are neighbours among the applied plans, in either order.
    """
    old, new = (_placed(plan, family) for plan in (before, after))
    if old is None or new is None:
        return {}
    sources = _sources(_predecessor(before, after, new.view), new.view)
    found: dict[Column, Column] = {}
    for spec in new.view.aggregations:
        for slot, source in zip(spec.slots(), sources[spec], strict=True):
            if slot.table.row == new.row and source is not None:
                target, origin = new.columns(slot), old.columns(source.slot)
                found.update(zip(target, origin, strict=True))
    for table, layout in enumerate(new.family.tables):
        _add_recency(layout, table, old, found)
    return found


def _add_recency(layout: TableLayout, table: int, old: _Placed, found: dict[Column, Column]) -> None:
    """When buckets were seen is no aggregation's: it goes on from any time that the same events have there."""
    for index, (partial, measure) in enumerate(layout.partials):
        place = (table, layout.slices[index].start)
        if not isinstance(partial, Seen) or place in found:
            continue
        for other, (_, its_measure) in enumerate(layout.partials):
            source = found.get((table, layout.slices[other].start))
            if its_measure == measure and source is not None and (time := old.time_beside(source)) is not None:
                found[place] = time


class _Placed(NamedTuple):
    """A family of a plan, with what finds a slot's columns in it."""

    view: ViewSpec
    row: str
    family: Family

    def columns(self, slot: Slot) -> list[Column]:
        """The columns of a slot."""
        table, partial = locate(self.family, slot)
        own = self.family.tables[table].slices[partial]
        return [(table, column) for column in range(own.start, own.stop)]

    def time_beside(self, column: Column) -> Column | None:
        """The column that says when the events of a column were last seen."""
        layout = self.family.tables[column[0]]
        placed = list(zip(layout.partials, layout.slices, strict=True))
        mine = next(measure for (_, measure), each in placed if each.start <= column[1] < each.stop)
        times = (
            each.start
            for (partial, measure), each in placed
            if measure == mine and partial.physical[0] == "time" and not isinstance(partial, Earliest)
        )
        return next(((column[0], time) for time in times), None)


def _placed(plan: Plan, name: str) -> _Placed | None:
    view, family = view_of(plan, name), family_of(plan, name)
    return _Placed(view, name.partition(".")[2], family) if view and family else None


def move(rows: Rows, before: Family, after: Family, columns: Mapping[Column, Column]) -> Rows:
    """Rows of one family as those of another: `columns` says where each of the other's columns comes from.

    A merge without events, at a time before all others: it sorts entries and folds those that meet, and nothing ages.
    """
    tables = [_entries(rows, before, table, layout, columns) for table, layout in enumerate(after.tables)]
    pool = np.concatenate([np.zeros(0, np.int64), *(lines.ravel() for lines in tables)])
    sizes = np.array([lines.shape[1] for lines in tables], np.int64)
    return merge(after, Rows.of_pool(after.alone, rows.latest_ms, pool, sizes, rows.texts), {}, now_ms=0).rows


def _entries(
    rows: Rows, before: Family, table: int, layout: TableLayout, columns: Mapping[Column, Column]
) -> NDArray[np.int64]:
    """int64[lines, entries]: a table, from all tables that any of its columns comes from, in no order."""
    first = layout.n_lines - len(layout.physical)
    mine = {column: source for (index, column), source in columns.items() if index == table}
    parts = [np.zeros((layout.n_lines, 0), np.int64)]
    for source in dict.fromkeys(each for each, _ in mine.values()):
        old, lines = before.tables[source], rows.lines(source)
        old_first = old.n_lines - len(old.physical)
        part = np.zeros((layout.n_lines, lines.shape[1]), np.int64)
        part[0] = lines[0]
        if layout.table.starts and old.table.starts:
            part[1] = lines[1]
        if layout.table.bucket is not None:
            part[first - 1] = lines[old_first - 1]
        part[first:] = layout.empty[:, None]
        holds = np.zeros(lines.shape[1], bool)
        for column, (index, old_column) in mine.items():
            if index == source:
                part[first + column] = lines[old_first + old_column]
                holds |= part[first + column] != layout.empty[column]
        parts.append(part[:, holds])
    return np.concatenate(parts, axis=1)
