"""The plan compiled to Feast: entities, stream feature views with their Kafka sources, on-demand views, services."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final

import feast
from feast import types as feast_types
from feast.data_format import DeltaFormat, JsonFormat
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.project import Project
from feast.transformation.pandas_transformation import PandasTransformation
from feast.value_type import ValueType

from config.settings import Settings
from features.plan import EntitySpec, EventSpec, Feature, Plan, ViewSpec, arguments, features_of
from features.times import duration_ms
from features.values import Type
from registry.plans import PLAN_TAG
from store.archive import table_name

# What users of Feast and kafka-python can do nothing about stays out of our commands' output. Only here, once Feast is
# imported, as it puts filters of its own in front.
for _message in (
    "Stream feature views are exp",
    "On demand feature view is an exp",
    "read_text is dep",
    "open_text is dep",
):
    warnings.filterwarnings("ignore", message=_message)

# Nor are metrics of child processes to go to Feast's files: see registry/__init__.py.
for _variable in ("PROMETHEUS_MULTIPROCESS_DIR", "PROMETHEUS_MULTIPROC_DIR"):
    if "feast_metrics_" in os.environ.get(_variable, ""):
        del os.environ[_variable]

FEAST_TYPES: Final[dict[Type, Any]] = {
    "int": feast_types.Int64,
    "float": feast_types.Float64,
    "bool": feast_types.Bool,
    "str": feast_types.String,
    "list[str]": feast_types.Array(feast_types.String),
    "map[str, float]": feast_types.Map,
}


def compile_to_feast(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Feast's objects, each by a name: what `feast apply` finds in registry/feast_repo.py, `headrace apply` applies."""
    project = Project(name=plan.project, description="A Headrace feature store", tags={PLAN_TAG: plan.encode()})
    entities = {spec.name: _entity(spec) for spec in plan.entities}
    sources = {spec.name: _source(spec, settings) for spec in plan.events}
    views: dict[str, Any] = {}
    for spec in plan.views:
        if len(spec.entities) == 1:
            views[spec.name] = _stream_view(plan, spec, entities, sources)
    for spec in plan.views:
        if len(spec.entities) > 1:
            views[spec.name] = _cross_view(plan, spec, entities, views)
    services = {spec.name: _service(plan, spec.name, views) for spec in plan.services}
    groups: dict[str, dict[str, Any]] = {"entity": entities, "source": sources, "view": views, "service": services}
    return {
        "project": project,
        **{f"{kind}_{name}": made for kind, group in groups.items() for name, made in group.items()},
    }


def _entity(spec: EntitySpec) -> feast.Entity:
    value_type = ValueType.INT64 if spec.id_type else ValueType.STRING
    return feast.Entity(name=spec.name, join_keys=[spec.key], value_type=value_type, description=spec.doc)


def _source(spec: EventSpec, settings: Settings) -> feast.KafkaSource:
    # Of several topics Feast can be told one.
    table = table_name(spec, spec.topic)
    archived = feast.FileSource(
        name=f"{table}_archive",
        path=f"{settings.archive.rstrip('/')}/{table}",
        file_format=DeltaFormat(),
        timestamp_field="occurred_at",
    )
    return feast.KafkaSource(
        name=table,
        timestamp_field="occurred_at",
        # Sorted, as in a plan that was read back.
        message_format=JsonFormat(schema_json=", ".join(f"{name} {spec.fields[name]}" for name in sorted(spec.fields))),
        kafka_bootstrap_servers=settings.kafka,
        topic=spec.topic,
        batch_source=archived,
        description=spec.doc,
        tags={"contract": spec.code, "fingerprint": spec.fingerprint},
    )


def _field(feature: Feature) -> feast.Field:
    tags = {"default": str(feature.default)} if feature.default is not None else {}
    return feast.Field(name=feature.name, dtype=FEAST_TYPES[feature.value_type], description=feature.doc, tags=tags)


class StreamView(feast.StreamFeatureView):
    """A view in the catalogue. The stream computes it, and never calls its function."""

    @property
    def schema(self) -> list[feast.Field]:  # type: ignore[override]  # Feast says that it may be set, and can't
        """The features in order, without the key.

        Feast's has both, as a set: what the registry reads back would be another view, with the key for a feature, and
        each `apply` a new version of it.
        """
        return list(self.features)


def _stream_view(plan: Plan, spec: ViewSpec, entities: dict[str, Any], sources: dict[str, Any]) -> StreamView:
    entity = plan.entity(spec.entities[0])
    events = list(dict.fromkeys(measure.event for aggregation in spec.aggregations for measure in aggregation.measures))
    topics = dict.fromkeys(topic for name in events for topic in plan.event(name).topics)
    udf, source = _function(spec, "by the stream, from its events")
    return StreamView(
        name=spec.name,
        # Feast knows one stream source a view; the tag names all of them.
        source=sources[events[0]],
        entities=[entities[entity.name]],
        ttl=timedelta(milliseconds=duration_ms(entity.forget_after)) if entity.forget_after else timedelta(0),
        schema=[
            feast.Field(name=entity.key, dtype=feast_types.Int64 if entity.id_type else feast_types.String),
            *(_field(feature) for feature in features_of(spec)),
        ],
        timestamp_field="occurred_at",
        # As the registry reads it back; without a function Feast can't print a stream view.
        mode="python",
        udf=udf,
        udf_string=source,
        description=spec.doc,
        owner=spec.owner,
        tags={**spec.tags, "topics": ", ".join(topics)},
    )


class CrossFeatureView(OnDemandFeatureView):
    """A cross view in the catalogue. Headrace's stores compute it from the plan and never call its function.

    Its fields have no texts here: Feast writes them, and does not read them back, so that it would be another view. In
    the registry they have those of `docs`.
    """

    docs: Mapping[str, str] = MappingProxyType({})

    def to_proto(self) -> Any:
        """As the registry holds it."""
        proto = super().to_proto()
        for field in proto.spec.features:
            field.description = self.docs.get(field.name, "")
        return proto

    def infer_features(self) -> None:
        """Nothing: Feast would run the function on random rows, and compare descriptions that inference can't know."""


_SOURCE: Final = '''
def {name}(inputs):
    """Computed by Headrace {how}: {features}."""
    raise RuntimeError("{name} is computed by Headrace: read it through its online store or its server")
'''


def _function(spec: ViewSpec, how: str) -> tuple[Any, str]:
    """What stands in Feast's registry for the computation of a view, and its source."""
    features = ", ".join(feature.name for feature in features_of(spec))
    source = _SOURCE.format(name=spec.name, how=how, features=features).lstrip()
    # Made from its source, in a module of no name, so that clients without Headrace can read the registry: Feast packs
    # a function of a real module by reference.
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(source, namespace)  # noqa: S102  # our own text, from names that are identifiers
    return namespace[spec.name], source


def _cross_view(plan: Plan, spec: ViewSpec, entities: dict[str, Any], views: dict[str, Any]) -> CrossFeatureView:
    made = list(features_of(spec))
    udf, source = _function(spec, "for every pair of a request at once")
    needed = dict.fromkeys(name.split("__")[0] for feature in made for name in arguments(feature.spec))
    view = CrossFeatureView(
        name=spec.name,
        # None of their features: Feast would add those to every training set.
        sources=[views[name][[]] for name in needed if name != spec.name],
        entities=[entities[name] for name in spec.entities],
        schema=[
            *(feast.Field(name=plan.entity(name).key, dtype=feast_types.String) for name in spec.entities),
            *(feast.Field(name=feature.name, dtype=FEAST_TYPES[feature.value_type]) for feature in made),
        ],
        feature_transformation=PandasTransformation(udf=udf, udf_string=source),
        mode="pandas",
        description=spec.doc,
        owner=spec.owner,
        tags=dict(spec.tags),
    )
    view.docs = {feature.name: feature.doc for feature in made}
    return view


def _service(plan: Plan, name: str, views: dict[str, Any]) -> feast.FeatureService:
    spec = plan.service(name)
    members: dict[str, list[str]] = {}
    for full_name in spec.features:
        feature = plan.features[full_name]
        members.setdefault(feature.view, []).append(feature.name)
    version = re.search(r"_v(\d+)$", name)
    return feast.FeatureService(
        name=name,
        features=[views[view][names] for view, names in members.items()],
        description=spec.doc,
        owner=spec.owner,
        tags={**spec.tags, **({"version": version[1]} if version else {})},
    )
