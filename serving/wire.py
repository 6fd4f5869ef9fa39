"""Answers as bytes: JSON, Arrow and npy."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from numpy.typing import NDArray

from serving.lookup import Answer
from store.reader import Response

JSON = "application/json"
ARROW = "application/vnd.apache.arrow.stream"
NPY = "application/x-npy"
FORMATS = (JSON, ARROW, NPY)


def ranking_json(
    answer: Answer, service: str, plan: str, user_id: str | None, item_ids: list[str], *, explain: bool
) -> bytes:
    """The user's features once, and a list of values an item; if asked, how each feature comes about."""
    of_items = [feature for feature in answer.features if feature.entities != ("user",)]
    columns = [answer.column(feature) for feature in of_items]
    rows = zip(*columns, strict=True) if columns else iter([()] * len(item_ids))
    document: dict[str, Any] = {
        "service": service,
        "plan": plan,
        "as_of": answer.as_of_ms,
        "user": {
            "id": user_id,
            "status": answer.statuses("user")[0] if "user" in answer.frame.found else None,
            "last_event_at": answer.last_event_ms("user")[0] if "user" in answer.frame.found else None,
            "features": answer.row("user"),
        },
        "features": [feature.full_name for feature in of_items],
        "items": [
            {"id": item_id, "status": status, "values": values}
            for item_id, status, values in zip(item_ids, answer.statuses("item"), rows, strict=True)
        ],
    }
    if answer.degraded:
        document["degraded"] = answer.degraded
    if answer.incomplete:
        document["incomplete"] = answer.incomplete
    if explain:
        document["user"]["explain"] = answer.explain("user", 0)
        for index, item in enumerate(document["items"]):
            item["explain"] = answer.explain("item", index)
    return orjson.dumps(document)


def ranking_npy(answer: Answer) -> bytes:
    """float32[items, features]: user features broadcast, NaN for null."""
    matrix = answer.matrix()
    return _npy_header(*matrix.shape) + matrix.tobytes()


@lru_cache
def _npy_header(rows: int, columns: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (rows, columns)})
    return buffer.getvalue()


def ranking_arrow(answer: Answer, item_ids: list[str]) -> bytes:
    """One record batch, a row an item: `item_id`, then every feature; those that lack something have metadata."""
    repeat = pa.array(np.zeros(len(item_ids), np.int64))
    columns = [pa.array(item_ids, pa.string())]
    for feature in answer.features:
        column = answer.arrow(feature)
        columns.append(column.take(repeat) if feature.entities == ("user",) else column)
    names = ["item_id", *(feature.full_name for feature in answer.features)]
    fields = [
        pa.field(name, column.type, metadata=_complete_from(answer, name))
        for name, column in zip(names, columns, strict=True)
    ]
    batch = pa.record_batch(columns, schema=pa.schema(fields))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def _complete_from(answer: Answer, name: str) -> dict[str, str] | None:
    """A field's metadata: until when it is incomplete, if it is; empty where waiting does not mend that."""
    if name not in answer.incomplete:
        return None
    at_ms = answer.incomplete[name]
    return {"complete_from": "" if at_ms is None else str(at_ms)}


def entity_json(answer: Answer, entity: str, entity_id: str, service: str | None, plan: str) -> bytes:
    """One entity's features by name."""
    document: dict[str, Any] = {
        "entity": entity,
        "id": entity_id,
        "status": answer.statuses(entity)[0],
        "last_event_at": answer.last_event_ms(entity)[0],
        "as_of": answer.as_of_ms,
        "plan": plan,
        "service": service,
        "features": answer.row(entity),
    }
    if answer.degraded:
        document["degraded"] = answer.degraded
    if answer.incomplete:
        document["incomplete"] = answer.incomplete
    return orjson.dumps(document)


class FeastAnswer:
    """An answer as Feast's own server writes it, from responses for some rows each.

    Empty lists and maps are null: Feast's remote client ends with an error at `[]`.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._columns: list[tuple[list[bytes], list[bytes], list[bytes]]] = []
        """Of each, its values, statuses and times: pieces of JSON, which is far smaller than what it is made of."""

    def add(self, response: Response) -> None:
        """The next rows, of the same features."""
        n_rows = len(next(iter(response.columns.values()), ()))
        given, none = _items(["PRESENT"] * n_rows), _items(_times(np.zeros(n_rows, np.int64)))
        parts = [(_items(values), given, none) for values in response.columns.values()]
        times: dict[tuple[str, ...], bytes] = {}
        for at in range(len(response.names)):
            clock = response.clock(at)
            times[clock] = times.get(clock) or _items(_times(response.event_us(at)))
            values = [None if value in ([], {}) else value for value in response.values(at)]
            parts.append((_items(values), _items(response.statuses(at)), times[clock]))
        if not self._columns:
            self._names = [*response.columns, *response.names]
            self._columns = [([], [], []) for _ in parts]
        for column, part in zip(self._columns, parts, strict=True):
            for pieces, piece in zip(column, part, strict=True):
                pieces.append(piece)

    def content(self) -> bytes:
        """The whole answer."""
        form = b'{"values":[%b],"statuses":[%b],"event_timestamps":[%b]}'
        results = b",".join(form % tuple(map(b",".join, column)) for column in self._columns)
        return b'{"metadata":{"feature_names":%b},"results":[%b]}' % (orjson.dumps(self._names), results)


def _items(values: Sequence[Any]) -> bytes:
    """The values of a JSON array, without its brackets."""
    return orjson.dumps(values)[1:-1]


def _times(us: NDArray[np.int64]) -> list[str]:
    """Times as protobuf's JSON has them; the epoch for none, as in Feast."""
    times: list[str] = np.datetime_as_string(np.maximum(us, 0).astype("datetime64[us]"), timezone="UTC").tolist()
    return times
