"""The resident loop: static buffers, and kernels that read the live count on the device, so the host reads nothing.

    ids, mask -> pack -> embeddings -> [ layer -> exit -> plan -> move ] x L -> answers, in request order

All shapes are those of a bucket, so the launches do not depend on the batch and a CUDA graph can hold them. The buffer
of hidden states has two sides (see `ops.resident_exit`); other activations start at token 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_kernels.backbones import column_positions
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.engine.attention_plan import AttentionPlan
from earlyexit_kernels.engine.exits import ExitInputs, ExitMemory, ExitSource, LinearSource, ModuleSource, RequestExits
from earlyexit_kernels.engine.fused_layers import LayerWeights, Pair, hooked, layers_unsupported_reason
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.resident_buffers import Activations, BatchBuffers, Bucket, RowBuffers
from earlyexit_kernels.engine.states import PackedStates
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.heads import ExitHeads
from earlyexit_kernels.ops import bare_op, first_tokens_linear, rows_add_norm, rows_attention, rows_linear
from earlyexit_kernels.ops.checks import FLOATS
from earlyexit_kernels.ops.exit_call import ResidentExitCall
from earlyexit_kernels.ops.resident_exit import COUNTS

#: Tokens per tile: rows are compacted if that leaves fewer tiles.
TILE_TOKENS = 128
#: Rows per call of exits that torch modules compute, in every bucket: a library's products round depending on the size.
EXIT_ROWS = 128
#: Activations of a dense module in an exit that the kernels support.
DENSE_ACTIVATIONS = ("gelu", "relu", "tanh")
_GELU = {"none": "gelu", "tanh": "gelu_tanh"}


def resident_unsupported_reason(view: ModelView, dtype: torch.dtype) -> str | None:
    """Return why `ResidentLoop` cannot run a model of this dtype, or None if it can."""
    rule, shape = view.criterion.exit_rule, view.heads.config
    if dtype not in FLOATS:
        return f"its kernels support float32, float16 and bfloat16, the model is {dtype}"
    if view.criterion.skip_from is not None:
        return f"criterion {view.criterion.name!r} skips layers, which the host decides"
    if rule.uses_keys:
        return f"criterion {rule.name!r} draws by a row's tokens, whose hash needs the host"
    if view.exit_norm is not None:
        return "the exits read the tokens through the norm at the end of the encoder"
    if shape.form != "linear":
        return "the exits attend to all tokens of a row"
    if shape.reads == "mean" and (rule.needs is not None or shape.has_dense):
        return "the exits apply more than a linear layer to the mean of the tokens"
    if shape.has_dense and shape.activation not in DENSE_ACTIVATIONS:
        return f"the activation of the exits is {shape.activation!r}, supported are {DENSE_ACTIVATIONS}"
    return layers_unsupported_reason(view.adapter, view.layers) or _unsupported_module(view.roots, dtype)


def _unsupported_module(roots: Sequence[nn.Module], dtype: torch.dtype) -> str | None:
    """Return why launches that know only the weights of these modules would compute something else, or None."""
    modules = [module for root in roots for module in root.modules()]
    for module in modules:
        if hooked(module):
            return f"a module ({type(module).__name__}) has a forward hook, which would run once per capture"
    weights = [x for module in modules for x in module.parameters(recurse=False)]
    if not all(x.is_contiguous() for x in weights):
        return "some weights are not contiguous; a graph reads weights in place"
    others = {x.dtype for x in weights} - {dtype}
    return f"its kernels require weights of one dtype, {dtype}, some are {sorted(map(str, others))}" if others else None


class Nodes(Protocol):
    """Conditional nodes of a CUDA graph. A handle is a number that kernels set and nodes test."""

    def handle(self) -> int:
        """Return a new handle, which is 0 at the start of each replay."""

    def when(self, handle: int, body: Callable[[], None]) -> None:
        """Run `body` if the handle is not 0."""


@dataclass(frozen=True)
class DenseSource:
    """Exits of a dense module on the first token and a last linear, computed by `ops.first_tokens_linear`.

    Attributes:
        heads: the exits.
        features: ``[R, F]`` buffer.
        backend: of the op.
    """

    heads: ExitHeads
    features: Tensor
    backend: str

    def __call__(self, layer: int, states: Any, row_ids: Tensor) -> ExitInputs:
        dense, out = self.heads.dense_exit(layer)
        first_tokens_linear(
            states.hidden, dense.weight, dense.bias, states.offsets, row_ids, self.features,
            activation=self.heads.config.activation, backend=self.backend,
        )  # fmt: skip
        return ExitInputs(self.features, out.weight, out.bias, None, None, "none")


@dataclass(frozen=True)
class ChunkedSource:
    """Exits that torch modules compute from the first tokens, on `EXIT_ROWS` rows per call."""

    source: ModuleSource

    def __call__(self, layer: int, states: Any, row_ids: Tensor) -> ExitInputs:
        rows = row_ids.shape[0]
        extra = -rows % EXIT_ROWS
        row_ids, offsets = F.pad(row_ids, (0, extra), value=-1), F.pad(_readable(states).offsets, (0, extra))
        parts: list[Any] = []
        for start in range(0, rows, EXIT_ROWS):
            own = states._replace(offsets=offsets[start : start + EXIT_ROWS + 1])
            parts.append(self.source(layer, own, row_ids[start : start + EXIT_ROWS]))
        hidden, aux = (torch.cat([getattr(part, name) for part in parts])[:rows] for name in ("hidden", "aux"))
        return parts[0]._replace(hidden=hidden, aux=aux)


def _readable(states: PackedStates) -> PackedStates:
    """Return states in which every row has a first token to read; rows without tokens read any."""
    return states._replace(offsets=states.offsets.clamp(max=states.hidden.shape[0] - 1))


class ResidentLoop:
    """The buffers of one bucket, and the launches that fill them.

    `load` copies a batch in and `launch` runs it; then `answers`, `exit_layer` and `counts` hold the results. None of
    them synchronises with the device.

    Args:
        view: of a model that `resident_unsupported_reason` supports.
        bucket: maximum size of a batch.
        backend: of the ops.
        exit_backend: of the exits; only ``"cpp"`` sets conditional handles.

    Attributes:
        counts: ``[L + 1, 6]`` int32: first the counts of `ops.pack_tokens`, then for each layer those of
            `ops.resident_exit`.
        groups: the layers from one exit to the next; each group but the first can be put into a conditional node.
    """

    # tensors made in inference mode could not be written to outside of it
    @torch.inference_mode(False)
    def __init__(self, view: ModelView, bucket: Bucket, backend: str, exit_backend: str) -> None:
        self.view, self.bucket, self.backend = view, bucket, backend
        weight = next(view.backbone.parameters())
        self.device = weight.device
        self.rule, self.depth = view.criterion.exit_rule, len(view.layers)
        self.pack = bare_op("pack_tokens", backend, self.device.type)
        self.exit = bare_op("resident_exit", exit_backend, self.device.type)
        self.move = bare_op("gather_rows", exit_backend, self.device.type)
        self.weights = _layer_weights(view)
        self.widen = view.adapter.widen(view.backbone)
        # launches hold addresses: a graph reads them even after a parameter was given other memory
        self.held = [x.detach() for module in view.roots for x in module.parameters()]
        self.batch, self.rows = BatchBuffers.new(bucket, self.device), RowBuffers.new(bucket, self.device)
        self.activations = Activations.new(
            bucket,
            width=view.backbone.config.hidden_size,
            inner=max(own.inner.weight.shape[0] for each in self.weights for own in each),
            features=view.heads.features_size,
            dtype=weight.dtype,
            device=weight.device,
        )
        self.request = RequestExits.new(
            self.rule, rows=bucket.rows, classes=view.classes, depth=self.depth, device=self.device
        )
        self.first_state = self.request.state.clone()
        self.counts = torch.zeros(self.depth + 1, COUNTS, dtype=torch.int32, device=self.device)
        self.groups = _groups(self.rule, self.depth)
        self.source = self._kernel_source()

    @property
    def answers(self) -> Tensor:
        """``[R, C]`` float32."""
        return self.request.answers

    @property
    def exit_layer(self) -> Tensor:
        """``[R]`` int64."""
        return self.request.exit_layer

    @property
    def pools_first(self) -> bool:
        """Whether the exits read the first token of each row."""
        return self.view.heads.config.reads == "first"

    def load(self, inputs: Inputs) -> None:
        """Copy a batch, at most as large as the bucket, into the buffers."""
        ids, mask, types, positions = inputs
        n, s = ids.shape
        adapter, batch = self.view.adapter, self.batch
        if positions is None and adapter.positions is not column_positions:
            positions = adapter.positions(self.view.backbone, ids)
        given = [x is not None for x in (mask, positions, types)]
        size = torch.tensor([n, s, *given], dtype=torch.int32, pin_memory=ids.is_cuda)
        batch.size.copy_(size, non_blocking=True)
        batch.ids[:n, :s] = ids
        if mask is not None:
            torch.ne(mask.expand(ids.shape), 0, out=batch.mask[:n, :s])
        for own, x in ((batch.positions, positions), (batch.types, types)):
            if x is not None:
                own[:n, :s] = x.expand(ids.shape)

    def launch(self, nodes: Nodes | None = None) -> None:
        """Run all layers on the loaded batch.

        Args:
            nodes: of the graph that captures this. Each group of layers but the first is then in a node, which runs if
                rows are live.
        """
        with torch.no_grad():
            self._begin()
            handle = None
            for group in self.groups:
                after = nodes.handle() if nodes is not None and group is not self.groups[-1] else None
                body = partial(self._run, group, after)
                if nodes is not None and handle is not None:
                    nodes.when(handle, body)
                else:
                    body()
                handle = after

    def _run(self, group: range, handle: int | None) -> None:
        """Run a group of layers and its exit, which sets a handle, if there is one, to whether rows are live."""
        for layer in group:
            for own in self.weights[layer - 1]:
                self._encode(own)
        self._leave(group[-1], handle)

    def _begin(self) -> None:
        """Pack and embed the tokens, and reset the state of the rows."""
        batch, rows, view = self.batch, self.rows, self.view
        self.counts.zero_()
        self.pack(
            batch.size, batch.ids, batch.mask, batch.positions, batch.types,
            rows.found, rows.row_ids, rows.offsets, rows.tokens, self.counts[0, :4],
        )  # fmt: skip
        ids, positions, types = rows.tokens[:, None]
        embedded = view.adapter.embed(view.backbone, ids, positions, types)[0]
        first_side = self.activations.hidden[: self.bucket.tokens]
        if self.widen is None:
            first_side.copy_(embedded)
        else:
            weight, bias = self.widen.weight, self.widen.bias
            rows_linear(embedded, weight, bias, rows.offsets, first_side, backend=self.backend)
        self.request.state.copy_(self.first_state)
        if self.rule.needs is not None:
            memory = ExitMemory(view.heads.first_memory(_readable(self._states()), self.rule.needs))
            self.source = ChunkedSource(ModuleSource(view.heads, self.rule.needs, memory))

    def _encode(self, own: LayerWeights) -> None:
        """Run one encoder layer on the live side."""
        kind, variant = own.activation
        activation = _GELU[variant] if kind == "gelu" else kind
        x, rows, backend, size = self.activations, self.rows, self.backend, own.inner.weight.shape[0]
        offsets, inner = rows.offsets, x.inner.view(-1)[: self.bucket.tokens * size].view(-1, size)
        weights, biases = zip(*own.projections, strict=True)
        rows_linear(x.hidden, weights, biases, offsets, x.qkv, absolute=True, backend=backend)
        rows_attention(x.qkv, offsets, rows.row_ids, own.heads, self.bucket.length, x.context, backend=backend)
        first, second = own.eps
        self._add_norm(x.context, own.attention_out, x.hidden, own.attention_norm, first, x.context)
        rows_linear(x.context, *own.inner, offsets, inner, activation=activation, backend=backend)
        self._add_norm(inner, own.outer, x.context, own.norm, second, x.hidden)

    def _add_norm(self, x: Tensor, linear: Pair, residual: Tensor, norm: Pair, eps: float, out: Tensor) -> None:
        """Write the norm of a residual and a linear of `x`; `hidden` starts at its live side."""
        offsets, middle, hidden = self.rows.offsets, self.activations.middle, self.activations.hidden
        rows_linear(x, *linear, offsets, middle, in_parts=True, backend=self.backend)
        rows_add_norm(
            middle, residual, *norm, eps, offsets, out, x_bias=linear.bias if middle.dim() == 3 else None,
            residual_absolute=residual is hidden, out_absolute=out is hidden, backend=self.backend,
        )  # fmt: skip

    def _leave(self, layer: int, handle: int | None) -> None:
        """Run the exit of a layer, and move the live rows as planned."""
        rows, hidden = self.rows, self.activations.hidden
        inputs = self.source(layer, self._states(), rows.row_ids)
        call = self.request.call(layer, inputs, rows.row_ids, rows.offsets)._asdict()
        self.exit(
            *ResidentExitCall(
                **call, old_offsets=rows.old_offsets, source=rows.source, counts=self.counts[layer], tile=TILE_TOKENS,
                capacity=self.bucket.tokens, handle=handle,
            )
        )  # fmt: skip
        if layer < self.depth and self.bucket.rows > 1:  # a single row is never moved: it stays, or nothing is left
            self.move(hidden, rows.old_offsets, rows.source, rows.offsets, hidden)

    def _kernel_source(self) -> ExitSource:
        """Return the source of exits that the kernels compute; `_begin` replaces it for a rule that needs a scalar."""
        heads, x = self.view.heads, self.activations
        linear = heads.linear_exits(x.hidden.dtype)
        return DenseSource(heads, x.features, self.backend) if linear is None else LinearSource(linear)

    def _states(self) -> PackedStates:
        return PackedStates(self.activations.hidden, self.rows.offsets, AttentionPlan())


def _layer_weights(view: ModelView) -> list[list[LayerWeights]]:
    """Return the weights of each layer, one list per distinct layer; a layer of ALBERT may have several parts."""
    names, heads = view.adapter.names, view.backbone.config.num_attention_heads
    layers = view.layers
    made = {
        layer: [LayerWeights.of(part, names, heads) for part in view.adapter.parts(layer)]
        for layer in dict.fromkeys(layers)
    }
    return [made[layer] for layer in layers]


def _groups(rule: Criterion, depth: int) -> list[range]:
    """Return the layers from one due exit to the next."""
    due = [layer for layer in range(1, depth + 1) if rule.is_due(layer, depth)]
    return [range(after + 1, layer + 1) for after, layer in zip((0, *due), due, strict=False)]
