"""The server's process."""

from __future__ import annotations

import uvicorn

from registry.logs import set_up_logs
from registry.settings import Settings
from registry.store import load_plan
from serving.app import create_app


def run(settings: Settings) -> None:
    """Serves the applied plan until told to stop."""
    set_up_logs(as_json=settings.log_json)
    app = create_app(settings, load_plan(settings))
    uvicorn.run(
        app,
        host=settings.host,
        port=settings.port,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="info",
        timeout_graceful_shutdown=5,
    )
