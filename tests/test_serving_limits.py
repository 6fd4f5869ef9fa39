"""What strangers and slow clients can do to the server: nothing that others notice. Over TCP, as production listens."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from features.plan import Plan
from headrace.embedded import EmbeddedRedis
from serving.guard import WINDOW_S, Gate
from tests.support.served import NOW_MS, Clock, Rows, catalogue, listening, served, settings_of

LONG_S = 60.0
"""Far more than anything here takes."""
RANKING = {"service": "ranking_v1", "user_id": "u1", "item_ids": ["i1"]}
FEAST: dict[str, Any] = {"features": ["user_activity:clicks_7d"], "entities": {"user_id": ["u1"]}}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return catalogue()


@pytest.fixture(scope="module")
def redis() -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis() as server:
        yield server


def problem(answer: httpx.Response, status: int, *mentioned: str) -> dict[str, Any]:
    """The RFC 9457 document of an answer, which mentions what it should."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert document["status"] == status
    for text in mentioned:
        assert text in document["detail"], document
    return document


class Raw:
    """A connection that sends what it is told, and no more."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def answer(self) -> httpx.Response:
        async with asyncio.timeout(LONG_S):
            head = await self._reader.readuntil(b"\r\n\r\n")
            line, *lines = head.decode().split("\r\n")[:-2]
            headers = dict(each.split(": ", 1) for each in lines)
            body = await self._reader.readexactly(int(httpx.Headers(headers)["content-length"]))
        return httpx.Response(int(line.split()[1]), headers=headers, content=body)

    async def rest(self) -> bytes:
        """What comes until the server closes the connection."""
        async with asyncio.timeout(LONG_S):
            try:
                return await self._reader.read()
            except ConnectionResetError:
                return b""

    async def close(self) -> None:
        self._writer.close()
        with suppress(ConnectionError):
            await self._writer.wait_closed()


Connect = Callable[..., Awaitable[Raw]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Opens connections to a port, closed after the test; what is given too is sent at once."""
    made = []

    async def to(port: int, sent: bytes = b"") -> Raw:
        made.append(Raw(*await asyncio.open_connection("127.0.0.1", port)))
        made[-1].send(sent)
        return made[-1]

    yield to
    for each in made:
        await each.close()


def post(body: bytes, **headers: object) -> bytes:
    lines = {"Host": "headrace", "Content-Length": len(body), **headers}
    head = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return f"POST /v1/features HTTP/1.1\r\n{head}\r\n".encode() + body


# Size


async def test_a_body_is_as_large_as_it_may_be_and_no_larger(plan: Plan, redis: EmbeddedRedis) -> None:
    """The refusal names the limit and the setting, and comes before the body is kept or parsed."""
    raw = json.dumps(RANKING).encode()

    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(raw), 7):
            yield raw[at : at + 7]

    for most, status in ((len(raw), 200), (len(raw) - 1, 413)):
        async with served(settings_of(redis.url, body_bytes_max=most), plan, Clock()) as http:
            for answer in (
                await http.post("/v1/features", content=raw),
                await http.post("/v1/features", content=pieces()),
            ):
                assert answer.status_code == status, answer.text
                if status == 413:
                    document = problem(answer, 413, f"{most}", "HEADRACE_BODY_BYTES_MAX")
                    assert document["errors"][0]["field"] == "body"


async def test_the_connection_goes_on_after_a_body_that_was_too_large(
    connect: Connect, plan: Plan, redis: EmbeddedRedis
) -> None:
    """A client that only looks at the answer after it has sent all of its body gets it, and what it asks next."""
    with listening(settings_of(redis.url, body_bytes_max=1000), plan) as port:
        raw = await connect(port, post(b" " * 3_000_000) + b"GET /healthz HTTP/1.1\r\nHost: headrace\r\n\r\n")
        problem(await raw.answer(), 413, "3,000,000")
        assert (await raw.answer()).status_code == 200


@pytest.mark.parametrize("in_one_piece", [True, False])
async def test_a_head_may_be_so_large(connect: Connect, plan: Plan, redis: EmbeddedRedis, in_one_piece: bool) -> None:
    """Also one that never ends: uvicorn alone would keep it all."""
    with listening(settings_of(redis.url, header_bytes_max=2000), plan) as port:
        raw = await connect(port, b"GET /healthz HTTP/1.1\r\nHost: h\r\nX: " + b"x" * 1900 + b"\r\n\r\n")
        assert (await raw.answer()).status_code == 200
        # The last piece is the one too many: what is sent after an answer that closes may take it away.
        endless = b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 2000
        for piece in [endless] if in_one_piece else [endless[:700], endless[700:1400], endless[1400:]]:
            raw.send(piece)
            await asyncio.sleep(0)
        if in_one_piece:
            raw.send(b"\r\n\r\n")
        problem(await raw.answer(), 431, "2,000", "HEADRACE_HEADER_BYTES_MAX")
        assert await raw.rest() == b""


async def test_what_is_no_http_is_a_problem_too(connect: Connect, plan: Plan, redis: EmbeddedRedis) -> None:
    with listening(settings_of(redis.url), plan) as port:
        raw = await connect(port, b"\x16\x03\x01 is how TLS begins\r\n\r\n")
        problem(await raw.answer(), 400)
        assert await raw.rest() == b""


async def test_feast_may_ask_for_so_many_values(plan: Plan, redis: EmbeddedRedis) -> None:
    """Rows times features: of few features it may have many rows, also more than are read at once."""
    async with served(settings_of(redis.url, values_max=3000), plan, Clock()) as http:
        few = {**FEAST, "features": ["user_activity:clicks_7d"]}
        more = {**FEAST, "features": ["user_activity:clicks_7d", "user_activity:clicks_24h"]}
        for body, n, status in ((few, 3000, 200), (few, 3001, 422), (more, 1500, 200), (more, 1501, 422)):
            asked = {**body, "entities": {"user_id": ["u1"] * n}}
            answer = await http.post("/get-online-features", json=asked)
            assert answer.status_code == status, answer.text
        for each in ("1501 rows of 2 features", "HEADRACE_VALUES_MAX"):
            assert each in answer.json()


# Time


async def test_slow_clients_get_so_much_time_and_hold_nobody_up(
    connect: Connect, plan: Plan, redis: EmbeddedRedis
) -> None:
    """More of them than requests may be in work at once, in every way of being slow; others are answered throughout."""
    raw = json.dumps(RANKING).encode()
    slow = {
        "nothing of a body": (post(raw)[: -len(raw)], 408),
        "half a body": (post(raw)[:-5], 408),
        "half a head": (post(raw)[:20], 408),
        "half a second head": (b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\nGET /heal", 408),
    }
    with listening(settings_of(redis.url, deadline_s=1.0, requests_max=1, idle_s=2), plan) as port:
        connections = {name: [await connect(port, sent) for _ in range(3)] for name, (sent, _) in slow.items()}
        silent = await connect(port)
        dribbling = await connect(port, b"\r\n")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=LONG_S) as http:
            for _ in range(5):
                assert (await http.post("/v1/features", content=raw)).status_code == 200
            for name, (_, status) in slow.items():
                for each in connections[name]:
                    if "second" in name:
                        assert (await each.answer()).status_code == 200
                    problem(await each.answer(), status, "1 s", "HEADRACE_DEADLINE_S")
                    assert await each.rest() == b"", name
            assert await silent.rest() == b""
            await dribbling.rest()
            assert (await http.post("/v1/features", content=raw)).status_code == 200


async def test_who_takes_no_answers_is_dropped(plan: Plan, redis: EmbeddedRedis) -> None:
    """Answers that nobody takes are kept for the deadline and no longer."""
    body = json.dumps({**RANKING, "item_ids": [f"i{n}" for n in range(1000)]}).encode()
    with listening(settings_of(redis.url, deadline_s=1.0), plan) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
        writer.write(post(body) * 30)  # Some 10 MB of answers: more than the kernel keeps.
        lost = asyncio.ensure_future(writer.wait_closed())
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=LONG_S) as http:
            assert (await http.post("/v1/features", json=RANKING)).status_code == 200
        async with asyncio.timeout(LONG_S):
            while not reader.exception() and not lost.done():
                writer.write(b"\r\n")  # Only who writes hears that the connection is gone.
                await asyncio.sleep(0.1)
        writer.transport.abort()
        await asyncio.gather(lost, return_exceptions=True)


async def test_a_request_has_a_deadline_of_its_own(
    plan: Plan, redis: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it is that takes so long; what was given up is no longer in work."""
    clock = Clock()
    Rows(plan, redis.url, clock)
    settings = settings_of(redis.url, deadline_s=0.3, request_timeout_s=LONG_S, redis_timeout_s=LONG_S)
    async with served(settings, plan, clock) as http:
        os.kill(redis.pid, signal.SIGSTOP)
        try:
            for _ in range(2):
                answer = await asyncio.wait_for(http.post("/v1/features", json=RANKING), LONG_S)
                problem(answer, 503, "0.3 s", "HEADRACE_DEADLINE_S")
                assert answer.headers["retry-after"] == "1"
        finally:
            os.kill(redis.pid, signal.SIGCONT)
        assert (await http.get("/readyz")).status_code == 200


# Connections


async def test_connections_beyond_the_most_are_told_so_but_operators_are_not(
    connect: Connect, plan: Plan, redis: EmbeddedRedis
) -> None:
    with listening(settings_of(redis.url, connections_max=2), plan) as port:
        ask = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
        first, second = await connect(port, ask), await connect(port, ask)
        assert [(await each.answer()).status_code for each in (first, second)] == [200, 200]
        third = await connect(port, ask)
        assert (await third.answer()).status_code == 200
        third.send(post(json.dumps(RANKING).encode()))
        answer = await third.answer()
        problem(answer, 503, "HEADRACE_CONNECTIONS_MAX")
        assert answer.headers["retry-after"] == "1"
        assert await third.rest() == b""
        for each in (first, second):
            each.send(post(json.dumps(RANKING).encode()))
            assert (await each.answer()).status_code == 200


async def test_half_a_head_makes_room_for_who_comes(connect: Connect, plan: Plan, redis: EmbeddedRedis) -> None:
    """The oldest goes first, and with an answer; whoever comes is answered, however many were there before.

    Without, a hundred are let in beyond the limit to be refused, and who comes then, a liveness probe too, is dropped.
    """
    ask = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
    with listening(settings_of(redis.url, connections_max=20, deadline_s=LONG_S, idle_s=LONG_S), plan) as port:
        operator = await connect(port)
        halves = []
        for _ in range(19 + 150):
            halves.append(await connect(port, ask))
            assert (await halves[-1].answer()).status_code == 200
            halves[-1].send(ask[:9])
            operator.send(ask)  # Its answer says that the half before it was read.
            assert (await operator.answer()).status_code == 200
        for each in halves[:150]:
            problem(await each.answer(), 408, "HEADRACE_CONNECTIONS_MAX")
            assert await each.rest() == b""
        for each in halves[151:]:
            each.send(ask[9:])
            assert (await each.answer()).status_code == 200
            each.send(ask[:9])
        operator.send(ask)
        assert (await operator.answer()).status_code == 200
        newcomer = await connect(port, post(json.dumps(RANKING).encode()))
        assert (await newcomer.answer()).status_code == 200
        problem(await halves[150].answer(), 408, "HEADRACE_CONNECTIONS_MAX")


@pytest.mark.parametrize("first", [b"", b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"], ids=["nothing", "once"])
async def test_who_asks_nothing_makes_room_for_who_comes(
    connect: Connect, plan: Plan, redis: EmbeddedRedis, first: bytes
) -> None:
    """The oldest goes first: at once if it never asked, and otherwise before somebody would be dropped unheard.

    A thousand that connect and send nothing, or no more, kept out a liveness probe until HEADRACE_IDLE_S was over.
    """
    ask = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
    with listening(settings_of(redis.url, connections_max=20, deadline_s=LONG_S, idle_s=LONG_S), plan) as port:
        operator = await connect(port, ask)
        assert (await operator.answer()).status_code == 200
        silent = []
        for _ in range(20 + 150):
            silent.append(await connect(port, first))
            if first:
                assert (await silent[-1].answer()).status_code == 200
            operator.send(ask)  # Its answer says that the one before it was seen.
            assert (await operator.answer()).status_code == 200
        probe = await connect(port, ask)
        assert (await probe.answer()).status_code == 200
        assert await silent[0].rest() == b""
        silent[-1].send(ask)
        assert (await silent[-1].answer()).status_code == 200


async def test_who_is_owed_an_answer_makes_no_room(connect: Connect, plan: Plan, redis: EmbeddedRedis) -> None:
    """Half a second head does not end the first request; a 408 now would be taken for its answer."""
    ask = b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n"
    long = {"request_timeout_s": LONG_S, "redis_timeout_s": LONG_S, "deadline_s": LONG_S, "idle_s": LONG_S}
    with listening(settings_of(redis.url, connections_max=2, **long), plan) as port:
        operator, busy = await connect(port, ask), await connect(port, ask)
        assert [(await each.answer()).status_code for each in (operator, busy)] == [200, 200]
        os.kill(redis.pid, signal.SIGSTOP)
        try:
            busy.send(post(json.dumps(RANKING).encode()) + ask[:9])
            operator.send(ask)
            assert (await operator.answer()).status_code == 200
            assert (await (await connect(port, ask)).answer()).status_code == 200
        finally:
            os.kill(redis.pid, signal.SIGCONT)
        assert (await busy.answer()).status_code == 200
        busy.send(ask[9:])
        assert (await busy.answer()).status_code == 200


async def test_idle_connections_are_closed(connect: Connect, plan: Plan, redis: EmbeddedRedis) -> None:
    with listening(settings_of(redis.url, idle_s=1), plan) as port:
        never, once = await connect(port), await connect(port, b"GET /healthz HTTP/1.1\r\nHost: h\r\n\r\n")
        assert (await once.answer()).status_code == 200
        assert [await never.rest(), await once.rest()] == [b"", b""]


# Too much


def arrivals(gate: Gate, rate: float, capacity: float, seconds: float, began_s: float) -> list[tuple[float, float]]:
    """Evenly spaced requests to one worker, who answers them in turn: when each that was taken came and ended."""
    busy_until = began_s
    line: list[tuple[float, float]] = []
    done: list[tuple[float, float]] = []
    for n in range(int(rate * seconds)):
        now_s = began_s + n / rate
        while line and line[0][1] <= now_s:
            gate.leave(line[0][1])
            done.append(line.pop(0))
        if gate.enter(now_s):
            busy_until = max(busy_until, now_s) + 1 / capacity
            line.append((now_s, busy_until))
    for each in line:
        gate.leave(each[1])
    return done + line


def test_a_crowd_is_taken_and_what_can_be_carried_is_never_refused() -> None:
    """A hundred at once after a quiet time are no overload; a limit on requests at once alone would refuse most."""
    gate = Gate(8)
    assert all(gate.enter(50.0) for _ in range(100))
    for n in range(100):
        gate.leave(50.0 + n * 0.0005)
    taken = arrivals(gate, rate=800, capacity=1000, seconds=10, began_s=60)
    assert len(taken) == 8000


@pytest.mark.parametrize("times", [1.5, 2, 10])
def test_too_much_is_refused_so_that_what_is_taken_is_answered_in_time(times: float) -> None:
    gate = Gate(8)
    taken = arrivals(gate, rate=times * 1000, capacity=1000, seconds=20, began_s=0)
    late = [end - came for came, end in taken]
    assert len(taken) >= 0.95 * 20_000  # It works on as much as it can,
    settled = [each for each, (came, _) in zip(late, taken, strict=True) if came > 6 * WINDOW_S]
    assert max(settled) <= 8 / 1000 + 1e-9  # and soon nobody waits for more than seven others.
    assert not gate.working
    # Over: nothing is refused any more.
    assert len(arrivals(gate, rate=800, capacity=1000, seconds=5, began_s=30)) == 4000


def test_over_a_few_connections_nothing_is_refused_even_when_they_ask_all_the_time() -> None:
    """A hiccup at 80 % of the capacity leaves as many in work as there are connections until it is caught up with.

    A gate that sheds after a window with more than `requests_max` in work refused one in ten of such a load.
    """
    gate = Gate(8)
    for n in range(10_000):
        now_s = 50 + n / 1000
        if n >= 16:
            gate.leave(now_s)
        assert gate.enter(now_s)


async def test_what_piles_up_is_refused_and_what_was_taken_is_answered(redis: EmbeddedRedis, plan: Plan) -> None:
    """Redis stalls: what is in work waits, what comes then is refused at once, and after the stall all is as before."""
    clock = Clock()
    rows = Rows(plan, redis.url, clock)
    rows.write("clicks", [{"t": NOW_MS - 1, "user_id": f"u{n}", "item_id": "i1"} for n in range(9) for _ in range(n)])
    long = {"request_timeout_s": LONG_S, "redis_timeout_s": LONG_S, "deadline_s": LONG_S}

    async def clicks(http: httpx.AsyncClient, n: int) -> httpx.Response:
        return await http.get(f"/v1/entities/user/u{n}")

    async with served(settings_of(redis.url, requests_max=3, **long), plan, clock) as http:
        assert (await clicks(http, 1)).status_code == 200
        os.kill(redis.pid, signal.SIGSTOP)
        waiting: list[asyncio.Task[httpx.Response]] = []
        try:
            # One after the other until one is refused: only time makes of a crowd more than can be carried.
            async with asyncio.timeout(LONG_S):
                while not (refused := [task for task in waiting if task.done()]):
                    waiting.append(asyncio.create_task(clicks(http, len(waiting) % 9)))
                    await asyncio.sleep(WINDOW_S / 5)
            assert len(waiting) > 3
            for answer in (
                *[task.result() for task in refused],
                await clicks(http, 1),
                await http.post("/v1/features", content=b"{"),
            ):
                problem(answer, 503, "more is asked than")
                assert answer.headers["retry-after"] == "1"
            assert (await http.get("/healthz")).status_code == 200
            metrics = (await http.get("/metrics")).text
            assert f"headrace_requests_shed_total {len(refused) + 2}.0" in metrics
        finally:
            os.kill(redis.pid, signal.SIGCONT)
        answers = await asyncio.gather(*waiting)
        for n, answer in enumerate(answers):
            if answer.status_code == 200:
                assert answer.json()["features"]["user_activity__clicks_7d"] == n % 9
        assert [answer.status_code for answer in answers].count(503) == len(refused)
        assert {(await clicks(http, n)).status_code for n in range(9)} == {200}
