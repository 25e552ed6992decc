"""Target `models`: answers of a row do not depend on its batch, on compaction or on the kind of layers.

Two runs may differ if the score of a row is within rounding of the threshold; this is decided by adding noise of the
size of rounding to the trace.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from support.models import ALL_FAMILIES, DECODERS, VOCABULARY, balance_classes, batch_for, early_exit, kinds_of, pad_id
from torch import Tensor

import earlyexit_kernels as ee
from earlyexit_kernels.criteria import RULES, SkipGate
from fuzz.case import Case, WrongError
from fuzz.ops import drawn_setting

METHODS = ("joint", "palbert", "berxit", "dact", "fastbert", "smartbert")
POOLINGS = (None, None, "first", "mean")
#: Rounding of a whole model, relative to its largest logit; answers are float32 for all dtypes.
NOISE = {torch.float32: 1e-5, torch.float64: 2e-6, torch.bfloat16: 0.12}
DTYPES = (torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16)
#: Rules that answer with the log of a weighted mean of probabilities: a small one is a rest of larger ones, so that its
#: log has few digits in float32.
MIXING = ("dact", "expectation")
MAX_LENGTH = 24

Batch = dict[str, Tensor]


@functools.lru_cache(maxsize=512)
def built(family: str, method: str, pooling: str | None, halting: bool, dtype: torch.dtype) -> Any:
    """Return a tiny model whose exits predict all classes about equally often."""
    model = early_exit(family, gain=4, method=method, pooling=pooling, halting=halting, num_hidden_layers=3)
    model.set_criterion(None)
    if len(model.heads.out) == model.depth:
        balance_classes(model, batch_for(model, "right", lengths=(7, 3, 20, 12, 5, 9)))
    return model.to(dtype)


def run(case: Case) -> None:
    """Compare one model and batch with runs that must give the same answers."""
    dtype = case.choice(DTYPES)
    method, pooling = case.choice(METHODS), case.choice(POOLINGS)
    halting = method in ("joint", "berxit") and case.chance(0.3)
    family = case.choice(ALL_FAMILIES)
    if pooling == "first" and family in DECODERS:
        pooling = "last"
    model = built(family, method, pooling, halting, dtype)
    model.configure(compaction=case.choice(("auto", "always", "never")))
    model.configure(path=case.choice(("auto", "eager")))
    model.configure(backend=case.choice(("auto", "torch")))
    batch = ragged(case, model, family)
    rule = drawn(case, model)
    model.set_criterion(rule)
    trace = None if isinstance(rule, SkipGate) else model.trace(**batch)
    expected = model(**batch)
    case.calls += 1
    checks = list(CHECKS) if trace is not None else [name for name in CHECKS if name not in OF_TRACES]
    for name in case.draw.sample(checks, 2):
        got = CHECKS[name](case, model, batch, trace)
        case.calls += 1
        description = (
            f"{name}: {type(rule).__name__} on {model.config.backbone_config.model_type}, {method}, {pooling}, {dtype}"
        )
        compare(description, model, trace, expected, got)


def ragged(case: Case, model: Any, family: str) -> Batch:
    """Return a batch of random lengths."""
    rows = case.choice((1, 2, 3, 5, 8))
    lengths = [case.integer(1, MAX_LENGTH) for _ in range(rows)]
    kind = case.choice((*kinds_of(family), "right"))
    if kind in ("holes", "pad_ids_attended"):
        lengths = [max(length, 3) for length in lengths]
    batch = batch_for(model, kind, lengths=lengths, seed=case.integer(0, 2**31))
    if case.chance(0.2):
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return batch


def drawn(case: Case, model: Any) -> Any:
    """Return a random rule that the heads support; gated models skip layers."""
    names = sorted(RULES)
    while True:
        rule = drawn_setting(case.choice(names), case, 3, model.depth).criterion
        if "gate" in model.heads.aux_names:
            rule = SkipGate(threshold=case.uniform(0, 1), exit=rule)
        try:
            model.set_criterion(rule)
        except ValueError:
            continue  # the heads lack a scalar
        return rule


def rows_of(batch: Batch, rows: Any) -> Batch:
    return {name: values[rows] for name, values in batch.items()}


def joined(outputs: list[Any]) -> Any:
    return ee.EarlyExitOutput(
        logits=torch.cat([out.logits for out in outputs]), exit_layer=torch.cat([out.exit_layer for out in outputs])
    )


def one_by_one(case: Case, model: Any, batch: Batch, trace: Any) -> Any:
    """Run each row alone, without its padding in half of the cases."""
    outputs, trims = [], case.chance(0.5)
    for i in range(len(batch["input_ids"])):
        row = rows_of(batch, slice(i, i + 1))
        if trims:
            tokens = int(row["attention_mask"][0].nonzero().max()) + 1
            row = {name: values[:, :tokens] for name, values in row.items()}
        outputs.append(model(**row))
    return joined(outputs)


def shuffled(case: Case, model: Any, batch: Batch, trace: Any) -> Any:
    """Run the rows in another order and in smaller batches."""
    rows = len(batch["input_ids"])
    order = torch.tensor(case.draw.sample(range(rows), rows))
    got = joined([model(**rows_of(batch, index)) for index in order.split(case.integer(1, rows))])
    back = order.argsort()
    return ee.EarlyExitOutput(logits=got.logits[back], exit_layer=got.exit_layer[back])


def among_others(case: Case, model: Any, batch: Batch, trace: Any) -> Any:
    """Run the rows in a larger batch with more padding."""
    rows, length = batch["input_ids"].shape
    wider = length + case.integer(0, 8)
    others, kept = case.integer(1, 4), case.integer(1, wider)
    found = {}
    for name, values in batch.items():
        new = torch.zeros(rows + others, wider, dtype=values.dtype)
        if name == "input_ids":
            new.fill_(pad_id(model))
            new[rows:] = torch.from_numpy(case.arrays.integers(5, VOCABULARY - 5, (others, wider)))
            if model.config.backbone_config.model_type in DECODERS:  # which refuse real ids that are masked
                new[rows:, kept:] = pad_id(model)
        elif name == "attention_mask":
            new[rows:, :kept] = 1
        new[:rows, :length] = values
        found[name] = new
    order = torch.tensor(case.draw.sample(range(rows + others), rows + others))
    got = model(**rows_of(found, order))
    back = order.argsort()[:rows]
    return ee.EarlyExitOutput(logits=got.logits[back], exit_layer=got.exit_layer[back])


def other_compaction(case: Case, model: Any, batch: Batch, trace: Any) -> Any:
    """Run with another compaction mode."""
    others = [each for each in ("auto", "always", "never") if each != model.settings.compaction]
    model.configure(compaction=case.choice(others))
    return model(**batch)


def other_layers(case: Case, model: Any, batch: Batch, trace: Any) -> Any:
    """Run with the layers of the family instead of fused ones, or the reverse."""
    model.configure(path="auto" if model.explain().path == "eager" else "eager")
    return model(**batch)


def other_backend(case: Case, model: Any, batch: Batch, trace: Any) -> Any:
    """Run with another back-end of the ops."""
    model.configure(backend="torch" if model.explain().backend != "torch" else "auto")
    return model(**batch)


def all_logits(case: Case, model: Any, batch: Batch, trace: Any) -> Any:
    """Run all layers."""
    return model(**batch, output_all_logits=True)


def replayed(case: Case, model: Any, batch: Batch, trace: Any) -> Any:
    """Replay the trace."""
    logits, exit_layer = ee.replay(trace, model.criterion, backend=case.choice(("auto", "torch")))
    return ee.EarlyExitOutput(logits=logits, exit_layer=exit_layer)


def fixed_depth(case: Case, model: Any, batch: Batch, trace: Any) -> Any:
    """Run the fixed-depth model."""
    logits, exit_layer = model.fixed_depth()(**batch)[:2]
    return ee.EarlyExitOutput(logits=logits, exit_layer=exit_layer)


CHECKS: dict[str, Callable[[Case, Any, Batch, Any], Any]] = {
    "one by one": one_by_one,
    "shuffled": shuffled,
    "among others": among_others,
    "other compaction": other_compaction,
    "other layers": other_layers,
    "other back-end": other_backend,
    "all logits": all_logits,
    "replayed": replayed,
    "fixed depth": fixed_depth,
}
OF_TRACES = ("all logits", "replayed")


def compare(description: str, model: Any, trace: Any, expected: Any, got: Any) -> None:
    """Raise `WrongError` if the exit layer or the answer of a row differs by more than rounding."""
    if got.logits.shape != expected.logits.shape or got.exit_layer.dtype != torch.int64:
        raise WrongError(f"{description}: got logits {list(got.logits.shape)}, expected {list(expected.logits.shape)}")
    noise = NOISE[model.dtype] * (1 + float(expected.logits.abs().max()))
    answers = got.logits, expected.logits
    if model.criterion is not None and model.criterion.exit_rule.name in MIXING:
        answers = tuple(logits.softmax(dim=1) for logits in answers)
    for row in range(len(expected.exit_layer)):
        layers = int(got.exit_layer[row]), int(expected.exit_layer[row])
        apart = float((answers[0][row] - answers[1][row]).abs().max())
        if layers[0] == layers[1] and apart <= noise:
            continue
        if near_threshold(model, trace, row):
            continue
        raise WrongError(
            f"{description}: row {row} left at {layers[0]}, expected {layers[1]}; logits differ by {apart:.3g}"
        )


def near_threshold(model: Any, trace: Any, row: int) -> bool:
    """Return whether noise of the size of rounding changes the exit layer or the answer of a row of the trace."""
    rule = model.criterion
    if rule is None:
        return False
    if trace is None:
        # gated models have no trace; their decisions are compared in float64 only
        return model.dtype != torch.float64
    generator = torch.Generator().manual_seed(row)
    noise = NOISE[model.dtype]

    def noisy(x: Tensor) -> Tensor:
        x = x[row].double()
        size = noise * (1 + x.abs().max())
        return x + size * (2 * torch.rand(64, *x.shape, generator=generator, dtype=torch.float64) - 1)

    keys = None if trace.keys is None else trace.keys[row].expand(64)
    copies = ee.ExitTrace(noisy(trace.logits).float(), {k: noisy(x).float() for k, x in trace.aux.items()}, keys)
    logits, exit_layer = ee.replay(copies, rule, problem_type=model.problem_type, backend="torch")
    spread = float((logits - logits[:1]).abs().max())
    return len(exit_layer.unique()) > 1 or spread > math.log(1.2)
