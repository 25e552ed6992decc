"""A recording: the answers to named cases."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

#: File of a recording.
FILE = "answers.pickle"
#: Difference of numbers that counts as rounding: absolute up to 1, and relative above.
ROUNDING = 1e-6
#: Field of a case that raised an error, with the name of its class; messages may change.
RAISED = "raised"


class Case(NamedTuple):
    """A question to a model.

    Attributes:
        name: of its own; parts are separated by `` | ``, the first one is the group.
        ask: returns the answer, tensors and texts by name; None is left out.
        tolerance: allowed difference of numbers; 0: the bits have to be equal.
    """

    name: str
    ask: Callable[[], Mapping[str, Tensor | str | None]]
    tolerance: float = ROUNDING


@dataclass
class Recording:
    """Answers of one version.

    Attributes:
        answers: by name of the case: fields, which are float64, float32 or int64 tensors on the CPU, or texts.
        tolerances: by name of the case.
        about: what was recorded, for people.
    """

    answers: dict[str, dict[str, Tensor | str]] = field(default_factory=dict)
    tolerances: dict[str, float] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)

    def add(self, cases: Iterable[Case]) -> None:
        """Ask each case in turn, and keep what it answers or the class of the error that it raises.

        Raises:
            ValueError: two cases have one name.
        """
        for case in cases:
            if case.name in self.answers:
                raise ValueError(f"two cases are named {case.name!r}")
            try:
                found = {name: _kept(value) for name, value in case.ask().items() if value is not None}
            except Exception as error:
                found = {RAISED: type(error).__name__}
            self.answers[case.name], self.tolerances[case.name] = found, case.tolerance

    @staticmethod
    def joined(parts: Sequence[Recording]) -> Recording:
        """Return the cases of several recordings of one version."""
        joined = Recording(about=parts[0].about)
        for part in parts:
            joined.answers |= part.answers
            joined.tolerances |= part.tolerances
        return joined

    def save(self, folder: Path) -> None:
        """Write the recording to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            name: {key: value if isinstance(value, str) else value.numpy() for key, value in answer.items()}
            for name, answer in self.answers.items()
        }
        (folder / FILE).write_bytes(pickle.dumps((arrays, self.tolerances, self.about)))

    @staticmethod
    def load(folder: Path) -> Recording:
        """Read a recording, of a folder that is trusted as its program is."""
        arrays, tolerances, about = pickle.loads((folder / FILE).read_bytes())
        answers = {
            name: {key: value if isinstance(value, str) else torch.from_numpy(value) for key, value in answer.items()}
            for name, answer in arrays.items()
        }
        return Recording(answers, tolerances, about)


def _kept(value: Tensor | str) -> Tensor | str:
    if isinstance(value, str):
        return value
    value = value.detach().cpu().clone()
    if not value.is_floating_point():
        return value.long()
    return value if value.dtype == torch.float64 else value.float()
