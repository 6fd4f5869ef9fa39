"""Whether what the stream needs is there, for who starts its workers."""

from __future__ import annotations

from typing import Any

from confluent_kafka import KafkaException
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from config.brokers import PASSING, topics_there, unreachable
from config.settings import Settings, project_of
from store.connect import connect
from store.plans import newest_number

_KAFKA_TIMEOUT_S = 5.0


class Services:
    """Redis and Kafka, as the settings name them."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: Any = None

    def away(self) -> str:
        """What does not answer, and why; empty if all does. A refusal is an answer: the workers will say it."""
        try:
            self._redis().ping()
        except (RedisConnectionError, RedisTimeoutError, OSError) as error:
            self._made = None
            return "" if isinstance(error, AuthenticationError) else f"Redis: {type(error).__name__}: {error}"
        except RedisError:
            return ""
        try:
            topics_there(self._settings, _KAFKA_TIMEOUT_S)
        except KafkaException as error:
            return unreachable(self._settings, error) if error.args[0].code() in PASSING else ""
        return ""

    def newest_plan(self) -> int:
        """The number of the newest applied plan; -1 if Redis does not say."""
        try:
            return newest_number(self._redis(), project_of(self._settings.repo))
        except (RedisError, OSError):
            return -1

    def _redis(self) -> Any:
        if self._made is None:
            self._made = connect(self._settings.redis_url.get_secret_value(), self._settings.redis_timeout_s)
        return self._made
