"""The server's processes: one, or several that share a port.

Each of several has a listening socket of its own, over which the kernel spreads connections (SO_REUSEPORT). Of
processes that accept from one common socket, as uvicorn's workers do, often one took all of 16 connections that came
at once, and the other stood idle.
"""

from __future__ import annotations

import gc
import ipaddress
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import ssl
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import Any, Final

import structlog
import uvicorn
from prometheus_client.multiprocess import mark_process_dead

from config.imports import keep_pandas_out
from config.logs import set_up_logs
from config.settings import Settings
from features.plan import Plan
from serving.app import create_app
from serving.metrics import SHARED_FOLDER
from serving.protocol import Limits, limited
from store.plans import load_plan

_UVICORN: Final[dict[str, Any]] = {
    "loop": "uvloop",
    "ws": "none",
    "lifespan": "on",
    "access_log": False,
    "log_level": "info",
    # Nobody here asks who the client is.
    "proxy_headers": False,
    "server_header": False,
    "backlog": 2048,
    # Above HEADRACE_DEADLINE_S, so that whatever is in flight has its answer, and below `_STOP_S`.
    "timeout_graceful_shutdown": 7,
    # How often it says that it still runs.
    "timeout_notify": 1,
}
_AGAIN_S = 1.0
_LOOK_S = 0.2
_STOP_S = 10.0
_SPAWN: Final = multiprocessing.get_context("spawn")

log = structlog.get_logger()


def run(settings: Settings) -> int:
    """Serves the applied plan until told to stop; returns the exit status.

    Raises:
        NotAppliedPlanError: if nothing was applied.
        OSError: if the port can't be had.
        ValueError: if everybody could read what was not said to be for everybody.
    """
    keep_pandas_out()
    set_up_logs(as_json=settings.log_json)
    _check_open(settings)
    plan = load_plan(settings)
    with _reserve(settings.host, settings.port) as reserved:
        host, port = reserved.getsockname()[:2]
        log.info("server_starts", host=host, port=port, processes=settings.server_processes)
        if settings.server_processes == 1:
            return _serve(settings, plan, reserved)
        # It was bound without these, so nobody else has the port; with them, our processes can have it too. It does
        # not listen: it gets no connections, and holds the port while processes are replaced.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with tempfile.TemporaryDirectory(prefix="headrace-metrics-") as folder:
            os.environ[SHARED_FOLDER] = folder
            return _supervise(settings.model_copy(update={"host": host, "port": port}), plan)


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


def config(settings: Settings, plan: Plan, **options: Any) -> uvicorn.Config:
    """How uvicorn serves the plan; `options` are more of uvicorn's."""
    if settings.tls_certificate is not None:
        # For an error that names the files; uvicorn's own would not.
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key)
        except OSError as error:
            files = ", ".join(str(path) for path in (settings.tls_certificate, settings.tls_key) if path is not None)
            message = f"HEADRACE_TLS_CERTIFICATE and HEADRACE_TLS_KEY can't be used: {files}: {error}"
            raise ValueError(message) from error
    return uvicorn.Config(
        create_app(settings, plan),
        http=limited(Limits.of(settings)),
        # Longer than load balancers and pools of clients keep idle connections: closed by us, one may be in use again.
        timeout_keep_alive=settings.idle_s,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        **_UVICORN,
        **options,
    )


def _reserve(host: str, port: int) -> socket.socket:
    """A socket bound to the port, which nobody else has."""
    made = _socket(host)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # Connections of an earlier server may linger.
        made.bind((host, port))
    except OSError as error:
        made.close()
        message = f"{host}:{port}: {error.strerror}; --host and --port, or HEADRACE_HOST and HEADRACE_PORT, say where"
        raise OSError(message) from error
    return made


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)


def _serve(settings: Settings, plan: Plan, listener: socket.socket, on_tick: Callable[[], None] = lambda: None) -> int:
    """Serves in this process; returns the exit status. Calls `on_tick` once it serves, and then every second."""

    async def tick() -> None:
        if gc.get_freeze_count() == 0:
            # What was made until now stays. Left to the collector, it would go through these 250,000 objects again and
            # again, for 0.1 s each time; without them a full collection takes no longer than a young one.
            gc.collect()
            gc.freeze()
            # As uvicorn says it where it opens the socket itself.
            scheme = "http" if settings.tls_certificate is None else "https"
            host, port = listener.getsockname()[:2]
            logging.getLogger("uvicorn.error").info("Uvicorn running on %s://%s:%d", scheme, host, port)
        on_tick()

    server = uvicorn.Server(config(settings, plan, callback_notify=tick))
    with suppress(KeyboardInterrupt):
        # uvicorn sends itself again, when all has been answered, the signal that ended it.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        server.run(sockets=[listener])
    return 0 if server.started else 1


def _supervise(settings: Settings, plan: Plan) -> int:
    """Keeps the processes running until told to stop; returns the exit status.

    All run the same plan, whatever is applied while they run: a process that takes another's place gets it from here.
    """
    stopping: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stopping.append(number)

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    workers: list[_Worker] = []
    have_served = False
    try:
        workers += [_Worker(settings, plan) for _ in range(settings.server_processes)]
        while not stopping:
            ended = wait([worker.process.sentinel for worker in workers], timeout=_LOOK_S)
            have_served = have_served or any(worker.ticks.value for worker in workers)
            for at, worker in enumerate(workers):
                if stopping or not (worker.process.sentinel in ended or worker.hangs(settings.hang_s)):
                    continue
                worker.process.join()  # The kernel says that it ends a little before it has ended.
                if not have_served:
                    log.critical("server_gives_up", status=worker.process.exitcode, remedy="see the error above")
                    return 1
                mark_process_dead(worker.process.pid)  # type: ignore[no-untyped-call]  # it has no types
                status = worker.process.exitcode
                log.error("server_process_ended", pid=worker.process.pid, status=status, again_in_s=_AGAIN_S)
                time.sleep(_AGAIN_S)
                workers[at] = _Worker(settings, plan)
        return 0
    finally:
        _stop([worker.process for worker in workers])


class _Worker:
    """One of several processes, and what is seen of it: it counts its seconds once it serves."""

    def __init__(self, settings: Settings, plan: Plan) -> None:
        self.ticks: Any = _SPAWN.Value("Q", lock=False)
        self.process = _SPAWN.Process(target=_work, args=(settings, plan, self.ticks))
        # Until it serves, a Ctrl-C is for us alone to obey: it would die of it with a stack trace.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        signal.signal(signal.SIGINT, before)
        self._seen, self._looks = 0, 0

    def hangs(self, hang_s: float) -> bool:
        """Whether it had to be killed, as it served, and then counted nothing for so long.

        In looks, not by a clock: who was stopped itself, with all of its processes, has not looked meanwhile.
        """
        ticks = self.ticks.value
        self._seen, self._looks = ticks, 0 if ticks != self._seen else self._looks + 1
        if not ticks or self._looks * _LOOK_S < hang_s:
            return False
        log.error("server_process_hangs", pid=self.process.pid, silent_s=hang_s)
        self.process.kill()
        return True


def _work(settings: Settings, plan: Plan, ticks: Any) -> None:
    """What each of several processes does."""
    keep_pandas_out()
    set_up_logs(as_json=settings.log_json)
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def tick() -> None:
        ticks.value += 1

    with _socket(settings.host) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((settings.host, settings.port))
        sys.exit(_serve(settings, plan, listener, tick))


def _end_with_parent() -> None:
    """Without the parent nobody would stop or replace this process, and the port would stay taken."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(os.environ[SHARED_FOLDER], ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)


def _stop(workers: list[SpawnProcess]) -> None:
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + _STOP_S
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join()
