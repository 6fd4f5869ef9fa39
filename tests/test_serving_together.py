"""Requests that arrive together are evaluated together; nobody can tell from the answers."""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import msgspec
import numpy as np
import pyarrow as pa
import pytest

from features.plan import Plan, ServiceSpec
from headrace.embedded import EmbeddedRedis
from serving.lookup import _ROWS_TOGETHER_MAX
from tests.support.served import NOW_MS, Clock, Rows, catalogue, random_events, served, settings_of

FORMATS = ("application/json", "application/x-npy", "application/vnd.apache.arrow.stream")
READS = 2
"""MGETs of one read: of what the mirror may keep, and of the rest."""


@pytest.fixture(scope="module")
def plan() -> Plan:
    return catalogue()


@pytest.fixture
def redis() -> Iterator[EmbeddedRedis]:
    """A Redis that the test may stop, and whose commands are the test's alone."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture
def rows(plan: Plan, redis: EmbeddedRedis) -> Rows:
    return Rows(plan, redis.url, Clock())


@pytest.fixture
async def http(plan: Plan, redis: EmbeddedRedis, rows: Rows) -> AsyncIterator[httpx.AsyncClient]:
    async with served(settings_of(redis.url, items_max=2000), plan, Clock()) as client:
        yield client


def plainly(answer: httpx.Response) -> Any:
    """What an answer says."""
    kind = answer.headers["content-type"]
    if kind == FORMATS[1]:
        return np.load(io.BytesIO(answer.content)).tolist()
    if kind == FORMATS[2]:
        return pa.ipc.open_stream(answer.content).read_all().to_pylist()
    return answer.json()


def a_request(rng: random.Random, client: httpx.AsyncClient) -> httpx.Request:
    """Some user's features, or those of some user and items, in some format."""
    user_id = f"u{rng.randrange(5)}"
    if rng.random() < 0.4:
        return client.build_request("GET", f"/v1/entities/user/{user_id}?service=ranking_v1")
    body = {
        "service": "ranking_v1",
        "user_id": user_id,
        "item_ids": [f"i{rng.randrange(9)}" for _ in range(rng.randrange(7))],
    }
    if rng.random() < 0.3:
        body["on_error"] = "defaults"
    return client.build_request("POST", "/v1/features", json=body, headers={"Accept": rng.choice(FORMATS)})


def reads(rows: Rows) -> int:
    """How often Redis was asked for rows."""
    return int(rows.client.info("commandstats").get("cmdstat_mget", {"calls": 0})["calls"])


@pytest.mark.parametrize("seed", range(4))
async def test_every_request_is_answered_as_if_it_were_alone(http: httpx.AsyncClient, rows: Rows, seed: int) -> None:
    """Users, items, pairs and formats all mixed. Rows or pairs taken from a neighbour's place would show here."""
    rng = random.Random(seed)
    rows.write_all(random_events(seed, users=4, items=8, n=300))
    requests = [a_request(rng, http) for _ in range(40)]
    alone = [plainly(await http.send(request)) for request in requests]
    before = reads(rows)
    together = await asyncio.gather(*(http.send(request) for request in requests))
    assert [repr(plainly(answer)) for answer in together] == [repr(each) for each in alone]  # NaN is unlike itself.
    assert reads(rows) - before <= 2 * READS


async def test_large_requests_do_not_wait_for_one_another(http: httpx.AsyncClient, rows: Rows) -> None:
    """Beyond so many rows, joining another saves nothing."""
    many = [f"i{n}" for n in range(_ROWS_TOGETHER_MAX)]
    before = reads(rows)
    body = {"service": "ranking_v1", "user_id": "u1", "item_ids": many}
    answers = await asyncio.gather(*(http.post("/v1/features", json=body) for _ in range(3)))
    assert [answer.status_code for answer in answers] == [200] * 3
    assert reads(rows) - before == 3 * READS


async def test_a_row_that_is_none_fails_only_who_asked_for_it(http: httpx.AsyncClient, rows: Rows) -> None:
    """One failure for all would let one corrupt row take down the requests of every user beside it."""
    rows.write("clicks", [{"t": NOW_MS - 1, "user_id": f"u{n}", "item_id": "i1"} for n in range(8)])
    rows.client.set(rows.key_of("user_activity", "u3"), b"garbage")
    answers = await asyncio.gather(*(http.get(f"/v1/entities/user/u{n}") for n in range(8)))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 503, 200, 200, 200, 200]
    assert rows.key_of("user_activity", "u3").decode() in answers[3].json()["detail"]


async def test_without_redis_each_is_answered_as_it_asked(
    http: httpx.AsyncClient, rows: Rows, redis: EmbeddedRedis
) -> None:
    """A problem, or defaults for as many rows as it asked for itself."""
    redis.stop()
    body = {"service": "ranking_v1", "user_id": "u1", "item_ids": ["i1", "i2"]}
    failing = [http.post("/v1/features", json=body) for _ in range(3)]
    defaults = [http.post("/v1/features", json={**body, "on_error": "defaults"}) for _ in range(3)]
    answers = await asyncio.gather(*failing, *defaults)
    assert [answer.status_code for answer in answers] == [503] * 3 + [200] * 3
    assert [answer.json()["degraded"] for answer in answers[3:]] == [3] * 3


async def test_who_goes_away_takes_nobody_along(http: httpx.AsyncClient, rows: Rows) -> None:
    """The first to ask, of all people: it is with it that waiting for the others began."""
    rows.write("clicks", [{"t": NOW_MS - 1, "user_id": f"u{n}", "item_id": "i1"} for n in range(4)])
    tasks = [asyncio.create_task(http.get(f"/v1/entities/user/u{n}")) for n in range(4)]
    for _ in range(3):
        await asyncio.sleep(0)
    tasks[0].cancel()
    answers = await asyncio.gather(*tasks[1:])
    assert [answer.json()["features"]["user_activity__clicks_7d"] for answer in answers] == [1, 1, 1]


async def test_an_item_by_itself_and_one_that_is_ranked_are_two_questions(redis: EmbeddedRedis, plan: Plan) -> None:
    """The features of a service about items alone are the same whether a user is given or not; what is read is not.

    Joined by their features only, one of the two would be missing its user.
    """
    own = tuple(name for name, feature in plan.features.items() if feature.entities == ("item",))
    with_items = msgspec.structs.replace(plan, services=(*plan.services, ServiceSpec(name="items_v1", features=own)))
    rows = Rows(with_items, redis.url, Clock())
    rows.write("clicks", [{"t": NOW_MS - 1, "user_id": "u1", "item_id": f"i{n}"} for n in range(4)])
    body = {"service": "items_v1", "user_id": "u1", "item_ids": ["i1", "i2"]}
    async with served(settings_of(redis.url), with_items, Clock()) as http:
        alone = (http.get(f"/v1/entities/item/i{n}?service=items_v1") for n in range(4))
        ranked = (http.post("/v1/features", json=body) for _ in range(4))
        answers = await asyncio.gather(*(each for pair in zip(alone, ranked, strict=True) for each in pair))
    assert [answer.status_code for answer in answers] == [200] * 8
