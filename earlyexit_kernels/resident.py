"""The loop of which the host reads nothing: static buffers, and kernels that find the live count on the device.

    ids, mask -> pack -> embeddings -> [ layer -> exit -> settle -> move ] x L -> answers, in request order

Every shape is that of a bucket, so the launches are the same whatever the batch holds, and a CUDA graph can hold them
all. Hidden states have two sides (see `ops.resident_exit`); scratch starts at token 0 of the side that is live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.heads import ExitHeads
from earlyexit_kernels.layers import LayerWeights, hooked, why_not_all
from earlyexit_kernels.ops import (
    GATHER_ROWS_OPS,
    RESIDENT_EXITS,
    first_tokens_linear,
    rows_add_norm,
    rows_attention,
    rows_linear,
)
from earlyexit_kernels.packing import AttentionPlan, PackedStates
from earlyexit_kernels.types import read_aux

#: Tokens of a tile: rows move together where fewer tiles would be left.
TILE = 128
#: Activation of a dense module in an exit -> its name in `ops.rows_linear`.
DENSE_ACTIVATIONS = {"tanh": "tanh", "gelu": "gelu", "relu": "relu"}
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


@dataclass(frozen=True, order=True)
class Bucket:
    """What the buffers of a loop hold at most.

    Attributes:
        rows, length: R and S.
    """

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.length


@dataclass(frozen=True)
class Parts:
    """The parts of a model that the loop runs.

    Attributes:
        adapter, backbone: the encoder.
        heads: its exits.
        criterion: who may leave.
        classes: C.
    """

    adapter: BackboneAdapter
    backbone: Any
    heads: ExitHeads
    criterion: Criterion
    classes: int

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The L layers."""
        return self.adapter.layers(self.backbone)  # type: ignore[return-value]


def why_not_resident(parts: Parts, dtype: torch.dtype) -> str:
    """Empty where `ResidentLoop` can run a model, else what stands against it."""
    rule, shape = parts.criterion.exit_rule, parts.heads.config
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its kernels know float32, float16 and bfloat16, the model is {dtype}"
    if parts.criterion.skip_from is not None:
        return f"criterion {parts.criterion.name!r} skips layers, and the host has to know who runs one"
    if rule.uses_keys:
        return f"criterion {rule.name!r} draws by a row's tokens, which are hashed with help of the host"
    if shape.form != "linear":
        return "the exits attend to all tokens of a row"
    if shape.pooling == "mean" and (rule.needs is not None or shape.has_dense):
        return "the exits average the tokens for more than a linear"
    if shape.has_dense and shape.activation not in DENSE_ACTIVATIONS:
        return f"the activation of the exits is {shape.activation!r}, known are {sorted(DENSE_ACTIVATIONS)}"
    return why_not_all(parts.adapter, parts.layers) or _why_not_modules((parts.backbone, parts.heads), dtype)


def _why_not_modules(tops: Sequence[nn.Module], dtype: torch.dtype) -> str:
    """Empty where nothing about modules is lost in launches that know their weights alone."""
    modules = [module for top in tops for module in top.modules()]
    for module in modules:
        if hooked(module):
            return f"a module ({type(module).__name__}) has a forward hook, which would run once a graph"
    others = {x.dtype for module in modules for x in module.parameters(recurse=False)} - {dtype}
    return f"its kernels want weights of one dtype, {dtype}, some are {sorted(map(str, others))}" if others else ""


class ResidentLoop:
    """The buffers of one bucket, and the launches that fill them.

    `load` copies a batch in, `launch` runs it, `answers`, `exit_layer` and `counts` hold what came out; none of them
    waits for the device.

    Args:
        parts: of the model, of which `why_not_resident` has nothing to say.
        bucket: the largest batch.
        backend: of the ops.
        exit_backend: of the exits; only ``"cpp"`` sets conditional handles.

    Attributes:
        answers: ``[R, C]`` float32.
        exit_layer: ``[R]`` int64.
        counts: ``[L + 1, 4]`` int32: of the input the rows, their tokens, the rows whose first token is masked though
            they have others, and the tokens again; then of each exit what `ops.resident_exit` leaves.
        groups: the layers from one exit to the next; each group but the first may be put behind a node.
        handles: for each group, what the exit before it sets to whether rows are left; 0 for nothing to set.
    """

    # outside of inference mode a tensor made in it can't be written to
    @torch.inference_mode(False)
    def __init__(self, parts: Parts, bucket: Bucket, backend: str, exit_backend: str) -> None:
        self.parts, self.bucket, self.backend = parts, bucket, backend
        self.exit, self.move = RESIDENT_EXITS[exit_backend], GATHER_ROWS_OPS[exit_backend]
        config = parts.backbone.config
        weight = next(parts.backbone.parameters())
        device, dtype, width = weight.device, weight.dtype, config.hidden_size
        self.depth = len(parts.layers)
        made = {
            layer: [LayerWeights.of(part, parts.adapter.names, config.num_attention_heads) for part in each]
            for layer, each in ((layer, parts.adapter.parts(layer)) for layer in parts.layers)
        }
        self.weights = [made[layer] for layer in parts.layers]
        # launches know addresses: a graph reads them even where a parameter has been given other memory since
        self.held = [x.detach() for module in (parts.backbone, parts.heads) for x in module.parameters()]
        inner = max(own.tensors[6].shape[0] for each in self.weights for own in each)

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows, tokens = bucket.rows, bucket.tokens
        self.requests = ints(1)
        shape = (rows, bucket.length)
        self.ids, self.mask, self.positions, self.types = (ints(*shape, dtype=torch.int64) for _ in range(4))
        self.token_index = ints(tokens + 1, dtype=torch.int64)
        self.offsets, self.old_offsets = ints(rows + 1), ints(rows + 1)
        self.row_ids, self.source = ints(rows), ints(rows)
        self.hidden = floats(2 * tokens, width)
        self.qkv, self.context, self.middle, self.inner = (
            floats(tokens, size) for size in (3 * width, width, width, inner)
        )
        self.features = floats(rows, parts.heads.features_size)
        self.first_state = parts.criterion.exit_rule.new_state(rows, device, parts.classes)
        self.state = self.first_state.clone()
        self.answers = torch.zeros(rows, parts.classes, dtype=torch.float32, device=device)
        self.exit_layer = ints(rows, dtype=torch.int64)
        self.counts = ints(self.depth + 1, 4)
        rule = parts.criterion.exit_rule
        due = [layer for layer in range(1, self.depth + 1) if rule.is_due(layer, self.depth)]
        self.groups = [range(after + 1, layer + 1) for after, layer in zip((0, *due), due, strict=False)]
        self.handles = [0] * len(self.groups)
        self.linear = None if self._needs else parts.heads.linear_exits(dtype)
        self.memory: dict[str, Tensor] = {}

    @property
    def pools_first(self) -> bool:
        """Whether the exits read each row's first token."""
        return self.parts.heads.config.pooling != "mean"

    @property
    def _needs(self) -> str | None:
        return self.parts.criterion.exit_rule.needs

    def load(self, ids: Tensor, mask: Tensor | None, types: Tensor | None, positions: Tensor | None) -> None:
        """Copy a batch of at most the bucket's size in, ``[N, S]`` each as in the model's forward."""
        n, s = ids.shape
        self.requests.fill_(n)
        self.mask.zero_()
        self.mask[:n, :s] = 1 if mask is None else mask != 0
        self.ids[:n, :s] = ids
        if positions is None:
            positions = self.parts.adapter.positions(self.parts.backbone, ids)
        self.positions[:n, :s] = positions.expand(ids.shape)
        self.types[:n, :s] = 0 if types is None else types.expand(ids.shape)

    def launch(self, around: Callable[[int], AbstractContextManager[Any]] = lambda number: nullcontext()) -> None:
        """Run all layers on what is loaded.

        Args:
            around: what group k, from the second on, is run in: a graph's conditional node on ``handles[k]``.
        """
        with torch.no_grad():
            self._begin()
            for number, group in enumerate(self.groups):
                with around(number) if number else nullcontext():
                    for own in (own for layer in group for own in self.weights[layer - 1]):
                        self._encode(own)
                    self._leave(group[-1], (*self.handles, 0)[number + 1])

    def _begin(self) -> None:
        """Pack, embed, and put the state of the rows back to what it is before layer 1."""
        rows, tokens = self.bucket.rows, self.bucket.tokens
        number = torch.arange(rows, device=self.ids.device)
        real = number < self.requests
        keep = self.mask != 0
        first, empty = keep[:, 0], ~keep.any(dim=1)
        masked_first = (real & ~first & ~empty).sum()
        # a row without any token keeps its first
        first |= real & empty
        self.row_ids.copy_(torch.where(real, number, -1))
        self.offsets[1:] = keep.sum(dim=1).cumsum(0)
        self.offsets[0].zero_()
        flat = keep.flatten()
        place = torch.where(flat, flat.cumsum(0) - 1, tokens)
        self.token_index.zero_().scatter_(0, place, torch.arange(tokens, device=flat.device))
        ids, positions, types = (
            x.flatten().index_select(0, self.token_index[:tokens])[None] for x in (self.ids, self.positions, self.types)
        )
        self.hidden[:tokens] = self.parts.adapter.embed(self.parts.backbone, ids, positions, types)[0]
        self.state.copy_(self.first_state)
        self.counts.zero_()
        self.counts[0] = torch.stack((real.sum(), self.offsets[-1], masked_first, self.offsets[-1]))
        self.memory = {}
        if self._needs is not None:
            before = self.parts.heads.first_memory(self._states(), self._needs)
            # a last, spare row takes what rows that have left would write
            self.memory = {name: torch.cat((x, x.new_zeros(1, x.shape[1]))) for name, x in before.items()}

    def _encode(self, own: LayerWeights) -> None:
        """One encoder layer, on the side that is live."""
        qkv_w, qkv_b, out_w, out_b, norm1_w, norm1_b, inner_w, inner_b, outer_w, outer_b, norm2_w, norm2_b = own.tensors
        kind, variant = own.activation
        activation = _GELU[variant] if kind == "gelu" else kind
        offsets, backend, size = self.offsets, self.backend, inner_w.shape[0]
        inner = self.inner.view(-1)[: self.bucket.tokens * size].view(-1, size)
        rows_linear(self.hidden, qkv_w, qkv_b, offsets, self.qkv, absolute=True, backend=backend)
        rows_attention(self.qkv, offsets, self.row_ids, own.heads, self.bucket.length, self.context, backend=backend)
        rows_linear(self.context, out_w, out_b, offsets, self.middle, backend=backend)
        rows_add_norm(
            self.middle, self.hidden, norm1_w, norm1_b, own.eps[0], offsets, self.context,
            residual_absolute=True, backend=backend,
        )  # fmt: skip
        rows_linear(self.context, inner_w, inner_b, offsets, inner, activation=activation, backend=backend)
        rows_linear(inner, outer_w, outer_b, offsets, self.middle, backend=backend)
        rows_add_norm(
            self.middle, self.context, norm2_w, norm2_b, own.eps[1], offsets, self.hidden,
            out_absolute=True, backend=backend,
        )  # fmt: skip

    def _leave(self, layer: int, handle: int) -> None:
        """The exit of a layer, and the moves it makes worth their price."""
        rule = self.parts.criterion.exit_rule
        features, weight, bias, aux, pooling = self._head(layer)
        self.exit(
            features, weight, bias, None, aux, self.row_ids, self.offsets, self.old_offsets, self.source,
            self.counts[layer], self.state, self.answers, self.exit_layer, rule.name, rule.params(layer), pooling,
            layer, self.depth, TILE, self.bucket.tokens, handle,
        )  # fmt: skip
        if layer < self.depth:
            self.move(self.hidden, self.old_offsets, self.source, self.offsets, self.hidden)

    def _head(self, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None, str]:
        """What the exit reads, its last linear, the scalar its rule wants, and how it pools."""
        if self.linear is not None:
            return self.hidden, *self.linear.weights[layer - 1], None, self.linear.pooling
        heads, needs = self.parts.heads, self._needs
        if needs is None:
            dense, out = heads.dense_exit(layer)
            activation = DENSE_ACTIVATIONS[heads.config.activation]
            first_tokens_linear(
                self.hidden, dense.weight, dense.bias, self.offsets, self.row_ids, self.features,
                activation=activation, backend=self.backend,
            )  # fmt: skip
            return self.features, out.weight, out.bias, None, "none"
        slots = torch.where(self.row_ids < 0, self.bucket.rows, self.row_ids).long()
        memory = {name: x.index_select(0, slots) for name, x in self.memory.items()}
        features, weight, bias, aux, memory = heads.fused(layer, self._states(), memory, needs)
        for name, x in memory.items():
            self.memory[name].index_copy_(0, slots, x.to(self.memory[name].dtype))
        assert aux is not None
        return features.contiguous(), weight, bias, read_aux(aux, needs), "none"

    def _states(self) -> PackedStates:
        """The live side for exits that pool the first token; an absent row, which owns none, reads any."""
        return PackedStates(self.hidden, self.offsets.clamp(max=self.hidden.shape[0] - 1), AttentionPlan())
