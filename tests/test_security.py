"""TLS on both sides, users of Redis with no more rights than they need, and secrets that nothing shows."""

from __future__ import annotations

import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import structlog

from config.settings import Settings
from features.plan import Plan
from headrace.embedded import EmbeddedRedis, free_port
from serving import worker
from serving.client import Client
from store.connect import connect
from store.plans import append_plan, applied_plans, load_plan, watch_newest
from tests.support.served import NOW_MS, ROOT, Clock, Rows, catalogue, listening, project_folder, served, settings_of
from tests.support.stack import wait_for

RANKING = {"service": "ranking_v1", "user_id": "u1", "item_ids": ["i1"]}
SECRET = "s3cret-and-long"
_PLAIN = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN"}
CLICK = {"t": NOW_MS - 1, "user_id": "u1", "item_id": "i1"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    return catalogue()


@pytest.fixture(scope="module", params=["bundled", "on PATH"])
def own_redis(request: pytest.FixtureRequest) -> Iterator[EmbeddedRedis]:
    """A Redis whose users are the test's alone."""
    with EmbeddedRedis(None if request.param == "bundled" else "redis-server") as server:
        yield server


def documented_users(client: Any) -> None:
    """Makes the users of SECURITY.md, as it says."""
    lines = re.findall(r"^ACL SETUSER .*$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        client.execute_command(*line.replace("SECRET", SECRET).split())


async def test_the_documented_users_of_redis_can_do_their_work_and_nothing_else(
    own_redis: EmbeddedRedis, plan: Plan, tmp_path: Path
) -> None:
    clock = Clock()
    with redis.Redis.from_url(own_redis.url) as admin:
        documented_users(admin)
        admin.set("{another:user:1}:user_activity:u1", "not ours")

    def url(user: str) -> str:
        return own_redis.url.replace("redis://", f"redis://{user}:{SECRET}@")

    append_plan(connect(url("stream"), 10), plan, 0)
    for user in ("stream", "serve"):
        settings = settings_of(url(user), repo=project_folder(tmp_path))
        assert load_plan(settings) == plan
        assert [each.fingerprint for each in applied_plans(connect(url(user), 10), plan.project)] == [plan.fingerprint]
        newest: list[int] = []
        watch_newest(settings, newest.append)
        wait_for("it is known which plan is the newest", partial(newest.__contains__, 0))
    rows = Rows(plan, url("stream"), clock)
    rows.write("clicks", [CLICK])
    async with served(settings_of(url("serve")), plan, clock) as http:
        for _ in range(2):  # The second time from the mirror.
            answer = await http.post("/v1/features", json=RANKING)
            assert answer.status_code == 200, answer.text
            assert answer.json()["user"]["features"]["user_activity__clicks_7d"] == 1
        body = {"features": ["user_activity:clicks_7d"], "entities": {"user_id": ["u1"]}}
        assert (await http.post("/get-online-features", json=body)).status_code == 200
        assert (await http.get("/readyz")).status_code == 200
    for user, commands in {
        "serve": (["SET", "{headrace:user:1}:x", "1"], ["DEL", "{headrace:user:1}:x"], ["KEYS", "*"]),
        "stream": (["FLUSHALL"], ["KEYS", "*"], ["CONFIG", "GET", "*"]),
    }.items():
        with redis.Redis.from_url(url(user)) as client:
            for command in (*commands, ["MGET", "{another:user:1}:user_activity:u1"], ["ACL", "LIST"]):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    client.execute_command(*command)


def test_everything_works_over_tls_from_client_to_redis(
    certificate: Path, plan: Plan, redis7_server: EmbeddedRedis
) -> None:
    """A real Redis with TLS behind a real server with TLS; who does not trust the certificate gets nothing."""
    tls_port, clock = free_port(), Clock()
    tls = {"--tls-cert-file": certificate, "--tls-key-file": certificate, "--tls-ca-cert-file": certificate}
    args = [
        word
        for name, value in {**tls, "--tls-port": tls_port, "--tls-auth-clients": "no"}.items()
        for word in (name, str(value))
    ]
    with EmbeddedRedis("redis-server", args=args) as server:
        Rows(plan, server.url, clock)
        url = f"rediss://127.0.0.1:{tls_port}/0?ssl_ca_certs={certificate}"
        settings = settings_of(url, tls_certificate=certificate)
        trusting = ssl.create_default_context(cafile=str(certificate))
        with listening(settings, plan) as port:
            address = f"https://127.0.0.1:{port}"
            assert httpx.get(f"{address}/readyz", verify=trusting, timeout=60).status_code == 200
            with Client(address, 60, verify=trusting) as client:
                assert client.features("ranking_v1", "u1", ["i1"]).matrix.shape[0] == 1
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                httpx.get(f"{address}/healthz", timeout=60)
            with pytest.raises(httpx.TransportError):
                httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=60)


def test_a_certificate_that_is_none_is_an_error_that_names_it(
    certificate: Path, plan: Plan, redis_url: str, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.pem"
    for text in (None, "nothing"):
        if text:
            wrong.write_text(text)
        with pytest.raises(ValueError, match=rf"HEADRACE_TLS_CERTIFICATE.*{re.escape(str(wrong))}"):
            worker.config(settings_of(redis_url, tls_certificate=wrong), plan)
        with pytest.raises(ValueError, match=rf"HEADRACE_TLS_KEY.*{re.escape(str(wrong))}"):
            worker.config(settings_of(redis_url, tls_certificate=certificate, tls_key=wrong), plan)


def test_secrets_come_from_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Kubernetes and Docker hand them over; a variable wins, and child processes get the same."""
    for name in ("HEADRACE_REDIS_URL", "HEADRACE_KAFKA_OPTIONS", "HEADRACE_ARCHIVE_OPTIONS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "HEADRACE_REDIS_URL").write_text(f"redis://serve:{SECRET}@127.0.0.1:1/0\n")
    (tmp_path / "headrace_kafka_options").write_text('{"sasl.password": "hidden"}')
    (tmp_path / "headrace_archive_options").write_text('{"secret_access_key": "hidden"}')
    monkeypatch.setenv("HEADRACE_SECRETS_DIR", str(tmp_path))
    settings = Settings()
    assert settings.redis_url.get_secret_value() == f"redis://serve:{SECRET}@127.0.0.1:1/0"
    assert settings.kafka_options == {"sasl.password": "hidden"}
    for shown in (
        repr(settings),
        str(settings),
        settings.model_dump_json(exclude={"kafka_options", "archive_options"}),
    ):
        assert SECRET not in shown
        assert "hidden" not in shown
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert Settings() == settings
    monkeypatch.setenv("HEADRACE_REDIS_URL", "redis://other/0")
    assert Settings().redis_url.get_secret_value() == "redis://other/0"
    monkeypatch.setenv("HEADRACE_SECRETS_DIR", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"HEADRACE_SECRETS_DIR=.* is no folder"):
        Settings()


async def test_no_answer_and_no_log_line_shows_a_password(plan: Plan) -> None:
    """When Redis is away, refuses the password, or is no Redis."""
    with EmbeddedRedis() as server:
        for url in (
            f"redis://serve:{SECRET}@127.0.0.1:{server.port}/0",
            f"redis://:{SECRET}@127.0.0.1:{free_port()}/0",
        ):
            with structlog.testing.capture_logs() as logs:
                async with served(settings_of(url), plan, Clock()) as http:
                    for answer in (
                        await http.post("/v1/features", json=RANKING),
                        await http.get("/readyz"),
                        await http.get("/v1/entities/user/u1"),
                    ):
                        assert answer.status_code == 503
                        assert SECRET not in answer.text
            assert SECRET not in str(logs)


@pytest.mark.parametrize("command", [["doctor"], ["serve", "--port", "0"]])
def test_no_command_shows_a_password(command: list[str], tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HEADRACE_REPO": str(project_folder(tmp_path)),
        "HEADRACE_REDIS_URL": f"redis://serve:{SECRET}@127.0.0.1:{free_port()}/0",
        "HEADRACE_KAFKA": f"127.0.0.1:{free_port()}",
        "HEADRACE_KAFKA_OPTIONS": json.dumps({"sasl.password": SECRET, "sasl.username": "u", **_PLAIN}),
        "HEADRACE_ARCHIVE_OPTIONS": json.dumps({"secret_access_key": SECRET}),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *command],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert SECRET not in done.stdout + done.stderr
