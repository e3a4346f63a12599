"""Metrics for Prometheus; those of several worker processes are added up."""

import os

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

SHARED = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client keeps the numbers of all workers in files of this folder
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
TEXTS = (1, 2, 4, 8, 16, 32, 64, 96, 128)
CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counts and times of one application; each has its own."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("tercet_requests", "Answered requests", ["route", "status"], registry=own)
        self.seconds = Histogram("tercet_request_seconds", "Seconds of a request", ["route"], buckets=SECONDS, registry=own)
        self.tokens = Counter("tercet_tokens", "Tokens of texts sent to /v1/embeddings", registry=own)
        self.texts = Histogram("tercet_batch_texts", "Texts of a batch", buckets=TEXTS, registry=own)
        self.encoding = Histogram("tercet_batch_seconds", "Seconds of encoding a batch", buckets=SECONDS, registry=own)
        self.queued = Gauge("tercet_queued_texts", "Texts that wait", multiprocess_mode="livesum", registry=own)

    def observe_batch(self, rows: int, seconds: float) -> None:
        """Count a batch."""
        self.texts.observe(rows)
        self.encoding.observe(seconds)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        registry = self.registry
        if os.environ.get(SHARED):
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
