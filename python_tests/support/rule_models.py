"""Models whose rows leave at several layers, by each criterion and its variants, and batches for them."""

from __future__ import annotations

import torch
from support.criterion_cases import CASES
from support.leaving_models import most_spread
from support.models import balance_classes, batch_for, early_exit

from earlyexit_kernels.criteria import CRITERIA

LENGTHS = [5, 20, 7, 8, 11, 19, 10, 17, 12, 14, 18, 9, 6, 16, 13, 15]
TOLERANCE = 1e-5
METHODS = {"halting": "palbert", "uncertainty": "berxit"}
#: Name of a criterion or of a variant -> name of the criterion.
RULES = {name: criterion for criterion, case in CASES.items() for name in (criterion, *case.variants)}
NEVER_EARLY = [name for name, case in CASES.items() if case.exits == 1]


def model_for_rule(name="entropy", family="bert", *, kind="holes", **arguments):
    """Return a model whose rows leave at several layers by a criterion of `RULES`, and a batch for it.

    A variant has its own setting; for the criterion itself, the setting with which rows leave at the most layers.
    """
    owner, variant = RULES[name], CASES[RULES[name]].variants.get(name)
    method = "smartbert" if owner == "skip_gate" else METHODS.get(CRITERIA[owner].needs, "joint")
    outputs = 1 if getattr(variant, "tolerance", None) is not None else 3
    model = early_exit(family, gain=4, method=method, num_labels=outputs, **arguments)
    batch = batch_for(model, kind, lengths=LENGTHS)
    model.set_criterion(None)
    if len(model.heads.out) == model.depth:
        balance_classes(model, batch)
    model.set_criterion(variant or most_spread(owner, model.trace(**batch)))
    return model, batch


def assert_same_answers(got, expected, tolerance=TOLERANCE):
    """Assert that answers and exit layers are those of a model's output."""
    logits, exit_layer = got
    assert logits.shape == expected.logits.shape and exit_layer.dtype == torch.int64
    assert torch.equal(exit_layer, expected.exit_layer)
    assert expected.logits.shape[0] == 0 or (logits - expected.logits).abs().max() <= tolerance


def part_of(batch, rows, longest=None):
    """Return some rows of a batch, cut to `longest` columns."""
    return {name: values[rows, :longest].contiguous() for name, values in batch.items()}
