"""API keys: who may call what, how keys come and go under a running server, and that none is ever shown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from fastapi import Request, Response
from typer.testing import CliRunner

from features.plan import Plan
from headrace import cli
from serving import run
from serving.client import AsyncClient, Client, HeadraceError
from serving.front import Bytes, DirectRoute, Server
from serving.guard import Guard
from serving.keys import LOOK_S, KeyFile, Keys, Scope, new_key
from serving.metrics import Metrics
from serving.problems import Problem
from store.connect import connect
from store.forgotten import Order, orders
from tests.support.served import Clock, catalogue, listening, served, settings_of

RANKING = {"service": "ranking_v1", "user_id": "u1", "item_ids": ["i1"]}
PROTECTED = [
    ("POST", "/v1/features"),
    ("GET", "/v1/entities/user/u1"),
    ("GET", "/v1/services/ranking_v1"),
    ("POST", "/get-online-features"),
]


class Time:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def plan() -> Plan:
    return catalogue()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def make(path: Path, scopes: Sequence[Scope] = ("read",), rate: float | None = None) -> str:
    """A new key in the file; returns what a caller sends."""
    known = KeyFile.read(path) if path.exists() else KeyFile()
    key, sent = new_key("somebody", scopes, rate)
    KeyFile(keys=[*known.keys, key]).write(path)
    return sent


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def headers_of(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"headrace"), (b"authorization", f"Bearer {key}".encode())]


def status_of(keys: Keys, key: str, scope: Scope = "read") -> int:
    """What a call with the key is answered."""
    try:
        keys.admit(headers_of(key), scope)
    except Problem as problem:
        return problem.status
    return 200


# Who may call


async def test_every_route_wants_a_key_but_those_of_operators(path: Path, plan: Plan, redis_url: str) -> None:
    good, writer = make(path), make(path, ["write", "admin"])
    key_id, _, secret = good.partition(".")
    wrong: list[dict[str, Any]] = [
        {},
        bearer("x"),
        bearer(""),
        bearer(key_id),
        bearer(f"{key_id}."),
        bearer(f"{key_id}.{secret}x"),
        bearer(f"{key_id}.{secret[:-1]}"),
        bearer(f"{writer.partition('.')[0]}.{secret}"),
        bearer(f"{key_id}.{KeyFile.read(path).keys[0].sha256}"),
        {"Authorization": f"Basic {good}"},
        {"X-API-Key": f"Bearer {good}"},
        {"Authorization": b"Bearer \xff\xfe.\xe4"},
    ]
    async with served(settings_of(redis_url, api_keys_file=path), plan, Clock()) as http:
        for method, route in PROTECTED:
            of_feast = route == "/get-online-features"
            for each in wrong:
                answer = await http.request(method, route, headers=each, json=RANKING)
                assert answer.status_code == 401, (route, each)
                assert answer.headers["www-authenticate"].startswith("Bearer")
                form = "application/json" if of_feast else "application/problem+json"
                assert answer.headers["content-type"] == form
                assert ("FeastPermissionError" in answer.text) is of_feast
                assert secret not in answer.text
            answer = await http.request(method, route, headers=bearer(writer), json=RANKING)
            assert (answer.status_code, "lacks the scope read" in answer.text) == (403, True)
            for each in (bearer(good), {"X-API-Key": good}, {"authorization": f"bearer  {good} "}):
                answer = await http.request(method, route, headers=each, json=RANKING)
                assert answer.status_code not in (401, 403), (route, each)
        for route in ("/healthz", "/metrics", "/openapi.json"):
            assert (await http.get(route)).status_code == 200


async def test_an_entity_is_forgotten_by_who_may_write(path: Path, plan: Plan, redis_url: str) -> None:
    """What it gives is an order to whoever writes to the entity's shard. Without keys nobody may."""
    reader, writer = make(path), make(path, ["write"])
    clock = Clock()
    async with served(settings_of(redis_url, api_keys_file=path), plan, clock) as http:
        assert (await http.delete("/v1/entities/user/u1", headers=bearer(reader))).status_code == 403
        answer = await http.delete("/v1/entities/user/a%2Fb", headers=bearer(writer))
        ordered_at = int(clock() * 1000)
        assert (answer.status_code, answer.json()) == (202, {"entity": "user", "id": "a/b", "ordered_at": ordered_at})
        assert (await http.delete("/v1/entities/nobody/u1", headers=bearer(writer))).status_code == 404
        assert (await http.delete("/v1/entities/user/%00", headers=bearer(writer))).status_code == 422
    with connect(redis_url, 5) as client:
        assert orders(client, plan.project, 0) == [Order("user", [b"a/b"], ordered_at)]
    async with served(settings_of(redis_url), plan, Clock()) as http:
        answer = await http.delete("/v1/entities/user/u1")
        assert (answer.status_code, "headrace keys add" in answer.json()["detail"]) == (403, True)


async def test_a_stranger_costs_no_reading_of_a_body(path: Path, plan: Plan, redis_url: str) -> None:
    make(path)
    async with served(settings_of(redis_url, api_keys_file=path, body_bytes_max=10), plan, Clock()) as http:
        assert (await http.post("/v1/features", json=RANKING)).status_code == 401


@pytest.mark.parametrize(("setting", "statuses"), [("open", (200, 200)), ("admin", (401, 200)), ("off", (404, 404))])
async def test_metrics_are_for_whom_the_setting_says(
    path: Path, plan: Plan, redis_url: str, setting: str, statuses: tuple[int, int]
) -> None:
    admin = make(path, ["admin"])
    async with served(settings_of(redis_url, api_keys_file=path, metrics=setting), plan, Clock()) as http:
        found = [await http.get("/metrics", headers=headers) for headers in ({}, bearer(admin))]
        assert tuple(each.status_code for each in found) == statuses


def test_settings_that_would_not_protect_are_refused(path: Path, redis_url: str) -> None:
    with pytest.raises(ValueError, match="HEADRACE_METRICS=admin needs HEADRACE_API_KEYS_FILE"):
        settings_of(redis_url, metrics="admin")
    with pytest.raises(ValueError, match="HEADRACE_TLS_KEY needs HEADRACE_TLS_CERTIFICATE"):
        settings_of(redis_url, tls_key=path)


@pytest.mark.parametrize(
    ("host", "is_refused"),
    [("127.0.0.1", False), ("::1", False), ("localhost", False), ("127.9.9.9", False)]
    + [(host, True) for host in ("0.0.0.0", "::", "10.1.2.3", "example.com", "")],  # noqa: S104  # refused, that is the test
)
def test_an_address_that_strangers_reach_needs_keys_or_that_it_is_said(
    path: Path, redis_url: str, host: str, is_refused: bool
) -> None:
    if is_refused:
        with pytest.raises(ValueError, match="HEADRACE_API_KEYS_FILE, or say HEADRACE_OPEN_TO_ALL=true"):
            run._check_open(settings_of(redis_url, host=host))
    else:
        run._check_open(settings_of(redis_url, host=host))
    run._check_open(settings_of(redis_url, host=host, open_to_all=True))
    run._check_open(settings_of(redis_url, host=host, api_keys_file=path))


def test_a_key_has_a_rate(path: Path) -> None:
    """As many at once as a second brings; then one each time its share of a second has passed."""
    time, limited, free = Time(), make(path, rate=4.0), make(path)
    keys = Keys(path, monotonic=time)
    assert [status_of(keys, limited) for _ in range(6)] == [200] * 4 + [429] * 2
    assert {status_of(keys, free) for _ in range(50)} == {200}
    with pytest.raises(Problem, match="4 times a second") as refused:
        keys.admit(headers_of(limited), "read")
    assert refused.value.headers == {"Retry-After": "1"}
    time.now_s += 0.26
    assert [status_of(keys, limited) for _ in range(2)] == [200, 429]
    time.now_s += 3600
    assert [status_of(keys, limited) for _ in range(5)] == [200] * 4 + [429]
    slow = make(path, rate=0.1)
    time.now_s += LOOK_S
    assert status_of(keys, slow) == 200
    with pytest.raises(Problem) as refused:
        keys.admit(headers_of(slow), "read")
    assert refused.value.headers == {"Retry-After": "10"}


def test_who_sends_a_wrong_secret_uses_up_nobodys_rate(path: Path) -> None:
    limited = make(path, rate=1.0)
    keys = Keys(path, monotonic=Time())
    assert {status_of(keys, limited + "x") for _ in range(9)} == {401}
    assert status_of(keys, limited) == 200


# How keys come and go


def test_a_changed_file_is_read_within_a_second_and_no_sooner(path: Path) -> None:
    time, first = Time(), make(path)
    keys = Keys(path, monotonic=time)
    second = make(path)
    assert (status_of(keys, first), status_of(keys, second)) == (200, 401)
    time.now_s += LOOK_S
    assert (status_of(keys, first), status_of(keys, second)) == (200, 200)
    read = KeyFile.read(path)
    KeyFile(keys=[key for key in read.keys if not first.startswith(key.id)]).write(path)
    time.now_s += LOOK_S
    assert (status_of(keys, first), status_of(keys, second)) == (401, 200)


BROKEN = [
    "",
    "{",
    "[]",
    '{"keys": [{}]}',
    '{"keys": 1}',
    '{"kyes": []}',
    "\0",
    json.dumps({"keys": [{"id": "0" * 8, "name": "n", "sha256": "0" * 64, "scopes": ["everything"]}]}),
    json.dumps({"keys": [{"id": "0" * 8, "name": "n", "sha256": "0" * 64, "scopes": []}] * 2}),
    None,
]


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_keeps_the_old_keys_and_says_so(path: Path, text: str | None) -> None:
    """Neither does an editor's mistake lock everybody out, nor does it let anybody in."""
    time, metrics = Time(), Metrics()
    good = make(path)
    keys = Keys(path, metrics.keys_read, monotonic=time)
    before = path.read_bytes()
    path.unlink() if text is None else path.write_text(text)
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            time.now_s += LOOK_S
            assert (status_of(keys, good), status_of(keys, "0" * 8 + ".x")) == (200, 401)
    assert [(each["event"], each["log_level"]) for each in logs] == [("api_keys_unreadable", "error")]
    assert "stay valid" in logs[0]["consequence"]
    assert str(path) in logs[0]["error"]
    assert b"headrace_api_keys_broken 1.0" in metrics.text()
    assert b'headrace_api_keys_reads_total{result="failed"} 1.0' in metrics.text()
    path.write_bytes(before)
    time.now_s += LOOK_S
    assert status_of(keys, good) == 200
    assert b"headrace_api_keys_broken 0.0" in metrics.text()


@pytest.mark.parametrize("text", BROKEN)
def test_a_server_does_not_start_on_a_broken_file(path: Path, text: str | None) -> None:
    if text is not None:
        path.write_text(text)
    with pytest.raises((ValueError, OSError), match=re.escape(str(path))):
        Keys(path)


def test_the_file_holds_no_secret_and_is_its_owners_alone(path: Path) -> None:
    """Also an error about it shows nothing that stands in it."""
    sent = make(path, ["read", "admin"], 5.0)
    secret = sent.partition(".")[2]
    assert len(secret) >= 43  # 256 bits.
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == [path.name]  # noqa: PTH208  # also what is hidden
    key = KeyFile.read(path).keys[0]
    assert key.sha256 not in repr(key)
    path.write_text(path.read_text().replace('"rate"', '"wrong"'))
    with pytest.raises(ValueError, match="wrong") as error:
        KeyFile.read(path)
    assert key.sha256 not in str(error.value)


# The command line, and what is written down


def test_keys_are_made_listed_and_revoked_by_the_command_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADRACE_API_KEYS_FILE", str(path))
    monkeypatch.setattr("config.logs.set_up_logs", lambda **_: None)  # It is for a whole process.
    commands, time = CliRunner(), Time()
    with structlog.testing.capture_logs() as logs:
        made = commands.invoke(cli.app, ["keys", "add", "ranking", "--rate", "9"])
        assert made.exit_code == 0, made.output
        sent = made.stdout.strip()
        other = commands.invoke(cli.app, ["keys", "add", "ops", "--scope", "admin", "--scope", "write"]).stdout.strip()
        keys = Keys(path, monotonic=time)
        assert [status_of(keys, sent), status_of(keys, other), status_of(keys, other, "admin")] == [200, 403, 200]
        listed = commands.invoke(cli.app, ["keys", "list"]).stdout
        key_id, _, secret = sent.partition(".")
        assert all(word in listed for word in (key_id, "ranking", "ops", "admin, write", "9"))
        assert commands.invoke(cli.app, ["keys", "revoke", key_id]).exit_code == 0
        time.now_s += LOOK_S
        assert [status_of(keys, sent), status_of(keys, other, "write")] == [401, 200]
        unknown = commands.invoke(cli.app, ["keys", "revoke", key_id])
        assert (unknown.exit_code, key_id in str(unknown.exception)) == (1, True)
    audited = [(each["action"], each["key"], each["uid"]) for each in logs if each["event"] == "audit"]
    other_id = other.partition(".")[0]
    uid = os.getuid()
    assert audited == [("keys add", key_id, uid), ("keys add", other_id, uid), ("keys revoke", key_id, uid)]
    assert secret not in listed
    assert secret not in str(logs)


def test_without_a_file_the_command_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADRACE_API_KEYS_FILE", raising=False)
    done = CliRunner().invoke(cli.app, ["keys", "list"])
    assert "HEADRACE_API_KEYS_FILE" in str(done.exception)


async def test_every_call_that_writes_is_written_down(path: Path, redis_url: str) -> None:
    """With the key's id, what was called and how it ended: also what was refused. Never the key itself."""
    writer, reader = make(path, ["write"]), make(path)

    async def write(_request: Request, name: str) -> Response:
        if name == "bad":
            raise Problem(409, "Conflict", "it is there already")
        return Bytes(b"{}", [])

    route = DirectRoute("POST", "/v1/things/{name}", write, ["application/json"], scope="write")
    app = Server(Metrics(), Guard.of(settings_of(redis_url), Keys(path)), [route])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://headrace") as http:
        with structlog.testing.capture_logs() as logs:
            for name, key in (("good", writer), ("bad", writer), ("good", reader), ("good", "stranger.x")):
                await http.post(f"/v1/things/{name}", headers=bearer(key))
    lines = [(each["event"], each["action"], each["key"], each["status"]) for each in logs]
    writer_id = writer.partition(".")[0]
    assert lines == [
        ("audit", "POST /v1/things/good", writer_id, 200),
        ("audit", "POST /v1/things/bad", writer_id, 409),
        ("audit", "POST /v1/things/good", None, 403),
        ("audit", "POST /v1/things/good", None, 401),
    ]
    assert not any(key.partition(".")[2] in str(logs) for key in (writer, reader))


# Clients


async def test_both_clients_send_their_key(path: Path, plan: Plan, redis_url: str) -> None:
    key = make(path)
    with listening(settings_of(redis_url, api_keys_file=path), plan) as port:
        address = f"http://127.0.0.1:{port}"
        with Client(address, 60, key=key) as client:
            assert client.features("ranking_v1", "u1", ["i1"]).matrix.shape[0] == 1
        async with AsyncClient(address, 60, key=key) as other:
            assert (await other.entity("user", "u1"))["id"] == "u1"
        with Client(address, 60) as client, pytest.raises(HeadraceError, match="401"):
            client.features("ranking_v1", "u1", ["i1"])


def refusing(times: int, status: int, headers: dict[str, str]) -> tuple[httpx.MockTransport, list[str]]:
    """Answers so often with a refusal, and then properly; and what was asked."""
    asked: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.path)
        return (
            httpx.Response(status, headers=headers) if len(asked) <= times else httpx.Response(200, json={"id": "u1"})
        )

    return httpx.MockTransport(answer), asked


@pytest.mark.parametrize("status", [429, 503])
async def test_clients_come_back_when_they_are_told_to_and_there_is_time(status: int) -> None:
    transport, asked = refusing(2, status, {"Retry-After": "0"})
    with Client("http://headrace", 60) as client:
        client._http = httpx.Client(base_url="http://headrace", transport=transport)
        assert client.entity("user", "u1") == {"id": "u1"}
    assert len(asked) == 3
    transport, asked = refusing(2, status, {"Retry-After": "0"})
    async with AsyncClient("http://headrace", 60) as other:
        other._http = httpx.AsyncClient(base_url="http://headrace", transport=transport)
        assert await other.entity("user", "u1") == {"id": "u1"}
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("status", "headers"),
    [(503, {"Retry-After": "61"}), (503, {}), (503, {"Retry-After": "soon"}), (500, {"Retry-After": "0"})],
)
def test_clients_do_not_wait_in_vain(status: int, headers: dict[str, Any]) -> None:
    """Told to come back after the deadline, or not told, they say at once what the server said."""
    transport, asked = refusing(1, status, headers)
    with Client("http://headrace", 60) as client:
        client._http = httpx.Client(base_url="http://headrace", transport=transport)
        with pytest.raises(HeadraceError, match=str(status)):
            client.entity("user", "u1")
    assert len(asked) == 1
