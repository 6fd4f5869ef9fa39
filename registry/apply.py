"""`apply`: registers the declarations in Feast, creates their topics and initialises their commit records."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import redis
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, NewTopic  # type: ignore[attr-defined]  # where it is documented
from feast import FeatureStore

from config.brokers import topics_there, unreachable
from config.settings import DEAD_LETTER_BYTES_MAX, DEAD_LETTER_SUFFIX, Settings
from features.changes import Change, in_the_way
from features.plan import Plan
from registry.register import register
from store.archive import archive_forgotten
from store.commit import initialise, join
from store.forgotten import write_forgotten
from store.keys import Keyspace
from store.plans import ApplyError, append_plan, plan_changes

_KAFKA_TIMEOUT_S = 15.0


@dataclass(frozen=True)
class Applied:
    """What `apply` did.

    Attributes:
        registered: whether Feast's registry held another plan, or none.
    """

    plan: Plan
    changes: list[Change]
    registered: bool
    topics: list[str]
    records: int

    def __bool__(self) -> bool:
        """Whether there was anything to do."""
        return bool(self.changes or self.registered or self.topics or self.records)


def apply(
    settings: Settings,
    client: redis.Redis,
    clock: Callable[[], float] = time.time,
    *,
    replace: Collection[str] = (),
) -> Applied:
    """Applies what is declared; a second time there is nothing to do.

    Redis gets the plan last: who runs it finds all that it needs, and an `apply` that was stopped is done again.

    Args:
        settings: the settings.
        client: Redis.
        clock: seconds since the epoch.
        replace: names of what may change its meaning or break producers: see `features.changes.Change.name`.

    Raises:
        ApplyError: if a change is refused or needs consent, another `apply` was quicker, or the broker is not there.
        ValueError: if nothing has a name that is to be replaced.
    """
    plan, changed, applied = plan_changes(settings, client, clock)
    if refused := in_the_way(plan, changed, replace):
        raise ApplyError("nothing is applied:\n" + "\n".join(f"  {each}" for each in refused))
    topics = create_topics(settings, plan)
    registered = _register(settings, plan)
    now_ms = int(clock() * 1000)
    records = _initialise(client, applied, plan, now_ms)
    if applied is None:  # Of who was forgotten before Redis lost all, the archive knows.
        write_forgotten(client, Keyspace.of(plan), archive_forgotten(settings, plan, client))
    if changed:
        append_plan(client, plan, now_ms)
    return Applied(plan, changed, registered, topics, records)


def put(settings: Settings, client: redis.Redis, plan: Plan, now_ms: int) -> None:
    """Applies a plan that declares what the applied one does: see `features.evolve.backfilling`.

    Raises:
        ApplyError: if another `apply` was quicker.
    """
    _register(settings, plan)
    append_plan(client, plan, now_ms)


def _register(settings: Settings, plan: Plan) -> bool:
    """Has Feast's registry hold the plan; returns False if it did."""
    return register(FeatureStore(repo_path=str(settings.repo)), plan, settings)


def _initialise(client: redis.Redis, applied: Plan | None, plan: Plan, now_ms: int) -> int:
    """Gives every shard its commit record; returns how many had none, or not one to go on from."""
    keyspace = Keyspace.of(plan)
    new = set(plan.stored_entities) - set(applied.stored_entities) if applied else set()
    joined = join(client, keyspace, new, plan, now_ms) if new else 0
    return joined + initialise(client, keyspace, plan.stored_entities)


def create_topics(settings: Settings, plan: Plan) -> list[str]:
    """Creates the topics that aren't there, event topics with the broker's own timestamps; returns their names.

    Raises:
        ApplyError: if the broker can't be reached or refuses.
    """
    topics = list(plan.topics)
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
