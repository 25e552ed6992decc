"""What travels between the rooms: exit logits of a full-depth pass, and the answer of one request batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

#: Scalars a head may produce beside its logits, and the map from the raw number to the one a criterion reads.
AUX_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "halting": torch.sigmoid,
    "uncertainty": torch.sigmoid,
    "hidden_cosine": torch.positive,
}


def read_aux(raw: Tensor, name: str) -> Tensor:
    """A head's raw scalar as the number a criterion reads, float32."""
    return AUX_ACTIVATIONS[name](raw.float())


@dataclass(frozen=True)
class ExitTrace:
    """The outputs of every exit on every row of one full-depth pass, in request order.

    Attributes:
        logits: ``[N, L, C]``, float32 in eval mode, in the dtype of the heads in train mode.
        aux: raw scalars by name, each ``[N, L]`` (``"halting"``: the logit s of lambda = sigmoid(s)).
        keys: ``[N]`` int64, a hash of each row's tokens; None where the trace wasn't made by a model.
        projections: ``[M, T, P]``, projections of the packed tokens, where an objective asks for them in train mode.
        offsets: ``[N + 1]`` int32, the rows of these tokens.
        problem_type: of the model, as in transformers; None where the trace wasn't made by one.
    """

    logits: Tensor
    aux: Mapping[str, Tensor] = field(default_factory=dict)
    keys: Tensor | None = None
    projections: Tensor | None = None
    offsets: Tensor | None = None
    problem_type: str | None = None

    @property
    def depth(self) -> int:
        """L, the number of exits."""
        return self.logits.shape[1]

    @staticmethod
    def cat(traces: Sequence[ExitTrace]) -> ExitTrace:
        """Join traces of several batches along the rows; projections of tokens stay behind.

        Raises:
            ValueError: no trace was given, the traces hold different aux names or tasks, or only some hold keys.
        """
        if not traces:
            raise ValueError("ExitTrace.cat: expected at least one trace, got an empty list")
        names = [sorted(t.aux) for t in traces]
        if any(n != names[0] for n in names):
            raise ValueError(f"ExitTrace.cat: expected the same aux outputs in every trace, got {names}")
        aux = {n: torch.cat([t.aux[n] for t in traces]) for n in names[0]}
        keys = [t.keys for t in traces if t.keys is not None]
        if len(keys) not in (0, len(traces)):
            raise ValueError(
                f"ExitTrace.cat: expected keys in every trace or in none, got {len(keys)} of {len(traces)}"
            )
        tasks = {t.problem_type for t in traces}
        if len(tasks) > 1:
            raise ValueError(f"ExitTrace.cat: expected one problem_type in all traces, got {sorted(map(str, tasks))}")
        logits = torch.cat([t.logits for t in traces])
        return ExitTrace(logits, aux, torch.cat(keys) if keys else None, problem_type=tasks.pop())


@dataclass(frozen=True)
class ExitOutput:
    """The answer of one request batch, in request order.

    Attributes:
        logits: ``[N, C]`` float32, the answer of the exit each row left at.
        exit_layer: ``[N]`` int64, 1-based depth of the answering head.
        layers_run: ``[N]`` int64, layers computed for the row.
        invalid_rows: for each layer 1..L, how many rows present there had logits without a meaning.
        trace: the exits of every layer, when asked for.
    """

    logits: Tensor
    exit_layer: Tensor
    layers_run: Tensor
    invalid_rows: tuple[int, ...] = ()
    trace: ExitTrace | None = None

    @staticmethod
    def cat(outputs: Sequence[ExitOutput]) -> ExitOutput:
        """Join the answers to the parts of a batch, at least one, without their traces."""
        logits, exit_layer, layers_run = (
            torch.cat([getattr(output, name) for output in outputs]) for name in ("logits", "exit_layer", "layers_run")
        )
        invalid = tuple(map(sum, zip(*(output.invalid_rows for output in outputs), strict=True)))
        return ExitOutput(logits, exit_layer, layers_run, invalid)


class Gating(NamedTuple):
    """How skip gates mix a layer's output with its input in training.

    Attributes:
        hard: skip where g >= threshold, with the gradient of g itself (straight-through); else mix by g.
        threshold: of the hard gates.
    """

    hard: bool
    threshold: float


class RowStates(Protocol):
    """Hidden states ``[..., H]`` of some rows, in a layout that knows which tokens are whose."""

    @property
    def hidden(self) -> Tensor:
        """The states."""

    @property
    def rows(self) -> int:
        """B."""

    def pool(self, tokens: Tensor, pooling: str | None) -> Tensor:
        """One vector ``[B, F]`` for each row of tokens ``[..., F]``: the first, or the mean (in float32)."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Attention within each row, over and to ``[..., heads, D]``."""
