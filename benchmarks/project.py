"""A project of its own for a benchmark: a real Redis, the shipped catalogue applied, servers as real processes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from config.settings import Settings
from features.plan import Plan
from headrace.embedded import EmbeddedBroker, EmbeddedRedis, end, free_port, spawn, wait_until_ready
from registry.apply import apply
from store.connect import connect

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 60.0


def redis_server() -> EmbeddedRedis:
    """A Redis: the machine's own `redis-server` if it has one, otherwise the bundled one. Both sides get the same."""
    return EmbeddedRedis(shutil.which("redis-server"))


class Project:
    """A folder with `feature_store.yaml`, a Redis, and the shipped catalogue applied; all of it gone at exit.

    Args:
        kafka: address of a broker to apply to; by default one that lives only while `apply` runs.
        options: more settings, by their names in `config.settings.Settings`.
    """

    settings: Settings
    client: Any
    plan: Plan

    def __init__(self, kafka: str | None = None, **options: Any) -> None:
        self.redis = redis_server()
        self._kafka = kafka
        self._options = options

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="headrace-bench-"))
        try:
            shutil.copy(ROOT / "feature_store.yaml", self.folder)
            self.redis.__enter__()
            self.settings = Settings(repo=self.folder, redis_url=self.redis.url, **self._options)
            self.client = connect(self.redis.url, 60)
            if self._kafka:
                self.settings = self.settings.model_copy(update={"kafka": self._kafka})
                self.plan = apply(self.settings, self.client).plan
            else:
                with EmbeddedBroker() as broker:
                    there = {"kafka": broker.bootstrap_servers, "topics": "auto"}
                    self.plan = apply(self.settings.model_copy(update=there), self.client).plan
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "client"):
            self.client.close()
        self.redis.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    def environment(self, **options: Any) -> dict[str, str]:
        """Variables for a child process; `options` are settings by name, also ones that this version may not know."""
        own = {f"HEADRACE_{name.upper()}": str(value) for name, value in options.items()}
        return {**os.environ, **self.settings.environment(), "PYTHONPATH": str(ROOT), **own}

    @contextmanager
    def serve(self, **options: Any) -> Iterator[str]:
        """`headrace serve` as one process, for the length of a `with` block; gives its address (http://host:port).

        Its deadlines are long: what a busy machine delays is to be measured, not refused.
        """
        argv = [sys.executable, "-m", "headrace", "serve"]
        env = self.environment(**{"request_timeout_s": 30, "redis_timeout_s": 30, **options})
        with server("headrace", argv, self.folder, env, ready="/readyz") as address:
            yield address


@contextmanager
def server(name: str, argv: list[str], folder: Path, env: Mapping[str, str], *, ready: str) -> Iterator[str]:
    """A server on a free port (given to it as `--port`), from when `GET ready` answers 200; gives its address.

    Its output goes to a file in `folder`, of which the end is in the error if it does not start.
    """
    port = free_port()
    log = folder / f"{name}-{port}.log"
    # Feast leaves files in the temporary folder when it is stopped: let that be one that goes at the end.
    process = spawn([*argv, "--port", str(port)], log=log, env={**env, "TMPDIR": str(folder)})
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(process, lambda: answers(address + ready), name=name, log=log, timeout_s=START_TIMEOUT_S)
        yield address
    finally:
        end(process)


def answers(url: str) -> bool:
    """Whether `GET url` answers 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310  # our own address, with http
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
