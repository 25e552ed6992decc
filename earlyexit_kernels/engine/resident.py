"""The loop of which the host reads nothing: static buffers, and kernels that find the live count on the device.

    ids, mask -> pack -> embeddings -> [ layer -> exit -> settle -> move ] x L -> answers, in request order

Every shape is that of a bucket, so the launches are the same whatever the batch holds, and a CUDA graph can hold them
all. Hidden states have two sides (see `ops.resident_exit`); scratch starts at token 0 of the side that is live.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter, column_positions
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.engine.fused_layers import LayerWeights, hooked, why_not_all
from earlyexit_kernels.engine.packing import AttentionPlan, PackedStates
from earlyexit_kernels.heads import ExitHeads
from earlyexit_kernels.ops import (
    GATHER_ROWS_OPS,
    PACK_TOKENS_OPS,
    RESIDENT_EXITS,
    first_tokens_linear,
    rows_add_norm,
    rows_attention,
    rows_linear,
)
from earlyexit_kernels.types import read_aux

#: Tokens of a tile: rows move together where fewer tiles would be left.
TILE = 128
#: Rows that exits of more than a linear are given at a time, in every bucket: a library's products round by their size.
EXIT_ROWS = 128
#: Activations of a dense module in an exit that the kernels have.
DENSE_ACTIVATIONS = ("gelu", "relu", "tanh")
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
    def roots(self) -> tuple[nn.Module, nn.Module]:
        """The modules whose weights the loop reads."""
        return self.backbone, self.heads

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
        return f"the activation of the exits is {shape.activation!r}, known are {DENSE_ACTIVATIONS}"
    return why_not_all(parts.adapter, parts.layers) or _why_not_modules((parts.backbone, parts.heads), dtype)


def _why_not_modules(tops: Sequence[nn.Module], dtype: torch.dtype) -> str:
    """Empty where nothing about modules is lost in launches that know their weights alone."""
    modules = [module for top in tops for module in top.modules()]
    for module in modules:
        if hooked(module):
            return f"a module ({type(module).__name__}) has a forward hook, which would run once a graph"
    weights = [x for module in modules for x in module.parameters(recurse=False)]
    if not all(x.is_contiguous() for x in weights):
        return "some weights aren't contiguous; a graph reads weights in place"
    others = {x.dtype for x in weights} - {dtype}
    return f"its kernels want weights of one dtype, {dtype}, some are {sorted(map(str, others))}" if others else ""


class Nodes(Protocol):
    """What a CUDA graph runs or not by itself. A handle is a number that kernels set and nodes go by."""

    @property
    def repeats(self) -> bool:
        """Whether `repeat` and `take_turns` can be had."""

    def handle(self, first: int = 0) -> int:
        """A new one, which starts with `first` at each replay."""

    def when(self, handle: int, body: Callable[[], None]) -> None:
        """Run `body` where the handle isn't 0."""

    def repeat(self, handle: int, body: Callable[[], None]) -> None:
        """Run `body` as long as the handle isn't 0."""

    def take_turns(self, turn: Tensor, again: int, bodies: Sequence[Callable[[], None]]) -> None:
        """Run the body of this `turn`, count that ``[1]`` int32 up, and set `again` to whether there are more."""


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
    """

    # outside of inference mode a tensor made in it can't be written to
    @torch.inference_mode(False)
    def __init__(self, parts: Parts, bucket: Bucket, backend: str, exit_backend: str) -> None:
        self.parts, self.bucket, self.backend = parts, bucket, backend
        self.pack = PACK_TOKENS_OPS[backend]
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
        inner = max(own.inner.weight.shape[0] for each in self.weights for own in each)

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        def floats(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        rows, tokens = bucket.rows, bucket.tokens
        self.batch = ints(5)
        shape = (rows, bucket.length)
        self.ids, self.mask, self.positions, self.types = (ints(*shape, dtype=torch.int64) for _ in range(4))
        self.found, self.tokens = ints(2, rows), ints(3, tokens, dtype=torch.int64)
        self.offsets, self.old_offsets = ints(rows + 1), ints(rows + 1)
        self.row_ids, self.source = ints(rows), ints(rows)
        self.hidden = floats(2 * tokens, width)
        self.qkv, self.context, self.middle, self.inner = (
            floats(tokens, size) for size in (3 * width, width, width, inner)
        )
        self.features = floats(rows, parts.heads.features_size)
        self.widen = parts.adapter.widen(parts.backbone)
        self.first_state = parts.criterion.exit_rule.new_state(rows, device, parts.classes)
        self.state = self.first_state.clone()
        self.answers = torch.zeros(rows, parts.classes, dtype=torch.float32, device=device)
        self.exit_layer = ints(rows, dtype=torch.int64)
        self.counts = ints(self.depth + 1, 4)
        rule = parts.criterion.exit_rule
        due = [layer for layer in range(1, self.depth + 1) if rule.is_due(layer, self.depth)]
        self.groups = [range(after + 1, layer + 1) for after, layer in zip((0, *due), due, strict=False)]
        self.turn = ints(1)
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
        adapter = self.parts.adapter
        if positions is None and adapter.positions is not column_positions:
            positions = adapter.positions(self.parts.backbone, ids)
        given = [x is not None for x in (mask, positions, types)]
        sizes = torch.tensor([n, s, *given], dtype=torch.int32, pin_memory=ids.is_cuda)
        self.batch.copy_(sizes, non_blocking=True)
        self.ids[:n, :s] = ids
        if mask is not None:
            torch.ne(mask.expand(ids.shape), 0, out=self.mask[:n, :s])
        for own, x in ((self.positions, positions), (self.types, types)):
            if x is not None:
                own[:n, :s] = x.expand(ids.shape)

    @property
    def is_one_group(self) -> bool:
        """Whether all groups run the same weights equally often, as in an ALBERT whose layers are one."""
        same = all(each is self.weights[0] for each in self.weights)
        return same and len({len(group) for group in self.groups}) == 1 < len(self.groups)

    def launch(self, nodes: Nodes | None = None) -> None:
        """Run all layers on what is loaded.

        Args:
            nodes: of the graph that captures this. Groups of layers run only where rows are left: each but the first
                in a node of its own, or all in one that repeats, where they are the same.
        """
        with torch.no_grad():
            self._begin()
            if nodes is not None and nodes.repeats and self.is_one_group:
                self._repeat(nodes)
                return
            handle = 0
            for group in self.groups:
                after = nodes.handle() if nodes is not None and group is not self.groups[-1] else 0
                body = partial(self._run, group, after)
                if nodes is not None and handle:
                    nodes.when(handle, body)
                else:
                    body()
                handle = after

    def _run(self, group: range, handle: int) -> None:
        """Layers and the exit behind them, which sets a handle to whether rows are left."""
        self._encode_all(group)
        self._leave(group[-1], handle)

    def _repeat(self, nodes: Nodes) -> None:
        """All groups as the turns of one loop; only the exits differ."""
        again = nodes.handle(1)
        *early, last = self.groups
        # after the last turn there is none whatever its exit finds
        exits = [*(partial(self._leave, group[-1], again) for group in early), partial(self._leave, last[-1], 0)]

        def body() -> None:
            self._encode_all(last)
            nodes.take_turns(self.turn, again, exits)

        self.turn.zero_()
        nodes.repeat(again, body)

    def _begin(self) -> None:
        """Pack, embed, and put the state of the rows back to what it is before layer 1."""
        self.counts.zero_()
        self.pack(
            self.batch, self.ids, self.mask, self.positions, self.types,
            self.found, self.row_ids, self.offsets, self.tokens, self.counts[0],
        )  # fmt: skip
        ids, positions, types = self.tokens[:, None]
        embedded = self.parts.adapter.embed(self.parts.backbone, ids, positions, types)[0]
        first_side = self.hidden[: self.bucket.tokens]
        if self.widen is None:
            first_side.copy_(embedded)
        else:
            weight, bias = self.widen.weight, self.widen.bias
            rows_linear(embedded, weight, bias, self.offsets, first_side, backend=self.backend)
        self.state.copy_(self.first_state)
        self.memory = {}
        if self._needs is not None:
            before = self.parts.heads.first_memory(self._states(), self._needs)
            # a last, spare row takes what rows that have left would write
            self.memory = {name: torch.cat((x, x.new_zeros(1, x.shape[1]))) for name, x in before.items()}

    def _encode_all(self, group: range) -> None:
        for own in (own for layer in group for own in self.weights[layer - 1]):
            self._encode(own)

    def _encode(self, own: LayerWeights) -> None:
        """One encoder layer, on the side that is live."""
        kind, variant = own.activation
        activation = _GELU[variant] if kind == "gelu" else kind
        offsets, backend, size = self.offsets, self.backend, own.inner.weight.shape[0]
        inner = self.inner.view(-1)[: self.bucket.tokens * size].view(-1, size)
        weights, biases = zip(*own.projections, strict=True)
        rows_linear(self.hidden, weights, biases, offsets, self.qkv, absolute=True, backend=backend)
        rows_attention(self.qkv, offsets, self.row_ids, own.heads, self.bucket.length, self.context, backend=backend)
        rows_linear(self.context, *own.attention_out, offsets, self.middle, backend=backend)
        rows_add_norm(
            self.middle, self.hidden, *own.attention_norm, own.eps[0], offsets, self.context,
            residual_absolute=True, backend=backend,
        )  # fmt: skip
        rows_linear(self.context, *own.inner, offsets, inner, activation=activation, backend=backend)
        rows_linear(inner, *own.outer, offsets, self.middle, backend=backend)
        rows_add_norm(
            self.middle, self.context, *own.norm, own.eps[1], offsets, self.hidden,
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
            first_tokens_linear(
                self.hidden, dense.weight, dense.bias, self.offsets, self.row_ids, self.features,
                activation=heads.config.activation, backend=self.backend,
            )  # fmt: skip
            return self.features, out.weight, out.bias, None, "none"
        return *self._exit_of_modules(layer, needs), "none"

    def _exit_of_modules(self, layer: int, needs: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The features, linear and scalar of an exit that torch's own modules compute."""
        rows = self.bucket.rows
        extra = -rows % EXIT_ROWS
        slots = F.pad(torch.where(self.row_ids < 0, rows, self.row_ids).long(), (0, extra), value=rows)
        hidden, offsets, plan = self._states()
        offsets = F.pad(offsets, (0, extra))
        exits = []
        for start in range(0, rows, EXIT_ROWS):
            own = slots[start : start + EXIT_ROWS]
            states = PackedStates(hidden, offsets[start : start + EXIT_ROWS + 1], plan)
            memory = {name: x.index_select(0, own) for name, x in self.memory.items()}
            features, weight, bias, aux, memory = self.parts.heads.fused(layer, states, memory, needs)
            for name, x in memory.items():
                self.memory[name].index_copy_(0, own, x.to(self.memory[name].dtype))
            assert aux is not None
            exits.append((features, read_aux(aux, needs)))
        features, scalars = (torch.cat(x)[:rows] for x in zip(*exits, strict=True))
        return features, weight, bias, scalars

    def _states(self) -> PackedStates:
        """The live side for exits that pool the first token; an absent row, which owns none, reads any."""
        return PackedStates(self.hidden, self.offsets.clamp(max=self.hidden.shape[0] - 1), AttentionPlan())
