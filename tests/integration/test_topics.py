"""Topics that were there before anybody thought of features: as others write them, through a real Kafka, to HTTP."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, NamedTuple

import httpx
import pyarrow as pa
import pytest
from confluent_kafka import Producer
from confluent_kafka.schema_registry import SchemaRegistryClient
from confluent_kafka.schema_registry.avro import AvroSerializer
from confluent_kafka.schema_registry.protobuf import ProtobufSerializer
from confluent_kafka.serialization import MessageField, SerializationContext
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool

from config.settings import DEAD_LETTER_SUFFIX
from headrace.doctor import examine
from headrace.embedded import free_port
from store.archive import tables_of
from store.plans import load_plan
from tests.support.schema_registry import SchemaRegistry
from tests.support.stack import Stack, wait_for
from training.run import TIME_COLUMN, TableLabels, training_set

pytestmark = pytest.mark.kafka

N = 1500
USERS, ITEMS = 25, 40
TAGS = ("new", "sale", "red", "blue")
AVRO: dict[str, Any] = {
    "type": "record",
    "name": "Seen",
    "fields": [
        {"name": "id", "type": "string"},
        {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}},
        {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": ["view", "share"]}},
        {
            "name": "who",
            "type": {"type": "record", "name": "Who", "fields": [{"name": "id", "type": "long"}]},
        },
        {
            "name": "product",
            "type": {"type": "record", "name": "Product", "fields": [{"name": "id", "type": "long"}]},
        },
        {"name": "tags", "type": {"type": "array", "items": "string"}},
    ],
}
SURFACE = {"name": "surface", "type": ["null", "string"], "default": None}


class Fact(NamedTuple):
    """One thing that happened, as the oracle knows it."""

    contract: str
    user: int
    item: int
    t: int
    value: float = 0.0
    tags: tuple[str, ...] = ()
    surface: str | None = None


class Record(NamedTuple):
    """One record, and what follows from it: a fact, a dead letter with this in its reason, or nothing."""

    topic: str
    value: bytes | None
    headers: list[tuple[str, bytes]]
    fact: Fact | None = None
    refused: str = ""


def played_class(*, with_note: bool) -> Any:
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name=f"played{with_note}.proto", package="shop", syntax="proto3")
    message = file.message_type.add(name="Played")
    fields = [("id", kinds.TYPE_STRING), ("at", kinds.TYPE_INT64), ("user_id", kinds.TYPE_INT64)]
    fields += [("item_id", kinds.TYPE_INT32), ("seconds", kinds.TYPE_DOUBLE), ("note", kinds.TYPE_STRING)]
    for number, (name, kind) in enumerate(fields[: 6 if with_note else 5], 1):
        message.field.add(name=name, number=number, type=kind, label=kinds.LABEL_OPTIONAL)
    pool: Any = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("shop.Played"))


class Shop:
    """Writes as the shop's producers do, of everything a little; from half way on by newer schemas."""

    def __init__(self, rng: random.Random, client: SchemaRegistryClient, now_ms: int) -> None:
        self._rng, self._now_ms, self._n = rng, now_ms, 0
        self._avro = [
            AvroSerializer(client, json.dumps(AVRO | {"fields": [*AVRO["fields"], *more]})) for more in ([], [SURFACE])
        ]
        self._classes = [played_class(with_note=note) for note in (False, True)]
        options = {"use.deprecated.format": False}
        self._proto = [ProtobufSerializer(each, client, options) for each in self._classes]

    def records(self, n: int, *, newer: bool) -> Iterator[Record]:
        makers = [self._change, self._change, self._seen, self._played, self._mailed, self._rated, self._scrolled]
        for _ in range(n):
            self._n += 1
            yield from self._rng.choice(makers)(newer)

    def _who(self) -> tuple[int, int, int]:
        t = self._now_ms - self._rng.randrange(5 * 86_400_000)
        return self._rng.randrange(1, USERS), self._rng.randrange(1000, 1000 + ITEMS), t

    def _change(self, _newer: bool) -> Iterator[Record]:
        rng, (user, item, t) = self._rng, self._who()
        table = rng.choice(["clicks", "likes", "carts", "orders", "sessions"])
        operation = rng.choice("ccuudr")
        row: dict[str, Any] = {rng.choice(["user_id", "customer"]): user, "item_id": item}
        wrong = ""
        value = 0.0
        if table in ("clicks", "orders"):
            value = rng.randrange(1, 10_000) / 100
            row["price"] = rng.choice([value, str(value)])
        if table == "carts":
            value = float(rng.randrange(1, 5))
            row["n"] = int(value)
        if table == "orders":
            row["ordered_at"] = t * 1000
        if rng.random() < 0.05:
            row["item_id"], wrong = str(item), "item_id: Input should be a valid integer"
        after, before = (None, row) if operation == "d" else (row, row if operation == "u" else None)
        change: dict[str, Any] = {
            "op": operation,
            "source": {"table": table, "ts_ms": t, "lsn": self._n},
            "before": before,
        }
        change |= {"after": after, "ts_ms": self._now_ms}
        contracts = {"clicks": "Click", "likes": "Like", "carts": "Cart", "orders": "Order"}
        contract = (
            contracts.get(table, "") if operation in "cu" else "Unlike" if (table, operation) == ("likes", "d") else ""
        )
        whole: Any = {"schema": {}, "payload": change} if rng.random() < 0.3 else change
        fact = Fact(contract, user, item, t, value) if contract and not wrong else None
        refused = wrong if contract else ""
        yield Record("shop.interactions", json.dumps(whole).encode(), [], fact, refused)
        if rng.random() < 0.05:  # The connector was restarted, and sends it again.
            again = json.dumps(change | {"ts_ms": self._now_ms + 1}).encode()
            yield Record("shop.interactions", again, [], None, refused)
        if operation == "d":
            yield Record("shop.interactions", None, [])

    def _seen(self, newer: bool) -> Iterator[Record]:
        rng, (user, item, t) = self._rng, self._who()
        kind, tags = rng.choice(["view", "view", "share"]), tuple(rng.choices(TAGS, k=rng.randrange(4)))
        surface = rng.choice(["search", None]) if newer else None
        seen: dict[str, Any] = {"id": f"s{self._n}", "at": datetime.fromtimestamp(t / 1000, UTC), "kind": kind}
        seen |= {"who": {"id": user}, "product": {"id": item}, "tags": list(tags)}
        if newer:
            seen["surface"] = surface
        value = self._avro[newer](seen, SerializationContext("shop.seen", MessageField.VALUE))
        assert value is not None
        if rng.random() < 0.03:
            yield Record("shop.seen", b"\0\0\0\x27\x0f" + value[5:], [], None, "schema 9999: the schema registry")
            return
        fact = Fact("Seen", user, item, t, 0.0, tags, surface) if kind == "view" else None
        yield Record("shop.seen", value, [], fact)

    def _played(self, newer: bool) -> Iterator[Record]:
        user, item, t = self._who()
        seconds = self._rng.randrange(600) / 4
        message = self._classes[newer](id=f"p{self._n}", at=t, user_id=user, item_id=item, seconds=seconds)
        if newer:
            message.note = "full screen"
        value = self._proto[newer](message, SerializationContext("shop.played", MessageField.VALUE))
        yield Record("shop.played", value, [], Fact("Played", user, item, t, seconds))

    def _mailed(self, _newer: bool) -> Iterator[Record]:
        rng, (user, item, t) = self._rng, self._who()
        opened = rng.random() < 0.7
        at = datetime.fromtimestamp(t / 1000, UTC).isoformat(timespec="milliseconds")
        said = {"specversion": "1.0", "id": f"m{self._n}", "source": "/mail", "time": at}
        said["type"] = "mail.opened" if opened else "mail.sent"
        data: dict[str, Any] = {"user_id": user, "item_id": item}
        wrong = ""
        if rng.random() < 0.05:
            data["user_id"], wrong = None, "user_id: Input should be a valid integer"
        fact = Fact("Mailed", user, item, t) if opened and not wrong else None
        if rng.random() < 0.5:
            value, headers = json.dumps({**said, "data": data}), [("content-type", b"application/cloudevents+json")]
        else:
            value, headers = json.dumps(data), [(f"ce_{name}", each.encode()) for name, each in said.items()]
        yield Record("shop.mailed", value.encode(), headers, fact, wrong if opened else "")

    def _rated(self, _newer: bool) -> Iterator[Record]:
        rng, (user, item, t) = self._rng, self._who()
        t -= t % 1000
        stars = rng.choice([1.0, 2.5, 5.0, 7.0])
        rated = {"rating": self._n, "ts": t // 1000, "user_id": user, "item_id": item, "stars": stars}
        wrong = "stars: Input should be less than or equal to 5" if stars > 5 else ""
        if rng.random() < 0.05:
            rated["ts"], wrong = t, wrong or "occurred_at (ts"
        fact = None if wrong else Fact("Rated", user, item, t, stars)
        yield Record("shop.rated", json.dumps(rated).encode(), [], fact, wrong)

    def _scrolled(self, _newer: bool) -> Iterator[Record]:
        user, item, t = self._who()
        value = json.dumps({"user_id": user, "item_id": item, "t": t}).encode()
        yield Record("shop.scrolled", value, [], Fact("Scrolled", user, item, t))
        for _ in range(self._rng.randrange(3)):
            yield Record("shop.scrolled", value, [])


def of_user(facts: list[Fact]) -> dict[str, Any]:
    by = defaultdict[str, list[Fact]](list)
    for fact in facts:
        by[fact.contract].append(fact)
    stars = [fact.value for fact in by["Rated"]]
    latest = {fact.item: fact.t for fact in sorted(by["Click"], key=lambda fact: fact.t)}
    recent = sorted(latest, key=lambda item: (latest[item], str(item)), reverse=True)[:5]
    return {
        "clicks_7d": len(by["Click"]),
        "likes_7d": len(by["Like"]),
        "unlikes_7d": len(by["Unlike"]),
        "carts_7d": sum(fact.value for fact in by["Cart"]),
        "spent_7d": sum(fact.value for fact in by["Order"]),
        "seen_7d": len(by["Seen"]),
        "seen_by_tag_7d": dict(Counter(tag for fact in by["Seen"] for tag in set(fact.tags))),
        "searched_7d": sum(fact.surface == "search" for fact in by["Seen"]),
        "played_7d": sum(fact.value for fact in by["Played"]),
        "mailed_7d": len(by["Mailed"]),
        "rated_7d": sum(stars) / len(stars) if stars else None,
        "scrolled_7d": len(by["Scrolled"]),
        "recent": [str(item) for item in recent],
    }


def of_item(facts: list[Fact]) -> dict[str, Any]:
    n = Counter(fact.contract for fact in facts)
    names = {"clicks": "Click", "likes": "Like", "ordered": "Order", "seen": "Seen", "played": "Played"}
    names |= {"mailed": "Mailed", "rated": "Rated", "scrolled": "Scrolled"}
    return {f"{name}_7d": n[contract] for name, contract in names.items()}


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float):
        return bool(found == pytest.approx(wanted, rel=1e-9))
    return bool(found == wanted)


def differences(address: str, facts: list[Fact]) -> list[str]:
    wrong = []
    with httpx.Client(base_url=address, timeout=30) as http:
        for entity, field, oracle in (("user", "user", of_user), ("item", "item", of_item)):
            by_id = defaultdict[int, list[Fact]](list)
            for fact in facts:
                by_id[getattr(fact, field)].append(fact)
            for who, own in by_id.items():
                found = http.get(f"/v1/entities/{entity}/{who}", params={"service": "shop_v1"}).json()["features"]
                plain = {name.partition("__")[2]: value for name, value in found.items()}
                for name, wanted in oracle(own).items():
                    if not same(plain[name], wanted):
                        wrong.append(f"{entity} {who} {name}: {plain[name]} instead of {wanted}")
    return wrong


def send(kafka: str, records: list[Record]) -> None:
    producer = Producer({"bootstrap.servers": kafka, "acks": "all", "linger.ms": 5})
    for record in records:
        # In one partition a topic, so that repeats meet.
        headers: Any = record.headers or None
        producer.produce(record.topic, record.value, b"k", 0, headers=headers)
    assert producer.flush(60) == 0


def unclaimed(metrics: str, topic: str) -> float:
    """Records that were no contract's, since the stream was started again."""
    name = f'headrace_stream_unclaimed_total{{topic="{topic}"}}'
    return float(next(line for line in metrics.splitlines() if line.startswith(name)).rpartition(" ")[2])


def test_topics_that_were_there_before() -> None:
    """Features equal brute force, also after a kill; dead letters say which path and why; others are counted."""
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rng = random.Random(seed)
    with (
        SchemaRegistry(user="shop:pass") as registry,
        SchemaRegistryClient({"url": registry.url, "basic.auth.user.info": "shop:pass"}) as client,
        Stack(
            definitions="tests.support.shop",
            schema_registry=registry.url,
            schema_registry_options={"basic.auth.user.info": "shop:pass"},
            archive_commit_s=1,
            stream_metrics_port=(port := free_port()),
        ) as stack,
    ):
        shop = Shop(rng, client, time.time_ns() // 1_000_000 - 60_000)
        first, second = list(shop.records(N, newer=False)), list(shop.records(N, newer=True))
        send(stack.kafka.bootstrap_servers, first)
        worker = stack.start_worker("worker")
        archiver = stack.start("archiver", "-m", "headrace", "archive")
        wait_for("something is committed", lambda: "lane_claimed" in stack.log("worker"))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        send(stack.kafka.bootstrap_servers, second)
        stack.start("again", "-m", "headrace", "stream")
        address = stack.start_server()
        stack.wait_until_committed()
        facts = [record.fact for record in (*first, *second) if record.fact is not None]
        wrong = differences(address, facts)
        print(
            f"{len(first) + len(second)} records, {len(facts)} events of {len({f.contract for f in facts})} contracts"
        )
        assert not wrong, (len(wrong), wrong[:5])
        check_dead_letters(stack, [*first, *second])
        check_archive(stack, facts)
        metrics = httpx.get(f"http://127.0.0.1:{port}/metrics").text
        assert unclaimed(metrics, "shop.interactions") > 0
        assert unclaimed(metrics, "shop.rated") == 0
        assert archiver.poll() is None
        said = {each.what: each for each in examine(stack.settings)}
        assert said["schema registry"] == ("schema registry", True, f"{registry.url}: 2 subjects")
        drafted = stack.headrace("contract", "sample", "shop.rated")
        assert 'occurred_at=source.seconds("ts")' in drafted


def check_dead_letters(stack: Stack, records: list[Record]) -> None:
    """Each refused record's letter says why; after a restart it may be there twice."""
    offsets = Counter[str]()
    wanted: dict[str, str] = {}
    for record in records:
        if record.refused:
            wanted[f"{record.topic}/0/{offsets[record.topic]}"] = record.refused
        offsets[record.topic] += 1
    found: dict[str, str] = {}
    for topic in offsets:
        for letter in stack.read_topic(topic + DEAD_LETTER_SUFFIX):
            headers = {name: value.decode() for name, value in letter.headers() if value}
            found[headers["origin"]] = headers["reason"]
    assert found.keys() == wanted.keys()
    assert [origin for origin, why in wanted.items() if not found[origin].startswith(why)] == []
    print(f"{len(found)} dead letters, such as: {min(found.values())}")


def check_archive(stack: Stack, facts: list[Fact]) -> None:
    """Each contract has a table of its own, and training sets of these are the same."""
    plan = load_plan(stack.settings)
    wanted = Counter(fact.contract for fact in facts)

    def found() -> dict[str, int]:
        return {table.contract: table.n_rows for table in tables_of(stack.settings, plan).values()}

    wait_for("all is archived", lambda: found() == dict(wanted))
    assert "shop.interactions~Click" in tables_of(stack.settings, plan)
    users = sorted({fact.user for fact in facts})
    now = datetime.fromtimestamp(max(fact.t for fact in facts) / 1000 + 1, UTC)
    labels = pa.table({"user_id": users, TIME_COLUMN: pa.array([now] * len(users), pa.timestamp("us", "UTC"))})
    names = [name for name, feature in plan.features.items() if feature.entities == ("user",)]
    made = pa.Table.from_batches(training_set(stack.settings, plan, names, TableLabels(labels)))
    wrong = []
    for row in made.to_pylist():
        own = [fact for fact in facts if fact.user == row["user_id"]]
        for name, wanted in of_user(own).items():
            value = row[f"user_shop__{name}"]
            if not same(dict(value) if name.startswith("seen_by") else value, wanted):
                wrong.append(f"{row['user_id']} {name}: {value} instead of {wanted}")
    assert not wrong, (len(wrong), wrong[:5])
    print(f"a training set of {len(made)} labels is the same")
