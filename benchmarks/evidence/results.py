"""Read the records of a trained model, and compare rules at a share of the multiply-adds."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness

#: One training on a line.
RESULTS = harness.RESULTS / "evidence.jsonl"


class Mix(NamedTuple):
    """Results on reporting rows where two settings of a rule are drawn for each row, so that a share is met.

    The two settings and their shares are chosen on held-out rows.
    """

    score: float
    macs: float
    layers: float
    random: float | None


class Result:
    """The records of one trained model.

    Args:
        document: a line of the results.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.records: list[dict[str, Any]] = document["records"]

    def record(self, kind: str, **fields: Any) -> dict[str, Any] | None:
        """Return the record of a kind, or None."""
        wanted = {"kind": kind, **fields}
        return next((r for r in self.records if wanted.items() <= r.items()), None)

    @property
    def layers(self) -> dict[str, Any]:
        """The score of each exit on both splits."""
        return next(r for r in self.records if r["kind"] == "layers")

    @property
    def noise(self) -> dict[str, Any]:
        """The scores on text with typing errors."""
        return next(r for r in self.records if r["kind"] == "noise")

    @property
    def full_depth(self) -> float:
        """Score of the last exit."""
        return float(self.layers["reporting"][-1])

    def rule(self, name: str, share: float) -> Mix | None:
        """Return a rule at a share of the multiply-adds, or None if its settings do not reach it."""
        record = self.record("rule", rule=name)
        return None if record is None else mixed(record["tuning"], record["reporting"], share)

    def columns(self, rule: str) -> dict[str, list[float]]:
        """Return score, layers and multiply-adds of a rule's settings on reporting rows."""
        record = self.record("rule", rule=rule)
        if record is None:
            raise KeyError(f"{self.document['name']} has no rule {rule!r}")
        columns: dict[str, list[float]] = record["reporting"]
        return columns

    def setting(self, rule: str, **parameters: Any) -> dict[str, float]:
        """Return one setting of a rule on reporting rows."""
        record = self.record("rule", rule=rule)
        numbers = (
            [i for i, given in enumerate(record["settings"]) if parameters.items() <= given.items()] if record else []
        )
        return {name: values[numbers[0]] for name, values in self.columns(rule).items()}

    def best(self, rule: str) -> dict[str, float]:
        """Return on reporting rows the setting with the best score on held-out rows; ties go to fewer multiply-adds."""
        record = self.record("rule", rule=rule)
        tuning = record["tuning"] if record else {}
        order = sorted(range(len(tuning["score"])), key=lambda i: (-tuning["score"][i], tuning["macs"][i]))
        return {name: values[order[0]] for name, values in self.columns(rule).items()}

    def fixed_depth(self, share: float) -> Mix | None:
        """Return the model cut to its first layers, at a share of the multiply-adds."""
        scores = self.layers
        depth = len(scores["reporting"])
        macs, layers = [k / depth for k in range(1, depth + 1)], [float(k) for k in range(1, depth + 1)]
        splits = ({"score": scores[s], "macs": macs, "layers": layers} for s in ("tuning", "reporting"))
        return mixed(*splits, share)


def stored(results: Path) -> dict[str, Result]:
    """Return name of each training that is done -> its records; the file need not exist."""
    return _read(results, results.stat().st_mtime_ns) if results.is_file() else {}


@functools.lru_cache(maxsize=2)
def _read(results: Path, changed: int) -> dict[str, Result]:
    documents = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {document["name"]: Result(document) for document in documents}


def mixed(tuning: dict[str, list[float]], reporting: dict[str, list[float]], share: float) -> Mix | None:
    """Return the best mix of two settings at a share of the multiply-adds.

    Args:
        tuning, reporting: columns `score`, `macs`, `layers` and perhaps `random`, an entry for each setting.
        share: of the multiply-adds of full depth.
    """
    points = sorted(zip(tuning["macs"], tuning["score"], range(len(tuning["macs"])), strict=True))
    hull: list[tuple[float, float, int]] = []
    for point in points:
        while len(hull) > 1 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        if hull and point[0] == hull[-1][0]:
            hull.pop()
        hull.append(point)
    for first, second in itertools.pairwise(hull):
        if first[0] <= share <= second[0]:
            weight = (second[0] - share) / (second[0] - first[0])
            columns = {
                name: weight * values[first[2]] + (1 - weight) * values[second[2]] for name, values in reporting.items()
            }
            return Mix(columns["score"], columns["macs"], columns["layers"], columns.get("random"))
    return None


def _turns_up(a: tuple[float, ...], b: tuple[float, ...], c: tuple[float, ...]) -> bool:
    return (b[0] - a[0]) * (c[1] - a[1]) >= (b[1] - a[1]) * (c[0] - a[0])
