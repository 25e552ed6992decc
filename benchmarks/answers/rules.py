"""Settings of all criteria with which rows of the models of `benchmarks.answers.models` leave at several layers."""

from __future__ import annotations

from typing import NamedTuple

from earlyexit_kernels import criteria
from earlyexit_kernels.criteria import Criterion


class Setting(NamedTuple):
    """A criterion, and the form of the exits that it is recorded with, a key of `models.HEADS`."""

    rule: Criterion
    heads: str = "joint"


_ENTROPY = criteria.Entropy(threshold=0.5)
SETTINGS: dict[str, Setting] = {
    "full_depth": Setting(criteria.FullDepth()),
    "entropy": Setting(_ENTROPY),
    "entropy, by layer": Setting(criteria.Entropy(threshold=[0.3, 0.5, 0.6])),
    "entropy, normalized": Setting(criteria.Entropy(threshold=0.5, normalized=True), "fastbert"),
    "entropy, first token": Setting(criteria.Entropy(threshold=0.2), "first"),
    "energy, mean token": Setting(criteria.Energy(threshold=0.03), "mean"),
    "max_probability": Setting(criteria.MaxProbability(threshold=0.82)),
    "margin": Setting(criteria.Margin(threshold=0.7)),
    "energy": Setting(criteria.Energy(threshold=0.08)),
    "patience": Setting(criteria.Patience(patience=1)),
    "patience 2": Setting(criteria.Patience(patience=2)),
    "patient_confidence": Setting(criteria.PatientConfidence(threshold=0.6, patience=2)),
    "divergence_patience": Setting(criteria.DivergencePatience(threshold=0.15, patience=1)),
    "voting": Setting(criteria.Voting(threshold=2)),
    "voting, by depth": Setting(criteria.Voting(threshold=1.1, gamma=0.5, final="last")),
    "hidden_cosine": Setting(criteria.HiddenCosine(threshold=[0.4, 0.5, 0.45])),
    "hidden_cosine, by layer": Setting(criteria.HiddenCosine(threshold=[0.6, 0.8, 0.88])),
    "learned": Setting(criteria.Learned(threshold=0.45), "berxit"),
    "q_exit": Setting(criteria.QExit(q=0.8), "palbert"),
    "sampled_exit": Setting(criteria.SampledExit(seed=5), "palbert"),
    "expectation": Setting(criteria.Expectation(), "palbert"),
    "dact": Setting(criteria.Dact(), "dact"),
    "dact, tight": Setting(criteria.Dact(bound="tight", epsilon=0.15), "dact"),
    "skip_gate": Setting(criteria.SkipGate(threshold=0.5, exit=_ENTROPY), "smartbert"),
    "skip_gate, patience": Setting(criteria.SkipGate(threshold=0.6, exit=criteria.Patience(patience=1)), "smartbert"),
}
if hasattr(criteria, "FixedLayer"):  # which older versions do not have
    SETTINGS["fixed_layer"] = Setting(criteria.FixedLayer(layer=2))
