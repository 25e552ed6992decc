"""A replacement for a GPU that shows which tensors a program leaves on the CPU.

A `Trainer` and a `pipeline` move their model to the GPU of a machine that has one. Here such a model stays on the CPU,
but accepts only inputs that have been moved, by `Tensor.to` or `Tensor.cuda`.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from transformers import Pipeline, Trainer

from earlyexit_kernels.core import inputs as core_inputs
from earlyexit_kernels.hf.training import early_exit_model_in


@pytest.fixture
def other_device(monkeypatch) -> None:
    """Refuse inputs on the CPU in models that a machine with a GPU would have moved there."""
    moved: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()

    def moves_model(cls: type) -> None:
        init = cls.__init__

        def moving_init(self: Any, *arguments: Any, **options: Any) -> None:
            init(self, *arguments, **options)
            model = early_exit_model_in(self.model)
            if model is not None:
                moved.add(model.backbone)

        monkeypatch.setattr(cls, "__init__", moving_init)

    def marks_tensors(name: str) -> None:
        move = getattr(torch.Tensor, name)

        def marking_move(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
            out = move(self, *arguments, **options) if name == "to" else self
            out.was_moved = True
            return out

        monkeypatch.setattr(torch.Tensor, name, marking_move)

    check = core_inputs.check_inputs

    def check_with_device(given: Any, adapter: Any, backbone: Any) -> Any:
        if backbone in moved:
            left = [name for name, x in given._asdict().items() if torch.is_tensor(x) and not hasattr(x, "was_moved")]
            assert not left, f"{', '.join(left)} would be on the CPU, the model on the GPU"
        return check(given, adapter, backbone)

    for cls in (Trainer, Pipeline):
        moves_model(cls)
    for name in ("to", "cuda"):
        marks_tensors(name)
    monkeypatch.setattr(core_inputs, "check_inputs", check_with_device)
