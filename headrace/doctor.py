"""`headrace doctor`: are Kafka, Redis and the registry there, and do they agree?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import redis
from confluent_kafka import KafkaException

from features.plan import CodeChangedError, Plan
from registry.apply import ApplyError, plan_changes
from registry.brokers import topics_there
from registry.settings import Settings
from registry.store import NotAppliedPlanError, load_plan
from store.commit import NotAppliedError, RecordError, read_record
from store.connect import connect, servers
from store.keys import Keyspace


class Check(NamedTuple):
    """One thing that was looked at."""

    what: str
    good: bool
    found: str


def examine(settings: Settings) -> Iterator[Check]:
    """One check after the other; a failed one says what to do."""
    plan: Plan | None = None
    try:
        plan = load_plan(settings)
        changed = plan_changes(settings)[1]
        yield Check("registry", good=True, found=f"plan {plan.fingerprint} is applied")
        yield Check(
            "definitions",
            good=not changed,
            found=f"{len(changed)} changes not applied: run `headrace plan`" if changed else "as applied",
        )
    except (NotAppliedPlanError, ApplyError, CodeChangedError, OSError, ValueError) as error:
        yield Check("registry", good=False, found=str(error))
    yield from _redis(settings, plan)
    yield from _kafka(settings, plan)


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
            records = Keyspace(plan.project, plan.shards).commit_records(plan.stored_entities)
            for key in records:
                read_record(client, key)
            yield Check("commit records", good=True, found=f"{len(records)} shards")
    except (NotAppliedError, RecordError) as error:
        yield Check("commit records", good=False, found=str(error))
    except (redis.RedisError, OSError, ValueError) as error:
        yield Check("redis", good=False, found=f"{type(error).__name__}: {error}; is HEADRACE_REDIS_URL right?")


def _loads_truncated(server: Any) -> Check:
    """An append-only file cut within a commit and loaded nevertheless does half of that commit at the next start."""
    value = _config(server, "aof-load-truncated")
    remedy = "" if value == "no" else ": set no, mend a cut file by `redis-check-aof --fix` (docs/reliability.md)"
    return Check("redis aof-load-truncated", good=value != "yes", found=value + remedy)


def _persistence(server: Any) -> Check:
    """A master that comes back empty while it is, or becomes again, the master empties its replicas."""
    value = _config(server, "save")
    remedy = "" if value else "none, but replicas: one that restarts empty can empty them all; set appendonly yes"
    return Check("redis persistence", good=not remedy, found=remedy or f"save {value}")


def _config(server: Any, name: str) -> str:
    try:
        return str(server.config_get(name).get(name, "not known"))
    except redis.ResponseError as error:
        return f"not known ({error})"


def _kafka(settings: Settings, plan: Plan | None) -> Iterator[Check]:
    try:
        there = topics_there(settings, settings.redis_timeout_s)
    except KafkaException as error:
        yield Check("kafka", good=False, found=f"{settings.kafka}: {error}; is it up, and is HEADRACE_KAFKA right?")
        return
    yield Check("kafka", good=True, found=f"{settings.kafka}: {len(there)} topics")
    for spec in plan.events if plan else ():
        good = spec.topic in there
        found = f"{len(there[spec.topic].partitions)} partitions" if good else "not there: run `headrace apply`"
        yield Check(f"topic {spec.topic}", good, found)
