"""The supervisor: workers that stop are started again, ever later, unless that can't help."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from config.settings import Settings
from streams import supervise as module
from streams.supervise import SUPERSEDED_STATUS, supervise

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """The supervisor takes the process's signals; a test gives them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Clock:
    """Time that passes only when somebody sleeps; `at` is called at its time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.at: list[tuple[float, Callable[[], Any]]] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += duration_s
        due = [call for when, call in self.at if when <= self.now_s]
        self.at = [(when, call) for when, call in self.at if when > self.now_s]
        for call in due:
            call()


class FakeWorker:
    """A process that ends by itself after `lives_s` with `status`, or when told to."""

    def __init__(self, clock: Clock, lives_s: float, status: int, *, stubborn: bool = False) -> None:
        self._clock = clock
        self._ends_s = clock.now_s + lives_s
        self._status = status
        self._stubborn = stubborn
        self.signals: list[str] = []
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None and self._clock.now_s >= self._ends_s:
            self.returncode = self._status
        return self.returncode

    def terminate(self) -> None:
        self.signals.append("TERM")
        if not self._stubborn:
            self.returncode = -signal.SIGTERM

    def kill(self) -> None:
        self.signals.append("KILL")
        self.returncode = -signal.SIGKILL

    def wait(self, timeout: float | None = None) -> int:
        if self.poll() is None:
            assert timeout is not None, "would wait for ever"
            self._clock.now_s += timeout
            if self.poll() is None:
                raise subprocess.TimeoutExpired([], timeout)
        assert self.returncode is not None
        return self.returncode


class Stage:
    """Runs the supervisor over rounds of workers, each a list of (seconds it lives, status)."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *rounds: list[tuple[float, int]], stubborn: bool = False
    ) -> None:
        self.clock = Clock()
        self.rounds = list(rounds)
        self.started_s: list[float] = []
        self.workers: list[list[FakeWorker]] = []
        self.stubborn = stubborn
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=self.clock.monotonic, sleep=self.clock.sleep))
        monkeypatch.setattr(module, "_start", self._start)

    def _start(self, settings: Settings, processes: int) -> list[FakeWorker]:
        self.started_s.append(self.clock.now_s)
        lives = self.rounds.pop(0) if len(self.rounds) > 1 else self.rounds[0]
        self.workers.append([FakeWorker(self.clock, *each, stubborn=self.stubborn) for each in lives])
        return self.workers[-1]

    def run(self) -> int:
        return supervise(Settings(), 1, self.clock.sleep)

    @property
    def waits_s(self) -> list[int]:
        """Whole seconds from one start to the next."""
        return [round(after - before) for before, after in pairwise(self.started_s)]


def test_workers_that_fail_are_started_ever_later_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    #   start  1 s  start  2 s  start   5 s   start   10 s   start   30 s   start  status 1
    stage = Stage(monkeypatch, [(0.0, 1)])
    assert stage.run() == 1
    assert stage.waits_s == [1, 2, 5, 10, 30]


def test_workers_that_were_well_for_a_minute_start_the_back_off_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    #   a minute and a second, then 1 s of waiting: not the 5 s that the third failure would have to wait
    stage = Stage(monkeypatch, [(0.0, 1)], [(0.0, 1)], [(61.0, 1)], [(0.0, 1)])
    assert stage.run() == 1
    assert stage.waits_s[:3] == [1, 2, 62]
    assert stage.waits_s[3:] == [1, 2, 5, 10, 30]


def test_workers_that_ran_for_just_less_than_a_minute_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [(59.0, 1)])
    assert stage.run() == 1
    assert len(stage.started_s) == 6


def test_a_worker_that_ends_well_by_itself_is_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream has no end: status 0 is no reason to leave it down."""
    stage = Stage(monkeypatch, [(5.0, 0)])
    assert stage.run() == 1
    assert len(stage.started_s) == 6


def test_a_superseded_worker_is_not_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [(3.0, SUPERSEDED_STATUS)])
    assert stage.run() == SUPERSEDED_STATUS == 3
    assert len(stage.started_s) == 1


def test_one_superseded_worker_among_others_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [(0.0, 1)], [(900.0, 1), (3.0, SUPERSEDED_STATUS), (900.0, 1)])
    assert stage.run() == SUPERSEDED_STATUS
    assert len(stage.started_s) == 2


def test_one_that_stops_takes_the_others_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [(900.0, 0), (2.0, 1)])
    assert stage.run() == 1
    for well, failed in stage.workers:
        assert (well.signals, failed.signals) == (["TERM"], [])


def test_a_worker_that_does_not_stop_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [(9_000.0, 0), (2.0, 1)], stubborn=True)
    assert stage.run() == 1
    assert stage.workers[0][0].signals == ["TERM", "KILL"]
    assert stage.waits_s[0] == 2 + 10 + 1  # It ran, was waited for, and the back-off.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_workers_and_the_supervisor(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    stage = Stage(monkeypatch, [(9_000.0, 0), (9_000.0, 0)])
    stage.clock.at = [(5.0, lambda: signal.raise_signal(number))]
    assert stage.run() == 0
    assert [worker.signals for worker in stage.workers[0]] == [["TERM"], ["TERM"]]
    assert stage.clock.now_s < 6


def test_a_signal_while_waiting_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, [(0.0, 1)])
    stage.clock.at = [(20.0, lambda: signal.raise_signal(signal.SIGTERM))]
    assert stage.run() == 0
    assert stage.clock.now_s < 21


def test_workers_get_the_settings_and_know_of_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes form one Bytewax cluster; there are at least as many lanes as processes."""
    started: list[tuple[list[str], dict[str, str]]] = []

    def popen(command: list[str], env: dict[str, str]) -> Any:
        started.append((command, env))
        return SimpleNamespace()

    monkeypatch.setattr(subprocess, "Popen", popen)
    settings = Settings(lanes=2, kafka="kafka:1234", kafka_options={"a": "b"})
    assert len(module._start(settings, 3)) == 3
    addresses = {command[command.index("-a") + 1] for command, _ in started}
    assert len(addresses) == 1
    assert len(set(addresses.pop().split(";"))) == 3
    assert [command[command.index("-i") + 1] for command, _ in started] == ["0", "1", "2"]
    for command, environment in started:
        assert command[:6] == [sys.executable, "-m", "bytewax.run", "streams.dataflow:flow", "-s", "1"]
        assert environment["HEADRACE_LANES"] == "3"
        assert environment["HEADRACE_KAFKA"] == "kafka:1234"
        assert environment["HEADRACE_KAFKA_OPTIONS"] == '{"a": "b"}'
        assert environment["PATH"] == os.environ["PATH"]
    started.clear()
    module._start(settings, 1)
    assert "-a" not in started[0][0]
    assert started[0][1]["HEADRACE_LANES"] == "2"


SCRIPT = """
import subprocess, sys
from config.settings import Settings
from streams import supervise

DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN);"

def start(settings, processes):
    workers = []
    for code in ("", DEAF):
        code = f"import signal, time; {code} print('up', flush=True); time.sleep(600)"
        workers.append(subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE))
    for worker in workers:
        worker.stdout.readline()
    print(*(worker.pid for worker in workers), flush=True)
    return workers

supervise._start = start
supervise._STOP_S = 0.2
sys.exit(supervise.supervise(Settings(), 2))
"""


def test_sigterm_ends_real_processes() -> None:
    """The supervisor answers with status 0 and leaves no worker behind, not even one that is deaf to SIGTERM."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        try:
            pids = [int(pid) for pid in supervisor.stdout.readline().split()]
            assert len(pids) == 2
            supervisor.send_signal(signal.SIGTERM)
            assert supervisor.wait(60) == 0
        finally:
            supervisor.kill()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
