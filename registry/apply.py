"""`apply`: registers the declarations in Feast, creates their topics and initialises their commit records."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import redis
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from feast import FeatureStore

from features.plan import Plan
from registry.definitions import compile_definitions
from registry.settings import DEAD_LETTER_BYTES_MAX, DEAD_LETTER_SUFFIX, Settings
from registry.store import applied_plan, changes, project_of, register
from store.commit import initialise
from store.keys import Keyspace

if TYPE_CHECKING:
    from kafka.admin import NewTopic

_KAFKA_TIMEOUT_S = 15.0


class ApplyError(RuntimeError):
    """What is declared can't be applied over what is."""


@dataclass(frozen=True)
class Applied:
    """What `apply` did."""

    plan: Plan
    changes: list[str]
    topics: list[str]
    records: int


def plan_changes(settings: Settings) -> tuple[Plan, list[str]]:
    """The declared plan, and what applying it would change.

    Raises:
        ApplyError: if it would change the number of shards, which decides where every row is.
    """
    declared = compile_definitions(settings.definitions, project_of(settings.repo), settings.shards)
    before = applied_plan(FeatureStore(repo_path=str(settings.repo)))
    if before is not None and before.shards != declared.shards:
        msg = (
            f"HEADRACE_SHARDS={declared.shards}, but this project was applied with {before.shards} and its rows are "
            f"kept so; set it to {before.shards}, or start a new project"
        )
        raise ApplyError(msg)
    return declared, changes(before, declared)


def apply(settings: Settings, client: redis.Redis) -> Applied:
    """Applies what is declared; a second time there is nothing to do."""
    plan, changed = plan_changes(settings)
    topics = create_topics(settings, plan)
    if changed:
        register(FeatureStore(repo_path=str(settings.repo)), plan, settings.kafka)
    keyspace = Keyspace(plan.project, plan.shards)
    records = initialise(client, keyspace, sorted({view.entities[0] for view in plan.views if len(view.entities) == 1}))
    return Applied(plan, changed, topics, records)


def create_topics(settings: Settings, plan: Plan) -> list[str]:
    """Creates the topics that aren't there, event topics with the broker's own timestamps; returns their names.

    Raises:
        ApplyError: if the broker can't be reached or refuses.
    """
    topics = [spec.topic for spec in plan.events]
    wanted = [
        *(_topic(settings, name, {"message.timestamp.type": "LogAppendTime"}) for name in topics),
        *(
            _topic(settings, name + DEAD_LETTER_SUFFIX, {"max.message.bytes": str(DEAD_LETTER_BYTES_MAX)})
            for name in topics
        ),
    ]
    client = AdminClient(settings.librdkafka())
    try:
        # Also the check whether Kafka is there: kafka-python takes twice as long to say so, and leaves sockets open.
        there = client.list_topics(timeout=_KAFKA_TIMEOUT_S).topics
        missing = [topic for topic in wanted if topic.name not in there]
        if settings.topics == "auto":
            for topic in missing:
                client.list_topics(topic.name, timeout=_KAFKA_TIMEOUT_S)
            return []
    except KafkaException as error:
        raise _unreachable(settings, error) from error
    return _create(settings, missing) if missing else []


def _unreachable(settings: Settings, error: Exception) -> ApplyError:
    return ApplyError(
        f"Kafka at {settings.kafka}: {type(error).__name__}: {error}; is it up, and is HEADRACE_KAFKA right?"
    )


def kafka_python(settings: Settings) -> dict[str, Any]:
    """HEADRACE_KAFKA_OPTIONS, which are librdkafka's, under kafka-python's names."""
    names = {
        "security.protocol": "security_protocol",
        "sasl.mechanism": "sasl_mechanism",
        "sasl.mechanisms": "sasl_mechanism",
        "sasl.username": "sasl_plain_username",
        "sasl.password": "sasl_plain_password",
        "ssl.ca.location": "ssl_cafile",
        "ssl.certificate.location": "ssl_certfile",
        "ssl.key.location": "ssl_keyfile",
    }
    return {names[name]: value for name, value in settings.kafka_options.items() if name in names}


def _topic(settings: Settings, name: str, configs: dict[str, str]) -> NewTopic:
    from kafka.admin import NewTopic

    return NewTopic(
        name=name, num_partitions=settings.partitions, replication_factor=settings.replication, topic_configs=configs
    )


def _create(settings: Settings, missing: list[NewTopic]) -> list[str]:
    from kafka.admin import KafkaAdminClient
    from kafka.errors import KafkaError, TopicAlreadyExistsError

    created = []
    try:
        admin = KafkaAdminClient(
            bootstrap_servers=settings.kafka.split(","),
            request_timeout_ms=int(_KAFKA_TIMEOUT_S * 1000),
            **kafka_python(settings),
        )
        try:
            for topic in missing:
                with suppress(TopicAlreadyExistsError):
                    admin.create_topics([topic])
                    created.append(topic.name)
        finally:
            admin.close()
    except KafkaError as error:
        raise _unreachable(settings, error) from error
    return created
