"""What is in a topic, and contracts drafted of it: tried at once on the very records that they were drafted from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from config.settings import Settings
from features.compile import event_spec
from features.events import Event
from features.source import Path, shown
from headrace.contract import TIMES, ContractError, Part, class_name, draft, header, kinds_of, parts_of_records, unit_of
from streams.chunk import Chunk, Partition
from streams.contract import ContractDecoder
from streams.decode import Topic
from streams.kafka import columns_of, consumer_of, headers_of, partitions_of
from streams.schemas import Schemas
from streams.tail import read_to

_TIMEOUT_S = 15.0


@dataclass
class Sample:
    """Records of a topic.

    Attributes:
        chunks: as the stream would have them.
        format: how they are written.
        records: each as an object, without those that can't be read.
        unreadable: how many can't.
    """

    chunks: list[Chunk]
    format: str
    records: list[Any]
    unreadable: int


def read_sample(settings: Settings, topic: str, n: int) -> Sample:
    """About the last `n` records of a topic.

    Raises:
        ContractError: if there are none.
        KafkaException: if the broker does not give them.
    """
    from confluent_kafka import TopicPartition

    consumer = consumer_of(settings, **{"enable.partition.eof": True})
    try:
        starts, ends = {}, {}
        partitions = partitions_of(settings, [topic])
        for each in partitions:
            low, high = consumer.get_watermark_offsets(TopicPartition(*each), timeout=_TIMEOUT_S)
            if low < high:
                starts[each], ends[each] = max(low, high - -(-n // len(partitions))), high
        messages: dict[Partition, list[Any]] = {each: [] for each in starts}
        for each, found in read_to(consumer, settings, starts, ends):
            messages[each] += found
    finally:
        consumer.close()
    chunks = [
        Chunk(each, own[0].offset(), own[-1].offset() + 1, 0, *columns_of(own), headers=headers_of(own))
        for each, own in messages.items()
        if own
    ]
    values = [value for chunk in chunks for value in chunk.values if value is not None]
    if not values:
        msg = f"there is no record in topic {topic}"
        raise ContractError(msg)
    return _read(settings, chunks, values)


def _read(settings: Settings, chunks: list[Chunk], values: Sequence[bytes]) -> Sample:
    schemas, records, unreadable = Schemas(settings), [], 0
    formats = Counter[str]()
    for value in values:
        try:
            format_, found = _object(schemas, value)
        except (ValueError, RecursionError):
            unreadable += 1
        else:
            formats[format_] += 1
            records.append(found)
    if not records:
        msg = (
            f"none of {len(values)} records is JSON, or by a schema registry; the first begins with "
            f"{values[0][:16].hex(' ')}: plain Avro needs its schema (source.avro), see docs/topics.md"
        )
        raise ContractError(msg)
    return Sample(chunks, formats.most_common(1)[0][0], records, unreadable)


def _object(schemas: Schemas, value: bytes) -> tuple[str, Any]:
    if value[:1] != b"\0":
        return "json", msgspec.json.decode(value)
    if value[5:6] in (b"{", b"["):
        return "json_schema", msgspec.json.decode(value[5:])
    try:
        return "avro", schemas("avro", value)
    except ValueError as error:
        if "not avro" not in str(error):
            raise
        return "protobuf", schemas("protobuf", value)


def drafted(settings: Settings, topic: str, sample: Sample) -> tuple[str, list[str]]:
    """Contracts of a topic as Python, and what became of the sample by them."""
    records = [each for each in sample.records if isinstance(each, dict)]
    if not records:
        msg = f"records of {topic} are no objects, but such as {sample.records[0]!r:.60}"
        raise ContractError(msg)
    keywords = {} if sample.format == "json" else {"format": json.dumps(sample.format)}
    bodies: list[Any] = records
    at: Path | None = None
    kinds: list[Any] = []
    if all("specversion" in each for each in records) or _is_binary(sample):
        keywords["envelope"] = '"cloudevents"'
        at = ("type",)
        bodies = [each.get("data", each) if "specversion" in each else each for each in records]
        kinds = _types(sample, records)
    elif all("op" in (each.get("payload") or each) and "source" in (each.get("payload") or each) for each in records):
        keywords["envelope"] = '"debezium"'
        at = ("source", "table")
        changes = [each.get("payload") or each for each in records]
        kinds = [(each.get("source") or {}).get("table") for each in changes]
        bodies = [each.get("after") or each.get("before") or {} for each in changes]
    elif (found := kinds_of(records)) is not None:
        at, kinds = found[0], [_at(each, found[0]) for each in records]
    groups: dict[Any, list[Any]] = {}
    for body, kind in zip(bodies, kinds or [None] * len(bodies), strict=True):
        groups.setdefault(kind, []).append(body)
    classes: list[str] = []
    for kind, own in sorted(groups.items(), key=lambda each: -len(each[1])):
        if (kind is None and at is not None) or len(classes) == 8 or not own:
            continue
        when = {"when": f"{{{json.dumps(shown(at))}: {json.dumps(kind)}}}"} if at is not None else {}
        parts = [part for part in parts_of_records(own) if part.path != at]
        name = class_name(str(kind) if at is not None else topic)
        classes.append(draft(name, topic, parts, keywords={**when, **keywords}, time_unit=_unit(own, parts)))
    text = "\n\n".join(classes)
    text = header(text) + text
    return text, list(_tried(settings, text, topic, sample))


def _at(value: Any, path: Path) -> Any:
    for step in path:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _is_binary(sample: Sample) -> bool:
    heads = [dict(head) for chunk in sample.chunks for head in chunk.headers]
    return bool(heads) and all("ce_specversion" in head for head in heads)


def _types(sample: Sample, records: Sequence[Mapping[str, Any]]) -> list[Any]:
    if all("specversion" in each for each in records):
        return [each.get("type") for each in records]
    heads = [dict(head) for chunk in sample.chunks for head in chunk.headers]
    return [(head.get("ce_type") or b"").decode() for head in heads][: len(records)]


def _unit(records: Sequence[Any], parts: Sequence[Part]) -> str | None:
    """What numbers count in the field that a draft takes for the time."""
    for name in TIMES:
        for part in parts:
            if str(part.path[-1]).lower() == name and part.type in ("int", "float"):
                return unit_of(value for each in records if (value := _at(each, part.path)) is not None)
    return None


def _tried(settings: Settings, text: str, topic: str, sample: Sample) -> list[str]:
    """What the drafted contracts make of the records."""
    scope: dict[str, Any] = {"__name__": "drafted"}
    exec(compile(text, "drafted", "exec", dont_inherit=True), scope)  # noqa: S102  # our own text, just written
    contracts = [each for each in scope.values() if isinstance(each, type) and issubclass(each, Event) and each.topic]
    specs = [event_spec(each) for each in contracts]
    decoders = {spec.name: ContractDecoder(spec.name, each) for spec, each in zip(specs, contracts, strict=True)}
    record_ms = np.concatenate([chunk.record_ms for chunk in sample.chunks])
    offsets = np.concatenate([chunk.offsets for chunk in sample.chunks])
    judged = Topic(specs, decoders, Schemas(settings)).judge(sample.chunks, record_ms, offsets)
    said = [f"of {len(offsets)} records of {topic}:"]
    said += [f"  {len(accepted.index)} are accepted by {spec.name}" for spec, accepted in judged.accepted]
    if judged.unclaimed is not None and judged.unclaimed.any():
        said.append(f"  {int(judged.unclaimed.sum())} are nobody's")
    reasons = Counter(reason for _, reason in judged.refused)
    said += [f"  {n} are refused: {reason}" for reason, n in reasons.most_common(5)]
    return said
