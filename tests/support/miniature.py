"""A Redis in miniature for lookups, and rows of which an answer tells the version.

In it nothing happens but step by step: so a test, or a seed, chooses in what order requests are read, answers and news
arrive and tasks go on.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Coroutine, Generator, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Final
from unittest import mock

import numpy as np
from redis.exceptions import ConnectionError as RedisConnectionError

from features import aggregations as kinds
from features.aggregations import Aggregation
from features.layout import Family, families_of
from features.plan import EntitySpec, Plan, ViewSpec
from features.program import Frame, Program
from serving.lookup import Answer, Lookup
from store.codec import encode
from store.connection import OnInvalidated
from store.keys import Keyspace
from tests.properties import scenarios
from tests.properties.scenarios import BASE_MS, DAY_MS, HOUR_MS, MINUTE_MS
from tests.support.states import State

SHARDS: Final = 4
SPACE: Final = Keyspace("test", SHARDS)
FAR_MS: Final = 4_000_000_000_000
MIRRORED: Final = ("rich", "poor")
"""The views of `racing` that are mirrored."""
_URL: Final = "redis://127.0.0.1:1"
"""Of nobody: it is never used."""


def plan_of(views: Mapping[str, Sequence[Aggregation]], forget_after: str = "900d") -> Plan:
    """A plan with views of items."""
    entity = EntitySpec("item", "item_id", forget_after)
    specs = tuple(ViewSpec(name, ("item",), tuple(own)) for name, own in views.items())  # type: ignore[arg-type]  # every Aggregation is in the union
    return Plan("test", SHARDS, (entity,), (), specs, ())


def without_tops(specs: Iterable[Aggregation]) -> list[Aggregation]:
    """Those that don't give their view's own row buckets, so that it is mirrored."""
    return [spec for spec in specs if not isinstance(spec, kinds.TopK | kinds.Entropy)]


def families(plan: Plan) -> dict[str, Family]:
    """All families by name."""
    return {family.name: family for view in plan.views for family in families_of(plan, view)}


@types.coroutine
def _turn() -> Generator[None, None, None]:
    """Lets whoever runs the coroutine do something else."""
    yield


class Call:
    """An MGET on its way to Redis and back."""

    def __init__(self, plain: Sequence[bytes], tracked: Sequence[bytes]) -> None:
        self.plain, self.tracked = plain, tracked
        self.values: list[bytes | None] = []
        self.error: Exception | None = None
        self.has_arrived = False


class Wire:
    """Stands in for `store.connection.Connection`: the same order of answers and news, one step at a time.

    Redis reads requests in order (`redis_reads`) and puts answers, and the keys that change, on a stream; they are
    taken from it in order (`receive`); and the task that waits goes on once its answer has arrived.
    """

    def __init__(self, shelf: Shelf, on_invalidated: OnInvalidated | None) -> None:
        self._shelf = shelf
        self._on_invalidated = on_invalidated
        self._remembered: set[bytes] = set()
        self.requests: deque[Call] = deque()
        self.stream: deque[tuple[int, Call | list[bytes]]] = deque()
        self.known = 0
        """How many changes there had been when Redis said what arrived last."""
        self.asked: list[bytes] = []
        shelf.wires.append(self)

    async def mget(self, keys: Sequence[bytes], *, tracked: Sequence[bytes] = ()) -> list[bytes | None]:
        """See `Connection.mget`."""
        if not keys and not tracked:
            return []
        assert not tracked or self._on_invalidated
        call = Call(keys, tracked)
        self.requests.append(call)
        self.asked += tracked
        while not call.has_arrived:
            await _turn()
        if call.error is not None:
            raise call.error
        return call.values

    def redis_reads(self) -> None:
        """The next request is carried out."""
        call = self.requests.popleft()
        call.values = [self._shelf.get(key) for key in (*call.plain, *call.tracked)]
        self._remembered.update(call.tracked)
        self.stream.append((self._shelf.n_changes, call))

    def receive(self) -> None:
        """The next answer, or news, arrives."""
        self.known, said = self.stream.popleft()
        if isinstance(said, Call):
            said.has_arrived = True
        elif self._on_invalidated is not None:
            self._on_invalidated(said)

    def changed(self, key: bytes) -> None:
        """Redis says so, once."""
        if key in self._remembered:
            self._remembered.discard(key)
            self.stream.append((self._shelf.n_changes, [key]))

    def lose(self) -> None:
        """The connection is lost: as `Connection` has it, that is said before anybody fails."""
        calls = [*self.requests, *(said for _, said in self.stream if isinstance(said, Call))]
        self.requests.clear()
        self.stream.clear()
        self._remembered.clear()
        if self._on_invalidated is not None:
            self._on_invalidated(None)
        for call in calls:
            call.has_arrived, call.error = True, RedisConnectionError("lost")

    def everything_arrives(self) -> None:
        """Requests are read and all that Redis says arrives."""
        while self.requests or self.stream:
            if self.requests:
                self.redis_reads()
            else:
                self.receive()


class Shelf:
    """Keys and values, some of which expire; as in Redis that is seen at once, and said once somebody looks."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.expire_at_ms: dict[bytes, int] = {}
        self.wires: list[Wire] = []
        self.now_ms = 0
        self.n_changes = 0

    def get(self, key: bytes) -> bytes | None:
        """The value, unless it has expired."""
        return self.values.get(key) if self.now_ms <= self.expire_at_ms.get(key, FAR_MS) else None

    def set(self, key: bytes, value: bytes, expire_at_ms: int = FAR_MS) -> None:
        """Writes a key; one without a value is deleted."""
        self.n_changes += 1
        self.values.pop(key, None)
        if value:
            self.values[key], self.expire_at_ms[key] = value, expire_at_ms
        for wire in self.wires:
            wire.changed(key)

    def drop_expired(self) -> None:
        """What Redis does in the background."""
        for key in [key for key in self.values if self.get(key) is None]:
            self.set(key, b"")

    def look(self, plan: Plan, mirror_rows: int) -> tuple[Lookup, Wire]:
        """A lookup on a wire of its own."""
        with mock.patch("serving.lookup.Connection", lambda *_, on_invalidated: Wire(self, on_invalidated)):
            lookup = Lookup.connect(plan, _URL, 1, mirror_rows)
        return lookup, self.wires[-1]


Reading = Coroutine[Any, Any, Answer]


def everything(lookup: Lookup) -> Program:
    """All features of a plan."""
    return lookup.program(tuple(lookup.plan.features))


def reading(lookup: Lookup, ids: Sequence[str], now_ms: int, program: Program | None = None) -> Reading:
    """Reads all features of items, or a program's."""
    return lookup.read(program or everything(lookup), {"item": ids}, {"item": np.arange(len(ids))}, now_ms)


def begun(flight: Reading) -> Reading:
    """The reading, its request sent."""
    flight.send(None)
    return flight


def finished(flight: Reading) -> Answer:
    """The answer of a reading that has all that it needs."""
    try:
        flight.send(None)
    except StopIteration as done:
        answer: Answer = done.value
        return answer
    message = "it still waits"
    raise AssertionError(message)


def read(lookup: Lookup, wire: Wire, ids: Sequence[str], now_ms: int, program: Program | None = None) -> Answer:
    """A reading with nothing in between."""
    flight = reading(lookup, ids, now_ms, program)
    try:
        flight.send(None)
    except StopIteration as done:
        answer: Answer = done.value
        return answer
    wire.everything_arrives()
    return finished(flight)


def exact(frame: Frame) -> dict[str, Any]:
    """All of a frame, numbers as their bits."""
    found: dict[str, Any] = {name: values.tolist() for name, values in frame.found.items()}
    found |= {f"{name} last": values.tolist() for name, values in frame.last_event_ms.items()}
    for name, values in frame.values.items():
        is_number = isinstance(values, np.ndarray)
        found[name] = values.view(np.int64).tolist() if is_number else values.array().to_pylist()  # type: ignore[union-attr]  # as asked
    return found


def differences(got: Answer, want: Answer) -> list[str]:
    """What is not the same, to the bit."""
    ours, theirs = exact(got.frame), exact(want.frame)
    assert ours.keys() == theirs.keys()
    return [f"{name}: {ours[name]} is not {theirs[name]}" for name in ours if ours[name] != theirs[name]]


def numbers(answer: Answer, name: str) -> list[float]:
    """The values of a feature that is a number."""
    values = answer.frame.values[name]
    assert isinstance(values, np.ndarray)
    found: list[float] = values.tolist()
    return found


def versions_of(plan: Plan, n: int) -> list[dict[str, bytes]]:
    """For each of n versions, the bytes of a row of every family: of the first, no bytes."""
    rng = np.random.default_rng(n)
    events = []
    for version in range(1, n):
        mark = {"row": version, "item_id": f"mark {version}", "category": f"sort {version % 7}"}
        events.append({**mark, "contract": "Like", "t": BASE_MS - 5_000, "price": float(version)})
        for age_ms in rng.exponential(HOUR_MS, rng.integers(1, 5)):
            own = {"item_id": f"of {version}", "category": None, "price": float(rng.integers(1000)) / 8}
            events.append({"contract": "Click", "row": version, "t": BASE_MS + MINUTE_MS - int(age_ms), **own})
    state = State(plan, n)
    state.merge(scenarios.batches_of(events), BASE_MS - DAY_MS)
    blobs = {name: encode(family, rows) for name, (family, rows) in state.rows.items()}
    return [{name: own[version] for name, own in blobs.items()} for version in range(n)]


def version_of(answer: Answer, family: str) -> list[int]:
    """The version of each row."""
    return [0 if np.isnan(number) else int(number) for number in numbers(answer, f"{family}__version")]


@cache
def racing() -> tuple[Plan, list[dict[str, bytes]]]:
    """Two views that are mirrored and one that isn't, in thousands of versions."""
    over = ("1m", "10m", "1h", "24h")
    version = kinds.Last(name="version", event="Like", field="price", kind="float")
    mark = kinds.Last(name="mark", event="Like", field="item_id", kind="str")
    rich = [
        spec
        for spec in without_tops(scenarios.plain(over))
        if not isinstance(spec, kinds.LastK | kinds.FirstK | kinds.Distinct | kinds.Quantile | kinds.Sequence)
    ]
    plan = plan_of(
        {
            "rich": [*rich, version, mark],
            "poor": [kinds.Count(name="clicks", event="Click", over=over), version],
            "tops": [kinds.TopK(name="top", event="Like", field="category", k=2, over=over, buckets=8), version],
        }
    )
    return plan, versions_of(plan, 3_000)


class Truth:
    """What an answer must be, given the version of each row in it."""

    def __init__(self) -> None:
        self.plan, self.versions = racing()
        self._families = families(self.plan)
        self._shelf = Shelf()
        self._lookup, self._wire = self._shelf.look(self.plan, 0)

    def check(self, answer: Answer, ids: Sequence[str]) -> dict[str, list[int]]:
        """The versions in an answer, each row of which is of just one, and the same wherever its id stands."""
        named = {feature.full_name.partition("__")[0] for feature in answer.features}
        found = {family: version_of(answer, family) for family in named}
        self._shelf.values.clear()
        places = [str(at) for at in range(len(ids))]
        for family, own in found.items():
            assert len({*zip(ids, own, strict=True)}) == len({*ids}), "one request has two versions of a row"
            keys = SPACE.rows(self._families[family], [place.encode() for place in places])
            self._shelf.values |= {
                key: self.versions[version][family] for key, version in zip(keys, own, strict=True) if version
            }
        program = self._lookup.program(tuple(feature.full_name for feature in answer.features))
        want = read(self._lookup, self._wire, places, answer.as_of_ms, program)
        assert differences(answer, want) == []
        return found
