"""A replacement for CUDA graphs on the CPU: a replay runs the captured calls again on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from support.reference_networks import attended_by_row
from torch import Tensor

from earlyexit_kernels.core import attention
from earlyexit_kernels.core.attention_plan import AttentionPlan
from earlyexit_kernels.cuda import captured
from earlyexit_kernels.cuda.level import Level
from earlyexit_kernels.hf import runner


class Replays:
    """Stands for `cuda.record.Recorder`.

    Attributes:
        captures, replays: how many there were.
        error: raised by the next captures, or None.
        wrong: added to the hidden states by replays.
    """

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.error: BaseException | None = None
        self.wrong = 0.0

    def record(self, run: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        if self.error is not None:
            raise self.error
        self.captures += 1
        made = run()

        def replay() -> None:
            self.replays += 1
            for static, new in zip(tensors_of(made), tensors_of(run()), strict=True):
                if static is not new:  # neither a weight nor a buffer
                    static.copy_(new)
            if isinstance(made, Tensor):
                made.add_(self.wrong)

        return made, replay


def tensors_of(made: Any) -> Iterator[Tensor]:
    """Yield the tensors of what a captured call returned, in order."""
    if isinstance(made, Tensor):
        yield made
    elif isinstance(made, AttentionPlan):
        for part in (made.grouped(), made.offsets, made.columns, made.masks, made.rectangles):
            yield from tensors_of(part)
    elif isinstance(made, dict):
        for key in sorted(made, key=str):
            yield from tensors_of(made[key])
    elif isinstance(made, tuple | list):
        for part in made:
            yield from tensors_of(part)
    elif is_dataclass(made):
        for field in fields(made):
            yield from tensors_of(getattr(made, field.name))


@pytest.fixture
def replays(monkeypatch) -> Replays:
    """Let layers be captured on the CPU, and fill the tokens of no row with NaN."""
    recorder = Replays()
    load = Level.load

    def load_with_nan(self: Level, view: Any, rows: Any, recorder: Any) -> Any:
        self.hidden[:, rows.hidden.shape[0] :] = torch.nan
        return load(self, view, rows, recorder)

    monkeypatch.setattr(captured, "DEVICES", ("cpu",))
    monkeypatch.setitem(runner.AUTO, "cpu", ("captured", *runner.AUTO["cpu"]))
    monkeypatch.setattr(captured, "Recorder", lambda device: recorder)
    monkeypatch.setattr(Level, "load", load_with_nan)
    monkeypatch.setattr(attention, "_varlen", attended_by_row)
    return recorder
