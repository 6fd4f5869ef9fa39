"""The applied plans: a list in Redis, the newest last, that streams and servers read and only `apply` adds to.

An entry says what was applied, when and by whom. A plan that is applied again after another, as a roll-back is, is
added again: the list is the history, and its last entry is what runs.
"""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from typing import Any, Final, NamedTuple

import msgspec
import redis
import structlog

from config.settings import Settings, project_of
from features.changes import Change, changes
from features.definitions import compile_definitions
from features.evolve import succeed
from features.plan import Plan
from store.commit import read_records, taken_by_all
from store.connect import connect
from store.given import GivenStore
from store.keys import Keyspace, generation_key, plans_key
from store.layouts import Layouts

_APPEND_LUA: Final = """
if redis.call('LLEN', KEYS[1]) ~= tonumber(ARGV[1]) then return 0 end
return redis.call('RPUSH', KEYS[1], ARGV[2])
"""

_WATCH_S: Final = 0.5

log = structlog.get_logger()


class NotAppliedPlanError(RuntimeError):
    """There is no applied plan."""


class ApplyError(RuntimeError):
    """What is declared can't be applied over what is."""


class Applied(msgspec.Struct, frozen=True):
    """An entry of the list. The plan is kept as it was encoded: one of a later version must not hide the others."""

    fingerprint: str
    at_ms: int
    by: str
    plan: msgspec.Raw

    def decoded(self) -> Plan:
        """The plan.

        Raises:
            ValueError: if it is one of another version of Headrace.
        """
        return Plan.decode(bytes(self.plan))


def append_plan(client: redis.Redis, plan: Plan, now_ms: int) -> None:
    """Makes `plan` the one that runs.

    Raises:
        ApplyError: if another was applied since the one that it comes after.
    """
    by = f"{getpass.getuser()}@{socket.gethostname()}"
    entry = Applied(plan.fingerprint, now_ms, by, msgspec.Raw(plan.encode().encode()))
    encoded = msgspec.json.encode(entry)
    if not _execute(client, "EVAL", _APPEND_LUA, 1, plans_key(plan.project), plan.number, encoded):
        msg = "another plan was applied meanwhile: see `headrace history`, then run `headrace apply` again"
        raise ApplyError(msg)


def next_generation(client: redis.Redis, project: str) -> int:
    """The number of a generation of rows that nobody writes to: see `features.plan.Plan.generation`."""
    return int(_execute(client, "INCR", generation_key(project)))


def applied_plans(client: redis.Redis, project: str) -> list[Applied]:
    """All that were ever applied, oldest first."""
    entries = _execute(client, "LRANGE", plans_key(project), 0, -1)
    return [_decoded(entry) for entry in entries]


def layouts_of(client: redis.Redis, plan: Plan) -> Layouts:
    """The layouts of the plan's rows and, read when they are needed, of those of all other applied plans."""

    def fetch(first: int, last: int) -> list[Plan | None]:
        entries = _execute(client, "LRANGE", plans_key(plan.project), first, last)
        return [_readable(_decoded(entry)) for entry in entries]

    return Layouts(plan, fetch, GivenStore(client, plan.project).find)


def _readable(entry: Applied) -> Plan | None:
    try:
        return entry.decoded()
    except ValueError:
        return None


def applied_plan(client: redis.Redis, project: str, number: int | None = None) -> Plan | None:
    """The plan of a number, by default the one that runs; None before the first `apply`.

    Raises:
        ValueError: if it is one of another version of Headrace.
    """
    entry = _execute(client, "LINDEX", plans_key(project), -1 if number is None else number)
    return None if entry is None else _decoded(entry).decoded()


def watch_newest(settings: Settings, found: Callable[[int], object]) -> None:
    """Gives the number of the newest applied plan now, and whenever there is another, as long as this process lives."""
    key, client = plans_key(project_of(settings.repo)), _connected(settings)

    def watch() -> None:
        known = -1
        while True:
            with suppress(redis.RedisError, OSError):  # Who reads or writes says so.
                newest = int(_execute(client, "LLEN", key)) - 1
                if newest != known:
                    known = newest
                    found(newest)
            time.sleep(_WATCH_S)

    Thread(target=watch, daemon=True).start()


class Proposal(NamedTuple):
    """What is declared as the plan that would come next, what applying it would change, and what is applied."""

    plan: Plan
    changes: list[Change]
    applied: Plan | None


def plan_changes(
    settings: Settings,
    client: redis.Redis | None = None,
    clock: Callable[[], float] = time.time,
    *,
    ordinary: Plan | None,
) -> Proposal:
    """What is declared as the plan that would come next, and what applying it would change.

    Args:
        settings: the settings.
        client: Redis.
        clock: seconds since the epoch.
        ordinary: a plan of the ordinary views that are declared: see `registry.ordinary`.

    Raises:
        ApplyError: if it would change the number of shards, which decides where every row is.
    """
    declared = compile_definitions(settings.definitions, project_of(settings.repo), settings.shards, ordinary)
    client = client or _connected(settings)
    before = applied_plan(client, declared.project)
    if before is not None and before.shards != declared.shards:
        msg = (
            f"HEADRACE_SHARDS={declared.shards}, but this project was applied with {before.shards} and its rows are "
            f"kept so; set it to {before.shards}, or have all made anew with so many: `headrace rebuild`"
        )
        raise ApplyError(msg)
    now_ms = int(clock() * 1000)
    records = read_records(client, Keyspace.of(before).commit_records(before.stored_entities)) if before else []
    taken_ms = taken_by_all(records, before.needs) if before else {}
    plan = succeed(before, declared, taken_ms, now_ms)
    return Proposal(plan, changes(before, plan, now_ms, taken_ms), before)


def load_plan(settings: Settings, client: redis.Redis | None = None, number: int | None = None) -> Plan:
    """The plan of a number, by default the newest, for those who run it.

    Says so when the definitions are not what it is.

    Raises:
        NotAppliedPlanError: if nothing was applied.
    """
    project = project_of(settings.repo)
    plan = applied_plan(client or _connected(settings), project, number)
    if plan is None:
        msg = (
            f"nothing is applied in Redis for project {project!r}: run `headrace apply` first "
            "(if it ran before, Redis has lost its data)"
        )
        raise NotAppliedPlanError(msg)
    declared = succeed(plan, compile_definitions(settings.definitions, plan.project, plan.shards, ordinary=plan))
    if different := changes(plan, declared, 0):
        remedy = "the applied plan runs; see `headrace plan`, then `headrace apply`"
        names = [f"{each.kind} {each.what} {each.name}" for each in different[:10]]
        log.warning("definitions_differ", plan=plan.fingerprint, changes=names, remedy=remedy)
    return plan


def _execute(client: Any, *words: Any) -> Any:
    """A command by its words: a cluster's client has no method for each."""
    return client.execute_command(*words)


def _connected(settings: Settings) -> redis.Redis:
    return connect(settings.redis_url.get_secret_value(), settings.redis_timeout_s)


def _decoded(entry: bytes) -> Applied:
    try:
        return msgspec.json.decode(entry, type=Applied)
    except msgspec.MsgspecError as error:
        msg = f"Redis holds {entry[:100]!r} in place of an applied plan: what else writes to this database?"
        raise ValueError(msg) from error
