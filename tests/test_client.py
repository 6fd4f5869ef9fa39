"""The typed client against a real server: uvicorn in a thread."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from hypothesis import example, given
from hypothesis import strategies as st

import serving.app
from features.plan import Plan
from headrace.embedded import EmbeddedRedis, free_port
from serving.client import AsyncClient, Client, HeadraceError, Ranking
from tests.support.served import NOW_MS, Clock, Rows, catalogue, random_events, served, settings_of, values_of

DEADLINE_S = 30.0


@dataclass
class Server:
    """Where the server is, and what it serves."""

    address: str
    plan: Plan
    rows: Rows
    redis: EmbeddedRedis


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    plan, clock = catalogue(), Clock()
    with EmbeddedRedis() as redis:
        rows = Rows(plan, redis.url, clock)
        rows.write_all(random_events(3, users=4, items=10, n=200))
        app = serving.app.create_app(settings_of(redis.url), plan, clock=clock)
        uvicorn_server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", ws="none"))
        thread = threading.Thread(target=uvicorn_server.run)
        thread.start()
        try:
            until = time.monotonic() + DEADLINE_S
            while not uvicorn_server.started:
                assert thread.is_alive()
                assert time.monotonic() < until
                time.sleep(0.01)
            port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
            yield Server(f"http://127.0.0.1:{port}", plan, rows, redis)
        finally:
            uvicorn_server.should_exit = True
            thread.join(DEADLINE_S)


def is_right(server: Server, ranking: Ranking, body: dict[str, Any]) -> None:
    """The matrix holds what JSON says."""
    answer = httpx.post(f"{server.address}/v1/features", json=body, timeout=DEADLINE_S).json()
    assert ranking.plan == server.plan.fingerprint
    assert ranking.matrix.dtype == np.float32
    assert ranking.matrix.shape == (len(body["item_ids"]), len(ranking.names))
    assert len(ranking.names) >= 48
    for at in range(len(body["item_ids"])):
        values = values_of(answer, at)
        for name in ranking.names:
            value = np.float32(np.nan if values[name] is None else values[name])
            assert np.array_equal(ranking.column(name)[at], value, equal_nan=True), name


ITEMS = ["i1", "i9", "nothing", "i1"]


@pytest.mark.parametrize("user_id", ["u1", "nobody", None])
async def test_both_clients_hand_over_what_the_server_says(server: Server, user_id: str | None) -> None:
    body = {"service": "ranking_v1", "user_id": user_id, "item_ids": ITEMS, "as_of": NOW_MS - 5}
    with Client(server.address, timeout_s=DEADLINE_S) as client:
        ranking = client.features("ranking_v1", user_id, ITEMS, as_of=NOW_MS - 5)
    is_right(server, ranking, body)
    async with AsyncClient(server.address, timeout_s=DEADLINE_S) as client:
        same = await client.features("ranking_v1", user_id, ITEMS, as_of=NOW_MS - 5)
    np.testing.assert_array_equal(same.matrix, ranking.matrix)
    assert (same.names, same.plan) == (ranking.names, ranking.plan)


def test_a_column_that_there_is_not_is_a_value_error(server: Server) -> None:
    with Client(server.address) as client, pytest.raises(ValueError, match="not in"):
        client.features("ranking_v1", "u1", ["i1"]).column("nope")


@pytest.mark.parametrize("entity_id", ["u1", "a/b", "/x", "x/", "100%", "größe", "a?b#c", ".", "..", "{x}", "a b"])
async def test_entities_of_any_id_are_read(server: Server, entity_id: str) -> None:
    server.rows.write("clicks", [{"t": NOW_MS - 1, "user_id": entity_id, "item_id": "i1"}])
    with Client(server.address, timeout_s=DEADLINE_S) as client:
        document = client.entity("user", entity_id, service="feed_v1")
    assert (document["id"], document["status"], document["service"]) == (entity_id, "PRESENT", "feed_v1")
    assert document["features"]["user_activity__clicks_7d"] >= 1
    async with AsyncClient(server.address, timeout_s=DEADLINE_S) as client:
        assert await client.entity("user", entity_id, service="feed_v1") == document


async def test_problems_become_errors_that_carry_them(server: Server) -> None:
    with Client(server.address, timeout_s=DEADLINE_S) as client:
        with pytest.raises(HeadraceError, match=r"404 Unknown service: .*ranking_v1") as unknown:
            client.features("nope", "u1", ["i1"])
        assert (unknown.value.status, unknown.value.problem["status"]) == (404, 404)
        with pytest.raises(HeadraceError, match=r"422 .*item_ids\.0") as bad:
            client.features("ranking_v1", "u1", [""])
        assert bad.value.problem["errors"][0]["field"] == "item_ids.0"
        with pytest.raises(HeadraceError, match="404 Unknown entity"):
            client.entity("nope", "x")
    async with AsyncClient(server.address, timeout_s=DEADLINE_S) as client:
        with pytest.raises(HeadraceError, match="as_of"):
            await client.features("ranking_v1", "u1", ["i1"], as_of=1)


def test_a_server_that_is_not_there_is_an_error_of_httpx() -> None:
    with Client(f"http://127.0.0.1:{free_port()}") as client, pytest.raises(httpx.ConnectError):
        client.features("ranking_v1", "u1", ["i1"])


def test_an_answer_that_is_no_problem_document_is_an_error_too() -> None:
    """A proxy's page, for example."""
    with Client("http://headrace") as client:
        client._http = httpx.Client(
            base_url="http://headrace",
            transport=httpx.MockTransport(lambda _: httpx.Response(502, text="<html>bad gateway</html>")),
        )
        with pytest.raises(HeadraceError, match="502 Bad Gateway"):
            client.features("ranking_v1", "u1", ["i1"])


A_MATRIX = np.arange(6, dtype=np.float32).reshape(2, 3)


def npy(matrix: Any) -> bytes:
    """As `np.save` writes it."""
    buffer = io.BytesIO()
    np.save(buffer, matrix)
    return buffer.getvalue()


NPY = npy(A_MATRIX)


def answered(body: bytes, headers: dict[str, str]) -> Ranking:
    """What the client makes of an answer with status 200 about two items."""
    with Client("http://headrace") as client:
        client._http = httpx.Client(
            base_url="http://headrace",
            transport=httpx.MockTransport(lambda _: httpx.Response(200, content=body, headers=headers)),
        )
        return client.features("s", "u1", ["i1", "i2"])


@given(st.binary(max_size=300) | st.builds(lambda at, part: NPY[:at] + part, st.integers(0, len(NPY)), st.binary()))
@example(NPY)
@example(NPY[:-1])
@example(npy(A_MATRIX.T))
@example(npy(np.asfortranarray(A_MATRIX)))
@example(npy(A_MATRIX.view(np.int32)))
@example(npy(A_MATRIX.astype(">f4")))
@example(NPY.replace(b"(2, 3)", b"(2**40, 3)"))
@example(NPY.replace(b"(2, 3)", b"(((((("))
def test_any_bytes_are_the_matrix_asked_for_or_an_error_of_ours(body: bytes) -> None:
    """A column too few, other numbers in the same bytes, or an answer cut short would rank by wrong features."""
    headers = {"x-plan": "p", "x-feature-names": "v__a,v__b,v__c"}
    if len(body) == len(NPY) and body.startswith(NPY[: -A_MATRIX.nbytes]):
        assert np.array_equal(answered(body, headers).matrix, np.load(io.BytesIO(body)), equal_nan=True)
    else:
        with pytest.raises(HeadraceError, match=r"^200 .*is this the address of a Headrace server\?$"):
            answered(body, headers)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (NPY, {"x-feature-names": "v__a,v__b,v__c"}),
        (NPY, {"x-plan": "p", "x-feature-names": "v__a,v__b"}),
        (b"<html>", {"x-plan": "p"}),
        (b"[" * 100_000, {"x-plan": "p"}),
        (b"[]", {"x-plan": "p"}),
        (b"{}", {"x-plan": "p"}),
        (b'{"plan": "p", "matrix": null}', {"x-plan": "p"}),
    ],
)
def test_an_answer_of_another_server_is_an_error_of_ours(body: bytes, headers: dict[str, str]) -> None:
    with pytest.raises(HeadraceError, match="Not an answer of Headrace"):
        answered(body, headers)


# Names that don't fit a header


async def test_names_are_asked_for_once_a_plan(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the header, the first answer of a plan costs one more request, and the next ones none."""
    monkeypatch.setattr(serving.app, "_NAMES_HEADER_BYTES_MAX", 0)
    asked: list[str] = []
    async with served(settings_of(server.redis.url), server.plan, Clock()) as http:
        app_transport = http._transport

        class Counting(httpx.AsyncBaseTransport):
            async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
                asked.append(request.url.path)
                return await app_transport.handle_async_request(request)

        async with AsyncClient("http://headrace") as client:
            client._http = httpx.AsyncClient(base_url="http://headrace", transport=Counting())
            rankings = [await client.features("ranking_v1", "u1", ITEMS) for _ in range(3)]
    assert asked == ["/v1/features", "/v1/services/ranking_v1", "/v1/features", "/v1/features"]
    is_right(server, rankings[-1], {"service": "ranking_v1", "user_id": "u1", "item_ids": ITEMS})


def test_names_are_those_of_the_plan_that_made_the_matrix() -> None:
    """While servers are replaced, the names may be asked of one that runs another plan: they must not be believed."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((1, 2), np.float32))
    names = {"old": ["v__a", "v__b"], "new": ["v__b", "v__a"]}

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/features":
            return httpx.Response(200, content=buffer.getvalue(), headers={"X-Plan": "old"})
        wanted = request.url.params.get("plan")
        if wanted not in (None, "new"):
            problem = {"title": "Unknown plan", "status": 404, "detail": f"plan: {wanted}"}
            return httpx.Response(404, json=problem, headers={"content-type": "application/problem+json"})
        return httpx.Response(200, json={"plan": "new", "matrix": names["new"]})

    with Client("http://headrace") as client:
        client._http = httpx.Client(base_url="http://headrace", transport=httpx.MockTransport(answer))
        try:
            ranking = client.features("x", "u1", ["i1"])
        except HeadraceError as error:
            assert error.status == 404  # noqa: PT017  # either is right: an error, or the right names
        else:
            assert list(ranking.names) == names[ranking.plan]
