"""One row for each training method: what the tests have to know of it. A new method adds its row here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from earlyexit_kernels import criteria, methods
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.methods import METHODS, PARTS, Method

MULTI, REGRESSION = "multi_label_classification", "regression"
#: Parts that learn in the first phase of methods that train the encoder with the last exit first.
TWO_STAGE = {"backbone", "dense", "last_exit"}


@dataclasses.dataclass(frozen=True)
class MethodCase:
    """What the tests know of one method.

    Attributes:
        rule: the criterion of the paper, at a setting by which rows of a model that fits its data leave early.
        phases: name, parts that learn (None: all), epochs, lr, projections and need of labels of each phase.
        otherwise: the method with a value other than the default for every argument.
        refused: constructor arguments out of range, at least one for each argument, and words of the error.
        tasks: problem types that the method is defined for beside single-label classification.
        trains: for each phase a pattern of the names of the parameters that learn; a method of one phase trains all.
    """

    rule: Criterion
    phases: Sequence[tuple[Any, ...]]
    otherwise: Method
    refused: Sequence[tuple[dict[str, Any], tuple[str, ...]]] = ()
    tasks: tuple[str, ...] = ()
    trains: tuple[str, ...] = ("",)

    @property
    def freezes(self) -> bool:
        """Whether the second phase trains the early exits only."""
        return len(self.phases) > 1 and self.phases[1][1] == {"early_exits"}


METHOD_CASES: dict[str, MethodCase] = {
    "joint": MethodCase(
        rule=criteria.Patience(patience=1),
        phases=[("joint", None, 5, 2e-5, None, True)],
        otherwise=methods.Joint(equilibrium=True),
        refused=[
            ({"equilibrium": 1}, ("equilibrium", "1", "True or False")),
        ],
        tasks=(MULTI, REGRESSION),
    ),
    "palbert": MethodCase(
        rule=criteria.QExit(q=0.15),
        phases=[("ponder", None, 25, 1e-5, None, True)],
        otherwise=methods.Palbert(
            beta=0.1,
            prior=0.3,
            kl="posterior_prior",
            close_tail=False,
            halting_input="diff",
            halting_layers=1,
            halting_phase=True,
        ),
        refused=[
            ({"beta": -1}, ("beta", "-1", "at least 0")),
            ({"prior": 0}, ("prior", "0", "in (0, 1)")),
            ({"prior": 1.0}, ("prior", "1.0", "in (0, 1)")),
            ({"prior": math.nan}, ("prior", "nan", "finite number")),
            ({"kl": "forward"}, ("kl", "'forward'", "prior_posterior")),
            ({"close_tail": 1}, ("close_tail", "1", "True or False")),
            ({"halting_input": None}, ("halting_input", "None", "concat")),
            ({"halting_layers": 0}, ("halting_layers", "0", "whole number at least 1")),
            ({"halting_layers": 2.0}, ("halting_layers", "2.0", "whole number")),
            ({"halting_layers": True}, ("halting_layers", "True", "whole number")),
            ({"halting_phase": 1}, ("halting_phase", "1", "True or False")),
        ],
        tasks=(MULTI, REGRESSION),
    ),
    "ensemble": MethodCase(
        rule=criteria.Voting(threshold=2),
        phases=[("ensemble", None, 3, 2e-5, None, True)],
        otherwise=methods.Ensemble(
            diversity=0.3, weights="depth", min_over="batch", detach_target=True, skip_last=True, cap=2.0
        ),
        refused=[
            ({"diversity": 1.1}, ("diversity", "1.1", "[0, 1]")),
            ({"weights": "linear"}, ("weights", "'linear'", "depth")),
            ({"min_over": "row"}, ("min_over", "'row'", "sample")),
            ({"detach_target": "yes"}, ("detach_target", "'yes'", "True or False")),
            ({"skip_last": 0}, ("skip_last", "0", "True or False")),
            ({"cap": 0}, ("cap", "0", "above 0")),
            ({"cap": math.inf}, ("cap", "inf", "finite number")),
        ],
    ),
    "smartbert": MethodCase(
        rule=criteria.SkipGate(threshold=0.5, exit=criteria.Entropy(threshold=0.1)),
        phases=[
            ("backbone", TWO_STAGE | {"gates", "projectors"}, 5, 2e-5, "inputs", True),
            ("exits", {"early_exits"}, 4, 2e-5, "exits", True),
        ],
        otherwise=methods.Smartbert(
            gate_weight=0.1,
            gate_bias=0.0,
            gate_penalty="linear",
            skip_threshold=0.7,
            soft_epochs=1,
            contrast_backbone=0.2,
            contrast_exits=0.3,
            temperature_backbone=0.6,
            temperature_exits=0.7,
            positive_backbone=False,
            positive_exits=True,
        ),
        refused=[
            ({"gate_weight": -1}, ("gate_weight", "-1", "at least 0")),
            ({"gate_bias": "closed"}, ("gate_bias", "'closed'", "finite number")),
            ({"gate_penalty": "square"}, ("gate_penalty", "'square'", "reciprocal")),
            ({"skip_threshold": 1.5}, ("skip_threshold", "1.5", "[0, 1]")),
            ({"soft_epochs": -1}, ("soft_epochs", "-1", "at least 0")),
            ({"contrast_backbone": 2}, ("contrast_backbone", "2", "[0, 1]")),
            ({"contrast_exits": True}, ("contrast_exits", "True", "finite number")),
            ({"temperature_backbone": 0}, ("temperature_backbone", "0", "above 0")),
            ({"temperature_exits": -1}, ("temperature_exits", "-1", "above 0")),
            ({"positive_backbone": 1}, ("positive_backbone", "1", "True or False")),
            ({"positive_exits": 1}, ("positive_exits", "1", "True or False")),
        ],
        trains=(
            r"backbone\.|heads\.(attention|out)\.2\.|heads\.(gates|projectors)\.",
            r"heads\.(attention|out|contrast)\.[01]\.",
        ),
    ),
    "dact": MethodCase(
        rule=criteria.Dact(),
        phases=[
            ("exits", set(PARTS) - {"halting"}, 2, 2e-5, None, True),
            ("dact", None, 2, 1e-5, None, True),
        ],
        otherwise=methods.Dact(start="last", ponder=0.2, include_last=False, shared=True, halting_bias=-1.0),
        refused=[
            ({"start": "first"}, ("start", "'first'", "joint")),
            ({"ponder": -0.1}, ("ponder", "-0.1", "at least 0")),
            ({"ponder": 10**400}, ("ponder", "finite number")),
            ({"include_last": None}, ("include_last", "None", "True or False")),
            ({"shared": None}, ("shared", "None", "True or False")),
            ({"halting_bias": "high"}, ("halting_bias", "'high'", "finite number")),
        ],
        trains=(r"(?!heads\.halting\.)", ""),
    ),
    "deebert": MethodCase(
        rule=criteria.Entropy(threshold=0.1),
        phases=[
            ("backbone", TWO_STAGE, 3, 2e-5, None, True),
            ("exits", {"early_exits"}, 3, 2e-5, None, True),
        ],
        otherwise=methods.Deebert(),
        tasks=(MULTI, REGRESSION),
        trains=(r"backbone\.|heads\.(dense|out)\.2\.", r"heads\.(dense|out)\.[01]\."),
    ),
    "berxit": MethodCase(
        rule=criteria.Learned(threshold=0.5),
        phases=[("alternating", None, 3, 2e-5, None, True)],
        otherwise=methods.Berxit(strategy="two_stage", odd_includes_last=False, learned_weight=0.5),
        refused=[
            ({"strategy": "even"}, ("strategy", "'even'", "two_stage")),
            ({"odd_includes_last": 1}, ("odd_includes_last", "1", "True or False")),
            ({"learned_weight": -1}, ("learned_weight", "-1", "at least 0")),
        ],
        tasks=(REGRESSION,),
    ),
    "fastbert": MethodCase(
        rule=criteria.Entropy(threshold=0.1, normalized=True),
        phases=[
            ("backbone", TWO_STAGE, 3, 2e-5, None, True),
            ("exits", {"early_exits"}, 5, 2e-4, None, False),
        ],
        otherwise=methods.Fastbert(kl="student_teacher"),
        refused=[
            ({"kl": "student"}, ("kl", "'student'", "teacher_student")),
        ],
        trains=(r"backbone\.|heads\.(attention|out)\.2\.", r"heads\.(attention|out)\.[01]\."),
    ),
}
#: Methods of several phases.
PHASED = tuple(name for name, case in METHOD_CASES.items() if len(case.trains) > 1)
#: Methods whose second phase trains the early exits only.
FREEZING = tuple(name for name, case in METHOD_CASES.items() if case.freezes)


def method_case(name: str) -> MethodCase:
    """Return the row of a name of the table of methods, which has a second name for one."""
    return METHOD_CASES[METHODS[name].name]
