"""The archive's tables: one writer at a time, events as they were, and errors that say what is the matter."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable

from config.settings import Settings
from features.definitions import compile_definitions
from features.events import Kind
from features.plan import EventSpec
from store.archive import ArchiveTable, Complete, archive_forgotten, forgotten_of, rows_of
from store.commit import FencedError, Position
from store.connect import connect
from store.forgotten import Forgotten, order, write_forgotten
from store.keys import Keyspace

OWN: dict[str, Kind] = {"name": "str", "n": "int", "x": "float", "yes": "bool"}
SPEC = EventSpec("Seen", "seen", {"event_id": "str", "occurred_at": "int", **OWN}, "nowhere:Seen", "0")
DAY_MS = 86_400_000
T_MS = 1_763_683_200_000
"""2025-11-21T00:00:00Z."""


def rows(first: int, n: int, at_ms: int = T_MS, late_ms: int = 0) -> pa.Table:
    offsets = np.arange(first, first + n)
    fields: dict[str, Any] = {
        "name": pa.array([None if at % 3 == 0 else f"é{at}" for at in offsets.tolist()], pa.string()),
        "n": np.where(offsets % 3 == 1, np.nan, offsets + 2.0**52),
        "x": np.where(offsets % 3 == 2, np.nan, offsets / 3),
        "yes": np.where(offsets % 4 == 0, np.nan, offsets % 2),
    }
    times_ms = at_ms + offsets
    return rows_of(SPEC, pa.array([f"e{at}" for at in offsets]), times_ms + late_ms, times_ms, 2, offsets, fields)


def table_of(folder: Path, spec: EventSpec = SPEC) -> ArchiveTable:
    return ArchiveTable(str(folder / "archive"), spec)


def append(table: ArchiveTable, first: int, n: int) -> None:
    table.append(rows(first, n), {2: Complete(first + n, T_MS + first + n)}, {2: max(0, first - 5)})


def test_events_are_read_as_they_were_written(tmp_path: Path) -> None:
    """Every kind, nulls too; the time is the event's, or the record's where that is earlier."""
    table = table_of(tmp_path)
    assert not table.exists
    assert list(table.scan({"x": "float"})) == []
    table.claim()
    assert (table.n_rows, table.n_files, table.complete()) == (0, 0, {})
    append(table, 0, 10)
    assert (table.n_rows, table.complete()) == (10, {2: Complete(10, T_MS + 10)})
    assert table.record().position("seen", 2) == Position(10, 0)
    assert table.record().position("seen", 0) is None
    (batch,) = table.scan({**OWN, "new": "str"})
    assert batch["_offset"].to_pylist() == list(range(10))
    assert batch["_t"].to_pylist() == [T_MS + at for at in range(10)]
    assert batch["name"].to_pylist()[:4] == [None, "é1", "é2", None]
    assert batch["n"].to_pylist()[:4] == [2**52, None, 2**52 + 2, 2**52 + 3]
    assert batch["x"].to_pylist()[:4] == [0.0, 1 / 3, None, 1.0]
    assert batch["yes"].to_pylist()[:6] == [None, True, False, True, None, True]
    assert batch["new"].to_pylist() == [None] * 10

    table.append(rows(10, 1, late_ms=DAY_MS), {2: Complete(11, T_MS)}, {2: 0})
    last = sorted(t for batch in table.scan({}, since_ms=T_MS + 9) for t in batch["_t"].to_pylist())
    assert last == [T_MS + 9, T_MS + 10]
    assert [t for batch in table.scan({}, until_ms=T_MS + 1) for t in batch["_t"].to_pylist()] == [T_MS]
    assert DeltaTable(table.url).metadata().partition_columns == ["_day"]


def test_who_was_replaced_can_write_no_more(tmp_path: Path) -> None:
    """Positions in another commit than the events', or compared by who wrote last only, let a zombie repeat events."""
    first, second = table_of(tmp_path), table_of(tmp_path)
    first.claim()
    append(first, 0, 3)
    second.claim()  # Of a version that is long gone: it opens the newest.
    with pytest.raises(FencedError, match="another archiver") as raised:
        append(first, 3, 3)
    assert raised.value.superseded
    assert second.complete() == {2: Complete(3, T_MS + 3)}
    append(second, 3, 2)
    assert table_of(tmp_path).n_rows == 5


def test_what_a_topic_is_called_by_kafka_is_said_by_its_writer_only(tmp_path: Path) -> None:
    """It takes the writer to the table's newest version, where another may have claimed it."""
    first, second = table_of(tmp_path), table_of(tmp_path)
    first.claim()
    second.claim()
    with pytest.raises(FencedError):
        first.be_of_topic("abc")
    second.be_of_topic("abc")
    append(second, 0, 1)
    second.accept_topic("def")
    assert (second.complete(), second.record().topics) == ({}, {"seen": "def"})


def test_a_claim_is_made_whoever_writes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that commits between another's look and its claim must not have that one stop as if it were the old."""
    first, second = table_of(tmp_path), table_of(tmp_path)
    first.claim()
    opened, offsets = second._open, iter((0, 1))

    def open_late() -> Any:
        found = opened()
        if (offset := next(offsets, None)) is not None:
            append(first, offset, 1)
        return found

    monkeypatch.setattr(second, "_open", open_late)
    second.claim()
    assert second.n_rows == 2
    append(second, 2, 1)


def test_looking_after_a_table_disturbs_no_writer(tmp_path: Path) -> None:
    writer = table_of(tmp_path)
    writer.claim()
    for first in range(5):
        append(writer, first, 1)
    writer.append(rows(5, 1, at_ms=T_MS + DAY_MS), {2: Complete(6, T_MS)}, {2: 0})
    keeper = table_of(tmp_path)
    append(writer, 6, 1)
    assert keeper.compact()["numFilesAdded"] == 1
    append(writer, 7, 1)
    assert keeper.forget_before(T_MS + DAY_MS + 5) == 7  # All of the first day, that which just came too.
    keeper.vacuum()
    append(writer, 8, 1)
    left = sorted(each for batch in table_of(tmp_path).scan({}) for each in batch["_offset"].to_pylist())
    assert left == [5, 8]
    assert table_of(tmp_path).complete()[2].next == 9


def test_who_is_forgotten_is_out_of_events_and_others_are_not(tmp_path: Path) -> None:
    """Until the time that is said. An event that is somebody else's too stays his; one that is not goes."""
    spec = EventSpec("Met", "met", {"user_id": "str", "item_id": "str", "price": "float"}, "nowhere:Met", "0")
    table = table_of(tmp_path, spec)
    table.claim()
    users, items = ["u1", "u1", "u1", "u2", None], ["i1", None, "i2", "i1", "i1"]
    times_ms = T_MS + np.arange(5)
    fields = {"user_id": pa.array(users), "item_id": pa.array(items, pa.string()), "price": np.arange(5.0)}
    event_ids = pa.array([f"e{at}" for at in range(5)])
    table.append(
        rows_of(spec, event_ids, times_ms, times_ms + 5, 0, np.arange(5), fields), {0: Complete(5, T_MS)}, {0: 0}
    )
    keys, forgotten = {"user": "user_id", "item": "item_id"}, Forgotten()
    assert table.erase(keys, forgotten) == 0
    forgotten.add("user", {b"u1": T_MS + 1, b"u3": T_MS + 9})
    assert table.erase(keys, forgotten) == 2
    found = DeltaTable(table.url).to_pyarrow_table().sort_by("_offset")
    assert found["user_id"].to_pylist() == [None, "u1", "u2", None]
    assert found["event_id"].to_pylist() == [None, "e2", "e3", "e4"]
    assert found["item_id"].to_pylist() == ["i1", "i2", "i1", "i1"]
    assert table.erase(keys, forgotten) == 0
    append_more = rows_of(spec, event_ids, times_ms, times_ms, 0, np.arange(5, 10), fields)
    table.append(append_more, {0: Complete(10, T_MS)}, {0: 0})  # Its writer goes on.
    table.compact()
    assert table.n_rows == 9


def test_the_archive_knows_who_is_forgotten(tmp_path: Path, redis_url: str) -> None:
    """What writers of shards have, and what stands ordered; twice is once, and the latest time counts."""
    plan = compile_definitions("features.catalog", "test", 4)
    settings = Settings(archive=str(tmp_path / "archive"))
    with connect(redis_url, 5) as client:
        assert archive_forgotten(settings, plan, client) == {}
        assert not (tmp_path / "archive").exists()
        write_forgotten(client, Keyspace.of(plan), Forgotten(user={b"u1": 5, "ü".encode(): 7}))
        order(client, "test", "item", ["i1"], 6)
        order(client, "test", "user", ["u1"], 9)
        want = {"user": {b"u1": 9, "ü".encode(): 7}, "item": {b"i1": 6}}
        for _ in range(2):
            assert archive_forgotten(settings, plan, client) == want
        assert DeltaTable(str(tmp_path / "archive" / "_forgotten")).to_pyarrow_table().num_rows == 3
        client.flushall()
        assert archive_forgotten(settings, plan, client) == want
        counts = forgotten_of(settings).counts(
            "user", pa.array(["u1", "ü", None, "u2", "u1"]), np.array([9, 8, 1, 1, 10])
        )
        assert counts is not None
        assert counts.tolist() == [False, True, True, True, True]


def test_another_process_reads_what_this_one_would(tmp_path: Path) -> None:
    """Also if somebody writes before it does."""
    table = table_of(tmp_path)
    table.claim()
    append(table, 0, 4)
    sent = pickle.dumps(table)
    append(table, 4, 1)
    there = pickle.loads(sent)  # noqa: S301  # our own
    assert (there.n_rows, there.complete()[2].next) == (4, 4)
    shutil.rmtree(tmp_path / "archive")
    with pytest.raises(OSError, match="can't be read now"):  # A machine that does not see it: not one without events.
        pickle.loads(sent)  # noqa: S301  # as above


def test_shares_are_all_of_it_and_nothing_twice(tmp_path: Path) -> None:
    table = table_of(tmp_path)
    table.claim()
    for first in range(7):
        append(table, first, 1)
    shares = [[n for b in table.scan({}, share=(number, 3)) for n in b["_offset"].to_pylist()] for number in range(3)]
    assert sorted(offset for share in shares for offset in share) == list(range(7))
    assert all(shares)


def test_a_place_that_is_none_is_said(tmp_path: Path) -> None:
    """As what passes: a worker that stops for it is started again when it has."""
    (tmp_path / "archive").write_text("a file")
    table = table_of(tmp_path)
    with pytest.raises(OSError, match=f"the archive at {tmp_path}/archive/seen can't be made now: "):
        table.claim()
    with pytest.raises(LookupError, match="run `headrace archive`"):
        table.compact()
