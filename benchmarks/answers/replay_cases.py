"""Cases of `replay` on made-up exits, without a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

import earlyexit_kernels as ee
from benchmarks.answers.eval_cases import Fields
from benchmarks.answers.models import DEPTH
from benchmarks.answers.recording import Case
from benchmarks.answers.rules import SETTINGS
from benchmarks.answers.training_cases import CLASSIFICATION


def replays() -> Iterator[Case]:
    """Every criterion on made-up exits, by each back-end."""
    for rows, classes, depth in ((40, 1, 4), (40, 2, 4), (300, 3, 4), (7, 17, 12), (1500, 3, 6)):
        task = "regression" if classes == 1 else CLASSIFICATION
        trace = _made_up(rows, classes, depth)
        for backend in ("torch", "cpp"):
            shape = f"{rows} x {depth} x {classes} | {backend}"
            rules = {name: setting.rule for name, setting in SETTINGS.items() if setting.heads != "smartbert"}
            if depth != DEPTH:  # a list of thresholds is for one depth
                rules = {
                    name: rule for name, rule in rules.items() if not isinstance(vars(rule).get("threshold"), tuple)
                }
            for name, rule in rules.items():
                call = partial(_replayed, trace, rule, task, backend)
                yield Case(f"replay | {name} | {shape}", call, 0.0)
            if classes > 1:
                yield Case(f"replay | each | {shape}", partial(_each, trace, list(rules.values()), backend), 0.0)


def _made_up(rows: int, classes: int, depth: int) -> ee.ExitTrace:
    generator = torch.Generator().manual_seed(rows + classes)
    logits = torch.randn(rows, depth, classes, generator=generator) * 2 / math.sqrt(max(classes / 3, 1))
    scalars = torch.randn(3, rows, depth, generator=generator)
    aux = {"halting": scalars[0], "uncertainty": scalars[1], "hidden_cosine": scalars[2].tanh()}
    return ee.ExitTrace(logits, aux, torch.randint(2**62, (rows,), generator=generator))


def _replayed(trace: ee.ExitTrace, rule: Any, task: str, backend: str) -> Fields:
    logits, exit_layer = ee.replay(trace, rule, problem_type=task, backend=backend)
    return {"logits": logits, "exit_layer": exit_layer}


def _each(trace: ee.ExitTrace, rules: list[Any], backend: str) -> Fields:
    found = list(ee.replay_each(trace, rules, backend=backend))
    return {"logits": torch.stack([x for x, _ in found]), "exit_layer": torch.stack([x for _, x in found])}
