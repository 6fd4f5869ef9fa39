"""A sample of what was served, for `headrace compare`: Parquet files, written beside the requests."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple
from zlib import crc32

import numpy as np
import pyarrow as pa
import structlog

from config.settings import Settings
from features.plan import Plan
from serving.lookup import Answer
from store.served import PLAN_COLUMN, TIME_COLUMN, write

_WAITING_MAX: Final = 200
_ROWS: Final = 20_000
_WRITE_S: Final = 5.0
_HASHES: Final = 1 << 32

log = structlog.get_logger()


class _Served(NamedTuple):
    service: str
    answer: Answer
    ids: Mapping[str, list[str]]
    overrides: Mapping[str, Mapping[str, list[Any]]]


class Sampler:
    """Keeps the answers to some of those who are asked for, by hash of their id: always of the same.

    Args:
        settings: rates by service, and the folder.
        plan: the one that is served.
        dropped: is called for each answer that is not kept because others wait to be written.
        clock: seconds since the epoch.
    """

    def __init__(
        self, settings: Settings, plan: Plan, dropped: Callable[[], object], clock: Callable[[], float] = time.time
    ) -> None:
        self._rates = {name: rate * _HASHES for name, rate in settings.sample.items()}
        self._folder, self._days = settings.sample_path(), settings.sample_days
        self._plan, self._dropped, self._clock = plan, dropped, clock
        self._waiting: queue.Queue[_Served | None] = queue.Queue(_WAITING_MAX)
        self._thread = threading.Thread(target=self._write_all, name="sample", daemon=True)
        if self._rates:
            self._thread.start()

    def offer(
        self,
        service: str | None,
        answer: Answer,
        ids: Mapping[str, list[str]],
        overrides: Mapping[str, Mapping[str, list[Any]]] | None = None,
    ) -> None:
        """Keeps an answer, if it is of the sample; never waits."""
        rate = self._rates.get(service or "")
        if rate is None or answer.degraded:
            return
        # An anonymous user is as any other: then the first item decides.
        whose = next((each[0] for each in ids.values() if each and each[0]), "")
        if crc32(whose.encode()) >= rate:
            return
        try:
            self._waiting.put_nowait(_Served(str(service), answer, ids, overrides or {}))
        except queue.Full:
            self._dropped()

    def close(self) -> None:
        """Writes what waits."""
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join(_WRITE_S)

    def _write_all(self) -> None:
        batches: dict[str, list[pa.RecordBatch]] = {}
        since_s, ends = self._clock(), False
        while not ends:
            try:
                served = self._waiting.get(timeout=_WRITE_S)
            except queue.Empty:
                pass
            else:
                if served is None:
                    ends = True
                else:
                    batches.setdefault(served.service, []).append(self._batch(served))
            n_rows = sum(len(batch) for each in batches.values() for batch in each)
            if ends or n_rows >= _ROWS or not 0 <= self._clock() - since_s < _WRITE_S:
                since_s = self._clock()
                for service, each in batches.items():
                    try:
                        write(self._folder, service, each, int(self._clock() * 1000), self._days)
                    except OSError as error:
                        log.warning("sample_unwritten", folder=str(self._folder), error=str(error))
                batches = {}

    def _batch(self, served: _Served) -> pa.RecordBatch:
        """A row an item; or one, where it is about one entity."""
        answer, plan = served.answer, self._plan
        n = max(map(len, served.ids.values()))
        once = pa.array(np.zeros(n, np.int64))

        def whole(column: pa.Array) -> pa.Array:
            return column if len(column) == n else column.take(once)

        columns: dict[str, pa.Array] = {}
        for entity, ids in served.ids.items():
            # The empty id is nobody's: null is that of a row that is about no such entity.
            columns[plan.entity(entity).key] = whole(pa.array([each or "" for each in ids], pa.string()))
        columns[TIME_COLUMN] = pa.array(np.full(n, answer.as_of_ms)).view(pa.timestamp("ms", "UTC"))
        columns[PLAN_COLUMN] = pa.array(np.full(n, plan.number))
        for entity, fields in served.overrides.items():
            for name, given in fields.items():
                if any(value is not None for value in given):
                    columns[f"{entity}__{name}"] = pa.array(given)
        columns |= {feature.full_name: whole(answer.arrow(feature)) for feature in answer.features}
        return pa.record_batch(columns)
