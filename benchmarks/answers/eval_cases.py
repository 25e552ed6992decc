"""Cases of models in eval mode: batches, full-depth passes, streams, traces, stored weights, dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import earlyexit_kernels as ee
from benchmarks.answers.models import (
    BATCHES,
    BERT_FORM,
    DECODERS,
    FUSED,
    HEADS,
    VOCABULARY,
    batch,
    configure,
    early_exit,
    fresh,
)
from benchmarks.answers.recording import ROUNDING, Case
from benchmarks.answers.rules import SETTINGS, Setting

Fields = Mapping[str, Tensor | str | None]
#: Back-ends and compactions of the group ``forward``.
RUNS = (*(("cpp", compaction) for compaction in ("auto", "always", "never")), ("torch", "always"))
#: Forms of exits of which a plain call computes no part by a product of torch.
_KERNEL_HEADS = ("joint", "first", "mean")
#: Rules of a few kinds: without state, with state, of the states themselves.
_FEW = ("entropy", "patience", "hidden_cosine")
#: Tolerance of models in half precision, some units in the last place.
_HALF_ROUNDING = 0.03


def paths(family: str) -> tuple[str, ...]:
    """Return the kinds of layers of a family."""
    return ("eager", "fused") if family in FUSED else ("eager",)


def settings(family: str) -> dict[str, Setting]:
    """Return the settings of criteria that a family's models can have."""
    return {name: each for name, each in SETTINGS.items() if not (each.heads == "first" and family in DECODERS)}


def tolerance(family: str, path: str, backend: str, setting: Setting) -> float:
    """Return the tolerance of a plain call: none on the vector kernels, of which every sum has a fixed order."""
    on_kernels = family in BERT_FORM and path == "fused" and backend == "cpp" and setting.heads in _KERNEL_HEADS
    return 0.0 if on_kernels and not isinstance(setting.rule, ee.criteria.HiddenCosine) else ROUNDING


def answered(output: Any) -> Fields:
    """Return the fields of a model's output."""
    names = ("loss", "logits", "exit_layer", "layers_run", "all_logits")
    return {name: getattr(output, name) for name in names}


def ask(model: Any, rule: Any, inputs: Mapping[str, Any], **options: Any) -> Fields:
    """Return the answers of a model to a batch; `options` are those of `configure`, if there are any."""
    if options:
        configure(model, **options)
    model.set_criterion(rule)
    return answered(model(**inputs))


def forward(family: str) -> Iterator[Case]:
    """Every criterion with all kinds of layers, back-ends and compactions."""
    for name, setting in settings(family).items():
        model = early_exit(family, setting.heads)
        for path in paths(family):
            for backend, compaction in RUNS:
                options = {"path": path, "backend": backend, "compaction": compaction}
                for kind in BATCHES:  # the second one runs from the copies of weights that the first has made
                    case = f"forward | {family} | {name} | {path} | {backend} | {compaction} | {kind}"
                    call = partial(ask, model, setting.rule, batch(family, kind), **options)
                    yield Case(case, call, tolerance(family, path, backend, setting))


def modes(family: str) -> Iterator[Case]:
    """The other calls that answer by a criterion: all logits, stream, trace and replay, fixed depth."""
    for name, setting in settings(family).items():
        model, rule = early_exit(family, setting.heads), setting.rule
        for kind in BATCHES:
            inputs = batch(family, kind)
            for path in paths(family):
                case = f"{family} | {name} | {path} | {kind}"
                exact = tolerance(family, path, "cpp", setting)
                yield Case(f"stream | {case}", partial(_stream, model, rule, path, inputs), exact)
                if not isinstance(rule, ee.criteria.SkipGate):  # which changes the exits of later layers
                    full = {**inputs, "output_all_logits": True}
                    yield Case(f"all logits | {case}", partial(ask, model, rule, full, path=path))
                    yield Case(f"replay of a trace | {case}", partial(_traced, model, rule, path, inputs))
            yield Case(f"fixed depth | {family} | {name} | {kind}", partial(_fixed_depth, model, rule, inputs))
    for heads in ("joint", "mean", "berxit", "palbert", "dact", "fastbert"):
        for path in paths(family):
            for kind in BATCHES:
                call = partial(_trace, early_exit(family, heads), path, batch(family, kind))
                yield Case(f"trace | {family} | {heads} | {path} | {kind}", call)


def _stream(model: Any, rule: Any, path: str, inputs: Mapping[str, Tensor]) -> Fields:
    configure(model, path=path, compaction="always")
    model.set_criterion(rule)
    parts = list(model.stream(**inputs))
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("rows", "logits", "exit_layer")}
    return {"sizes": torch.tensor([len(part.rows) for part in parts]), **joined}


def _trace(model: Any, path: str, inputs: Mapping[str, Tensor]) -> Fields:
    configure(model, path=path)
    model.set_criterion(None)
    trace = model.trace(**inputs)
    aux = {f"aux {name}": values for name, values in trace.aux.items()}
    return {"logits": trace.logits, "keys": trace.keys, "problem_type": trace.problem_type, **aux}


def _traced(model: Any, rule: Any, path: str, inputs: Mapping[str, Tensor]) -> Fields:
    configure(model, path=path)
    model.set_criterion(None)
    logits, exit_layer = ee.replay(model.trace(**inputs), rule)
    return {"logits": logits, "exit_layer": exit_layer}


def _fixed_depth(model: Any, rule: Any, inputs: Mapping[str, Tensor]) -> Fields:
    model.set_criterion(rule)
    logits, exit_layer = model.fixed_depth()(**inputs)
    return {"logits": logits, "exit_layer": exit_layer}


def inputs(family: str) -> Iterator[Case]:
    """Batches with other inputs than ids and mask, empty and large ones, and invalid logits."""
    plain = batch(family, "right")
    ids = plain["input_ids"]
    columns = torch.arange(ids.shape[1]).expand(ids.shape)
    given: dict[str, Mapping[str, Any]] = {
        **{kind: batch(family, kind) for kind in ("right", "left", "one", "none", "large")},
        "no mask": {"input_ids": batch(family, "full")["input_ids"]},
        "token types": {**plain, "token_type_ids": (columns > 1).long()},
        "positions": {**plain, "position_ids": columns.flip(1) + 2},
        "labels": {**plain, "labels": torch.arange(len(ids)) % 3},
        "ids out of range": {"input_ids": ids + VOCABULARY},
        "longest": {"input_ids": torch.arange(5, 69)[None]},
        "too long": {"input_ids": torch.arange(5, 85)[None]},
    }
    for name in _FEW:
        setting = SETTINGS[name]
        model = early_exit(family, setting.heads)
        for kind, each in given.items():
            for path in ("auto", *paths(family)):
                call = partial(ask, model, setting.rule, each, path=path)
                exact = tolerance(family, path, "cpp", setting)
                yield Case(f"inputs | {family} | {name} | {kind} | {path}", call, exact)
        for strict in (False, True):
            model = _with_invalid_exit(family, strict=strict)
            for path in paths(family):
                call = partial(_invalid, model, setting.rule, path, batch(family, "holes"))
                yield Case(f"invalid logits | {family} | {name} | {path} | strict {strict}", call)


def _with_invalid_exit(family: str, *, strict: bool) -> Any:
    """Return a model whose second exit gives NaN."""
    model = fresh(family, strict=strict)
    with torch.no_grad():
        dict(model.named_parameters())["heads.out.1.bias"].fill_(torch.nan)
    return model


def _invalid(model: Any, rule: Any, path: str, inputs: Mapping[str, Tensor]) -> Fields:
    before = model.invalid_rows
    found = ask(model, rule, inputs, path=path)
    return {**found, "invalid_rows": torch.tensor(model.invalid_rows - before)}


def stored(family: str) -> Iterator[Case]:
    """Weights of fused layers in fewer bytes; families of other forms refuse them."""
    for weights in ("float16", "bfloat16", "int8"):
        for name in (*_FEW, "q_exit"):
            setting = SETTINGS[name]
            for kind in BATCHES:
                options = {"path": "fused", "weights": weights, "compaction": "always"}
                call = partial(ask, early_exit(family, setting.heads), setting.rule, batch(family, kind), **options)
                case = f"stored weights | {family} | {name} | {weights} | {kind}"
                yield Case(case, call, tolerance(family, "fused", "cpp", setting))


def dtypes(family: str) -> Iterator[Case]:
    """Models in half and double precision."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        rounding = ROUNDING if dtype == torch.float64 else _HALF_ROUNDING
        for name in (*_FEW, "energy, mean token", "q_exit", "skip_gate"):
            setting = SETTINGS[name]
            model = fresh(family, **HEADS[setting.heads]).to(dtype)
            for path in paths(family):
                for kind in BATCHES:
                    call = partial(ask, model, setting.rule, batch(family, kind), path=path, compaction="always")
                    yield Case(f"dtypes | {family} | {name} | {str(dtype)[6:]} | {path} | {kind}", call, rounding)
