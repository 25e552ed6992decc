"""What the workers of a server count together: for Prometheus, and for the status page."""

from __future__ import annotations

import atexit
import glob
import os
import shutil
import tempfile
import time
from collections import Counter as Counts
from collections import defaultdict, deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from earlyexit_kernels.serving.batcher import Row
from earlyexit_kernels.serving.drift import ExitDrift
from earlyexit_kernels.types import Answers

#: Folder of the counts of all processes of a server. `workers.run` names a new one; another process makes its own.
FOLDER = "PROMETHEUS_MULTIPROC_DIR"
if FOLDER not in os.environ:
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="earlyexit-metrics-")
    atexit.register(shutil.rmtree, os.environ[FOLDER], ignore_errors=True)
values.ValueClass = values.MultiProcessValue()  # prometheus_client may have been imported before FOLDER was set
#: Upper ends of the latency histogram, in seconds.
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
#: Labels by which the page sets samples apart.
LABELS = ("exit_layer", "status", "le")
#: Seconds of which the status page shows rate and times, where it has been open for as long.
RECENT_SECONDS = 60.0
#: Seconds after which a worker writes down the layers of its recent rows again.
COMPARE_SECONDS = 1.0


class _Seen(NamedTuple):
    """Cumulative counts at some time."""

    time: float
    rows: float
    buckets: dict[float, float]


class Metrics:
    """Counts of one worker, and those of all workers of the server.

    Args:
        depth: layers of the model.
        drift: compares the exit layers with those of the calibration, or None.
    """

    def __init__(self, depth: int, drift: ExitDrift | None) -> None:
        self.depth, self.drift = depth, drift
        self._compared = 0.0
        self._seen = deque([_Seen(time.monotonic(), 0.0, dict.fromkeys((*SECONDS, float("inf")), 0.0))])
        own: dict[str, Any] = {"registry": CollectorRegistry()}
        summed = {**own, "multiprocess_mode": "livesum"}
        largest = {**own, "multiprocess_mode": "livemax"}
        self._requests = Counter("earlyexit_requests", "Answered requests", ["path", "status"], **own)
        self._seconds = Histogram("earlyexit_predict_seconds", "Time of a request of /predict", buckets=SECONDS, **own)
        self._rows = Counter("earlyexit_rows", "Answered rows, by the layer of their exit", ["exit_layer"], **own)
        self._tokens = Counter("earlyexit_tokens", "Tokens of answered rows", **own)
        self._failed = Counter("earlyexit_failed_rows", "Rows without an answer", **own)
        self._queue = Gauge("earlyexit_queue_rows", "Rows that wait", **summed)
        Gauge("earlyexit_workers_ready", "Workers that take rows", **summed).set(1)
        Counter("earlyexit_worker_starts", "Workers that were started, replacements included", **own).inc()
        self._by_layer = [self._rows.labels(layer) for layer in range(1, depth + 1)]
        if drift is not None:
            text = "Share of the rows of the calibration that left at a layer"
            calibrated = Gauge("earlyexit_calibrated_share", text, ["exit_layer"], **largest)
            for layer, share in enumerate(drift.expected, start=1):
                calibrated.labels(layer).set(share)
            text = "Recent rows that left at a layer, of those compared with the calibration"
            self._recent = Gauge("earlyexit_recent_rows", text, ["exit_layer"], **summed)
            text = "1 where recent rows leave at other layers than in the calibration"
            self._drifting = Gauge("earlyexit_exit_drift", text, **largest)
            text = "Share of recent rows that left elsewhere than in the calibration"
            self._distance = Gauge("earlyexit_exit_distance", text, **largest)

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(path, status).inc()
        if path == "/predict" and status == 200:
            self._seconds.observe(seconds)

    def queued(self, rows: int) -> None:
        """Note the number of rows that wait."""
        self._queue.set(rows)

    def count(self, rows: Sequence[Row], part: Answers | None) -> None:
        """Count rows that left together, or that have no answer."""
        if part is None:
            self._failed.inc(len(rows))
            return
        layers = part.exit_layer.tolist()
        for layer, number in Counts(layers).items():
            self._by_layer[layer - 1].inc(number)
        self._tokens.inc(sum(row.tokens for row in rows))
        if self.drift is not None:
            self.drift.observe(layers)
            if time.monotonic() - self._compared > COMPARE_SECONDS:
                self._compare(self.drift)

    def _compare(self, drift: ExitDrift) -> None:
        """Show the recent rows of this worker to those that collect the counts of all."""
        self._compared = time.monotonic()
        for layer, share in enumerate(drift.observed, start=1):
            self._recent.labels(layer).set(round(share * drift.rows))
        self._drifting.set(drift.drifting)
        self._distance.set(drift.distance)

    def _collected(self) -> CollectorRegistry:
        """Return the counts of all workers, without the gauges of those that have ended."""
        registry, folder = CollectorRegistry(), os.environ[FOLDER]
        for path in glob.glob(os.path.join(folder, "gauge_live*.db")):
            pid = path.removesuffix(".db").rpartition("_")[2]
            if not os.path.exists(f"/proc/{pid}"):
                with suppress(FileNotFoundError):  # another worker has removed it
                    mark_process_dead(pid)
        if self.drift is not None:
            self._compare(self.drift)
        MultiProcessCollector(registry)
        return registry

    def text(self) -> bytes:
        """Return the counts in the text format of Prometheus."""
        return generate_latest(self._collected())

    def numbers(self) -> dict[str, Any]:
        """Return the numbers of the status page."""
        samples: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for family in self._collected().collect():
            for sample in family.samples:
                if sample.labels.get("path", "/predict") == "/predict":
                    label = next((sample.labels[name] for name in LABELS if name in sample.labels), "")
                    samples[sample.name.removeprefix("earlyexit_")][label] += sample.value

        def by_layer(name: str) -> list[float]:
            return [samples[name][str(layer)] for layer in range(1, self.depth + 1)]

        buckets = {float(end): count for end, count in samples["predict_seconds_bucket"].items()}
        statuses, rows = samples["requests_total"], by_layer("rows_total")
        now = _Seen(time.monotonic(), sum(rows), buckets or self._seen[0].buckets)
        while len(self._seen) > 1 and now.time - self._seen[0].time > RECENT_SECONDS:
            self._seen.popleft()
        before = self._seen[0]
        self._seen.append(now)
        recent = {end: count - before.buckets[end] for end, count in sorted(now.buckets.items())}
        return {
            "ready": int(samples["workers_ready"][""]),
            "starts": int(samples["worker_starts_total"][""]),
            "queue_rows": int(samples["queue_rows"][""]),
            "requests": int(sum(statuses.values())),
            "refused": int(sum(statuses.values()) - statuses["200"]),
            "rate": max(0.0, now.rows - before.rows) / max(now.time - before.time, 1e-9),
            "rows": int(now.rows),
            "layers": _shares(rows),
            "mean_layer": float(np.average(np.arange(1, self.depth + 1), weights=rows)) if now.rows else None,
            "calibrated": None if self.drift is None else by_layer("calibrated_share"),
            "recent": None if self.drift is None else _shares(by_layer("recent_rows")),
            "drifting": samples["exit_drift"][""] > 0,
            "times": _shares(np.diff([0.0, *recent.values()]).tolist()),
            "time_ends": [1000 * end for end in recent],
            "p50": _quantile(recent, 0.5),
            "p99": _quantile(recent, 0.99),
        }


def _shares(counts: Sequence[float]) -> list[tuple[float, int]]:
    """Return the share and the number of each of some counts."""
    total = max(sum(counts), 1)
    return [(count / total, int(count)) for count in counts]


def _quantile(buckets: dict[float, float], quantile: float) -> float | None:
    """Return a quantile in milliseconds, between the ends of the bucket of a histogram; None without requests."""
    ends, counts = list(buckets), list(buckets.values())
    if not counts[-1]:
        return None
    ends[-1] = ends[-2]  # of the last bucket, which has no upper end, the lower one
    return 1000 * float(np.interp(quantile * counts[-1], [0.0, *counts], [0.0, *ends]))
