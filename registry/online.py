"""Feast's online store over Headrace's rows: one round trip a request, windows evaluated when read."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import redis
from feast import FeatureService, FeatureView, RepoConfig
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.registry.base_registry import BaseRegistry
from feast.online_response import TIMESTAMP_POSTFIX, OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import RepeatedValue, StringList, Value
from feast.repo_config import FeastConfigBaseModel

from config.settings import Settings
from features.plan import Plan
from registry.plans import full_names_of, ordered_as_a_service, plan_of
from store.completeness import Completeness, look
from store.connect import connect
from store.plans import layouts_of
from store.reader import Reader, Response

_AS_OF_MS: ContextVar[int | None] = ContextVar("headrace_as_of_ms", default=None)


@contextmanager
def as_of(now_ms: int) -> Iterator[None]:
    """Inside it, the SDK's reads are evaluated at `now_ms`, as `"as_of"` does over HTTP."""
    token = _AS_OF_MS.set(now_ms)
    try:
        yield
    finally:
        _AS_OF_MS.reset(token)


class HeadraceOnlineStoreConfig(FeastConfigBaseModel):
    """`online_store` in feature_store.yaml; left out, Redis is where HEADRACE_REDIS_URL says."""

    type: Literal["registry.online.HeadraceOnlineStore"] = "registry.online.HeadraceOnlineStore"
    redis_url: str | None = None


class HeadraceOnlineStore(OnlineStore):
    """Reads what the stream commits. It takes no writes: rows are the stream's alone."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._client: redis.Redis | None = None
        self._readers: dict[tuple[str, tuple[str, ...]], Reader] = {}
        self._completeness: dict[str, Completeness] = {}

    def get_online_features(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: list[dict[str, Any]] | Mapping[str, Any],
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        include_feature_view_version_metadata: bool = False,
    ) -> OnlineResponse:
        """All features of all entities in one round trip; see `feast.FeatureStore.get_online_features`."""
        _must_be_enabled(registry, features)
        plan, now_ms = plan_of(registry, project), self._now_ms()
        columns = _by_key(plan, _columns(entity_rows))
        if not isinstance(features, FeatureService) or not any(map(_is_renamed, features.feature_view_projections)):
            reader = self._reader(config, plan, _full_names(plan, features))
            # No rows have no keys: they get an empty answer.
            columns = columns or {plan.entity(entity).key: [] for entity in reader.program.entities}
            read = reader.read(self._redis(config).mget, columns, now_ms, full=full_feature_names)
            return LazyResponse(columns, _features(read, read.names))
        keys: list[bytes] = []
        responds: list[tuple[Any, slice, Callable[[Sequence[bytes | None]], Response]]] = []
        for each in features.feature_view_projections:
            names = full_names_of(plan, [f"{each.name}:{field.name}" for field in each.features])
            if lacking := set(each.join_key_map.values()) - columns.keys():
                name, there = each.name_alias or each.name, ", ".join(columns)
                msg = f"entity rows lack {lacking.pop()!r}, by which {name} is read; they have: {there}"
                raise ValueError(msg)
            own = {**columns, **{key: columns[of] for key, of in each.join_key_map.items()}}
            more, respond = self._reader(config, plan, names).begin(own, now_ms, full=False)
            responds.append((each, slice(len(keys), len(keys) + len(more)), respond))
            keys += more
        blobs: Any = self._redis(config).mget(keys) if keys else []
        found: list[_Feature] = []
        for each, mine, respond in responds:
            read, before = respond(blobs[mine]), f"{each.name_to_use()}__" if full_feature_names else ""
            found += _features(read, [before + name for name in read.names])
        names = [*columns, *(feature.name for feature in found)]
        if len(set(names)) < len(names):
            msg = "two of the features and keys share a name: pass full_feature_names=True"
            raise ValueError(msg)
        return LazyResponse(columns, found)

    async def get_online_features_async(self, *args: Any, **kwargs: Any) -> OnlineResponse:
        """As `get_online_features`, in a thread."""
        import asyncio

        return await asyncio.to_thread(self.get_online_features, *args, **kwargs)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """One view's features, as Feast's own paths ask for them."""
        keys = set(table.join_keys)
        names = requested_features or [field.name for field in table.features if field.name not in keys]
        rows: dict[str, list[Any]] = {key: [] for key in entity_keys[0].join_keys} if entity_keys else {}
        for entity_key in entity_keys:
            for key, value in zip(entity_key.join_keys, entity_key.entity_values, strict=True):
                rows[key].append(_id_of(value))
        if not entity_keys:
            return []
        plan = plan_of(_registry_at(str(config.repo_path)), config.project)
        reader = self._reader(config, plan, [f"{table.name}__{name}" for name in names])
        read = reader.read(self._redis(config).mget, rows, self._now_ms(), full=False)
        return LazyResponse(rows, _features(read, read.names)).by_row()

    def online_write_batch(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a finished value can't age, so rows are written by the stream only."""
        msg = (
            "Headrace's rows are written by its stream only: "
            "send events to Kafka (`headrace replay FILE`), not values to Feast"
        )
        raise NotImplementedError(msg)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: `headrace apply` does that."""

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is deleted: rows expire by themselves."""

    def _now_ms(self) -> int:
        return _AS_OF_MS.get() or int(self._clock() * 1000)

    def _redis(self, config: RepoConfig) -> redis.Redis:
        if self._client is None:
            settings = Settings()
            url = config.online_store.redis_url or settings.redis_url.get_secret_value()
            self._client = connect(url, settings.redis_timeout_s)
        return self._client

    def _reader(self, config: RepoConfig, plan: Plan, full_names: Sequence[str]) -> Reader:
        key = (plan.fingerprint, tuple(full_names))
        client = self._redis(config)
        completeness = self._completeness.setdefault(plan.fingerprint, Completeness(plan))
        look(completeness, client, self._now_ms())
        if key not in self._readers:
            self._readers[key] = Reader(plan, full_names, layouts_of(client, plan), completeness)
        return self._readers[key]


class _Feature(NamedTuple):
    """A feature of an answer: what it is called, and where it was read."""

    name: str
    read: Response
    at: int

    @property
    def event_s(self) -> Any:
        """int64[n]: the time of each row's last event, seconds; 0 for none."""
        return np.maximum(self.read.event_ms(self.at), 0) // 1000


def _features(read: Response, names: Sequence[str]) -> list[_Feature]:
    return [_Feature(name, read, at) for at, name in enumerate(names)]


class LazyResponse(OnlineResponse):
    """Feast's answer, built only in the form that is asked for: its protobuf alone takes longer than the read."""

    def __init__(self, columns: Mapping[str, Sequence[Any]], features: Sequence[_Feature]) -> None:
        self._columns, self._features = columns, features
        self._feature_types = {}

    def to_dict(self, include_event_timestamps: bool = False) -> dict[str, list[Any]]:
        """Entity keys and features by name, a list each."""
        answer = {name: list(values) for name, values in self._columns.items()}
        answer |= {each.name: each.read.values(each.at) for each in self._features}
        if not include_event_timestamps:
            return answer
        for name, values in self._columns.items():  # As in Feast, that they have none.
            answer[name + TIMESTAMP_POSTFIX] = [0] * len(values)
        for each in self._features:
            answer[each.name + TIMESTAMP_POSTFIX] = each.event_s.tolist()
        return answer

    def to_df(self, include_event_timestamps: bool = False) -> pd.DataFrame:
        """As `to_dict`, a column each."""
        return pd.DataFrame(self.to_dict(include_event_timestamps))

    def to_arrow(self, include_event_timestamps: bool = False) -> pa.Table:
        """As `to_dict`, a column each, of the feature's own type."""
        columns: dict[str, Any] = {name: _ids(values) for name, values in self._columns.items()}
        for each in self._features:
            columns[each.name] = each.read.arrow(each.at)
            if include_event_timestamps:
                columns[each.name + TIMESTAMP_POSTFIX] = pa.array(each.event_s)
        return pa.table(columns)

    @property
    def proto(self) -> GetOnlineFeaturesResponse:  # type: ignore[override]  # an attribute in Feast, built eagerly
        """Feast's protobuf."""
        answer = GetOnlineFeaturesResponse()
        for name, values in self._columns.items():
            answer.metadata.feature_names.val.append(name)
            protos = [Value(string_val=str(value)) if value is not None else Value() for value in values]
            answer.results.add(values=protos, statuses=[FieldStatus.PRESENT] * len(protos))
        for name, read, at in self._features:
            answer.metadata.feature_names.val.append(name)
            vector = answer.results.add(statuses=map(FieldStatus.Value, read.statuses(at)))
            vector.values.extend(_to_proto(value) for value in read.values(at))
            for ms in read.event_ms(at).tolist():
                vector.event_timestamps.add().FromMilliseconds(max(ms, 0))
        return answer

    def by_row(self) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """One (time of the last event, values by feature name) a row; (None, None) for an entity never seen."""
        columns = [[_to_proto(value) for value in each.read.values(each.at)] for each in self._features]
        names, first = [each.name for each in self._features], self._features[0]
        event_ms = first.read.event_ms(first.at).tolist()
        return [
            (datetime.fromtimestamp(ms / 1000, UTC), dict(zip(names, row, strict=True))) if ms >= 0 else (None, None)
            for ms, row in zip(event_ms, zip(*columns, strict=True), strict=True)
        ]


def _is_renamed(projection: Any) -> bool:
    return bool(projection.name_alias or projection.join_key_map)


def _to_proto(value: Any) -> Value:  # noqa: PLR0911  # a list of cases, one a type
    match value:
        case None:
            return Value()
        case bool():
            return Value(bool_val=value)
        case int():
            return Value(int64_val=value)
        case float():
            return Value(double_val=value)
        case str():
            return Value(string_val=value)
        case list():
            return Value(string_list_val=StringList(val=value))
        case _:
            proto = Value()
            proto.map_val.SetInParent()
            for key, number in value.items():
                proto.map_val.val[key].double_val = number
            return proto


def _columns(entity_rows: list[dict[str, Any]] | Mapping[str, Any]) -> dict[str, list[Any]]:
    if isinstance(entity_rows, list):
        keys = entity_rows[0].keys() if entity_rows else []
        if any(row.keys() != keys for row in entity_rows):
            msg = "all entity_rows must have the same keys"
            raise ValueError(msg)
        return {key: [row[key] for row in entity_rows] for key in keys}
    plain = {key: values.val if isinstance(values, RepeatedValue) else values for key, values in entity_rows.items()}
    return {
        key: [_id_of(value) if isinstance(value, Value) else value for value in values] for key, values in plain.items()
    }


def _id_of(value: Value) -> str:
    """An id as text: a whole number in decimal."""
    kind = value.WhichOneof("val")
    return str(getattr(value, kind)) if kind in ("int64_val", "int32_val") else value.string_val


def _must_be_enabled(registry: BaseRegistry, features: list[str] | FeatureService) -> None:
    """Raises ValueError, as Feast does, if a view was disabled (`feast feature-views disable`)."""
    proto = getattr(registry, "cached_registry_proto", None)
    if proto is None:
        return
    views = (*proto.stream_feature_views, *proto.on_demand_feature_views)
    if not (disabled := {view.spec.name for view in views if view.spec.disabled}):
        return
    if isinstance(features, FeatureService):
        asked = {each.name for each in features.feature_view_projections}
    else:
        asked = {each.partition(":")[0].partition("@")[0] for each in features}
    for name in sorted(asked & disabled):
        msg = f"Feature view '{name}' is disabled and cannot serve features: `feast feature-views enable {name}`"
        raise ValueError(msg)


def _by_key(plan: Plan, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Columns by entities' keys; Feast takes an entity's name, too."""
    keys = {entity.name: entity.key for entity in plan.entities if entity.key not in columns}
    return {keys.get(name, name): values for name, values in columns.items()}


def _ids(values: Sequence[Any]) -> pa.Array:
    """Ids as they are; as texts, if they are of several types."""
    kinds = {type(value) for value in values if value is not None}
    return pa.array(values if len(kinds) < 2 else [None if value is None else str(value) for value in values])


def _full_names(plan: Plan, features: list[str] | FeatureService) -> list[str]:
    """Full names, in the plan's order for a service, in the order asked for a list of `view:feature`."""
    if not isinstance(features, FeatureService):
        return full_names_of(plan, features)
    projections = features.feature_view_projections
    names = full_names_of(plan, [f"{each.name}:{field.name}" for each in projections for field in each.features])
    return ordered_as_a_service(plan, names, features.name)


@lru_cache(maxsize=8)
def _registry_at(repo: str) -> BaseRegistry:
    from feast import FeatureStore

    return FeatureStore(repo_path=repo).registry
