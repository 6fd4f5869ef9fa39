"""The supervisor: workers that end are replaced by those that stand ready, unless that can't help."""

from __future__ import annotations

import json
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
import structlog

from config.settings import Settings
from streams import services
from streams import supervise as module
from streams.supervise import SUPERSEDED_STATUS, WAITING_STATUS, Crew, supervise
from tests.support.stack import wait_for

ROOT = Path(__file__).resolve().parent.parent


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


class FakeCrew:
    """Workers of which the first ends with `status` when it has worked for `lives_s`; they claim after `claims_s`."""

    def __init__(
        self, stage: Stage, lives_s: float = 9_000.0, status: int = 1, claims_s: float = 1.0, plan: int = 0
    ) -> None:
        self._stage, self._status, self._plan = stage, status, plan
        self._lives_s, self._claims_s = lives_s, claims_s
        self.workers = [SimpleNamespace(pid=1), SimpleNamespace(pid=2)]
        self.began_s = float("inf")
        self.said: list[str] = []

    def go(self, plan: int | None) -> None:
        self.told = plan
        self.began_s = self._stage.clock.now_s
        self._stage.began.append(self)

    def claimed(self) -> bool:
        return self._stage.clock.now_s >= self.began_s + self._claims_s

    @property
    def plan(self) -> int | None:
        return self._plan if self.claimed() else None

    @property
    def newest(self) -> int:
        return self._stage.newest

    def ended(self) -> list[int]:
        return [self._status] if self._stage.clock.now_s >= self.began_s + self._lives_s else []

    def terminate(self) -> None:
        self.said.append("terminate")

    def stop(self, patience_s: float) -> None:
        self.said.append(f"stop {patience_s:g}")


class Stage:
    """Runs the supervisor over crews, made as each of `lives` says in turn, the last one for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *lives: dict[str, Any]) -> None:
        self.clock = Clock()
        self._lives = list(lives)
        self.made: list[FakeCrew] = []
        self.began: list[FakeCrew] = []
        self.is_away: list[str] = []
        self.newest = 0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=self.clock.monotonic, sleep=self.clock.sleep))
        monkeypatch.setattr(module, "Crew", self._crew)
        monkeypatch.setattr(services, "away", lambda _: self.is_away.pop(0) if self.is_away else "")

    def _crew(self, settings: Settings, processes: int, work: str) -> FakeCrew:
        lives = self._lives.pop(0) if len(self._lives) > 1 else self._lives[0]
        self.made.append(FakeCrew(self, **lives))
        return self.made[-1]

    def run(self, until_s: float = 0.0) -> int:
        if until_s:
            self.clock.at.append((until_s, lambda: signal.raise_signal(signal.SIGTERM)))
        return supervise(Settings(), 1, sleep=self.clock.sleep)

    @property
    def waits_s(self) -> list[int]:
        """Whole seconds from one beginning to the next."""
        return [round(after.began_s - before.began_s) for before, after in pairwise(self.began)]


NEVER = {"lives_s": 0.0, "claims_s": 9_000.0}


def test_workers_that_never_begin_are_started_ever_later_and_then_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    #   start  1 s  start  2 s  start   5 s   start   10 s   start   30 s   start  status 1
    stage = Stage(monkeypatch, NEVER)
    assert stage.run() == 1
    assert stage.waits_s == [1, 2, 5, 10, 30]


def test_workers_that_were_well_for_a_minute_start_the_back_off_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are replaced at once, by those that stand ready."""
    stage = Stage(monkeypatch, NEVER, NEVER, {"lives_s": 61.0}, NEVER)
    assert stage.run() == 1
    assert stage.waits_s[:3] == [1, 2, 61]
    assert stage.waits_s[3:] == [1, 2, 5, 10, 30]


def test_workers_that_ran_for_just_less_than_a_minute_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, {"lives_s": 59.0})
    assert stage.run() == 1
    assert len(stage.began) == 6


def test_a_worker_that_ends_well_by_itself_is_a_failure_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream has no end: status 0 is no reason to leave it down."""
    stage = Stage(monkeypatch, {"lives_s": 5.0, "status": 0})
    assert stage.run() == 1
    assert len(stage.began) == 6


def test_killed_workers_are_replaced_at_once_however_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """What kills them is outside, and no fault of theirs; once, the stream gave up after the sixth."""
    stage = Stage(monkeypatch, {"lives_s": 3.0, "status": -9})
    assert stage.run(until_s=100.0) == 0
    assert set(stage.waits_s) == {3}
    assert len(stage.began) > 30


def test_workers_that_are_killed_before_they_begin_are_no_hot_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, {"lives_s": 0.0, "status": -9, "claims_s": 9_000.0})
    assert stage.run(until_s=100.0) == 0
    assert stage.waits_s[:2] == [1, 2]
    assert set(stage.waits_s[2:]) == {2}


def test_what_heals_by_itself_is_waited_for_however_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two minutes without Redis once ended the stream for good. It is said once a minute."""
    stage = Stage(monkeypatch, {"lives_s": 5.0, "status": WAITING_STATUS})
    stage.is_away = ["Redis: away"] * 300  # Asked every half second.
    with structlog.testing.capture_logs() as logs:
        assert stage.run(until_s=500.0) == 0
    assert sum(each["event"] == "stream_waits" for each in logs) == 3
    assert stage.began[1].began_s == pytest.approx(5 + 1 + 150, abs=0.2)
    assert len(stage.began) > 30  # And then it never gives up.


def test_a_superseded_worker_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, {"lives_s": 3.0, "status": SUPERSEDED_STATUS})
    assert stage.run() == SUPERSEDED_STATUS == 3
    assert len(stage.began) == 1


def test_those_who_stand_ready_are_started_once_the_others_have_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing takes the processor for seconds. They are told to go when they are needed."""
    stage = Stage(monkeypatch, {"claims_s": 8.0})
    made: list[int] = []
    stage.clock.at = [(at_s, lambda: made.append(len(stage.made))) for at_s in (7.0, 9.0)]
    assert stage.run(until_s=12.0) == 0
    assert made == [1, 2]
    assert [len(each.said) for each in stage.made] == [2, 2]
    assert stage.made[1].began_s == float("inf")


def test_a_newer_plan_is_taken_up_beside_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the old plan write until their shards are claimed; that they are is then no reason to stop."""
    stage = Stage(monkeypatch, {"lives_s": 22.0, "status": SUPERSEDED_STATUS}, {"plan": 1})
    stage.clock.at = [(20.0, lambda: setattr(stage, "newest", 1))]
    assert stage.run(until_s=40.0) == 0
    old, new = stage.began
    assert 20.0 <= new.began_s < 21.0
    assert old.said == ["stop 0"]
    assert new.said == ["terminate", "stop 10"]


def test_a_plan_that_can_not_be_taken_up_leaves_the_old_one_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that this machine does not have yet, say: it is tried again every minute."""
    stage = Stage(monkeypatch, {}, NEVER)
    stage.newest = 1
    with structlog.testing.capture_logs() as logs:
        assert stage.run(until_s=150.0) == 0
    assert [each["event"] for each in logs].count("plan_not_taken_up") == 3
    assert stage.began[0].said == ["terminate", "stop 10"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_workers_and_the_supervisor(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    stage = Stage(monkeypatch, {})
    stage.clock.at = [(8.0, lambda: signal.raise_signal(number))]
    assert stage.run() == 0
    assert [each.said for each in stage.made] == [["terminate", "stop 10"]] * 2
    assert stage.clock.now_s < 9


def test_a_signal_while_waiting_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(monkeypatch, NEVER)
    assert stage.run(until_s=20.0) == 0
    assert stage.clock.now_s < 21


TOLD = """
import json, os, signal, sys, time
deaf = {deaf}
if deaf:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
order = json.loads(sys.stdin.readline())
options = json.loads(os.environ["HEADRACE_KAFKA_OPTIONS"])
print(os.environ["HEADRACE_LANES"], options.get("a"), json.dumps(order), flush=True)
for _ in range(2):
    os.write(0, b'{"claimed": 7}\\n{"newest": 8}\\n')
time.sleep(600)
"""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Workers are scripts that print what they are told, and claim two lanes each; the last one is deaf to SIGTERM."""
    started: list[Any] = []
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        assert command == [sys.executable, "-m", "streams.worker"]
        script = TOLD.replace("{deaf}", str(len(started) == 2))
        started.append(popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    yield started
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_workers_get_the_settings_and_know_of_each_other(told: list[Any]) -> None:
    """Several form one cluster, with at least as many lanes; what they say is heard; all of them end."""
    crew = Crew(Settings(lanes=2, kafka_options={"a": "b"}), 3)
    assert not crew.claimed()
    crew.go(None)
    said = [process.stdout.readline().split(" ", 2) for process in told]
    assert {tuple(each[:2]) for each in said} == {("3", "b")}
    orders = [json.loads(each[2]) for each in said]
    assert [order["number"] for order in orders] == [0, 1, 2]
    addresses = {tuple(order["addresses"]) for order in orders}
    assert len(addresses) == 1
    assert len(set(addresses.pop())) == 3
    wait_for("all shards are claimed", crew.claimed)
    assert (crew.claimed(), crew.plan, crew.newest, crew.ended()) == (True, 7, 8, [])
    crew.terminate()
    crew.stop(0.5)
    assert [process.returncode for process in told] == [-signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL]


def test_one_process_forms_no_cluster(told: list[Any]) -> None:
    crew = Crew(Settings(lanes=2), 1)
    crew.go(4)
    assert '{"work": "stream", "plan": 4, "number": null, "addresses": null}' in told[0].stdout.readline()
    told[0].kill()
    told[0].wait()
    assert crew.ended() == [-signal.SIGKILL]
    crew.stop(0.0)


def test_a_worker_that_nobody_is_left_to_tell_ends() -> None:
    """Those who stand ready must not outlive a supervisor that was killed."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "streams.worker"]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, timeout=120, check=False)
    assert done.returncode == 0
