"""The resident loop: static buffers, and kernels that read the live count on the device, so the host reads nothing.

    ids, mask -> pack -> embeddings -> [ layer -> exit -> plan -> move ] x L -> answers, in request order

All shapes are those of a bucket, so the launches do not depend on the batch and a CUDA graph can hold them. The buffers
of hidden states, and of what exits read, have two sides (see `ops.resident_exit`); other activations start at token 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import GatedLayerNames, LayerNames, column_positions
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.engine.attention_plan import AttentionPlan
from earlyexit_kernels.engine.exits import RequestExits
from earlyexit_kernels.engine.fused_layers import layers_unsupported_reason
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.layer_parts import hooked
from earlyexit_kernels.engine.resident_buffers import Activations, Arena, BatchBuffers, Bucket, RowBuffers
from earlyexit_kernels.engine.resident_embedding import embedding_of
from earlyexit_kernels.engine.resident_exits import exits_of, exits_unsupported_reason, exits_with_scalar
from earlyexit_kernels.engine.resident_postnorm import PostNormLayers
from earlyexit_kernels.engine.resident_prenorm import PreNormLayers
from earlyexit_kernels.engine.states import PackedStates
from earlyexit_kernels.engine.view import ModelView
from earlyexit_kernels.ops import bare_op, rows_linear
from earlyexit_kernels.ops.checks import FLOATS
from earlyexit_kernels.ops.exit_call import ResidentExitCall
from earlyexit_kernels.ops.resident_exit import COUNTS

#: Tokens per tile: rows are compacted if that leaves fewer tiles.
TILE_TOKENS = 128


class ResidentLayers(Protocol):
    """The layers of a model in the buffers of a loop.

    Attributes:
        x: the buffers: `x.hidden` is the input of each layer and moves between them, `x.read` is what exits read.
    """

    @property
    def x(self) -> Activations: ...

    def begin(self, embedded: Tensor) -> Callable[[int], None]:
        """Return a function that runs a 1-based layer on the live side; called with the embeddings ``[T, H]``."""


#: Class of `BackboneAdapter.names` -> the layers of that form.
LAYERS: dict[type, Any] = {LayerNames: PostNormLayers, GatedLayerNames: PreNormLayers}


def resident_unsupported_reason(view: ModelView, dtype: torch.dtype) -> str | None:
    """Return why `ResidentLoop` cannot run a model of this dtype, or None if it can."""
    rule = view.criterion.exit_rule
    if dtype not in FLOATS:
        return f"its kernels support float32, float16 and bfloat16, the model is {dtype}"
    if view.criterion.skip_from is not None:
        return f"criterion {view.criterion.name!r} skips layers, which the host decides"
    if rule.uses_keys:
        return f"criterion {rule.name!r} draws by a row's tokens, whose hash needs the host"
    return (
        _layers_unsupported_reason(view)
        or exits_unsupported_reason(view.heads.config, rule)
        or _unsupported_module(view.roots, dtype)
    )


def _layers_unsupported_reason(view: ModelView) -> str | None:
    """Return why the kernels would compute something else than the layers of a model, or None."""
    if reason := layers_unsupported_reason(view.adapter, view.backbone):
        return reason
    names = type(view.adapter.names)
    if names not in LAYERS:
        return f"its kernels do not support layers of {names.__name__}"
    return LAYERS[names].unsupported_reason(view)


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
    """Conditional nodes of a CUDA graph."""

    def handle(self) -> Any:
        """Return a number for an exit to set, which is 0 at the start of each replay, or None to read its counts."""

    def when(self, handle: Any, counts: Tensor, body: Callable[[], None]) -> None:
        """Run `body` if rows are live after an exit.

        Args:
            handle: that the exit sets, or None.
            counts: ``[6]`` of the exit; all 0 if it did not run.
            body: launches.
        """


class ResidentLoop:
    """The buffers of one bucket, and the launches that fill them.

    `load` copies a batch in and `launch` runs it; then `answers`, `exit_layer` and `counts` hold the results. None of
    them synchronises with the device.

    Args:
        view: of a model that `resident_unsupported_reason` supports.
        bucket: maximum size of a batch.
        backend: of the ops.
        exit_backend: of the exits; only ``"cpp"`` sets conditional handles.
        arena: memory that loops share which never run at the same time, or None for memory of its own.

    Attributes:
        counts: ``[L + 1, 8]`` int32: first the counts of `ops.pack_tokens`, then for each layer those of
            `ops.resident_exit`.
        embedded: ``[T, E]``, the embeddings: the first side of the hidden states, or a buffer of their own where they
            are narrower.
        groups: the layers from one exit to the next; each group but the first can be put into a conditional node.
    """

    # tensors made in inference mode could not be written to outside of it
    @torch.inference_mode(False)
    def __init__(
        self, view: ModelView, bucket: Bucket, backend: str, exit_backend: str, arena: Arena | None = None
    ) -> None:
        self.view, self.bucket, self.backend = view, bucket, backend
        weight = next(view.backbone.parameters())
        self.device = weight.device
        self.rule, self.depth = view.criterion.exit_rule, len(view.layers)
        self.pack = bare_op("pack_tokens", backend, self.device)
        self.exit = bare_op("resident_exit", exit_backend, self.device)
        self.move = bare_op("gather_rows", exit_backend, self.device)
        self.widen = view.adapter.widen(view.backbone)
        # launches hold addresses: a graph reads them even after a parameter was given other memory
        self.held = [x.detach() for module in view.roots for x in (*module.parameters(), *module.buffers())]
        self.batch, self.rows = BatchBuffers.new(bucket, self.device), RowBuffers.new(bucket, self.device)
        self.layers: ResidentLayers = LAYERS[type(view.adapter.names)].of(view, bucket, self.rows, backend, arena)
        self.activations = self.layers.x
        self.request = RequestExits.new(
            self.rule, rows=bucket.rows, classes=view.classes, depth=self.depth, device=self.device
        )
        self.first_state = self.request.state[:, 0].clone()
        self.counts = torch.zeros(self.depth + 1, COUNTS, dtype=torch.int32, device=self.device)
        self.groups = _groups(self.rule, self.depth)
        self.source = exits_of(view.heads, self.activations, backend)
        self.first_side = self.embedded = self.activations.hidden[: bucket.tokens]
        if self.widen is not None:
            self.embedded = self.first_side.new_zeros(bucket.tokens, self.widen.weight.shape[1])
        self.embed = embedding_of(view, self.rows, self.embedded, backend)

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
                if nodes is None or group is self.groups[0]:
                    body()
                else:
                    nodes.when(handle, self.counts[group[0] - 1], body)
                handle = after

    def _run(self, group: range, handle: int | None) -> None:
        """Run a group of layers and its exit, which sets a handle, if there is one, to whether rows are live."""
        for layer in group:
            self.run_layer(layer)
        self._leave(group[-1], handle)

    def _begin(self) -> None:
        """Pack and embed the tokens, and reset the counts and the state of the rows."""
        batch, rows, view, first_side = self.batch, self.rows, self.view, self.first_side
        self.pack(
            batch.size, batch.ids, batch.mask, batch.positions, batch.types, rows.found, rows.row_ids, rows.offsets,
            rows.tokens, self.counts.view(-1), self.first_state, self.request.state,
        )  # fmt: skip
        self.embed()
        if self.widen is not None:
            weight, bias = self.widen.weight, self.widen.bias
            rows_linear(self.embedded, weight, bias, rows.offsets, first_side, backend=self.backend)
        self.run_layer = self.layers.begin(self.embedded)
        if self.rule.needs is not None:
            first = PackedStates(self.activations.hidden, rows.offsets, AttentionPlan(), view.exit_norm)
            self.source = exits_with_scalar(view.heads, self.rule.needs, first)

    def _leave(self, layer: int, handle: int | None) -> None:
        """Run the exit of a layer, and move the live rows as planned."""
        rows, hidden = self.rows, self.activations.hidden
        inputs = self.source(layer, PackedStates(self.activations.read, rows.offsets, AttentionPlan()), rows.row_ids)
        call = self.request.call(layer, inputs, rows.row_ids, rows.offsets)._asdict()
        self.exit(
            *ResidentExitCall(
                **call, old_offsets=rows.old_offsets, source=rows.source, counts=self.counts[layer], tile=TILE_TOKENS,
                capacity=self.bucket.tokens, handle=handle,
            )
        )  # fmt: skip
        if layer < self.depth and self.bucket.rows > 1:  # a single row is never moved: it stays, or nothing is left
            self.move(hidden, rows.old_offsets, rows.source, rows.offsets, hidden)


def _groups(rule: Criterion, depth: int) -> list[range]:
    """Return the layers from one due exit to the next."""
    due = [layer for layer in range(1, depth + 1) if rule.is_due(layer, depth)]
    return [range(after + 1, layer + 1) for after, layer in zip((0, *due), due, strict=False)]
