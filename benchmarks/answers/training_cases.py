"""Cases of losses and gradients, conversions, changed weights, saved models, and replays of made-up exits."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import earlyexit_kernels as ee
from benchmarks.answers.eval_cases import Fields, ask, paths, tolerance
from benchmarks.answers.models import CLASSES, DEPTH, batch, configure, early_exit, fresh, stock
from benchmarks.answers.recording import ROUNDING, Case
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


def conversions(family: str) -> Iterator[Case]:
    """Parameters of the exits after a conversion, whose new ones are drawn from torch's generator."""
    for method in METHODS:
        yield Case(f"conversion | {family} | {method}", partial(_converted, family, {"method": method}))
    for pooling in ("first", "last", "mean"):
        yield Case(f"conversion | {family} | pooling {pooling}", partial(_converted, family, {"pooling": pooling}))
    for method in ("palbert", "dact", "fastbert", "joint"):
        again = {"method": method}
        yield Case(
            f"conversion | {family} | berxit to {method}", partial(_converted, family, {"method": "berxit"}, again)
        )


def _converted(family: str, arguments: Mapping[str, Any], again: Mapping[str, Any] | None = None) -> Fields:
    model = stock(family)
    torch.manual_seed(1)
    model = ee.to_early_exit(model, **arguments)
    if again is not None:
        model = ee.to_early_exit(model, **again)
    parameters = {name: sampled(p) for name, p in model.named_parameters() if name.startswith("heads.")}
    return {**parameters, **ask(model, None, batch(family, "holes"))}


def changes(family: str) -> Iterator[Case]:
    """Answers before and after changes of the weights, which packed copies of them have to follow."""
    setting, given = SETTINGS["entropy"], batch(family, "holes")
    for path in ("default", *paths(family)):
        model = fresh(family)
        if path != "default":
            configure(model, path=path)
        exact = tolerance(family, "fused" if path == "default" else path, "cpp", setting)
        yield Case(f"changes | {family} | {path} | none", partial(ask, model, setting.rule, given), exact)
        for name, change in (("scaled", _scale), ("loaded", _load), ("step", _step)):
            change(model, given)
            rounding = ROUNDING if name == "step" else exact
            yield Case(f"changes | {family} | {path} | {name}", partial(ask, model, setting.rule, given), rounding)


@torch.no_grad()
def _scale(model: Any, inputs: Mapping[str, Tensor]) -> None:
    for parameter in model.parameters():
        parameter.mul_(0.9)


def _load(model: Any, inputs: Mapping[str, Tensor]) -> None:
    model.load_state_dict({name: 1.2 * values for name, values in model.state_dict().items()})


def _step(model: Any, inputs: Mapping[str, Tensor]) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model(**inputs, labels=labels_for(CLASSIFICATION, len(inputs["input_ids"]))).loss.backward()
    optimizer.step()
    model.eval()


def files(family: str, written: Path | None = None, read: Path | None = None) -> Iterator[Case]:
    """Answers of models that were saved and loaded.

    Args:
        family: of the models.
        written: folder to keep the saved models in; default: a temporary one.
        read: folder of models to load instead, saved by another recording.
    """
    names = [name for name in SETTINGS if family == "bert" or name in ("entropy", "q_exit")]
    with nullcontext(written) if written else tempfile.TemporaryDirectory() as folder:
        for name in names:
            here = Path(str(folder)) / f"{family}, {name}"
            model, rule = early_exit(family, SETTINGS[name].heads), SETTINGS[name].rule
            model.set_criterion(rule)
            yield Case(f"files | {family} | {name}", partial(_written, model, here))
            there = here if read is None else read / here.name
            for path in paths(family):
                call = partial(_loaded, there, batch(family, "holes"), path)
                exact = tolerance(family, path, "cpp", SETTINGS[name])
                yield Case(f"loaded | {family} | {name} | {path}", call, exact)


def _written(model: Any, folder: Path) -> Fields:
    """Save a model, and return its config and the names and shapes of its weights."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("transformers_version", None)
    shapes = {name: list(value.shape) for name, value in load_file(folder / "model.safetensors").items()}
    found = {"config": config, "weights": shapes, "files": sorted(path.name for path in folder.iterdir())}
    return {name: json.dumps(value, sort_keys=True) for name, value in found.items()}


def _loaded(folder: Path, inputs: Mapping[str, Tensor], path: str) -> Fields:
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return {**ask(model, model.criterion, inputs, path=path), "criterion": str(model.criterion)}


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
