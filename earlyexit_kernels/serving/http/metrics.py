"""What the server counts: for Prometheus, and for the status page."""

from __future__ import annotations

import time
from collections import Counter as Counts
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from earlyexit_kernels.criteria import from_dict
from earlyexit_kernels.serving.drift import ExitDrift
from earlyexit_kernels.serving.http.pool import Pool, Step
from earlyexit_kernels.tuning.record import Calibration

#: Upper ends of the latency histogram, in seconds.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
#: Answered requests of which the status page shows the latency.
RECENT = 1000


class Metrics:
    """Counts of requests and rows since the start of the server.

    Attributes:
        registry: of Prometheus.
        drift: compares the exit layers with those of the calibration; None without one.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.drift: ExitDrift | None = None
        self._started = time.monotonic()
        self._latencies: deque[float] = deque(maxlen=RECENT)
        self._layers: Counts[int] = Counts()
        self._depth = 0
        named: dict[str, Any] = {"registry": self.registry}
        self._requests = Counter("earlyexit_requests", "Answered requests", ["path", "status"], **named)
        self._seconds = Histogram(
            "earlyexit_predict_seconds", "Time of a request of /predict", buckets=SECONDS, **named
        )
        self._rows = Counter("earlyexit_rows", "Answered rows, by the layer of their exit", ["exit_layer"], **named)
        self._tokens = Counter("earlyexit_tokens", "Tokens of answered rows", **named)
        self._failed = Counter("earlyexit_failed_rows", "Rows without an answer", **named)

    def begin(self, pool: Pool) -> None:
        """Take depth and calibration from the model, and gauges from the pool; called once, when it is ready."""
        self._depth = pool.info["depth"]
        for layer in range(1, self._depth + 1):
            self._rows.labels(layer)
        self._gauge("earlyexit_queue_rows", "Rows that wait for a worker", lambda: pool.waiting)
        self._gauge("earlyexit_workers_ready", "Workers that take rows", lambda: pool.ready)
        self._gauge("earlyexit_workers_restarted", "Workers that were replaced", lambda: pool.restarts)
        if pool.info["calibration"] is not None:
            self._compare(ExitDrift(Calibration.from_dict(pool.info["calibration"])))

    def _compare(self, drift: ExitDrift) -> None:
        """Show the shares of the layers in the calibration and of recent rows."""
        self.drift = drift
        text = "Share of rows that leave at a layer, in the calibration and of recent rows"
        shares = Gauge("earlyexit_exit_share", text, ["exit_layer", "rows"], registry=self.registry)
        for layer, share in enumerate(drift.expected, start=1):
            shares.labels(layer, "calibration").set(share)
            shares.labels(layer, "recent").set_function(partial(_observed, drift, layer))
        text = "1 where recent rows leave at other layers than in the calibration"
        self._gauge("earlyexit_exit_drift", text, lambda: drift.drifting)
        text = "Share of recent rows that left elsewhere than in the calibration"
        self._gauge("earlyexit_exit_distance", text, lambda: drift.distance)

    def _gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        Gauge(name, text, registry=self.registry).set_function(read)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(path, status).inc()
        if path == "/predict" and status == 200:
            self._seconds.observe(seconds)
            self._latencies.append(seconds)

    def rows(self, step: Step) -> None:
        """Count the rows that a worker has answered, or failed on."""
        for layer, rows in Counts(step.layers).items():
            self._rows.labels(layer).inc(rows)
            self._layers[layer] += rows
        self._tokens.inc(step.tokens)
        self._failed.inc(step.failed)
        if self.drift is not None:
            self.drift.observe(step.usual)

    def text(self) -> bytes:
        """Return the metrics in the text format of Prometheus."""
        return generate_latest(self.registry)

    def snapshot(self, pool: Pool) -> dict[str, Any]:
        """Return the numbers of the status page, JSON-ready."""
        latencies = np.array(self._latencies) * 1000
        p50, p99 = np.quantile(latencies, (0.5, 0.99)).round(2).tolist() if len(latencies) else (None, None)
        statuses: Counts[str] = Counts()
        for sample in next(iter(self._requests.collect())).samples:
            if sample.name.endswith("_total") and sample.labels["path"] == "/predict":
                statuses[sample.labels["status"]] += int(sample.value)
        drift = self.drift
        return {
            "model": pool.settings.model.resolve().name,
            "criterion": str(from_dict(pool.info["criterion"])),
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "ready": pool.ready,
            "workers": pool.settings.workers,
            "restarts": pool.restarts,
            "queue_rows": pool.waiting,
            "requests": dict(statuses),
            "latency_ms": {"requests": len(latencies), "p50": p50, "p99": p99},
            "rows": sum(self._layers.values()),
            "exit_rows": [self._layers[layer] for layer in range(1, self._depth + 1)],
            "calibrated_shares": None if drift is None else list(drift.expected),
            "drifting": drift is not None and drift.drifting,
        }


def _observed(drift: ExitDrift, layer: int) -> float:
    return drift.observed[layer - 1]
