"""A server process: it imports everything, and waits to be told what to serve, and where: see `serving.run`.

Once it serves it says every second which plan it serves, and which is the newest that is applied.
"""

from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import Any, Final

import uvicorn
from redis.exceptions import RedisError

from config.child import METRICS_FOLDER, listen, say
from config.imports import keep_pandas_out
from config.logs import set_up_logs
from config.settings import Settings
from features.plan import Plan
from serving.app import create_app
from serving.feast import Others
from serving.protocol import Limits, limited
from store.plans import load_plan, watch_newest

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
    # Above HEADRACE_DEADLINE_S, so that whatever is in flight has its answer, and below `serving.run._STOP_S`.
    "timeout_graceful_shutdown": 7,
    # How often it says that it still runs.
    "timeout_notify": 1,
}


def config(settings: Settings, plan: Plan, others: Others | None = None, **options: Any) -> uvicorn.Config:
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
        create_app(settings, plan, others=others),
        http=limited(Limits.of(settings)),
        # Longer than load balancers and pools of clients keep idle connections: closed by us, one may be in use again.
        timeout_keep_alive=settings.idle_s,
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
        **_UVICORN,
        **options,
    )


class _Serving:
    """A plan, served on a socket that others may accept from too."""

    def __init__(self, settings: Settings, plan: Plan, listener: socket.socket, others: Others | None) -> None:
        self._settings, self._plan, self._listener = settings, plan, listener
        self._newest = plan.number
        self._leaves = Event()
        self._left_s: float | None = None
        self._server = uvicorn.Server(config(settings, plan, others, callback_notify=self._tick))

    def run(self) -> bool:
        """Serves until told to stop; returns whether it ever did."""
        watch_newest(self._settings, self._set_newest)
        Thread(target=self._obey, daemon=True).start()
        with suppress(KeyboardInterrupt):
            # uvicorn sends itself again, when all has been answered, the signal that ended it.
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            self._server.run(sockets=[self._listener])
        return self._server.started

    def _set_newest(self, number: int) -> None:
        self._newest = number

    def _obey(self) -> None:
        while order := listen():
            if order.get("leave"):
                self._leaves.set()
        # Without the parent nobody would stop or replace this process, and the port would stay taken.
        if METRICS_FOLDER in os.environ:
            shutil.rmtree(os.environ[METRICS_FOLDER], ignore_errors=True)
        os.kill(os.getpid(), signal.SIGTERM)

    async def _tick(self) -> None:
        """Once it serves, and then every second."""
        if gc.get_freeze_count() == 0:
            # What was made until now stays. Left to the collector, it would go through these 250,000 objects again and
            # again, for 0.1 s each time; without them a full collection takes no longer than a young one.
            gc.collect()
            gc.freeze()
            # As uvicorn says it where it opens the socket itself.
            scheme = "http" if self._settings.tls_certificate is None else "https"
            host, port = self._listener.getsockname()[:2]
            logging.getLogger("uvicorn.error").info("Uvicorn running on %s://%s:%d", scheme, host, port)
        say(serves=self._plan.number, newest=self._newest)
        if self._leaves.is_set():
            self._leave()

    def _leave(self) -> None:
        """Takes no more connections, and ends when those that there are have gone.

        Each is closed with its next answer, which says so. What is asked on one that is closed without a word would
        fail, so it is given as long as an idle one has anyway.
        """
        now_s = self._server.last_notified
        if self._left_s is None:
            self._left_s = now_s
            for server in self._server.servers:
                server.close()
            self._server.config.http_protocol_class.leaving = True  # type: ignore[attr-defined]  # it is `limited`
        if not self._server.server_state.connections or now_s - self._left_s > self._settings.idle_s:
            self._server.should_exit = True


def main(others: Callable[[Settings], Others] | None = None) -> None:
    """Serves once told what, until stopped; what keeps it from that is said to who told it.

    `others` makes what answers Feast's call beyond the plan: see `serving.app.create_app`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Until it serves, a Ctrl-C is for the parent alone to obey.
    keep_pandas_out()
    settings = Settings()
    set_up_logs(as_json=settings.log_json)
    order = listen()
    if order is None:
        return
    try:
        plan = load_plan(settings, number=order["plan"])
        listener = socket.socket(fileno=order["listener"])
        serving = _Serving(settings, plan, listener, others(settings) if others else None)
    except (ValueError, LookupError, OSError, RuntimeError, RedisError) as error:  # What a user can mend.
        say(error=str(error))
        sys.exit(1)
    sys.exit(0 if serving.run() else 1)


if __name__ == "__main__":
    main()
