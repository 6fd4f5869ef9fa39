"""`stream`, of topics as others write them: the same events and features, nested and in Avro, beside plain JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import fastavro
import orjson

from benchmarks.project import Project
from benchmarks.traffic import TOPICS, Traffic
from tests.support.schema_registry import SchemaRegistry

NAMES: Final = ("plain", "nested", "avro")
_TEXT: Final = ["null", "string"]
SCHEMA: Final[dict[str, Any]] = {
    "type": "record",
    "name": "Interaction",
    "fields": [
        {"name": "event_id", "type": "string"},
        {"name": "occurred_at", "type": "long"},
        *({"name": name, "type": "string"} for name in ("user_id", "item_id")),
        *({"name": name, "type": _TEXT} for name in ("seller_id", "category", "brand")),
        {"name": "price", "type": ["null", "double"]},
        *({"name": name, "type": _TEXT} for name in ("surface", "session_id")),
    ],
}


def _nested(event: dict[str, Any]) -> bytes:
    event["product"] = {"amount": event.pop("price")}
    return orjson.dumps(event)


def _avro(schema_id: int) -> Callable[[dict[str, Any]], bytes]:
    schema: Any = fastavro.parse_schema(SCHEMA)
    head = b"\0" + schema_id.to_bytes(4, "big")

    def write(event: dict[str, Any]) -> bytes:
        data = io.BytesIO()
        data.write(head)
        fastavro.schemaless_writer(data, schema, event)
        return data.getvalue()

    return write


@contextmanager
def formats(
    bootstrap_servers: str, events: int, population: tuple[int, int], span_ms: tuple[int, int], settings: dict[str, Any]
) -> Iterator[dict[str, Project]]:
    """Projects by name, each with its topics filled with the same events, for the length of a `with` block."""
    with ExitStack() as stack:
        registry = stack.enter_context(SchemaRegistry())
        schema_id = registry.register("avro-value", json.dumps(SCHEMA))
        writers: dict[str, Callable[[dict[str, Any]], bytes]] = {"nested": _nested, "avro": _avro(schema_id)}
        projects = {}
        for name in NAMES:
            own = {"definitions": f"benchmarks.catalogues.{name}", "schema_registry": registry.url}
            projects[name] = stack.enter_context(Project(bootstrap_servers, **settings, **own))
            write = writers.get(name)

            def written(topic: str, value: bytes, name: str = name, write: Any = write) -> tuple[str, bytes]:
                return f"{name}.{topic}", value if write is None else write(orjson.loads(value))

            Traffic(*population).fill(bootstrap_servers, events, *span_ms, written)
            projects[name].client.save()
        yield projects


def topics_of(name: str) -> list[str]:
    """The topics of one of them."""
    return [f"{name}.{topic}" for topic in TOPICS]
