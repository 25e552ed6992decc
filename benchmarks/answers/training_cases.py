"""Cases of losses and gradients, and of answers for tasks other than single-label classification."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import earlyexit_kernels as ee
from benchmarks.answers.eval_cases import Fields, ask, paths
from benchmarks.answers.models import CLASSES, batch, early_exit, fresh
from benchmarks.answers.recording import Case
from benchmarks.answers.rules import SETTINGS

METHODS = ("joint", "palbert", "ensemble", "smartbert", "dact", "deebert", "berxit", "fastbert")
_PAPERS: Any = ee.methods if hasattr(ee, "methods") else ee.objectives  # its name before
#: Methods with other arguments than the default.
VARIANTS: dict[str, Any] = {
    "joint, equilibrium": _PAPERS.Joint(equilibrium=True),
    "palbert, halting phase": _PAPERS.Palbert(kl="posterior_prior", close_tail=False, halting_phase=True),
    "palbert, diff": _PAPERS.Palbert(beta=0.1, prior=0.3, halting_input="diff", halting_layers=1),
    "ensemble, batch": _PAPERS.Ensemble(weights="depth", min_over="batch", detach_target=True, cap=2.0),
    "smartbert, linear": _PAPERS.Smartbert(gate_penalty="linear", soft_epochs=1, contrast_backbone=0.2),
    "dact, last": _PAPERS.Dact(start="last", ponder=0.2, include_last=False, shared=True),
    "berxit, two stages": _PAPERS.Berxit(strategy="two_stage", odd_includes_last=False),
    "berxit, linear": _PAPERS.Berxit(strategy="weight_linear", learned_weight=0.5),
    "fastbert, student": _PAPERS.Fastbert(kl="student_teacher"),
}
#: Steps and epochs at which losses are recorded; some methods alternate, or change after some epochs.
PROGRESS = ((0, 0.0), (1, 4.0))
#: Problem type -> number of outputs.
TASKS = {"single_label_classification": CLASSES, "multi_label_classification": CLASSES, "regression": 1}
CLASSIFICATION = "single_label_classification"


def labels_for(task: str, rows: int) -> Tensor:
    """Return labels of a task; without classes for one row of a classification."""
    if task == "regression":
        return torch.linspace(-1, 1, rows)
    if task == CLASSIFICATION:
        return (torch.arange(rows) % CLASSES).masked_fill(torch.arange(rows) == 4, -100)
    return (torch.arange(rows * CLASSES).view(rows, CLASSES) % 4 == 0).float()


def sampled(values: Tensor) -> Tensor:
    """Return the norm of a tensor, its product with a fixed vector, and four elements, ``[6]`` float64."""
    flat = values.detach().flatten().double()
    fixed = torch.arange(1, flat.numel() + 1, dtype=torch.float64).cos()
    places = [(number * 7919) % flat.numel() for number in range(1, 5)]
    return torch.cat([flat.norm()[None], (flat @ fixed)[None], flat[places]])


def training(family: str) -> Iterator[Case]:
    """Loss and gradients of every method in each of its phases."""
    methods: dict[str, Any] = {name: name for name in METHODS}
    if family in ("bert", "albert"):
        methods |= VARIANTS
    for name, method in methods.items():
        yield from _phases(f"training | {family} | {name}", family, method, CLASSIFICATION)
    yield from _phases(
        f"training | {family} | joint, checkpointing", family, "joint", CLASSIFICATION, checkpointing=True
    )
    if family in ("bert", "modernbert", "deberta", "qwen3"):
        for name in METHODS:
            yield from _phases(f"dropout | {family} | {name}", family, name, CLASSIFICATION, dropout=0.1)


def tasks(family: str) -> Iterator[Case]:
    """Training and answers for tasks other than classes."""
    for task in ("multi_label_classification", "regression"):
        shape = {"problem_type": task, "num_labels": TASKS[task]}
        for name in METHODS:
            yield from _phases(f"tasks | {family} | {task} | {name}", family, name, task)
        rules = {
            "patience": ("joint", ee.criteria.Patience(patience=1, tolerance=0.8)),
            **{name: (SETTINGS[name].heads, SETTINGS[name].rule) for name in ("hidden_cosine", "learned", "q_exit")},
        }
        for name, (heads, rule) in rules.items():
            for path in paths(family):
                inputs = batch(family, "holes")
                given = {**inputs, "labels": labels_for(task, len(inputs["input_ids"]))}
                call = partial(_of_task, family, heads, shape, rule, given, path)
                yield Case(f"tasks | {family} | {task} | {name} | {path}", call)


def _of_task(
    family: str, heads: str, shape: Mapping[str, Any], rule: Any, inputs: Mapping[str, Any], path: str
) -> Fields:
    return ask(early_exit(family, heads, **shape), rule, inputs, path=path, compaction="always")


def _phases(
    case: str, family: str, method: Any, task: str, *, dropout: float = 0.0, checkpointing: bool = False
) -> Iterator[Case]:
    """Yield the cases of one method; where the model cannot be made, one with the error."""
    shape = {"problem_type": task, "num_labels": TASKS[task]}
    try:
        model = fresh(family, dropout=dropout, settings=shape, method=method)
        if checkpointing:
            model.gradient_checkpointing_enable()
    except Exception as error:  # a method that is not for this task, for example
        yield Case(case, partial(_raise, error))
        return
    model.train()
    inputs = batch(family, "holes")
    given = {**inputs, "labels": labels_for(task, len(inputs["input_ids"]))}
    for phase in ee.phases(model):
        for step, epoch in PROGRESS:
            for callback in phase.callbacks():
                state = SimpleNamespace(global_step=step, epoch=epoch)
                callback.on_step_begin(None, state, None, model=model)
            yield Case(f"{case} | {phase.name} | step {step}", partial(_gradients, model, given))


def _raise(error: Exception) -> Fields:
    raise error


def _gradients(model: Any, inputs: Mapping[str, Tensor]) -> Fields:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    output = model(**inputs)
    output.loss.backward()
    found = {f"gradient of {name}": sampled(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": output.loss, "all_logits": output.all_logits, **found}
