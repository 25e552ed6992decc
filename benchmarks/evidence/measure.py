"""Trace a trained model on its rows, and keep what its exits answer (`kept.Kept`)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.polynomial.polynomial import polyfit
from numpy.typing import NDArray

from benchmarks import glue
from benchmarks.evidence import kept
from benchmarks.evidence.kept import Costs, Kept, packed_logits
from benchmarks.evidence.noise import swaps, typos
from benchmarks.evidence.plans import Training
from earlyexit_kernels.cli.eval import NEVER_SKIP, SKIP_FROM
from earlyexit_kernels.cli.saved import HELD_OUT, Saved, load_saved
from earlyexit_kernels.criteria import from_dict
from earlyexit_kernels.hf.predict import predict_with_exits
from earlyexit_kernels.tuning.flops import encoder_macs, exit_macs, gate_macs
from earlyexit_kernels.tuning.metrics import predictions_of
from earlyexit_kernels.tuning.settings import skip_settings
from earlyexit_kernels.tuning.tables import environment
from earlyexit_kernels.tuning.traces import collect_trace

BATCH_SIZE = 32
#: Kind of changed words -> the share of the words that can be changed, and what changes them.
CHANGES = {"typos": (0.2, typos), "swaps": (1.0, swaps)}
DRAWS = 3
#: Arms of a model with gates -> threshold from which a gate skips, or None for that of the method.
ARMS = {"skips and exits": None, "exits alone": NEVER_SKIP}


def measure(training: Training, folder: Path, reporting: Path, seconds: dict[str, int]) -> Kept:
    """Return what is kept of a trained model.

    Args:
        training: of the model.
        folder: written by `earlyexit train`, with the rows to choose settings on.
        reporting: file of the rows to report on.
        seconds: of the training.
    """
    saved = load_saved(folder)
    assert saved.record is not None
    files = {"tuning": folder / HELD_OUT, "reporting": reporting}
    arrays: dict[str, NDArray] = {}
    arms: dict[str, list[dict[str, Any]]] = {}
    problem_type = saved.labels.problem_type
    batching = {"collate_fn": saved.collate, "batch_size": BATCH_SIZE}
    for split, file in files.items():
        rows = saved.read(file, saved.record.columns)
        data = saved.encoded(rows)
        trace, labels = collect_trace(saved.model, data, **batching)
        arrays[f"{split}_logits"] = packed_logits(trace.logits, problem_type)
        arrays |= {f"{split}_{n}": trace.aux[n].to(torch.float16).numpy() for n in kept.AUX if n in trace.aux}
        numbers = np.asarray(labels)
        arrays[f"{split}_labels"] = numbers.astype(np.float32 if problem_type == kept.REGRESSION else np.uint8)
        arrays[f"{split}_tokens"] = np.array([len(data[n]["input_ids"]) for n in range(len(data))], dtype=np.uint16)
        if "gate" in saved.model.heads.aux_names:
            arrays |= _skipping(saved, split, trace, data, arms, batching)
        if training.noise and split == "reporting":
            for kind, (share, change) in CHANGES.items():
                for seed in range(DRAWS):
                    changed = saved.encoded(change(rows, share, seed=seed))
                    logits = collect_trace(saved.model, changed, **batching)[0].logits
                    arrays[f"{split}_{kind}{seed}_logits"] = packed_logits(logits, problem_type)
    return Kept(
        name=training.name,
        metric=glue.TASKS[training.task].metric,
        problem_type=problem_type,
        method=saved.model.method.to_dict(),
        rule=saved.model.method.rule,
        command=" ".join(["earlyexit", *training.arguments("ENCODER", "OUTPUT")]),
        costs=costs_of(saved.model),
        arms=arms,
        data={split: hashlib.sha256(file.read_bytes()).hexdigest() for split, file in files.items()},
        seconds=seconds,
        environment=environment(),
        arrays=arrays,
    )


def _skipping(
    saved: Saved, split: str, trace: Any, data: Any, arms: dict[str, list[dict[str, Any]]], batching: dict[str, Any]
) -> dict[str, NDArray]:
    """Run the model with skips and exits, and with exits alone, over the same thresholds.

    The first threshold of each is 0, with which no row leaves: skips alone, and neither. Settings are those of the
    tuning rows, which come first.
    """
    model, made = saved.model, {}
    of_method = model.method.to_dict().get("skip_threshold", SKIP_FROM)
    for arm, skip_from in ARMS.items():
        if split == "tuning":
            group = skip_settings(trace, skip_from=(of_method if skip_from is None else skip_from,))
            arms[arm] = [criterion.to_dict() for criterion in group]
        answers, layers, run = [], [], []
        for settings in arms[arm]:
            model.set_criterion(from_dict(settings))
            out = predict_with_exits(model, data, **batching)
            answers.append(predictions_of(out.logits, saved.labels.problem_type))
            layers.append(out.exit_layer)
            run.append(out.layers_run)
        for name, rows in (("answers", answers), ("exit_layer", layers), ("layers_run", run)):
            made[f"{split}_{arm}_{name}"] = np.stack(rows).astype(np.uint8)
    model.set_criterion(None)
    return made


def costs_of(model: Any) -> Costs:
    """Return the multiply-adds of the parts of a model as polynomials of the tokens of a row."""
    tokens = torch.tensor([0, 100, 200])

    def polynomial(macs: torch.Tensor) -> tuple[float, ...]:
        return tuple(np.round(polyfit(tokens.double().numpy(), macs.double().numpy(), 2), 6).tolist())

    scalars: Sequence[str] = ["", *(name for name in kept.AUX if name in model.heads.aux_names)]
    empty = torch.zeros_like(tokens)
    return Costs(
        embedding=polynomial(encoder_macs(model, tokens, 0)),
        layer=polynomial(encoder_macs(model, tokens, 1) - encoder_macs(model, tokens, 0)),
        gate=polynomial(gate_macs(model, tokens) if "gate" in model.heads.aux_names else empty),
        exits={name: polynomial(exit_macs(model, tokens, name or None)) for name in scalars},
    )
