"""`apply`: registers the declarations in Feast, creates their topics and initialises their commit records."""

from __future__ import annotations

from dataclasses import dataclass

import redis
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # where it is documented
from feast import FeatureStore

from features.plan import Plan
from registry.brokers import topics_there, unreachable
from registry.definitions import compile_definitions
from registry.settings import DEAD_LETTER_BYTES_MAX, DEAD_LETTER_SUFFIX, Settings
from registry.store import applied_plan, changes, project_of, register
from store.commit import initialise
from store.keys import Keyspace

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
    records = initialise(client, Keyspace(plan.project, plan.shards), plan.stored_entities)
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
    try:
        there = topics_there(settings, _KAFKA_TIMEOUT_S)
        missing = [topic for topic in wanted if topic.topic not in there]
        if settings.topics == "auto":
            topics_there(settings, _KAFKA_TIMEOUT_S, [topic.topic for topic in missing])
            return []
        return _create(settings, missing) if missing else []
    except KafkaException as error:
        raise ApplyError(unreachable(settings, error)) from error


def _topic(settings: Settings, name: str, configs: dict[str, str]) -> NewTopic:
    return NewTopic(name, settings.partitions, settings.replication, config=configs)


def _create(settings: Settings, missing: list[NewTopic]) -> list[str]:
    client = AdminClient(settings.librdkafka())
    created = []
    for name, done in client.create_topics(missing, operation_timeout=_KAFKA_TIMEOUT_S).items():
        try:
            done.result()
            created.append(name)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise
    return created
