"""A real master, its replica, and three sentinels that agree on which is which: processes on 127.0.0.1."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import redis

from headrace.embedded import EmbeddedRedis, end, free_port, spawn
from tests.support.cluster import Servers, redis7, wait_for

NAME: Final = "headrace"
_CONFIG: Final = """\
port {port}
bind 127.0.0.1
dir {folder}
sentinel monitor {name} 127.0.0.1 {master} 2
sentinel down-after-milliseconds {name} 2000
sentinel failover-timeout {name} 5000
"""


class SentinelRedis(Servers):
    """A master, a replica, three sentinels."""

    def __init__(self) -> None:
        self.nodes: list[EmbeddedRedis] = []
        self.sentinels: list[int] = []

    def _start(self, started: ExitStack) -> None:
        fast = ("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1")
        self.nodes = [started.enter_context(EmbeddedRedis(appendonly=True, args=fast)) for _ in range(2)]
        self.do(self.nodes[1].port, "REPLICAOF", "127.0.0.1", self.nodes[0].port)
        folder = Path(tempfile.mkdtemp(prefix="headrace-sentinel-"))
        started.callback(shutil.rmtree, folder)
        for _ in range(3):
            port = free_port()
            config = folder / f"{port}.conf"
            config.write_text(_CONFIG.format(port=port, folder=folder, name=NAME, master=self.nodes[0].port))
            process = spawn([redis7(), str(config), "--sentinel"], log=folder / f"{port}.log")
            started.callback(end, process)
            self.sentinels.append(port)
        self.settled()

    @property
    def url(self) -> str:
        """As `HEADRACE_REDIS_URL` takes it."""
        return f"redis+sentinel://{','.join(f'127.0.0.1:{port}' for port in self.sentinels)}/{NAME}"

    def do(self, port: int, *words: Any) -> Any:
        """Runs a command on one server or sentinel."""
        with redis.Redis(port=port, socket_timeout=10) as client:
            client.response_callbacks.clear()
            return client.execute_command(*words)

    @property
    def master(self) -> EmbeddedRedis:
        """The one that all sentinels name."""
        found: set[int] = set()

        def agreed() -> bool:
            found.clear()
            found.update(int(self.do(port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)[1]) for port in self.sentinels)
            return len(found) == 1

        wait_for("one master", agreed)
        return next(node for node in self.nodes if node.port in found)

    @property
    def replica(self) -> EmbeddedRedis:
        """The other one."""
        return next(node for node in self.nodes if node is not self.master)

    def settled(self) -> None:
        """Returns once sentinels know one another and the replica, which is in step with the master."""
        wait_for("sentinels know all", lambda: all(self._knows_all(port) for port in self.sentinels))
        wait_for("the replica is in step", self._is_in_step)

    def fail_over(self, strike: Callable[[EmbeddedRedis], None] = EmbeddedRedis.kill) -> EmbeddedRedis:
        """Strikes the master, and returns it once the replica has taken its place."""
        victim = self.master
        strike(victim)
        wait_for(
            "the replica is the master", lambda: self.master is not victim and self._role(self.master) == b"master"
        )
        return victim

    def _knows_all(self, port: int) -> bool:
        told = self.do(port, "SENTINEL", "MASTER", NAME)
        known = dict(zip(told[::2], told[1::2], strict=True))
        return bool(
            known[b"num-other-sentinels"] == b"2" and known[b"num-slaves"] == b"1" and known[b"flags"] == b"master"
        )

    def _is_in_step(self) -> bool:
        written = self.do(self.master.port, "ROLE")
        role = self.do(self.replica.port, "ROLE")
        return bool(
            written[0] == b"master" and role[0] == b"slave" and role[3] == b"connected" and role[4] >= written[1]
        )

    def _role(self, node: EmbeddedRedis) -> bytes:
        role: bytes = self.do(node.port, "ROLE")[0]
        return role
