"""What the server counts, for Prometheus."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from config.child import METRICS_FOLDER

_BUCKETS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """Counters of one app, or, when processes share a folder, of all apps in all of them.

    Other metrics of the server are made with `registry`; a gauge needs its `multiprocess_mode` there.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        requests = Counter("headrace_requests", "Requests answered", ["route", "status"], registry=self.registry)
        seconds = Histogram(
            "headrace_request_seconds", "Time to answer", ["route"], registry=self.registry, buckets=_BUCKETS
        )

        mirrored = Counter("headrace_mirror_rows", "Item rows asked of the mirror", ["result"], registry=self.registry)
        self._hit, self._missed = mirrored.labels("hit").inc, mirrored.labels("miss").inc

        @cache  # There are few routes and statuses, and labels() costs more than counting.
        def counted(route: str, status: int) -> tuple[Callable[[], None], Callable[[float], None]]:
            return requests.labels(route, status).inc, seconds.labels(route).observe

        self._counted = counted
        self.shed = Counter("headrace_requests_shed", "Requests refused: too much is asked", registry=self.registry).inc
        self.sample_dropped = Counter(
            "headrace_sample_dropped",
            "Answers of the sample that were not kept: too many waited",
            registry=self.registry,
        ).inc
        self.beyond = Counter(
            "headrace_values_beyond_range",
            "Numbers answered as null: beyond float64's range, or in npy beyond float32's",
            registry=self.registry,
        ).inc
        self._keys = Counter(
            "headrace_api_keys_reads", "Readings of a changed file of API keys", ["result"], registry=self.registry
        )
        self._keys_broken = Gauge(
            "headrace_api_keys_broken",
            "Whether the file of API keys can't be read, so that an earlier one is in force",
            registry=self.registry,
            multiprocess_mode="livemax",
        )

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Counts an answer and the time it took."""
        count, observe = self._counted(route, status)
        count()
        observe(seconds)

    def mirrored(self, hits: int, misses: int) -> None:
        """Counts rows that the mirror had, and rows that it had not."""
        self._hit(hits)
        self._missed(misses)

    def keys_read(self, well: bool) -> None:
        """Counts a reading of a changed file of API keys."""
        self._keys.labels("ok" if well else "failed").inc()
        self._keys_broken.set(not well)

    def text(self) -> bytes:
        """All values, as Prometheus reads them."""
        registry = self.registry
        if METRICS_FOLDER in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]  # it has no types
        return generate_latest(registry)
