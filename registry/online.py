"""Feast's online store over Headrace's rows: one round trip a request, windows evaluated when read."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal

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

from features.plan import Plan
from features.program import Asked, Frame, Program
from features.values import to_arrow, to_python
from registry.compile import PLAN_TAG
from registry.settings import Settings
from store.connect import connect
from store.keys import Keyspace
from store.read import Request

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
        plan = _plan(registry, project)
        full_names = _full_names(plan, features)
        reader = self._reader(plan, full_names)
        return reader.read(self._redis(config).mget, _columns(entity_rows), self._now_ms(), full=full_feature_names)

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
                rows[key].append(value.string_val)
        if not entity_keys:
            return []
        plan = _plan(_registry_at(str(config.repo_path)), config.project)
        reader = self._reader(plan, [f"{table.name}__{name}" for name in names])
        return reader.read(self._redis(config).mget, rows, self._now_ms(), full=False).by_row()

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

    def _reader(self, plan: Plan, full_names: Sequence[str]) -> Reader:
        key = (plan.fingerprint, tuple(full_names))
        if key not in self._readers:
            self._readers[key] = Reader(plan, full_names)
        return self._readers[key]


class Reader:
    """Some features of a plan, for rows of entity ids as Feast gives them."""

    def __init__(self, plan: Plan, full_names: Sequence[str]) -> None:
        self.plan = plan
        self.full_names = tuple(full_names)
        self.program = Program(plan, full_names)
        self._keyspace = Keyspace(plan.project, plan.shards)
        self._keys = {entity: plan.entity(entity).key for entity in self.program.entities}

    def read(
        self, mget: Callable[[Sequence[bytes]], Any], columns: Mapping[str, Sequence[Any]], now_ms: int, *, full: bool
    ) -> LazyResponse:
        """Reads and evaluates: `mget` is Redis's."""
        keys, respond = self._begin(columns, now_ms, full=full)
        return respond(mget(keys) if keys else [])

    async def answer(
        self,
        mget: Callable[[Sequence[bytes]], Awaitable[list[bytes | None]]],
        columns: Mapping[str, Sequence[Any]],
        now_ms: int,
        *,
        full: bool,
    ) -> dict[str, Any]:
        """The answer as Feast's own server writes it; empty lists and maps as null, which its remote client can't take.

        Raises:
            ValueError: if an entity's key is missing, columns differ in length, or short names collide.
        """
        keys, respond = self._begin(columns, now_ms, full=full)
        response = respond(await mget(keys))
        values = response.to_dict()
        statuses = [["PRESENT"] * len(column) for column in columns.values()] + response.statuses()
        results = [
            {"values": [None if value in ([], {}) else value for value in column], "statuses": status}
            for column, status in zip(values.values(), statuses, strict=True)
        ]
        return {"metadata": {"feature_names": list(values)}, "results": results}

    def _begin(
        self, columns: Mapping[str, Sequence[Any]], now_ms: int, *, full: bool
    ) -> tuple[Sequence[bytes], Callable[[Sequence[bytes | None]], LazyResponse]]:
        """The keys to read, and what makes the answer of their values."""
        asked, rows_of = self._ask(columns)
        wanted = tuple((bundle, asked.texts[bundle.entity]) for bundle in self.program.bundles)
        request = Request(self._keyspace, wanted)

        def respond(blobs: Sequence[bytes | None]) -> LazyResponse:
            frame = self.program.evaluate(request.rows(blobs), asked, now_ms)
            return LazyResponse(self.plan, self.full_names, columns, frame, rows_of, full=full)

        return request.keys, respond

    def _ask(self, columns: Mapping[str, Sequence[Any]]) -> tuple[Asked, dict[str, Any]]:
        """What to ask of the program, each id once, and each request row's place among the ids by entity."""
        if len({len(values) for values in columns.values()}) > 1:
            msg = "every entity key needs as many values as the others"
            raise ValueError(msg)
        ids, pairs = {}, {}
        for entity, key in self._keys.items():
            if key not in columns:
                msg = f"entity rows lack {key!r}, the key of {entity}; they have: {', '.join(columns) or 'none'}"
                raise ValueError(msg)
            texts = pa.array([None if value is None else str(value) for value in columns[key]], pa.string())
            # A null id is that of an entity never seen: no event can have an empty one.
            encoded = texts.fill_null("").dictionary_encode()
            ids[entity] = encoded.dictionary.to_pylist()
            pairs[entity] = np.asarray(encoded.indices).astype(np.intp)
        return Asked(ids, pairs, {}), pairs


class LazyResponse(OnlineResponse):
    """Feast's answer, built only in the form that is asked for: its protobuf alone takes longer than the read."""

    def __init__(
        self,
        plan: Plan,
        full_names: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
        frame: Frame,
        rows_of: Mapping[str, Any],
        full: bool,
    ) -> None:
        self._plan = plan
        self._full_names = full_names
        self._columns = columns
        self._frame = frame
        self._rows_of = rows_of
        self._feature_types = {}
        self._names = [name if full else plan.features[name].name for name in full_names]
        if len(set(self._names)) < len(self._names):
            msg = "two views of the request share a feature name: pass full_feature_names=True"
            raise ValueError(msg)

    def to_dict(self, include_event_timestamps: bool = False) -> dict[str, list[Any]]:
        """Entity keys and features by name, a list each."""
        answer: dict[str, list[Any]] = {name: list(values) for name, values in self._columns.items()}
        for name, full_name in zip(self._names, self._full_names, strict=True):
            answer[name] = self._values(full_name)
            if include_event_timestamps:
                answer[name + TIMESTAMP_POSTFIX] = (np.maximum(self._event_ms(full_name), 0) // 1000).tolist()
        return answer

    def to_df(self, include_event_timestamps: bool = False) -> pd.DataFrame:
        """As `to_dict`, a column each."""
        return pd.DataFrame(self.to_dict(include_event_timestamps))

    def to_arrow(self, include_event_timestamps: bool = False) -> pa.Table:
        """As `to_dict`, a column each, of the feature's own type."""
        columns: dict[str, Any] = {name: pa.array(values) for name, values in self._columns.items()}
        for name, full_name in zip(self._names, self._full_names, strict=True):
            feature = self._plan.features[full_name]
            column = to_arrow(self._frame.values[full_name], feature.value_type)
            of_entity = len(feature.entities) == 1
            columns[name] = column.take(pa.array(self._rows_of[feature.entities[0]])) if of_entity else column
            if include_event_timestamps:
                columns[name + TIMESTAMP_POSTFIX] = pa.array(np.maximum(self._event_ms(full_name), 0) // 1000)
        return pa.table(columns)

    @property
    def proto(self) -> GetOnlineFeaturesResponse:  # type: ignore[override]  # an attribute in Feast, built eagerly
        """Feast's protobuf."""
        answer = GetOnlineFeaturesResponse()
        for name, values in self._columns.items():
            answer.metadata.feature_names.val.append(name)
            protos = [Value(string_val=str(value)) if value is not None else Value() for value in values]
            answer.results.add(values=protos, statuses=[FieldStatus.PRESENT] * len(protos))
        for name, full_name in zip(self._names, self._full_names, strict=True):
            answer.metadata.feature_names.val.append(name)
            vector = answer.results.add(statuses=self._statuses(full_name))
            vector.values.extend(_to_proto(value) for value in self._values(full_name))
            for ms in self._event_ms(full_name).tolist():
                vector.event_timestamps.add().FromMilliseconds(max(ms, 0))
        return answer

    def statuses(self) -> list[list[str]]:
        """PRESENT, NULL_VALUE or NOT_FOUND of every feature for every row, as Feast's server names them."""
        return [[FieldStatus.Name(status) for status in self._statuses(full_name)] for full_name in self._full_names]

    def by_row(self) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """One (time of the last event, values by feature name) a row; (None, None) for an entity never seen."""
        columns = [[_to_proto(value) for value in self._values(full_name)] for full_name in self._full_names]
        event_ms = self._event_ms(self._full_names[0]).tolist()
        return [
            (datetime.fromtimestamp(ms / 1000, UTC), dict(zip(self._names, row, strict=True)))
            if ms >= 0
            else (None, None)
            for ms, row in zip(event_ms, zip(*columns, strict=True), strict=True)
        ]

    def _values(self, full_name: str) -> list[Any]:
        feature = self._plan.features[full_name]
        values = to_python(self._frame.values[full_name], feature.value_type)
        if len(feature.entities) > 1:
            return values
        return [values[row] for row in self._rows_of[feature.entities[0]].tolist()]

    def _event_ms(self, full_name: str) -> Any:
        entities = self._plan.features[full_name].entities
        return np.minimum.reduce(
            [
                self._frame.last_event_ms[entity][self._rows_of[entity]]
                for entity in entities
                if entity in self._frame.found
            ]
        )

    def _statuses(self, full_name: str) -> list[int]:
        found = self._event_ms(full_name) >= 0
        return [
            FieldStatus.NOT_FOUND if not seen else FieldStatus.NULL_VALUE if value is None else FieldStatus.PRESENT
            for seen, value in zip(found.tolist(), self._values(full_name), strict=True)
        ]


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
        key: [value.string_val if isinstance(value, Value) else value for value in values]
        for key, values in plain.items()
    }


def _full_names(plan: Plan, features: list[str] | FeatureService) -> list[str]:
    """Full names in the plan's order for a service, in the order asked for a list of `view:feature`.

    Raises:
        KeyError: if a feature isn't in the plan.
    """
    # Feast's registry lists a view's join key among its features.
    keys = {spec.key for spec in plan.entities}
    if isinstance(features, FeatureService):
        wanted = {
            f"{projection.name}__{field.name}"
            for projection in features.feature_view_projections
            for field in projection.features
            if field.name not in keys
        }
        names = [
            name
            for name in next((spec.features for spec in plan.services if spec.name == features.name), ())
            if name in wanted
        ]
        names += sorted(wanted - set(names))
    else:
        names = [reference.replace(":", "__", 1) for reference in features]
    for name in names:
        if name not in plan.features:
            msg = f"no feature {name!r} is applied; run `headrace plan` to compare the definitions with what is"
            raise KeyError(msg)
    return names


def _plan(registry: BaseRegistry, project: str) -> Plan:
    return _decode(_applied_text(project, registry))


def _applied_text(project: str, registry: BaseRegistry) -> str:
    text = registry.get_project(project, allow_cache=True).tags.get(PLAN_TAG)
    if text is None:
        msg = f"project {project!r} has no Headrace plan in this registry: run `headrace apply`"
        raise KeyError(msg)
    return text


_decode: Callable[[str], Plan] = lru_cache(maxsize=8)(Plan.decode)


@lru_cache(maxsize=8)
def _registry_at(repo: str) -> BaseRegistry:
    from feast import FeatureStore

    return FeatureStore(repo_path=repo).registry
