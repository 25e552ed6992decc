"""One row for each criterion: what the tests and the fuzzer have to know of it. A new criterion adds its row here."""

from __future__ import annotations

import math

import numpy as np
from support import oracle, random_settings
from support.criterion_case import EPS, Case, Setting, fixed
from support.grid_scores import divergence, entropy, survival, votes
from support.models import varied_entropy

from earlyexit_kernels import criteria
from earlyexit_kernels.criteria import Criterion

STEPS = [k / 20 for k in range(1, 20)]


C = criteria
ENTROPY = C.Entropy(threshold=0.1)
UNIT = (("threshold", "1.01", "[0, 1]"), ("threshold", "-0.01", "[0, 1]"))

CASES: dict[str, Case] = {
    "full_depth": Case(
        saved=[(C.FullDepth(), {})],
        settings={"full_depth": fixed(C.FullDepth(), classes=(1, 2, 3, 17), exact=True)},
        decide=oracle.decide_full_depth,
        draw=random_settings.without_fields(C.FullDepth),
        spreading=lambda trace: [C.FullDepth()],
        exits=1,
        tolerance=lambda *given: 0.0,
    ),
    "entropy": Case(
        saved=[
            (C.Entropy(threshold=0.3), {"threshold": 0.3, "normalized": False}),
            (C.Entropy(threshold=(1, 0.5), normalized=True), {"threshold": [1.0, 0.5], "normalized": True}),
        ],
        refused=[
            *(
                ({"threshold": value}, ("threshold", repr(value), "finite number"))
                for value in (math.nan, math.inf, "low", None, True)
            ),
            ({"threshold": 10**400}, ("threshold", "finite number")),
            ({"threshold": -0.1}, ("threshold", "-0.1", "at least 0")),
            ({"threshold": 1.5, "normalized": True}, ("threshold", "1.5", "[0, 1]")),
            ({"threshold": [0.1, math.nan]}, ("threshold", "nan", "finite number")),
            ({"threshold": [0.1, -1]}, ("threshold", "-1", "at least 0")),
            ({"threshold": [[0.1]]}, ("threshold", "[0.1]", "finite number")),
            ({"threshold": 0.1, "normalized": 1}, ("normalized", "1", "True or False")),
        ],
        settings={
            "entropy": Setting(
                lambda c: C.Entropy(threshold=0.5 * math.log(c)),
                lambda c, at: (0.5 * math.log(c), False),
                classes=(2, 3, 17, 150),
            ),
            "entropy_by_layer": Setting(
                lambda c: C.Entropy(threshold=[0.3, 0.6, 0.1]), lambda c, at: ((0.3, 0.6, 0.1, 0.1)[at - 1], False)
            ),
            "entropy_normalized": fixed(C.Entropy(threshold=0.45, normalized=True), 0.45, True),
        },
        decide=oracle.decide_entropy,
        draw=random_settings.entropy,
        spreading=lambda trace: [varied_entropy(trace)],
        exits=3,
        tolerance=lambda params, score, logits, largest, layers: 8 * (4e-6 + 3 * logits),
        scores=(lambda z, aux, rule: entropy(z), "threshold"),
    ),
    "max_probability": Case(
        saved=[(C.MaxProbability(threshold=[0.9]), {"threshold": [0.9]})],
        refused=[
            ({"threshold": 1.01}, UNIT[0]),
            ({"threshold": -0.01}, UNIT[1]),
            ({"threshold": math.nan}, ("threshold", "nan", "finite number")),
            ({"threshold": [0.5, 2]}, ("threshold", "2", "[0, 1]")),
        ],
        settings={"max_probability": fixed(C.MaxProbability(threshold=0.7), 0.7)},
        decide=oracle.decide_max_probability,
        draw=random_settings.thresholds(C.MaxProbability),
        spreading=lambda trace: [C.MaxProbability(threshold=t) for t in STEPS],
        variants={"max_probability_by_layer": C.MaxProbability(threshold=[0.6, 0.7, 0.7])},
        scores=(lambda z, aux, rule: z.double().softmax(dim=-1).amax(dim=-1), "threshold"),
    ),
    "margin": Case(
        saved=[(C.Margin(threshold=0), {"threshold": 0.0})],
        refused=[
            ({"threshold": 1.01}, UNIT[0]),
            ({"threshold": -math.inf}, ("threshold", "-inf", "finite number")),
        ],
        settings={"margin": fixed(C.Margin(threshold=0.4), 0.4)},
        decide=oracle.decide_margin,
        draw=random_settings.thresholds(C.Margin),
        spreading=lambda trace: [C.Margin(threshold=t) for t in STEPS],
        scores=(lambda z, aux, rule: -z.double().softmax(dim=-1).topk(2).values.diff(dim=-1)[..., 0], "threshold"),
    ),
    "patience": Case(
        saved=[
            (C.Patience(patience=3), {"patience": 3, "tolerance": None}),
            (C.Patience(patience=1, tolerance=0.1), {"patience": 1, "tolerance": 0.1}),
        ],
        refused=[
            ({"patience": 0}, ("patience", "0", "whole number in [1,", "criterion=None")),
            *(
                ({"patience": value}, ("patience", repr(value), "whole number in [1,"))
                for value in (-2, 1.5, True, None)
            ),
            ({"patience": 1, "tolerance": 0}, ("tolerance", "0", "above 0")),
            ({"patience": 1, "tolerance": -0.5}, ("tolerance", "-0.5", "above 0")),
            ({"patience": 1, "tolerance": math.nan}, ("tolerance", "nan", "finite number")),
            ({"patience": 1, "tolerance": math.inf}, ("tolerance", "inf", "finite number")),
        ],
        settings={
            "patience": fixed(C.Patience(patience=2), 2, None, exact=True),
            "patience_1": fixed(C.Patience(patience=1), 1, None, classes=(3,), exact=True),
            "patience_value": fixed(C.Patience(patience=1, tolerance=0.8), 1, 0.8, classes=(1,)),
        },
        decide=oracle.decide_patience,
        draw=random_settings.patience,
        state=lambda params, c, key: [math.nan, 0.0],
        spreading=lambda trace: [C.Patience(patience=1)],
        variants={"patience_value": C.Patience(patience=1, tolerance=0.5)},
        # the tolerance is compared as float32
        tolerance=lambda params, score, logits, largest, layers: (
            2 * logits if params[1] is None else 2 * logits + 4 * EPS * (largest + params[1])
        ),
    ),
    "q_exit": Case(
        saved=[(C.QExit(q=np.float64(0.5)), {"q": 0.5})],
        refused=[
            ({"q": -0.1}, ("q", "-0.1", "[0, 1]")),
            ({"q": 1.1}, ("q", "1.1", "[0, 1]")),
            ({"q": math.nan}, ("q", "nan", "finite number")),
            ({"q": [0.5]}, ("q", "[0.5]", "finite number")),
        ],
        settings={"q_exit": fixed(C.QExit(q=0.5), 0.5, classes=(1, 2, 3, 17))},
        decide=oracle.decide_q_exit,
        draw=random_settings.q_exit,
        state=lambda params, c, key: [1.0],
        spreading=lambda trace: [C.QExit(q=q) for q in STEPS],
        tolerance=lambda *given: 1e-6,
        scores=(lambda z, aux, rule: 1 - survival(aux), "q"),
    ),
    "sampled_exit": Case(
        saved=[(C.SampledExit(seed=np.int64(7)), {"seed": 7})],
        refused=[
            *(({"seed": value}, ("seed", repr(value), "whole number in [0,")) for value in (-1, 2**63, 0.5, None))
        ],
        settings={"sampled_exit": fixed(C.SampledExit(seed=5), 5, classes=(1, 3))},
        decide=oracle.decide_sampled_exit,
        draw=random_settings.sampled_exit,
        state=lambda params, c, key: [1.0, oracle.uniform(params[0], key)],
        spreading=lambda trace: [C.SampledExit(seed=seed) for seed in range(9)],
        variants={"sampled_exit_large_seed": C.SampledExit(seed=2**63 - 1)},
        tolerance=lambda *given: 1e-6,
    ),
    "expectation": Case(
        saved=[(C.Expectation(), {})],
        settings={"expectation": fixed(C.Expectation(), classes=(1, 3, 17))},
        decide=oracle.decide_expectation,
        draw=random_settings.without_fields(C.Expectation, 0.5),
        state=lambda params, c, key: [1.0, *[0.0] * c],
        spreading=lambda trace: [C.Expectation()],
        exits=1,
        own_answer=True,
        tolerance=lambda *given: 0.0,
    ),
    "voting": Case(
        saved=[
            (C.Voting(threshold=3), {"threshold": 3.0, "gamma": 0.0, "final": "vote"}),
            (C.Voting(threshold=0.8, gamma=1, final="last"), {"threshold": 0.8, "gamma": 1.0, "final": "last"}),
        ],
        refused=[
            ({"threshold": -1}, ("threshold", "-1", "at least 0")),
            ({"threshold": math.nan}, ("threshold", "nan", "finite number")),
            ({"threshold": [1, 2]}, ("threshold", "[1, 2]", "finite number")),
            ({"threshold": 1, "gamma": 1.1}, ("gamma", "1.1", "[0, 1]")),
            ({"threshold": 1, "gamma": -0.1}, ("gamma", "-0.1", "[0, 1]")),
            ({"threshold": 1, "final": "first"}, ("final", "'first'", "'vote', 'last'")),
        ],
        settings={
            "voting": fixed(C.Voting(threshold=2), 2, 0, "vote", exact=True),
            "voting_by_depth": fixed(
                C.Voting(threshold=1.3, gamma=0.5, final="last"), 1.3, 0.5, "last", classes=(3,), exact=True
            ),
        },
        decide=oracle.decide_voting,
        draw=random_settings.voting,
        state=lambda params, c, key: [0.0] * c,
        spreading=lambda trace: [C.Voting(threshold=2)],
        variants={"voting_by_depth": C.Voting(threshold=1.3, gamma=0.5, final="last")},
        own_answer=True,
        tolerance=lambda params, score, logits, largest, layers: 2 * logits,
        scores=(lambda z, aux, rule: votes(z, rule.gamma), "threshold"),
        covers_costs=False,
    ),
    "dact": Case(
        saved=[
            (C.Dact(), {"bound": "paper", "epsilon": 0.0}),
            (C.Dact(bound="tight", epsilon=0.1), {"bound": "tight", "epsilon": 0.1}),
        ],
        refused=[
            *(({"bound": value}, ("bound", repr(value), "'paper', 'tight'")) for value in ("loose", None, ["paper"])),
            ({"epsilon": 1.5}, ("epsilon", "1.5", "[0, 1]")),
            ({"epsilon": math.nan}, ("epsilon", "nan", "finite number")),
        ],
        settings={
            "dact": fixed(C.Dact(), "paper", 0, scale=0.98),
            "dact_tight": fixed(C.Dact(bound="tight"), "tight", 0, classes=(3,), scale=0.98),
            "dact_epsilon": fixed(C.Dact(epsilon=0.5), "paper", 0.5, classes=(3,)),
        },
        decide=oracle.decide_dact,
        draw=random_settings.dact,
        state=lambda params, c, key: [1.0, *[0.0] * c],
        spreading=lambda trace: [C.Dact(bound="tight", epsilon=t) for t in STEPS],
        variants={"dact_tight": C.Dact(bound="tight")},
        own_answer=True,
        tolerance=lambda params, score, logits, largest, layers: 4e-6 * (1 + layers) + 4 * logits,
        scores=(lambda z, aux, rule: survival(aux), "epsilon"),
    ),
    "learned": Case(
        saved=[(C.Learned(threshold=[0.1, 0]), {"threshold": [0.1, 0.0]})],
        refused=[({"threshold": 1.01}, UNIT[0])],
        settings={
            "learned": fixed(C.Learned(threshold=0.1), 0.1, classes=(1, 3)),
            "learned_by_layer": Setting(
                lambda c: C.Learned(threshold=[0.1, 0.2, 0.3]), lambda c, at: ((0.1, 0.2, 0.3, 0)[at - 1],), (3,)
            ),
        },
        decide=oracle.decide_learned,
        draw=random_settings.thresholds(C.Learned),
        spreading=lambda trace: [C.Learned(threshold=t) for t in STEPS],
        tolerance=lambda params, score, logits, largest, layers: EPS * abs(params[0]),
        scores=(lambda z, aux, rule: aux["uncertainty"].double().sigmoid(), "threshold"),
    ),
    "patient_confidence": Case(
        saved=[(C.PatientConfidence(threshold=0.5, patience=2), {"threshold": 0.5, "patience": 2})],
        refused=[
            ({"threshold": -0.01, "patience": 1}, UNIT[1]),
            ({"threshold": 0.1, "patience": 0}, ("patience", "0", "whole number in [1,")),
        ],
        settings={"patient_confidence": fixed(C.PatientConfidence(threshold=0.7, patience=2), 0.7, 2, classes=(3, 17))},
        decide=oracle.decide_patient_confidence,
        draw=random_settings.thresholds_and_patience(C.PatientConfidence),
        state=lambda params, c, key: [0.0],
        spreading=lambda trace: [C.PatientConfidence(threshold=t, patience=2) for t in STEPS],
        scores=(lambda z, aux, rule: entropy(z) / math.log(z.shape[-1]), "threshold"),
    ),
    "divergence_patience": Case(
        saved=[(C.DivergencePatience(threshold=[0.1], patience=1), {"threshold": [0.1], "patience": 1})],
        refused=[
            ({"threshold": 1.01, "patience": 1}, UNIT[0]),
            ({"threshold": 0.1, "patience": 1.0}, ("patience", "1.0", "whole number in [1,")),
        ],
        settings={
            "divergence_patience": fixed(C.DivergencePatience(threshold=0.2, patience=1), 0.2, 1),
            "divergence_patience_2": fixed(C.DivergencePatience(threshold=0.4, patience=2), 0.4, 2, classes=(3,)),
        },
        decide=oracle.decide_divergence_patience,
        draw=random_settings.thresholds_and_patience(C.DivergencePatience, math.log(2), (0, -3, -6, -8)),
        state=lambda params, c, key: [0.0, *[math.nan] * c],
        spreading=lambda trace: [C.DivergencePatience(threshold=t / 9, patience=1) for t in STEPS],
        # of two probabilities with a relative error of rounding
        tolerance=lambda params, score, logits, largest, layers: (
            4 * logits + 6e-6 * math.sqrt(max(score, 0.0)) + 1e-12 + EPS * params[0]
        ),
        scores=(lambda z, aux, rule: divergence(z), "threshold"),
        covers_costs=False,
    ),
    "hidden_cosine": Case(
        saved=[(C.HiddenCosine(threshold=-1), {"threshold": -1.0})],
        refused=[
            ({"threshold": 1.01}, ("threshold", "1.01", "[-1, 1]")),
            ({"threshold": [0, -1.5]}, ("threshold", "-1.5", "[-1, 1]")),
        ],
        settings={"hidden_cosine": fixed(C.HiddenCosine(threshold=0.4), 0.4, classes=(1, 3))},
        decide=oracle.decide_hidden_cosine,
        draw=random_settings.thresholds(C.HiddenCosine, -1.0),
        spreading=lambda trace: [C.HiddenCosine(threshold=t) for t in STEPS],
        tolerance=lambda params, score, logits, largest, layers: EPS * abs(params[0]),
        scores=(lambda z, aux, rule: aux["hidden_cosine"].double(), "threshold"),
    ),
    "energy": Case(
        saved=[(C.Energy(threshold=0.2), {"threshold": 0.2})],
        refused=[({"threshold": -0.01}, UNIT[1])],
        settings={"energy": fixed(C.Energy(threshold=0.1), 0.1, classes=(3, 17))},
        decide=oracle.decide_energy,
        draw=random_settings.thresholds(C.Energy),
        spreading=lambda trace: [C.Energy(threshold=t) for t in STEPS],
        scores=(lambda z, aux, rule: 1 / (1 + z.double().exp().sum(dim=-1)), "threshold"),
    ),
    "fixed_layer": Case(
        saved=[(C.FixedLayer(layer=2), {"layer": 2})],
        refused=[
            ({"layer": 0}, ("layer", "0", "whole number in [1,", "criterion=None")),
            ({"layer": 1.5}, ("layer", "1.5", "whole number in [1,")),
            ({"layer": True}, ("layer", "True", "whole number in [1,")),
        ],
        settings={"fixed_layer": fixed(C.FixedLayer(layer=2), 2, classes=(1, 2, 3, 17), exact=True)},
        decide=oracle.decide_fixed_layer,
        draw=random_settings.fixed_layer,
        spreading=lambda trace: [C.FixedLayer(layer=2)],
        exits=1,
        tolerance=lambda *given: 0.0,
    ),
    "skip_gate": Case(
        saved=[
            (
                C.SkipGate(threshold=0.5, exit=C.Entropy(threshold=[0.1, 0.2])),
                {"threshold": 0.5, "exit": {"name": "entropy", "threshold": [0.1, 0.2], "normalized": False}},
            )
        ],
        refused=[
            ({"threshold": 1.5, "exit": ENTROPY}, ("threshold", "1.5", "[0, 1]")),
            ({"threshold": 0.5, "exit": None}, ("exit", "None", "Entropy(...)")),
            ({"threshold": 0.5, "exit": "entropy"}, ("exit", "'entropy'", "Entropy(...)")),
            (
                {"threshold": 0.5, "exit": C.SkipGate(threshold=0.1, exit=C.FullDepth())},
                ("exit", "SkipGate(threshold=0.1", "decides at an exit"),
            ),
        ],
        variants={
            "skip_gate": C.SkipGate(threshold=0.5, exit=C.Entropy(threshold=0.8)),
            "skip_gate_patience": C.SkipGate(threshold=0.5, exit=C.Patience(patience=1)),
            "skip_gate_cosine": C.SkipGate(threshold=0.5, exit=C.HiddenCosine(threshold=0.4)),
        },
    ),
}

#: Setting of the op tests -> name of its criterion.
OWNERS = {name: criterion for criterion, case in CASES.items() for name in case.settings}
#: All settings of the op tests.
SETTINGS = {name: setting for case in CASES.values() for name, setting in case.settings.items()}
#: Rules that compare classes: those without a setting of one class.
CLASSWISE = {o for o in OWNERS.values() if all(1 not in s.classes for s in CASES[o].settings.values())}


def example(name: str) -> Criterion:
    """The criterion that stands for a name in the contract tests."""
    return CASES[name].saved[0][0]
