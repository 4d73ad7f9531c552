"""Metrics of the service for Prometheus: requests, their times, batches of queries, memory of the process."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The metrics of one service. No label has text of a request."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, batches: Callable[[], Counts[int]]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(_Batches(batches))
        self.requests = Counter(
            "sparse_ingest_requests", "Requests by route and status", ("route", "status"), registry=self._registry
        )
        self.seconds = Histogram(
            "sparse_ingest_request_seconds", "Time to answer a request", ("route",), buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self.in_progress = Gauge("sparse_ingest_requests_in_progress", "Requests in progress", registry=self._registry)
        self.encode_seconds = Histogram(
            "sparse_ingest_encode_seconds", "Time to encode a query, including the wait for the model",
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self.search_seconds = Histogram(
            "sparse_ingest_search_seconds", "Time of a search by the cluster or in the run", buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Batches(Collector):
    """The sizes of the batches of queries, which the encoders count."""

    def __init__(self, batches: Callable[[], Counts[int]]) -> None:
        self._batches = batches

    def collect(self) -> Iterator[Metric]:
        counts = self._batches()
        below = [(f"{size:.1f}", float(sum(n for each, n in counts.items() if each <= size))) for size in _SIZES]
        found = HistogramMetricFamily("sparse_ingest_encode_batch_size", "Queries that were encoded in one batch")
        queries = float(sum(size * count for size, count in counts.items()))
        found.add_metric([], [*below, ("+Inf", float(counts.total()))], queries)
        yield found
