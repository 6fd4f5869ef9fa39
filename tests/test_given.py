"""Given features: rows hold what was written, whatever it is, and an older row never takes a newer one's place."""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
import redis
from hypothesis import given as examples
from hypothesis import strategies as st

from features.given import Fields, GivenRowError, GivenRows, kind_of, plain
from features.values import Objects, to_json, to_python
from store.connect import connect
from store.given import GivenStore
from store.read import ForeignValueError
from tests.properties import scenarios  # noqa: F401  # its profile prints what repeats a failure

KINDS: dict[str, st.SearchStrategy[Any]] = {
    "Int64": st.integers(-(1 << 63), (1 << 63) - 1),
    "Int32": st.integers(-(1 << 31), (1 << 31) - 1),
    "Float64": st.floats(allow_nan=False),
    "Bool": st.booleans(),
    "String": st.text(max_size=20),
    "Array(String)": st.lists(st.text(max_size=5), max_size=4),
    "Array(Float64)": st.tuples(st.just(15), st.lists(st.floats(allow_nan=False), max_size=4)).map(list),
    "Bytes": st.tuples(st.just(1), st.binary(max_size=9)).map(list),
}
NAMES = ["a", "b", "c", "d", "e"]
LATER_MS = 4_000_000_000_000


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[Fields], list[tuple[int, dict[str, Any]] | None]]:
    """Fields as they change, the last the view's own; and of each row with which it was written, and its values."""
    schema = st.lists(st.sampled_from(NAMES), unique=True, max_size=5).flatmap(
        lambda names: st.tuples(*(st.tuples(st.just(name), st.sampled_from(sorted(KINDS))) for name in names))
    )
    schemas = [Fields.of(each) for each in draw(st.lists(schema, min_size=1, max_size=3))]
    rows: list[tuple[int, dict[str, Any]] | None] = []
    for _ in range(draw(st.integers(0, 8))):
        if draw(st.booleans()) and draw(st.booleans()):
            rows.append(None)
            continue
        which = draw(st.integers(0, len(schemas) - 1))
        values = {field.name: draw(st.none() | KINDS[field.dtype]) for field in schemas[which].fields}
        rows.append((which, values))
    return schemas, rows


@examples(tables())
def test_rows_hold_what_was_written(table: tuple[list[Fields], list[tuple[int, dict[str, Any]] | None]]) -> None:
    """Exactly, by every way out, also where rows were written with other fields; what had another kind is null."""
    schemas, written = table
    known, own = {each.tag: each for each in schemas}, schemas[-1]
    blobs = [row and schemas[row[0]].pack(row[1], 7 + at, 0) for at, row in enumerate(written)]
    rows = GivenRows(own, blobs, known.get)
    assert rows.found.tolist() == [row is not None for row in written]
    assert rows.event_us.tolist() == [0 if row is None else 7 + at for at, row in enumerate(written)]
    for field in own.fields:
        expected = [row and _of(field.kind, schemas[row[0]], row[1], field.name) for row in written]
        raw = rows.raw(field.name)
        assert raw == expected
        assert [type(value) for value in raw] == [type(value) for value in expected]
        shown = [plain(value) for value in expected] if field.kind == "any" else expected
        value = rows.value(field.name)
        assert to_python(value, field.kind) == to_json(Objects(shown), "any")
        if field.kind in ("int", "float", "bool"):
            numbers = [math.nan if number is None else float(number) for number in expected]
            np.testing.assert_array_equal(rows.number(field.name), np.array(numbers, np.float64))


def _of(kind: str, fields: Fields, values: dict[str, Any], name: str) -> Any:
    """What a view with a field of this kind sees of a row."""
    before = fields.kinds.get(name)
    if before == kind:
        return values[name]
    return float(values[name]) if (before, kind) == ("int", "float") and values[name] is not None else None


def test_values_of_another_type_are_refused_by_name() -> None:
    """Else a number's bytes would be a text's."""
    fields = Fields.of([("price", "Float64"), ("stock", "Int32"), ("name", "String")])
    for values, said in (
        ({"price": "9"}, "price: '9' is no float"),
        ({"stock": 1.5}, "stock: 1.5 is no int"),
        ({"name": 3}, "name: 3 is no str"),
    ):
        with pytest.raises(ValueError, match=said):
            fields.pack(values, 0, 0)
    rows = GivenRows(fields, [fields.pack({"price": math.nan, "other": 1}, 0, 0)])
    assert [rows.raw(name) for name in ("price", "stock", "name")] == [[None]] * 3


def test_what_is_no_row_is_an_error_that_says_where() -> None:
    """Cut short, longer, of no fields that are known, or nothing at all: never another row's values."""
    fields = Fields.of([("price", "Float64"), ("name", "String"), ("tags", "Array(String)")])
    row = fields.pack({"price": 1.0, "name": "coat", "tags": ["a"]}, 5, 6)
    for broken in (row[:-1], row + b"x", row[:12], row[:8], b"", b"12345678" + row[8:]):
        with pytest.raises(GivenRowError) as error:
            GivenRows(fields, [row, None, broken])
        assert error.value.place == 2
    cut = [row[:end] for end in range(len(row))]
    assert all(_refused(fields, each) for each in cut)


def _refused(fields: Fields, blob: bytes) -> bool:
    try:
        GivenRows(fields, [blob])
    except GivenRowError:
        return True
    return False


def test_a_row_that_is_too_old_has_no_values() -> None:
    """It is told from one that is not there."""
    fields = Fields.of([("price", "Float64"), ("name", "String"), ("tags", "Array(String)")])
    values = {"price": 1.0, "name": "coat", "tags": ["a"]}
    rows = GivenRows(fields, [fields.pack(values, at, 0) for at in (100, 200)] + [None]).limited(300, 150)
    assert (rows.found.tolist(), rows.outside.tolist()) == ([True, True, False], [True, False, False])
    assert rows.raw("price") == [None, 1.0, None]
    assert rows.raw("name") == [None, "coat", None]
    assert rows.raw("tags") == [None, ["a"], None]
    assert rows.limited(350, 150).outside.tolist() == [True, False, False]
    assert rows.limited(351, 150).outside.tolist() == [True, True, False]
    each = rows.limited(np.array([250, 400, 0]), 150)
    assert each.outside.tolist() == [False, True, False]


def test_types_of_feasts() -> None:
    """What we compute with, and everything else."""
    assert [
        kind_of(each) for each in ("Int32", "Float32", "Bool", "String", "Array(String)", "Map", "Array(Int64)")
    ] == [
        *("int", "float", "bool", "str", "list[str]", "any", "any"),
    ]
    value = [43, [[20, {"a": [42, [[2, "x"], None]]}], [17, [True]], [1, b"\0"]]]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(value)) == value
    assert plain(value) == [{"a": ["x", None]}, [True], b"\0"]
    assert to_json(Objects([plain(value)]), "any") == [[{"a": ["x", None]}, [True], "AA=="]]
    assert Objects([{"a": b"\0"}, None]).array() == pa.array(['{"a":"AA=="}', None])


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with connect(redis_url, 10) as client:
        yield client


PRICE = Fields.of([("price", "Float64")])


def write(store: GivenStore, view: str, *rows: tuple[str, float, int, int]) -> int:
    """Writes (id, price, event µs, created µs); returns how many were written."""
    packed = [(name.encode(), PRICE.pack({"price": price}, event, made), 0) for name, price, event, made in rows]
    return sum(written for _, written in store.write(view, packed))


def prices(store: GivenStore, view: str, *ids: str) -> list[float | None]:
    return store.read(view, PRICE, [each.encode() for each in ids]).raw("price")


def test_the_newer_row_stays(client: redis.Redis) -> None:
    """By the event's time, then by its creation; of the same, the one that was written last, as a correction is."""
    store = GivenStore(client, "shop")
    assert write(store, "items", ("i1", 1.0, 100, 5), ("i2", 2.0, 100, 5)) == 2
    assert write(store, "items", ("i1", 3.0, 99, 9), ("i2", 4.0, 101, 0)) == 1
    assert prices(store, "items", "i1", "i2", "i3") == [1.0, 4.0, None]
    assert write(store, "items", ("i1", 5.0, 100, 4), ("i2", 6.0, 101, 0)) == 1
    assert prices(store, "items", "i1", "i2") == [1.0, 6.0]
    assert write(store, "items", ("i1", 7.0, 100, 6)) == 1
    assert prices(store, "items", "i1") == [7.0]
    assert write(store, "items", ("i1", 8.0, -100, 0), ("old", 9.0, -100, 0), ("old", 10.0, -200, 0)) == 1
    assert prices(store, "items", "i1", "old") == [7.0, 9.0]


def test_of_two_writers_at_once_the_newest_row_stays(client: redis.Redis, redis_url: str) -> None:
    """To look first and to write then, as others do, lets the older one win now and then."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    names = [f"i{number}" for number in range(20)]
    rows = [(rng.choice(names), float(at), at, 0) for at in range(2_000)]
    newest = {name: price for name, price, _, _ in rows}
    rng.shuffle(rows)

    def run(part: int) -> None:
        with connect(redis_url, 30) as own:
            store = GivenStore(own, "shop")
            for at in range(part, len(rows), 40):
                write(store, "items", *rows[at : at + 20])

    threads = [threading.Thread(target=run, args=(part,)) for part in (0, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert prices(GivenStore(client, "shop"), "items", *newest) == list(newest.values())


def test_a_view_is_deleted_and_nothing_else(client: redis.Redis) -> None:
    """Neither another view whose name begins alike, nor another project's, nor what a stream wrote."""
    shop, other = GivenStore(client, "shop"), GivenStore(client, "shop2")
    for store in (shop, other):
        write(store, "items", *((f"i{number}", 1.0, 1, 0) for number in range(3_000)))
        write(store, "items_more", ("i1", 2.0, 1, 0))
    client.set("{shop:item:3}:items:i1", "a row of a stream")
    assert shop.delete("items") == 3_000
    assert shop.delete("items") == 0
    assert prices(shop, "items", "i1") == [None]
    assert prices(shop, "items_more", "i1") == [2.0]
    assert prices(other, "items", "i1") == [1.0]
    assert client.exists("{shop:item:3}:items:i1")


def test_rows_outlive_the_fields_that_they_were_written_with(client: redis.Redis) -> None:
    """Another process reads them by what is kept of these; what nobody knows is refused, with its key."""
    before = Fields.of([("name", "String"), ("price", "Int64")])
    store = GivenStore(client, "shop")
    store.declare(before)
    list(store.write("items", [(b"i1", before.pack({"name": "coat", "price": 3}, 1, 0), LATER_MS)]))
    assert prices(GivenStore(client, "shop"), "items", "i1") == [3.0]
    unknown = Fields.of([("else", "Int64")])
    list(store.write("items", [(b"i2", unknown.pack({}, 1, 0), LATER_MS)]))
    with pytest.raises(ForeignValueError, match=r"@items:\d+}:i2"):
        prices(store, "items", "i1", "i2")


def test_rows_expire_and_scripts_come_back(client: redis.Redis) -> None:
    """Rows of a view with a `ttl`; and a Redis that has restarted knows no script."""
    store = GivenStore(client, "shop")
    row = PRICE.pack({"price": 1.0}, 1, 0)
    list(store.write("items", [(b"i1", row, LATER_MS), (b"i2", row, 0)]))
    client.script_flush()
    list(store.write("items", [(b"i3", row, LATER_MS)]))
    ttls: dict[bytes, Any] = {key.rpartition(b":")[2]: client.pttl(key) for key in client.scan_iter("{shop@items:*")}
    assert ttls[b"i2"] == -1
    assert min(ttls[b"i1"], ttls[b"i3"]) > 0
