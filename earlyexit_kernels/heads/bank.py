"""The exits of all layers, and what stands beside them: halting, uncertainty, gates, projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from earlyexit_kernels.heads.attention import AttentionFeatures, Projection, SkipGate
from earlyexit_kernels.heads.config import HeadConfig
from earlyexit_kernels.heads.halting import HaltingHead
from earlyexit_kernels.types import RowStates

#: Module of the bank -> the part that a training phase names; a module missing here belongs to the exit of its layer.
PARTS_OF_BANK = {
    "halting": "halting",
    "uncertainty": "uncertainty",
    "gates": "gates",
    "projectors": "projectors",
    "contrast": "early_exits",
}


class LinearExits(NamedTuple):
    """All exits where each is one linear on the pooled hidden state: how to pool, and weight and bias by layer."""

    pooling: str
    weights: list[tuple[Tensor, Tensor]]


class FusedExit(NamedTuple):
    """One exit up to its last linear: a vector ``[B, F]`` for each row, that linear, the raw scalar, the memory."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    aux: Tensor | None
    memory: dict[str, Tensor]


class HeadOutput(NamedTuple):
    """One exit whole: logits ``[B, C]``, raw scalars ``[B]`` by name, memory ``[B, F]`` by name, projections."""

    logits: Tensor
    aux: dict[str, Tensor]
    memory: dict[str, Tensor]
    projection: Tensor | None


class ExitHeads(nn.Module):
    """The exits of all L layers.

    What an exit has to know of the one before it is *memory*, tensors ``[B, F]`` by name: ``"features"`` for halting
    outputs that compare, ``"pooled"`` for the cosine of successive pooled states.

    Args:
        config: shape of the heads.
        hidden_size, classes, depth: H, C and L.
    """

    def __init__(self, config: HeadConfig, hidden_size: int, classes: int, depth: int) -> None:
        super().__init__()
        self.config, self.depth = config, depth
        exits = 1 if config.shared_exit else depth
        width, dropout, pooling = config.width, config.dropout, config.pooling
        attends = config.form == "attention"
        size = self.features_size = width if attends else hidden_size
        denses = 0 if not config.has_dense else exits if config.exit_dense == "own" else 1
        self.dense = nn.ModuleList(nn.Linear(size, size) for _ in range(denses))
        self.activation = ACT2FN[config.activation]
        self.attention = nn.ModuleList(
            AttentionFeatures(hidden_size, width, config.attention_heads, dropout, pooling)
            for _ in range(exits if attends else 0)
        )
        self.out = nn.ModuleList(nn.Linear(size, classes) for _ in range(exits))
        haltings = 0 if not config.halting else 1 if config.halting_shared else depth
        self.halting = nn.ModuleList(
            HaltingHead(size, config.halting_layers, config.halting_input, config.halting_bias) for _ in range(haltings)
        )
        self.uncertainty = nn.ModuleList(nn.Linear(size, 1) for _ in range(int(config.uncertainty)))
        self.gates = nn.ModuleList(
            SkipGate(hidden_size, width, dropout, pooling) for _ in range(depth if config.gates else 0)
        )
        self.projectors = nn.ModuleList(Projection(hidden_size, width) for _ in range(depth if config.contrast else 0))
        self.contrast = nn.ModuleList(Projection(width, width) for _ in range(depth - 1 if config.contrast else 0))

    @property
    def aux_names(self) -> tuple[str, ...]:
        """Scalars a criterion may read from these heads."""
        optional = {"halting": self.halting, "uncertainty": self.uncertainty, "gate": self.gates}
        return ("hidden_cosine", *(name for name, bank in optional.items() if len(bank)))

    def part_of(self, name: str) -> str:
        """The part of a model, as training phases name them, that a parameter of this module belongs to.

        Args:
            name: dotted, relative to this module.

        Raises:
            ValueError: not a parameter of an exit.
        """
        bank, _, rest = name.partition(".")
        while rest and bank not in self._modules:  # what a wrapper puts before: "modules_to_save.default." of PEFT
            bank, _, rest = rest.partition(".")
        if bank not in self._modules:
            raise ValueError(f"part_of: expected the name of a parameter of an exit, got {name!r}")
        if bank in PARTS_OF_BANK:
            return PARTS_OF_BANK[bank]
        if bank == "dense" and len(self.dense) == 1:
            return "dense"
        modules: Any = getattr(self, bank)
        return "last_exit" if int(rest.partition(".")[0]) == len(modules) - 1 else "early_exits"

    def check_beside(self, weight: Tensor) -> None:
        """Check that these heads can read the hidden states of a backbone.

        A linear on pooled states may have another dtype; modules that read the states themselves may not.

        Args:
            weight: of the backbone's embeddings, as an example of its dtype and device.

        Raises:
            ValueError: they can't.
        """
        last = self.out[-1]._parameters.get("weight")
        bank = self.dense if len(self.dense) else self.attention if len(self.attention) else self.gates
        reader = next(bank.parameters(), None)
        moved = last is not None and last.device != weight.device
        mixed = reader is not None and reader.dtype != weight.dtype
        if moved or (mixed and not torch.is_autocast_enabled(weight.device.type)):
            found: Any = last if moved else reader
            raise ValueError(
                f"the exits are {found.dtype} on {found.device}, the backbone {weight.dtype} on {weight.device}; "
                "convert both with model.to(...), model.half() or model.float() of the early-exit model: on the stock "
                "model they move the shared encoder alone"
            )

    def first_memory(self, states: RowStates, needs: str | None) -> dict[str, Tensor]:
        """The memory before layer 1.

        Args:
            states: tokens after the embeddings.
            needs: the scalar that will be read, or None.
        """
        memory = {}
        if self.config.remembers and needs in ("halting", "all"):
            memory["features"] = states.hidden.new_zeros(states.rows, self.features_size)
        if needs in ("hidden_cosine", "all"):
            memory["pooled"] = states.pool(states.hidden, self.config.pooling).float()
        return memory

    def forward(
        self, layer: int, states: RowStates, memory: Mapping[str, Tensor], *, projects: bool = False
    ) -> HeadOutput:
        """The exit after 1-based `layer`, differentiable, with dropout in training.

        Args:
            layer: 1-based.
            states: the tokens after it.
            memory: of the layer before, `first_memory` at the first.
            projects: compute the exit's token projections too.
        """
        features, narrow = self._features(layer, states)
        new_memory = self._new_memory(memory, features, states)
        aux = {name: self._scalar(name, layer, features, memory, new_memory) for name in self._scalars(memory)}
        projection = _at(self.contrast, layer)(narrow) if projects else None
        out = self._last_linear(layer)
        if self.training:
            logits = out(self._drop(features.to(out.weight.dtype), out))
            return HeadOutput(logits, aux, new_memory, projection)
        return HeadOutput(exit_logits(features, out.weight, out.bias), aux, new_memory, projection)

    def linear_exits(self, dtype: torch.dtype) -> LinearExits | None:
        """The exits as plain linears on hidden states of this dtype, or None where they are more than that.

        Looked up once a batch: at one row a batch, looking modules up at every layer shows in the latency.
        """
        if self.config.pooling is None or self.config.form != "linear":
            return None
        outs = [self._last_linear(layer) for layer in range(1, self.depth + 1)]
        weights: list[tuple[Tensor, Tensor]] = [(out.weight.contiguous(), out.bias) for out in outs]
        return LinearExits(self.config.pooling, weights) if weights[0][0].dtype == dtype else None

    def dense_exit(self, layer: int) -> tuple[nn.Linear, nn.Linear]:
        """The dense module and the last linear of the exit after 1-based `layer`, where it is first token and these."""
        return _at(self.dense, layer), self._last_linear(layer)

    def fused(self, layer: int, states: RowStates, memory: Mapping[str, Tensor], needs: str | None) -> FusedExit:
        """The exit after 1-based `layer` for inference, its last linear left to the fused op.

        Args:
            states: the tokens after it.
            memory: of the layer before.
            needs: the scalar the criterion reads; nothing else is computed.
        """
        out = self._last_linear(layer)
        features, _ = self._features(layer, states)
        new_memory = self._new_memory(memory, features, states)
        aux = None if needs is None else self._scalar(needs, layer, features, memory, new_memory)
        # a mean is float32: narrowing it would answer otherwise than the full pass does
        dtype = torch.promote_types(features.dtype, out.weight.dtype)
        weight, bias = out.weight.to(dtype).contiguous(), out.bias.to(dtype)
        return FusedExit(features.to(dtype), weight, bias, aux, new_memory)

    def gate(self, layer: int, states: RowStates) -> Tensor:
        """Logits ``[B]`` of the probability to skip 1-based `layer`, from its input."""
        return self.gates[layer - 1](states)

    def project(self, layer: int, states: RowStates) -> Tensor:
        """Projections ``[T, P]`` of the input of 1-based `layer`."""
        return self.projectors[layer - 1](states.hidden)

    def _last_linear(self, layer: int) -> nn.Linear:
        """The last linear of the exit after 1-based `layer`, whose weight inference reads without calling it.

        Raises:
            TypeError: it has been replaced by something else.
        """
        out = _at(self.out, layer)
        if not isinstance(out, nn.Linear):
            raise TypeError(
                f"the exit after layer {layer}: expected torch.nn.Linear, got {type(out).__module__}."
                f"{type(out).__name__}; leave the exits as they are: quantize model.backbone alone, and give PEFT "
                "modules_to_save=['heads'] to train them, or merge its adapters"
            )
        return out

    def _features(self, layer: int, states: RowStates) -> tuple[Tensor, Tensor | None]:
        """What the last linear reads ``[B, F]``, and the narrowed tokens of an attention exit."""
        if len(self.attention):
            return _at(self.attention, layer)(states)
        pooled = states.pool(states.hidden, self.config.pooling)
        if not len(self.dense):
            return pooled.to(states.hidden.dtype) if self.training else pooled, None
        dense = _at(self.dense, layer)
        x = self._drop(pooled, dense) if self.config.dropout_before_dense else pooled
        return self.activation(dense(x)), None

    def _new_memory(self, memory: Mapping[str, Tensor], features: Tensor, states: RowStates) -> dict[str, Tensor]:
        new = {"features": features} if "features" in memory else {}
        if "pooled" in memory:
            new["pooled"] = states.pool(states.hidden, self.config.pooling).float()
        return new

    def _drop(self, x: Tensor, reader: nn.Module) -> Tensor:
        """Dropout before a module, unless that is frozen or evaluated."""
        return F.dropout(x, self.config.dropout, reader.training)

    def _scalars(self, memory: Mapping[str, Tensor]) -> list[str]:
        """Scalars that a full pass keeps: what learns, and the cosine where the memory for it is kept."""
        names = [name for name in self.aux_names if name != "gate"]
        return [name for name in names if name != "hidden_cosine" or "pooled" in memory]

    def _scalar(
        self, name: str, layer: int, features: Tensor, memory: Mapping[str, Tensor], new_memory: Mapping[str, Tensor]
    ) -> Tensor:
        if name == "hidden_cosine":
            return F.cosine_similarity(new_memory["pooled"], memory["pooled"], dim=-1).clamp(-1, 1)
        if name == "uncertainty":
            linear: Any = self.uncertainty[0]
            return linear(self._drop(features.to(linear.weight.dtype), linear))[:, 0]
        head = _at(self.halting, layer)
        previous = memory.get("features")
        dtype = head.out.weight.dtype
        x = head.inputs(features.to(dtype), None if previous is None else previous.to(dtype))
        return head(self._drop(x, head))


def exit_logits(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The last linear in float32, as in the fused op: a half-precision one can overflow."""
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(features.float(), weight.float(), bias.float())


def _at(bank: nn.ModuleList, layer: int) -> Any:
    """The module of 1-based `layer`: its own, or the only one there is."""
    return bank[0] if len(bank) == 1 else bank[layer - 1]
