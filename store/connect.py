"""Connections to Redis: every one has a deadline on every call."""

from __future__ import annotations

import redis


def connect(url: str, timeout_s: float) -> redis.Redis:
    """A blocking client; nothing is sent before its first call."""
    client: redis.Redis = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    return client
