"""Two projects in one Redis never meet."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from features.definitions import compile_definitions
from headrace.embedded import EmbeddedRedis
from tests.support.served import NOW_MS, SHARDS, Clock, Rows, served, settings_of

PROJECTS = ("shop", "shop_2")
"""One's name begins with the other's."""


def clicks(n: int) -> list[dict[str, Any]]:
    """Clicks of one user on one item."""
    return [{"t": NOW_MS - 1000 - at, "user_id": "u1", "item_id": "i1", "price": 10.0} for at in range(n)]


@pytest.mark.parametrize("order", [PROJECTS, PROJECTS[::-1]])
def test_two_projects_count_for_themselves_fence_nobody_and_have_keys_of_their_own(order: tuple[str, ...]) -> None:
    """The same topics, entities and ids in both; each writer goes on after the other's, each server reads its own."""
    clock = Clock()
    with EmbeddedRedis() as redis:
        plans = {project: compile_definitions("features.catalog", project, SHARDS) for project in order}
        rows = {project: Rows(plan, redis.url, clock) for project, plan in plans.items()}
        expected = dict.fromkeys(order, 0)
        for turn, project in enumerate([*order, *order, *order]):
            rows[project].write("clicks", clicks(turn + 1))
            expected[project] += turn + 1

        async def served_clicks(project: str) -> tuple[Any, Any]:
            async with served(settings_of(redis.url), plans[project], clock) as http:
                body = {"service": "ranking_v1", "user_id": "u1", "item_ids": ["i1"]}
                for _ in range(2):  # The second time the item's row is in the mirror.
                    answer = (await http.post("/v1/features", json=body)).json()
                values = dict(zip(answer["features"], answer["items"][0]["values"], strict=True))
                return answer["user"]["features"]["user_activity__clicks_24h"], values["item_activity__clicks_1h"]

        for project in order:
            assert asyncio.run(served_clicks(project)) == (expected[project], expected[project])
        keys = set(rows[order[0]].client.keys("*"))
        own = {project: {key for key in keys if key.startswith(f"{{{project}:".encode())} for project in order}
        assert own[order[0]] | own[order[1]] == keys
        assert not own[order[0]] & own[order[1]]
