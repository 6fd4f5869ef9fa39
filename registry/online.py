"""Feast's online store over Headrace's rows: one round trip a request, windows evaluated when read."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal

import click
import redis
from feast import FeatureService, FeatureStore, FeatureView, RepoConfig
from feast.errors import FeatureNameCollisionError
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.registry.base_registry import BaseRegistry
from feast.infra.supported_async_methods import SupportedAsyncMethods
from feast.online_response import OnlineResponse
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value
from feast.repo_config import FeastConfigBaseModel

from config.settings import Settings
from features.plan import Plan
from registry.compile import is_streamed
from registry.given import Row, entity_id, fields_of, maker_of, packed, plan_with
from registry.offline import NotOfferedError
from registry.plans import full_names_of, ordered_as_a_service, plan_of, registered_plan
from registry.response import Feature, LazyResponse, features_of
from store.completeness import Completeness, look
from store.connect import connect
from store.given import GivenStore
from store.plans import layouts_of
from store.reader import Reader, Response

_EPOCH: Final = datetime.fromtimestamp(0, UTC)
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
    """Reads what the stream commits, and ordinary views, whose rows Feast has it write."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._client: redis.Redis | None = None
        self._readers: dict[tuple[str, tuple[str, ...]], Reader] = {}
        self._completeness: dict[str, Completeness] = {}
        self._stores: dict[str, GivenStore] = {}
        self._own_registry: BaseRegistry | None = None
        self._has_said = False

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
        """All features of all entities in one round trip; see `feast.FeatureStore.get_online_features`.

        On-demand views of users are computed by Feast, after another round trip for each view that they take from.
        """
        plan = plan_with(registry, project)
        _must_be_enabled(registry, features)  # By the registry's cache, which is there by now.
        mine, others = _parted(plan, features)
        if others and not mine:
            return super().get_online_features(config, others, entity_rows, registry, project, full_feature_names)
        given = _columns(entity_rows)
        columns = _by_key(plan, given, mine)
        if isinstance(mine, FeatureService) and any(map(_is_renamed, mine.feature_view_projections)):
            found = self._renamed(config, plan, mine.feature_view_projections, columns, full=full_feature_names)
        else:
            names = _full_names(plan, mine)
            _must_differ(
                [(plan.features[each].view, plan.features[each].name) for each in names], full=full_feature_names
            )
            reader = self._reader(config, plan, names)
            # No rows have no keys: they get an empty answer.
            columns = columns if given else {plan.entity(entity).key: [] for entity in reader.program.entities}
            read = reader.read(self._redis(config).mget, columns, self._now_ms(), full=full_feature_names)
            found = features_of(read, read.names)
        answer = LazyResponse(columns, found)
        if others:
            computed = super().get_online_features(config, others, entity_rows, registry, project, full_feature_names)
            answer = answer.joined(computed)
        return answer

    def _renamed(
        self, config: RepoConfig, plan: Plan, projections: Sequence[Any], columns: dict[str, list[Any]], *, full: bool
    ) -> list[Feature]:
        """Features of a service with aliases: each view is read by keys of its own, and all in one round trip.

        Raises:
            ValueError: if a key is missing, or a feature has the name of one.
            FeatureNameCollisionError: if names are the same.
        """
        keys: list[bytes] = []
        responds: list[tuple[Any, slice, Callable[[Sequence[bytes | None]], Response]]] = []
        for each in projections:
            names = full_names_of(plan, [f"{each.name}:{field.name}" for field in each.features])
            if lacking := set(each.join_key_map.values()) - columns.keys():
                name, there = each.name_alias or each.name, ", ".join(columns)
                msg = f"entity rows lack {lacking.pop()!r}, by which {name} is read; they have: {there}"
                raise ValueError(msg)
            own = {**columns, **{key: columns[of] for key, of in each.join_key_map.items()}}
            more, respond = self._reader(config, plan, names).begin(own, self._now_ms(), full=False)
            responds.append((each, slice(len(keys), len(keys) + len(more)), respond))
            keys += more
        blobs: Any = self._redis(config).mget(keys) if keys else []
        found: list[Feature] = []
        asked: list[tuple[str, str]] = []
        for each, mine, respond in responds:
            read, name = respond(blobs[mine]), each.name_to_use()
            asked += [(name, feature) for feature in read.names]
            found += features_of(read, [f"{name}__{feature}" if full else feature for feature in read.names])
        _must_differ(asked, full=full)
        if taken := columns.keys() & {feature.name for feature in found}:
            msg = f"{taken.pop()}: a feature and a key of the request share the name: pass full_feature_names=True"
            raise ValueError(msg)
        return found

    async def get_online_features_async(self, *args: Any, **kwargs: Any) -> OnlineResponse:
        """As `get_online_features`, in a thread."""
        return await asyncio.to_thread(self.get_online_features, *args, **kwargs)

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """One view's features, as Feast's own paths ask for them."""
        if not is_streamed(table):
            return self._read_given(config, table, entity_keys, requested_features)
        keys = set(table.join_keys)
        names = requested_features or [field.name for field in table.features if field.name not in keys]
        rows: dict[str, list[Any]] = {key: [] for key in entity_keys[0].join_keys} if entity_keys else {}
        for entity_key in entity_keys:
            for key, value in zip(entity_key.join_keys, entity_key.entity_values, strict=True):
                rows[key].append(value.string_val)
        if not entity_keys:
            return []
        plan = plan_of(self._registry(config), config.project)
        reader = self._reader(config, plan, [f"{table.name}__{name}" for name in names])
        read = reader.read(self._redis(config).mget, rows, self._now_ms(), full=False)
        return LazyResponse(rows, features_of(read, read.names)).by_row()

    def online_write_batch(
        self, config: RepoConfig, table: FeatureView, data: list[Row], progress: Callable[[int], Any] | None
    ) -> None:
        """Writes rows of an ordinary view, each unless there is a newer one.

        Raises:
            ValueError: if a value is not of its field's type.
            NotOfferedError: if the view is a streaming one: a finished value can't age.
        """
        if is_streamed(table):
            msg = (
                f"{table.name} is written by its stream only: "
                "send events to Kafka (`headrace replay FILE`), not values to Feast"
            )
            raise NotOfferedError(msg)
        if progress:  # It is Feast that materializes.
            self._say_what_is_left_out(config)
        store = self._given(config)
        store.declare(fields_of(table))
        for n_rows, _ in store.write(table.name, packed(table, data, self._clock())):
            if progress:
                progress(n_rows)

    async def online_write_batch_async(self, *args: Any, **kwargs: Any) -> None:
        """As `online_write_batch`, in a thread."""
        await asyncio.to_thread(self.online_write_batch, *args, **kwargs)

    async def online_read_async(
        self, *args: Any, **kwargs: Any
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """As `online_read`, in a thread."""
        return await asyncio.to_thread(self.online_read, *args, **kwargs)

    @property
    def async_supported(self) -> SupportedAsyncMethods:
        """Both: Feast's server then waits for no thread of its own."""
        return SupportedAsyncMethods(read=True, write=True)

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Any],  # Feast's signature, as the next two
        entities_to_keep: Sequence[Any],
        partial: bool,
    ) -> None:
        """Deletes the rows of ordinary views that are there no longer."""
        kept = {table.name for table in tables_to_keep}
        self.teardown(config, [table for table in tables_to_delete if table.name not in kept], ())

    def teardown(
        self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Any]
    ) -> None:  # Feast's signature
        """Deletes the rows of ordinary views; those that a stream has written expire by themselves."""
        for table in tables:
            if not is_streamed(table):
                self._given(config).delete(table.name)

    def _read_given(
        self, config: RepoConfig, table: FeatureView, entity_keys: list[EntityKey], requested: list[str] | None
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        given, ttl_us = fields_of(table), int(table.ttl.total_seconds() * 1e6) if table.ttl else 0
        ids = [entity_id(key) for key in entity_keys]
        rows = self._given(config).read(table.name, given, ids).limited(self._now_ms() * 1000, ttl_us)
        fields = [field for field in given.fields if requested is None or field.name in requested]
        columns = {field.name: list(map(maker_of(field.dtype), rows.raw(field.name))) for field in fields}
        found: list[tuple[datetime | None, dict[str, Value] | None]] = []
        for at, (there, outside) in enumerate(zip(rows.found.tolist(), rows.outside.tolist(), strict=True)):
            values = {} if outside else {name: column[at] for name, column in columns.items()}
            found.append((_EPOCH + timedelta(microseconds=int(rows.event_us[at])), values) if there else (None, None))
        return found

    def _say_what_is_left_out(self, config: RepoConfig) -> None:
        """Once."""
        if self._has_said:
            return
        self._has_said = True
        plan = registered_plan(self._registry(config), config.project, allow_cache=True)
        if names := [view.name for view in plan.views if not view.given and len(view.entities) == 1] if plan else []:
            click.echo(f"Left out are streaming views, whose rows their stream writes: {', '.join(names)}")

    def _registry(self, config: RepoConfig) -> BaseRegistry:
        if self._own_registry is None:
            # A configuration made in Python is nowhere to be read; what is in a folder has paths from there.
            folder = Path(str(config.repo_path))
            in_folder = (folder / "feature_store.yaml").exists()
            store = FeatureStore(repo_path=str(folder)) if in_folder else FeatureStore(config=config)
            self._own_registry = store.registry
        return self._own_registry

    def _given(self, config: RepoConfig) -> GivenStore:
        client = self._redis(config)
        return self._stores.setdefault(config.project, GivenStore(client, config.project))

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


def _parted(plan: Plan, features: list[str] | FeatureService) -> tuple[Any, list[str]]:
    """What of the features the plan has, as a list or a service; and references of all others."""
    views = {view.name for view in plan.views}
    if isinstance(features, FeatureService):
        projections = features.feature_view_projections
        unknown = [each for each in projections if each.name not in views]
        others = [f"{each.name_alias or each.name}:{field.name}" for each in unknown for field in each.features]
        if not others:
            return features, []
        mine = copy(features)
        mine.feature_view_projections = [each for each in projections if each.name in views]
        return mine if mine.feature_view_projections else [], others
    known = [each for each in features if each.partition(":")[0].removesuffix("@latest") in views]
    return known, [each for each in features if each not in known]


def _is_renamed(projection: Any) -> bool:
    return bool(projection.name_alias or projection.join_key_map)


def _columns(entity_rows: list[dict[str, Any]] | Mapping[str, Any]) -> dict[str, list[Any]]:
    if isinstance(entity_rows, list):
        keys = entity_rows[0].keys() if entity_rows else []
        if any(row.keys() != keys for row in entity_rows):
            msg = "all entity_rows must have the same keys"
            raise ValueError(msg)
        return {key: [row[key] for row in entity_rows] for key in keys}
    plain = {key: values.val if isinstance(values, RepeatedValue) else values for key, values in entity_rows.items()}
    return {
        key: [_id(value) if isinstance(value, Value) else value for value in values] for key, values in plain.items()
    }


def _id(value: Value) -> Any:
    return getattr(value, value.WhichOneof("val") or "string_val")


def _must_be_enabled(registry: BaseRegistry, features: list[str] | FeatureService) -> None:
    """Raises ValueError, as Feast does, if a view was disabled (`feast feature-views disable`)."""
    proto = getattr(registry, "cached_registry_proto", None)
    if proto is None:
        return
    views = (*proto.feature_views, *proto.stream_feature_views, *proto.on_demand_feature_views)
    if not (disabled := {view.spec.name for view in views if view.spec.disabled}):
        return
    if isinstance(features, FeatureService):
        asked = {each.name for each in features.feature_view_projections}
    else:
        asked = {each.partition(":")[0].partition("@")[0] for each in features}
    for name in sorted(asked & disabled):
        msg = f"Feature view '{name}' is disabled and cannot serve features: `feast feature-views enable {name}`"
        raise ValueError(msg)


def _by_key(plan: Plan, columns: dict[str, list[Any]], features: list[str] | FeatureService) -> dict[str, list[Any]]:
    """Columns by entities' keys; Feast takes an entity's name, too, and leaves out what is nobody's key."""
    keys = {entity.name: entity.key for entity in plan.entities if entity.key not in columns}
    keys |= {entity.key: entity.key for entity in plan.entities}
    if isinstance(features, FeatureService):
        keys |= {of: of for each in features.feature_view_projections for of in each.join_key_map.values()}
    return {keys[name]: values for name, values in columns.items() if name in keys}


def _must_differ(asked: Sequence[tuple[str, str]], *, full: bool) -> None:
    """Raises FeatureNameCollisionError, as Feast does, if two of the views' features would have one name."""
    names = asked if full else [name for _, name in asked]
    if len(set(names)) == len(names):
        return
    twice = {each for each, n in Counter(names).items() if n > 1}
    collided = [f"{view}:{name}" for view, name in asked if ((view, name) if full else name) in twice]
    raise FeatureNameCollisionError(collided, full)


def _full_names(plan: Plan, features: list[str] | FeatureService) -> list[str]:
    """Full names, in the plan's order for a service, in the order asked for a list of `view:feature`."""
    if not features:
        msg = "No features specified for retrieval"
        raise ValueError(msg)
    if not isinstance(features, FeatureService):
        return full_names_of(plan, features)
    projections = features.feature_view_projections
    names = full_names_of(plan, [f"{each.name}:{field.name}" for each in projections for field in each.features])
    return ordered_as_a_service(plan, names, features.name)
