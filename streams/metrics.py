"""What the stream counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter

from streams.decode import Decoded


class _Metrics:
    def __init__(self) -> None:
        self.events = Counter("headrace_stream_events", "Events counted", ["topic"])
        self.duplicates = Counter("headrace_stream_duplicates", "Records left out as duplicates", ["topic"])
        self.dead_letters = Counter("headrace_stream_dead_letters", "Records that their contract refused", ["topic"])
        self.rows = Counter("headrace_stream_rows_written", "Rows committed")
        self.evicted = Counter("headrace_stream_buckets_evicted", "Buckets evicted to keep a declared bound")

    def decoded(self, topic: str, decoded: Decoded) -> None:
        """Counts a chunk."""
        self.events.labels(topic).inc(decoded.events)
        self.duplicates.labels(topic).inc(decoded.duplicates)
        self.dead_letters.labels(topic).inc(len(decoded.dead_letters))

    def committed(self, rows: int, evicted: int) -> None:
        """Counts a commit."""
        self.rows.inc(rows)
        self.evicted.inc(evicted)


METRICS = _Metrics()
