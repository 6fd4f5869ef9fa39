"""What was served, as it is kept: Parquet files of rows, in a folder a service."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

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


def about(table: pa.Table, keys: Sequence[str]) -> NDArray[np.bool_]:
    """bool[n]: which rows are about the entities of some columns of ids; others have null for features of theirs.

    A row that is about nobody in particular has the empty id.
    """
    found: NDArray[np.bool_] = np.all([np.asarray(table[key].is_valid()) for key in keys], axis=0)
    return found


def _written_ms(path: Path) -> int:
    return int(path.name.split("-")[0])
