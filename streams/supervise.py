"""Keeps the dataflow's workers running, with others that stand ready: for when one dies, and when a plan is applied.

All workers are one dataflow, so that the end of one is the end of all; those that stand ready have everything imported
and take their places at once. Those of a newer plan begin beside the old ones, which write until theirs are claimed.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Literal

import structlog

from config.child import SETTLING_S, Child, signals
from config.settings import Settings
from streams.metrics import metrics_served

SUPERSEDED_STATUS = 3
"""The exit status of a worker whose shards another one has claimed: it must not be started again."""
WAITING_STATUS = 75
"""The exit status of a worker that could not go on because of what heals by itself (EX_TEMPFAIL)."""
_BACKOFF_S = (1, 2, 5, 10, 30)
_STEADY_S = 60.0
"""Workers that ran this long were well: the next failure starts the back-off anew."""
_STOP_S = 10.0
_LOOK_S = 0.05
_SAID_S = 60.0
"""What is waited for is said so often."""

log = structlog.get_logger()

Work = Literal["stream", "archive"]
"""Which dataflow."""


def supervise(
    settings: Settings, processes: int, work: Work = "stream", sleep: Callable[[float], None] = time.sleep
) -> int:
    """Runs the workers of a dataflow until told to stop; returns the exit status.

    Workers that end are replaced: at once if they were killed or had been well, else ever later, and after the last of
    the back-off no more; but for what heals by itself, such as a Redis that is away, it waits however long. Those whose
    shards another stream has claimed are not replaced: the two would only take them from each other for ever.
    """
    port = settings.stream_metrics_port if work == "stream" else settings.archive_metrics_port
    with signals() as stopping, metrics_served(settings.host, port) as ended:
        return _Supervisor(settings, processes, work, stopping, ended, sleep).run()


class _Supervisor:
    """Who works, who stands ready, and who is about to take over for a newer plan."""

    def __init__(
        self,
        settings: Settings,
        processes: int,
        work: Work,
        stopping: list[int],
        ended: Callable[[int], None],
        sleep: Callable[[float], None],
    ) -> None:
        self._settings, self._processes, self._work = settings, processes, work
        self._stopping, self._ended, self._sleep = stopping, ended, sleep
        self._ready: Crew | None = None
        self._working: Crew | None = None
        self._successor: Crew | None = None
        self._began_s = time.monotonic()
        self._failures = 0
        self._plan: int | None = None
        self._untaken = -1
        self._take_up_again_s = 0.0

    def run(self) -> int:
        """See `supervise`."""
        try:
            while not self._stopping:
                status = self._step()
                if status is not None:
                    return status
            return 0
        finally:
            self._stop_all()

    def _step(self) -> int | None:
        """Does what there is to do, or waits for it; returns the exit status if that is the end."""
        working = self._working
        if working is None:
            return self._begin()
        if statuses := working.ended():
            return self._replace(working, statuses)
        self._look(working)
        self._sleep(_LOOK_S)
        return None

    def _begin(self) -> int | None:
        """Sets workers to work, once what they need is there."""
        if self._failures:  # To find out takes as long as to begin.
            self._wait_for_services()
        if self._stopping:
            return None
        try:
            self._working = self._take_ready(self._plan)
        except OSError as error:
            log.error("workers_not_started", error=str(error))  # noqa: TRY400  # all that matters is in its text
            return self._again([1], claimed=False, lived_s=0.0)
        return None

    def _wait_for_services(self) -> None:
        """Returns once Redis and Kafka answer; says what it waits for once a minute."""
        from streams.services import away

        said_s = -_SAID_S
        while not self._stopping and (reason := away(self._settings)):
            if time.monotonic() - said_s >= _SAID_S:
                said_s = time.monotonic()
                log.warning(self._event("waits"), reason=reason)
            self._sleep(0.5)

    def _replace(self, working: Crew, statuses: list[int]) -> int | None:
        """Goes on without workers of which some have ended."""
        claimed = working.claimed()
        # Of a newer plan it is not known whether it can be run here.
        self._plan = working.plan if claimed else None
        self._end(working)
        self._working, self._successor = self._successor, None
        if self._working is not None:
            return None  # It has claimed their shards, or is about to.
        if SUPERSEDED_STATUS in statuses:
            log.critical(
                self._event("superseded"),
                reason="another one has claimed what this one writes; this one stops",
            )
            return SUPERSEDED_STATUS
        return self._again(statuses, claimed=claimed, lived_s=time.monotonic() - working.began_s)

    def _look(self, working: Crew) -> None:
        """Sees to it that others stand ready, and that the newest plan is taken up."""
        if self._successor is not None:
            if failed := self._successor.ended():
                self._end(self._successor)
                self._successor, self._untaken = None, working.newest
                self._take_up_again_s = time.monotonic() + _SAID_S
                remedy = "see the errors above; what is applied before goes on"
                log.error("plan_not_taken_up", statuses=failed, again_in_s=_SAID_S, remedy=remedy)
        elif self._ready is None and self._settings.standby:
            # Not while everything begins: it would take the processor from those that do.
            settled = time.monotonic() - self._began_s > SETTLING_S
            self._ready = self._crew() if settled and working.claimed() else None
        elif self._is_newer(working):
            log.info("plan_taken_up", beside=working.plan)
            self._successor = self._take_ready(None)

    def _is_newer(self, working: Crew) -> bool:
        """Whether a newer plan is applied than the one that runs, and not just found to be none for here."""
        if working.plan is None or working.newest <= working.plan:
            return False
        return working.newest != self._untaken or time.monotonic() >= self._take_up_again_s

    def _take_ready(self, plan: int | None) -> Crew:
        """Sets those to work who stand ready, for a plan, or for the newest."""
        ready, self._ready = self._ready, None
        if ready is not None and ready.ended():
            self._end(ready)
            ready = None
        crew = ready or self._crew()
        crew.go(plan)
        return crew

    def _crew(self) -> Crew:
        return Crew(self._settings, self._processes, self._work)

    def _again(self, statuses: list[int], *, claimed: bool, lived_s: float) -> int | None:
        """Waits until the workers are to be started again; returns the exit status if they are not to be."""
        killed = any(status < 0 for status in statuses)
        if (killed and claimed) or lived_s > _STEADY_S:
            self._failures = 0
            log.error("workers_stopped", statuses=statuses, again_in_s=0)
            return None
        heals = killed or WAITING_STATUS in statuses
        self._failures += 1
        if self._failures > len(_BACKOFF_S) and not heals:
            log.critical(
                self._event("gives_up"),
                failures=self._failures,
                statuses=statuses,
                remedy="see the errors above, and `headrace doctor`",
            )
            return 1
        # Where it heals by itself, `_begin` has waited for it.
        wait_s = _BACKOFF_S[min(self._failures, 2 if heals else len(_BACKOFF_S)) - 1]
        log.error("workers_stopped", statuses=statuses, again_in_s=wait_s)
        until_s = time.monotonic() + wait_s
        while not self._stopping and time.monotonic() < until_s:
            self._sleep(0.1)
        return None

    def _event(self, what: str) -> str:
        """What happened, as logs have it: `stream_waits`, `archive_waits`."""
        return f"{self._work}_{what}"

    def _end(self, crew: Crew) -> None:
        crew.stop(0.0)
        for worker in crew.workers:
            self._ended(worker.pid)

    def _stop_all(self) -> None:
        crews = [crew for crew in (self._successor, self._ready, self._working) if crew is not None]
        for crew in crews:
            crew.terminate()
        for crew in crews:
            crew.stop(_STOP_S)


class Crew:
    """Worker processes that are one dataflow. They import all that they need, and then wait to be told to go.

    Attributes:
        workers: the processes.
        began_s: when they were told, on the monotonic clock.
        plan: the number of the plan that they run, once one of them has claimed shards for it.
        newest: the number of the newest plan that is applied, as far as they know.
    """

    def __init__(self, settings: Settings, processes: int, work: Work = "stream") -> None:
        self._work = work
        self._lanes = max(settings.lanes, processes)
        environment = os.environ | settings.model_copy(update={"lanes": self._lanes}).environment()
        self.workers: list[Child] = []
        self._n_claimed = 0
        self.plan: int | None = None
        self.newest = -1
        self.began_s = time.monotonic()
        try:
            for _ in range(processes):
                self.workers.append(Child("streams.worker", environment))  # one may fail
        except BaseException:
            self.stop(0.0)
            raise

    def go(self, plan: int | None) -> None:
        """Tells them to run a plan, by its number; None for the newest."""
        self.began_s = time.monotonic()
        n = len(self.workers)
        addresses = [f"127.0.0.1:{port}" for port in _free_ports(n)] if n > 1 else None
        for number, worker in enumerate(self.workers):
            order = {"plan": plan, "number": number if addresses else None, "addresses": addresses}
            worker.tell({"work": self._work, **order})

    def claimed(self) -> bool:
        """Whether they have claimed all shards: they say so for each lane."""
        for said in (said for worker in self.workers for said in worker.hear()):
            self.newest = max(self.newest, said.get("newest", -1))
            if "claimed" in said:
                self._n_claimed += 1
                # Another may be applied while they start.
                self.plan = min(said["claimed"], self.plan if self.plan is not None else said["claimed"])
        return self._n_claimed >= self._lanes

    def ended(self) -> list[int]:
        """The statuses of those that have ended; none while all run."""
        self.claimed()
        return [worker.status for worker in self.workers if worker.status is not None]

    def terminate(self) -> None:
        """Has them commit what they have read, and end."""
        for worker in self.workers:
            worker.terminate()

    def stop(self, patience_s: float) -> None:
        """Kills those that have not ended by then: all that matters is in Redis."""
        deadline_s = time.monotonic() + patience_s
        for worker in self.workers:
            worker.stop(deadline_s - time.monotonic())


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
