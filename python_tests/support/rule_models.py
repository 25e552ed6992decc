"""Models whose rows leave at several layers, by every rule there is, and batches for them."""

from __future__ import annotations

import torch
from support.models import balance_classes, batch_for, early_exit

from earlyexit_kernels import criteria

LENGTHS = [5, 20, 7, 8, 11, 19, 10, 17, 12, 14, 18, 9, 6, 16, 13, 15]
TOLERANCE = 1e-5
METHODS = {"halting": "palbert", "uncertainty": "berxit"}
RULES = {
    "full_depth": criteria.FullDepth(),
    "entropy": criteria.Entropy(threshold=0.8),
    "max_probability": criteria.MaxProbability(threshold=0.6),
    "max_probability_by_layer": criteria.MaxProbability(threshold=[0.6, 0.7, 0.7]),
    "margin": criteria.Margin(threshold=0.35),
    "patience": criteria.Patience(patience=1),
    "patience_value": criteria.Patience(patience=1, tolerance=0.5),
    "q_exit": criteria.QExit(q=0.7),
    "sampled_exit": criteria.SampledExit(seed=2**63 - 1),
    "expectation": criteria.Expectation(),
    "voting": criteria.Voting(threshold=2),
    "voting_by_depth": criteria.Voting(threshold=1.3, gamma=0.5, final="last"),
    "dact": criteria.Dact(bound="tight"),
    "dact_epsilon": criteria.Dact(epsilon=0.4),
    "learned": criteria.Learned(threshold=0.1),
    "patient_confidence": criteria.PatientConfidence(threshold=0.75, patience=2),
    "divergence_patience": criteria.DivergencePatience(threshold=0.1, patience=1),
    "hidden_cosine": criteria.HiddenCosine(threshold=0.45),
    "energy": criteria.Energy(threshold=0.15),
    "skip_gate": criteria.SkipGate(threshold=0.5, exit=criteria.Entropy(threshold=0.8)),
    "skip_gate_patience": criteria.SkipGate(threshold=0.5, exit=criteria.Patience(patience=1)),
    "skip_gate_cosine": criteria.SkipGate(threshold=0.5, exit=criteria.HiddenCosine(threshold=0.4)),
}
NEVER_EARLY = ("full_depth", "expectation")


def ruled(name="entropy", family="bert", *, kind="holes", **arguments):
    """A model whose rows leave at several layers by a rule of the table, and a batch for it."""
    rule = RULES[name]
    method = "smartbert" if rule.skip_from is not None else METHODS.get(rule.needs, "joint")
    outputs = 1 if name == "patience_value" else 3
    model = early_exit(family, gain=4, method=method, num_labels=outputs, **arguments)
    batch = batch_for(model, kind, lengths=LENGTHS)
    if len(model.heads.out) == model.depth:
        model.set_criterion(None)
        balance_classes(model, batch)
    model.set_criterion(rule)
    return model, batch


def agree(got, expected, tolerance=TOLERANCE):
    logits, exit_layer = got
    assert logits.shape == expected.logits.shape and exit_layer.dtype == torch.int64
    assert torch.equal(exit_layer, expected.exit_layer)
    assert expected.logits.shape[0] == 0 or (logits - expected.logits).abs().max() <= tolerance


def part_of(batch, rows, longest=None):
    return {name: values[rows, :longest].contiguous() for name, values in batch.items()}
