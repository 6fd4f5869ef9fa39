"""What applying one plan over another means: each change with its consequence, and whether it takes consent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal

import msgspec

from features.evolve import as_declared, complete_from_ms
from features.plan import EventSpec, Feature, FeatureSpec, Plan, ServiceSpec, ViewSpec, arguments, features_of
from features.source import shown as shown_path

Kind = Literal["adds", "describes", "changes meaning", "removes", "breaks producers"]
What = Literal["feature", "view", "entity", "contract", "service"]
_DESCRIBING: Final = ("doc", "owner", "tags", "code", "expect", "id_type")
_BOUNDS: Final = ("k", "buckets")
"""Of which more holds all that less does."""
_WORDS: Final = ("title", "description", "default", "examples")
"""What of a field's schema says nothing of the values that it takes."""


class Change(msgspec.Struct, frozen=True):
    """One change: what it is of, what follows from it, and what has to be done first if it is in the way.

    Attributes:
        name: as `apply --replace` takes it: `view.feature`, or that of a view, entity, contract or service.
        consent: whether it is applied only with `--replace {name}`.
        refused: what has to be done first, if it is never applied as it is.
    """

    kind: Kind
    what: What
    name: str
    consequence: str
    consent: bool = False
    refused: str = ""

    def __str__(self) -> str:
        remedy = self.refused or (f"If that is as meant: `--replace {self.name}`" if self.consent else "")
        return f"{self.kind} {self.what} {self.name}: {self.consequence}{'. ' if remedy else ''}{remedy}"


def changes(applied: Plan | None, plan: Plan, now_ms: int, taken_ms: Mapping[int, int] | None = None) -> list[Change]:
    """What applying a plan changes; nothing when it is what is applied.

    Args:
        applied: the plan that runs, if there is any.
        plan: the one that comes after it: see `features.evolve.succeed`.
        now_ms: when streams take it up, for what that decides.
        taken_ms: when streams took up earlier plans, by number.
    """
    return list(_Comparison(applied, plan, now_ms, {**(taken_ms or {}), plan.number: now_ms}).changes())


def in_the_way(plan: Plan, found: Iterable[Change], replace: Iterable[str]) -> list[Change]:
    """Those that are not applied, although what needs consent may be where `replace` names it, or its view.

    Raises:
        ValueError: if the plan has nothing of a name that is to be replaced.
    """
    agreed = set(replace)
    names = {spec.name for specs in (plan.entities, plan.events, plan.views, plan.services) for spec in specs}
    names |= {f"{view.name}.{spec.name}" for view in plan.views for spec in view.features}
    if unknown := sorted(agreed - names):
        msg = f"--replace {unknown[0]}: nothing declared has this name; write it as `headrace plan` does"
        raise ValueError(msg)
    return [
        each
        for each in found
        if each.refused or (each.consent and not {each.name, each.name.partition(".")[0]} & agreed)
    ]


class _Comparison:
    """Two plans, side by side."""

    def __init__(self, applied: Plan | None, plan: Plan, now_ms: int, taken_ms: Mapping[int, int]) -> None:
        nothing = msgspec.structs.replace(plan, entities=(), events=(), views=(), services=())
        self._before, self._after = as_declared(applied or nothing), as_declared(plan)
        self._now_ms = now_ms
        self._empty = {
            (view.name, spec.name)
            for view in plan.views
            for spec in view.aggregations
            if spec.origin.partition(".")[0] == str(plan.number)
        }
        self._complete_ms = complete_from_ms(plan, taken_ms)

    def changes(self) -> Iterator[Change]:
        """All of them: what features are made of, features, what reads them."""
        before, after = self._before, self._after
        yield from self._named("entity", before.entities, after.entities)
        yield from self._named("contract", before.events, after.events)
        yield from self._named("view", before.views, after.views)
        yield from self._named("service", before.services, after.services)

    def _named(self, what: What, before: tuple[Any, ...], after: tuple[Any, ...]) -> Iterator[Change]:
        """All changes of things of one kind, by what is called the same."""
        old, new = ({spec.name: spec for spec in specs} for specs in (before, after))
        for name, spec in new.items():
            if name not in old:
                yield Change("adds", what, name, self._what_is(spec))
            elif spec != old[name]:
                order = Change(
                    "describes", what, name, "its parts are in another order, or its fields say it otherwise"
                )
                yield from list(self._changed(what, old[name], spec)) or [order]
        for name, spec in old.items():
            if name not in new:
                names = [each.full_name for each in features_of(spec)] if isinstance(spec, ViewSpec) else []
                yield Change("removes", what, name, self._what_goes(spec), refused=self._who_reads(names))

    def _what_is(self, spec: Any) -> str:
        match spec:
            case EventSpec():
                return self._where_it_begins(spec)
            case ViewSpec():
                own = list(features_of(spec))
                return f"{len(own)} features of {' and '.join(spec.entities)}, {self._since(own)}"
            case ServiceSpec():
                return f"it serves {len(spec.features)} features"
            case _:
                return f"by {spec.key}"

    def _where_it_begins(self, spec: EventSpec) -> str:
        """From where on the stream has a new contract's events."""
        said = [
            f"it goes by records of topic {topic} from where the stream is by now"
            if topic in self._before.topics
            else f"the stream reads topic {topic} from its beginning"
            for topic in spec.topics
        ]
        said += [f"of which its are those where {each}" for each in spec.reads.when]
        return ", ".join(said) + _repeats(spec)

    def _what_goes(self, spec: Any) -> str:
        match spec:
            case EventSpec():
                read = [topic for topic in spec.topics if topic in self._after.topics]
                gone = [f"topic {topic} is no longer read" for topic in spec.topics if topic not in read]
                return ", ".join(gone + [f"its records in topic {topic} are passed over" for topic in read])
            case ViewSpec():
                return "its rows are read by nobody, and go when Redis forgets them"
            case ServiceSpec():
                return "who asks for it gets 404 from servers of this plan"
            case _:
                return "no view is of it any more"

    def _changed(self, what: What, old: Any, new: Any) -> Iterator[Change]:
        """Changes of one thing that stays."""
        yield from _described(what, old.name, old, new)
        match old, new:
            case EventSpec(), EventSpec():
                yield from _contract_changes(old, new)
            case ViewSpec(), ViewSpec():
                yield from self._view_changes(old, new)
            case ServiceSpec(), ServiceSpec():
                yield from _service_changes(old, new)
            case _:
                if said := _said(old, new):
                    consequence = f"{said}: it holds for rows that are there as they are next written"
                    yield Change("changes meaning", what, new.name, consequence, consent=True)

    def _view_changes(self, old: ViewSpec, new: ViewSpec) -> Iterator[Change]:
        if old.entities != new.entities:
            own = list(features_of(new))
            consequence = (
                f"of {' and '.join(new.entities)}, no longer {' and '.join(old.entities)}: all its features start "
                f"empty, {self._since(own)}{self._read_by(each.full_name for each in features_of(old))}"
            )
            yield Change("changes meaning", "view", new.name, consequence, consent=True)
            return
        before, after = ({spec.name: spec for spec in view.features} for view in (old, new))
        other = {name for name in before if name in after and _meaning(before[name]) != _meaning(after[name])}
        for name in before:
            if name in other:
                yield self._feature_change(new, before[name], after[name])
            elif name in after:
                yield from _described("feature", f"{new.name}.{name}", before[name], after[name])
        there, wanted = ({each.full_name: each for each in features_of(view)} for view in (old, new))
        for full_name, feature in wanted.items():
            if full_name not in there and feature.spec.name not in other:
                yield Change("adds", "feature", f"{new.name}.{feature.name}", self._since([feature]))
        for full_name, feature in there.items():
            if full_name not in wanted:
                consequence = "its state goes as rows are rewritten, and servers of the old plan then find none"
                refused = self._who_reads([full_name])
                yield Change("removes", "feature", f"{old.name}.{feature.name}", consequence, refused=refused)

    def _feature_change(self, view: ViewSpec, old: FeatureSpec, new: FeatureSpec) -> Change:
        """What becomes of a feature that keeps its name and is computed otherwise."""
        own = [each for each in features_of(view) if each.spec == new]
        said = _said(old, new)
        if (view.name, new.name) in self._empty:
            said += ", so it starts empty"
        consequence = f"{said}: {self._since(own)}{self._read_by(each.full_name for each in own)}"
        less = _without_bounds(old) != _without_bounds(new) or any(
            (getattr(new, name, None) or 0) < (getattr(old, name, None) or 0) for name in _BOUNDS
        )
        kind: Kind = "changes meaning" if less else "adds"
        return Change(kind, "feature", f"{view.name}.{new.name}", consequence, consent=less)

    def _since(self, features: Iterable[Feature]) -> str:
        """When features will have all that their events give."""
        found = {each.full_name: self._complete_ms.get(each.full_name, 0) for each in features}
        never = [name.replace("__", ".", 1) for name, at_ms in found.items() if at_ms is None]
        at_ms = max((at_ms for at_ms in found.values() if at_ms is not None), default=0)
        said = [f"complete from {when(at_ms)} if streams take it up now"] if at_ms > self._now_ms else []
        if never:
            everything = len(never) == len(found)
            said.append(f"{'with' if everything else ', '.join(never) + ' with'} what comes from then on only")
        return ", and ".join(said) or "complete at once"

    def _read_by(self, full_names: Iterable[str]) -> str:
        """Who computes with features, in the plan that comes, and which services have them."""
        names = set(full_names)
        features = self._after.features.values()
        while more := {each.full_name for each in features if names & set(arguments(each.spec))} - names:
            names |= more
        readers = [f"service {each.name}" for each in self._after.services if names & set(each.features)]
        return f"; read by {', '.join(readers)}" if readers else ""

    def _who_reads(self, full_names: Iterable[str]) -> str:
        """Why features can't be removed: the applied services that have them."""
        names = set(full_names)
        readers = [each.name for each in self._before.services if names & set(each.features)]
        if not readers:
            return ""
        return f"Applied services name it: {', '.join(readers)}. Apply those without it, then this when nobody reads it"


def when(at_ms: int) -> str:
    """A time for people: RFC 3339, UTC, to the second."""
    return datetime.fromtimestamp(at_ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _described(what: What, name: str, old: Any, new: Any) -> Iterator[Change]:
    said = [field for field in _DESCRIBING if getattr(old, field, None) != getattr(new, field, None)]
    if said:
        otherwise = {"code": "it is declared in another place"}
        if "expect" in said:
            expected = ", ".join(map(str, new.expect or ())) or "nothing"
            otherwise["expect"] = f"{expected} is expected of its events, which refuses none"
        yield Change("describes", what, name, ", ".join(otherwise.get(field, f"another {field}") for field in said))


def _repeats(spec: EventSpec) -> str:
    identity = spec.reads.event_id
    known = identity is None or bool(identity.at)
    return "" if known else "; its events have no id but their place in Kafka: what a producer sends twice counts twice"


def _contract_changes(old: EventSpec, new: EventSpec) -> Iterator[Change]:
    gained, lost = ([topic for topic in of.topics if topic not in by.topics] for of, by in ((new, old), (old, new)))
    if gained and not lost:
        yield Change("adds", "contract", new.name, f"topic {', '.join(gained)} is read too, from its beginning")
    elif lost:
        consequence = f"topic {', '.join(gained or new.topics)} is read from its beginning; " if gained else ""
        consequence += f"what is still unread in {', '.join(lost)} is lost"
        yield Change("breaks producers", "contract", new.name, consequence, consent=True)
    yield from _source_changes(old, new)
    before, after = _fields_of(old), _fields_of(new)
    for name in [*after, *(name for name in before if name not in after)]:
        yield from _field_change(new, name, before.get(name), after.get(name))


def _source_changes(old: EventSpec, new: EventSpec) -> Iterator[Change]:
    """What is found elsewhere in records, or written otherwise."""
    before, after = old.reads, new.reads
    said = []
    for name, what in (
        ("when", "its records are those where"),
        ("occurred_at", "the time is"),
        ("event_id", "the identity is"),
        ("format", "records are written as"),
        ("schema", "records have another schema"),
        ("envelope", "what is around them is"),
    ):
        if (found := getattr(after, name)) != getattr(before, name):
            shown = " and ".join(map(str, found)) if name == "when" else str(found or "as by default")
            said.append(what if name == "schema" else f"{what} {shown or 'all'}")
    for name in dict.fromkeys([*before.paths, *after.paths]):
        paths, others = (source.paths.get(name, ((name,),)) for source in (after, before))
        if paths != others and name in new.fields and name in old.fields:
            said.append(f"{name} is looked for at {' or '.join(map(shown_path, paths))}")
    if said:
        consequence = f"{'; '.join(said)}: records that are not so, also those still unread, are refused or passed over"
        yield Change("breaks producers", "contract", new.name, consequence + _repeats(new), consent=True)


class _Field(msgspec.Struct, frozen=True):
    """What a contract asks of a field."""

    takes: dict[str, Any]
    required: bool
    null: bool


def _fields_of(spec: EventSpec) -> dict[str, _Field]:
    found = {}
    for name, schema in spec.schema.get("properties", {}).items():
        takes = {key: value for key, value in schema.items() if key not in _WORDS}
        either = takes.get("anyOf", [])
        null = {"type": "null"} in either
        if null:
            rest = [each for each in either if each != {"type": "null"}]
            takes = rest[0] if len(rest) == 1 else takes | {"anyOf": rest}
        found[name] = _Field(takes, name in spec.schema.get("required", ()), null)
    return found


def _field_change(spec: EventSpec, name: str, old: _Field | None, new: _Field | None) -> Iterator[Change]:
    dead = f"records of {spec.topic} that are not so, also those still unread there, become dead letters"
    breaks, adds = "", ""
    if new is None:
        breaks = f"field {name} is gone: of records that have it, also those still unread, it is ignored"
    elif old is None and new.required:
        breaks = f"field {name} is new and required: {dead}"
    elif old is None:
        adds = f"field {name}, which records may leave out"
    elif old.takes != new.takes:
        breaks = f"field {name} takes {_schema(new)}, no longer {_schema(old)}: {dead}"
    elif (new.required and not old.required) or (old.null and not new.null):
        breaks = f"field {name} is required: {dead}"
    elif old != new:
        adds = f"field {name} may be left out"
    if breaks or adds:
        yield Change(
            "breaks producers" if breaks else "adds", "contract", spec.name, breaks or adds, consent=bool(breaks)
        )


def _schema(field: _Field) -> str:
    return ", ".join(f"{key} {value}" for key, value in field.takes.items())


def _service_changes(old: ServiceSpec, new: ServiceSpec) -> Iterator[Change]:
    gained = [name for name in new.features if name not in old.features]
    lost = [name for name in old.features if name not in new.features]
    kept = [[name for name in names if name not in (*gained, *lost)] for names in (old.features, new.features)]
    if gained:
        yield Change("adds", "service", new.name, f"features {', '.join(gained)}")
    if lost:
        yield Change("removes", "service", new.name, f"features {', '.join(lost)}, which its readers no longer get")
    if kept[0] != kept[1]:
        consequence = "its features are in another order, which who reads a matrix by place gets wrong"
        yield Change("changes meaning", "service", new.name, consequence, consent=True)


def _meaning(spec: Any) -> dict[str, Any]:
    """What a feature's values follow from, beside its windows; of anything else, all that does not describe it."""
    plain = {
        name: getattr(spec, name) for name in spec.__struct_fields__ if name not in (*_DESCRIBING, "over", "origin")
    }
    return {"type": type(spec).__name__, **plain}


def _without_bounds(spec: FeatureSpec) -> dict[str, Any]:
    return {name: value for name, value in _meaning(spec).items() if name not in _BOUNDS}


def _said(old: Any, new: Any) -> str:
    """Which fields differ, and how."""
    before, after = _meaning(old), _meaning(new)
    differ = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return ", ".join(
        "other code" if name == "fingerprint" else f"{name} {_plain(before.get(name))} -> {_plain(after.get(name))}"
        for name in differ
    )


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)
