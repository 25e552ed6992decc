"""Types shared by the packages: the exits of a full-depth pass, and the answer of a request batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

#: Problem types, named as in transformers, that a criterion or a training method may be defined for.
CLASSIFICATION = frozenset({"single_label_classification"})
ANY_TASK = frozenset({"single_label_classification", "multi_label_classification", "regression"})

#: What exits may read of a row: a token, or the mean of all.
POOLINGS = ("first", "mean", "last")
#: What the head of a family may read; ``"late"``: dense and activation of each token, and their mean.
FAMILY_POOLINGS = (*POOLINGS, "late")

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

#: Scalars that heads may produce besides logits -> the map from the raw number to the one that criteria read.
AUX_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "halting": torch.sigmoid,
    "uncertainty": torch.sigmoid,
    "hidden_cosine": torch.positive,
}


def read_aux(raw: Tensor, name: str) -> Tensor:
    """Return a raw scalar of a head as the number that criteria read, float32."""
    return AUX_ACTIVATIONS[name](raw.float())


def default_problem_type(num_labels: int) -> str:
    """Return the problem type that transformers assumes for a model with `num_labels` outputs and no other setting."""
    return "regression" if num_labels == 1 else "single_label_classification"


@dataclass(frozen=True)
class ExitTrace:
    """The outputs of all exits on all rows of a full-depth pass, in request order.

    Attributes:
        logits: ``[N, L, C]``, float32 in eval mode, in the dtype of the heads in train mode.
        aux: raw scalars by name, each ``[N, L]`` (``"halting"``: the logit s of lambda = sigmoid(s)).
        keys: ``[N]`` int64, a hash of the tokens of each row, or None if the trace was not made by a model.
        projections: ``[M, T, P]``, projections of the packed tokens for methods that need them in train mode.
        offsets: ``[N + 1]`` int32, the rows of these tokens.
        problem_type: of the model, as in transformers, or None if the trace was not made by a model.

    >>> import torch
    >>> import earlyexit_kernels as ee
    >>> trace = ee.ExitTrace(torch.zeros(2, 3, 5))
    >>> trace.depth, ee.ExitTrace.cat([trace, trace]).logits.shape
    (3, torch.Size([4, 3, 5]))
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

    def take(self, rows: Tensor | slice) -> ExitTrace:
        """Return some rows, by index ``[M]`` int64 or slice, without projections."""
        aux = {name: values[rows] for name, values in self.aux.items()}
        keys = None if self.keys is None else self.keys[rows]
        return ExitTrace(self.logits[rows], aux, keys, problem_type=self.problem_type)

    @staticmethod
    def cat(traces: Sequence[ExitTrace]) -> ExitTrace:
        """Concatenate the traces of several batches along the rows, without projections.

        Raises:
            ValueError: not a list of traces, or an empty one; the traces have different depths, classes, aux names or
                problem types, or only some have keys.
        """
        listed = isinstance(traces, Sequence)
        other = next((t for t in traces if not isinstance(t, ExitTrace)), None) if listed else traces
        if other is not None:
            raise ValueError(
                f"ExitTrace.cat: expected a list of traces, one for each batch, got {type(other).__name__}"
            )
        if not traces:
            raise ValueError("ExitTrace.cat: expected at least one trace, got an empty list")
        if len({t.logits.shape[1:] for t in traces}) > 1:
            raise ValueError(
                "ExitTrace.cat: expected logits [N, L, C] with the same L and C in every trace, got "
                f"{[list(t.logits.shape) for t in traces]}"
            )
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
    """The answer of a request batch, in request order.

    Attributes:
        logits: ``[N, C]`` float32, the answer of the exit at which each row left.
        exit_layer: ``[N]`` int64, 1-based layer of that exit.
        layers_run: ``[N]`` int64, number of layers computed for each row.
        invalid_rows: for each layer 1..L the number of present rows with invalid logits.
        trace: the exits of all layers, if requested.
    """

    logits: Tensor
    exit_layer: Tensor
    layers_run: Tensor
    invalid_rows: tuple[int, ...] = ()
    trace: ExitTrace | None = None

    @staticmethod
    def cat(outputs: Sequence[ExitOutput]) -> ExitOutput:
        """Concatenate the answers to the parts of a batch, at least one, without traces."""
        logits, exit_layer, layers_run = (
            torch.cat([getattr(output, name) for output in outputs]) for name in ("logits", "exit_layer", "layers_run")
        )
        invalid = tuple(map(sum, zip(*(output.invalid_rows for output in outputs), strict=True)))
        return ExitOutput(logits, exit_layer, layers_run, invalid)


class Answers(NamedTuple):
    """The answers of the rows of a batch that left together.

    Attributes:
        rows: ``[n]`` int64, their indices in the batch.
        logits: ``[n, C]`` float32, the answer of the exit at which each row left.
        exit_layer: ``[n]`` int64, 1-based layer of that exit.

    Example:

        >>> import torch
        >>> import earlyexit_kernels as ee
        >>> part = ee.Answers(torch.tensor([2]), torch.tensor([[0.0, 2.0]]), torch.tensor([1]))
        >>> part.rows.tolist(), part.logits.argmax(dim=1).tolist(), part.exit_layer.tolist()
        ([2], [1], [1])
    """

    rows: Tensor
    logits: Tensor
    exit_layer: Tensor


def normed(norm: Callable[[Tensor], Tensor] | None, tokens: Tensor) -> Tensor:
    """Return tokens after a norm, or as they are."""
    return tokens if norm is None else norm(tokens)


class Gating(NamedTuple):
    """How skip gates mix the output of a layer with its input in training.

    Attributes:
        hard: skip a layer if g >= threshold, with the gradient of g itself (straight-through); else mix by g.
        threshold: of hard gates.
    """

    hard: bool
    threshold: float


class RowStates(Protocol):
    """Hidden states ``[..., H]`` of some rows, packed or padded."""

    @property
    def hidden(self) -> Tensor:
        """Tokens ``[..., H]``, as layers read and write them."""

    @property
    def rows(self) -> int:
        """B."""

    @property
    def norm(self) -> Callable[[Tensor], Tensor] | None:
        """The norm at the end of the encoder, through which exits and gates read the tokens, or None."""

    @property
    def tokens(self) -> Tensor:
        """Tokens ``[..., H]`` after `norm`."""

    def pool(self, tokens: Tensor, pooling: str) -> Tensor:
        """Return one vector ``[B, F]`` per row of tokens ``[..., F]``: the first, the last, or the mean in float32."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Return attention within each row, over and to ``[..., heads, D]``."""


def pooled(states: RowStates, pooling: str) -> Tensor:
    """Return one vector ``[B, H]`` per row of ``states.tokens``; if it is a token's, only these pass the norm."""
    if pooling == "mean":
        return states.pool(states.tokens, pooling)
    return normed(states.norm, states.pool(states.hidden, pooling))
