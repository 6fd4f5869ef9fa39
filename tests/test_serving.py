"""The server through HTTP, in this process, over a real Redis, at a clock that the test sets."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pyarrow as pa
import pytest
import structlog

import serving.app
import serving.wire
from features.plan import Given, Plan
from headrace.embedded import EmbeddedRedis
from serving.client import Client
from store.reader import Reader
from tests import oracle
from tests.support import compare
from tests.support.served import (
    NOW_MS,
    Clock,
    Rows,
    catalogue,
    listening,
    random_events,
    served,
    settings_of,
    values_of,
)

ARROW, NPY = "application/vnd.apache.arrow.stream", "application/x-npy"
RANKING = {"service": "ranking_v1", "user_id": "u1", "item_ids": ["i1"]}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return catalogue()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def rows(plan: Plan, redis_url: str, clock: Clock) -> Rows:
    return Rows(plan, redis_url, clock)


@pytest.fixture
async def http(plan: Plan, redis_url: str, clock: Clock, rows: Rows) -> AsyncIterator[httpx.AsyncClient]:
    async with served(settings_of(redis_url), plan, clock) as client:
        yield client


@pytest.fixture
def own_redis() -> Iterator[EmbeddedRedis]:
    """A Redis that the test may stop."""
    with EmbeddedRedis() as server:
        yield server


def problem(answer: httpx.Response, status: int, *mentioned: str, field: str | None = None) -> dict[str, Any]:
    """The RFC 9457 document of an answer, which mentions what it should."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    assert document["type"]
    assert document["title"]
    assert "Traceback" not in answer.text
    for text in mentioned:
        assert text in document["detail"], document
    if field is not None:
        assert field in [each["field"] for each in document["errors"]], document
    return document


def feast_error(answer: httpx.Response, status: int, *mentioned: str) -> None:
    """An error of /get-online-features: JSON within a JSON text."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
    detail = json.loads(answer.json())
    assert (detail["module"], detail["class"]) == ("feast.errors", "FeastError")
    for text in mentioned:
        assert text in detail["message"], detail


async def ranking(http: httpx.AsyncClient, **changed: Any) -> dict[str, Any]:
    answer = await http.post("/v1/features", json={**RANKING, **changed})
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


async def entity(http: httpx.AsyncClient, kind: str, entity_id: str, **params: Any) -> dict[str, Any]:
    answer = await http.get(f"/v1/entities/{kind}/{quote(entity_id, safe='')}", params=params)
    assert answer.status_code == 200, answer.text
    document: dict[str, Any] = answer.json()
    return document


# What is served


async def test_counts_fall_to_zero_as_windows_pass_with_no_event_and_no_stream(
    http: httpx.AsyncClient, rows: Rows, clock: Clock
) -> None:
    """A count leaves its window at one exact millisecond, and nothing but the clock has moved.

        hop     |   t   |                        window w ends where the event's hop does
        --------|---x---|------------------------|----------->  q
                        ^ end of the hop         ^ end + w - 1: still counted
                                                 ^ end + w:     gone

    A timer, a write or an event that made the count fall would not be there to do it; `q - w <= t` without the hop
    would drop the event up to a hop too early.
    """
    t = NOW_MS + 123_456
    clock.now_ms = t + 1
    event = {"t": t, "user_id": "u1", "item_id": "i1", "seller_id": "s1", "category": "c1", "price": 9.5}
    rows.write_all({"impressions": [event], "clicks": [event], "likes": [event]})
    before = {key: rows.client.get(key) for key in rows.client.keys("*")}
    for passed, window in enumerate(compare.WINDOWS):
        hop = oracle.hop_ms(window)
        edge = (t // hop + 1) * hop + oracle.seconds(window) * 1000
        for now_ms, gone in ((edge - 1, passed), (edge, passed + 1)):
            clock.now_ms = now_ms
            answer = await ranking(http)
            matrix = await http.post("/v1/features", json=RANKING, headers={"Accept": NPY})
            names = matrix.headers["x-feature-names"].split(",")
            values = values_of(answer)
            of_matrix = dict(zip(names, np.load(io.BytesIO(matrix.content))[0], strict=True))
            of_seller = (await entity(http, "seller", "s1"))["features"]
            for at, each in enumerate(compare.WINDOWS):
                counted = 0 if at < gone else 1
                for topic in compare.COUNTS:
                    for view in ("user_activity", "item_activity"):
                        name = f"{view}__{topic}_{each}"
                        assert (values[name], of_matrix[name]) == (counted, counted), (name, window, now_ms - edge)
                    if each != "10m":
                        assert of_seller[f"seller_activity__{topic}_{each}"] == counted
    assert values_of(await ranking(http))["user_activity__price_max_7d"] is None
    assert {key: rows.client.get(key) for key in rows.client.keys("*")} == before


async def test_json_arrow_and_npy_say_the_same(http: httpx.AsyncClient, rows: Rows) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rows.write_all(random_events(seed, users=4, items=20, n=400))
    for user in ("u1", "never seen"):
        body = {"service": "ranking_v1", "user_id": user, "item_ids": [f"i{at}" for at in range(22)]}
        document = (await http.post("/v1/features", json=body)).json()
        arrow = await http.post("/v1/features", json=body, headers={"Accept": ARROW})
        npy = await http.post("/v1/features", json=body, headers={"Accept": NPY})
        assert arrow.headers["content-type"] == ARROW
        assert npy.headers["content-type"] == NPY
        assert {document["plan"], arrow.headers["x-plan"], npy.headers["x-plan"]} == {document["plan"]}
        with pa.ipc.open_stream(arrow.content) as reader:
            (batch,) = list(reader)
        assert batch.schema.names[0] == "item_id"
        assert batch["item_id"].to_pylist() == body["item_ids"]
        listed = (await http.get("/v1/services/ranking_v1")).json()
        assert batch.schema.names[1:] == [feature["name"] for feature in listed["features"]]
        matrix = np.load(io.BytesIO(npy.content), allow_pickle=False)
        assert matrix.dtype == np.float32
        assert matrix.shape == (22, len(listed["matrix"]))
        assert npy.headers["x-feature-names"].split(",") == listed["matrix"]
        for at in range(22):
            values = values_of(document, at)
            assert set(values) == set(batch.schema.names[1:])
            assert {name: batch[name][at].as_py() for name in values} == values
            expected = [np.nan if values[name] is None else np.float32(values[name]) for name in listed["matrix"]]
            np.testing.assert_array_equal(matrix[at], np.array(expected, np.float32))


@pytest.mark.parametrize("prices", [(1.5e308, 1.0e308), (1.7e308, 1.7e308), (1e39, 1e39)])
async def test_numbers_beyond_a_formats_range_are_null_in_it_and_counted(
    http: httpx.AsyncClient, rows: Rows, plan: Plan, redis_url: str, clock: Clock, prices: tuple[float, float]
) -> None:
    """Beyond float64's in every format, beyond float32's in npy alone; never infinite, which a model can't take."""
    events = [{"t": NOW_MS - 1_000, "user_id": "rich", "item_id": "i1", "price": price} for price in prices]
    rows.write_all({"clicks": events})
    body = {"service": "ranking_v1", "user_id": "rich", "item_ids": ["i1"]}
    values = values_of((await http.post("/v1/features", json=body)).json(), 0)
    arrow = await http.post("/v1/features", json=body, headers={"Accept": ARROW})
    npy = await http.post("/v1/features", json=body, headers={"Accept": NPY})
    matrix = np.load(io.BytesIO(npy.content), allow_pickle=False)
    assert not np.isinf(matrix).any()
    at = dict(zip(npy.headers["x-feature-names"].split(","), matrix[0].tolist(), strict=True))
    with pa.ipc.open_stream(arrow.content) as reader:
        (batch,) = list(reader)
    assert {name: batch[name][0].as_py() for name in values} == values
    assert values["user_activity__price_max_7d"] == max(prices)
    assert np.isnan(at["user_activity__price_max_7d"])
    without = plan.features["user_activity__price_std_7d"].default
    assert values["user_activity__price_std_7d"] == (without if prices[0] != prices[1] else 0.0)
    read = Reader(plan, list(values)).read(
        rows.client.mget, {"user_id": ["rich"], "item_id": ["i1"]}, NOW_MS, full=True
    )
    assert {name: value[0] for name, value in read.to_dict().items() if name in values} == values
    counted = (await http.get("/metrics")).text.split("\nheadrace_values_beyond_range_total ")[1].split()[0]
    assert float(counted) > 0


async def test_matrices_hold_numbers_and_truth_values_in_service_order(http: httpx.AsyncClient) -> None:
    listed = (await http.get("/v1/services/ranking_v1")).json()
    numeric = [each["name"] for each in listed["features"] if each["type"] in ("int", "float", "bool")]
    assert listed["matrix"] == numeric
    assert len(listed["features"]) >= 48
    assert {each["type"] for each in listed["features"]} >= {"list[str]", "str", "bool", "int", "float"}
    assert all(each["doc"] for each in listed["features"])


async def test_every_item_is_answered_in_request_order_duplicates_too(http: httpx.AsyncClient, rows: Rows) -> None:
    rows.write_all(random_events(5, users=3, items=6, n=120))
    asked = ["i3", "nothing", "i1", "i3", "i0", "nothing"]
    answer = await ranking(http, item_ids=asked)
    assert [item["id"] for item in answer["items"]] == asked
    assert answer["items"][0] == answer["items"][3]
    for at, item_id in enumerate(asked):
        assert answer["items"][at] == (await ranking(http, item_ids=[item_id]))["items"][0]


async def test_no_items_is_an_empty_answer(http: httpx.AsyncClient) -> None:
    assert (await ranking(http, item_ids=[]))["items"] == []
    answer = await http.post("/v1/features", json={**RANKING, "item_ids": []}, headers={"Accept": NPY})
    assert np.load(io.BytesIO(answer.content)).shape[0] == 0


async def test_anonymous_users_and_unknown_entities_read_as_never_seen(http: httpx.AsyncClient, rows: Rows) -> None:
    rows.write("clicks", [{"t": NOW_MS - 1, "user_id": "u1", "item_id": "i1", "price": 4.0}])
    anonymous, unknown = await ranking(http, user_id=None), await ranking(http, user_id="stranger")
    assert anonymous["user"] == {**unknown["user"], "id": None}
    assert anonymous["user"]["status"] == "NOT_FOUND"
    assert anonymous["user"]["last_event_at"] is None
    left_out = await http.post("/v1/features", json={"service": "ranking_v1", "item_ids": ["i1"]})
    assert left_out.json() == anonymous
    features = anonymous["user"]["features"]
    assert features["user_activity__clicks_7d"] == 0
    assert features["user_activity__price_mean_7d"] == 25.0  # Its declared default.
    assert features["user_activity__price_max_7d"] is None
    assert features["user_activity__idle_s"] is None
    assert features["user_history__clicked"] == []
    assert anonymous["items"][0]["status"] == "PRESENT"
    assert values_of(anonymous)["user_item__clicked"] is False
    for kind in ("user", "item", "seller"):
        stranger = await entity(http, kind, "stranger")
        assert (stranger["status"], stranger["last_event_at"]) == ("NOT_FOUND", None)
        assert not any(value for name, value in stranger["features"].items() if "__clicks" in name)
    seen = await entity(http, "user", "u1")
    assert (seen["status"], seen["last_event_at"]) == ("PRESENT", NOW_MS - 1)


async def test_what_the_caller_knows_of_a_cold_item_changes_its_cross_features(
    http: httpx.AsyncClient, rows: Rows
) -> None:
    """An item without a row is matched with the user's taste by the category, seller and price of the request."""
    seen = {"user_id": "u1", "item_id": "i1", "category": "boots", "seller_id": "s1", "price": 20.0}
    rows.write("clicks", [{"t": NOW_MS - 9 + at, **seen} for at in range(3)])
    cold = {"id": "cold", "category": "boots", "seller_id": "s1", "price": 60.0}
    answer = (
        await http.post(
            "/v1/features",
            json={
                "service": "ranking_v1",
                "user_id": "u1",
                "items": [cold, {"id": "cold"}, {"id": "i1"}, {"id": "i1", "category": "hats", "price": 40.0}],
            },
        )
    ).json()
    known, bare, own, moved = (values_of(answer, at) for at in range(4))
    assert known["user_item__category_clicks"] == 3
    assert known["user_item__seller_affinity"] == pytest.approx(3)
    assert known["user_item__price_ratio"] == pytest.approx(3)
    assert known["user_item__price_deviation"] == pytest.approx(40)
    assert (known["item_activity__category"], known["item_activity__price"]) == ("boots", 60.0)
    assert (bare["user_item__category_clicks"], bare["user_item__price_ratio"]) == (0, None)
    assert (own["user_item__category_clicks"], own["user_item__price_ratio"]) == (3, 1)
    assert (moved["user_item__category_clicks"], moved["user_item__price_ratio"]) == (0, 2)
    assert moved["user_item__seller_affinity"] == own["user_item__seller_affinity"]
    assert [item["status"] for item in answer["items"]] == ["NOT_FOUND", "NOT_FOUND", "PRESENT", "PRESENT"]
    assert [own["user_item__clicked"], known["user_item__clicked"]] == [True, False]


@pytest.mark.parametrize(("back_ms", "allowed"), [(0, True), (10_000, True), (10_001, False), (-1, False)])
async def test_as_of_reaches_ten_seconds_back_and_never_ahead(
    http: httpx.AsyncClient, back_ms: int, allowed: bool
) -> None:
    as_of = NOW_MS - back_ms
    answers = [
        await http.post("/v1/features", json={**RANKING, "as_of": as_of}),
        await http.get("/v1/entities/user/u1", params={"as_of": as_of}),
    ]
    for answer in answers:
        if allowed:
            assert answer.json()["as_of"] == as_of
        else:
            problem(answer, 422, str(as_of), "last 10 s", field="as_of")


async def test_as_of_is_the_time_that_windows_are_evaluated_at(
    http: httpx.AsyncClient, rows: Rows, clock: Clock
) -> None:
    rows.write("clicks", [{"t": NOW_MS - 60_000, "user_id": "u1", "item_id": "i1"}])
    edge = NOW_MS + 600_000  # The event's hop of a minute ends at NOW_MS.
    clock.now_ms = edge + 5_000
    assert values_of(await ranking(http, as_of=edge - 1))["user_activity__clicks_10m"] == 1
    assert values_of(await ranking(http))["user_activity__clicks_10m"] == 0


@pytest.mark.parametrize(
    "entity_id", ["a/b", "/a", "a/", "a//b", "{i1}", "100%", "%2F", "größe", "商品", "🧥", "a b", "?x=1#y", "..", "a:b"]
)
async def test_ids_of_any_characters_are_read_by_path_and_by_body(
    http: httpx.AsyncClient, rows: Rows, entity_id: str
) -> None:
    rows.write("clicks", [{"t": NOW_MS - 1, "user_id": entity_id, "item_id": entity_id}])
    path = quote(entity_id, safe="").replace(".", "%2E")
    answer = await http.get(f"/v1/entities/user/{path}")
    document = answer.json()
    assert (document["id"], document["status"]) == (entity_id, "PRESENT")
    assert document["features"]["user_activity__clicks_7d"] == 1
    posted = await ranking(http, user_id=entity_id, item_ids=[entity_id])
    assert posted["items"][0]["id"] == entity_id
    assert values_of(posted)["user_item__clicked"] is True


def test_each_id_that_an_event_may_carry_is_read_by_every_interface(plan: Plan, redis_url: str) -> None:
    r"""An id is any text but an empty one, of any characters but NUL: what the stream has kept, each call finds.

    Every event has a time and a price of its own, so that no other's row can pass. A path whose `.` or `$` is Python's
    own answers 404 for `a\nb`, and for `a\n` the row of `a`; a client that leaves `..`, `/` or `?` as they are asks
    for something else.
    """
    alone = [chr(code) for code in [*range(1, 0x100), 0x2028, 0x2029, 0xFEFF, 0xFFFF, 0x1F9E5, 0x10FFFF]]
    # All others: 256 characters are the most that an id may have.
    starts = [*range(0x100, 0xD800, 256), *range(0xE000, 0x10000, 256), *range(0x10000, 0x110000, 0x10000)]
    whole = ["".join(map(chr, range(start, start + 256))) for start in starts]
    odd = ["a", "a\r\nb", "\na", "..", "../a", "a/..", "//", "//a", "a//", " a ", "%0A", "a%", "?x=1#y", "a\u0301"]
    ids = list(dict.fromkeys([*odd, *alone, *(f"a{each}" for each in alone), *whole]))
    now_ms = int(time.time() * 1000)  # The server's own clock is the real one.
    fields = [{"t": now_ms - n, "user_id": each, "item_id": each, "price": n + 1.0} for n, each in enumerate(ids)]
    Rows(plan, redis_url, Clock(now_ms)).write("clicks", fields)
    with listening(settings_of(redis_url), plan) as port, httpx.Client(base_url=f"http://127.0.0.1:{port}") as http:
        with Client(f"http://127.0.0.1:{port}", timeout_s=60) as client:
            for n, each in enumerate(ids):
                found = client.entity("user", each)
                assert (found["id"], found["last_event_at"]) == (each, now_ms - n), ascii(each)
                body = {**RANKING, "user_id": each, "item_ids": [each]}
                answer = http.post("/v1/features", json=body, timeout=60).json()
                assert answer["user"]["last_event_at"] == now_ms - n, ascii(each)
                assert values_of(answer)["item_activity__price"] == n + 1, ascii(each)
        feast = {"features": ["item_activity:price"], "entities": {"item_id": ids}}
        results = http.post("/get-online-features", json=feast, timeout=60).json()["results"]
        assert [column["values"] for column in results] == [ids, [n + 1 for n in range(len(ids))]]


@pytest.mark.parametrize("path", ["/healthz%0A", "/v1/features%0A"])
async def test_a_path_with_a_line_feed_is_no_other_path(http: httpx.AsyncClient, path: str) -> None:
    """Python's `$` would take one at the end for nothing."""
    problem(await http.request("GET" if "health" in path else "POST", path), 404)


async def test_an_entity_is_read_by_service_or_whole(http: httpx.AsyncClient, plan: Plan) -> None:
    whole = (await entity(http, "item", "i1"))["features"]
    of_ranking = (await entity(http, "item", "i1", service="ranking_v1"))["features"]
    others = {name for name, each in plan.features.items() if isinstance(each.spec, Given)}
    assert set(whole) - set(of_ranking) - others == {"item_activity__viewers_1h", "item_activity__viewers_24h"}
    assert {"item_profile__price", "stock__left"} <= set(whole)
    assert set((await entity(http, "seller", "s1", service="seller_v1"))["features"]) == {
        name for name in plan.features if name.startswith("seller_activity__")
    }


@pytest.mark.parametrize("user_id", ["u1", "nobody", None])
async def test_an_explanation_changes_no_value(http: httpx.AsyncClient, rows: Rows, user_id: str | None) -> None:
    rows.write_all(random_events(8, users=3, items=6, n=120))
    plain = await ranking(http, user_id=user_id, item_ids=["i1", "nothing"])
    explained = await ranking(http, user_id=user_id, item_ids=["i1", "nothing"], explain=True)
    assert (how := explained["user"].pop("explain"))
    # What has a bound says how near it is.
    assert any({"buckets", "buckets_max"} <= each.keys() for each in how.values())
    assert "buckets" not in how["user_activity__clicks_1h"]
    assert all(item.pop("explain") for item in explained["items"])
    assert explained == plain
    refused = await http.post("/v1/features", json={**RANKING, "explain": True}, headers={"Accept": NPY})
    problem(refused, 422, "application/json", field="explain")


# What is refused

BAD_BODIES: list[tuple[dict[str, Any], str]] = [
    ({**RANKING, "item_ids": None}, "item_ids"),
    ({**RANKING, "items": [{"id": "i1"}]}, "item_ids"),
    ({**RANKING, "user_id": ""}, "user_id"),
    ({**RANKING, "user_id": "a\0b"}, "user_id"),
    ({**RANKING, "user_id": "x" * 257}, "user_id"),
    ({**RANKING, "user_id": 7}, "user_id"),
    ({**RANKING, "item_ids": ["i1", ""]}, "item_ids.1"),
    ({**RANKING, "item_ids": ["a\0b"]}, "item_ids.0"),
    ({**RANKING, "item_ids": ["x" * 257]}, "item_ids.0"),
    ({**RANKING, "item_ids": "i1"}, "item_ids"),
    ({**RANKING, "item_id": "i1"}, "item_id"),
    ({**RANKING, "explain": True, "item_ids": [f"i{at}" for at in range(6)]}, "explain"),
    ({**RANKING, "context": {"surface": "home"}}, "context"),
    ({**RANKING, "context": []}, "context"),
    ({**RANKING, "as_of": "yesterday"}, "as_of"),
    ({**RANKING, "as_of": 10**40}, "as_of"),
    ({**RANKING, "on_error": "ignore"}, "on_error"),
    ({**RANKING, "item_ids": [f"i{at}" for at in range(1001)]}, "item_ids"),
    ({"user_id": "u1", "item_ids": ["i1"]}, "service"),
    ({"service": "ranking_v1", "items": [{"id": "i1", "colour": "red"}]}, "items.0.colour"),
    ({"service": "ranking_v1", "items": [{"category": "c1"}]}, "items.0.id"),
    ({"service": "ranking_v1", "items": [{"id": "i1", "price": -1}]}, "items.0.price"),
    ({"service": "ranking_v1", "items": [{"id": f"i{at}"} for at in range(1001)]}, "item"),
]


@pytest.mark.parametrize(("body", "field"), BAD_BODIES)
async def test_a_bad_request_is_a_problem_that_names_the_field(
    http: httpx.AsyncClient, body: dict[str, Any], field: str
) -> None:
    problem(await http.post("/v1/features", json=body), 422, field)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"service":"ranking_v1","item_ids":["i1"],"as_of":' + b"9" * 5000 + b"}",
        b'{"service":"ranking_v1","item_ids":["i1"],"as_of":Infinity}',
        b'{"service":"ranking_v1","items":[{"id":"i1","price":NaN}]}',
        b'{"service":"ranking_v1","items":[{"id":"i1","price":1e400}]}',
        b'{"service":"ranking_v1","item_ids":["\\ud800"]}',
        b'{"service":"\\ud800","item_ids":["i1"]}',
        b'{"service":"ranking_v1","item_ids":["i1"],"\\ud800":1}',
        b'{"service":"ranking_v1","item_ids":["i1"],"context":{"\\ud800":1}}',
    ],
    ids=lambda raw: repr(raw[:70]),
)
async def test_bytes_that_are_no_request_are_a_problem_too(http: httpx.AsyncClient, raw: bytes) -> None:
    answer = await http.post("/v1/features", content=raw, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 404, 422)
    problem(answer, answer.status_code)


async def test_broken_json_names_the_body(http: httpx.AsyncClient) -> None:
    """Not the position in it, which pydantic puts where a field's name would be."""
    answer = await http.post("/v1/features", content=b'{"a"', headers={"Content-Type": "application/json"})
    problem(answer, 422, "JSON", field="body")


async def test_what_is_not_there_is_a_404_that_says_what_is(http: httpx.AsyncClient) -> None:
    problem(await http.post("/v1/features", json={**RANKING, "service": "nope"}), 404, "nope", "ranking_v1, seller_v1")
    problem(await http.get("/v1/services/nope"), 404, "nope", "ranking_v1")
    problem(await http.get("/v1/services/ranking_v1", params={"plan": "abc"}), 404, "plan", "abc")
    problem(await http.get("/v1/entities/nope/x"), 404, "nope", "item, seller, user")
    problem(await http.get("/v1/entities/user/u1", params={"service": "nope"}), 404, "nope")
    problem(await http.get("/v1/nothing"), 404, "/v1/nothing")


async def test_ids_in_paths_are_checked(http: httpx.AsyncClient) -> None:
    for path in ("", "%00", "a%00b", "x" * 257):
        problem(await http.get(f"/v1/entities/user/{path}"), 422, "256", field="id")
    assert (await http.get(f"/v1/entities/user/{'x' * 256}")).status_code == 200


async def test_a_wrong_method_says_so(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/features")
    problem(answer, 405, "GET /v1/features")
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize("accept", ["text/html", "", "application/xml, text/plain"])
async def test_a_format_that_there_is_not_is_a_406_with_those_there_are(http: httpx.AsyncClient, accept: str) -> None:
    problem(await http.post("/v1/features", json=RANKING, headers={"Accept": accept}), 406, "application/json", NPY)


@pytest.mark.parametrize(
    ("accept", "got"),
    [("*/*", "application/json"), (f"text/html, {NPY}, */*", NPY), (f"{ARROW};q=0.9, application/json;q=0.1", ARROW)],
)
async def test_the_first_format_there_is_is_taken(http: httpx.AsyncClient, accept: str, got: str) -> None:
    answer = await http.post("/v1/features", json=RANKING, headers={"Accept": accept})
    assert answer.headers["content-type"] == got


@pytest.mark.parametrize(
    ("accept", "got"),
    [
        (f"text/html;q=0.9, {NPY};q=0.1, application/json;q=0.8", "application/json"),
        (f"application/json;q=0.2, {NPY}", NPY),
        (f"application/json ; Q=0.2 , {NPY.upper()} ; q=0.3", NPY),
        (f"application/json;q=0.001,{ARROW};q=0.002", ARROW),
        (f"{NPY};q=0, */*", "application/json"),
        ("application/json;q=0, */*;q=0.1", ARROW),
        (f"*/*, application/json;q=0.5, {ARROW};q=0.4", NPY),
        (f"application/*;q=0.2, */*;q=0.9, {NPY};q=0.3", NPY),
        (f"application/*;q=0, */*, {NPY};q=0.1", NPY),
        (f"{ARROW};q=0.5, {NPY};q=0.5", ARROW),
        (f"{NPY};q=0.5, {ARROW};q=0.5", NPY),
        (f"application/json;charset=utf-8;q=0.1, {NPY};q=0.2", NPY),
        (f'text/html;x="a, {ARROW}, \\"b", {NPY}', NPY),
        (f"{NPY};q=nan, application/json;q=0.9", NPY),
        (f"{NPY};q=7, application/json;q=0.9", NPY),
    ],
)
async def test_the_format_is_the_one_wanted_most(http: httpx.AsyncClient, accept: str, got: str) -> None:
    """Not the first that there is: weights count, 0 excludes, and a range that says more overrides one that says less.

    A weight that is no weight counts as none; as a number, `nan` would be neither more nor less than any.
    """
    answer = await http.post("/v1/features", json=RANKING, headers={"Accept": accept})
    assert answer.headers["content-type"] == got


@pytest.mark.parametrize("accept", [f"{NPY};q=0", "*/*;q=0", "application/*;q=0.0, */*", "text/html, */*;q=0.000"])
async def test_a_weight_of_zero_is_a_refusal(http: httpx.AsyncClient, accept: str) -> None:
    """Taken for a small number, it would still win where nothing else is named."""
    problem(await http.post("/v1/features", json=RANKING, headers={"Accept": accept}), 406, "application/json", NPY)


async def test_several_accept_headers_are_one_list(http: httpx.AsyncClient) -> None:
    """Who reads the first alone answers with what the client wants less; who needs one fails without."""
    headers = [("Accept", "application/json;q=0.1"), ("Accept", NPY)]
    answer = await http.post("/v1/features", json=RANKING, headers=headers)
    assert answer.headers["content-type"] == NPY
    request = http.build_request("POST", "/v1/features", json=RANKING)
    del request.headers["accept"]
    assert (await http.send(request)).headers["content-type"] == "application/json"


async def test_a_service_without_items_says_where_to_read_it(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/features", json={**RANKING, "service": "seller_v1"})
    problem(answer, 422, "/v1/entities/seller/{id}", field="service")
    problem(await http.get("/v1/entities/seller/s1", params={"service": "ranking_v1"}), 422, "seller", field="service")


# What happens when Redis is not well


async def test_without_redis_answers_are_503_or_on_demand_defaults(
    own_redis: EmbeddedRedis, plan: Plan, clock: Clock
) -> None:
    rows = Rows(plan, own_redis.url, clock)
    rows.write("clicks", [{"t": NOW_MS - 1, "user_id": "u1", "item_id": "i1"}])
    async with served(settings_of(own_redis.url), plan, clock) as http:
        assert (await ranking(http))["user"]["status"] == "PRESENT"
        own_redis.stop()
        for answer in (
            await http.post("/v1/features", json=RANKING),
            await http.get("/v1/entities/user/u1"),
            await http.get("/readyz"),
        ):
            problem(answer, 503, "Redis")
            assert int(answer.headers["retry-after"]) > 0
        body = {"features": ["user_activity:clicks_7d"], "entities": {"user_id": ["u1"]}}
        answer = await http.post("/get-online-features", json=body)
        feast_error(answer, 503, "Redis")
        assert int(answer.headers["retry-after"]) > 0
        assert (await http.get("/healthz")).status_code == 200
        degraded = await ranking(http, on_error="defaults", item_ids=["i1", "i2", "i1"])
        assert degraded["degraded"] == 4  # One user and three items.
        assert degraded["user"]["status"] == "UNAVAILABLE"
        assert {item["status"] for item in degraded["items"]} == {"UNAVAILABLE"}
        values = values_of(degraded)
        assert (values["user_activity__clicks_7d"], values["user_activity__price_mean_7d"]) == (0, 25.0)
        assert values["user_activity__price_max_7d"] is None
        own_redis.start()
        back = await ranking(http)
        assert (back["user"]["status"], "degraded" in back) == ("NOT_FOUND", False)  # This Redis keeps nothing.


async def test_a_redis_that_hangs_is_a_503_within_the_deadline_and_crosses_no_answers(
    own_redis: EmbeddedRedis, plan: Plan, clock: Clock
) -> None:
    """A read that was given up leaves its answer on the connection: it must not become the next reader's."""
    rows = Rows(plan, own_redis.url, clock)
    rows.write(
        "clicks", [{"t": NOW_MS - 1, "user_id": f"u{n}", "item_id": f"i{n}"} for n in range(9) for _ in range(n)]
    )
    async with served(settings_of(own_redis.url, request_timeout_s=0.3, redis_timeout_s=100), plan, clock) as http:
        assert (await entity(http, "user", "u1"))["features"]["user_activity__clicks_7d"] == 1
        os.kill(own_redis.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(60):  # Far less than Redis's own deadline, far more than the request's.
                problem(await http.post("/v1/features", json=RANKING), 503, "Timeout")
                problem(await http.get("/v1/entities/user/u8"), 503, "Timeout")
                given_up = asyncio.create_task(http.get("/v1/entities/user/u7"))
                await asyncio.sleep(0)
                given_up.cancel()
                degraded = await ranking(http, on_error="defaults")
                assert degraded["degraded"] == 2
        finally:
            os.kill(own_redis.pid, signal.SIGCONT)
        answers = await asyncio.gather(*(entity(http, "user", f"u{n}") for n in range(1, 9)))
        assert [each["features"]["user_activity__clicks_7d"] for each in answers] == list(range(1, 9))


async def test_readiness_has_a_deadline_too(own_redis: EmbeddedRedis, plan: Plan, clock: Clock) -> None:
    Rows(plan, own_redis.url, clock)
    async with served(settings_of(own_redis.url, request_timeout_s=0.3, redis_timeout_s=100), plan, clock) as http:
        os.kill(own_redis.pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(10):
                answer = await http.get("/readyz")
        finally:
            os.kill(own_redis.pid, signal.SIGCONT)
        problem(answer, 503, "Redis")


async def test_a_value_that_is_no_row_is_a_503_that_names_its_key(http: httpx.AsyncClient, rows: Rows) -> None:
    rows.write("clicks", [{"t": NOW_MS - 1, "user_id": "u1", "item_id": "i1"}])
    key = rows.key_of("user_activity", "u1")
    rows.client.set(key, b"garbage")
    problem(await http.post("/v1/features", json=RANKING), 503, key.decode())
    problem(await http.get("/v1/entities/user/u1"), 503, key.decode())
    assert (await ranking(http, on_error="defaults"))["degraded"] == 2
    assert (await entity(http, "user", "u2"))["status"] == "NOT_FOUND"


async def test_a_value_that_is_no_row_is_a_503_for_feast_too(http: httpx.AsyncClient, rows: Rows) -> None:
    rows.write("clicks", [{"t": NOW_MS - 1, "user_id": "u1", "item_id": "i1"}])
    key = rows.key_of("user_activity", "u1")
    rows.client.set(key, b"garbage")
    body = {"features": ["user_activity:clicks_7d"], "entities": {"user_id": ["u1"]}}
    feast_error(await http.post("/get-online-features", json=body), 503, key.decode())


# Operations


async def test_ready_only_when_redis_keeps_rows_and_was_initialised(http: httpx.AsyncClient, rows: Rows) -> None:
    assert (await http.get("/readyz")).json()["status"] == "ready"
    try:
        rows.client.config_set("maxmemory-policy", "allkeys-lru")
        problem(await http.get("/readyz"), 503, "allkeys-lru", "noeviction")
    finally:
        rows.client.config_set("maxmemory-policy", "noeviction")
    assert (await http.get("/readyz")).status_code == 200
    rows.client.flushall()
    problem(await http.get("/readyz"), 503, "commit record", "headrace apply")


@pytest.mark.parametrize("kind", ["item", "seller", "user"])
async def test_one_missing_commit_record_is_enough_not_to_be_ready(
    http: httpx.AsyncClient, rows: Rows, kind: str
) -> None:
    """A kind of entity that was added and never initialised has no stream: its features would read as never seen."""
    rows.client.delete(f"{{headrace:{kind}:3}}:commit")
    problem(await http.get("/readyz"), 503, "commit record")


async def test_metrics_count_by_route_and_status_never_by_id(http: httpx.AsyncClient) -> None:
    await ranking(http)
    await http.post("/v1/features", json={})
    for user in ("u1", "u2"):
        await entity(http, "user", user)
    await http.get("/v1/secret-path")
    text = (await http.get("/metrics")).text
    assert 'headrace_requests_total{route="/v1/features",status="200"} 1.0' in text
    assert 'headrace_requests_total{route="/v1/features",status="422"} 1.0' in text
    assert 'headrace_requests_total{route="/v1/entities/{entity}/{entity_id:path}",status="200"} 2.0' in text
    assert 'headrace_requests_total{route="unknown",status="404"} 1.0' in text
    assert 'headrace_request_seconds_count{route="/v1/features"} 2.0' in text
    assert "secret-path" not in text


async def test_metrics_tell_how_often_the_mirror_had_a_row(http: httpx.AsyncClient) -> None:
    """Of items alone, duplicates too: twice the same two items, first read, then at hand."""
    for _ in range(2):
        await ranking(http, item_ids=["mirrored 1", "mirrored 2", "mirrored 1"])
    await entity(http, "user", "u1")
    text = (await http.get("/metrics")).text
    assert 'headrace_mirror_rows_total{result="miss"} 3.0' in text
    assert 'headrace_mirror_rows_total{result="hit"} 3.0' in text


def test_metrics_are_kept_in_memory_and_belong_to_one_app(tmp_path: Path) -> None:
    """Imported as `headrace serve` does it: Feast's own metrics would have prometheus_client keep all values in files.

    Those are shared by all apps of a process and by its children, and are left behind when it is killed.
    """
    program = """if True:
        import os
        import serving.run
        from prometheus_client import CollectorRegistry, Counter

        first, second = CollectorRegistry(), CollectorRegistry()
        Counter("n", "", registry=first).inc()
        Counter("n", "", registry=second).inc()
        print([name for name, _, files in os.walk(os.environ["TMPDIR"]) if files])
        print(second.get_sample_value("n_total"))
        print([name for name in os.environ if name.startswith("PROMETHEUS_MULTIPROC")])
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PROMETHEUS_")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env={**environment, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "1.0", "[]"]


async def test_the_contract_is_published(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()
    assert {"/v1/features", "/v1/entities/{entity}/{entity_id}", "/get-online-features"} <= set(document["paths"])


async def test_the_contract_describes_what_is_sent_and_what_comes_back(http: httpx.AsyncClient) -> None:
    """Routes are called without FastAPI, which documents them all the same."""
    document = (await http.get("/openapi.json")).json()
    ranking = document["paths"]["/v1/features"]["post"]
    body = ranking["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    schemas = document["components"]["schemas"]
    assert {"service", "user_id", "item_ids", "items", "as_of", "on_error", "explain"} <= set(
        schemas[body]["properties"]
    )
    assert schemas[body]["properties"]["item_ids"]["anyOf"][0]["items"]["maxLength"] == 256
    assert set(ranking["responses"]["200"]["content"]) == {"application/json", ARROW, NPY}
    one = document["paths"]["/v1/entities/{entity}/{entity_id}"]["get"]
    assert {(each["name"], each["in"], each["required"]) for each in one["parameters"]} == {
        ("entity", "path", True),
        ("entity_id", "path", True),
        ("service", "query", False),
        ("as_of", "query", False),
    }
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            assert operation["description"], path
            assert set(operation["responses"]) == {"202" if method == "delete" else "200", "default"}, path
            form = "application/json" if path == "/get-online-features" else "application/problem+json"
            assert set(operation["responses"]["default"]["content"]) == {form}, path


# The edge


async def test_a_body_is_json_whatever_its_type_is_called_and_in_however_many_pieces_it_comes(
    http: httpx.AsyncClient,
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(raw), 7):
            yield raw[at : at + 7]

    raw = json.dumps(RANKING).encode()
    expected = await ranking(http)
    for content_type in ("application/json", "application/x-www-form-urlencoded", "text/plain; charset=utf-8"):
        answer = await http.post("/v1/features", content=pieces(), headers={"Content-Type": content_type})
        assert (answer.status_code, answer.json()) == (200, expected)
    assert (await http.post("/v1/features", content=raw)).json() == expected


async def test_what_nobody_foresaw_is_a_problem_too_which_is_counted_and_logged(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> bytes:
        message = "a secret of the server"
        raise ZeroDivisionError(message)

    monkeypatch.setattr(serving.wire, "entity_json", broken)
    with structlog.testing.capture_logs() as logs:
        answer = await http.get("/v1/entities/user/u1")
    problem(answer, 500, "GET /v1/entities/user/u1", "log")
    assert "secret" not in answer.text
    assert [(each["event"], type(each["exc_info"])) for each in logs] == [("request_failed", ZeroDivisionError)]
    counted = 'headrace_requests_total{route="/v1/entities/{entity}/{entity_id:path}",status="500"} 1.0'
    assert counted in (await http.get("/metrics")).text


async def test_an_answer_is_counted_before_it_arrives(http: httpx.AsyncClient) -> None:
    """Who has an answer finds it in the metrics, also where another process is asked for them."""
    for sent in range(1, 4):
        await entity(http, "user", "u1")
        counted = f'headrace_request_seconds_count{{route="/v1/entities/{{entity}}/{{entity_id:path}}"}} {sent}.0'
        assert counted in (await http.get("/metrics")).text


async def test_a_connection_that_ends_within_a_request_is_no_error_of_ours(plan: Plan, redis_url: str) -> None:
    app = serving.app.create_app(settings_of(redis_url), plan)
    sent: list[Any] = []
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/features",
        "query_string": b"",
        "headers": [],
        "server": ("headrace", 80),
        "scheme": "http",
    }
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    with structlog.testing.capture_logs() as logs:
        await app(scope, receive, send)
    assert (sent[0]["status"], logs) == (400, [])
