"""Keeps the dataflow's workers running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType

import structlog

from config.settings import Settings
from streams.metrics import metrics_served

SUPERSEDED_STATUS = 3
"""The exit status of a worker whose shards another one has claimed: it must not be started again."""
_BACKOFF_S = (1, 2, 5, 10, 30)
_STEADY_S = 60.0
"""Workers that ran this long were well: the next failure starts the back-off anew."""
_STOP_S = 10.0

log = structlog.get_logger()


def supervise(settings: Settings, processes: int, sleep: Callable[[float], None] = time.sleep) -> int:
    """Runs the workers until told to stop; returns the exit status.

    One that stops takes the others with it, and all are started again, ever later; after the last of the back-off it
    gives up. Workers whose shards another stream has claimed are not started again: the two would only take them from
    each other for ever.
    """
    stopping: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    with metrics_served(settings.host, settings.stream_metrics_port) as ended:
        return _run(settings, processes, stopping, ended, sleep)


def _run(
    settings: Settings,
    processes: int,
    stopping: list[int],
    ended: Callable[[subprocess.Popen[bytes]], None],
    sleep: Callable[[float], None],
) -> int:
    failures = 0
    while True:
        began = time.monotonic()
        statuses: list[int] = []
        try:
            workers = _start(settings, processes)
        except OSError as error:
            log.error("workers_not_started", error=str(error))  # noqa: TRY400  # all that matters is in its text
        else:
            while not stopping and all(worker.poll() is None for worker in workers):
                sleep(0.1)
            statuses = _stop(workers)
            for worker in workers:
                ended(worker)
        if stopping:
            return 0
        if SUPERSEDED_STATUS in statuses:
            log.critical("stream_superseded", reason="another stream has claimed these shards; this one stops")
            return SUPERSEDED_STATUS
        failures = 0 if time.monotonic() - began > _STEADY_S else failures + 1
        if failures > len(_BACKOFF_S):
            log.critical(
                "stream_gives_up",
                failures=failures,
                statuses=statuses,
                remedy="see the errors above, and `headrace doctor`",
            )
            return 1
        wait_s = _BACKOFF_S[max(failures - 1, 0)]
        log.error("workers_stopped", statuses=statuses, again_in_s=wait_s)
        until = time.monotonic() + wait_s
        while not stopping and time.monotonic() < until:
            sleep(0.1)
        if stopping:
            return 0


def _start(settings: Settings, processes: int) -> list[subprocess.Popen[bytes]]:
    lanes = max(settings.lanes, processes)
    environment = os.environ | settings.model_copy(update={"lanes": lanes}).environment()
    addresses = ";".join(f"127.0.0.1:{port}" for port in _free_ports(processes))
    command = [sys.executable, "-m", "bytewax.run", "streams.dataflow:flow", "-s", "1"]
    cluster = [["-i", str(number), "-a", addresses] if processes > 1 else [] for number in range(processes)]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for more in cluster:
            started.append(subprocess.Popen([*command, *more], env=environment))  # noqa: PERF401  # one may fail
    except BaseException:
        _stop(started)
        raise
    return started


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _stop(workers: list[subprocess.Popen[bytes]]) -> list[int]:
    """Stops what still runs, and returns what each ended with by itself or by us."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    deadline = time.monotonic() + _STOP_S
    for worker in workers:
        try:
            worker.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
    return [worker.returncode for worker in workers]
