"""Whole models of random settings: a row's answer depends neither on its batch nor on compaction, path and back-end.

Two runs may differ where the score of a row is within rounding of the threshold; noise of the size of rounding, added
to the trace, tells these rows.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.criterion_cases import CASES
from support.models import ALL_FAMILIES, DECODERS, VOCABULARY, balance_classes, batch_for, early_exit, kinds_of, pad_id
from support.random_settings import chance, choice, uniform
from torch import Tensor

import earlyexit_kernels as ee
from deep.op_calls import GENERATORS
from earlyexit_kernels.criteria import RULES, SkipGate

METHODS = ("joint", "palbert", "berxit", "dact", "fastbert", "smartbert")
#: Rounding of a whole model, relative to its largest logit; answers are float32 for all dtypes.
NOISE = {torch.float32: 1e-5, torch.float64: 2e-6, torch.bfloat16: 0.12}
#: Rules that answer with the log of a weighted mean of probabilities: a small one is a rest of larger ones, so that its
#: log has few digits in float32.
MIXING = ("dact", "expectation")
MODES = ("auto", "always", "never")
Batch = dict[str, Tensor]


@functools.lru_cache(maxsize=512)
def built(family: str, method: str, pooling: str | None, halting: bool, dtype: torch.dtype) -> Any:
    """Return a tiny model whose exits predict all classes about equally often."""
    model = early_exit(family, gain=4, method=method, pooling=pooling, halting=halting, num_hidden_layers=3)
    model.set_criterion(None)
    if len(model.heads.out) == model.depth:
        balance_classes(model, batch_for(model, "right", lengths=(7, 3, 20, 12, 5, 9)))
    return model.to(dtype)


def model_of(draw: Any, family: str) -> Any:
    """Draw a model, its settings and a criterion that its heads support; gated models skip layers."""
    method, pooling = choice(draw, METHODS), choice(draw, (None, None, "first", "mean"))
    halting = method in ("joint", "berxit") and chance(draw, 30)
    pooling = "last" if pooling == "first" and family in DECODERS else pooling
    model = built(family, method, pooling, halting, choice(draw, (*[torch.float32] * 3, torch.float64, torch.bfloat16)))
    model.configure(
        compaction=choice(draw, MODES), path=choice(draw, ("auto", "eager")), backend=choice(draw, ("auto", "torch"))
    )
    rule = CASES[choice(draw, sorted(RULES))].draw(draw, 3, model.depth).criterion
    if "gate" in model.heads.aux_names:
        rule = SkipGate(threshold=uniform(draw, 0, 1), exit=rule)
    try:
        model.set_criterion(rule)
    except ValueError:
        assume(False)  # the heads lack a scalar
    return model


def batch_of(draw: Any, model: Any, family: str) -> Batch:
    """Draw a batch of random lengths."""
    kind = choice(draw, (*kinds_of(family), "right"))
    least = 3 if kind in ("holes", "pad_ids_attended") else 1
    lengths = draw(st.lists(st.integers(least, 24), min_size=1, max_size=8))
    batch = batch_for(model, kind, lengths=lengths, seed=draw(st.integers(0, 2**31)))
    if chance(draw, 20):
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return batch


def one_by_one(draw: Any, model: Any, batch: Batch, trace: Any) -> Any:
    """Run each row alone, without its padding in half of the cases."""
    outputs, trims = [], chance(draw, 50)
    for i in range(len(batch["input_ids"])):
        tokens = int(batch["attention_mask"][i].nonzero().max()) + 1 if trims else None
        outputs.append(model(**{name: values[i : i + 1, :tokens] for name, values in batch.items()}))
    return torch.cat([out.logits for out in outputs]), torch.cat([out.exit_layer for out in outputs])


def shuffled(draw: Any, model: Any, batch: Batch, trace: Any) -> Any:
    """Run the rows in another order and in smaller batches."""
    rows = len(batch["input_ids"])
    order = torch.tensor(draw(st.permutations(range(rows))))
    parts = [model(**{k: v[i] for k, v in batch.items()}) for i in order.split(draw(st.integers(1, rows)))]
    back = order.argsort()
    return torch.cat([out.logits for out in parts])[back], torch.cat([out.exit_layer for out in parts])[back]


def among_others(draw: Any, model: Any, batch: Batch, trace: Any) -> Any:
    """Run the rows in a larger batch with more padding."""
    rows, length = batch["input_ids"].shape
    wider, others = length + draw(st.integers(0, 8)), draw(st.integers(1, 4))
    kept, more = draw(st.integers(1, wider)), {}
    for name, values in batch.items():
        more[name] = torch.zeros(rows + others, wider, dtype=values.dtype)
        if name == "input_ids":
            more[name].fill_(pad_id(model))
            more[name][rows:] = torch.from_numpy(draw(GENERATORS).integers(5, VOCABULARY - 5, (others, wider)))
            if model.config.backbone_config.model_type in DECODERS:  # which refuse real ids that are masked
                more[name][rows:, kept:] = pad_id(model)
        elif name == "attention_mask":
            more[name][rows:, :kept] = 1
        more[name][:rows, :length] = values
    order = torch.tensor(draw(st.permutations(range(rows + others))))
    out, back = model(**{name: values[order] for name, values in more.items()}), order.argsort()[:rows]
    return out.logits[back], out.exit_layer[back]


def other_compaction(draw: Any, model: Any, batch: Batch, trace: Any) -> Any:
    model.configure(compaction=choice(draw, [mode for mode in MODES if mode != model.settings.compaction]))
    return model(**batch)


def other_path(draw: Any, model: Any, batch: Batch, trace: Any) -> Any:
    """Run with the layers of the family instead of fused ones, or the reverse."""
    model.configure(path="auto" if model.explain().path == "eager" else "eager")
    return model(**batch)


def other_backend(draw: Any, model: Any, batch: Batch, trace: Any) -> Any:
    model.configure(backend="torch" if model.explain().backend != "torch" else "auto")
    return model(**batch)


def all_logits(draw: Any, model: Any, batch: Batch, trace: Any) -> Any:
    assume(trace is not None)
    return model(**batch, output_all_logits=True)


def replayed(draw: Any, model: Any, batch: Batch, trace: Any) -> Any:
    assume(trace is not None)
    return ee.replay(trace, model.criterion, backend=choice(draw, ("auto", "torch")))


def fixed_depth(draw: Any, model: Any, batch: Batch, trace: Any) -> Any:
    return model.fixed_depth()(**batch)[:2]


CHECKS = (
    *(one_by_one, shuffled, among_others, other_compaction, other_path, other_backend),
    *(all_logits, replayed, fixed_depth),
)


@given(st.sampled_from(ALL_FAMILIES), st.sampled_from(CHECKS), st.data())
def test_answers_of_a_row_are_its_own(family, check, data):
    model = model_of(data.draw, family)
    batch = data.draw(st.just(batch_of(data.draw, model, family)), label="batch")
    trace = None if isinstance(model.criterion, SkipGate) else model.trace(**batch)
    expected = model(**batch)
    got = check(data.draw, model, batch, trace)
    logits, exit_layer = (got.logits, got.exit_layer) if isinstance(got, ee.EarlyExitOutput) else got
    assert logits.shape == expected.logits.shape and exit_layer.dtype == torch.int64
    noise = NOISE[model.dtype] * (1 + float(expected.logits.abs().max()))
    mixes = model.criterion is not None and model.criterion.exit_rule.name in MIXING
    answers = [x.softmax(dim=1) if mixes else x for x in (logits, expected.logits)]
    apart = (answers[0] - answers[1]).abs().amax(dim=1)
    differ = (exit_layer != expected.exit_layer) | ~(apart <= noise)
    for row in differ.nonzero()[:, 0].tolist():
        layers = int(exit_layer[row]), int(expected.exit_layer[row])
        assert near_threshold(model, trace, row), (
            f"row {row} left at {layers[0]}, expected {layers[1]}; answers differ by {float(apart[row]):.3g}"
        )


def near_threshold(model: Any, trace: Any, row: int) -> bool:
    """Return whether noise of the size of rounding changes the exit layer or the answer of a row of the trace."""
    if model.criterion is None:
        return False
    if trace is None:
        # gated models have no trace; their decisions are compared in float64 only
        return model.dtype != torch.float64
    generator = torch.Generator().manual_seed(row)

    def noisy(x: Tensor) -> Tensor:
        x = x[row].double()
        size = NOISE[model.dtype] * (1 + x.abs().max())
        return (x + size * (2 * torch.rand(64, *x.shape, generator=generator, dtype=torch.float64) - 1)).float()

    keys = None if trace.keys is None else trace.keys[row].expand(64)
    copies = ee.ExitTrace(noisy(trace.logits), {name: noisy(x) for name, x in trace.aux.items()}, keys)
    logits, exit_layer = ee.replay(copies, model.criterion, problem_type=model.problem_type, backend="torch")
    return len(exit_layer.unique()) > 1 or float((logits - logits[:1]).abs().max()) > math.log(1.2)
