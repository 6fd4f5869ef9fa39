"""The server's processes: those that serve, and one that stands ready, for when one dies or another plan is applied.

Each of several has a listening socket of its own, over which the kernel spreads connections (SO_REUSEPORT). Of
processes that accept from one common socket, as uvicorn's workers do, often one took all of 16 connections that came
at once, and the other stood idle. The sockets are the parent's: who takes another's place takes its socket, with the
connections that wait there, so that none is refused or lost.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack

import structlog
from prometheus_client.multiprocess import mark_process_dead

from config.child import METRICS_FOLDER, SETTLING_S, Child, signals
from config.logs import set_up_logs
from config.settings import Settings

_AGAIN_S = 1.0
_LOOK_S = 0.1
_STOP_S = 10.0
_UNTAKEN_AGAIN_S = 60.0

log = structlog.get_logger()


def run(settings: Settings, module: str = "serving.worker") -> int:
    """Serves the newest applied plan until told to stop, by processes of a module; returns the exit status.

    Raises:
        RuntimeError: if it can't be served, or nothing was applied.
        OSError: if the port can't be had.
        ValueError: if everybody could read what was not said to be for everybody.
    """
    set_up_logs(as_json=settings.log_json)
    _check_open(settings)
    with ExitStack() as stack:
        listeners = _listeners(stack, settings.host, settings.port, settings.server_processes)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="headrace-metrics-"))
        supervisor = _Supervisor(settings, listeners, folder, stack.enter_context(signals()), module)
        try:
            return supervisor.run()
        finally:
            supervisor.stop()


def _check_open(settings: Settings) -> None:
    """Strangers come in by an address that they can reach; that this is meant must be said."""
    if settings.api_keys_file is not None or settings.open_to_all or settings.host == "localhost":
        return
    try:
        is_own = ipaddress.ip_address(settings.host).is_loopback
    except ValueError:
        is_own = False
    if not is_own:
        message = (
            f"HEADRACE_HOST={settings.host} can be reached by others, who need no key: make keys with `headrace keys`, "
            "name their file in HEADRACE_API_KEYS_FILE, or say HEADRACE_OPEN_TO_ALL=true"
        )
        raise ValueError(message)


def _listeners(stack: ExitStack, host: str, port: int, count: int) -> list[socket.socket]:
    """Sockets bound to one port, which nobody else has; none listens before a process does that serves."""
    made = [
        stack.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) for _ in range(count)
    ]
    try:
        made[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # Connections of an earlier server may linger.
        made[0].bind((host, port))
    except OSError as error:
        message = f"{host}:{port}: {error.strerror}; --host and --port, or HEADRACE_HOST and HEADRACE_PORT, say where"
        raise OSError(message) from error
    if count > 1:
        # It was bound without these, so nobody else has the port; with them, our others can have it too.
        made[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        made[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    for other in made[1:]:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind((host, made[0].getsockname()[1]))
    return made


class _Process:
    """A process that serves, or stands ready to, and what is heard of it: it says every second that it serves.

    Attributes:
        told: the plan that it was told to serve; None for the newest.
        plan: the one that it serves; None before it does.
        newest: the newest that is applied, as far as it knows.
        error: what kept it from serving.
    """

    def __init__(self, settings: Settings, listeners: Sequence[socket.socket], folder: str, module: str) -> None:
        environment = os.environ | settings.environment() | {METRICS_FOLDER: folder}
        self.child = Child(module, environment, [each.fileno() for each in listeners])
        self.told: int | None = None
        self.plan: int | None = None
        self.newest = -1
        self.error = ""
        self._silent_looks = 0

    def serve(self, listener: socket.socket, plan: int | None) -> None:
        """Tells it to serve a plan, or the newest."""
        self.told = plan
        self.child.tell({"plan": plan, "listener": listener.fileno()})

    def look(self, hang_s: float) -> bool:
        """Takes in what it says; returns whether it has ended, or had to be killed, as it said nothing for so long.

        In looks, not by a clock: who was stopped itself, with all of its processes, has not looked meanwhile.
        """
        self._silent_looks += 1
        for said in self.child.hear():
            self._silent_looks = 0
            self.error = said.get("error", self.error)
            self.plan = said.get("serves", self.plan)
            self.newest = said.get("newest", self.newest)
        if self.child.status is not None:
            return True
        if self.plan is None or self._silent_looks * _LOOK_S < hang_s:
            return False
        log.error("server_process_hangs", pid=self.child.pid, silent_s=hang_s)
        self.child.stop(0.0)
        return True


class _Supervisor:
    """A process for each socket, one that stands ready, one that is about to take another's place, those that leave."""

    def __init__(
        self,
        settings: Settings,
        listeners: Sequence[socket.socket],
        folder: str,
        stopping: list[int],
        module: str,
    ) -> None:
        host, port = listeners[0].getsockname()[:2]
        self._settings = settings.model_copy(update={"host": host, "port": port})
        self._listeners, self._folder, self._stopping, self._module = listeners, folder, stopping, module
        self._serving: list[_Process] = []
        self._ready: _Process | None = None
        self._successor: tuple[int, _Process] | None = None
        self._leaving: list[tuple[float, _Process]] = []
        self._began_s = time.monotonic()
        self._untaken = -1
        self._take_up_again_s = 0.0

    def run(self) -> int:
        """Returns the exit status once told to stop, or if none ever served."""
        for listener in self._listeners:
            self._serving.append(self._take_ready())
            self._serving[-1].serve(listener, None)
        have_served = False
        while not self._stopping:
            ended = [at for at, each in enumerate(self._serving) if each.look(self._settings.hang_s)]
            if not have_served and any(each.plan is not None for each in self._serving):
                have_served, settings = True, self._settings
                log.info("server_starts", host=settings.host, port=settings.port, processes=len(self._serving))
            for at in ended:
                if not have_served and not self._stopping:
                    if self._serving[at].error:
                        raise RuntimeError(self._serving[at].error)
                    log.critical("server_gives_up", status=self._serving[at].child.status, remedy="see the error above")
                    return 1
                self._replace(at)
            self._see_off()
            self._take_up()
            time.sleep(_LOOK_S)
        return 0

    def stop(self) -> None:
        """Ends all processes: those that serve answer first what they were asked."""
        others = [self._ready, self._successor and self._successor[1], *(each for _, each in self._leaving)]
        every = [*self._serving, *(each for each in others if each is not None)]
        for each in every:
            each.child.terminate()
        deadline_s = time.monotonic() + _STOP_S
        for each in every:
            each.child.stop(deadline_s - time.monotonic())

    def _take_ready(self) -> _Process:
        ready, self._ready = self._ready, None
        if ready is not None and ready.child.status is None:
            return ready
        return _Process(self._settings, self._listeners, self._folder, self._module)

    def _forget(self, process: _Process) -> int:
        """Leaves what a process that has ended counted; returns how it ended."""
        mark_process_dead(process.child.pid, self._folder)  # type: ignore[no-untyped-call]  # it has no types
        return process.child.stop(0.0)

    def _replace(self, at: int) -> None:
        """Gives the socket of a process that has ended to another."""
        ended = self._serving[at]
        served, status = ended.plan is not None, self._forget(ended)
        again_s = 0.0 if served else _AGAIN_S
        log.error("server_process_ended", pid=ended.child.pid, status=status, error=ended.error, again_in_s=again_s)
        time.sleep(again_s)
        plan = ended.plan
        if not served and ended.told is None:
            # Of the newest plan it is not known whether it can be served here; what others serve can.
            plan = next((each.plan for each in self._serving if each.plan is not None), None)
        self._serving[at] = self._take_ready()
        self._serving[at].serve(self._listeners[at], plan)

    def _take_up(self) -> None:
        """Has one stand ready, and processes of the newest plan take the places of others, one after the other."""
        if self._successor is not None:
            at, successor = self._successor
            if successor.look(self._settings.hang_s):
                self._successor, self._untaken = None, successor.told or 0
                self._take_up_again_s = time.monotonic() + _UNTAKEN_AGAIN_S
                log.error(
                    "plan_not_taken_up",
                    status=self._forget(successor),
                    error=successor.error,
                    again_in_s=_UNTAKEN_AGAIN_S,
                )
            elif successor.plan is not None:
                log.info("plan_taken_up", number=successor.plan, before=self._serving[at].plan)
                self._serving[at].child.tell({"leave": True})
                until_s = time.monotonic() + self._settings.idle_s + _STOP_S
                self._leaving.append((until_s, self._serving[at]))
                self._serving[at], self._successor = successor, None
            return
        settled = time.monotonic() - self._began_s > SETTLING_S
        if not settled or any(each.plan is None for each in self._serving):
            return  # What stands ready would take the processor from those that start.
        if self._ready is None and self._settings.standby:
            self._ready = _Process(self._settings, self._listeners, self._folder, self._module)
        else:
            plans, newest = [each.plan or 0 for each in self._serving], max(each.newest for each in self._serving)
            if newest == self._untaken and time.monotonic() < self._take_up_again_s:
                newest = max(plans)  # At least that one can be served here.
            if min(plans) < newest:
                at = plans.index(min(plans))
                self._successor = at, self._take_ready()
                self._successor[1].serve(self._listeners[at], newest)

    def _see_off(self) -> None:
        """Forgets those that have left, and ends those that take too long."""
        for until_s, each in self._leaving.copy():
            if each.look(self._settings.hang_s) or time.monotonic() > until_s:
                self._leaving.remove((until_s, each))
                each.child.terminate()
                self._forget(each)
