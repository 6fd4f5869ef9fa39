"""Whether what the stream needs is there, for who starts its workers."""

from __future__ import annotations

from confluent_kafka import KafkaException
from redis.exceptions import AuthenticationError, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from config.brokers import PASSING, topics_there, unreachable
from config.settings import Settings
from store.connect import connect

_KAFKA_TIMEOUT_S = 5.0


def away(settings: Settings) -> str:
    """What does not answer, and why; empty if all does. A refusal is an answer: the workers will say it."""
    try:
        connect(settings.redis_url.get_secret_value(), settings.redis_timeout_s).ping()
    except AuthenticationError:
        return ""
    except (RedisConnectionError, RedisTimeoutError, OSError) as error:
        return f"Redis: {type(error).__name__}: {error}"
    except RedisError:
        return ""
    try:
        topics_there(settings, _KAFKA_TIMEOUT_S)
    except KafkaException as error:
        return unreachable(settings, error) if error.args[0].code() in PASSING else ""
    return ""
