"""Log lines on standard error: for people, or as JSON for machines."""

from __future__ import annotations

import logging
import sys

import structlog


def set_up_logs(*, as_json: bool) -> None:
    """Once a process."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer()
            if as_json
            else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        # Not kept: standard error may be another file by the time of the next line.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
