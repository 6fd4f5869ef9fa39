"""The mirror: what it keeps answers like Redis itself, whoever writes, whatever the time, however small it is."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features import aggregations as kinds
from features.plan import Plan
from features.totals import stay_until_ms
from features.values import Texts
from serving.lookup import Answer
from serving.problems import Problem
from store.codec import encode
from store.keys import expire_at_ms
from tests.properties import scenarios
from tests.properties.scenarios import BASE_MS, DAY_MS, HOUR_MS, MINUTE_MS, Merge
from tests.support.miniature import (
    MIRRORED,
    SPACE,
    Reading,
    Shelf,
    Truth,
    Wire,
    begun,
    differences,
    everything,
    families,
    finished,
    numbers,
    plan_of,
    read,
    reading,
    version_of,
    without_tops,
)
from tests.support.states import OracleEvent, State


def count(over: str = "10m") -> Plan:
    """A plan of one count."""
    return plan_of({"view": [kinds.Count(name="clicks", event="Click", over=(over,))]})


def click(at_ms: int, **fields: Any) -> OracleEvent:
    return {"contract": "Click", "row": 0, "t": at_ms, **fields}


def rows_of(plan: Plan, events: Iterable[OracleEvent], now_ms: int = 0, n_rows: int = 1) -> State:
    """The rows that events make."""
    state = State(plan, n_rows)
    state.merge(scenarios.batches_of(events), now_ms)
    return state


def put(shelf: Shelf, state: State, ids: Sequence[str]) -> None:
    """Commits the rows that have changed."""
    for family, rows in state.rows.values():
        expires = expire_at_ms(family, rows.last_event_ms).tolist()
        keys = SPACE.rows(family, [each.encode() for each in ids])
        for key, value, expire in zip(keys, encode(family, rows), expires, strict=True):
            if value != shelf.values.get(key, b""):
                shelf.set(key, value, expire)


# --- Time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event_ms", "edge_ms", "before", "after"),
    [
        # 10m moves by 1m:  10:00:30 |--- 10:01 … 10:10 ---|10:11   the tile leaves as the window begins at 10:01.
        (30_000, 11 * MINUTE_MS, 1, 0),
        # On an edge it counts as long as the window begins with it.
        (0, 11 * MINUTE_MS, 1, 0),
        (MINUTE_MS - 1, 11 * MINUTE_MS, 1, 0),
        (MINUTE_MS, 12 * MINUTE_MS, 1, 0),
        # Ahead of its time an event counts once its tile begins.
        (20 * MINUTE_MS + 59_999, 20 * MINUTE_MS, 0, 1),
        (21 * MINUTE_MS, 21 * MINUTE_MS, 0, 1),
    ],
)
def test_a_row_is_kept_until_a_tile_enters_or_leaves_a_window(
    event_ms: int, edge_ms: int, before: int, after: int
) -> None:
    """Up to the millisecond before, Redis isn't asked; from then on the window has moved.

    A mirror that keeps rows for a fixed time, or until the next hop of the clock, fails this on one side or the other.
    """
    shelf, plan = Shelf(), count("10m")
    put(shelf, rows_of(plan, [click(BASE_MS + event_ms)]), ["i"])
    lookup, wire = shelf.look(plan, 4)

    def clicks(at_ms: int) -> float:
        (found,) = numbers(read(lookup, wire, ["i"], BASE_MS + at_ms), "view__clicks_10m")
        return found

    assert clicks(5 * MINUTE_MS) == before
    assert clicks(edge_ms - 1) == before
    assert len(wire.asked) == 1
    assert clicks(edge_ms) == after
    assert len(wire.asked) == 2


def test_an_earlier_query_is_answered_as_of_its_own_time() -> None:
    """`as_of` may lie before the time at which the row was kept: a tile may have left since."""
    #  10:00 click      10:10:59.999 as_of | 10:11 kept
    shelf, plan = Shelf(), count("10m")
    put(shelf, rows_of(plan, [click(BASE_MS)]), ["i"])
    lookup, wire = shelf.look(plan, 4)
    edge_ms = BASE_MS + 11 * MINUTE_MS
    times_ms = (edge_ms, edge_ms - 1, edge_ms)
    assert [numbers(read(lookup, wire, ["i"], at), "view__clicks_10m") for at in times_ms] == [[0], [1], [0]]


def test_a_row_is_kept_until_it_expires() -> None:
    """Redis need not say so in time: it tells of an expired key only once it comes across it."""
    shelf, plan = (
        Shelf(),
        plan_of({"view": [kinds.Last(name="price", event="Click", field="price", kind="float")]}, "1d"),
    )
    put(shelf, rows_of(plan, [click(BASE_MS, price=3.0)]), ["i"])
    lookup, wire = shelf.look(plan, 4)
    found = []
    for shelf.now_ms in (BASE_MS, BASE_MS + DAY_MS - 1, BASE_MS + DAY_MS, BASE_MS + DAY_MS + 1):
        found.append(read(lookup, wire, ["i"], shelf.now_ms).statuses("item"))
    assert found == [["PRESENT"]] * 3 + [["NOT_FOUND"]]
    assert len(wire.asked) == 3


IDS: Final = ("i1", "é:{}", "i3")


@given(st.data())
def test_kept_rows_answer_as_if_they_were_read_at_any_time(data: st.DataObject) -> None:
    """Whole answers, to the bit, of every aggregation: at window edges and a millisecond beside them, with events of
    the future, rows that expire, and queries that go back a little.
    """
    own = data.draw(st.sampled_from([scenarios.plain, scenarios.conditional]))(data.draw(scenarios.window_sets))
    plan = plan_of({"view": without_tops(own)}, data.draw(st.sampled_from(["1d", "100d", "900d"])))
    state, shelf = State(plan, len(IDS)), Shelf()
    mirrored, wire = shelf.look(plan, data.draw(st.sampled_from([1, 2, 8])))
    plain, plain_wire = shelf.look(plan, 0)
    assert list(mirrored.mirrors) == ["view"]
    family, _ = state.rows["view"]
    for step in data.draw(
        scenarios.histories(len(IDS), future_ms=data.draw(st.sampled_from([0, HOUR_MS, 2 * DAY_MS])))
    ):
        if isinstance(step, Merge):
            scenarios.run(state, step)
            put(shelf, state, IDS)
            wire.everything_arrives()
            continue
        at_ms = step.at_ms
        for _ in range(data.draw(st.integers(2, 8))):
            if at_ms < shelf.now_ms:
                # What the mirror still has, and Redis has seen go, is right for a query that goes back; but not equal.
                shelf.drop_expired()
                wire.everything_arrives()
            shelf.now_ms = max(shelf.now_ms, at_ms)
            ids = data.draw(st.lists(st.sampled_from([*IDS, "nobody"]), min_size=1, max_size=6))
            got = read(mirrored, wire, ids, at_ms)
            assert differences(got, read(plain, plain_wire, ids, at_ms)) == []
            rows = state.rows["view"][1]
            edges = [*stay_until_ms(family.alone, rows, at_ms), *expire_at_ms(family, rows.last_event_ms)]
            ahead = [int(edge) for edge in edges if at_ms <= edge < at_ms + 100 * DAY_MS]
            nudge = data.draw(st.sampled_from([-10_000, -1, 0, 0, 1, 10_000]))
            at_ms = max(step.at_ms, data.draw(st.sampled_from([at_ms, *ahead])) + nudge)


# --- Changes while a row is being read --------------------------------------------------------------------------------


class Stock:
    """Items of which each has one row, in a version that can be told from it."""

    def __init__(self, ids: Sequence[str], mirror_rows: int) -> None:
        self.truth, self.shelf = Truth(), Shelf()
        self.lookup, self.wire = self.shelf.look(self.truth.plan, mirror_rows)
        self.mirror = self.lookup.mirrors["rich"]
        self._family = families(self.truth.plan)["rich"]
        self._program = self.lookup.program(
            tuple(name for name in self.truth.plan.features if name.startswith("rich__"))
        )
        for own in ids:
            self.change(own, 1)

    def change(self, own: str, version: int) -> None:
        """A row changes, of which news arrives after all that Redis has said before; tasks have yet to go on."""
        self.shelf.set(SPACE.rows(self._family, [own.encode()])[0], self.truth.versions[version]["rich"])
        self.wire.everything_arrives()

    def begin(self, *ids: str) -> Reading:
        """A reading, its request sent."""
        return begun(reading(self.lookup, ids, BASE_MS, self._program))

    def end(self, flight: Reading) -> list[int]:
        """The versions that a reading finds."""
        return version_of(finished(flight), "rich")

    def read(self, *ids: str) -> Answer:
        """Reads with nothing in between."""
        self.wire.asked.clear()
        return read(self.lookup, self.wire, ids, BASE_MS, self._program)

    def versions(self, *ids: str) -> list[int]:
        """Of each id; they are right in all else too."""
        return self.truth.check(self.read(*ids), ids)["rich"]

    @property
    def n_asked(self) -> int:
        """How many rows the last reading took from Redis."""
        return len(self.wire.asked)


def test_a_row_that_changes_while_it_is_read_is_not_kept() -> None:
    """The answer may be the old row, the next must be the new one.

    A mirror that keeps whatever it was given, and heeds only news of rows that it has, would serve the old row for ever
    after: Redis tells of a change once.
    """
    stock = Stock(["i"], 8)
    flight = stock.begin("i", "j")
    stock.wire.redis_reads()
    stock.change("i", 2)
    assert stock.end(flight) == [1, 0]
    assert len(stock.mirror) == 1
    assert stock.versions("i", "j") == [2, 0]
    assert stock.n_asked == 1


def test_who_reads_late_does_not_overwrite() -> None:
    """Of two readings, the one that began after the change is done first: what it kept, the other must leave."""
    stock = Stock(["i"], 8)
    first = stock.begin("i")
    stock.wire.redis_reads()
    stock.change("i", 2)
    second = stock.begin("i")
    stock.wire.everything_arrives()
    assert stock.end(second) == [2]
    assert stock.end(first) == [1]
    assert stock.versions("i") == [2]
    assert stock.n_asked == 0


def test_each_reading_has_its_own_mark() -> None:
    """News of a row between two readings of it concerns the first. With one mark for both, which the second sets anew,
    the first would keep the old row.
    """
    stock = Stock(["i"], 8)
    first = stock.begin("i")
    stock.wire.redis_reads()
    stock.change("i", 2)
    second = stock.begin("i")
    assert stock.end(first) == [1]
    assert len(stock.mirror) == 0
    stock.wire.everything_arrives()
    stock.change("i", 3)
    assert stock.end(second) == [2]
    assert len(stock.mirror) == 0
    assert stock.versions("i") == [3]


@pytest.mark.parametrize("arrived", [False, True])
def test_nothing_read_on_a_lost_connection_is_kept(*, arrived: bool) -> None:
    """Also not what had arrived when it was lost: of changes since then nobody tells."""
    stock = Stock(["kept", "new"], 8)
    assert stock.versions("kept") == [1]
    flight = stock.begin("kept", "new")
    stock.wire.redis_reads()
    if arrived:
        stock.wire.receive()
    stock.wire.lose()
    assert len(stock.mirror) == 0
    for own in ("kept", "new"):
        stock.change(own, 2)
    if arrived:
        assert stock.end(flight) == [1, 1]
    else:
        with pytest.raises(Problem):
            stock.end(flight)
    assert stock.versions("kept", "new") == [2, 2]


def test_readings_that_fail_or_are_given_up_leave_nothing_behind() -> None:
    """No mark of theirs stays, and no row of an answer that can't be read."""
    stock = Stock(["good"], 8)
    (key,) = SPACE.rows(families(stock.truth.plan)["rich"], [b"bad"])
    stock.shelf.set(key, b"no row")
    with pytest.raises(Problem, match=r"Redis key '\{test:item:.\}:rich:bad'"):
        stock.read("bad", "good")
    stock.begin("good").close()
    stock.wire.everything_arrives()
    assert len(stock.mirror) == 0
    assert stock.mirror._readings == []
    stock.change("bad", 1)
    assert stock.versions("bad", "good") == [1, 1]


class Simulated:
    """Readers on several wires, and a writer, in an order that a seed chooses; every answer is checked as it is given.

    Of what Redis said on a wire, something has arrived last: whoever begins to read then must be given no row that had
    changed when Redis said it.
    """

    def __init__(self, rng: random.Random, mirror_rows: Sequence[int], n_ids: int) -> None:
        self.truth, self.shelf, self.rng = Truth(), Shelf(), rng
        self.sides = [self.shelf.look(self.truth.plan, rows) for rows in mirror_rows]
        self.counts: Counter[str] = Counter()
        self._ids = [f"i{at}" for at in range(n_ids)]
        self._families = families(self.truth.plan)
        # The versions of each row, each with the number of the change that made it.
        self._history = {(family, own): [(0, 0)] for family in self._families for own in self._ids}
        self._next_version = 1
        self._now_ms = BASE_MS
        self._flights: list[tuple[Wire, Reading, list[str], int]] = []
        names = list(self.truth.plan.features)
        mirrored = [name for name in names if name.partition("__")[0] in MIRRORED]
        self._asked = [names, mirrored, [name for name in mirrored if name.startswith("rich")]]

    def step(self) -> None:
        """Something happens, as likely as its weight says."""
        todo: list[tuple[Callable[[], None], float]] = [
            (self.begin, 30),
            (self.redis_reads, 40),
            (self.receive, 60),
            (self.go_on, 60),
            (self.write, 15),
        ]
        todo += [(self.give_up, 1), (self.lose, 0.3), (self.later, 3)]
        self.rng.choices([each for each, _ in todo], [weight for _, weight in todo])[0]()

    def begin(self) -> None:
        lookup, wire = self.rng.choice(self.sides)
        ids = self.rng.choices(self._ids, weights=range(len(self._ids), 0, -1), k=self.rng.randint(1, 8))
        program = lookup.program(tuple(self.rng.choice(self._asked)))
        at_ms = self._now_ms - self.rng.choice([0, 0, 0, 1, 10_000])
        flight, since = reading(lookup, ids, at_ms, program), wire.known
        try:
            flight.send(None)
        except StopIteration as done:
            self.counts["from mirrors alone"] += 1
            self._check(done.value, ids, since)
        else:
            self._flights.append((wire, flight, ids, since))

    def redis_reads(self) -> None:
        if waiting := [wire for _, wire in self.sides if wire.requests]:
            self.rng.choice(waiting).redis_reads()

    def receive(self) -> None:
        if waiting := [wire for _, wire in self.sides if wire.stream]:
            self.rng.choice(waiting).receive()

    def go_on(self) -> None:
        """A task goes on, which is in vain if its answer has not arrived."""
        if not self._flights:
            return
        wire, flight, ids, since = self._flights.pop(self.rng.randrange(len(self._flights)))
        try:
            flight.send(None)
        except StopIteration as done:
            self._check(done.value, ids, since)
        except Problem:
            self.counts["failed"] += 1
        else:
            self._flights.append((wire, flight, ids, since))

    def give_up(self) -> None:
        if self._flights:
            self._flights.pop(self.rng.randrange(len(self._flights)))[1].close()
            self.counts["given up"] += 1

    def lose(self) -> None:
        self.rng.choice(self.sides)[1].lose()
        self.counts["lost"] += 1

    def later(self) -> None:
        self._now_ms += int(self.rng.expovariate(1 / 20_000))

    def write(self) -> None:
        """An item's rows change, or one of them does, or goes."""
        own, version = self.rng.choice(self._ids), self._next_version
        self._next_version += 1
        for family in self._families if self.rng.random() < 0.8 else [self.rng.choice(list(self._families))]:
            made = 0 if self.rng.random() < 0.1 else version
            (key,) = SPACE.rows(self._families[family], [own.encode()])
            self.shelf.set(key, self.truth.versions[made][family])
            self._history[family, own].append((self.shelf.n_changes, made))
        self.counts["writes"] += 1

    def settle(self) -> None:
        """Nothing is left under way."""
        for _, wire in self.sides:
            wire.everything_arrives()
        while self._flights:
            self.go_on()

    def check_all(self) -> None:
        """Every row is the present one."""
        for lookup, wire in self.sides:
            for _ in range(2):
                since = self.shelf.n_changes
                self._check(read(lookup, wire, self._ids, self._now_ms, everything(lookup)), self._ids, since)

    def _check(self, answer: Answer, ids: Sequence[str], since: int) -> None:
        found = self.truth.check(answer, ids)
        for family, versions in found.items():
            for own, version in zip(ids, versions, strict=True):
                history = self._history[family, own]
                oldest = max(at for at, (change, _) in enumerate(history) if change <= since)
                assert version in [made for _, made in history[oldest:]], (family, own, version, since, history)
        self.counts["answers"] += 1
        self.counts["rows of an item unlike"] += any(len(set(each)) > 1 for each in zip(*found.values(), strict=True))


@pytest.mark.parametrize(
    ("mirror_rows", "n_ids"), [((0, 3, 20), 10), ((1, 2, 1), 4), ((100, 50, 30), 60)], ids=["some", "tiny", "ample"]
)
def test_no_answer_is_older_than_what_was_known(mirror_rows: Sequence[int], n_ids: int) -> None:
    """Readers that overlap, changes at any point between, lost connections, tasks given up, rows and texts thrown out.

    It fails for a mirror that keeps rows which changed while they were read, that marks them after asking, that has one
    mark for all readings, that forgets what it holds and not what is being read when the connection is lost, or that
    gives a place away while somebody still reads from it.
    """
    seed = random.randrange(2**32)
    print(f"seed={seed}")
    race = Simulated(random.Random(seed), mirror_rows, n_ids)
    for _ in range(8_000):
        race.step()
    race.settle()
    race.check_all()
    mirrors = [lookup.mirrors["rich"] for lookup, _ in race.sides if lookup.mirrors]
    print(dict(race.counts), mirrors)
    assert min(race.counts[name] for name in ("failed", "given up", "lost")) > 0
    assert all(mirror.hits for mirror in mirrors)
    assert all(mirror._readings == [] for mirror in mirrors)


# --- Bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mirror_rows", [1, 2, 7, 64])
def test_it_keeps_no_more_rows_than_it_may(mirror_rows: int) -> None:
    """Also when one request asks for more; and it fills all that it may."""
    ids = [f"i{at}" for at in range(50)]
    stock, rng = Stock(ids, mirror_rows), random.Random(mirror_rows)
    for _ in range(30):
        asked = rng.choices(ids, k=rng.randint(1, 100))
        assert stock.versions(*asked) == [1] * len(asked)
        assert stock.n_asked <= len({*asked})
        assert len(stock.mirror) <= mirror_rows
    assert len(stock.mirror) == min(mirror_rows, len(ids))
    assert stock.versions(*ids) == [1] * len(ids)
    assert stock.n_asked == max(0, len(ids) - mirror_rows)


def test_rows_that_changed_leave_room_for_others() -> None:
    """Nothing is thrown out while there are free places: a hand that takes no heed of them loses a row for each one."""
    ids = [f"i{at}" for at in range(100)]
    stock, rng = Stock(ids, len(ids)), random.Random(1)
    stock.read(*ids)
    for version in range(2, 12):
        changed = rng.sample(ids, 20)
        for own in changed:
            stock.change(own, version)
        assert len(stock.mirror) == 80
        stock.read(*changed)
        assert stock.n_asked == 20
        stock.read(*ids)
        assert stock.n_asked == 0


@pytest.mark.parametrize("n_strangers", [0, 10])
def test_what_is_asked_for_often_stays(n_strangers: int) -> None:
    """Of 2,000 items by Zipf's law it has room for 200; with or without others that are asked for just once, it hits
    as often as one that always throws out what was used least lately.
    """
    rng = np.random.default_rng(3)
    weights = 1 / np.arange(1, 2001)
    stock = Stock([], 200)
    latest: dict[str, None] = {}
    hits: Counter[str] = Counter()
    for turn in range(500):
        ids = [f"i{at}" for at in rng.choice(2000, 20, p=weights / weights.sum())]
        ids += [f"once {turn} {at}" for at in range(n_strangers)]
        stock.read(*ids)
        hits["ours"] += len({*ids}) - stock.n_asked
        hits["ideal"] += len({*ids} & latest.keys())
        for own in ids:
            latest.pop(own, None)
            latest[own] = None
        for own in [*latest][: max(0, len(latest) - 200)]:
            del latest[own]
    print(dict(hits), stock.mirror)
    assert hits["ours"] > 0.95 * hits["ideal"] > 1000


def test_hits_and_misses_are_counted() -> None:
    stock = Stock(["a", "b"], 8)
    stock.read("a", "nobody")
    stock.read("a", "b", "a", "nobody")
    assert (stock.mirror.hits, stock.mirror.misses) == (3, 3)
    assert repr(stock.mirror) == "<Mirror rich rows=3/8 hits=3 misses=3>"


def test_an_id_may_stand_in_a_request_many_times() -> None:
    """It is read once and answered each time, whether it is kept, new or of nobody."""
    stock = Stock(["a", "b"], 8)
    stock.change("b", 2)
    assert stock.versions("b", "b") == [2, 2]
    assert stock.versions("a", "b", "a", "nobody", "b", "nobody", "a") == [1, 2, 1, 0, 2, 0, 1]
    assert stock.n_asked == 2
    assert stock.versions("nobody", "a", "a") == [0, 1, 1]
    assert stock.n_asked == 0


def test_an_id_never_seen_is_kept_as_such_until_its_first_event() -> None:
    stock = Stock([], 8)
    assert stock.read("new").statuses("item") == ["NOT_FOUND"]
    assert stock.versions("new") == [0]
    assert stock.n_asked == 0
    stock.change("new", 1)
    assert stock.read("new").statuses("item") == ["PRESENT"]
    assert stock.versions("new") == [1]
    stock.change("new", 0)
    assert stock.versions("new") == [0]


def test_no_request_at_all() -> None:
    stock = Stock(["a"], 8)
    assert stock.versions() == []
    assert stock.versions("a") == [1]
    assert stock.versions() == []


ODD_IDS: Final = (
    *("a", "a ", " a", "A", "é", "e\u0301", "中", "\uffff", "😀", "\U0010ffff", "\u200b", "\r\n$1\r\nx", "\x00"),
    *(":", "a:b", "{", "}", "{}", "}:", "{test:item:0}:rich:a", "}:poor:a", "rich", "rich:a", ":commit", "x" * 256),
)


def test_ids_may_be_any_text() -> None:
    """News of one is news of that one: all others stay."""
    stock = Stock(ODD_IDS, 64)
    assert stock.versions(*ODD_IDS) == [1] * len(ODD_IDS)
    for at, own in enumerate(ODD_IDS):
        stock.change(own, 2)
        assert stock.versions(*ODD_IDS) == [2] * (at + 1) + [1] * (len(ODD_IDS) - at - 1)
        assert stock.n_asked == 1


def test_texts_are_bounded() -> None:
    """Every row brings new ones, thousands in all: at some point everything is forgotten, and the answers stay right,
    also those of readings that had begun before.
    """
    ids = [f"i{at}" for at in range(40)]
    stock = Stock([], 10)
    most = n_hits = n_emptied = 0
    for turn in range(70):
        versions = {own: 1 + turn * 40 + at for at, own in enumerate(ids)}
        for own, version in versions.items():
            stock.change(own, version)
        stock.read(*ids[:4])
        late = stock.begin(*ids[2:8])
        before = len(stock.mirror)
        answer = stock.read(*ids[8:])
        n_emptied += len(stock.mirror) < before
        assert stock.truth.check(finished(late), ids[2:8])["rich"] == [versions[own] for own in ids[2:8]]
        assert stock.versions(*ids[-20:]) == [versions[own] for own in ids[-20:]]
        n_hits += 20 - stock.n_asked
        marks = answer.frame.values["rich__mark"]
        assert isinstance(marks, Texts)
        most = max(most, len(marks.texts))
    print(f"texts={most} hits={n_hits} emptied={n_emptied}")
    assert most <= 8 * 10 + 1024 + 2 * len(ids)
    assert n_emptied >= 2
    assert n_hits > 0


def test_the_bytes_of_texts_are_bounded() -> None:
    """A few long ones count for many: texts may have 1 kB each, and a mirror must not grow to 9 kB a row by them."""
    ids = [f"i{at}" for at in range(200)]
    plan, shelf = plan_of({"view": [kinds.Last(name="mark", event="Click", field="item_id", kind="str")]}), Shelf()
    events = [{"contract": "Click", "row": at, "t": BASE_MS, "item_id": own + "😀" * 250} for at, own in enumerate(ids)]
    put(shelf, rows_of(plan, events, n_rows=len(ids)), ids)
    lookup, wire = shelf.look(plan, 10)
    n_bytes = []
    for at in range(0, len(ids), 5):
        marks = read(lookup, wire, ids[at : at + 5], BASE_MS).frame.values["view__mark"]
        assert isinstance(marks, Texts)
        assert marks.array().to_pylist() == [own + "😀" * 250 for own in ids[at : at + 5]]
        n_bytes.append(sum(len(text.encode()) for text in marks.texts.to_pylist()))
    assert max(n_bytes) <= 64 * (8 * 10 + 1024) + 5 * 1010
