"""`headrace doctor`: are Kafka, Redis and the applied plan there, and do they agree?"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import redis
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import (  # type: ignore[attr-defined]  # where they are documented
    AdminClient,
    ConfigResource,
    OffsetSpec,
)

from config.brokers import is_embedded, topics_there
from config.settings import DEAD_LETTER_SUFFIX, Settings
from features.plan import CodeChangedError, Plan
from store.commit import CommitRecord, NotAppliedError, RecordError, read_record
from store.connect import connect, servers
from store.keys import Keyspace
from store.plans import ApplyError, NotAppliedPlanError, load_plan, plan_changes
from streams.kafka import TopicChangedError, TopicIds
from streams.schemas import SchemaRegistryError, Schemas

_KAFKA_TIMEOUT_S: Final = 10.0
_BEHIND_S: Final = 60
_LETTERS_S: Final = 3600
_EARLIEST: Final = OffsetSpec.earliest()  # type: ignore[no-untyped-call]  # it has no types
_LATEST: Final = OffsetSpec.latest()  # type: ignore[no-untyped-call]  # as above
_REFUSED_MAX: Final = 0.1
"""The part of what came that may be refused."""


class Check(NamedTuple):
    """One thing that was looked at: `good` is None where it is not known, or may be as meant."""

    what: str
    good: bool | None
    found: str


def examine(settings: Settings) -> Iterator[Check]:
    """One check after the other; a failed one says what to do."""
    plan: Plan | None = None
    try:
        plan = load_plan(settings)
        changed = plan_changes(settings).changes
        yield Check("plan", good=True, found=f"plan {plan.fingerprint} is applied")
        yield Check(
            "definitions",
            good=not changed,
            found=f"{len(changed)} changes not applied: run `headrace plan`" if changed else "as applied",
        )
    except (NotAppliedPlanError, ApplyError, CodeChangedError, FileNotFoundError, ValueError) as error:
        yield Check("plan", good=False, found=str(error))
    except (redis.RedisError, OSError) as error:
        yield Check("plan", good=False, found=f"it is in Redis: {type(error).__name__}")
    yield from _redis(settings, plan)
    yield from _kafka(settings, plan)
    yield from _registry(settings, plan)


def _registry(settings: Settings, plan: Plan | None) -> Iterator[Check]:
    """Whether the schema registry answers, where records begin with its ids."""
    if plan is None or not any(spec.reads.format in ("avro", "protobuf") for spec in plan.events):
        return
    try:
        n = len(Schemas(settings).get(lambda client: client.get_subjects()))
        yield Check("schema registry", good=True, found=f"{settings.schema_registry}: {n} subjects")
    except (OSError, LookupError, SchemaRegistryError) as error:
        yield Check("schema registry", good=False, found=str(error.args[0]))


def _redis(settings: Settings, plan: Plan | None) -> Iterator[Check]:
    try:
        client: Any = connect(settings.redis_url.get_secret_value(), settings.redis_timeout_s)
        for server in servers(client):
            info: Any = server.info()
            yield Check("redis", good=True, found=f"version {info['redis_version']}, {info['used_memory_human']} used")
            policy = info.get("maxmemory_policy", "noeviction")
            remedy = "" if policy == "noeviction" else ": it drops single rows and so breaks counts; set noeviction"
            yield Check("redis maxmemory-policy", good=not remedy, found=policy + remedy)
            if info["aof_enabled"]:
                yield _loads_truncated(server)
            elif info.get("connected_slaves"):
                yield _persistence(server)
        if plan is not None:
            records = Keyspace.of(plan).commit_records(plan.stored_entities)
            for key in records:
                read_record(client, key)
            yield Check("commit records", good=True, found=f"{len(records)} shards")
    except (NotAppliedError, RecordError) as error:
        yield Check("commit records", good=False, found=str(error))
    except (redis.RedisError, OSError, ValueError) as error:
        yield Check("redis", good=False, found=f"{type(error).__name__}: {error}; is HEADRACE_REDIS_URL right?")


def _loads_truncated(server: Any) -> Check:
    """An append-only file cut within a commit and loaded nevertheless does half of that commit at the next start."""
    what, value = "redis aof-load-truncated", _config(server, "aof-load-truncated")
    if value is None:
        return Check(what, good=None, found="this Redis does not say: see to it that it is no (docs/reliability.md)")
    remedy = "" if value == "no" else ": set no, mend a cut file by `redis-check-aof --fix` (docs/reliability.md)"
    return Check(what, good=not remedy, found=value + remedy)


def _persistence(server: Any) -> Check:
    """A master that comes back empty while it is, or becomes again, the master empties its replicas."""
    what, value = "redis persistence", _config(server, "save")
    if value is None:
        return Check(what, good=None, found="this Redis does not say: see to it that it has some (docs/reliability.md)")
    remedy = "" if value else "none, but replicas: one that restarts empty can empty them all; set appendonly yes"
    return Check(what, good=not remedy, found=remedy or f"save {value}")


def _config(server: Any, name: str) -> str | None:
    """A setting; None where Redis does not let us ask, as many a provider's."""
    try:
        value = server.config_get(name).get(name)
    except redis.ResponseError:
        return None
    return None if value is None else str(value)


def _kafka(settings: Settings, plan: Plan | None) -> Iterator[Check]:
    try:
        there = topics_there(settings, settings.redis_timeout_s)
        yield Check("kafka", good=True, found=f"{settings.kafka}: {len(there)} topics")
        topics = [topic for topic in plan.topics if topic in there] if plan else []
        for topic in plan.topics if plan else ():
            if topic not in there:
                yield Check(f"topic {topic}", good=False, found="not there: run `headrace apply`")
        client = AdminClient(settings.librdkafka())
        if plan is None or not topics or is_embedded(client, _KAFKA_TIMEOUT_S):
            yield from (Check(f"topic {name}", True, f"{len(there[name].partitions)} partitions") for name in topics)
            return
        records = list(_records(settings, plan))
        ids = TopicIds(settings, topics).known
        asked = client.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, name) for name in topics])
        configs = {asked_of.name: done.result(_KAFKA_TIMEOUT_S) for asked_of, done in asked.items()}
        for name in topics:
            partitions = [TopicPartition(name, number) for number in sorted(there[name].partitions)]
            yield _as_it_should_be(name, len(partitions), configs[name])
            yield from _made_anew(name, ids.get(name, ""), records)
            yield _lag(client, partitions, records)
            yield _refused(client, partitions, there.get(name + DEAD_LETTER_SUFFIX))
    except KafkaException as error:
        yield Check("kafka", good=False, found=f"{settings.kafka}: {error}; is it up, and is HEADRACE_KAFKA right?")


def _records(settings: Settings, plan: Plan) -> Iterator[CommitRecord]:
    with suppress(NotAppliedError, RecordError, redis.RedisError, OSError):  # It was said before.
        client: Any = connect(settings.redis_url.get_secret_value(), settings.redis_timeout_s)
        for key in Keyspace.of(plan).commit_records(plan.stored_entities):
            yield read_record(client, key)


def _as_it_should_be(name: str, partitions: int, config: Any) -> Check:
    what, found = f"topic {name}", f"{partitions} partitions"
    if "compact" in config["cleanup.policy"].value:
        return Check(what, good=False, found=f"{found}, but cleanup.policy=compact, which drops events: set delete")
    if config["message.timestamp.type"].value != "LogAppendTime":
        doubt = "times of records are the producers': where their clocks are wrong, late events may count as of then"
        return Check(what, good=None, found=f"{found}, message.timestamp.type=CreateTime: {doubt}; set LogAppendTime")
    return Check(what, good=True, found=found)


def _made_anew(name: str, topic_id: str, records: Sequence[CommitRecord]) -> Iterator[Check]:
    others = {other for record in records if (other := record.of_other_topic(name, topic_id))}
    if others:
        yield Check(f"topic {name}", good=False, found=str(TopicChangedError(name, others.pop(), topic_id)))


def _lag(client: AdminClient, partitions: Sequence[TopicPartition], records: Sequence[CommitRecord]) -> Check:
    """How far the shard that is furthest behind is behind what came until a minute ago."""
    what = f"lag of {partitions[0].topic}"
    ends = _offsets(client, partitions, _LATEST)
    old = _offsets(client, partitions, OffsetSpec.for_timestamp(_ago_ms(_BEHIND_S)))
    lows = _offsets(client, partitions, _EARLIEST)
    behind = overdue = 0
    for each in partitions:
        known = [record.position(each.topic, each.partition) for record in records]
        at = max(min((position.next if position else 0 for position in known), default=0), lows[each])
        behind += max(ends[each] - at, 0)
        # There is no offset of a time after the last record's.
        overdue += max((old[each] if old[each] >= 0 else ends[each]) - at, 0)
    if overdue:
        remedy = "does `headrace stream` run, and does it keep up?"
        return Check(what, good=False, found=f"{overdue:,} records came more than {_BEHIND_S} s ago: {remedy}")
    return Check(what, good=True, found=f"{behind:,} records")


def _refused(client: AdminClient, partitions: Sequence[TopicPartition], dead_letters: Any) -> Check:
    """What was refused in the last hour, beside what came."""
    name = partitions[0].topic
    what = f"dead letters of {name}"
    letters = (
        [TopicPartition(name + DEAD_LETTER_SUFFIX, number) for number in dead_letters.partitions]
        if dead_letters
        else []
    )
    came, refused = (_since(client, each, _ago_ms(_LETTERS_S)) for each in (partitions, letters))
    found = f"{refused:,} in the last hour, in which {came:,} records came"
    if not refused:
        return Check(what, good=True, found=found)
    remedy = f"the reason of each is in its headers, in {name}{DEAD_LETTER_SUFFIX}"
    return Check(what, good=False if refused > came * _REFUSED_MAX else None, found=f"{found}: {remedy}")


def _since(client: AdminClient, partitions: Sequence[TopicPartition], ms: int) -> int:
    first, last = (_offsets(client, partitions, spec) for spec in (OffsetSpec.for_timestamp(ms), _LATEST))
    return sum(last[each] - first[each] for each in partitions if first[each] >= 0)


def _offsets(client: AdminClient, partitions: Sequence[TopicPartition], spec: OffsetSpec) -> dict[TopicPartition, int]:
    """Offsets of partitions; -1 where there is none."""
    asked = client.list_offsets(dict.fromkeys(partitions, spec), request_timeout=_KAFKA_TIMEOUT_S) if partitions else {}
    return {each: done.result().offset for each, done in asked.items()}


def _ago_ms(seconds: int) -> int:
    return time.time_ns() // 1_000_000 - seconds * 1000
