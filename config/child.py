"""Processes of ours that are told what to do, and say how it goes: JSON over a socket that is their standard input."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

METRICS_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The variable by which prometheus_client keeps values in files of this folder; set before it is first imported."""


SETTLING_S: Final = 5.0
"""After a start; then others are made that stand ready."""


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that holds every signal to stop that came."""
    stopping: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield stopping
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class Child:
    """A process that imports what it needs, and then waits to be told.

    Args:
        module: what to run.
        environment: its variables.
        pass_fds: files that it has open too, under the same numbers.
    """

    def __init__(self, module: str, environment: Mapping[str, str], pass_fds: Sequence[int] = ()) -> None:
        self._link, theirs = socket.socketpair()
        self._link.setblocking(False)
        self._heard = b""
        try:
            with theirs:
                command = [sys.executable, "-m", module]
                self.process = subprocess.Popen(command, env=environment, stdin=theirs.fileno(), pass_fds=pass_fds)
        except BaseException:
            self._link.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def status(self) -> int | None:
        """How it ended; below 0 by which signal; None while it runs."""
        return self.process.poll()

    def tell(self, order: Mapping[str, Any]) -> None:
        """Tells it something; one that has ended does not hear it."""
        with suppress(OSError):
            self._link.sendall(json.dumps(order).encode() + b"\n")

    def hear(self) -> list[dict[str, Any]]:
        """What it has said since it was last asked."""
        with suppress(OSError):
            while said := self._link.recv(4096):
                self._heard += said
        *lines, self._heard = self._heard.split(b"\n")
        return [json.loads(line) for line in lines]

    def terminate(self) -> None:
        """Has it end well."""
        if self.status is None:
            self.process.terminate()

    def stop(self, patience_s: float) -> int:
        """Kills it if it has not ended by then; returns its status."""
        try:
            self.process.wait(max(0.0, patience_s))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._link.close()
        return self.process.returncode


def listen() -> dict[str, Any] | None:
    """What this process is told next; None once nobody is left to tell it."""
    try:
        told = sys.stdin.readline()
    except OSError:
        told = ""
    order: dict[str, Any] | None = json.loads(told) if told else None
    return order


def say(**message: Any) -> None:
    """Says something to who tells this process what to do, if anybody is left."""
    with suppress(OSError):
        os.write(sys.stdin.fileno(), json.dumps(message).encode() + b"\n")
