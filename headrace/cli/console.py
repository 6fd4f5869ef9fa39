"""What commands share: where they print, settings and Redis as they are here, and what is logged and shown."""

from __future__ import annotations

import os
import re
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from collections.abc import Iterator

    from config.settings import Settings
    from training.run import Progress

_SECRET = ("HEADRACE_REDIS_URL", "HEADRACE_KAFKA_OPTIONS", "HEADRACE_ARCHIVE_OPTIONS")
"""Variables that hold passwords."""
# A table is cut to a terminal's width; who reads a file or a pipe wants all of it.
out = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, soft_wrap=True)


def audit(action: str, **what: Any) -> None:
    """A line in the log for whatever changes something."""
    import structlog

    structlog.get_logger().info("audit", action=action, uid=os.getuid(), **what)


def read_settings() -> Settings:
    """The settings, or an error that names the variable."""
    from pydantic import ValidationError
    from pydantic_settings import SettingsError

    from config.settings import Settings

    try:
        return Settings()
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if not first["loc"]:  # Settings that don't fit together, which its text names.
            message = f"{first['msg'].removeprefix('Value error, ')}; see the settings in README.md"
            raise ValueError(message) from error
        variable = f"HEADRACE_{str(first['loc'][0]).upper()}"
        shown = "" if variable in _SECRET else f"={os.environ.get(variable, '')!r}"
        message = f"{variable}{shown}: {first['msg']}; see the settings in README.md"
        raise ValueError(message) from error
    except SettingsError as error:
        field = re.search(r'field "(\w+)"', str(error))
        variable = f"HEADRACE_{field[1].upper()}" if field else "a setting"
        message = f"{variable} is no JSON, as a value of several parts must be: see the settings in README.md"
        raise ValueError(message) from error


def connect_redis(settings: Settings) -> Any:
    """A client of the Redis that the settings name."""
    from store.connect import connect

    return connect(settings.redis_url.get_secret_value(), settings.redis_timeout_s)


@contextmanager
def progress(settings: Settings) -> Iterator[Progress]:
    """Shows how far it is, and says it if Kafka can't be reached."""
    from confluent_kafka import KafkaException

    from config.brokers import unreachable
    from training.progress import shown

    with shown() as on_progress:
        try:
            yield on_progress
        except KafkaException as error:
            raise RuntimeError(unreachable(settings, error)) from None


def utc_ms(at: datetime | None) -> int | None:
    """A time without a zone as milliseconds since 1970: UTC, as all options are."""
    return None if at is None else int(at.replace(tzinfo=UTC).timestamp() * 1000)
