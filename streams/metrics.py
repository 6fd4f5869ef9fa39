"""What the stream counts, for Prometheus."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from config.child import METRICS_FOLDER

if TYPE_CHECKING:
    # The supervisor serves metrics, and needs nothing of what counts them.
    from streams.chunk import Partition
    from streams.decode import Decoded

_EVENTS = "Records decoded as events, duplicates left out; those not committed before a restart are counted again"


class _Metrics:
    def __init__(self) -> None:
        of_one = ["topic", "partition"]
        self.events = Counter("headrace_stream_events", _EVENTS, ["topic"])
        self.duplicates = Counter("headrace_stream_duplicates", "Records left out as duplicates", ["topic"])
        self.dead_letters = Counter("headrace_stream_dead_letters", "Records that their contract refused", ["topic"])
        self.unclaimed = Counter("headrace_stream_unclaimed", "Records that are no contract's", ["topic"])
        self.events_archived = Counter("headrace_archive_events", "Events committed to the archive", ["topic"])
        self.rows = Counter("headrace_stream_rows_written", "Rows committed")
        self.evicted = Counter(
            "headrace_stream_buckets_evicted", "Buckets evicted to keep a declared bound", ["view", "feature"]
        )
        self.records_lost = Counter("headrace_stream_records_lost", "Records deleted before they were read", of_one)
        self.lag = Gauge(
            "headrace_stream_lag_records", "Records not yet read", of_one, multiprocess_mode="livemostrecent"
        )
        self.lag_seconds = Gauge(
            "headrace_stream_lag_seconds",
            "Age of the last record read, while others follow",
            of_one,
            multiprocess_mode="livemostrecent",
        )

    def decoded(self, topic: str, decoded: Decoded) -> None:
        """Counts a chunk."""
        self.events.labels(topic).inc(decoded.events)
        self.duplicates.labels(topic).inc(decoded.duplicates)
        self.dead_letters.labels(topic).inc(len(decoded.dead_letters))
        self.unclaimed.labels(topic).inc(decoded.unclaimed)

    def archived(self, topic: str, events: int) -> None:
        """Counts a commit to the archive."""
        self.events_archived.labels(topic).inc(events)

    def committed(self, rows: int, evicted: Mapping[tuple[str, str], int]) -> None:
        """Counts a commit."""
        self.rows.inc(rows)
        for feature, buckets in evicted.items():
            self.evicted.labels(*feature).inc(buckets)

    def lost(self, partition: Partition, records: int) -> None:
        """Counts records that are gone from the broker."""
        self.records_lost.labels(*partition).inc(records)

    def behind(self, partition: Partition, records: int, seconds: float) -> None:
        """Says how far the reader of a partition is behind its end."""
        self.lag.labels(*partition).set(records)
        self.lag_seconds.labels(*partition).set(seconds)


METRICS = _Metrics()


@contextmanager
def metrics_served(host: str, port: int) -> Iterator[Callable[[int], None]]:
    """Serves what processes that are started meanwhile count, all together; what they counted stays when they end.

    Gives a function that must be told the process id of each that has ended. Port 0 serves nothing.
    """
    if not port:
        yield lambda _: None
        return
    with tempfile.TemporaryDirectory(prefix="headrace-metrics-") as folder:
        os.environ[METRICS_FOLDER] = folder
        registry = CollectorRegistry()
        MultiProcessCollector(registry, folder)  # type: ignore[no-untyped-call]  # it has no types
        server, thread = start_http_server(port, host, registry)
        try:
            yield lambda pid: mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]  # it has no types
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            del os.environ[METRICS_FOLDER]
