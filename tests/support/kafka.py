"""A real Apache Kafka for tests: what the embedded broker can't show.

That is replay, retention, durability, broker timestamps and transactions. It is the artifact that
Maven has, on the Java of this machine: one node in KRaft mode, or several, on 127.0.0.1.

`python -m tests.support.kafka` prints what this machine lacks for it, or nothing.
"""

from __future__ import annotations

import base64
import fcntl
import shutil
import socket
import subprocess
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from headrace.embedded import (
    PORT_ATTEMPTS,
    STOP_TIMEOUT_S,
    PortTakenError,
    ServerError,
    end,
    free_port,
    spawn,
    wait_until_ready,
)

if TYPE_CHECKING:
    from types import TracebackType

VERSION: Final = "4.1.0"
CACHE: Final = Path(__file__).parents[2] / ".cache" / f"kafka-{VERSION}"
DOWNLOAD_TIMEOUT_S: Final = 600
START_TIMEOUT_S: Final = 90.0
JAVA_MIN: Final = 17

_POM: Final = f"""\
<project>
  <modelVersion>4.0.0</modelVersion>
  <groupId>headrace</groupId>
  <artifactId>kafka-for-tests</artifactId>
  <version>1</version>
  <dependencies>
    <dependency>
      <groupId>org.apache.kafka</groupId>
      <artifactId>kafka_2.13</artifactId>
      <version>{VERSION}</version>
    </dependency>
    <dependency>
      <groupId>org.slf4j</groupId>
      <artifactId>slf4j-simple</artifactId>
      <version>1.7.36</version>
    </dependency>
  </dependencies>
</project>
"""

_PROPERTIES: Final = """\
process.roles=broker,controller
node.id={node}
controller.quorum.voters={voters}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
# Tests write events of any age, and delete what they want gone.
log.retention.ms=-1
# One node, so one replica; one partition each, so that starting is quick.
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
group.initial.rebalance.delay.ms=0
# A killed broker may register again once its old session is over: 9 s by default.
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=3000
"""

# Instead of the lines of the same names above; the test's own clients, and the broker, use PLAINTEXT.
_SECURE: Final = """\
listeners=PLAINTEXT://127.0.0.1:{port},SASL_PLAINTEXT://127.0.0.1:{sasl_port},SASL_SSL://127.0.0.1:{ssl_port},\
CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},SASL_PLAINTEXT://127.0.0.1:{sasl_port},SASL_SSL://127.0.0.1:{ssl_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT,SASL_SSL:SASL_SSL
sasl.enabled.mechanisms=SCRAM-SHA-256
listener.name.sasl_plaintext.scram-sha-256.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config=\
org.apache.kafka.common.security.scram.ScramLoginModule required;
ssl.keystore.type=PEM
ssl.keystore.location={home}/server.pem
"""

# Quick to start rather than quick for long.
_JAVA: Final = (
    "java",
    "-XX:TieredStopAtLevel=1",
    "-XX:+UseSerialGC",
    "-Xmx768m",
    "-Djava.awt.headless=true",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
    "-Dorg.slf4j.simpleLogger.showDateTime=true",
    "-cp",
)


def what_is_missing() -> str | None:
    """Say what this machine lacks for a real Kafka, as the end of a sentence; None if nothing."""
    java = shutil.which("java")
    if java is None:
        return "there is no java on PATH"
    answer = subprocess.run([java, "-version"], check=False, capture_output=True, text=True, timeout=60)
    version = answer.stderr.split('"')[1] if answer.stderr.count('"') > 1 else "0"
    if int(version.split(".")[0].split("-")[0]) < JAVA_MIN:
        return f"{java} is version {version} and Kafka {VERSION} needs {JAVA_MIN}"
    if not (CACHE / "libs").is_dir() and shutil.which("mvn") is None:
        return "there is no mvn (Maven) on PATH to get Kafka by"
    return None


def jars() -> Path:
    """Return the folder of Kafka's jars, filled by Maven the first time (40 MB)."""
    libs = CACHE / "libs"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # Two test runs at once fill it once.
        if libs.is_dir():
            return libs
        with tempfile.TemporaryDirectory(dir=CACHE) as work:
            pom = Path(work, "pom.xml")
            pom.write_text(_POM)
            done = subprocess.run(
                [
                    *("mvn", "--batch-mode", "--quiet", "--file", str(pom)),
                    "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies",
                    f"-DoutputDirectory={work}/libs",
                    "-DincludeScope=runtime",
                ],
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=DOWNLOAD_TIMEOUT_S,
            )
            if done.returncode != 0:
                msg = f"Maven could not get Kafka {VERSION}:\n{done.stdout[-4000:]}"
                raise ServerError(msg)
            Path(work, "libs").rename(libs)  # All or nothing.
    return libs


class RealKafka:
    """Apache Kafka on 127.0.0.1 for the length of a `with` block, with nothing in it.

    `kill`, `stop` and `start` leave its data and its port as they are.

    Args:
        password: of the user `alice`. With it there are listeners for SASL/SCRAM-SHA-256, without and with TLS, too.
    """

    def __init__(self, password: str = "") -> None:
        self._password = password
        self._folder: Path | None = None
        self._port = self._sasl_port = self._ssl_port = 0
        self._node = 1
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        state = f"pid={self._process.pid}" if self._process else "stopped"
        return f"<RealKafka {state} 127.0.0.1:{self._port}>"

    def __enter__(self) -> Self:
        missing = what_is_missing()
        if missing:
            msg = f"no Kafka can be run here, since {missing}"
            raise ServerError(msg)
        jars()
        for attempt in range(PORT_ATTEMPTS):
            self._folder = Path(tempfile.mkdtemp(prefix="headrace-kafka-"))
            try:
                self._format()
                self.start()
            except BaseException as error:
                self._remove()
                if isinstance(error, PortTakenError) and attempt < PORT_ATTEMPTS - 1:
                    continue
                raise
            break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.kill()  # Nobody needs what a clean shutdown would still write.
            if error is not None and (log := self.log_tail()):
                print(f"--- {self!r}\n{log[-1500:]}")
        finally:
            self._remove()

    @property
    def is_running(self) -> bool:
        """Whether it was started and neither stopped nor killed since."""
        return self._process is not None

    def empty(self) -> None:
        """Delete all topics; return when they are gone."""
        from confluent_kafka.admin import AdminClient

        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})

        def there() -> list[str]:
            return [name for name in admin.list_topics(timeout=10).topics if not name.startswith("__")]

        if topics := there():
            for done in admin.delete_topics(topics).values():
                done.result()
            assert self._process is not None
            wait_until_ready(self._process, lambda: not there(), name="Kafka", log=self._log, timeout_s=START_TIMEOUT_S)

    @property
    def bootstrap_servers(self) -> str:
        """The address, as Kafka clients take it."""
        return f"127.0.0.1:{self._port}"

    @property
    def sasl_servers(self) -> str:
        """As `bootstrap_servers`, for SASL_PLAINTEXT."""
        return f"127.0.0.1:{self._sasl_port}"

    @property
    def ssl_servers(self) -> str:
        """As `bootstrap_servers`, for SASL_SSL, with a certificate by `ca`."""
        return f"127.0.0.1:{self._ssl_port}"

    @property
    def ca(self) -> Path:
        """The certificate of who signed the broker's."""
        return self._home / "ca.pem"

    def start(self) -> None:
        """Start it again, after `stop` or `kill`, on the same port and data."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """As `start`, but don't wait until it is ready."""
        if self._process is not None:
            msg = f"{self!r} is running: stop it first"
            raise ServerError(msg)
        self._process = spawn(self._command("kafka.Kafka", self._properties), log=self._log)

    def wait(self) -> None:
        """Wait until a launched one is ready."""
        assert self._process is not None
        try:
            wait_until_ready(
                self._process,
                self._is_ready,
                name="Kafka",
                log=self._log,
                timeout_s=START_TIMEOUT_S,
            )
        except BaseException:
            self.kill()
            raise

    def stop(self) -> None:
        """Shut it down (SIGTERM); nothing happens if it is down."""
        if self._process is not None:
            end(self._process, timeout_s=30)
            self._process = None

    def kill(self) -> None:
        """Kill it (SIGKILL), as a crash would; nothing happens if it is down."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
            self._process = None

    def log_tail(self) -> str:
        """Return the end of its log: warnings and errors only."""
        return self._log.read_text(errors="replace")[-4000:] if self._log.exists() else ""

    @property
    def _home(self) -> Path:
        if self._folder is None:
            msg = "this RealKafka has no data: use it in a `with` block"
            raise ServerError(msg)
        return self._folder

    @property
    def _properties(self) -> Path:
        return self._home / "server.properties"

    @property
    def _log(self) -> Path:
        return self._home / "kafka.log"

    @staticmethod
    def _command(main_class: str, *args: str | Path) -> list[str]:
        return [*_JAVA, f"{CACHE / 'libs'}/*", main_class, *map(str, args)]

    def _format(self) -> None:
        """Choose ports and make the data folder, as `kafka-storage.sh format` does."""
        self._port, controller_port = free_port(), free_port()
        self.format(controller_port, 1, f"1@127.0.0.1:{controller_port}", _cluster_id())

    def format(self, controller_port: int, node: int, voters: str, cluster_id: str, more: str = "") -> None:
        """Make the data folder of a node of a cluster."""
        self._folder = self._folder or Path(tempfile.mkdtemp(prefix="headrace-kafka-"))
        self._port, self._node = self._port or free_port(), node
        names = {"port": self._port, "controller_port": controller_port, "node": node, "voters": voters}
        text = _PROPERTIES.format(**names, data=self._home / "data") + more
        users: list[str] = []
        if self._password:
            self._sasl_port, self._ssl_port = free_port(), free_port()
            text += _SECURE.format(**names, sasl_port=self._sasl_port, ssl_port=self._ssl_port, home=self._home)
            _certify(self._home)
            users = ["--add-scram", f"SCRAM-SHA-256=[name=alice,password={self._password}]"]
        self._properties.write_text(text)
        # As an argument of its own, an id that begins with a dash would be read as an option.
        done = subprocess.run(
            self._command(
                "kafka.tools.StorageTool",
                *("format", f"--cluster-id={cluster_id}", "--config", str(self._properties), *users),
            ),
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=START_TIMEOUT_S,
        )
        if done.returncode != 0:
            msg = f"Kafka's storage could not be formatted:\n{done.stdout[-4000:]}"
            raise ServerError(msg)

    def _is_ready(self) -> bool:
        """Whether it tells a client of itself: a listener alone may belong to a fenced broker."""
        from confluent_kafka import KafkaException
        from confluent_kafka.admin import AdminClient

        try:  # Cheap, and librdkafka would log each refusal.
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
        except OSError:
            return False
        admin = AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})
        try:
            return self._node in admin.list_topics(timeout=1).brokers
        except KafkaException:
            return False

    def _remove(self) -> None:
        self.kill()
        shutil.rmtree(self._home, ignore_errors=True)
        self._folder = None


class KafkaCluster:
    """Three brokers, each also a controller: what two of them have is acknowledged, and one may go."""

    def __init__(self) -> None:
        self.nodes = [RealKafka() for _ in range(3)]

    def __enter__(self) -> Self:
        jars()
        for _ in range(PORT_ATTEMPTS - 1):
            try:
                return self._start()
            except PortTakenError:
                self.nodes = [RealKafka() for _ in self.nodes]
        return self._start()

    def _start(self) -> Self:
        ports = [free_port() for _ in self.nodes]
        voters = ",".join(f"{number}@127.0.0.1:{port}" for number, port in enumerate(ports, 1))
        cluster_id = _cluster_id()
        try:
            for number, (node, port) in enumerate(zip(self.nodes, ports, strict=True), 1):
                node.format(port, number, voters, cluster_id, "min.insync.replicas=2\n")
                node.launch()
            for node in self.nodes:
                node.wait()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for node in self.nodes:
            node.__exit__(kind, error, traceback)

    @property
    def is_running(self) -> bool:
        """Whether all are."""
        return all(node.is_running for node in self.nodes)

    @property
    def bootstrap_servers(self) -> str:
        """The addresses, as Kafka clients take them."""
        return ",".join(node.bootstrap_servers for node in self.nodes)


_shared: list[RealKafka] = []


def shared_kafka() -> RealKafka:
    """The one that the tests of a process share, started when it is first asked for, until `end_shared_kafka`."""
    if not _shared:
        _shared.append(RealKafka().__enter__())
    return _shared[0]


def end_shared_kafka() -> None:
    """Ends it, if there is one."""
    while _shared:
        _shared.pop().__exit__(None, None, None)


def _cluster_id() -> str:
    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")


def _certify(folder: Path) -> None:
    """Make a certificate authority of our own, and the broker's key and certificate by it."""
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=headrace-test-ca",
        "req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=127.0.0.1",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile server.ext -out server.crt",
    ):
        (folder / "server.ext").write_text("subjectAltName=IP:127.0.0.1\n")
        subprocess.run(["openssl", *command.split()], cwd=folder, check=True, capture_output=True, timeout=60)
    (folder / "server.pem").write_text((folder / "server.key").read_text() + (folder / "server.crt").read_text())


if __name__ == "__main__":  # For the Makefile.
    print(what_is_missing() or "", end="")
