"""A real Redis Cluster: masters and a replica of each, as processes on 127.0.0.1."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

import redis
from redis.exceptions import RedisError, ResponseError

from headrace.embedded import EmbeddedRedis, free_port
from store.slots import SLOTS, slot_of
from tests.support import stack

DEADLINE_S: Final = 60.0
NODE_TIMEOUT_MS: Final = 2000
"""A master that is silent for so long has its replica promoted."""


wait_for = partial(stack.wait_for, deadline_s=DEADLINE_S, passing=(RedisError,))
"""Returns once a condition holds, which servers may be away to tell until then."""


class Servers(ABC):
    """Processes that run for the length of a `with` block; none is left when one of them does not start."""

    def __enter__(self) -> Self:
        with ExitStack() as started:
            self._start(started)
            self._running = started.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.__exit__(kind, error, trace)

    @abstractmethod
    def _start(self, started: ExitStack) -> None:
        """Starts them; what ends them goes into `started`."""


@contextmanager
def falling_behind(master: EmbeddedRedis, replica: EmbeddedRedis, key: bytes) -> Iterator[None]:
    """Within it a replica hears no more of its master, which has written a key since; otherwise it is well."""
    with (
        redis.Redis(port=master.port, socket_timeout=10) as of_master,
        redis.Redis(port=replica.port, socket_timeout=10, single_connection_client=True) as of_replica,
    ):
        with suppress(ResponseError):  # Of one that is in no cluster.
            of_replica.readonly()
        # Only once events flow: sentinels leave out a replica that has heard nothing for long.
        wait_for("the stream commits", lambda: b"clicks" in (of_master.get(key) or b""))
        for name, value in (("masteruser", "nobody"), ("masterauth", "wrong")):
            of_replica.config_set(name, value)
        of_master.execute_command("CLIENT", "KILL", "TYPE", "replica")
        wait_for("it hears no more", lambda: of_replica.info("replication")["master_link_status"] == "down")
        wait_for("its master has more", lambda: of_master.get(key) != of_replica.get(key))
        yield
        for name in ("masteruser", "masterauth"):
            of_replica.config_set(name, "")


def redis7() -> str:
    """The `redis-server` on PATH, 7.0 or later: 6.2 can't be told where its cluster's port is to be."""
    found = shutil.which("redis-server")
    assert found, "there is no redis-server on PATH (Debian: apt-get install redis-server)"
    return found


class RedisCluster(Servers):
    """Three masters with a third of the slots each, and a replica of each."""

    def __init__(self, masters: int = 3) -> None:
        self._n_masters = masters
        self.nodes: list[EmbeddedRedis] = []
        self._bus: list[int] = []

    def _start(self, started: ExitStack) -> None:
        for _ in range(2 * self._n_masters):
            self._bus.append(free_port())
            server = EmbeddedRedis(
                redis7(),
                appendonly=True,
                args=(
                    *("--cluster-enabled", "yes", "--cluster-port", str(self._bus[-1])),
                    *("--cluster-node-timeout", str(NODE_TIMEOUT_MS), "--cluster-replica-validity-factor", "0"),
                    *("--repl-diskless-sync-delay", "0", "--repl-ping-replica-period", "1"),
                ),
            )
            self.nodes.append(started.enter_context(server))
        self._make()

    @property
    def url(self) -> str:
        """As `HEADRACE_REDIS_URL` takes it; it names two of the nodes."""
        return f"redis+cluster://127.0.0.1:{self.nodes[0].port},127.0.0.1:{self.nodes[1].port}"

    def do(self, node: EmbeddedRedis, *words: Any) -> Any:
        """Runs a command on one node."""
        with redis.Redis.from_url(node.url, socket_timeout=10) as client:
            return client.execute_command(*words)

    def master_of(self, key: bytes) -> EmbeddedRedis:
        """The node that has a key, as all that are up agree."""
        found: list[EmbeddedRedis] = []

        def agreed() -> bool:
            ports = {self._owner(node, slot_of(key)) for node in self.nodes if node.is_running}
            found[:] = [node for node in self.nodes if node.port in ports and node.is_running]
            return len(ports) == len(found) == 1

        wait_for(f"one master of {key!r}", agreed)
        return found[0]

    def replica_of(self, master: EmbeddedRedis) -> EmbeddedRedis:
        """A replica of a master."""
        roles = {node.port: self.do(node, "ROLE") for node in self.nodes if node.is_running}
        return next(
            each
            for each in self.nodes
            if roles.get(each.port, [b""])[0] == b"slave" and roles[each.port][2] == master.port
        )

    def settled(self) -> None:
        """Returns once every node that is up finds all slots served, and every replica is in step with its master."""
        wait_for("the cluster is whole", lambda: all(self._is_well(node) for node in self.nodes if node.is_running))

    def fail_over(self, victim: EmbeddedRedis) -> None:
        """Kills a master, and returns once its replica has taken its place."""
        slot = next(first for first, _, master, *_ in self.do(victim, "CLUSTER", "SLOTS") if master[1] == victim.port)
        victim.kill()
        others = [node for node in self.nodes if node.is_running]
        wait_for("its replica is promoted", lambda: all(self._owner(each, slot) != victim.port for each in others))

    def begin_move(self, slot: int, to: EmbeddedRedis) -> EmbeddedRedis:
        """A slot is on its way to another master; returns the one that it leaves."""
        source = next(node for node in self.nodes if node.is_running and self._owner(node, slot) == node.port)
        self.do(to, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.do(source, "CLUSTER", "MYID"))
        self.do(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self.do(to, "CLUSTER", "MYID"))
        return source

    def move_keys(self, slot: int, source: EmbeddedRedis, to: EmbeddedRedis, n: int) -> int:
        """Moves up to n keys of a slot; returns how many there were."""
        keys = self.do(source, "CLUSTER", "GETKEYSINSLOT", slot, n)
        if keys:
            self.do(source, "MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *keys)
        return len(keys)

    def end_move(self, slot: int, source: EmbeddedRedis, to: EmbeddedRedis) -> None:
        """The slot is the other's."""
        for node in (to, source):
            self.do(node, "CLUSTER", "SETSLOT", slot, "NODE", self.do(to, "CLUSTER", "MYID"))

    def _make(self) -> None:
        masters, replicas = self.nodes[: self._n_masters], self.nodes[self._n_masters :]
        ends = [SLOTS * at // self._n_masters for at in range(self._n_masters + 1)]
        for number, master in enumerate(masters):
            self.do(master, "CLUSTER", "ADDSLOTSRANGE", ends[number], ends[number + 1] - 1)
            self.do(master, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for node, bus in zip(self.nodes[1:], self._bus[1:], strict=True):
            self.do(self.nodes[0], "CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        wait_for("nodes know one another", lambda: all(self._knows_all(node) for node in self.nodes))
        for master, replica in zip(masters, replicas, strict=True):
            self.do(replica, "CLUSTER", "REPLICATE", self.do(master, "CLUSTER", "MYID"))
        self.settled()

    def _owner(self, node: EmbeddedRedis, slot: int) -> int:
        """The port of the master of a slot, as a node knows it; -1 for none."""
        for first, last, master, *_ in self.do(node, "CLUSTER", "SLOTS"):
            if first <= slot <= last:
                return int(master[1])
        return -1

    def _knows_all(self, node: EmbeddedRedis) -> bool:
        known = self.do(node, "CLUSTER", "NODES")
        return bool(known.count(b"\n") == len(self.nodes) and b"handshake" not in known)

    def _is_well(self, node: EmbeddedRedis) -> bool:
        if b"cluster_state:ok" not in self.do(node, "CLUSTER", "INFO"):
            return False
        role = self.do(node, "ROLE")
        if role[0] == b"master":
            return len(role[2]) == 1
        master = next(each for each in self.nodes if each.port == role[2])
        written = self.do(master, "ROLE")[1]
        return bool(role[3] == b"connected" and self.do(node, "ROLE")[4] >= written)

    def other_master(self, key: bytes) -> EmbeddedRedis:
        """A master that does not have a key."""
        own = self.master_of(key)
        running = (node for node in self.nodes if node.is_running and node is not own)
        return next(node for node in running if self.do(node, "ROLE")[0] == b"master")
