"""What was served, as it is kept: Parquet files of rows, in a folder a service."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import reduce
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.times import DAY_MS

PLAN_COLUMN: Final = "_plan"
"""The number of the plan that answered; all other columns are ids, overrides and features, by their names."""
TIME_COLUMN: Final = "event_timestamp"
"""The answer's time."""


def write(folder: Path, service: str, batches: Sequence[pa.RecordBatch], now_ms: int, days: int) -> None:
    """Writes a file that is there once it is whole, and deletes those that are older than so many days."""
    own = folder / service
    own.mkdir(parents=True, exist_ok=True)
    name = f"{now_ms}-{os.getpid()}-{secrets.token_hex(4)}.parquet"
    part = own / f"{name}.part"
    tables = [pa.Table.from_batches([batch]) for batch in batches]
    pq.write_table(pa.concat_tables(tables, promote_options="default"), part)
    part.rename(own / name)
    for path in own.glob("*.parquet"):
        if _written_ms(path) < now_ms - days * DAY_MS:
            with suppress(FileNotFoundError):  # Another process was quicker.
                path.unlink()


def read(folder: Path, since_ms: int, services: Sequence[str] = ()) -> Iterator[tuple[str, pa.Table]]:
    """By service, what was kept of answers since a time, ms since the epoch."""
    since = pa.scalar(since_ms, pa.int64()).cast(pa.timestamp("ms", "UTC"))
    for own in sorted(folder.iterdir()) if folder.is_dir() else ():
        files = [path for path in sorted(own.glob("*.parquet")) if _written_ms(path) >= since_ms]
        if files and (not services or own.name in services):
            table = pa.concat_tables([pq.read_table(path) for path in files], promote_options="default")
            yield own.name, table.filter(pc.greater_equal(table[TIME_COLUMN], since))


def about(table: pa.Table, keys: Sequence[str]) -> pa.Table:
    """The rows that are about the entities of some columns of ids; where an answer was not, its features are null too.

    One that was about nobody in particular has the empty id.
    """
    return table.filter(reduce(pc.and_, (table[key].is_valid() for key in keys)))


def _written_ms(path: Path) -> int:
    return int(path.name.split("-")[0])
