"""Measure a trained model: each exit, and every rule over its settings, in score, layers and multiply-adds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.evidence.noise import typos
from benchmarks.harness import Record
from earlyexit_kernels.cli.eval import NEVER_SKIP, SKIP_FROM, Traced, trace_splits
from earlyexit_kernels.cli.saved import HELD_OUT, load_saved
from earlyexit_kernels.core.replay import replay_each
from earlyexit_kernels.criteria import Criterion, Dact, Expectation, Patience, SampledExit
from earlyexit_kernels.hf.predict import predict_with_exits
from earlyexit_kernels.tuning.flops import encoder_macs, row_macs
from earlyexit_kernels.tuning.metrics import METRICS, predictions_of
from earlyexit_kernels.tuning.rows import exit_shares
from earlyexit_kernels.tuning.settings import settings, skip_settings
from earlyexit_kernels.tuning.traces import collect_trace

BATCH_SIZE = 32
#: Settings of a rule with a threshold.
POINTS = 16
#: Rules that are measured on every model whose heads allow them, beside the method's own.
RULES = ("entropy", "patience", "voting")
DRAWS = 20
SPLITS = ("tuning", "reporting")
#: Share of the words with a typing error.
NOISE, NOISE_DRAWS = 0.2, 3


@dataclass(frozen=True)
class Subject:
    """A trained model with its traces on both splits, and the tokens of each row."""

    traced: Traced
    tokens: dict[str, torch.Tensor]

    @property
    def depth(self) -> int:
        """Number of layers."""
        return self.traced.saved.model.depth

    def scored(self, split: str, criterion: Criterion, logits: NDArray, layers: NDArray, run: NDArray) -> Record:
        """Return score, mean layers and share of the multiply-adds of the bare encoder at full depth."""
        model, rows = self.traced.saved.model, self.traced.rows(split)
        macs = row_macs(model, self.tokens[split], layers, run, criterion=criterion).total
        return {
            "score": round(rows.scores((rows.metric,), logits)[rows.metric], 4),
            "layers": round(float(run.mean()), 4),
            "macs": round(float(macs.sum() / encoder_macs(model, self.tokens[split]).sum()), 4),
        }


def measure(folder: Path, metric: str, reporting: Path, *, noise: bool = False) -> list[Record]:
    """Return the records of a trained model.

    Args:
        folder: written by `earlyexit train`, with the rows to choose settings on.
        metric: that decides.
        reporting: file of the rows to report on.
        noise: whether to measure patience and full depth on text with typing errors too.
    """
    saved = load_saved(folder)
    assert saved.record is not None
    files = {"tuning": folder / HELD_OUT, "reporting": reporting}
    splits = {name: saved.read(file, saved.record.columns) for name, file in files.items()}
    traced = trace_splits(
        saved, splits, dict(zip(SPLITS, SPLITS, strict=True)), metrics=[metric], batch_size=BATCH_SIZE
    )
    tokens = {name: torch.tensor([len(row["input_ids"]) for row in _rows(data)]) for name, data in traced.data.items()}
    subject = Subject(traced, tokens)
    found = [_layers(subject), _exits(subject)]
    outputs, problem_type = traced.traces["tuning"][0], traced.problem_type
    wanted = {*RULES, saved.model.method.rule}
    for name, group in settings(outputs, points=POINTS, problem_type=problem_type).items():
        if name in wanted:
            found.append(_replayed(subject, name, group))
    if "halting" in outputs.aux:
        draws = [SampledExit(seed=seed) for seed in range(DRAWS)]
        found += [_replayed(subject, "sampled_exit", draws), _replayed(subject, "expectation", [Expectation()])]
        if saved.model.method.name == "dact":
            found.append(_replayed(subject, "bound", [Dact(bound=bound) for bound in ("paper", "tight")]))
    if "gate" in saved.model.heads.aux_names:
        found += _skipping(subject)
    if noise:
        found += list(_noisy(subject))
    return found


def _rows(data: Any) -> Iterator[Any]:
    return (data[number] for number in range(len(data)))


def _layers(subject: Subject) -> Record:
    """Return the score of each exit on both splits."""
    metric = subject.traced.metrics[0]
    scores = {
        split: [round(layer[metric], 4) for layer in subject.traced.rows(split).truncations((metric,))]
        for split in SPLITS
    }
    return {"kind": "layers", "metric": metric, **scores}


def _exits(subject: Subject) -> Record:
    """Return how often exits agree, and the share of the reporting rows that one exit or the other answers rightly."""
    trace, labels = subject.traced.traces["reporting"]
    if subject.traced.problem_type == "regression":
        return {"kind": "exits"}
    named = trace.logits.argmax(dim=-1).numpy()
    right = named == np.asarray(labels)[:, None]
    pairs = [float((named[:, a] != named[:, b]).mean()) for a, b in combinations(range(subject.depth), 2)]
    return {
        "kind": "exits",
        "neighbours_agree": [round(float(x), 4) for x in (named[:, 1:] == named[:, :-1]).mean(axis=0)],
        "disagreement": round(float(np.mean(pairs)), 4),
        "oracle": round(float(right.any(axis=1).mean()), 4),
        "overthinking": round(float((right.any(axis=1) & ~right[:, -1]).mean()), 4),
    }


def _replayed(subject: Subject, name: str, group: Sequence[Criterion]) -> Record:
    """Return the settings of a rule replayed on both splits; on the reporting one with random exits of the same mix."""
    columns = {}
    for split in SPLITS:
        of_split, rows = subject.traced.rows(split), []
        for answers in of_split.replay(group):
            row = subject.scored(split, answers.criterion, answers.logits, answers.exit_layer, answers.layers_run)
            if split == "reporting":
                row["random"] = round(of_split.random_exit(exit_shares(answers.exit_layer, subject.depth)), 4)
            rows.append(row)
        columns[split] = _columns(rows)
    return {"kind": "rule", "rule": name, "settings": [c.to_dict() for c in group], **columns}


def _skipping(subject: Subject) -> list[Record]:
    """Return SmartBERT's four arms by running the model: skips and exits, and exits alone, over the same thresholds.

    The first threshold of each is 0, with which no row leaves: skips alone, and neither.
    """
    model, trace = subject.traced.saved.model, subject.traced.traces["tuning"][0]
    skip_from = model.method.to_dict().get("skip_threshold", SKIP_FROM)
    found = []
    for name, threshold in (("skips and exits", skip_from), ("exits alone", NEVER_SKIP)):
        group = skip_settings(trace, skip_from=(threshold,))
        columns = {}
        for split in SPLITS:
            rows = []
            for criterion in group:
                model.set_criterion(criterion)
                out = predict_with_exits(model, subject.traced.data[split], **subject.traced.batching)
                rows.append(subject.scored(split, criterion, out.logits, out.exit_layer, out.layers_run))
            columns[split] = _columns(rows)
        found.append({"kind": "rule", "rule": name, "settings": [c.to_dict() for c in group], **columns})
    model.set_criterion(None)
    return found


def _noisy(subject: Subject) -> Iterator[Record]:
    """Yield full depth and each patience on text with typing errors, the mean of several draws."""
    saved, problem_type = subject.traced.saved, subject.traced.problem_type
    metric = METRICS[subject.traced.metrics[0]]
    group = [Patience(patience=p) for p in range(1, subject.depth)]
    draws = []
    for seed in range(NOISE_DRAWS):
        split = typos(subject.traced.splits["reporting"], NOISE, seed=seed)
        trace, labels = collect_trace(saved.model, saved.encoded(split), **subject.traced.batching)
        full = predictions_of(trace.logits[:, -1].numpy(), problem_type)
        row = [metric(full, np.asarray(labels))]
        for logits, _layers in replay_each(trace, group, problem_type=problem_type):
            row.append(metric(predictions_of(logits.numpy(), problem_type), np.asarray(labels)))
        draws.append(row)
    scores = np.mean(draws, axis=0)
    yield {
        "kind": "noise",
        "share": NOISE,
        "full_depth": round(scores[0], 4),
        "patience": np.round(scores[1:], 4).tolist(),
    }


def _columns(rows: Sequence[Record]) -> dict[str, list[float]]:
    return {name: [row[name] for row in rows] for name in rows[0]}
