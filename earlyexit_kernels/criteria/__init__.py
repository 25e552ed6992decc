"""Exit criteria: when may a row leave? One file per rule, listed here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from earlyexit_kernels.criteria.base import Criterion
from earlyexit_kernels.criteria.dact import Dact
from earlyexit_kernels.criteria.divergence_patience import DivergencePatience
from earlyexit_kernels.criteria.energy import Energy
from earlyexit_kernels.criteria.entropy import Entropy
from earlyexit_kernels.criteria.expectation import Expectation
from earlyexit_kernels.criteria.full_depth import FullDepth
from earlyexit_kernels.criteria.hidden_cosine import HiddenCosine
from earlyexit_kernels.criteria.learned import Learned
from earlyexit_kernels.criteria.margin import Margin
from earlyexit_kernels.criteria.max_probability import MaxProbability
from earlyexit_kernels.criteria.patience import Patience
from earlyexit_kernels.criteria.patient_confidence import PatientConfidence
from earlyexit_kernels.criteria.q_exit import QExit
from earlyexit_kernels.criteria.sampled_exit import SampledExit
from earlyexit_kernels.criteria.skip_gate import SkipGate
from earlyexit_kernels.criteria.voting import Voting

__all__ = [
    "CRITERIA",
    "RULES",
    "Criterion",
    "Dact",
    "DivergencePatience",
    "Energy",
    "Entropy",
    "Expectation",
    "FullDepth",
    "HiddenCosine",
    "Learned",
    "Margin",
    "MaxProbability",
    "Patience",
    "PatientConfidence",
    "QExit",
    "SampledExit",
    "SkipGate",
    "Voting",
    "check_fits",
    "check_known",
    "from_dict",
]

#: What an op runs, in the order of csrc/criteria/all.h.
RULES: dict[str, type[Criterion]] = {
    "full_depth": FullDepth,
    "entropy": Entropy,
    "max_probability": MaxProbability,
    "margin": Margin,
    "patience": Patience,
    "q_exit": QExit,
    "sampled_exit": SampledExit,
    "expectation": Expectation,
    "voting": Voting,
    "dact": Dact,
    "learned": Learned,
    "patient_confidence": PatientConfidence,
    "divergence_patience": DivergencePatience,
    "hidden_cosine": HiddenCosine,
    "energy": Energy,
}
#: What a model can be given and a config can hold.
CRITERIA: dict[str, type[Criterion]] = {**RULES, "skip_gate": SkipGate}


def from_dict(data: Mapping[str, Any] | None) -> Criterion:
    """Build a criterion from the data of `Criterion.to_dict`, criteria within it too; None is full depth.

    Raises:
        ValueError: an unknown name, or arguments the criterion doesn't take.
    """
    if data is None:
        return FullDepth()
    if not isinstance(data, Mapping):
        raise ValueError(f"criterion: expected the data of Criterion.to_dict or None, got {data!r}")
    arguments = {key: from_dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in CRITERIA:
        raise ValueError(f"criterion: expected one of {sorted(CRITERIA)}, got {name!r}")
    try:
        return CRITERIA[name](**arguments)
    except TypeError as error:
        raise ValueError(f"criterion {name!r}: {error}") from None


def check_known(criterion: Criterion) -> None:
    """Raise ValueError where the back-ends have no implementation of a criterion, or one of another class of its name.

    Args:
        criterion: of any class. A subclass of one of `CRITERIA` is known as long as it keeps the decision.
    """
    known = CRITERIA.get(getattr(criterion, "name", ""))
    decision = ("rule", "triton_step", "needs")
    if known is None or any(
        getattr(type(criterion), part, None) is not getattr(known, part, None) for part in decision
    ):
        raise ValueError(
            f"criterion {type(criterion).__name__}: expected one of earlyexit_kernels.criteria "
            f"({', '.join(sorted(cls.__name__ for cls in CRITERIA.values()))}), whose decision the back-ends have, got "
            "a class with a decision of its own; use one of these, or add it to the package as CONTRIBUTING.md says"
        )


def check_fits(criterion: Criterion, *, depth: int, classes: int, problem_type: str, aux: Sequence[str]) -> None:
    """Raise ValueError where a criterion isn't known, can't run on exits of this shape, or has no meaning for the task.

    Args:
        criterion: as in `check_known`.
        depth, classes: L and C of the exits.
        problem_type: the model's, as in transformers.
        aux: names of the scalars the heads produce.
    """
    check_known(criterion)
    check_known(criterion.exit_rule)
    if problem_type not in criterion.exit_rule.tasks:
        skips = {SkipGate.name} if "gate" in aux else set()
        fed = {name for name, cls in RULES.items() if cls.needs is None or cls.needs in aux} | skips
        fitting = sorted(CRITERIA[name].__name__ for name in fed if problem_type in CRITERIA[name].tasks)
        raise ValueError(
            f"criterion {criterion.exit_rule.name!r} is defined for {sorted(criterion.exit_rule.tasks)}, got "
            f"problem_type={problem_type!r}; for {problem_type} these heads have {', '.join(fitting)}"
        )
    criterion.check(depth=depth, classes=classes, problem_type=problem_type, aux=aux)
