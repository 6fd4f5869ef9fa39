"""The plan compiled to Feast: entities, stream feature views with their Kafka sources, on-demand views, services."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from types import MappingProxyType
from typing import Any, Final

import feast
from feast import types as feast_types
from feast.aggregation import Aggregation as FeastAggregation
from feast.data_format import DeltaFormat, JsonFormat
from feast.feature_view_projection import FeatureViewProjection
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.transformation.pandas_transformation import PandasTransformation
from feast.value_type import ValueType

from config.settings import Settings
from features import aggregations as kinds
from features.aggregations.base import Aggregation
from features.language import VIEWS
from features.plan import EntitySpec, EventSpec, Feature, Plan, ViewSpec, arguments, features_of
from features.times import duration_ms, hop_ms
from features.values import Type
from registry.plans import PLAN_SOURCE, PLAN_TAG, to_tag

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
    "list[int]": feast_types.Array(feast_types.Int64),
    "list[float]": feast_types.Array(feast_types.Float64),
    "map[str, float]": feast_types.Map,
}


def compile_to_feast(plan: Plan, settings: Settings, objects: Sequence[Any] = ()) -> dict[str, Any]:
    """Feast's objects, each by a name: what `feast apply` finds in registry/feast_repo.py, `headrace apply` applies.

    `objects` are those that are declared in Feast's words, the plan's ordinary views among them.
    """
    applied = feast.RequestSource(
        name=PLAN_SOURCE,
        schema=[],
        description="What Headrace serves, for its stores: no source of any view",
        tags={PLAN_TAG: to_tag(plan)},
    )
    ours = {name for view in plan.views if not view.given for name in view.entities}
    entities = {spec.name: _entity(spec) for spec in plan.entities if spec.name in ours}
    sources = {spec.topic: _source([spec], settings) for spec in plan.events}
    ordinary = {each.name: each for each in objects if isinstance(each, feast.FeatureView)}
    views: dict[str, Any] = dict(ordinary)
    for spec in plan.views:
        if len(spec.entities) == 1 and not spec.given:
            events = _events(plan, spec)
            if (topics := _topics(events)) not in sources:
                sources[topics] = _source(events, settings)
            views[spec.name] = _stream_view(plan, spec, entities, sources[topics])
    for spec in plan.views:
        if len(spec.entities) > 1 and not spec.given:
            views[spec.name] = _cross_view(plan, spec, entities, views)
    services = {spec.name: _service(plan, spec.name, views) for spec in plan.services}
    groups: dict[str, dict[str, Any]] = {"entity": entities, "source": sources, "view": views, "service": services}
    # Of an entity that both declare, this is the one with a text.
    theirs = [each for each in objects if each.name not in ordinary and each.name not in entities]
    return {
        PLAN_SOURCE: applied,
        **{f"{kind}_{name}": made for kind, group in groups.items() for name, made in group.items()},
        **{f"their_{type(each).__name__}_{each.name}": each for each in theirs},
    }


def _entity(spec: EntitySpec) -> feast.Entity:
    return feast.Entity(name=spec.name, join_keys=[spec.key], value_type=ValueType.STRING, description=spec.doc)


def _events(plan: Plan, spec: ViewSpec) -> list[EventSpec]:
    """What a view is computed from, in the plan's order."""
    names = {measure.event for aggregation in spec.aggregations for measure in aggregation.measures}
    return [event for event in plan.events if event.name in names]


def topics_of(plan: Plan, spec: ViewSpec) -> str:
    """What the source of a view is called: its topics."""
    return _topics(_events(plan, spec))


def _topics(events: Sequence[EventSpec]) -> str:
    """As Kafka's consumers write several topics; no topic's name has a comma."""
    return ",".join(spec.topic for spec in events)


def _source(events: Sequence[EventSpec], settings: Settings) -> feast.KafkaSource:
    """A topic; or those of a view together, as Feast knows one stream source a view."""
    first, is_one = events[0], len(events) == 1
    archive, topics = settings.archive.rstrip("/"), _topics(events)
    archived = feast.FileSource(
        name=f"{topics}_archive",
        path=f"{archive}/{topics}" if is_one else archive,
        file_format=DeltaFormat(),
        timestamp_field="occurred_at",
    )
    # Sorted, as in a plan that was read back.
    fields = sorted(set.intersection(*(set(spec.fields.items()) for spec in events)))
    return feast.KafkaSource(
        name=topics,
        timestamp_field="occurred_at",
        message_format=JsonFormat(schema_json=", ".join(f"{name} {kind}" for name, kind in fields)),
        kafka_bootstrap_servers=settings.kafka,
        topic=topics,
        batch_source=archived,
        description=first.doc if is_one else "Several topics, each of which is a source of its own, too",
        tags={"contract": first.code, "fingerprint": first.fingerprint} if is_one else {},
    )


def _field(feature: Feature) -> feast.Field:
    tags = {"default": str(feature.default)} if feature.default is not None else {}
    return feast.Field(name=feature.name, dtype=FEAST_TYPES[feature.value_type], description=feature.doc, tags=tags)


_TOPICS_TAG: Final = "topics"


def is_streamed(view: Any) -> bool:
    """Whether a view of Feast's is one of ours, whose rows a stream writes."""
    return isinstance(view, feast.StreamFeatureView) and _TOPICS_TAG in view.tags


class StreamView(feast.StreamFeatureView):
    """A view in the catalogue. The stream computes it, and never calls its function."""

    @property
    def schema(self) -> list[feast.Field]:  # type: ignore[override]  # Feast says that it may be set, and can't
        """The features in order, without the key.

        Feast's has both, as a set: what the registry reads back would be another view, with the key for a feature, and
        each `apply` a new version of it.
        """
        return list(self.features)


def _stream_view(plan: Plan, spec: ViewSpec, entities: dict[str, Any], stream: feast.KafkaSource) -> StreamView:
    entity = plan.entity(spec.entities[0])
    udf, source = _function(spec, "by the stream, from its events")
    return StreamView(
        name=spec.name,
        source=stream,
        entities=[entities[entity.name]],
        ttl=timedelta(milliseconds=duration_ms(entity.forget_after)) if entity.forget_after else timedelta(0),
        schema=[
            feast.Field(name=entity.key, dtype=feast_types.String),
            *(_field(feature) for feature in features_of(spec)),
        ],
        timestamp_field="occurred_at",
        aggregations=list(_aggregations(spec)),
        # Feast is to materialize nothing of it: its stream writes its rows.
        online=False,
        # As the registry reads it back; without a function Feast can't print a stream view.
        mode="python",
        udf=udf,
        udf_string=source,
        description=spec.doc,
        owner=spec.owner,
        tags={**spec.tags, _TOPICS_TAG: stream.name.replace(",", ", ")},
    )


_FUNCTIONS: Final[dict[type[Aggregation], str]] = {
    kinds.Count: "count",
    kinds.Sum: "sum",
    kinds.Mean: "mean",
    kinds.Min: "min",
    kinds.Max: "max",
    kinds.Std: "std",
    kinds.Distinct: "count_distinct",
}


def _aggregations(view: ViewSpec) -> Iterator[FeastAggregation]:
    """The windows of a view that Feast has words for: for who looks, as nobody there computes them."""
    for spec in view.features:
        if not isinstance(spec, Aggregation) or spec.by or spec.where is not None:
            continue
        if (function := _FUNCTIONS.get(type(spec))) is None:
            continue
        for window in (each for each in spec.windows if not each.unbounded):
            yield FeastAggregation(
                column=spec.field or "event_id",
                function=function,
                time_window=timedelta(milliseconds=window.width_ms),
                slide_interval=timedelta(milliseconds=hop_ms(window.width_ms)),
                name=f"{spec.name}_{window.name}",
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


def projection(view: type, *names: str) -> FeatureViewProjection:
    """Features of a view of ours (all of them unless named) as a source of an on-demand view in Feast's words.

    Raises:
        ValueError: if the class is no view, or has no feature of a name.
    """
    if view not in VIEWS:
        msg = f"{view!r} is no view: give a class that @view made"
        raise ValueError(msg)
    spec = VIEWS[view].spec
    known = {feature.name: feature for feature in features_of(spec)}
    if unknown := [name for name in names if name not in known]:
        msg = f"{spec.name} has no feature {unknown[0]!r}; it has: {', '.join(known)}"
        raise ValueError(msg)
    return FeatureViewProjection(
        name=spec.name,
        name_alias=None,
        desired_features=[],
        features=[_field(known[name]) for name in names or known],
        join_key_map={},
    )


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
