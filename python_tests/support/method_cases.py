"""One row for each training method: what the tests have to know of it. A new method adds its row here."""

from __future__ import annotations

import dataclasses
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
        tasks: problem types that the method is defined for beside single-label classification.
        trains: for each phase a pattern of the names of the parameters that learn; a method of one phase trains all.
    """

    rule: Criterion
    phases: Sequence[tuple[Any, ...]]
    otherwise: Method
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
        tasks=(MULTI, REGRESSION),
    ),
    "ensemble": MethodCase(
        rule=criteria.Voting(threshold=2),
        phases=[("ensemble", None, 3, 2e-5, None, True)],
        otherwise=methods.Ensemble(
            diversity=0.3, weights="depth", min_over="batch", detach_target=True, skip_last=True, cap=2.0
        ),
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
        tasks=(REGRESSION,),
    ),
    "fastbert": MethodCase(
        rule=criteria.Entropy(threshold=0.1, normalized=True),
        phases=[
            ("backbone", TWO_STAGE, 3, 2e-5, None, True),
            ("exits", {"early_exits"}, 5, 2e-4, None, False),
        ],
        otherwise=methods.Fastbert(kl="student_teacher"),
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
