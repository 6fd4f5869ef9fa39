"""`headrace serve --processes 2`, as processes over a real Redis: one port, one set of metrics, whoever dies."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from config.settings import Settings
from features.plan import Derived, Plan
from headrace.embedded import EmbeddedBroker, end, spawn
from registry.apply import apply
from serving import run as running
from store.connect import connect
from store.plans import append_plan
from tests.support.served import ROOT, SHARDS, catalogue, project_folder
from tests.support.stack import wait_for

ROUTE = "/v1/entities/{entity}/{entity_id:path}"
replace = msgspec.structs.replace


@pytest.fixture
def settings(tmp_path: Path, redis_url: str) -> Settings:
    """A project where the shipped catalogue is applied; the port is any free one."""
    with EmbeddedBroker() as broker:
        made = Settings(
            repo=project_folder(tmp_path / "project"),
            redis_url=redis_url,
            kafka=broker.bootstrap_servers,
            topics="auto",
            shards=SHARDS,
            port=0,
            server_processes=2,
        )
        apply(made, connect(redis_url, 10))
        return made


class Server:
    """A server that runs as processes; what it counts is read from outside too, a process at a time."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._log = folder / "server.log"
        environment = os.environ | settings.environment() | {"TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT)}
        self.process = spawn(
            [sys.executable, "-W", "ignore", "-m", "headrace", "serve"], log=self._log, env=environment
        )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_both_answer(self) -> None:
        """Until each of two processes has answered a request, and the port is known."""
        wait_for("the port is taken", lambda: "port=" in self.log)
        self.port = int(re.findall(r"port=(\d+)", self.log)[0])

        def both() -> bool:
            assert self.process.poll() is None, self.log
            self.get("/healthz")
            return len([pid for pid, count in self.counts("/healthz").items() if count and is_there(pid)]) == 2

        wait_for("both processes answer", both)

    def get(self, path: str) -> int:
        """The status of an answer on a connection of its own; 0 when there is none."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=30).status_code
        except httpx.TransportError:
            return 0

    def counts(self, route: str) -> dict[int, float]:
        """How many requests of a route each process has counted, also one that is gone."""
        return {
            int(file.stem.removeprefix("counter_")): sum(
                sample.value
                for metric in MultiProcessCollector.merge([str(file)], accumulate=False)
                for sample in metric.samples
                if sample.name == "headrace_requests_total" and sample.labels["route"] == route
            )
            for file in self.temporary.glob("headrace-metrics-*/counter_*.db")
        }

    def counted(self, route: str) -> dict[str, float]:
        """What /metrics says of a route: requests, and observations of their time."""
        text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=30).text
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        assert all(sample.name.startswith("headrace_") for sample in samples)
        return {
            sample.name: sample.value
            for sample in samples
            if sample.labels.get("route") == route and "le" not in sample.labels
        }


@pytest.fixture
def serve(settings: Settings, tmp_path: Path) -> Callable[[], object]:
    @contextmanager
    def start(**more: Any) -> Iterator[Server]:
        server = Server(settings.model_copy(update=more), tmp_path)
        try:
            yield server
        finally:
            if server.process.poll() is None:
                end(server.process)
            print(server.log)

    return start


def is_there(pid: int) -> bool:
    """Whether a process runs: not gone, and not only waiting to be looked at by its parent."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False


def test_two_processes_share_a_port_and_one_set_of_metrics_and_a_killed_one_is_replaced(serve) -> None:
    """Every answer that a client got is in /metrics at once, whichever process is asked, also those of a dead one."""
    with serve() as server:
        server.wait_until_both_answer()
        sent = 40
        assert {server.get("/v1/entities/user/u1") for _ in range(sent)} == {200}
        first = server.counts(ROUTE)
        assert len(first) == 2
        assert min(first.values()) > 0
        for _ in range(10):  # Of either process.
            counted = server.counted(ROUTE)
            assert counted["headrace_requests_total"] == sum(first.values()) == sent
            assert counted["headrace_request_seconds_count"] == sent

        killed = min(first)
        os.kill(killed, signal.SIGKILL)
        # Until then its last threads may hold its socket open, which would still be given connections.
        wait_for("the process is gone", lambda: not Path(f"/proc/{killed}").exists())
        assert {server.get("/v1/entities/user/u1") for _ in range(sent)} == {200}
        server.wait_until_both_answer()
        assert {server.get("/v1/entities/user/u1") for _ in range(sent)} == {200}
        second = server.counts(ROUTE)
        assert len(second) == 3
        assert second[killed] == first[killed]
        assert min(second.values()) > 0
        assert server.counted(ROUTE)["headrace_requests_total"] == sum(second.values()) == 3 * sent
        assert f"pid={killed} status=-9" in server.log
        # The kernel says of one that it ends before it has ended: looks at the others meanwhile took no time, and
        # counted as time once.
        assert "server_process_hangs" not in server.log


def test_a_process_that_hangs_is_replaced(serve) -> None:
    """The kernel goes on giving it connections, which nobody answers; the others and their supervisor are well."""
    with serve(hang_s=2) as server:
        server.wait_until_both_answer()
        hung, other = server.counts("/healthz")
        os.kill(hung, signal.SIGSTOP)
        wait_for("it is gone", lambda: not Path(f"/proc/{hung}").exists())
        server.wait_until_both_answer()
        assert is_there(other)
        assert f"pid={hung}" in server.log.split("server_process_hangs")[1].splitlines()[0]
        # All of them, with who watches: that is a machine that slept, and no reason to kill.
        pids = [pid for pid in server.counts("/healthz") if is_there(pid)]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in (server.process.pid, *pids):
                os.kill(pid, number)
            time.sleep(3 if number == signal.SIGSTOP else 0)
        server.wait_until_both_answer()
        assert [is_there(pid) for pid in pids] == [True, True]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGKILL, -9)])
def test_whatever_ends_the_server_no_process_and_no_file_stays(serve, number: signal.Signals, status: int) -> None:
    with serve() as server:
        server.wait_until_both_answer()
        pids = list(server.counts("/healthz"))
        server.process.send_signal(number)
        assert server.process.wait(60) == status
        wait_for("its processes are gone", lambda: not any(map(is_there, pids)), 30)
        assert list(server.temporary.glob("headrace-*")) == []
        assert server.get("/healthz") == 0
        assert "Traceback" not in server.log


def test_processes_that_can_not_start_are_not_started_for_ever(serve, settings: Settings) -> None:
    """The code of the derived features is another than when the plan was applied."""
    append_plan(connect(settings.redis_url.get_secret_value(), 10), replace(with_other_code(catalogue()), number=1), 0)
    with serve() as server:
        assert server.process.wait(120) == 1
        assert "headrace apply" in server.log
        assert "server_gives_up" in server.log
        assert list(server.temporary.glob("headrace-*")) == []


@pytest.mark.parametrize("processes", [1, 2])
def test_a_newer_plan_is_taken_up_and_no_request_fails(serve, settings: Settings, processes: int) -> None:
    """Neither on connections that are kept nor on new ones: those of the old plan end with an answer that says so.

    A plan that can't be served here, as its code is another, leaves the one before it where it is.
    """
    client = connect(settings.redis_url.get_secret_value(), 10)
    plans = [catalogue()]
    wrong: list[Any] = []
    seen: list[str] = []
    done = threading.Event()

    def ask(server: Server, *, keep: bool) -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=60) as http:
            while not done.is_set():
                try:
                    answer = (http.get if keep else partial(httpx.get, timeout=60))(
                        f"http://127.0.0.1:{server.port}/v1/entities/user/u1"
                    )
                    seen.append(answer.json()["plan"])
                    wrong.extend([answer.text] if answer.status_code != 200 else [])
                except httpx.HTTPError as error:
                    wrong.append(error)

    def serves(plan: Plan) -> bool:
        seen.clear()
        wait_for("some answer", lambda: len(seen) > 100)
        return set(seen) == {plan.fingerprint}

    with serve(server_processes=processes, standby=processes == 1) as server:
        wait_for("the port is taken", lambda: "port=" in server.log)
        server.port = int(re.findall(r"port=(\d+)", server.log)[0])
        wait_for("it answers", lambda: server.get("/readyz") == 200)
        threads = [threading.Thread(target=ask, args=(server,), kwargs={"keep": keep}) for keep in (True, True, False)]
        for thread in threads:
            thread.start()
        try:
            for number in (1, 2):
                services = tuple(replace(each, owner=f"owner {number}") for each in plans[0].services)
                plans.append(replace(plans[0], services=services, number=number))
                append_plan(client, plans[-1], 0)
                wait_for(f"plan {number} is served", partial(serves, plans[-1]))
            append_plan(client, replace(with_other_code(plans[0]), number=3), 0)
            wait_for("it is said", lambda: "plan_not_taken_up" in server.log)
            assert serves(plans[-1])
        finally:
            done.set()
            for thread in threads:
                thread.join()
        assert not wrong, wrong[:3]


def with_other_code(plan: Plan) -> Plan:
    """The plan, as if all derived functions had been others when it was applied."""
    views = [
        replace(
            view,
            features=tuple(
                replace(each, fingerprint="0" * 12) if isinstance(each, Derived) else each for each in view.features
            ),
        )
        for view in plan.views
    ]
    return replace(plan, views=tuple(views))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_a_port_that_somebody_has_is_an_error_that_says_so(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, processes: int, shared: bool
) -> None:
    """Also one that another Headrace's processes share: a second server must not join them unnoticed."""
    monkeypatch.setattr(running, "set_up_logs", lambda **_: None)  # It is for a whole process.
    with socket.socket() as other:
        if shared:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        taken = settings.model_copy(update={"port": port, "server_processes": processes})
        with pytest.raises(OSError, match=rf"127\.0\.0\.1:{port}: Address already in use; .*HEADRACE_PORT"):
            running.run(taken)
