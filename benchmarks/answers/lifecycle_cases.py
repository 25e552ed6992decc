"""Cases of converted models, changed weights, and models that were saved and loaded."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification

import earlyexit_kernels as ee
from benchmarks.answers.eval_cases import Fields, ask, paths, tolerance
from benchmarks.answers.models import batch, configure, early_exit, fresh, stock
from benchmarks.answers.recording import ROUNDING, Case
from benchmarks.answers.rules import SETTINGS
from benchmarks.answers.training_cases import CLASSIFICATION, METHODS, labels_for, sampled


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
