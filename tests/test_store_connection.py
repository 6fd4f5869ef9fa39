"""One connection for all tasks: everybody gets their own answer, nobody waits for ever, no change goes unnoticed."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import random
import signal
import socket
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, cast

import pytest
import redis
import uvloop
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    NoPermissionError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from headrace.embedded import EmbeddedRedis
from store.connection import TRACKING_VERSION_MIN, Connection

DEADLINE_S = 20
"""Nothing here takes long; a test that waits so long has failed."""
HELLO = b"%1\r\n$7\r\nversion\r\n$6\r\n7.0.15\r\n"

Connect = Callable[..., Connection]


def on_both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Runs a test on asyncio's loop and on the one that servers run on.

    It can ask for `connect`, which makes connections that are closed at the end, and for `complaints`: what callbacks
    and forgotten tasks told the loop, nothing unless the test takes it out.
    """

    async def supervised(given: dict[str, Any]) -> None:
        complaints: list[dict[str, Any]] = []
        made: list[Connection] = []

        def connect(url: str, timeout_s: float = 5, **options: Any) -> Connection:
            made.append(Connection(url, timeout_s, **options))
            return made[-1]

        own = {"connect": connect, "complaints": complaints}
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with asyncio.timeout(3 * DEADLINE_S):
            try:
                await test(**given, **{name: own[name] for name in own if name in wanted})
            finally:
                for each in made:
                    await each.aclose()
        gc.collect()
        await asyncio.sleep(0)
        assert complaints == []

    @pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    @wraps(test)
    def run(loop: Callable[[], asyncio.AbstractEventLoop], **given: Any) -> None:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(supervised(given))

    wanted = inspect.signature(test).parameters
    fixtures = [each for name, each in wanted.items() if name not in {"connect", "complaints"}]
    loop = inspect.Parameter("loop", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    vars(run)["__signature__"] = inspect.Signature([loop, *fixtures])  # Of its own: pytest reads it.
    return cast("Callable[..., None]", run)


@pytest.fixture(params=["redis 6.2", "redis 7"])
def server(request: pytest.FixtureRequest) -> EmbeddedRedis:
    """An empty Redis, shared: nobody stops it."""
    name = "redis_server" if request.param == "redis 6.2" else "redis7_server"
    found: EmbeddedRedis = request.getfixturevalue(name)
    with redis.Redis.from_url(found.url) as client:
        client.flushall()
    return found


@pytest.fixture
def victim() -> Iterator[EmbeddedRedis]:
    """A Redis of the test's own, to be maltreated."""
    with EmbeddedRedis() as found:
        yield found


@pytest.fixture
def client(server: EmbeddedRedis) -> Iterator[Any]:
    """Somebody else, who writes."""
    with redis.Redis.from_url(server.url) as found:
        yield found


class Heard:
    """What a connection said, in order: lists of keys, or None."""

    def __init__(self) -> None:
        self.all: list[list[bytes] | None] = []
        self._changed = asyncio.Event()

    def __call__(self, keys: Sequence[bytes] | None) -> None:
        self.all.append(keys if keys is None else list(keys))
        self._changed.set()

    async def next(self) -> list[bytes] | None:
        """Takes out the first, when there is one."""
        async with asyncio.timeout(DEADLINE_S):
            while not self.all:
                self._changed.clear()
                await self._changed.wait()
        return self.all.pop(0)


@contextmanager
def stopped(server: EmbeddedRedis) -> Iterator[None]:
    """A Redis that hangs: its socket is open, and nobody reads."""
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@asynccontextmanager
async def pretender(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]], **options: Any
) -> AsyncIterator[str]:
    """What is no Redis, for what no Redis does; its address as host:port."""
    tasks: set[asyncio.Task[Any]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await serve(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.transport.abort()

    listening = await asyncio.start_server(handle, "127.0.0.1", 0, **options)
    try:
        yield f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    finally:
        listening.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.sleep(0.01)


def saying(*answers: bytes) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
    """Gives one answer to whatever arrives at once, then the next; after the last it hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.read(65536)
            writer.write(answer)
            await writer.drain()
        await asyncio.sleep(0.01)

    return serve


async def answered(connection: Connection) -> None:
    """Returns once calls are answered again; what fails until then says that Redis is away."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                await connection.execute("PING")
            except (RedisConnectionError, RedisTimeoutError):
                await asyncio.sleep(0.01)
            else:
                return


async def until(condition: Callable[[], object]) -> None:
    """Returns once it holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110  # it is about servers, which set no event
            await asyncio.sleep(0.001)


async def outcome(call: Awaitable[Any]) -> Any:
    """What a call gave, or its error."""
    try:
        return await call
    except RedisError as error:
        return error


# --- What is asked and answered ---------------------------------------------------------------------------------------


@on_both_loops
async def test_values_come_in_the_order_of_keys(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    client.mset({"a": b"1", "b": b"\r\n$5\r\n", "empty": b"", b"\xff\x00": b"binary"})
    connection = connect(server.url, on_invalidated=Heard())
    assert await connection.mget([b"b", b"none", b"a", b"a"]) == [b"\r\n$5\r\n", None, b"1", b"1"]
    assert await connection.mget((), tracked=(b"a", b"none")) == [b"1", None]
    assert await connection.mget([b"empty", b"a"], tracked=[b"\xff\x00", b"b"]) == [b"", b"1", b"binary", b"\r\n$5\r\n"]


@on_both_loops
async def test_keys_may_be_of_any_length(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    connection = connect(server.url)
    for length in (1, 9, 10, 99, 1023, 1024, 5000):
        keys = [b"k" * length, b"short", b"", b"x" * length]
        client.mset({key: b"%d" % at for at, key in enumerate(keys)})
        assert await connection.mget(keys) == [b"0", b"1", b"2", b"3"]


@on_both_loops
async def test_no_keys_no_round_trip(connect: Connect, server: EmbeddedRedis) -> None:
    connection = connect(server.url)
    assert await connection.mget([]) == []
    assert await connection.mget((), tracked=()) == []
    assert not connection.connected


@on_both_loops
async def test_commands_of_all_kinds(connect: Connect, server: EmbeddedRedis) -> None:
    connection = connect(server.url)
    assert await connection.execute("SET", b"k", 5) == b"OK"
    assert await connection.execute("INCRBY", "k", 2) == 7
    assert await connection.execute("GET", "k") == b"7"
    assert await connection.execute("HSET", "h", "é", b"\x00") == 1
    assert await connection.execute("HGETALL", "h") == {"é".encode(): b"\x00"}
    assert await connection.execute("GET", "none") is None
    assert (await connection.execute("CONFIG", "GET", "maxmemory-policy"))[b"maxmemory-policy"] == b"noeviction"


@on_both_loops
async def test_both_groups_go_out_in_one_write(connect: Connect) -> None:
    """One round trip: a server that answers nothing before it has read all three commands is enough."""
    arrived = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(HELLO + b"+OK\r\n")
        arrived.append(await reader.read(65536))
        writer.write(b"*1\r\n$1\r\n1\r\n+OK\r\n*1\r\n$1\r\n2\r\n")
        await reader.read()

    async with pretender(serve) as address:
        connection = connect(f"redis://{address}", on_invalidated=Heard())
        assert await connection.mget([b"a"], tracked=[b"b"]) == [b"1", b"2"]
    assert [word for word in arrived[0].split(b"\r\n") if word[:1] not in (b"*", b"$")] == [
        *(b"MGET", b"a"),
        *(b"CLIENT", b"CACHING", b"YES"),
        *(b"MGET", b"b"),
        b"",
    ]


@on_both_loops
async def test_misuse_is_said(connect: Connect, server: EmbeddedRedis) -> None:
    connection = connect(server.url)
    with pytest.raises(ValueError, match=r"mget\(tracked=\.\.\.\) needs a Connection made with on_invalidated="):
        await connection.mget([b"a"], tracked=[b"b"])
    with pytest.raises(ValueError, match=r"needs a command, such as execute\('PING'\)"):
        await connection.execute()
    with pytest.raises(ValueError, match="redis://, rediss://, unix://"):
        connect("http://127.0.0.1")


@on_both_loops
async def test_errors_are_those_of_redis_py(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    connection = connect(server.url)
    client.set("text", "x")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await connection.execute("LPUSH", "text", "y")
    with pytest.raises(ResponseError, match="unknown command"):
        await connection.execute(b"\xff\xfe", b"\xff")
    with pytest.raises(NoScriptError):
        await connection.execute("EVALSHA", "0" * 40, 0)
    client.config_set("maxmemory", 1)
    try:
        with pytest.raises(OutOfMemoryError):
            await connection.execute("SET", "k", "v")
    finally:
        client.config_set("maxmemory", 0)
    client.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(ReadOnlyError):
            await connection.execute("SET", "k", "v")
    finally:
        client.replicaof("NO", "ONE")
    assert await connection.mget([b"text"]) == [b"x"]


@on_both_loops
async def test_a_redis_that_loads_says_so(connect: Connect) -> None:
    with (
        EmbeddedRedis(args=("--key-load-delay", "2000", "--rdbcompression", "no")) as server,
        redis.Redis.from_url(server.url) as client,
    ):
        # While it loads, it looks up every 2 MB.
        client.mset({f"{at}": b"x" * 20_000 for at in range(400)})
        connection = connect(server.url, on_invalidated=Heard())
        assert await connection.execute("PING") == b"PONG"
        reload = asyncio.create_task(asyncio.to_thread(client.execute_command, "DEBUG RELOAD"))
        while not isinstance(error := await outcome(connection.mget([b"1"])), BusyLoadingError):
            assert not reload.done(), error
        assert isinstance(await outcome(connection.mget([b"1"], tracked=[b"2"])), BusyLoadingError)
        await reload
        assert await connection.mget([b"1"]) == [b"x" * 20_000]


@on_both_loops
async def test_big_answers(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    """100 MB in one answer, while others are answered behind it."""
    client.set("big", b"b" * 100_000)
    client.set("small", b"s")
    connection = connect(server.url, DEADLINE_S)
    big, small = await asyncio.gather(connection.mget([b"big"] * 1000), connection.mget([b"small"]))
    assert len(big) == 1000
    assert set(big) == {b"b" * 100_000}
    assert small == [b"s"]


# --- Many callers -----------------------------------------------------------------------------------------------------


@on_both_loops
async def test_every_caller_gets_its_own_answer(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    """Whatever is asked at once, also of keys that change, and whoever gives up while it waits."""
    seed = random.randrange(2**32)
    print(f"seed={seed}")
    rng = random.Random(seed)
    values = {b"key-%d" % at: rng.randbytes(rng.choice([0, 1, 100, 5000])) for at in range(300)}
    client.mset(values)
    names = [*values, *(b"none-%d" % at for at in range(30))]
    connection = connect(server.url, DEADLINE_S, on_invalidated=Heard())
    counts: dict[str, int] = defaultdict(int)

    async def ask(kind: str) -> None:
        keys = rng.choices(names, k=rng.randint(1, 40))
        cut = rng.randint(0, len(keys)) if kind == "tracked" else len(keys)
        if kind == "echo":
            assert await connection.execute("ECHO", keys[0]) == keys[0]
        elif kind == "error":
            with pytest.raises(ResponseError, match="wrong number of arguments"):
                await connection.execute("ECHO", *keys[:1], "more")
        else:
            assert await connection.mget(keys[:cut], tracked=keys[cut:]) == [values.get(key) for key in keys]
        counts[kind] += 1

    async def caller() -> None:
        for _ in range(25):
            task = asyncio.create_task(ask(rng.choice(["plain", "tracked", "echo", "error"])))
            if rng.random() < 0.3:
                for _ in range(rng.randint(0, 3)):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
                counts["given up"] += task.cancelled()
                if not task.cancelled():
                    task.result()
            else:
                await task

    await asyncio.gather(*(caller() for _ in range(30)))
    assert len(counts) == 5
    assert await connection.execute("PING") == b"PONG"


@on_both_loops
async def test_many_first_calls_share_one_connection(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    before = client.info("stats")["total_connections_received"]
    connection = connect(server.url)
    assert await asyncio.gather(*(connection.execute("ECHO", at) for at in range(50))) == [
        b"%d" % at for at in range(50)
    ]
    assert client.info("stats")["total_connections_received"] == before + 1
    assert connection.connected


@on_both_loops
async def test_who_gives_up_while_connecting_takes_nobody_along(connect: Connect, server: EmbeddedRedis) -> None:
    connection = connect(server.url)
    first, second = (asyncio.create_task(connection.execute("ECHO", name)) for name in ("first", "second"))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == b"second"
    assert first.cancelled()


# --- Addresses --------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_the_database_and_the_name(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    client.set("k", "of 0")
    address = f"redis://127.0.0.1:{server.port}"
    for url in (f"{address}/3", f"{address}/0?db=3"):
        connection = connect(url)
        await connection.execute("SET", "k", "of 3")
        assert await connection.mget([b"k"]) == [b"of 3"]
        assert await connection.execute("CLIENT", "GETNAME") == b"headrace"
        assert repr(connection) == f"<Connection 127.0.0.1:{server.port}/3 connected>"
    assert client.get("k") == b"of 0"


@on_both_loops
async def test_nothing_is_read_from_a_wrong_database(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    connection = connect(f"redis://127.0.0.1:{server.port}/99")
    with pytest.raises(ResponseError, match=rf"Redis at 127.0.0.1:{server.port}/99 refused the connection: .*range"):
        await connection.execute("SET", "k", "v")
    assert client.dbsize() == 0


@on_both_loops
async def test_a_unix_socket(connect: Connect, tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with EmbeddedRedis(args=("--unixsocket", str(path))):
        connection = connect(f"unix://{path}?db=2")
        assert await connection.execute("SET", "k", "v") == b"OK"
        assert await connection.mget([b"k"]) == [b"v"]
        assert str(path) in repr(connection)
    with pytest.raises(RedisConnectionError, match=str(path)):
        await connect(f"unix://{path}").execute("PING")


@on_both_loops
async def test_passwords(connect: Connect, victim: EmbeddedRedis) -> None:
    """A wrong one is said without being shown, on every call."""
    with redis.Redis.from_url(victim.url) as client:
        client.acl_setuser("reader", enabled=True, passwords=["+s3cret/ü"], keys="*", commands=["+get", "+hello"])
        client.config_set("requirepass", "0pen")
    address = f"127.0.0.1:{victim.port}"
    assert await connect(f"redis://:0pen@{address}").execute("SET", "k", "v") == b"OK"
    reader = connect(f"redis://reader:s3cret%2F%C3%BC@{address}")
    assert await reader.execute("GET", "k") == b"v"
    with pytest.raises(NoPermissionError, match="no permissions"):
        await reader.execute("SET", "k", "w")
    with pytest.raises(NoPermissionError, match=r"refused the connection: .*no permissions"):
        await connect(f"redis://reader:s3cret%2F%C3%BC@{address}", on_invalidated=Heard()).execute("GET", "k")

    wrong = connect(f"redis://reader:wr0ng@{address}", on_invalidated=Heard())
    for _ in range(3):
        with pytest.raises(AuthenticationError, match="invalid username-password pair") as caught:
            await wrong.mget([b"k"], tracked=[b"k"])
        assert f"Redis at {address}/0" in str(caught.value)
        assert "check the user and the password in its URL" in str(caught.value)
        assert "wr0ng" not in str(caught.value) + repr(wrong)
    with pytest.raises(AuthenticationError, match="authenticated"):
        await connect(f"redis://{address}").execute("GET", "k")


@on_both_loops
async def test_tls(connect: Connect, server: EmbeddedRedis, certificate: Path) -> None:
    """Verified against the authority that the URL names; one that was not named is not trusted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", server.port)

        async def pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                target.write(data)
            target.transport.abort()

        try:
            await asyncio.gather(pass_on(reader, to_writer), pass_on(to_reader, writer))
        finally:
            to_writer.transport.abort()

    async with pretender(serve, ssl=context) as address:
        heard = Heard()
        connection = connect(f"rediss://{address}?ssl_ca_certs={certificate}", on_invalidated=heard)
        assert await connection.execute("SET", "k", b"v" * 100_000) == b"OK"
        assert await connection.mget([b"k"], tracked=[b"k", b"none"]) == [b"v" * 100_000, b"v" * 100_000, None]
        await connection.execute("DEL", "k")
        assert await heard.next() == [b"k"]
        await connection.aclose()
        with pytest.raises(RedisConnectionError, match=r"can't be reached: .*certificate"):
            await connect(f"rediss://{address}").execute("PING")
        with pytest.raises(RedisConnectionError, match="can't be reached: "):
            await connect(f"rediss://{address}?ssl_ca_certs={certificate}.none").execute("PING")


# --- What goes wrong --------------------------------------------------------------------------------------------------


@on_both_loops
async def test_redis_away_and_back(connect: Connect, victim: EmbeddedRedis) -> None:
    """Calls fail at once, naming the address; when it is back, the next calls are answered."""
    victim.kill()
    connection = connect(victim.url, DEADLINE_S)
    for _ in range(100):
        with pytest.raises(RedisConnectionError, match=f"Redis at 127.0.0.1:{victim.port}/0 can't be reached"):
            await connection.execute("PING")
    assert not connection.connected
    victim.start()
    await answered(connection)
    assert connection.connected


@on_both_loops
async def test_redis_killed_while_many_calls_wait(connect: Connect, victim: EmbeddedRedis) -> None:
    """Every call has its own values or fails; before the first failure it is said that anything may have changed."""
    events: list[str] = []
    n_answers = 0

    def on_invalidated(keys: Sequence[bytes] | None) -> None:
        assert keys is None
        events.append("lost")

    connection = connect(victim.url, DEADLINE_S, on_invalidated=on_invalidated)
    values = {b"%d" % at: b"value %d" % at * 50 for at in range(200)}
    await connection.execute("MSET", *(word for pair in values.items() for word in pair))

    async def caller(at: int) -> None:
        nonlocal n_answers
        rng = random.Random(at)
        try:
            while True:
                keys = rng.choices([*values], k=50)
                assert await connection.mget(keys[:25], tracked=keys[25:]) == [values[key] for key in keys]
                n_answers += 1
        except RedisConnectionError:
            events.append("failed")

    callers = [asyncio.create_task(caller(at)) for at in range(50)]
    await until(lambda: n_answers >= 500)
    victim.kill()
    await asyncio.gather(*callers)
    assert events[0] == "lost"
    assert events.count("failed") == 50
    victim.start()
    await answered(connection)
    assert await connection.mget([b"1"], tracked=[b"2"]) == [None, None]


@on_both_loops
async def test_redis_hangs(connect: Connect, victim: EmbeddedRedis) -> None:
    """All that wait fail by their deadline, what is asked next fails too, and once it goes on all is well."""
    events: list[Any] = []
    connection = connect(victim.url, 1, on_invalidated=events.append)
    await connection.execute("SET", "k", "old")

    async def ask() -> None:
        events.append(type(await outcome(connection.mget([b"k"], tracked=[b"k"]))))

    with stopped(victim):
        await asyncio.gather(*(ask() for _ in range(20)))
        assert events == [None] + [RedisTimeoutError] * 20
        assert not connection.connected
        # The kernel still connects, but nobody greets.
        error = await outcome(connection.mget([b"k"]))
        assert isinstance(error, RedisTimeoutError)
        assert f"Redis at 127.0.0.1:{victim.port}/0 gave no answer in 1 s" in str(error)
    await answered(connection)
    assert await connection.mget([b"k"]) == [b"old"]


@on_both_loops
async def test_a_hung_connection_is_noticed_when_nobody_asks(connect: Connect, victim: EmbeddedRedis) -> None:
    """What a mirror's staleness rests on: within a second and the timeout all is forgotten."""
    heard = Heard()
    connection = connect(victim.url, 1, on_invalidated=heard)
    await connection.mget((), tracked=[b"k"])
    with stopped(victim):
        assert await heard.next() is None
        assert not connection.connected
    await answered(connection)


@on_both_loops
async def test_an_idle_connection_that_tracks_is_pinged(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    """However long a call may take."""
    heard = Heard()
    connection = connect(server.url, 3 * DEADLINE_S, on_invalidated=heard)
    await connection.mget((), tracked=[b"k"])
    client.config_resetstat()
    await until(lambda: client.info("commandstats").get("cmdstat_ping", {}).get("calls", 0) >= 2)
    assert connection.connected
    assert heard.all == []


@on_both_loops
async def test_a_stall_of_this_process_is_no_hang(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    """Answers that came in time, but could not be read in time, count: else every long pause would empty mirrors.

    They are more than a loop reads at once, so it is not enough that it looks at sockets before timers.
    """
    client.set("k", b"v" * 100_000)
    heard = Heard()
    connection = connect(server.url, 0.5, on_invalidated=heard)
    await answered(connection)
    heard.all.clear()
    calls = [asyncio.create_task(connection.mget([b"k"])) for _ in range(15)]
    await asyncio.sleep(0)
    time.sleep(1)  # noqa: ASYNC251  # the stall
    assert await asyncio.gather(*calls) == [[b"v" * 100_000]] * 15
    assert heard.all == []


@on_both_loops
@pytest.mark.parametrize("kind", ["nobody accepts", "nobody greets"])
async def test_connecting_has_a_deadline_too(connect: Connect, kind: str) -> None:
    """Many calls at once, one attempt."""
    with socket.socket() as listening, socket.socket() as one, socket.socket() as other:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        address = listening.getsockname()
        if kind == "nobody accepts":  # The kernel's queue is full: it does not answer.
            for each in (one, other):
                each.setblocking(False)
                each.connect_ex(address)
        heard = Heard()
        connection = connect(f"redis://127.0.0.1:{address[1]}", 0.3, on_invalidated=heard)
        errors = await asyncio.gather(*(outcome(connection.mget([b"k"])) for _ in range(50)))
        assert {type(error) for error in errors} == {RedisTimeoutError}
        assert len({id(error) for error in errors}) == 50  # Shared, one would collect the tracebacks of all.
        words = "could not be reached" if kind == "nobody accepts" else "gave no answer"
        assert f"Redis at 127.0.0.1:{address[1]}/0 {words} in 0.3 s" in str(errors[0])
        await connection.aclose()  # Waits for nothing that goes on.
        listening.setblocking(False)
        accepted = []
        with suppress(BlockingIOError):
            while True:
                accepted.append(listening.accept()[0])
        for each in accepted:
            each.close()
        assert len(accepted) == 1


@on_both_loops
async def test_a_full_redis_is_named(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    """It says why and hangs up before it has read the greeting."""
    before = client.config_get("maxclients")["maxclients"]
    client.config_set("maxclients", 1)
    try:
        with pytest.raises(RedisConnectionError, match="max number of clients reached"):
            await connect(server.url, on_invalidated=Heard()).execute("PING")
    finally:
        client.config_set("maxclients", before)


@on_both_loops
async def test_a_redis_without_hello(connect: Connect) -> None:
    """The password that its error repeats is not shown."""
    refusal = b"-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `default`, `s3cret`, \r\n"
    async with pretender(saying(refusal)) as address:
        with pytest.raises(ResponseError, match=r"it must be 6\.2 or later") as caught:
            await connect(f"redis://:s3cret@{address}").execute("PING")
    assert "s3cret" not in str(caught.value)


@on_both_loops
async def test_a_redis_too_old_to_track(connect: Connect) -> None:
    """Redis up to 6.2.6 puts invalidations inside other answers, which would shift all that follow by one."""
    assert TRACKING_VERSION_MIN == (6, 2, 7)
    old = HELLO.replace(b"7.0.15", b"6.2.06")
    async with pretender(saying(old + b"+OK\r\n")) as address:
        with pytest.raises(ResponseError, match=r"is 6\.2\.06, .* update it to 6\.2\.7 or later, or read without"):
            await connect(f"redis://{address}", on_invalidated=Heard()).mget([b"a"])
    async with pretender(saying(old, b"+PONG\r\n")) as address:
        assert await connect(f"redis://{address}").execute("PING") == b"PONG"


@on_both_loops
@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "does not speak Redis' protocol"),
        ([HELLO, b"$100\r\nhalf"], "was lost: Redis closed it"),
        ([b""], "was lost: Redis closed it"),
    ],
)
async def test_what_is_no_redis(connect: Connect, answers: list[bytes], message: str) -> None:
    """Whatever it sends, calls fail and say why."""
    async with pretender(saying(*answers)) as address:
        with pytest.raises(RedisConnectionError, match=message):
            await connect(f"redis://{address}").execute("PING")


@on_both_loops
async def test_an_answer_that_nobody_asked_for_ends_the_connection(connect: Connect) -> None:
    """Else it would be taken for the next call's, and all later answers for others'."""
    async with pretender(saying(HELLO, b"+PONG\r\n+PONG\r\n")) as address:
        connection = connect(f"redis://{address}")
        assert await connection.execute("PING") == b"PONG"
        assert not connection.connected


@on_both_loops
async def test_answers_may_come_in_any_pieces(connect: Connect) -> None:
    """Also news of changed keys, which are handed out as soon as they are complete."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(HELLO + b"+OK\r\n")
        await reader.read(65536)
        stream = (
            b">2\r\n$10\r\ninvalidate\r\n*1\r\n$1\r\na\r\n*1\r\n$1\r\n1\r\n>2\r\n+other\r\n+news\r\n+OK\r\n*1\r\n_\r\n"
        )
        for byte in stream:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0)
        await reader.read()

    heard = Heard()
    async with pretender(serve) as address:
        connection = connect(f"redis://{address}", on_invalidated=heard)
        assert await connection.mget([b"a"], tracked=[b"b"]) == [b"1", None]
    assert heard.all[0] == [b"a"]


@on_both_loops
async def test_a_callback_that_raises_costs_the_connection_only(
    connect: Connect, server: EmbeddedRedis, client: Any, complaints: list[dict[str, Any]]
) -> None:
    """It must not raise; if it does, its keeper knows nothing for certain, and the callers still get an answer."""

    def broken(keys: Sequence[bytes] | None) -> None:
        raise LookupError(keys)

    connection = connect(server.url, on_invalidated=broken)
    await connection.mget((), tracked=[b"k"])
    client.set("k", "v")
    assert isinstance(await outcome(connection.execute("DEBUG", "SLEEP", 0)), RedisError | bytes)
    await until(lambda: not connection.connected)
    assert await connection.mget([b"k"]) == [b"v"]
    with pytest.raises(LookupError):
        await connection.aclose()
    assert {type(each["exception"]) for each in complaints} == {LookupError}
    complaints.clear()


# --- Closing ----------------------------------------------------------------------------------------------------------


@on_both_loops
async def test_closing(connect: Connect, victim: EmbeddedRedis) -> None:
    """What waits fails, what is asked later fails, what was kept is forgotten; twice is once."""
    events: list[Any] = []
    connection = connect(victim.url, on_invalidated=events.append)
    await connection.mget((), tracked=[b"k"])

    async def ask() -> None:
        events.append(str(await outcome(connection.mget([b"k"]))))

    with stopped(victim):
        tasks = [asyncio.create_task(ask()) for _ in range(3)]
        await asyncio.sleep(0)
        await connection.aclose()
        await asyncio.gather(*tasks)
    assert events == [None] + [f"the connection to Redis at 127.0.0.1:{victim.port}/0 was closed"] * 3
    await connection.aclose()
    with pytest.raises(RedisConnectionError, match="was closed; make a new one"):
        await connection.execute("PING")
    assert repr(connection) == f"<Connection 127.0.0.1:{victim.port}/0 closed>"


@on_both_loops
async def test_closing_while_connecting(connect: Connect, server: EmbeddedRedis) -> None:
    for turns in range(10):
        connection = connect(server.url)
        call = asyncio.create_task(outcome(connection.execute("PING")))
        for _ in range(turns):
            await asyncio.sleep(0)
        await connection.aclose()
        assert await call == b"PONG" or isinstance(await call, RedisConnectionError)


@on_both_loops
async def test_a_connection_that_was_never_used(server: EmbeddedRedis) -> None:
    connection = Connection(server.url, 5)
    assert repr(connection) == f"<Connection 127.0.0.1:{server.port}/0 away>"
    await connection.aclose()


def test_it_can_be_made_before_the_loop_runs(redis_url: str) -> None:
    connection = Connection(redis_url, 5, on_invalidated=lambda _: None)

    async def use() -> Any:
        try:
            return await connection.execute("PING")
        finally:
            await connection.aclose()

    assert asyncio.run(use()) == b"PONG"


# --- Tracking ---------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[Any], object]] = {
    "SET": lambda client: client.set("k", "new"),
    "SET of the same": lambda client: client.set("k", "old"),
    "DEL": lambda client: client.delete("k"),
    "EXPIRE at once": lambda client: client.pexpire("k", 1),
    "RENAME": lambda client: client.rename("k", "other"),
    "MULTI": lambda client: client.pipeline(transaction=True).set("k", "new").get("k").execute(),
    "Lua": lambda client: client.eval("return redis.call('MSET', KEYS[1], 'new')", 1, "k"),
}


@on_both_loops
@pytest.mark.parametrize("change", CHANGES)
async def test_a_change_is_told_once(connect: Connect, server: EmbeddedRedis, client: Any, change: str) -> None:
    """Of tracked keys only, and again only after they were read again."""
    client.mset({"k": "old", "untracked": "old"})
    heard = Heard()
    connection = connect(server.url, on_invalidated=heard)
    assert await connection.mget([b"untracked"], tracked=[b"k"]) == [b"old", b"old"]
    client.set("untracked", "new")
    CHANGES[change](client)
    assert await heard.next() == [b"k"]
    client.set("k", "newer")
    await connection.execute("PING")
    assert heard.all == []
    assert await connection.mget((), tracked=[b"k"]) == [b"newer"]
    client.set("k", "newest")
    assert await heard.next() == [b"k"]


@on_both_loops
async def test_expiry_is_told_when_it_is_carried_out(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    client.set("k", "v", px=500)
    heard = Heard()
    connection = connect(server.url, on_invalidated=heard)
    assert await connection.mget((), tracked=[b"k"]) == [b"v"]
    assert await heard.next() == [b"k"]
    assert await connection.mget([b"k"]) == [None]


@on_both_loops
async def test_a_key_that_expires_under_the_read(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    """Its invalidation, caused by this very MGET, comes after the answer and not inside it."""
    before = client.config_get("hz")["hz"]
    client.config_set("hz", 1)  # Expiry is mostly left to whoever reads.
    try:
        heard = Heard()
        connection = connect(server.url, on_invalidated=heard)
        keys = [b"%d" % at for at in range(100)]
        client.mset(dict.fromkeys(keys, b"v"))
        for key in keys[::2]:
            client.pexpire(key, 800)
        assert set(await connection.mget((), tracked=keys)) == {b"v"}
        await asyncio.sleep(0.85)
        assert await connection.mget((), tracked=keys) == [None, b"v"] * 50
        assert await connection.execute("ECHO", "x") == b"x"
        assert {key for told in heard.all for key in told or ()} == set(keys[::2])
    finally:
        client.config_set("hz", before)


@on_both_loops
async def test_a_missing_key_is_tracked_too(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    heard = Heard()
    assert await connect(server.url, on_invalidated=heard).mget((), tracked=[b"k"]) == [None]
    client.set("k", "v")
    assert await heard.next() == [b"k"]


@on_both_loops
@pytest.mark.parametrize("command", ["FLUSHALL", "FLUSHDB"])
async def test_everything_changed(connect: Connect, server: EmbeddedRedis, client: Any, command: str) -> None:
    client.set("k", "v")
    heard = Heard()
    connection = connect(server.url, on_invalidated=heard)
    await connection.mget((), tracked=[b"k"])
    client.execute_command(command)
    assert await heard.next() is None
    assert connection.connected
    assert await connection.mget((), tracked=[b"k"]) == [None]


@on_both_loops
async def test_a_lost_connection_is_told_before_anything_else(
    connect: Connect, server: EmbeddedRedis, client: Any
) -> None:
    """Before any call fails, and before the next connection answers."""
    events: list[Any] = []
    connection = connect(server.url, on_invalidated=events.append)
    await connection.mget((), tracked=[b"k"])

    async def ask() -> None:
        events.append(type(await outcome(connection.execute("BLPOP", "nothing", 0))))

    tasks = [asyncio.create_task(ask()) for _ in range(5)]
    await asyncio.sleep(0)
    await until(lambda: client.info("clients")["blocked_clients"])
    client.client_kill_filter(_type="normal")
    await asyncio.gather(*tasks)
    assert events == [None] + [RedisConnectionError] * 5
    assert await connection.mget([b"k"]) == [None]


class Mirror:
    """Keeps values as the docstring of Connection says."""

    def __init__(self) -> None:
        self.values: dict[bytes, int] = {}
        self.n_kept = self.n_refused = self.n_forgotten = 0
        self._wanted: dict[bytes, set[object]] = defaultdict(set)

    def invalidated(self, keys: Sequence[bytes] | None) -> None:
        for key in [*self._wanted, *self.values] if keys is None else keys:
            self._wanted.pop(key, None)
            self.n_forgotten += self.values.pop(key, None) is not None

    async def read(self, connection: Connection, keys: Sequence[bytes]) -> None:
        mark = object()
        for key in keys:
            self._wanted[key].add(mark)
        found = await connection.mget((), tracked=keys)
        for key, value in zip(keys, found, strict=True):
            if mark in self._wanted[key]:
                self.values[key] = int(value or 0)
                self.n_kept += 1
            else:
                self.n_refused += 1
            self._wanted[key].discard(mark)


@on_both_loops
async def test_what_is_kept_is_never_older_than_an_answer(connect: Connect, server: EmbeddedRedis, client: Any) -> None:
    """Readers, writers and lost connections at random: once a write is acknowledged and the connection has answered
    anything asked after it, no older value is kept. Keeping an answer without asking what was invalidated meanwhile
    fails this, as does telling of a lost connection too late.
    """
    seed = random.randrange(2**32)
    print(f"seed={seed}")
    rng = random.Random(seed)
    mirror = Mirror()
    reading = connect(server.url, DEADLINE_S, on_invalidated=mirror.invalidated)
    writing = connect(f"{server.url}?client_name=writer")
    keys = [b"%d" % at for at in range(12)]
    written = dict.fromkeys(keys, 0)
    n_lost = 0
    done = False

    async def reader() -> None:
        while not done:
            try:
                await mirror.read(reading, rng.sample(keys, rng.randint(1, 6)))
            except RedisConnectionError:
                await asyncio.sleep(0)
            if rng.random() < 0.3:
                await asyncio.sleep(rng.random() * 0.002)

    async def writer(own: Sequence[bytes]) -> None:
        for _ in range(600):
            key = rng.choice(own)
            written[key] += 1
            await writing.execute("SET", key, written[key])
            await answered(reading)
            assert mirror.values.get(key, written[key]) >= written[key]

    async def breaker() -> None:
        nonlocal n_lost
        while not done:
            await asyncio.sleep(0.02)
            for each in client.client_list():
                if each["name"] == "headrace":
                    n_lost += client.client_kill_filter(_id=each["id"])

    others = [asyncio.create_task(each) for each in (*(reader() for _ in range(8)), breaker())]
    await asyncio.gather(*(writer(keys[at::3]) for at in range(3)))
    done = True
    await asyncio.gather(*others)
    print(f"kept={mirror.n_kept} refused={mirror.n_refused} forgotten={mirror.n_forgotten} lost={n_lost}")
    assert min(mirror.n_kept, mirror.n_refused, mirror.n_forgotten, n_lost) > 0
