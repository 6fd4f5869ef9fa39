"""`headrace replay FILE`: events from a CSV, JSON Lines or Parquet file to Kafka, each held to its contract first.

A row becomes an event of its topic's contract; or on a topic whose records are as others write them (`written`), where
several contracts may be, it is a whole record of theirs, sent as it is.

A file is read twice, row by row: once to count it, to learn its columns and (to rebase times) its latest event, once to
send. Text files go through Python's own readers rather than Arrow's, which know no row numbers and give up a whole file
for one bad line; Arrow decompresses them (`.csv.gz`, `.jsonl.zst`) and reads Parquet.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import io
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple, Protocol, get_origin

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from kafka import KafkaProducer
from kafka.errors import KafkaError
from pydantic import ValidationError
from rich.console import Group, RenderableType
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from features.events import NEWEST_MS, OLDEST_MS, Event, Kind, epoch_ms
from features.plan import EventSpec, Plan, find_contract
from features.source import Source, record_time
from features.times import DAY_MS
from streams.chunk import Chunk, Partition
from streams.contract import ContractDecoder
from streams.decode import Topic
from streams.opened import time_of

UNDELIVERED_MAX: Final = 10_000
"""Events on their way at once: kafka-python's producer has no limit of its own."""
REASONS_SHOWN: Final = 5
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_AS_SECONDS_MS: Final = (315_532_800_000, NEWEST_MS)
"""1980 to 2100: a number of milliseconds that means early 1970, and as seconds such a date, counts seconds."""
_SHOWN_LENGTH_MAX: Final = 80
_CLOSE_TIMEOUT_S: Final = 2.0
"""After an interruption; otherwise all is delivered before, and closing waits for nothing."""

Row = dict[str, Any] | str
"""A row's values by column, or what is wrong with it."""
TimeUnit = Literal["s", "ms"]


class Record(NamedTuple):
    """What is sent."""

    value: bytes
    key: bytes | None
    occurred_at: int


class Written:
    """A topic whose records are as others write them: who claims one, and judges it.

    Args:
        name: the topic.
        specs: its contracts.

    Attributes:
        refusal: why they can't be sent; empty if they can.
    """

    def __init__(self, name: str, specs: Sequence[EventSpec]) -> None:
        self._name, self._specs = name, {spec.name: spec for spec in specs}
        for spec in specs:
            if spec.reads.format != "json":
                self.refusal = (
                    f"records of {name} are {spec.reads.format}, and replay sends JSON: use their own producer"
                )
                break
        else:
            self.refusal = ""
        self._topic = Topic(specs, {each.name: ContractDecoder(each.name, find_contract(each)) for each in specs})

    def judge(self, row: dict[str, Any], now_ms: int, shift_ms: int = 0, key: str = "") -> Record | str | None:
        """The record of a row, why it is refused, or None if it is nobody's."""
        found = self._judged(row, now_ms)
        if shift_ms and isinstance(found, tuple):
            spec, at_ms = found
            row = _shifted(spec, row, at_ms + shift_ms)
            found = self._judged(row, now_ms)
        if not isinstance(found, tuple):
            return found
        value = row.get(key)
        return Record(_json_of(row), None if value is None else str(value).encode(), found[1])

    def _judged(self, row: dict[str, Any], now_ms: int) -> tuple[EventSpec, int] | str | None:
        # A time ahead is for the caller to judge, as of every row.
        record_ms, offsets = np.array([NEWEST_MS]), np.zeros(1, np.int64)
        if any(time_of(spec.reads) == record_time for spec in self._specs.values()):
            record_ms = np.array([now_ms])
        chunk = Chunk(Partition(self._name, 0), 0, 1, 0, [_json_of(row)], [None], offsets, record_ms)
        judged = self._topic.judge([chunk], record_ms, offsets)
        if judged.refused:
            return judged.refused[0][1]
        whose = ((spec, accepted) for spec, accepted in judged.accepted if len(accepted.index))
        return next(((spec, int(accepted.times_ms[0])) for spec, accepted in whose), None)


Contracts = Mapping[str, "type[Event] | Written"]
"""Of each topic."""


def contracts_of(plan: Plan) -> dict[str, type[Event] | Written]:
    """The contracts of a plan, as replay has them."""
    found: dict[str, type[Event] | Written] = {}
    for topic, specs in plan.topics.items():
        (first, *more) = (find_contract(spec) for spec in specs)
        plain = all(leaf.type in (str, int, float, bool) or get_origin(leaf.type) for leaf in first.leaves().values())
        is_ours = not more and plain and specs[0].reads == Source()
        found[topic] = first if is_ours else Written(topic, specs)
    return found


def _json_of(row: Any) -> bytes:
    return json.dumps(
        row, default=lambda value: value.isoformat() if hasattr(value, "isoformat") else str(value)
    ).encode()


def _shifted(spec: EventSpec, row: dict[str, Any], at_ms: int) -> dict[str, Any]:
    """The row with another time, written as the one that is there."""
    time = time_of(spec.reads)
    path: Sequence[Any] = spec.reads.paths.get("occurred_at", (("occurred_at",),))[0]
    unit = "ms"
    if time is not None:
        if time.at is None or time.at.header:
            return row
        path, unit = time.at.path, time.unit
    whole = copy.deepcopy(row)
    inner: Any = whole
    if spec.reads.envelope == "debezium" and "op" not in row:
        inner = whole["payload"]
    for step in path[:-1]:
        inner = inner[step]
    if isinstance(inner[path[-1]], str | date):
        inner[path[-1]] = (_EPOCH + timedelta(milliseconds=at_ms)).isoformat(timespec="milliseconds")
    else:
        inner[path[-1]] = {"s": at_ms / 1000, "ms": at_ms, "us": at_ms * 1000}[unit]
    return whole


def _plain_contract(contract: type[Event] | Written) -> type[Event]:
    assert not isinstance(contract, Written)  # noqa: S101  # for the type checker: it was looked at before
    return contract


def _record_of(event: Event, key: str) -> Record:
    value = getattr(event, key, None)
    return Record(
        event.model_dump_json(exclude_none=True).encode(),
        None if value is None else str(value).encode(),
        event.occurred_at,
    )


class ReplayError(ValueError):
    """The options, the file and the contracts don't fit together, or Kafka did not take the events."""


class Clock(Protocol):
    """Time, as replay needs it."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""

    def sleep(self, seconds: float) -> None:
        """Waits."""


class SystemClock:
    """The machine's own time."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def sleep(self, seconds: float) -> None:
        """Waits."""
        time.sleep(seconds)


@dataclass(frozen=True)
class Replay:
    """What to send, and how.

    Args:
        file: `.csv`, `.jsonl`, `.ndjson` or `.parquet`; text also compressed (`.csv.gz`).
        topic: the topic of all events; otherwise `topic_column`.
        topic_column: the column whose values decide the topic.
        topics: those values' topics. Rows with another value are left out, and counted by value.
        columns: the columns of a CSV file that has no header.
        mapping: contract field to column, where the names differ.
        time_unit: what numbers in the column of `occurred_at` count. Texts are RFC 3339 whatever it says; Parquet's own
            timestamps without a zone are UTC.
        rebase_to_now: shift all times so that the latest event happens now.
        speed: event time that passes a second; as fast as possible if None.
        key: the field that is the record's key.
        kafka_options: more options of kafka-python's producer, such as `security_protocol`.
        timeout_s: how long the broker may take to acknowledge an event.
    """

    file: Path
    topic: str | None = None
    topic_column: str | None = None
    topics: Mapping[str, str] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    mapping: Mapping[str, str] = field(default_factory=dict)
    time_unit: TimeUnit = "ms"
    rebase_to_now: bool = False
    speed: float | None = None
    key: str = "user_id"
    kafka_options: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float = 30.0


@dataclass(frozen=True)
class Refusal:
    """A row that was not sent: its number (a text file's line, counted from 1), and why."""

    row: int
    reason: str


@dataclass
class Summary:
    """What became of a file's rows; prints itself on a rich console."""

    file: Path
    sent: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    refused: int = 0
    refusals: list[Refusal] = field(default_factory=list)
    seconds: float = 0.0

    def refuse(self, row: int, reason: str) -> None:
        """Counts a refused row, and keeps the first few reasons."""
        self.refused += 1
        if len(self.refusals) < REASONS_SHOWN:
            self.refusals.append(Refusal(row, reason))

    def __rich__(self) -> RenderableType:
        title = Text(f"{self.file.name}: {self.sent.total():,} events sent in {self.seconds:.1f} s")
        table = Table("rows")
        table.add_column("number", justify="right")
        for topic, n in sorted(self.sent.items()):
            table.add_row(Text(f"sent to {topic}"), f"{n:,}")
        for value, n in self.left_out.most_common():
            table.add_row(Text(f"left out: {value}"), f"{n:,}")
        table.add_row("refused by the contract", f"{self.refused:,}")
        reasons = [Text(f"row {refusal.row}: {refusal.reason}") for refusal in self.refusals]
        if self.refused > len(self.refusals):
            reasons.append(Text(f"… and {self.refused - len(self.refusals):,} more"))
        return Group(title, table, *reasons)


def run(options: Replay, contracts: Contracts, kafka: str, clock: Clock, progress: Progress) -> Summary:
    """Sends a file's events to Kafka; returns when the broker has them all.

    A row without an `event_id` gets one made of the file's name and the row's number, so that a file sent twice within
    the dedupe horizon counts once.

    Args:
        options: what to send, and how.
        contracts: the contract of each topic.
        kafka: bootstrap servers.
        clock: for rebasing and `speed`.
        progress: shows how far it is while it is live.

    Raises:
        ReplayError: names the option, the file, the row or the column that is wrong, and what would be right.
    """
    summary = Summary(options.file)
    started_ms = clock.now_ms()
    rows, shift_ms = _first_pass(options, contracts, started_ms, progress)
    task = progress.add_task(f"sending {options.file.name}", total=rows)
    events = _events(options, contracts, shift_ms, started_ms, summary, lambda: progress.advance(task))
    _send(events, options, kafka, clock, summary)
    summary.seconds = (clock.now_ms() - started_ms) / 1000
    return summary


def _first_pass(options: Replay, contracts: Contracts, now_ms: int, progress: Progress) -> tuple[int, int]:
    """The number of rows, and the milliseconds to add to their times.

    Only what would be sent counts for the latest time: a row that the contract refuses may hold any.
    """
    _check_topics(options, contracts)
    task: TaskID = progress.add_task(f"reading {options.file.name}", total=None)
    columns: dict[str, None] = dict.fromkeys(_columns(options))
    rows = 0
    latest_ms: int | None = None
    if columns:
        _check_columns(options, contracts, columns)
    for number, row in _rows(options):
        rows += 1
        progress.advance(task)
        if isinstance(row, str):
            continue
        columns |= dict.fromkeys(row)
        topic = _topic(options, row)
        if options.rebase_to_now and isinstance(written := contracts.get(topic), Written):
            judged = written.judge(row, now_ms)
            if isinstance(judged, Record) and (latest_ms is None or judged.occurred_at > latest_ms):
                latest_ms = judged.occurred_at
        elif options.rebase_to_now and topic in contracts:
            at_ms = _at_ms(options, row)
            # Times are held to the lower bound once they are shifted; here one within it stands in.
            if at_ms is not None and at_ms <= NEWEST_MS and (latest_ms is None or at_ms > latest_ms):
                event = _event(options, _plain_contract(contracts[topic]), number, row, shift_ms=NEWEST_MS - at_ms)
                latest_ms = latest_ms if isinstance(event, str) else at_ms
    progress.remove_task(task)
    if rows:
        _check_columns(options, contracts, columns)
    return rows, 0 if latest_ms is None else now_ms - latest_ms


def _events(
    options: Replay,
    contracts: Contracts,
    shift_ms: int,
    now_ms: int,
    summary: Summary,
    advance: Callable[[], None],
) -> Iterator[tuple[int, str, Record]]:
    """What is to be sent: row number, topic, record."""
    for number, row in _rows(options):
        advance()
        if isinstance(row, str):
            summary.refuse(number, row)
            continue
        topic = _topic(options, row)
        if topic not in contracts:
            summary.left_out[_shown(row.get(options.topic_column or ""))] += 1
            continue
        contract = contracts[topic]
        if isinstance(contract, Written):
            found = contract.judge(row, now_ms, shift_ms, options.key)
        else:
            event = _event(options, contract, number, row, shift_ms)
            found = event if isinstance(event, str) else _record_of(event, options.key)
        if isinstance(found, Record) and found.occurred_at > now_ms + DAY_MS:
            found = f"occurred_at: {found.occurred_at} is over a day ahead of now; --rebase-to-now shifts all times"
        if found is None:
            summary.left_out["no contract's"] += 1
        elif isinstance(found, str):
            summary.refuse(number, found)
        else:
            yield number, topic, found


def _send(
    events: Iterator[tuple[int, str, Record]], options: Replay, kafka: str, clock: Clock, summary: Summary
) -> None:
    producer: Any = None
    undelivered: deque[tuple[int, str, Any]] = deque()
    first_ms: int | None = None
    started_ms = clock.now_ms()
    try:
        producer = _producer(options, kafka)
        for number, topic, event in events:
            if options.speed is not None:
                first_ms = event.occurred_at if first_ms is None else first_ms
                due_ms = started_ms + (event.occurred_at - first_ms) / options.speed
                if (early_ms := due_ms - clock.now_ms()) > 0:
                    clock.sleep(early_ms / 1000)
            try:
                sent = producer.send(topic, event.value, key=event.key)
            except KafkaError as error:
                raise _not_taken(options, number, topic, error, summary) from error
            undelivered.append((number, topic, sent))
            if len(undelivered) >= UNDELIVERED_MAX:
                _await(undelivered, UNDELIVERED_MAX // 2, options, summary)
        producer.flush(options.timeout_s)
        _await(undelivered, 0, options, summary)
    except KafkaError as error:
        msg = f"Kafka at {kafka}: {error}; is it up, and is HEADRACE_KAFKA right?"
        raise ReplayError(msg) from error
    finally:
        if producer is not None:
            producer.close(timeout=_CLOSE_TIMEOUT_S)


def _producer(options: Replay, kafka: str) -> Any:
    timeout_ms = int(options.timeout_s * 1000)
    return KafkaProducer(
        **{
            "bootstrap_servers": kafka.split(","),
            "acks": "all",
            "linger_ms": 5,
            "batch_size": 131_072,
            "max_block_ms": timeout_ms,
            "bootstrap_timeout_ms": timeout_ms,
            "request_timeout_ms": timeout_ms,
            "delivery_timeout_ms": timeout_ms + 1_000,  # It must be more than the two before it together.
            **options.kafka_options,
        }
    )


def _await(undelivered: deque[tuple[int, str, Any]], down_to: int, options: Replay, summary: Summary) -> None:
    """Waits for the oldest events' acknowledgements."""
    while len(undelivered) > down_to:
        number, topic, sent = undelivered.popleft()
        try:
            sent.get(timeout=options.timeout_s)
        except KafkaError as error:
            raise _not_taken(options, number, topic, error, summary) from error
        summary.sent[topic] += 1


def _not_taken(options: Replay, row: int, topic: str, error: KafkaError, summary: Summary) -> ReplayError:
    return ReplayError(
        f"{options.file}, row {row}: not taken by topic {topic!r}: {error}; {summary.sent.total():,} before it were. "
        "`headrace doctor` looks at the broker and its topics"
    )


def _check_topics(options: Replay, contracts: Contracts) -> None:
    if (options.topic is None) == (options.topic_column is None):
        msg = "say where the events go: --topic clicks for all, or --topic-column kind with --topics pv=clicks …"
        raise ReplayError(msg)
    if options.topic_column is not None and not options.topics:
        msg = f"--topic-column {options.topic_column} needs its values' topics: --topics pv=clicks --topics fav=likes"
        raise ReplayError(msg)
    if options.time_unit not in ("s", "ms"):
        msg = f"--time-unit {options.time_unit}: a number in occurred_at counts s or ms"
        raise ReplayError(msg)
    if options.speed is not None and not 0 < options.speed < float("inf"):
        msg = f"--speed {options.speed} must be more than 0: 10 sends ten seconds of events a second"
        raise ReplayError(msg)
    for topic in _used(options):
        if isinstance(written := contracts.get(topic), Written) and written.refusal:
            raise ReplayError(written.refusal)
        if topic not in contracts:
            msg = f"no contract is declared for topic {topic!r}; there is: {', '.join(sorted(contracts))}"
            raise ReplayError(msg)
        if isinstance(contracts[topic], Written) and options.file.suffixes[:1] == [".csv"]:
            msg = f"{options.file}: records of {topic} are as others write them; a CSV file has only texts: use .jsonl"
            raise ReplayError(msg)
    plain = [each for topic in _used(options) if not isinstance(each := contracts[topic], Written)]
    known = {name for each in plain for name in each.model_fields}
    for name in options.mapping:
        if name not in known:
            there = ", ".join(sorted(known))
            msg = f"--map {name}={options.mapping[name]}: no contract has a field {name!r}; there is: {there}"
            raise ReplayError(msg)


def _check_columns(options: Replay, contracts: Contracts, columns: Mapping[str, None]) -> None:
    there = f"{options.file} has: {', '.join(columns)}"
    if options.topic_column is not None and options.topic_column not in columns:
        msg = f"--topic-column {options.topic_column}: there is no such column; {there}"
        raise ReplayError(msg)
    for name, column in options.mapping.items():
        if column not in columns:
            msg = f"--map {name}={column}: there is no such column; {there}"
            raise ReplayError(msg)
    for topic in _used(options):
        contract = contracts[topic]
        if isinstance(contract, Written):
            continue
        for name, info in contract.model_fields.items():
            if info.is_required() and name != "event_id" and options.mapping.get(name, name) not in columns:
                msg = (
                    f"{contract.__name__} needs {name!r}, and no column is called so; {there}. "
                    f"Name the one that holds it: --map {name}=COLUMN (or all of a headerless CSV: --columns a,b)"
                )
                raise ReplayError(msg)


def _used(options: Replay) -> list[str]:
    return [options.topic] if options.topic is not None else list(options.topics.values())


def _topic(options: Replay, row: Mapping[str, Any]) -> str:
    """The row's topic, or an empty text."""
    if options.topic is not None:
        return options.topic
    return options.topics.get(str(row.get(options.topic_column or "")), "")


def _event(options: Replay, contract: type[Event], number: int, row: dict[str, Any], shift_ms: int) -> Event | str:
    """The row as an event, or why the contract refuses it."""
    found: dict[str, Any] = {}
    for name, kind in contract.kinds().items():
        value = row.get(options.mapping.get(name, name))
        if value is not None:
            found[name] = _time(value, options.time_unit) if name == "occurred_at" else _plain(value, kind)
    found.setdefault("event_id", hashlib.sha256(f"{options.file.name}:{number}".encode()).hexdigest()[:24])
    if options.rebase_to_now and (at_ms := _at_ms(options, row)) is not None:
        if _as_seconds(options, row) is not None:
            # Shifted, it would pass for a time, and a day of the file for a minute and a half.
            return _out_of_place(options, row, at_ms)
        found["occurred_at"] = at_ms + shift_ms
    try:
        return contract.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        bounds = first.get("ctx", {})
        bound_ms = bounds.get("ge", bounds.get("le"))
        at_ms = _at_ms(options, row) if first["loc"] == ("occurred_at",) and bound_ms is not None else None
        return _reason(first, options) if at_ms is None else _out_of_place(options, row, at_ms, shift_ms, bound_ms)


def _out_of_place(
    options: Replay, row: Mapping[str, Any], at_ms: int, shift_ms: int = 0, bound_ms: int | None = None
) -> str:
    """One line: what the time means, the bound that it breaks if it does, and what would help."""
    column = _time_column(options)
    where = "occurred_at" if column == "occurred_at" else f"occurred_at (column {column})"
    shown = _shown(row.get(column), quoted=not isinstance(row.get(column), datetime))
    said = [f"{where}: {shown} means {_date(at_ms)}"]
    early = bound_ms is not None and at_ms + shift_ms < bound_ms
    if bound_ms is not None:
        shifted = f", shifted to {_date(at_ms + shift_ms)}" if shift_ms else ""
        said[0] += f"{shifted}, and the {'earliest' if early else 'latest'} date allowed is {_date(bound_ms)}"
    as_seconds_ms = _as_seconds(options, row)
    if as_seconds_ms is not None:
        said.append(f"if the file counts seconds, say --time-unit s: then it means {_date(as_seconds_ms)}")
    if early and not options.rebase_to_now and (as_seconds_ms is None or as_seconds_ms < OLDEST_MS):
        said.append("--rebase-to-now shifts all times, so that the last is now")
    if not early and options.time_unit == "s":
        said.append("if the file counts milliseconds, say --time-unit ms")
    return "; ".join(said)


def _time_column(options: Replay) -> str:
    return options.mapping.get("occurred_at", "occurred_at")


def _at_ms(options: Replay, row: Mapping[str, Any]) -> int | None:
    """The row's time as epoch milliseconds, whatever its date; None where the contract is to say what is wrong."""
    try:
        at_ms = epoch_ms(_time(row.get(_time_column(options)), options.time_unit))
    except ValueError:
        return None
    return at_ms if isinstance(at_ms, int) else None


def _as_seconds(options: Replay, row: Mapping[str, Any]) -> int | None:
    """Epoch milliseconds of a number that is taken for milliseconds and is likely to count seconds; otherwise None."""
    value = row.get(_time_column(options))
    at_ms = None if options.time_unit == "s" or isinstance(value, datetime) else _time(value, "s")
    return at_ms if isinstance(at_ms, int) and _AS_SECONDS_MS[0] <= at_ms <= _AS_SECONDS_MS[1] else None


def _date(at_ms: int) -> str:
    try:
        return (_EPOCH + timedelta(milliseconds=at_ms)).date().isoformat()
    except OverflowError:
        return "a date beyond the years 1 to 9999"


def _plain(value: Any, kind: Kind) -> Any:
    """The value as the contract's kind where that is plain; anything else stays, for the contract to judge."""
    if isinstance(value, bool):
        return value
    match kind, value:
        # A whole number beside empty cells is a float to many a writer.
        case ("str", int()) | ("str", float()) if value == value // 1:
            return str(int(value))
        case "bool", str():
            return {"true": True, "1": True, "false": False, "0": False}.get(value.lower(), value)
        case ("float", int() | str() | Decimal()) | ("int", str()):
            try:
                return int(value) if kind == "int" else float(value)
            except (ValueError, OverflowError):
                return value
    return value


def _time(value: Any, unit: TimeUnit) -> Any:
    """Epoch milliseconds of a number or a datetime; anything else stays, for the contract to judge."""
    if isinstance(value, datetime):
        aware = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
        return (aware - _EPOCH) // timedelta(milliseconds=1)
    try:
        return round(float(value) * 1000) if unit == "s" else int(value)
    except (TypeError, ValueError, OverflowError):
        return value


def _reason(first: Mapping[str, Any], options: Replay) -> str:
    """One line: which field, in which column, holds what, and what is expected."""
    name = str(first["loc"][0]) if first["loc"] else ""
    column = options.mapping.get(name, name)
    where = name if column == name else f"{name} (column {column})"
    if first["type"] == "missing":
        return f"{where}: the row has no value"
    return f"{where}: {first['msg']}; got {_shown(first['input'], quoted=True)}"


def _shown(value: object, *, quoted: bool = False) -> str:
    text = repr(value) if quoted else str(value)
    return text if len(text) <= _SHOWN_LENGTH_MAX else text[: _SHOWN_LENGTH_MAX - 1] + "…"


def _rows(options: Replay) -> Iterator[tuple[int, Row]]:
    """The file's rows with their numbers. Rows that can't be read are texts that say why."""
    try:
        yield from _READERS[_format(options)](options)
    except (OSError, pa.ArrowException) as error:
        msg = f"{options.file} can't be read: {error}"
        raise ReplayError(msg) from error


def _format(options: Replay) -> str:
    """The suffix that says what the file is; a compression's stands behind it."""
    suffixes = [suffix.lower() for suffix in options.file.suffixes[-2:]]
    for suffix in reversed(suffixes):
        if suffix in _READERS:
            return suffix
        if suffix not in _COMPRESSIONS:
            break
    msg = f"{options.file}: replay reads {', '.join(_READERS)}, text also with {', '.join(_COMPRESSIONS)} behind it"
    raise ReplayError(msg)


def _columns(options: Replay) -> tuple[str, ...]:
    """The columns, where the file says them before its rows; otherwise none."""
    kind = _format(options)
    try:
        if kind == ".parquet":
            return tuple(pq.read_schema(options.file).names)
        if kind == ".csv":
            return options.columns or _header(options)
    except (OSError, pa.ArrowException) as error:
        msg = f"{options.file} can't be read: {error}"
        raise ReplayError(msg) from error
    return ()


def _header(options: Replay) -> tuple[str, ...]:
    with _text(options.file) as lines:
        return tuple(next(csv.reader(lines), ()))


def _text(file: Path) -> io.TextIOWrapper:
    """A text file's lines, decompressed. What is not UTF-8 becomes surrogates, which contracts refuse."""
    return io.TextIOWrapper(
        io.BufferedReader(pa.input_stream(str(file), compression="detect"), 1 << 20),
        encoding="utf-8-sig",
        errors="surrogateescape",
        newline="",
    )


def _csv_rows(options: Replay) -> Iterator[tuple[int, Row]]:
    with _text(options.file) as lines:
        reader = csv.reader(lines)
        columns = options.columns or tuple(next(reader, ()))
        while True:
            number = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, f"no CSV: {error}"
                continue
            if len(cells) == len(columns):
                yield number, {column: cell or None for column, cell in zip(columns, cells, strict=True)}
            elif cells:  # Otherwise the line is empty.
                yield number, f"{len(cells)} cells for {len(columns)} columns ({', '.join(columns)})"


def _json_rows(options: Replay) -> Iterator[tuple[int, Row]]:
    with _text(options.file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = orjson.loads(line.encode(errors="surrogateescape"))
            except orjson.JSONDecodeError as error:
                yield number, f"no JSON: {error}"
                continue
            yield number, row if isinstance(row, dict) else f"not a JSON object: {_shown(row, quoted=True)}"


def _parquet_rows(options: Replay) -> Iterator[tuple[int, Row]]:
    number = 0
    with pq.ParquetFile(options.file) as file:
        for batch in file.iter_batches(batch_size=10_000):
            for row in batch.to_pylist():
                number += 1
                yield number, row


_READERS: Final[dict[str, Callable[[Replay], Iterator[tuple[int, Row]]]]] = {
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".parquet": _parquet_rows,
}
_COMPRESSIONS: Final = (".gz", ".bz2", ".zst", ".lz4")
