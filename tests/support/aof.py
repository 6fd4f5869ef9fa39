"""What an operator does with a killed Redis: its append-only file may not end with a whole command."""

from __future__ import annotations

import subprocess
from pathlib import Path

from headrace.embedded import EmbeddedRedis


def file(redis: EmbeddedRedis) -> Path:
    """All that it knows: one file in Redis 6.2, in 7 the manifest that names its files."""
    single = redis.folder / "appendonly.aof"
    return single if single.exists() else redis.folder / "appendonlydir" / "appendonly.aof.manifest"


def bring_back(redis: EmbeddedRedis) -> None:
    """Starts it again, its file cut where the last whole transaction ends: redis-check-aof is redis-server renamed."""
    done = subprocess.run(
        ["redis-check-aof", "--fix", str(file(redis))],
        executable=redis.binary,
        input="y\n",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout  # It says why there: an empty file, for one.
    redis.start()
