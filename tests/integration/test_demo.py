"""`headrace demo`, run as a person would: its output, its exit, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.stack import commands_of, project_copy, run_headrace, run_shell

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120


class Demo:
    """A running demonstration, whose files all go to a folder of its own."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self._out = folder / "out"
        self._err = folder / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "headrace", "demo", *arguments],
                cwd=ROOT,
                env=os.environ | {"TMPDIR": str(self.temporary)},
                stdout=out,
                stderr=err,
                start_new_session=True,  # A process group of its own, as a shell gives each command.
            )

    @property
    def lines(self) -> list[str]:
        """What it has printed."""
        return self._out.read_text().splitlines()

    @property
    def error(self) -> str:
        """What it has printed on standard error."""
        return self._err.read_text()

    def wait_for(self, what: str, condition: Callable[[], bool]) -> None:
        """Returns once the condition holds."""
        until = time.monotonic() + DEADLINE_S
        while not condition():
            assert self.process.poll() is None, f"ended before: {what}\n{self.lines}\n{self.error}"
            assert time.monotonic() < until, f"waited {DEADLINE_S} s: {what}\n{self.lines}\n{self.error}"
            time.sleep(0.05)

    def wait_until_shopping(self) -> None:
        """Returns once there are figures."""
        self.wait_for("figures", lambda: any("events/s" in line for line in self.lines))

    def children(self, command: str) -> list[int]:
        """The processes of this demonstration whose command line holds a word."""
        found = []
        for pid in self.descendants():
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if command.encode() in words:
                found.append(pid)
        return found

    def variables(self) -> dict[str, str]:
        """What it says to export for events and features of one's own."""
        (said,) = [line for line in self.lines if line.startswith("for events and features of your own")]
        return dict(re.findall(r"(HEADRACE_\w+)=(\S+)", said))

    def descendants(self) -> list[int]:
        """All processes of its session."""
        return [
            int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdigit() and _session(entry) == self.process.pid and int(entry.name) != self.process.pid
        ]

    def check_nothing_is_left(self) -> None:
        """No process and no file."""
        assert self.descendants() == []
        assert list(self.temporary.iterdir()) == []


def _session(process: Path) -> int | None:
    """The session of a process that runs."""
    try:
        words = (process / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if words[0] in "ZX" else int(words[3])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Demo]]:
    started: list[Demo] = []

    def start(*arguments: str) -> Demo:
        started.append(Demo(tmp_path, *arguments))
        return started[-1]

    yield start
    for demo in started:
        for pid in [demo.process.pid] if demo.process.poll() is None else []:
            os.kill(pid, signal.SIGKILL)
        demo.process.wait(DEADLINE_S)
        for pid in demo.descendants():
            os.kill(pid, signal.SIGKILL)


def test_it_runs_for_so_long_and_sums_up(start: Callable[..., Demo]) -> None:
    """Every event that was produced is committed, malformed ones are dead letters, and nothing is left behind."""
    demo = start("--seconds", "5", "--port", "0", "--rate", "400")
    demo.wait_for("the address", lambda: bool(demo.lines))
    assert re.search(r"http://127\.0\.0\.1:[1-9]\d+", demo.lines[0])
    assert demo.process.wait(DEADLINE_S) == 0, demo.error
    summary: dict[str, Any] = json.loads(demo.lines[-1])
    assert list(summary) == [
        *("events", "committed", "dead_letters", "requests", "freshness_ms_p50", "freshness_ms_p99"),
    ]
    assert summary["events"] >= 5 * 400 * 0.8
    assert summary["committed"] == summary["events"]
    assert 0 <= summary["dead_letters"] < 20
    assert summary["requests"] > 20
    assert 0 < summary["freshness_ms_p50"] <= summary["freshness_ms_p99"] < 5000
    figures = [line for line in demo.lines if "events/s" in line]
    assert 3 <= len(figures) <= 6
    assert re.search(r"hottest i\d+", figures[-1])
    demo.check_nothing_is_left()


def test_events_of_ones_own_can_be_tried_on_it(start: Callable[..., Demo], tmp_path: Path) -> None:
    """By the lines that it prints, in another shell: kafka-python can't ask the demo's broker for its versions."""
    demo = start("--port", "0")
    demo.wait_until_shopping()
    variables, (said,) = demo.variables(), [line for line in demo.lines if line.startswith("events: ")]
    event = {"user_id": "newcomer", "item_id": "i1", "category": "coats", "price": 30, "occurred_at": 1763719200000}
    (tmp_path / "events.jsonl").write_text(json.dumps(event))

    def headrace(command: str) -> str:
        environment = os.environ | variables | {"HEADRACE_REPO": str(ROOT), "PYTHONPATH": str(ROOT)}
        return run_headrace(command.split(), environment, tmp_path)

    assert "clicks" in headrace(said.rpartition("headrace ")[2])
    url = f"{demo.lines[0].split()[0]}/v1/entities/user/newcomer"
    assert "user_activity__search_clicks_24h" in headrace("show user newcomer")  # However long a value is.
    demo.wait_for("it counts", lambda: httpx.get(url).json()["features"]["user_activity__clicks_1h"] == 1)


def test_a_window_that_is_added_in_an_editor_is_served(start: Callable[..., Demo], tmp_path: Path) -> None:
    """The stranger's trial, as README has it, on a running demo: change the file, plan, apply, read the new feature."""
    demo = start("--port", "0")
    demo.wait_until_shopping()
    with project_copy(tmp_path) as folder:
        environment = os.environ | demo.variables() | {"PYTHONPATH": str(folder)}
        (trial,) = re.findall(r"^\$ sed .*?(?=^```)", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
        printed = ""
        for command in commands_of(trial):
            here = command.replace("8000", demo.variables()["HEADRACE_PORT"]).replace("/u1", "/u7")
            printed += run_shell(here, environment, folder)
    assert "adds feature user_activity.search_clicks_12h: complete at once" in printed
    assert re.search(r'search_clicks_12h":\d', printed)
    url = f"{demo.lines[0].split()[0]}/v1/entities/user/u7"
    assert "incomplete" not in httpx.get(url).json()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_nothing(start: Callable[..., Demo], number: signal.Signals) -> None:
    """A terminal sends SIGINT to the whole process group, children too."""
    demo = start()
    demo.wait_until_shopping()
    assert len(demo.descendants()) >= 4
    (os.killpg if number == signal.SIGINT else os.kill)(demo.process.pid, number)
    assert demo.process.wait(DEADLINE_S) == 0, demo.error
    assert demo.error == ""
    demo.check_nothing_is_left()


def test_ctrl_c_while_starting_leaves_nothing(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_for("apply", lambda: bool(demo.children("apply")))
    os.killpg(demo.process.pid, signal.SIGINT)
    assert demo.process.wait(DEADLINE_S) == 0, demo.error
    demo.check_nothing_is_left()


def test_a_child_that_dies_is_named_and_its_log_shown(start: Callable[..., Demo]) -> None:
    demo = start()
    demo.wait_until_shopping()
    [server] = demo.children("serve")
    os.kill(server, signal.SIGKILL)
    assert demo.process.wait(DEADLINE_S) == 1
    assert "`headrace serve` stopped with status -9; its log ends:" in demo.error
    assert "Uvicorn running on" in demo.error
    demo.check_nothing_is_left()


def test_a_port_that_is_taken_is_named(start: Callable[..., Demo]) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as somebody:
        port = somebody.getsockname()[1]
        demo = start("--port", str(port))
        assert demo.process.wait(DEADLINE_S) == 1
    assert f"port {port} on 127.0.0.1: Address already in use; take another, or --port 0" in demo.error
    demo.check_nothing_is_left()
