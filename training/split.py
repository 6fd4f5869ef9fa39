"""Events sorted to files by their entities, so that memory does not grow with events."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from features.events import Kind
from features.layout import Bundle
from features.plan import EventSpec
from features.rows import Events
from store.forgotten import Forgotten

Ints = NDArray[np.int64]
_TEXT_LIST: Final = pa.list_(pa.string())

PARTITION_EVENTS: Final = 100_000
"""About so many events are in memory at once."""


_OURS: Final = ("_t", "_recorded", "_topic", "_partition", "_offset")
"""Columns of every event: see `store.archive.events_of`."""


class Chosen:
    """Which events concern a kind of entity: their places among those given, the partition of each, and its entity."""

    __slots__ = ("entities", "partitions", "places")

    def __init__(self, places: NDArray[np.intp], partitions: Ints, entities: pa.Array) -> None:
        self.places, self.partitions, self.entities = places, partitions, entities


Choose = Callable[[str, str, pa.RecordBatch], Chosen]
"""Of an entity and events of a contract."""


@dataclass(frozen=True)
class Spill:
    """Where events are written, and which.

    Attributes:
        folder: all who write or read must see it.
        bundles: by entity, the rows that events are read for.
        keys: by entity, the field with its id.
        partitions: among how many a kind's entities are divided.
        forgotten: whose events, until when, are left out.
    """

    folder: Path
    bundles: Mapping[str, Bundle]
    keys: Mapping[str, str]
    partitions: int
    forgotten: Forgotten

    def must_be_seen(self) -> None:
        """Raises OSError on a machine that does not see the files of the steps before."""
        if not self.folder.is_dir():
            msg = f"{socket.gethostname()} does not see {self.folder}: name a folder that all machines see by --spill"
            raise OSError(msg)

    def fields_of(self, spec: EventSpec) -> dict[str, Kind]:
        """The fields of a contract that are read."""
        wanted: dict[str, Kind] = {}
        for entity, bundle in self.bundles.items():
            if spec.name in bundle.events and self.keys[entity] in spec.fields:
                wanted |= {name: spec.fields[name] for name in (self.keys[entity], *bundle.fields[spec.name])}
        return wanted

    def read(self, entity: str, contract: str, partition: int) -> pa.Table | None:
        """All events of a contract that concern a partition, in order of their records; `_entity` says whom."""
        folder = self._of(entity, contract, partition)
        tables = []
        for path in sorted(folder.iterdir()) if folder.exists() else ():
            with pa.ipc.open_stream(str(path)) as file:
                tables.append(file.read_all())
        if not tables:
            return None
        # Whatever order files were read in: sums depend on it in their last digit.
        table = pa.concat_tables(tables)
        order = np.lexsort([np.asarray(table[name]) for name in ("_offset", "_partition", "_topic")])
        return table.take(pa.array(order)).combine_chunks()

    def _of(self, entity: str, contract: str, partition: int) -> Path:
        return self.folder / "events" / entity / str(partition) / contract


class Splitter:
    """Writes events to files of those partitions whose entities they concern, many at once. To be used by `with`.

    Args:
        spill: where.
        choose: says which events concern whom.
        name: tells these files from others.

    Raises:
        OSError: if the folder is not to be seen here.
    """

    def __init__(self, spill: Spill, choose: Choose, name: str) -> None:
        spill.must_be_seen()
        self._spill, self._choose, self._name = spill, choose, name
        self._waiting: dict[str, list[pa.RecordBatch]] = {}
        self._written = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for contract in self._waiting if kind is None else ():
            self._write(contract)

    def add(self, contract: str, events: pa.RecordBatch) -> None:
        """Events of a contract, as `store.archive.events_of` gives them."""
        waiting = self._waiting.setdefault(contract, [])
        waiting.append(events)
        if sum(map(len, waiting)) >= PARTITION_EVENTS:
            self._write(contract)

    def _write(self, contract: str) -> None:
        spill, batches = self._spill, self._waiting[contract]
        self._waiting[contract] = []
        if not batches:
            return
        (events,) = pa.Table.from_batches(batches).combine_chunks().to_batches() or batches[:1]
        self._written += 1
        for entity, bundle in spill.bundles.items():
            if contract not in bundle.events or spill.keys[entity] not in events.schema.names:
                continue
            known = spill.forgotten.counted(entity, spill.keys[entity], events)
            chosen = self._choose(entity, contract, known)
            order = np.argsort(chosen.partitions, kind="stable")
            bounds = np.searchsorted(chosen.partitions[order], np.arange(spill.partitions + 1)).tolist()
            columns = [*bundle.fields[contract], *(name for name in _OURS if name in events.schema.names)]
            mine = known.select(columns).take(pa.array(chosen.places[order]))
            mine = mine.append_column("_entity", chosen.entities.take(pa.array(order)))
            for partition, (begin, end) in enumerate(pairwise(bounds)):
                if begin < end:
                    folder = spill._of(entity, contract, partition)
                    folder.mkdir(parents=True, exist_ok=True)
                    write_file(folder / f"{self._name}-{self._written}.arrow", mine.slice(begin, end - begin))


def write_file(path: Path, rows: pa.RecordBatch | pa.Table) -> None:
    """Writes one of these files."""
    # Closed at once: there are as many of them as processes may have open.
    with pa.ipc.new_stream(str(path), rows.schema) as file:
        file.write(rows)


def events_of_rows(table: pa.Table, rows: NDArray[np.intp], fields: tuple[str, ...]) -> Events:
    """What was read as events of rows by number."""
    return Events(rows, np.asarray(table["_t"]), {name: _column(table[name]) for name in fields})


def _column(column: pa.ChunkedArray) -> Any:
    """A column of an archive's table as `features.rows.Events` has it."""
    if pa.types.is_string(column.type):
        return pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    if pa.types.is_list(column.type):
        return column.cast(_TEXT_LIST).combine_chunks()
    return np.asarray(pc.fill_null(column.cast(pa.float64()), np.nan))
