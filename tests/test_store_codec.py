"""The packed row: what goes in comes out, and what is no row is refused."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import aggregations as kinds
from features import catalog
from features.compile import compile_plan
from features.kernel import Entries, Rows, evaluate, merge
from features.layout import Family, families_of, slots_of
from features.partials import DTYPES
from features.texts import NO_TEXTS
from store.codec import CorruptRowError, decode, encode
from tests.properties.scenarios import BASE_MS, HOUR_MS, WORDS, batches_of, plain
from tests.support.states import State, plan_of

PLAN = compile_plan([vars(catalog)], "test", 4)
EVERYTHING = plan_of(
    *plain(["10m", "24h", "all"]),
    kinds.Count(name="by", event="Click", by="category", over=("1h",), buckets=32),
    kinds.Decayed(name="heat", event="Click", by="category", half_life="1h", buckets=32),
)
FAMILIES = [family for plan in (PLAN, EVERYTHING) for view in plan.views for family in families_of(plan, view)]
FEATURES: dict[str, list[Any]] = {
    family.name: [(plan.features[name], slots) for name, (of, slots) in slots_of(plan).items() if of == family]
    for plan in (PLAN, EVERYTHING)
    for view in plan.views
    for family in families_of(plan, view)
}
each_family = pytest.mark.parametrize("family", FAMILIES, ids=[family.name for family in FAMILIES])

HIGHEST = {"count": 1 << 62, "time": ((1 << 32) - 1) * 1000 + 999, "tick": (1 << 32) - 1}


def random_rows(family: Family, n_rows: int, rng: np.random.Generator, sizes: Sequence[int] = (0, 0, 1, 3, 40)) -> Rows:
    """Rows with any number of entries in each table, of any values that a column can hold."""
    texts = pa.array(sorted(WORDS, key=str.encode), pa.string())
    tables = []
    for layout in family.tables:
        counts = rng.choice(sizes, n_rows)
        n = int(counts.sum())
        # As merge leaves them: sorted by row, bucket and start, with no key twice.
        order = np.concatenate([np.arange(count) for count in counts] or [np.zeros(0)]).astype(np.int64)
        bucket = layout.table.bucket
        buckets: Any = None if bucket is None else order * 300
        if bucket == "hash":
            buckets = order.astype(np.uint64) << np.uint64(58)
        elif bucket == "text":
            buckets = order % len(texts)
        columns = []
        for kind in layout.physical:
            if kind == "float":
                columns.append(rng.choice([0.0, -0.0, np.inf, -np.inf, 0.1, -1e300, 5e-324], n))
            elif kind == "text":
                columns.append(rng.integers(-1, len(texts), n))
            else:
                scale = rng.choice([0, 8, 16, 31], n_rows)[np.repeat(np.arange(n_rows), counts)]
                columns.append(
                    np.where(rng.random(n) < 0.1, HIGHEST[kind] >> rng.integers(0, 2), rng.integers(0, 2 << scale))
                )
                if kind == "time":
                    columns[-1][rng.random(n) < 0.2] = -1
        tables.append(
            Entries(
                np.repeat(np.arange(n_rows), counts),
                buckets,
                order * 12 + int(rng.integers(0, 1 << 31)) if layout.table.starts else None,
                tuple(column.astype(DTYPES[kind]) for column, kind in zip(columns, layout.physical, strict=True)),
            )
        )
    return Rows(n_rows, BASE_MS + rng.integers(0, 10_000, n_rows), tuple(tables), texts)


def plainly(family: Family, rows: Rows) -> list[Any]:
    """Rows as Python values, with texts in place of their codes."""
    texts = [*rows.texts.to_pylist(), None]
    found = []
    for layout, entries in zip(family.tables, rows.tables, strict=True):
        found.append(entries.rows.tolist())
        found.append(None if entries.starts is None else entries.starts.tolist())
        named = entries.buckets is not None and layout.table.bucket == "text"
        found.append(
            None if entries.buckets is None else [texts[code] if named else code for code in entries.buckets.tolist()]
        )
        for kind, column in zip(layout.physical, entries.columns, strict=True):
            assert column.dtype == DTYPES[kind]
            found.append([texts[code] for code in column.tolist()] if kind == "text" else [*map(repr, column.tolist())])
    return found


def stored(family: Family, rows: Rows) -> list[bytes | None]:
    """Bytes as the store has them: a row with nothing in it is not kept."""
    return [blob or None for blob in encode(family, rows)]


@each_family
@settings(max_examples=25)
@given(n_rows=st.integers(0, 6), seed=st.integers(0, 1 << 32))
def test_decode_gives_back_what_was_encoded(family: Family, n_rows: int, seed: int) -> None:
    """Row by row and entry by entry, to the last bit of every number and character of every text."""
    rows = random_rows(family, n_rows, np.random.default_rng(seed))
    blobs = stored(family, rows)
    back = decode(family, blobs)
    assert plainly(family, back) == plainly(family, rows)
    there = np.array([blob is not None for blob in blobs], bool)
    assert back.last_event_ms.tolist() == np.where(there, rows.last_event_ms, -1).tolist()
    assert encode(family, back) == encode(family, rows)


@each_family
def test_a_row_reads_the_same_alone_as_among_others(family: Family) -> None:
    """A row's bytes depend on the row only, so that rows can be read in any company."""
    rows = random_rows(family, 50, np.random.default_rng(5))
    blobs = stored(family, rows)
    rng = random.Random(5)
    for _ in range(10):
        chosen = [rng.randrange(50) for _ in range(5)]
        again = decode(family, [blobs[index] for index in chosen])
        assert stored(family, again) == [blobs[index] for index in chosen]


@each_family
def test_a_row_with_nothing_in_it_is_empty(family: Family) -> None:
    """Never seen, expired or empty: no bytes, and the same rows back."""
    assert encode(family, Rows.empty(family, 3)) == [b"", b"", b""]
    for blobs in ([None, None], [b"", None]):
        back = decode(family, blobs)
        assert (back.n, back.last_event_ms.tolist()) == (2, [-1, -1])
        assert [len(table) for table in back.tables] == [0] * len(family.tables)
    assert decode(family, []).n == 0
    assert encode(family, Rows.empty(family, 0)) == []


@pytest.mark.parametrize("count", [0, 255, 256, 65_535, 65_536, (1 << 32) - 1, 1 << 32, (1 << 62) + 1])
def test_counts_of_every_width(count: int) -> None:
    """A row takes the width that its own largest count needs, and a neighbour's count changes nothing."""
    (family,) = families_of(plan := plan_of(kinds.Count(name="n", event="Click", over=("1h",))), plan.views[0])
    entries = Entries(np.array([0, 1, 1]), None, np.array([12, 12, 24]), (np.array([count, 1, 2]),))
    blobs = encode(family, Rows(2, np.array([5, 7]), (entries,), pa.array([], pa.string())))
    assert decode(family, [*blobs]).tables[0].columns[0].tolist() == [count, 1, 2]
    width = next(width for width in (1, 2, 4, 8) if count < 1 << 8 * width)
    assert len(blobs[0]) - len(blobs[1]) == (4 + width) - 2 * (4 + 1)


@pytest.mark.parametrize("n", [255, 256, 1_000])
def test_more_texts_than_a_byte_can_number(n: int) -> None:
    """Text 256 of a row is no other than itself."""
    spec = kinds.LastK(name="last", event="Click", field="item_id", k=1_000)
    state = State(plan_of(spec), packed=True)
    state.merge(batches_of([{"t": BASE_MS + i, "item_id": f"item {i}"} for i in range(n)]), BASE_MS)
    assert state.values(BASE_MS + HOUR_MS)["last"] == [[f"item {i}" for i in reversed(range(n))]]


@pytest.mark.parametrize("at_ms", [0, 1, 999, 1000, BASE_MS + 999, HIGHEST["time"], -1])
def test_times_to_the_millisecond(at_ms: int) -> None:
    """From 1970 to 2106, and none at all."""
    (family,) = families_of(plan := plan_of(kinds.SecondsSince(name="idle", event="Click")), plan.views[0])
    entries = Entries(np.array([0]), None, None, (np.array([at_ms]),))
    back = decode(family, [*encode(family, Rows(1, np.array([max(at_ms, 0)]), (entries,), pa.array([], pa.string())))])
    assert back.tables[0].columns[0].tolist() == [at_ms]
    assert back.last_event_ms.tolist() == [max(at_ms, 0)]


MINUTES_MAX = (1 << 16) - 1
TICKS_MAX = (1 << 24) - 1


@pytest.mark.parametrize(
    ("ago", "takes"),
    [((0,), 2), ((12, 12 * MINUTES_MAX), 2), ((0, 12 * MINUTES_MAX + 12), 4), ((6, 0), 4), ((-12, 0), 4)],
    ids=["the last minute", "as long ago as can be", "a minute longer", "no whole minute", "later than the last event"],
)
def test_starts_near_the_last_event_take_half(ago: Sequence[int], takes: int) -> None:
    """Whole minutes up to 45 days before it, if all of a row's are; each row for itself. A bound that is off by one
    would bring a tile of 45 days ago back as one of today.
    """
    (family,) = families_of(plan := plan_of(kinds.Count(name="n", event="Click", over=("1h",))), plan.views[0])
    last_tick = BASE_MS // 60_000 * 12
    starts = np.array([*sorted(last_tick - each for each in ago), 12])
    rows = np.array([0] * len(ago) + [1])
    entries = Entries(rows, None, starts, (np.ones(len(rows), np.int64),))
    blobs = encode(family, Rows(2, np.array([BASE_MS, 59_999]), (entries,), pa.array([], pa.string())))
    assert [len(blob) - header_size(family) for blob in blobs] == [len(ago) * (takes + 1), 4 + 1]
    assert decode(family, blobs).tables[0].starts.tolist() == starts.tolist()  # type: ignore[union-attr]  # has starts


@pytest.mark.parametrize(("ago", "takes"), [((0, TICKS_MAX), 3), ((0, TICKS_MAX + 1), 4), ((-1, 0), 4)])
def test_ticks_near_the_last_event_take_three_bytes(ago: Sequence[int], takes: int) -> None:
    """When a viewer was seen: as starts, but in ticks, up to two years and a half before the last event."""
    spec = kinds.Distinct(name="x", event="Click", field="item_id", over=("1h",))
    (family,) = families_of(plan := plan_of(spec), plan.views[0])
    seen = BASE_MS // 5_000 - np.array(ago)
    exact = Entries(np.array([0, 0]), np.array([1, 2], np.uint64), None, (seen,))
    (blob,) = encode(family, Rows(1, np.array([BASE_MS]), (exact, Rows.empty(family, 1).tables[1]), NO_TEXTS))
    assert len(blob) - header_size(family) == 2 * (8 + takes)
    assert decode(family, [blob]).tables[0].columns[0].tolist() == seen.tolist()


# What follows is about bytes that are no row.


def filled(family: Family, seed: int = 1) -> list[bytes]:
    """Bytes of three rows with entries in every table."""
    return encode(family, random_rows(family, 3, np.random.default_rng(seed), sizes=(1, 2, 7)))


def header_size(family: Family) -> int:
    """Tag, time, number of texts, and five bytes a table: as the codec's docstring says."""
    return 12 + 5 * len(family.tables)


@each_family
def test_a_row_cut_short_or_too_long_is_refused(family: Family) -> None:
    """Every length but the right one, also between whole rows, whose bytes must not make up for it."""
    whole = filled(family)
    for length in range(1, len(whole[1])):
        with pytest.raises(CorruptRowError) as caught:
            decode(family, [whole[0], whole[1][:length], whole[2]])
        assert caught.value.position == 1
    for more in (b"\0", b"\1", whole[0]):
        with pytest.raises(CorruptRowError) as caught:
            decode(family, [whole[0], None, whole[1] + more])
        assert caught.value.position == 2


@each_family
def test_another_layout_is_refused(family: Family) -> None:
    """Each of the first four bytes, changed to anything else, names what was found and what is expected."""
    whole = filled(family)[0]
    for index in range(4):
        for value in set(range(256)) - {whole[index]}:
            with pytest.raises(CorruptRowError, match=r"layout .* expected"):
                decode(family, [whole[:index] + bytes([value]) + whole[index + 1 :]])


@each_family
def test_rows_of_other_families_are_refused(family: Family) -> None:
    """A row is never read as one of another layout, though both may have the same columns."""
    for other in FAMILIES:
        if other != family:
            with pytest.raises(CorruptRowError, match=family.name):
                decode(family, [filled(other)[0]])


@each_family
def test_every_other_byte_of_the_header_is_refused_or_harmless(family: Family) -> None:
    """Numbers of entries and texts, and widths: whatever they say, no other error and no reading beyond the row.

    Computing the length in 16 bits would let 32,768 texts more pass the check, and read what is not there.
    """
    whole = filled(family)[0]
    for index in range(4, header_size(family)):
        for value in {*(whole[index] ^ 1 << bit for bit in range(8)), 0, 3, 4, 255} - {whole[index]}:
            refused_or_usable(family, [whole[:index] + bytes([value]) + whole[index + 1 :]])


@pytest.mark.parametrize("more", [1, 255, 256, 1 << 15, (1 << 16) - 100])
def test_a_wrong_number_of_texts_is_refused(more: int) -> None:
    """Also one so large that twice as many overflow sixteen bits."""
    family = next(family for family in FAMILIES if family.name == "user_history.clicked")
    whole = filled(family)[0]
    wrong = int.from_bytes(whole[10:12], "little") + more
    with pytest.raises(CorruptRowError):
        decode(family, [whole[:10] + wrong.to_bytes(2, "little") + whole[12:]])


@each_family
@settings(max_examples=25)
@given(data=st.data())
def test_changed_bytes_are_refused_or_harmless(family: Family, data: st.DataObject) -> None:
    """Any bytes of a row may change: it is refused, or reads as other values, but breaks nothing and no neighbour."""
    whole = filled(family)
    row = bytearray(whole[1])
    for _ in range(data.draw(st.integers(1, 3))):
        row[data.draw(st.integers(0, len(row) - 1))] = data.draw(st.integers(0, 255))
    refused_or_usable(family, [whole[0], bytes(row), whole[2]])


@each_family
@settings(max_examples=25)
@given(garbage=st.binary(min_size=1, max_size=300), headed=st.booleans())
def test_garbage_is_refused_or_harmless(family: Family, garbage: bytes, headed: bool) -> None:
    """Random bytes, also after the right layout."""
    refused_or_usable(family, [filled(family)[0][:4] + garbage if headed else garbage])


def refused_or_usable(family: Family, blobs: list[bytes]) -> None:
    """Either CorruptRowError, or rows that merge, evaluate and encode take, with neighbours as they were."""
    try:
        rows = decode(family, blobs)
    except CorruptRowError:
        return
    with np.errstate(all="ignore"):
        evaluate(family, rows, FEATURES[family.name], BASE_MS)
        encode(family, merge(family, rows, {}, BASE_MS).rows)
    again = encode(family, rows)
    assert [index for index in (0, 2) if index < len(blobs) - 1 and again[index] != blobs[index]] == []


@pytest.mark.parametrize(
    ("spec", "entry_at"),
    [
        (kinds.LastK(name="x", event="Click", field="item_id", k=3), 0),
        (kinds.Last(name="x", event="Click", field="item_id", kind="str"), 6),
    ],
    ids=["bucket", "column"],
)
@pytest.mark.parametrize("index", [2, 3, 255])
def test_a_text_that_the_row_does_not_have_is_refused(spec: Any, entry_at: int, index: int) -> None:
    """A text index beyond the row's own texts is no index into a neighbour's: one user must not see another's items."""
    state = State(plan_of(spec), 2)
    state.merge(batches_of([{"t": BASE_MS, "row": row, "item_id": name} for row, name in enumerate("ab")]), BASE_MS)
    ((family, rows),) = state.rows.values()
    first, second = encode(family, rows)
    at = header_size(family) + entry_at
    assert first[at] == 1
    with pytest.raises(CorruptRowError):
        decode(family, [first[:at] + bytes([index]) + first[at + 1 :], second])


def test_a_bucket_without_text_is_refused() -> None:
    """Index 0 is null, and no bucket is null."""
    spec = kinds.LastK(name="x", event="Click", field="item_id", k=3)
    state = State(plan_of(spec), 1)
    state.merge(batches_of([{"t": BASE_MS, "item_id": "a"}]), BASE_MS)
    ((family, rows),) = state.rows.values()
    (blob,) = encode(family, rows)
    at = header_size(family)
    with pytest.raises(CorruptRowError):
        decode(family, [blob[:at] + b"\0" + blob[at + 1 :]])


def test_a_sketch_cell_that_there_is_not_is_refused() -> None:
    """A cell above 256 * 48 would count in the sketch of the row after it, or fall off the last."""
    spec = kinds.Distinct(name="x", event="Click", field="item_id", over=("1h",))
    (family,) = families_of(plan := plan_of(spec), plan.views[0])
    exact, _ = Rows.empty(family, 1).tables
    wrong = Entries(np.array([0]), np.array([256 * 48]), None, (np.array([BASE_MS // 5000]),))
    (blob,) = encode(family, Rows(1, np.array([BASE_MS]), (exact, wrong), pa.array([], pa.string())))
    with pytest.raises(CorruptRowError):
        decode(family, [blob])


def test_text_that_is_not_utf_8_is_refused() -> None:
    """The error tells which row it is: whoever sets a corrupt row aside must not set aside another."""
    family = next(family for family in FAMILIES if family.name == "user_history.clicked")
    good = filled(family)[0]
    with pytest.raises(CorruptRowError, match="UTF-8") as caught:
        decode(family, [good, None, good[:-1] + b"\xff", good])
    assert caught.value.position == 2


@each_family
def test_refusing_takes_no_memory(family: Family) -> None:
    """A row of a few bytes that says it has four billion entries is refused before anything is allocated for them."""
    head = filled(family)[0][: header_size(family)]
    claims = head[:10] + b"\xff\xff" + b"\xff\xff\xff\xff\x03" * len(family.tables)
    tracemalloc.start()
    try:
        for blob in (claims, claims + bytes(1000)):
            with pytest.raises(CorruptRowError):
                decode(family, [blob] * 10)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1_000_000


def test_an_error_tells_the_family_and_the_row() -> None:
    """So that a reader can name the key that is corrupt."""
    family = FAMILIES[0]
    with pytest.raises(CorruptRowError, match=f"^not a row of {family.name}: 1 bytes are too few$") as caught:
        decode(family, [None, filled(family)[0], b"\1"])
    assert (caught.value.family, caught.value.position) == (family, 2)


def test_a_short_row_of_another_layout_is_told_from_a_corrupt_one() -> None:
    """It may be shorter than any of this layout: if its length is looked at first, streams stop at it."""
    family = max(FAMILIES, key=lambda each: len(each.tables))
    with pytest.raises(CorruptRowError) as caught:
        decode(family, [bytes(each ^ 0xFF for each in family.tag) + bytes(9)])
    assert caught.value.other
