"""The exits of one request: the inputs of a decision, by kind of head, and the tensors that the decisions fill.

The loop and `replay` decide by the op `exit_step`: a *source* computes `ExitInputs` and
`RequestExits.call` adds the tensors of the request. The fixed-depth mode reads the same inputs with `read_exit`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation

from earlyexit_kernels.backbones.forms import hooked
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.heads import ExitHeads
from earlyexit_kernels.heads.bank import FusedExit, LinearExits
from earlyexit_kernels.ops import raw
from earlyexit_kernels.ops.exit_call import ExitCall
from earlyexit_kernels.types import ExitTrace, RowStates, pooled, read_aux

#: Activation of a dense module that the op `first_tokens_linear` computes -> its class.
DENSE_ACTIVATIONS = {"gelu": GELUActivation, "relu": nn.ReLU, "tanh": nn.Tanh}


class ExitInputs(NamedTuple):
    """The inputs of one decision.

    Attributes:
        hidden: packed tokens ``[T, H]``, or with pooling ``"none"`` one vector ``[B, F]`` per row.
        weight, bias: the last linear, ``[C, F]`` and ``[C]``.
        logits: ``[B, C]`` instead of the three above.
        aux: ``[B]`` float32, the scalar that the rule needs.
        pooling: as in `ops.exit_step`.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logits: Tensor | None
    aux: Tensor | None
    pooling: str


class ExitSource(Protocol):
    """Computes the inputs of an exit."""

    def __call__(self, layer: int, states: RowStates, row_ids: Tensor) -> ExitInputs:
        """Return the inputs of the exit after 1-based `layer`.

        Args:
            layer: 1-based.
            states: tokens after the layer.
            row_ids: ``[B]`` int32, request row of each row; negative for rows that have left.
        """


class LinearSource(NamedTuple):
    """Exits that are one linear on the pooled hidden state; the op computes it, and pools where no norm is between."""

    linear: LinearExits

    def __call__(self, layer: int, states: RowStates, row_ids: Tensor) -> ExitInputs:
        (weight, bias), pooling = self.linear.weights(layer), self.linear.pooling
        if states.norm is None and pooling != "last":
            return ExitInputs(states.hidden, weight, bias, None, None, pooling)
        vectors = pooled(states, pooling)
        if vectors.dtype != weight.dtype:  # a mean is float32
            weight, bias = weight.to(vectors.dtype), bias.to(vectors.dtype)
        return ExitInputs(vectors, weight, bias, None, None, "none")


class DenseSource(NamedTuple):
    """Exits of a dense module on the first token, its activation and a last linear, computed by two ops.

    Attributes:
        heads: the exits.
        exits: the dense module and the last linear, by layer.
        activation: of the dense module, as in the op `first_tokens_linear`.
        features: buffer ``[N, F]`` for at least as many rows as a call has.
        multiply: the raw op `first_tokens_linear`.
    """

    heads: ExitHeads
    exits: Sequence[tuple[nn.Linear, nn.Linear]]
    activation: str
    features: Tensor
    multiply: Callable[..., None]

    def __call__(self, layer: int, states: Any, row_ids: Tensor) -> ExitInputs:
        dense, out = self.exits[layer - 1]
        dense_weight, weight, bias = dense.weight.contiguous(), out.weight.contiguous(), out.bias
        features = self.features[: row_ids.shape[0]]
        if {x.dtype for x in (dense_weight, dense.bias, weight, bias)} != {features.dtype}:
            return ModuleSource(self.heads, None)(layer, states, row_ids)
        self.multiply(states.hidden, dense_weight, dense.bias, states.offsets, row_ids, features, self.activation)
        return ExitInputs(features, weight, bias, None, None, "none")


class ExitMemory:
    """What each exit of a request passes to the next one, by name, indexed by request row.

    A last, spare row stands for all rows that have left: they read and write it.

    Args:
        before: the memory before layer 1, ``[N, F]`` by name.
    """

    def __init__(self, before: Mapping[str, Tensor]) -> None:
        self._values = {name: torch.cat((x, x.new_zeros(1, x.shape[1]))) for name, x in before.items()}
        self._spare = next((x.shape[0] for x in before.values()), 0)

    def slots(self, row_ids: Tensor) -> Tensor:
        """Return the row of the memory ``[B]`` int64 for each row id, negative ids included."""
        return row_ids.masked_fill(row_ids < 0, self._spare).long() if self._values else row_ids

    def read(self, slots: Tensor) -> dict[str, Tensor]:
        """Return the memory ``[B, F]`` of some rows, by name."""
        return {name: x.index_select(0, slots) for name, x in self._values.items()}

    def write(self, slots: Tensor, new: Mapping[str, Tensor]) -> None:
        """Replace the memory of some rows."""
        for name, x in new.items():
            self._values[name].index_copy_(0, slots, x.to(self._values[name].dtype))


@dataclass(frozen=True)
class ModuleSource:
    """Exits that torch modules compute up to their last linear.

    Attributes:
        heads: the exits.
        needs: the scalar that the rule needs, or None.
        memory: of the request.
    """

    heads: ExitHeads
    needs: str | None
    memory: ExitMemory = field(default_factory=lambda: ExitMemory({}))

    def __call__(self, layer: int, states: RowStates, row_ids: Tensor) -> ExitInputs:
        slots = self.memory.slots(row_ids)
        exit_, aux = read_exit(self.heads, layer, states, self.memory.read(slots), self.needs)
        self.memory.write(slots, exit_.memory)
        return ExitInputs(exit_.features, exit_.weight, exit_.bias, None, aux, "none")


@dataclass(frozen=True)
class TraceSource:
    """The stored exits of a full-depth pass, for a rule that needs the scalar `needs`."""

    trace: ExitTrace
    needs: str | None

    def __call__(self, layer: int) -> ExitInputs:
        aux = None
        if self.needs is not None:
            aux = read_aux(self.trace.aux[self.needs][:, layer - 1].detach(), self.needs).contiguous()
        logits = self.trace.logits[:, layer - 1].detach().contiguous()
        return ExitInputs(None, None, None, logits, aux, "none")


def exit_source(heads: ExitHeads, needs: str | None, states: RowStates, backend: str) -> ExitSource:
    """Return the source for the exits of a request.

    Args:
        heads: the exits.
        needs: the scalar that the rule needs, or None.
        states: tokens after the embeddings.
        backend: of the ops.
    """
    if needs is not None:
        return ModuleSource(heads, needs, ExitMemory(heads.first_memory(states, needs)))
    linear = heads.linear_exits(states.hidden.dtype)
    if linear is not None:
        return LinearSource(linear)
    # in half precision a full-depth pass, which calls the modules, would round differently
    on_cpu = states.hidden.device.type == "cpu" and backend != "triton"  # which does not have the op
    if states.norm is None and on_cpu and states.hidden.dtype == torch.float32:
        return dense_source(heads, states, backend) or ModuleSource(heads, None)
    return ModuleSource(heads, None)


def dense_source(heads: ExitHeads, states: RowStates, backend: str) -> DenseSource | None:
    """Return the source that computes the family's form of exits by ops, or None where these are something else.

    Args:
        heads: the exits.
        states: float32 tokens after the embeddings.
        backend: of the ops.
    """
    exits = dense_exits(heads, states.hidden.dtype, states.hidden.device)
    if exits is None:
        return None
    features = states.hidden.new_empty(states.rows, heads.features_size)
    multiply = raw("first_tokens_linear", backend, features.device)
    return DenseSource(heads, exits, heads.config.activation, features, multiply)


def dense_exits(heads: ExitHeads, dtype: torch.dtype, device: torch.device) -> list[tuple[nn.Linear, nn.Linear]] | None:
    """Return the dense module and the last linear by layer, or None where an exit is something else.

    Args:
        heads: the exits.
        dtype, device: of the hidden states.
    """
    config = heads.config
    known = config.has_dense and config.reads == "first" and config.dense_bias and not config.norm
    if not known or torch.is_autocast_enabled(device.type):
        return None
    if type(heads.activation) is not DENSE_ACTIVATIONS.get(config.activation):
        return None
    dense: list[Any] = list(heads.dense)
    if any(type(module) is not nn.Linear or hooked(module) for module in dense):
        return None
    outs = heads.last_linears()
    exits = list(zip(dense * (len(outs) if len(dense) == 1 else 1), outs, strict=True))
    return None if any(linear.weight.dtype != dtype for linear in exits[0]) else exits


def read_exit(
    heads: ExitHeads, layer: int, states: RowStates, memory: Mapping[str, Tensor], needs: str | None
) -> tuple[FusedExit, Tensor | None]:
    """Compute the exit after 1-based `layer` up to its last linear.

    Args:
        heads: the exits.
        layer: 1-based.
        states: tokens after the layer.
        memory: of the layer before, ``[B, F]`` by name.
        needs: the scalar that the rule needs, or None.

    Returns:
        The exit, and the scalar as the rule reads it ``[B]`` float32.
    """
    exit_ = heads.fused(layer, states, memory, needs)
    return exit_, None if exit_.aux is None or needs is None else read_aux(exit_.aux, needs)


@dataclass(frozen=True)
class RequestExits:
    """The rule of a request, and the tensors that its decisions fill, indexed by request row.

    Attributes:
        rule: the exit rule.
        depth: L.
        state: ``[K, N]`` float32, of the rule.
        answers: ``[N, C]`` float32.
        exit_layer: ``[N]`` int64, 0 for rows that have not left.
    """

    rule: Criterion
    depth: int
    state: Tensor
    answers: Tensor
    exit_layer: Tensor

    @staticmethod
    def new(
        rule: Criterion, *, rows: int, classes: int, depth: int, device: torch.device, keys: Tensor | None = None
    ) -> RequestExits:
        """Return the exits of a request of which no row has left.

        Args:
            rule: the exit rule.
            rows, classes, depth: N, C and L.
            device: of the tensors.
            keys: ``[N]`` int64, for rules with `uses_keys`.
        """
        state = rule.new_state(rows, device, classes, keys)
        answers = torch.zeros(rows, classes, dtype=torch.float32, device=device)
        return RequestExits(rule, depth, state, answers, torch.zeros(rows, dtype=torch.int64, device=device))

    def call(self, layer: int, inputs: ExitInputs, row_ids: Tensor, offsets: Tensor | None) -> ExitCall:
        """Return the arguments of `exit_step` for the exit after 1-based `layer`."""
        hidden, weight, bias, logits, aux, pooling = inputs
        rule = self.rule
        return ExitCall(
            hidden, offsets, weight, bias, logits, aux, row_ids, self.state, self.answers, self.exit_layer,
            rule.name, rule.params(layer), pooling, layer, self.depth,
        )  # fmt: skip
