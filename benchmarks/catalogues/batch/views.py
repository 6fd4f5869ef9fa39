"""Two batch views of ten features each, as profiles are: numbers, truth values, texts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Bool, Float64, Int64, String

user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
item = Entity(name="item", join_keys=["item_id"], value_type=ValueType.STRING)


def _schema() -> list[Field]:
    kinds = [*[Float64] * 4, *[Int64] * 3, Bool, *[String] * 2]
    return [Field(name=f"batch_{number}", dtype=kind) for number, kind in enumerate(kinds)]


def _source(name: str) -> FileSource:
    return FileSource(name=name, path=f"{name}.parquet", timestamp_field="event_timestamp")


user_batch = FeatureView(name="user_batch", entities=[user], schema=_schema(), source=_source("users"))
item_batch = FeatureView(name="item_batch", entities=[item], schema=_schema(), source=_source("items"))


def columns(ids: list[str], seed: int) -> Iterator[tuple[str, Any]]:
    """Values of one of the views for some entities, a column each, and their time."""
    rng = random.Random(seed)  # not for secrets
    for field in _schema():
        if field.dtype == Float64:
            yield field.name, [rng.random() for _ in ids]
        elif field.dtype == Int64:
            yield field.name, [rng.randrange(10_000) for _ in ids]
        elif field.dtype == Bool:
            yield field.name, [rng.random() < 0.5 for _ in ids]
        else:
            yield field.name, [rng.choice(("coats", "shoes", "bags", "toys")) for _ in ids]
    yield "event_timestamp", [datetime.now(UTC)] * len(ids)
