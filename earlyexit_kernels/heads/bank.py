"""Exits of all layers, with their halting and uncertainty outputs, skip gates and projections."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from earlyexit_kernels.heads.attention import AttentionFeatures, Projection, SkipGate
from earlyexit_kernels.heads.config import HeadConfig, bank_sizes
from earlyexit_kernels.heads.halting import HaltingHead
from earlyexit_kernels.types import RowStates, pooled

#: Bank of modules -> the part of the model in a training phase; other banks belong to the exit of each layer.
PARTS_OF_BANK = {
    "halting": "halting",
    "uncertainty": "uncertainty",
    "gates": "gates",
    "projectors": "projectors",
    "contrast": "early_exits",
}


class LinearExits(NamedTuple):
    """Exits that are one linear each on the pooled hidden state: the pooling, and the linears by layer."""

    pooling: str
    linears: list[nn.Linear]

    def weights(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return weight and bias of the exit after 1-based `layer`."""
        out = self.linears[layer - 1]
        return out.weight.contiguous(), out.bias


class FusedExit(NamedTuple):
    """One exit without its last linear: features ``[B, F]``, that linear's weight and bias, raw scalar, memory."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    aux: Tensor | None
    memory: dict[str, Tensor]


class HeadOutput(NamedTuple):
    """Output of one exit: logits ``[B, C]``, raw scalars ``[B]`` by name, memory ``[B, F]`` by name, projections."""

    logits: Tensor
    aux: dict[str, Tensor]
    memory: dict[str, Tensor]
    projection: Tensor | None


class ExitHeads(nn.Module):
    """Exits of all L layers.

    The *memory* is what an exit reads of the previous one, tensors ``[B, F]`` by name: ``"features"`` for halting
    outputs that compare features, ``"pooled"`` for the cosine of successive pooled states.

    Args:
        config: of the heads.
        hidden_size: H.
        classes: C.
        depth: L.
    """

    def __init__(self, config: HeadConfig, hidden_size: int, classes: int, depth: int) -> None:
        super().__init__()
        self.config, self.classes, self.depth = config, classes, depth
        width, dropout, pooling = config.width, config.dropout, config.reads
        attention = (width, config.attention_heads, dropout, pooling)
        halting = (config.halting_layers, config.halting_input, config.halting_bias)
        size = self.features_size = width if config.form == "attention" else hidden_size
        sizes = bank_sizes(config, depth)
        self.dense = _bank(sizes.dense, nn.Linear, size, size, config.dense_bias)
        self.norm = _bank(sizes.norm, nn.LayerNorm, size, config.norm_eps, True, config.norm_bias)
        self.activation = ACT2FN[config.activation]
        self.attention = _bank(sizes.attention, AttentionFeatures, hidden_size, *attention)
        self.out = _bank(sizes.out, nn.Linear, size, classes)
        self.halting = _bank(sizes.halting, HaltingHead, size, *halting)
        self.uncertainty = _bank(sizes.uncertainty, nn.Linear, size, 1)
        self.gates = _bank(sizes.gates, SkipGate, hidden_size, width, dropout, pooling, config.gate_bias)
        self.projectors = _bank(sizes.projectors, Projection, hidden_size, width)
        self.contrast = _bank(sizes.contrast, Projection, width, width)

    @property
    def aux_names(self) -> tuple[str, ...]:
        """Names of the scalars that a criterion can read from these heads."""
        optional = {"halting": self.halting, "uncertainty": self.uncertainty, "gate": self.gates}
        return ("hidden_cosine", *(name for name, bank in optional.items() if len(bank)))

    def part_of(self, name: str) -> str:
        """Return the part of the model, as in `PhaseSpec.trains`, that a parameter of this module belongs to.

        Args:
            name: dotted name of the parameter, relative to this module.

        Raises:
            ValueError: not a parameter of an exit.
        """
        bank, _, rest = name.partition(".")
        while rest and bank not in self._modules:  # prefix of a wrapper, as "modules_to_save.default." of PEFT
            bank, _, rest = rest.partition(".")
        if bank not in self._modules:
            raise ValueError(f"part_of: expected the name of a parameter of an exit, got {name!r}")
        if bank in PARTS_OF_BANK:
            return PARTS_OF_BANK[bank]
        if bank in ("dense", "norm") and len(self.dense) == 1:
            return "dense"
        modules: Any = getattr(self, bank)
        return "last_exit" if int(rest.partition(".")[0]) == len(modules) - 1 else "early_exits"

    def check_beside(self, weight: Tensor) -> None:
        """Check that the dtype and device of the heads fit those of the backbone.

        A linear on pooled states may have another dtype; modules that read the states themselves may not.

        Args:
            weight: of the backbone's embeddings, for its dtype and device.

        Raises:
            ValueError: they do not fit.
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
                "convert both with model.to(...), model.half() or model.float() of the early-exit model; on the stock "
                "model these methods convert the shared encoder only"
            )

    def first_memory(self, states: RowStates, needs: str | None) -> dict[str, Tensor]:
        """Return the memory before layer 1.

        Args:
            states: tokens after the embeddings.
            needs: the scalar that will be read, ``"all"``, or None.
        """
        memory = {}
        if self.config.remembers and needs in ("halting", "all"):
            memory["features"] = states.hidden.new_zeros(states.rows, self.features_size)
        if needs in ("hidden_cosine", "all"):
            memory["pooled"] = pooled(states, self.config.reads).float()
        return memory

    def forward(
        self, layer: int, states: RowStates, memory: Mapping[str, Tensor], *, projects: bool = False
    ) -> HeadOutput:
        """Compute the exit after a layer, differentiably, with dropout in training.

        Args:
            layer: 1-based.
            states: the tokens after the layer.
            memory: of the previous layer; `first_memory` at the first one.
            projects: also compute the exit's token projections.
        """
        features, narrow = self._features(layer, states)
        new_memory = self._new_memory(memory, features, states)
        aux = {name: self._scalar(name, layer, features, memory, new_memory) for name in self._scalars(memory)}
        projection = _module_for(layer, self.contrast)(narrow) if projects else None
        out = self._last_linear(layer)
        if self.training:
            logits = out(self._drop(features.to(out.weight.dtype), out))
            return HeadOutput(logits, aux, new_memory, projection)
        return HeadOutput(exit_logits(features, out.weight, out.bias), aux, new_memory, projection)

    def linear_exits(self, dtype: torch.dtype) -> LinearExits | None:
        """Return the exits as linears on hidden states of this dtype, or None where they have other modules too.

        Called once for each batch: for batches of one row, the module look-up at every layer increases the latency.
        """
        if self.config.has_dense or self.config.form != "linear":
            return None
        linears = self.last_linears()
        return LinearExits(self.config.reads, linears) if linears[0].weight.dtype == dtype else None

    def last_linears(self) -> list[nn.Linear]:
        """Return the last linear of the exit after each layer; see `_last_linear`."""
        if len(self.out) == 1:
            return [self._last_linear(1)] * self.depth
        return [_checked_linear(layer, out) for layer, out in enumerate(self.out, start=1)]

    def fused(self, layer: int, states: RowStates, memory: Mapping[str, Tensor], needs: str | None) -> FusedExit:
        """Compute the exit after a layer for inference, except its last linear, which the fused op computes.

        Args:
            layer: 1-based.
            states: the tokens after the layer.
            memory: of the previous layer.
            needs: the scalar that the criterion reads, or None; other scalars are not computed.
        """
        out = self._last_linear(layer)
        features, _ = self._features(layer, states)
        new_memory = self._new_memory(memory, features, states)
        aux = None if needs is None else self._scalar(needs, layer, features, memory, new_memory)
        # a mean is float32: rounding it to the dtype of the weight would differ from the full-depth pass
        dtype = torch.promote_types(features.dtype, out.weight.dtype)
        weight, bias = out.weight.to(dtype).contiguous(), out.bias.to(dtype)
        return FusedExit(features.to(dtype), weight, bias, aux, new_memory)

    def gate(self, layer: int, states: RowStates) -> Tensor:
        """Return the logits ``[B]`` of the probability to skip 1-based `layer`, from its input."""
        return self.gates[layer - 1](states)

    def project(self, layer: int, states: RowStates) -> Tensor:
        """Return the projections ``[T, P]`` of the input of 1-based `layer`."""
        return self.projectors[layer - 1](states.tokens)

    def _last_linear(self, layer: int) -> nn.Linear:
        """Return the last linear of the exit after 1-based `layer`; inference reads its weight without calling it.

        Raises:
            TypeError: it has been replaced by another kind of module.
        """
        return _checked_linear(layer, _module_for(layer, self.out))

    def _features(self, layer: int, states: RowStates) -> tuple[Tensor, Tensor | None]:
        """Return the input of the last linear ``[B, F]``, and the projected tokens of an attention exit."""
        if len(self.attention):
            return _module_for(layer, self.attention)(states)
        if not len(self.dense):
            vectors = pooled(states, self.config.reads)
            return vectors.to(states.hidden.dtype) if self.training else vectors, None
        if self.config.family_pooling == "late":
            each = self._after_dense(layer, states.tokens)
            return states.pool(each, "mean").to(each.dtype), None
        return self._after_dense(layer, pooled(states, self.config.reads).to(states.hidden.dtype)), None

    def _after_dense(self, layer: int, x: Tensor) -> Tensor:
        """Return the output of the dense module, its activation and its norm."""
        dense = _module_for(layer, self.dense)
        x = self.activation(dense(self._drop(x, dense) if self.config.dropout_before_dense else x))
        return _module_for(layer, self.norm)(x) if len(self.norm) else x

    def _new_memory(self, memory: Mapping[str, Tensor], features: Tensor, states: RowStates) -> dict[str, Tensor]:
        new = {"features": features} if "features" in memory else {}
        if "pooled" in memory:
            new["pooled"] = pooled(states, self.config.reads).float()
        return new

    def _drop(self, x: Tensor, reader: nn.Module) -> Tensor:
        """Apply dropout before a module, unless that module is in eval mode."""
        return F.dropout(x, self.config.dropout, reader.training)

    def _scalars(self, memory: Mapping[str, Tensor]) -> list[str]:
        """Return the scalars of a full-depth pass: the learned ones, and the cosine if the memory has pooled states."""
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
        head = _module_for(layer, self.halting)
        previous = memory.get("features")
        dtype = head.out.weight.dtype
        x = head.inputs(features.to(dtype), None if previous is None else previous.to(dtype))
        return head(self._drop(x, head))


def exit_logits(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the last linear in float32, as in the fused op: in half precision it can overflow."""
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(features.float(), weight.float(), bias.float())


def _checked_linear(layer: int, out: nn.Module) -> nn.Linear:
    if not isinstance(out, nn.Linear):
        raise TypeError(
            f"the exit after layer {layer}: expected torch.nn.Linear, got {type(out).__module__}."
            f"{type(out).__name__}; do not replace modules of the exits: quantize model.backbone only, and give "
            "PEFT modules_to_save=['heads'] to train them, or merge its adapters"
        )
    return out


def _bank(count: int, module: type[nn.Module], *arguments: Any) -> nn.ModuleList:
    return nn.ModuleList(module(*arguments) for _ in range(count))


def _module_for(layer: int, bank: nn.ModuleList) -> Any:
    """Return the module of 1-based `layer`: its own, or the one that all layers share."""
    return bank[0] if len(bank) == 1 else bank[layer - 1]
