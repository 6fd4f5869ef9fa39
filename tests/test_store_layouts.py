"""Rows in a real Redis that streams of several plans have written, read by servers of each of them."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import msgspec
import pyarrow as pa
import pytest

from features.evolve import succeed
from features.plan import Plan
from serving import wire
from store.connect import connect
from store.plans import append_plan
from tests.support.served import NOW_MS, Clock, Rows, catalogue, random_events, served, settings_of, with_windows

HOUR_MS = 3_600_000


@pytest.fixture
def clock() -> Clock:
    return Clock()


def applied(redis_url: str, before: Plan | None, declared: Plan) -> Plan:
    """The plan, applied after another."""
    plan = succeed(before, declared, now_ms=NOW_MS)
    append_plan(connect(redis_url, 10), plan, NOW_MS)
    return plan


async def answers(redis_url: str, plan: Plan, clock: Clock) -> list[dict[str, Any]]:
    """Everything that a server of the plan says of all users and items."""
    found = []
    async with served(settings_of(redis_url), plan, clock) as http:
        for kind, entity_id in [("user", f"u{n}") for n in range(4)] + [("item", f"i{n}") for n in range(10)]:
            answer = await http.get(f"/v1/entities/{kind}/{entity_id}")
            assert answer.status_code == 200, answer.text
            found.append(answer.json()["features"])
    return found


def common(of: list[dict[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """What a plan has of answers, to nine digits: tiles are added in another order where windows differ."""
    return [{name: rounded(value) for name, value in each.items() if name in plan.features} for each in of]


def rounded(value: Any) -> Any:
    """The value, and what it holds, to nine digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return float(f"{value:.9g}") if isinstance(value, float) else value


async def test_streams_and_servers_of_three_plans_in_any_order(redis_url: str, clock: Clock) -> None:
    """Windows are added, then taken back: every server answers, and what all plans have is the same in all answers.

    Rows are of the first plan, then some of the second, then some of the third; each server reads all. A server that
    knew only the plans that there were when it started would answer 503.
    """
    first = applied(redis_url, None, catalogue())
    rows = Rows(first, redis_url, clock)
    rows.write_all(random_events(1, users=4, items=10, n=200))
    before = common(await answers(redis_url, first, clock), first)

    second = applied(redis_url, first, with_windows(first, "2h", "30d"))
    assert common(await answers(redis_url, second, clock), first) == before
    rows = rows.under(second)
    rows.write_all(random_events(2, users=2, items=3, n=40))
    mixed = await answers(redis_url, second, clock)
    assert common(mixed, first) == common(await answers(redis_url, first, clock), first) != before

    third = applied(redis_url, second, catalogue())
    rows = rows.under(third)
    clock.now_ms += HOUR_MS
    rows.write_all(random_events(3, users=1, items=2, n=20, end_ms=clock.now_ms))
    every = [common(await answers(redis_url, plan, clock), first) for plan in (first, second, third)]
    assert every[0] == every[1] == every[2]


async def test_a_server_reads_what_a_plan_writes_that_is_applied_while_it_runs(redis_url: str, clock: Clock) -> None:
    """It has read no other plan when the first row of one is there."""
    first = applied(redis_url, None, catalogue())
    rows = Rows(first, redis_url, clock)
    async with served(settings_of(redis_url), first, clock) as http:
        second = applied(redis_url, first, with_windows(first, "2h"))
        rows = rows.under(second)
        rows.write("clicks", [{"t": NOW_MS - 1000, "user_id": "u1", "item_id": "i1"}])
        answer = await http.get("/v1/entities/user/u1")
        assert answer.status_code == 200, answer.text
        assert answer.json()["features"]["user_activity__clicks_1h"] == 1


async def test_what_a_new_feature_lacks_is_said_wherever_it_is_read(redis_url: str, clock: Clock) -> None:
    """Until a stream takes the plan up, not when it will be complete; then until when; then nothing more."""
    first = applied(redis_url, None, catalogue())
    rows = Rows(first, redis_url, clock)
    rows.write_all(random_events(1, users=1, items=2, n=100))
    declared = with_windows(first, "2h", "30d")
    new = ("user_activity__clicks_2h", "user_activity__clicks_30d", "item_activity__clicks_30d")
    services = tuple(
        msgspec.structs.replace(each, features=(*each.features, *new)) if each.name == "ranking_v1" else each
        for each in declared.services
    )
    second = applied(redis_url, first, msgspec.structs.replace(declared, services=services))
    body = {"service": "ranking_v1", "user_id": "u0", "item_ids": ["i0"]}
    async with served(settings_of(redis_url), second, clock) as http:
        assert (await http.post("/v1/features", json=body)).json()["incomplete"] == dict.fromkeys(new)
        rows = rows.under(second)
        taken_ms = clock.now_ms
        clock.now_ms += 1000
        # Of 30 days with a hop of one, 7 were known; of 2 hours with a hop of 5 minutes, one.
        until_ms, soon_ms = taken_ms + 24 * 24 * HOUR_MS, taken_ms + HOUR_MS + 5 * 60_000

        async def said() -> Any:
            return (await http.post("/v1/features", json=body)).json()["incomplete"]

        while (await said())[new[1]] is None:  # noqa: ASYNC110  # the server looks by itself
            await asyncio.sleep(0.02)
        expected = {new[0]: soon_ms, new[1]: until_ms, new[2]: until_ms}
        assert await said() == expected
        entity = (await http.get("/v1/entities/user/u0")).json()["incomplete"]
        assert entity[new[1]] == until_ms
        assert not {name for name in entity if name in first.features}
        assert (await http.get("/v1/services/ranking_v1")).json()["incomplete"] == expected
        explained = (await http.post("/v1/features", json=body | {"explain": True})).json()
        assert explained["user"]["explain"][new[1]]["complete_from"] == until_ms
        assert "complete_from" not in explained["user"]["explain"]["user_activity__clicks_1h"]
        table = pa.ipc.open_stream(
            (await http.post("/v1/features", json=body, headers={"Accept": wire.ARROW})).content
        ).read_all()
        of_fields = {field.name: field.metadata for field in table.schema if field.metadata}
        assert of_fields == {name: {b"complete_from": str(at_ms).encode()} for name, at_ms in expected.items()}
        npy = await http.post("/v1/features", json=body, headers={"Accept": wire.NPY})
        names = (await http.get("/v1/services/ranking_v1")).json()["matrix"]
        assert [names[int(at)] for at in npy.headers["x-incomplete-columns"].split(",")] == list(new)
        feast = await http.post(
            "/get-online-features",
            json={
                "entities": {"user_id": ["u0", "nobody"]},
                "features": ["user_activity:clicks_2h", "user_activity:clicks_30d"],
            },
        )
        statuses = [each["statuses"] for each in feast.json()["results"]]
        assert statuses[1:] == [["OUTSIDE_MAX_AGE", "NOT_FOUND"]] * 2
        clock.now_ms = soon_ms
        assert await said() == dict.fromkeys(new[1:], until_ms)
        clock.now_ms = until_ms
        assert "incomplete" not in (await http.post("/v1/features", json=body)).json()


async def test_a_row_of_no_applied_plan_is_named(redis_url: str, clock: Clock) -> None:
    """It is not read as one of ours, and the error says where it is."""
    plan = applied(redis_url, None, catalogue())
    rows = Rows(plan, redis_url, clock)
    rows.write("clicks", [{"t": NOW_MS - 1000, "user_id": "u1", "item_id": "i1"}])
    key = rows.key_of("user_activity", "u1")
    rows.client.set(key, b"\x00\x01\x02\x03" + rows.client.get(key)[4:])
    async with served(settings_of(redis_url), plan, clock) as http:
        answer: httpx.Response = await http.get("/v1/entities/user/u1")
    assert answer.status_code == 503
    assert f"{key.decode()!r}: not a row of user_activity: layout 00010203" in answer.json()["detail"]
