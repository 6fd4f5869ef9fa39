"""Files become events that their contracts accept; what doesn't is counted, and says where and why."""

from __future__ import annotations

import gzip
import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from confluent_kafka import Consumer, TopicPartition
from kafka.errors import KafkaTimeoutError
from pydantic import AliasPath, Field
from rich.console import Console
from rich.progress import Progress

from features import source
from features.catalog import Click, Like
from features.compile import event_spec
from features.events import Event
from headrace.embedded import EmbeddedBroker
from headrace.replay import Refusal, Replay, ReplayError, Summary, Written, run

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE_S = 20
NOW_MS = 1_763_719_200_000  # 2025-11-21T10:00Z
CONTRACTS: dict[str, type[Event]] = {"clicks": Click, "likes": Like}
TAOBAO = ("user_id", "item_id", "category", "kind", "occurred_at")
BY_KIND: dict[str, Any] = {"topic_column": "kind", "topics": {"pv": "clicks", "fav": "likes"}}
MOCK = {"api_version": (2, 1)}  # kafka-python can't ask librdkafka's mock cluster for its versions.


class TestClock:
    """Time that passes only by sleeping."""

    __test__ = False

    def __init__(self) -> None:
        self.slept_s: list[float] = []

    def now_ms(self) -> int:
        return NOW_MS + round(sum(self.slept_s) * 1000)

    def sleep(self, seconds: float) -> None:
        self.slept_s.append(seconds)


@pytest.fixture
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as broker:
        yield broker


def send(file: Path, broker: EmbeddedBroker | None = None, clock: TestClock | None = None, **options: Any) -> Summary:
    """Replay to a broker, or to none where it must not come so far."""
    kafka = broker.bootstrap_servers if broker else "127.0.0.1:1"
    replay = Replay(file, kafka_options=MOCK, timeout_s=DEADLINE_S if broker else 1, **options)
    return run(replay, CONTRACTS, kafka, clock or TestClock(), Progress(disable=True))


def received(broker: EmbeddedBroker, topic: str, n: int) -> list[tuple[bytes, dict[str, Any]]]:
    """Key and value of a topic's first `n` records, by item."""
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": "unused"})
    try:
        consumer.assign([TopicPartition(topic, partition, 0) for partition in range(4)])
        records = consumer.consume(n, timeout=DEADLINE_S)
    finally:
        consumer.close()
    assert len(records) == n
    found = [(record.key() or b"", json.loads(record.value() or b"{}")) for record in records]
    return sorted(found, key=lambda record: record[1]["item_id"])


def lines(file: Path, *rows: str) -> Path:
    file.write_text("".join(row + "\n" for row in rows))
    return file


def test_a_csv_without_header_goes_to_topics_by_a_column(tmp_path: Path, broker: EmbeddedBroker) -> None:
    file = lines(
        tmp_path / "taobao.csv",
        "1,10,7,pv,1511658000",
        "1,11,7,cart,1511658001",
        "2,12,8,fav,1511658002",
        "3,13,,pv,1511658003",
        "3,14,9,cart,1511658004",
        "3,15,9,buy,1511658005",
    )
    summary = send(file, broker, columns=TAOBAO, time_unit="s", **BY_KIND)
    assert summary.sent == {"clicks": 2, "likes": 1}
    assert summary.left_out == {"cart": 2, "buy": 1}
    assert (summary.refused, summary.refusals) == (0, [])
    clicks = received(broker, "clicks", 2)
    assert [key for key, _ in clicks] == [b"1", b"3"]
    assert clicks[0][1].pop("event_id")
    assert clicks[0][1] == {"user_id": "1", "item_id": "10", "category": "7", "occurred_at": 1_511_658_000_000}
    assert "category" not in clicks[1][1]  # An empty cell is no value.
    [(key, like)] = received(broker, "likes", 1)
    assert (key, like["item_id"], like["occurred_at"]) == (b"2", "12", 1_511_658_002_000)


def test_every_format_gives_the_same_events(tmp_path: Path, broker: EmbeddedBroker) -> None:
    """A number that is an id in the contract becomes text; a time may be a number, RFC 3339 or Parquet's own."""
    expected = [(b"1", "10", 12.5), (b"2", "11", 3.0)]
    at = [datetime(2025, 11, 21, 9, tzinfo=UTC), datetime(2025, 11, 21, 9, 0, 1, tzinfo=UTC)]
    table = pa.table({"user_id": [1, 2], "item_id": [10.0, 11.0], "price": [12.5, 3.0], "occurred_at": at})
    pq.write_table(table, tmp_path / "a.parquet")
    csv = "user_id,item_id,price,occurred_at\n1,10,12.5,1763715600000\n2,11,3,2025-11-21T09:00:01Z\n"
    (tmp_path / "a.csv").write_text("\ufeff" + csv)  # As Excel writes it.
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(csv.encode()))
    objects = [
        {"user_id": 1, "item_id": 10, "price": 12.5, "occurred_at": 1763715600000},
        {"user_id": "2", "item_id": "11", "price": 3, "occurred_at": "2025-11-21T09:00:01Z", "other": [1]},
    ]
    lines(tmp_path / "a.jsonl", json.dumps(objects[0]), "", json.dumps(objects[1]))
    for file in sorted(tmp_path.iterdir()):
        assert send(file, broker, topic="clicks").sent == {"clicks": 2}, file
    events = received(broker, "clicks", 8)
    found = [(key, event["item_id"], event["price"]) for key, event in events]
    assert found == [expected[0]] * 4 + [expected[1]] * 4
    assert [event["occurred_at"] for _, event in events] == [1763715600000] * 4 + [1763715601000] * 4


def test_a_file_sent_twice_has_the_same_event_ids(tmp_path: Path, broker: EmbeddedBroker) -> None:
    """So the stream counts it once, if it comes again within the dedupe horizon. Ids of the file's own are kept."""
    file = lines(tmp_path / "a.csv", "event_id,user_id,item_id,occurred_at", f",u1,i1,{NOW_MS}", f"own,u1,i2,{NOW_MS}")
    send(file, broker, topic="clicks")
    send(file, broker, topic="clicks")
    ids = [event["event_id"] for _, event in received(broker, "clicks", 4)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 24
    assert ids[2:] == ["own", "own"]


def test_rebase_to_now_moves_the_last_event_to_now(tmp_path: Path, broker: EmbeddedBroker) -> None:
    """Only events that are sent count as the last: no left-out row, and none that the contract refuses."""
    file = lines(
        tmp_path / "taobao.csv",
        "1,10,7,pv,1511658000",
        "2,11,8,fav,1511658060",
        "2,12,8,buy,1511659999",
        "2,,8,pv,1511659998",
        "2,14,8,pv,95116599980",
    )
    summary = send(file, broker, columns=TAOBAO, time_unit="s", rebase_to_now=True, **BY_KIND)
    assert summary.refused == 2
    assert received(broker, "likes", 1)[0][1]["occurred_at"] == NOW_MS
    assert received(broker, "clicks", 1)[0][1]["occurred_at"] == NOW_MS - 60_000


@pytest.mark.parametrize("unit", ["s", "ms"])
def test_rebase_to_now_takes_data_older_than_the_contract(tmp_path: Path, broker: EmbeddedBroker, unit: str) -> None:
    """MovieLens is of 1997, other data of before 1970: the bound on times is one on shifted times.

    Held to it before the shift, nothing is sent; a first "latest" of 0 would shift times before 1970 by too little.
    """
    base = {"s": -881_250_949, "ms": -881_250_949_000}[unit]
    step = {"s": 60, "ms": 60_000}[unit]
    file = lines(tmp_path / "u.csv", f"1,10,{base}", f"2,11,{base + step}")
    columns = ("user_id", "item_id", "occurred_at")
    summary = send(file, broker, columns=columns, topic="clicks", time_unit=unit, rebase_to_now=True)
    assert (summary.sent.total(), summary.refused) == (2, 0)
    assert [event["occurred_at"] for _, event in received(broker, "clicks", 2)] == [NOW_MS - 60_000, NOW_MS]


def test_rebase_to_now_takes_texts_of_old_dates(tmp_path: Path, broker: EmbeddedBroker) -> None:
    """A shift that only numbers get would leave the text at 1997, and refuse it."""
    row = '{"user_id": "u", "item_id": "%d", "occurred_at": "1997-12-04T15:5%d:49Z"}'
    file = lines(tmp_path / "u.jsonl", row % (1, 5), row % (2, 6))
    assert send(file, broker, topic="clicks", rebase_to_now=True).refused == 0
    assert [event["occurred_at"] for _, event in received(broker, "clicks", 2)] == [NOW_MS - 60_000, NOW_MS]


def test_a_shifted_time_is_held_to_the_bounds(tmp_path: Path, broker: EmbeddedBroker) -> None:
    """A zero among times of 2017 is a mistake that must not become an event of 1978."""
    file = lines(tmp_path / "a.csv", "1,10,1511658000", "2,11,0")
    columns = ("user_id", "item_id", "occurred_at")
    summary = send(file, broker, columns=columns, topic="clicks", time_unit="s", rebase_to_now=True)
    assert summary.sent.total() == 1
    assert summary.refusals == [
        Refusal(
            2, "occurred_at: '0' means 1970-01-01, shifted to 1977-12-27, and the earliest date allowed is 2000-01-01"
        )
    ]


@pytest.mark.parametrize(
    ("value", "options", "reason"),
    [
        (
            881250949,
            {},
            (
                "881250949 means 1970-01-11, and the earliest date allowed is 2000-01-01; if the file counts seconds, "
                "say --time-unit s: then it means 1997-12-04; --rebase-to-now shifts all times, so that the last is now"
            ),
        ),
        (
            881250949,
            {"rebase_to_now": True},
            ("881250949 means 1970-01-11; if the file counts seconds, say --time-unit s: then it means 1997-12-04"),
        ),
        (
            881250949,
            {"time_unit": "s"},
            (
                "881250949 means 1997-12-04, and the earliest date allowed is 2000-01-01; --rebase-to-now shifts all "
                "times, so that the last is now"
            ),
        ),
        (
            "1997-12-04T15:55:49Z",
            {},
            (
                "'1997-12-04T15:55:49Z' means 1997-12-04, and the earliest date allowed is 2000-01-01; --rebase-to-now "
                "shifts all times, so that the last is now"
            ),
        ),
        (
            NOW_MS,
            {"time_unit": "s"},
            (
                f"{NOW_MS} means a date beyond the years 1 to 9999, and the latest date allowed is 2100-01-01; "
                "if the file counts milliseconds, say --time-unit ms"
            ),
        ),
    ],
)
def test_a_time_out_of_bounds_says_its_date_the_bound_and_the_way_out(
    tmp_path: Path, broker: EmbeddedBroker, value: Any, options: dict[str, Any], reason: str
) -> None:
    """Also when rebasing: seconds taken for milliseconds would be shifted to within days, and sent."""
    file = lines(tmp_path / "a.jsonl", json.dumps({"user_id": "u", "item_id": "i", "occurred_at": value}))
    summary = send(file, broker, topic="clicks", **options)
    assert summary.sent.total() == 0
    assert summary.refusals == [Refusal(1, f"occurred_at: {reason}")]


def test_speed_keeps_the_pace_of_event_time(tmp_path: Path, broker: EmbeddedBroker) -> None:
    """An event waits for its time.

    event time    0 s   10 s   5 s      30 s
    at speed 10   0 s    1 s   at once   3 s
    """
    times = [NOW_MS + offset_ms for offset_ms in (0, 10_000, 5_000, 30_000)]
    file = lines(tmp_path / "a.csv", *(f"u,i{i},{at}" for i, at in enumerate(times)))
    clock = TestClock()
    send(file, broker, clock, columns=("user_id", "item_id", "occurred_at"), topic="clicks", speed=10)
    assert clock.slept_s == [1.0, 2.0]


def test_refused_rows_say_where_and_why(tmp_path: Path, broker: EmbeddedBroker) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(
        b"who,item_id,price,ts\n"  # row 1
        b"u1,i1,5,%(now)d\n"
        b"u1,i2,cheap,%(now)d\n"  # 3
        b"u1,,5,%(now)d\n"
        b"u1,i4,5\n"  # 5
        b'u1,"i\n5",5,%(now)d\n'  # 6 and 7: a cell of two lines, which is fine
        b"\xff,i6,5,%(now)d\n"  # 8
        b"u1,i7,5,1511658000\n"  # 9
        b"u1,i8,5,%(future)d\n"
        b"u1,i9,nan,%(now)d\n" % {b"now": NOW_MS, b"future": NOW_MS + 2 * 86_400_000}
    )
    summary = send(file, broker, topic="clicks", mapping={"user_id": "who", "occurred_at": "ts"})
    assert summary.sent == {"clicks": 2}
    assert summary.refused == 7
    assert summary.refusals == [
        Refusal(3, "price: Input should be a valid number; got 'cheap'"),
        Refusal(4, "item_id: the row has no value"),
        Refusal(5, "3 cells for 4 columns (who, item_id, price, ts)"),
        Refusal(8, "user_id (column who): Input should be a valid string, unable to parse raw data as a unicode string"
        "; got '\\udcff'"),
        Refusal(9, "occurred_at (column ts): '1511658000' means 1970-01-18, and the earliest date allowed is 2000-01-01"
        "; if the file counts seconds, say --time-unit s: then it means 2017-11-26"),
    ]  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=200).print(summary)
    assert "sent to clicks" in out.getvalue()
    assert "row 9: occurred_at (column ts)" in out.getvalue()
    assert "… and 2 more" in out.getvalue()


def test_lines_that_are_no_objects_are_refused(tmp_path: Path, broker: EmbeddedBroker) -> None:
    good = json.dumps({"user_id": "u", "item_id": "i", "occurred_at": NOW_MS})
    summary = send(lines(tmp_path / "a.ndjson", "{", "[1]", good, '{"user_id": NaN}'), broker, topic="clicks")
    assert summary.sent == {"clicks": 1}
    assert [refusal.row for refusal in summary.refusals] == [1, 2, 4]
    assert summary.refusals[0].reason.startswith("no JSON: ")
    assert summary.refusals[1].reason == "not a JSON object: [1]"


def test_an_empty_file_sends_nothing(tmp_path: Path, broker: EmbeddedBroker) -> None:
    assert send(lines(tmp_path / "a.jsonl"), broker, topic="clicks").sent.total() == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.csv", {}, "say where the events go: --topic clicks for all, or --topic-column"),
        ("a.csv", {"topic": "clicks", "topic_column": "kind"}, "say where the events go"),
        ("a.csv", {"topic_column": "kind"}, "--topic-column kind needs its values' topics: --topics pv=clicks"),
        ("a.csv", {"topic": "cliks"}, "no contract is declared for topic 'cliks'; there is: clicks, likes"),
        ("a.csv", {"topic": "clicks", "time_unit": "min"}, "--time-unit min: a number in occurred_at counts s or ms"),
        ("a.csv", {"topic": "clicks", "speed": 0}, "--speed 0 must be more than 0"),
        ("a.csv", {"topic": "clicks", "mapping": {"user": "who"}}, "--map user=who: no contract has a field 'user'"),
        (
            "a.csv",
            {"topic": "clicks", "mapping": {"user_id": "whom"}},
            r"--map user_id=whom: there is no such column; \S+a\.csv has: who, item_id, occurred_at",
        ),
        (
            "a.csv",
            {"topic_column": "kind", "topics": {"pv": "clicks"}, "mapping": {"user_id": "who"}},
            "--topic-column kind: there is no such column",
        ),
        ("a.csv", {"topic": "clicks"}, r"Click needs 'user_id', and no column is called so; .*--map user_id=COLUMN"),
        ("a.jsonl", {"topic": "clicks"}, r"Click needs 'user_id', .* has: who, item_id"),
        ("a.parquet", {"topic": "clicks"}, r"a\.parquet can't be read: "),
        ("none.csv", {"topic": "clicks"}, r"none\.csv can't be read: .*[nN]o such file"),
        ("a.xlsx", {"topic": "clicks"}, r"a\.xlsx: replay reads \.csv, \.jsonl, \.ndjson, \.parquet, text also with"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_sent(
    tmp_path: Path, name: str, options: dict[str, Any], message: str
) -> None:
    lines(tmp_path / "a.csv", "who,item_id,occurred_at", f"u1,i1,{NOW_MS}")
    lines(tmp_path / "a.jsonl", '{"who": "u1", "item_id": "i1", "occurred_at": 1}')
    lines(tmp_path / "a.parquet", "no Parquet")
    with pytest.raises(ReplayError, match=message):
        send(tmp_path / name, **options)


def test_kafka_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As kafka-python finds it; really to try leaves sockets of its own open, and takes its time."""

    def no_broker(**_: Any) -> None:
        raise KafkaTimeoutError("Unable to bootstrap from ['127.0.0.1:1']")  # noqa: EM101  # as it words it

    monkeypatch.setattr("headrace.replay.KafkaProducer", no_broker)
    file = lines(tmp_path / "a.csv", "user_id,item_id,occurred_at", f"u1,i1,{NOW_MS}")
    with pytest.raises(ReplayError, match=r"Kafka at 127\.0\.0\.1:1: .*is HEADRACE_KAFKA right"):
        send(file, topic="clicks")


def test_an_event_that_the_broker_does_not_take_is_named(tmp_path: Path, broker: EmbeddedBroker) -> None:
    file = lines(tmp_path / "a.csv", "user_id,item_id,occurred_at", f"u1,i1,{NOW_MS}")
    options = Replay(file, topic="clicks", kafka_options=MOCK | {"max_request_size": 10}, timeout_s=DEADLINE_S)
    with pytest.raises(ReplayError, match=r"a\.csv, row 2: .*topic 'clicks'.*max_request_size"):
        run(options, CONTRACTS, broker.bootstrap_servers, TestClock(), Progress(disable=True))


# --- records as others write them


class Moved(Event, topic="moves", when={"kind": "moved"}, occurred_at=source.seconds("meta.ts"), event_id="id"):
    user_id: int = Field(validation_alias=AliasPath("who", "id"))


class Stopped(Event, topic="moves", when={"kind": "stopped"}, event_id=source.position, occurred_at="at"):
    user_id: int


def test_records_of_others_are_sent_as_they_are_and_shifted_where_their_time_is(
    tmp_path: Path, broker: EmbeddedBroker
) -> None:
    """Each is held to the contract that claims it, wherever its time is and whatever it counts."""
    old_s = NOW_MS // 1000 - 86_400
    rows: list[dict[str, Any]] = [
        {"kind": "moved", "id": 1, "meta": {"ts": old_s, "more": [1]}, "who": {"id": 7}},
        {"kind": "stopped", "at": datetime.fromtimestamp(old_s - 60, UTC).isoformat(), "user_id": 8},
        {"kind": "moved", "id": 2, "meta": {"ts": "never"}, "who": {"id": 7}},
        {"kind": "jumped"},
    ]
    file = tmp_path / "moves.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    contracts: Any = {"moves": Written("moves", [event_spec(each) for each in (Moved, Stopped)])}
    replay = Replay(file, topic="moves", rebase_to_now=True, kafka_options=MOCK, timeout_s=DEADLINE_S, key="user_id")
    summary = run(replay, contracts, broker.bootstrap_servers, TestClock(), Progress(disable=True))
    assert (summary.sent["moves"], summary.refused, summary.left_out["no contract's"]) == (2, 1, 1)
    assert summary.refusals[0].reason.startswith("occurred_at (meta.ts): not RFC 3339")
    consumer = Consumer({"bootstrap.servers": broker.bootstrap_servers, "group.id": "t"})
    partitions = consumer.list_topics("moves", timeout=10).topics["moves"].partitions
    consumer.assign([TopicPartition("moves", number, 0) for number in partitions])
    sent = [json.loads(each.value() or b"") for each in consumer.consume(2, timeout=DEADLINE_S)]
    consumer.close()
    moved, stopped = sorted(sent, key=lambda each: str(each["kind"]))
    assert moved == {**rows[0], "meta": {"ts": NOW_MS / 1000, "more": [1]}}
    assert stopped["at"] == datetime.fromtimestamp(NOW_MS / 1000 - 60, UTC).isoformat(timespec="milliseconds")
    (tmp_path / "moves.csv").write_text("kind\nmoved\n")
    with pytest.raises(ReplayError, match=r"a CSV file has only texts: use \.jsonl"):
        run(
            Replay(tmp_path / "moves.csv", topic="moves", kafka_options=MOCK),
            contracts,
            "127.0.0.1:1",
            TestClock(),
            Progress(disable=True),
        )
