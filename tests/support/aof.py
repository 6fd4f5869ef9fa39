"""What an operator does with an append-only file that does not end with a whole command."""

from __future__ import annotations

import subprocess
from pathlib import Path

from headrace.embedded import EmbeddedRedis


def repair(redis: EmbeddedRedis, file: Path) -> None:
    """Cuts the file where its last whole transaction ends, by `redis-check-aof --fix`: redis-server by another name."""
    subprocess.run(
        ["redis-check-aof", "--fix", str(file)],
        executable=redis.binary,
        input=b"y\n",
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=60,
    )
