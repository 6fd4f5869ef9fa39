"""Feast's ordinary views (batch and push) as given features: their fields, ids and values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import msgspec
from feast import Entity, FeatureView
from feast.infra.registry.base_registry import BaseRegistry
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Map, RepeatedValue, Value
from feast.type_map import python_values_to_proto_values
from google.protobuf.message import Message  # type: ignore[import-untyped]  # it brings no types

from features.given import NESTED, Fields
from features.plan import NOBODY, EntitySpec, Given, Plan, ViewSpec, id_of
from registry.plans import registered_plan

_MAP: Final = Value.DESCRIPTOR.fields_by_name["map_val"].number
_ATTRIBUTES: Final = {
    "Int32": "int32_val",
    "Int64": "int64_val",
    "Float32": "float_val",
    "Float64": "double_val",
    "Bool": "bool_val",
    "String": "string_val",
}

Row = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
"""As Feast has it written: whose it is, its values, its time, and when it was made."""


def fields_of(view: FeatureView) -> Fields:
    """The fields of a view's rows."""
    return Fields.of((field.name, str(field.dtype)) for field in view.features)


def entity_id(key: EntityKey) -> bytes:
    """What stands in a key of Redis for whom a row is about."""
    parts = (
        _id(value) for _, value in sorted(zip(key.join_keys, key.entity_values, strict=True), key=lambda pair: pair[0])
    )
    return id_of(list(parts))


def _id(value: Value) -> bytes:
    held: Any = getattr(value, value.WhichOneof("val") or "string_val")
    return held if isinstance(held, bytes) else str(held).encode()


def packed(view: FeatureView, rows: Sequence[Row], now_s: float) -> Iterator[tuple[bytes, bytes, int]]:
    """By id, rows as the store takes them; of those of one id and one batch the newest.

    Raises:
        ValueError: if a value is not of its field's type.
    """
    given, ttl_us = fields_of(view), _us(view.ttl) if view.ttl else 0
    newest: dict[bytes, tuple[tuple[int, int], dict[str, Value]]] = {}
    for key, values, event, created in rows:
        times = _since_epoch_us(event), _since_epoch_us(created) if created else 0
        known = newest.get(one := entity_id(key))
        if known is None or times >= known[0]:
            newest[one] = times, values
    for one, ((event_us, created_us), values) in newest.items():
        plain = {
            name: to_raw(value, exact=given.kinds[name] == "any")
            for name, value in values.items()
            if name in given.kinds
        }
        # Whoever reads shall see for as long again that it is too old.
        expire_ms = (max(event_us + ttl_us, int(now_s * 1e6)) + ttl_us) // 1000 if ttl_us else 0
        yield one, given.pack(plain, event_us, created_us), expire_ms


def pack_columns(view: FeatureView, columns: Mapping[str, list[Any]]) -> Iterator[bytes]:
    """Rows of values as pandas has them: all features of a view, a column each."""
    given = fields_of(view)
    raw = []
    for field in view.features:
        exact = given.kinds[field.name] == "any"
        values = python_values_to_proto_values(columns[field.name], field.dtype.to_value_type())
        raw.append([to_raw(value, exact=exact) for value in values])
    names = [field.name for field in view.features]
    for row in zip(*raw, strict=True):
        yield given.pack(dict(zip(names, row, strict=True)), 0, 0)


def to_raw(value: Value, *, exact: bool) -> Any:
    """A value as rows hold it: with the number of its type, if that is not said by its field."""
    which = value.WhichOneof("val")
    if which is None or which == "null_val":
        return None
    held = getattr(value, which)
    match held:
        case Map():
            held = {name: to_raw(each, exact=True) for name, each in held.val.items()}
        case RepeatedValue():
            held = [to_raw(each, exact=True) for each in held.val]
        case Message() if Value.DESCRIPTOR.fields_by_name[which].number in NESTED:
            held = [[_MAP, to_raw(Value(map_val=each), exact=True)[1]] for each in held.val]
        case Message() if which.endswith(("_list_val", "_set_val")):
            held = list(held.val)
        case Message():
            held = held.SerializeToString()
        case _:
            pass
    return [Value.DESCRIPTOR.fields_by_name[which].number, held] if exact else held


def to_proto(raw: Any) -> Value:
    """The inverse of `to_raw`, of an exact value."""
    proto = Value()
    if raw is None:
        return proto
    number, held = raw
    field = Value.DESCRIPTOR.fields_by_number[number]
    if field.message_type is None:
        setattr(proto, field.name, held)
        return proto
    message = getattr(proto, field.name)
    message.SetInParent()
    match message, held:
        case Map(), _:
            for name, each in held.items():
                message.val[name].CopyFrom(to_proto(each))
        case RepeatedValue(), _:
            message.val.extend(map(to_proto, held))
        case _, bytes():
            message.MergeFromString(held)
        case _ if number in NESTED:
            message.val.extend(to_proto(each).map_val for each in held)
        case _:
            message.val.extend(held)
    return proto


def maker_of(dtype: str) -> Callable[[Any], Value]:
    """What makes Feast's values of a field's raw ones."""
    if dtype == "Array(String)":
        number = Value.DESCRIPTOR.fields_by_name["string_list_val"].number
        return lambda raw: to_proto(None if raw is None else [number, raw])
    if dtype not in _ATTRIBUTES:
        return to_proto
    attribute: Any = _ATTRIBUTES[dtype]
    return lambda raw: Value() if raw is None else Value(**{attribute: raw})


def _since_epoch_us(date: datetime) -> int:
    """Microseconds since the epoch; without a zone it is UTC, as everywhere in Feast."""
    return _us((date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime(1970, 1, 1, tzinfo=UTC))


def _us(duration: timedelta) -> int:
    return duration // timedelta(microseconds=1)


def plan_with(registry: BaseRegistry, project: str) -> Plan:
    """The registered plan and, of views that are not in it, all that Feast has written: they are read alike."""
    # Without any it is a project of Feast's alone.
    plan = registered_plan(registry, project, allow_cache=True) or Plan(project, 1, (), (), (), ())
    proto = getattr(registry, "cached_registry_proto", None)
    if proto is None:
        return _extended(plan, registry, project)
    key = (project, plan.fingerprint, id(proto), proto.version_id)
    if key not in _plans:
        if len(_plans) >= _PLANS_MAX:
            _plans.clear()
        _plans[key] = _extended(plan, registry, project), proto  # The proto lives on, so that its id is no other's.
    return _plans[key][0]


_PLANS_MAX: Final = 8
_plans: dict[tuple[str, str, int, str], tuple[Plan, Any]] = {}


def _extended(plan: Plan, registry: BaseRegistry, project: str) -> Plan:
    known = {view.name for view in plan.views}
    listed = (*registry.list_feature_views(project, True), *registry.list_stream_feature_views(project, True))
    views = [view for view in listed if view.name not in known]
    if not views:
        return plan
    return with_ordinary(plan, views, registry.list_entities(project, True))


def with_ordinary(plan: Plan, views: Iterable[FeatureView], entities: Iterable[Entity]) -> Plan:
    """A plan with ordinary views, and the entities that they name."""
    specs = {each.name: each for each in (NOBODY, *map(_entity_spec, entities), *plan.entities)}
    more = [_view_spec(view) for view in views]
    named = {*(each.name for each in plan.entities), *(name for view in more for name in view.entities)}
    every = tuple(spec for name, spec in specs.items() if name in named)
    return msgspec.structs.replace(plan, entities=every, views=(*plan.views, *more))


def _entity_spec(entity: Entity) -> EntitySpec:
    return EntitySpec(entity.name, entity.join_key, None, entity.description)


def _view_spec(view: FeatureView) -> ViewSpec:
    given = tuple(Given(field.name, str(field.dtype), field.description) for field in view.features)
    ttl_ms = _us(view.ttl) // 1000 if view.ttl else msgspec.UNSET
    entities = tuple(view.entities or [NOBODY.name])
    return ViewSpec(view.name, entities, given, view.owner, dict(view.tags), view.description, ttl_ms=ttl_ms)
