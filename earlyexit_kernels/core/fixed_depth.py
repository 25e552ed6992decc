"""The fixed-depth mode: a forward pass without data-dependent shapes or control flow.

    ids, mask -> embeddings -> [ gate? -> layer -> exit -> rule ] x L -> answers, on all rows

Rows stay padded. A row that has left keeps its answer and still runs all layers; a row that skips a layer keeps its
hidden state. The rules run in torch, so that an exported program contains only torch ops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter
from earlyexit_kernels.core.attention_plan import PaddedPlan
from earlyexit_kernels.core.calls import hidden_of
from earlyexit_kernels.core.exits import read_exit
from earlyexit_kernels.core.inputs import check_inputs
from earlyexit_kernels.core.packing import last_kept, up_to_last
from earlyexit_kernels.core.view import Inputs, embedding_weight
from earlyexit_kernels.criteria import Criterion, torch_step
from earlyexit_kernels.hashing import token_keys
from earlyexit_kernels.heads import ExitHeads, exit_logits
from earlyexit_kernels.ops.exit_step import valid_rows
from earlyexit_kernels.types import normed


class PaddedStates(NamedTuple):
    """Hidden states ``[N, S, H]`` of padded rows, and the kept tokens ``[N, S]``, None for all; a `types.RowStates`."""

    hidden: Tensor
    keep: Tensor | None
    norm: Callable[[Tensor], Tensor] | None = None

    @property
    def tokens(self) -> Tensor:
        """``[N, S, H]`` after the norm."""
        return normed(self.norm, self.hidden)

    @property
    def rows(self) -> int:
        """N."""
        return self.hidden.shape[0]

    def pool(self, tokens: Tensor, pooling: str) -> Tensor:
        """Return one vector ``[N, F]`` per row of tokens ``[N, S, F]``, as in `RowStates`."""
        if pooling == "first":
            return tokens[:, 0]
        if pooling == "last":
            return tokens[:, -1] if self.keep is None else _at(tokens, last_kept(self.keep))
        if self.keep is None:
            return tokens.float().mean(dim=1)
        kept = self.keep[:, :, None]
        return torch.where(kept, tokens.float(), 0.0).sum(dim=1) / kept.sum(dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Return attention within each row, over and to ``[N, S, heads, D]``."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        mask = None if self.keep is None else self.keep[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).transpose(1, 2)


class ExitState(NamedTuple):
    """What the exits of the layers so far have computed for each row.

    Attributes:
        state: ``[K, N]`` float32, of the rule.
        memory: of the exits, ``[N, F]`` by name.
        answers: ``[N, C]`` float32.
        exit_layer: ``[N]`` int64, 0 for rows that have not left.
    """

    state: Tensor
    memory: dict[str, Tensor]
    answers: Tensor
    exit_layer: Tensor


class FixedDepth(nn.Module):
    """The answers and exit layers of a model from a pass of fixed shape; `model.fixed_depth()` builds it.

    Unlike the model it cannot check values: ids outside of the vocabulary are not refused, invalid logits are not
    counted, and if the first token of a row is masked, the exits read the first one that is not.

    Args:
        adapter, backbone, heads: of the model; parameters are shared and have the same names.
        criterion: decides which rows leave, and which layers they skip. A new criterion requires a new `fixed_depth()`.
        classes: C.

    Raises:
        RuntimeError: the modules are in train mode.
    """

    def __init__(
        self, adapter: BackboneAdapter, backbone: nn.Module, heads: ExitHeads, criterion: Criterion, classes: int
    ) -> None:
        super().__init__()
        self.adapter, self.criterion, self.classes = adapter, criterion, classes
        self.backbone: Any = backbone
        self.heads = heads
        self.training = False
        self._check_mode()

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Classify a batch.

        Args:
            input_ids, attention_mask, token_type_ids, position_ids: as for the model.

        Returns:
            logits ``[N, C]`` float32 and exit_layer ``[N]`` int64, equal to those of the model up to rounding.

        Raises:
            RuntimeError: the modules are in train mode.
            ValueError: invalid shape, dtype or device of an input.
            AttentionReplacedError: the attention of the backbone was replaced.
        """
        self._check_mode()
        given = Inputs(input_ids, attention_mask, token_type_ids, position_ids)
        inputs = check_inputs(given, self.adapter, self.backbone, check_values=False)
        rows, device = inputs.rows, embedding_weight(self.backbone).device
        answers = torch.zeros(rows, self.classes, dtype=torch.float32, device=device)
        exit_layer = torch.zeros(rows, dtype=torch.int64, device=device)
        if rows == 0:
            return answers, exit_layer
        states, keys, arguments = self._embedded(inputs)
        rule, skips, layers = self.criterion.exit_rule, self.criterion.skip_from, self.adapter.layers(self.backbone)
        state = rule.new_state(rows, device, self.classes, keys)
        memory = {} if rule.needs is None else self.heads.first_memory(states, rule.needs)
        found = ExitState(state, memory, answers, exit_layer)
        for layer, run_layer in enumerate(layers, start=1):
            runs = None if skips is None else ~(torch.sigmoid(self.heads.gate(layer, states).float()) >= skips)
            after = hidden_of(run_layer(states.hidden, **arguments[layer - 1]))
            states = states._replace(hidden=after if runs is None else _chosen(runs, after, states.hidden))
            if rule.is_due(layer, len(layers)):
                found = self._decided(layer, len(layers), states, runs, found)
        # no_grad is not exported if gradients are disabled already
        return found.answers.detach(), found.exit_layer

    def _check_mode(self) -> None:
        if self.training or self.backbone.training or self.heads.training:
            raise RuntimeError("fixed_depth: expected the model in eval mode, got train mode; call model.eval() first")

    def _embedded(self, inputs: Inputs) -> tuple[PaddedStates, Tensor | None, Sequence[Mapping[str, Any]]]:
        """Return the embedded rows, their keys if the criterion draws random numbers, and arguments of each layer."""
        ids, mask, types, positions = inputs
        if self.heads.config.reads == "last":
            mask = up_to_last(ids, mask, self.backbone.config.pad_token_id)
        keep = None if mask is None else with_a_token(mask != 0)
        positions = self.adapter.positions(self.backbone, ids) if positions is None else positions
        types = torch.zeros_like(ids) if types is None else types
        ids, positions, types = (x.expand(ids.shape).long() for x in (ids, positions, types))
        if keep is not None:
            columns = kept_columns(keep)
            ids, positions, types = (x.gather(1, columns) for x in (ids, positions, types))
        hidden = self.adapter.first_states(self.backbone, ids, positions, types)
        states = PaddedStates(hidden, keep, self.adapter.exit_norm(self.backbone))
        keys = padded_row_keys(ids, keep) if self.criterion.exit_rule.uses_keys else None
        return states, keys, self._layer_arguments(states, positions)

    def _layer_arguments(self, states: PaddedStates, positions: Tensor) -> Sequence[Mapping[str, Any]]:
        """Return the keyword arguments of each layer, for tokens with positions ``[N, S]``."""
        adapter, depth = self.adapter, len(self.adapter.layers(self.backbone))
        if adapter.rectangle_arguments is not None:
            keep = torch.ones_like(positions, dtype=torch.bool) if states.keep is None else states.keep
            return [adapter.rectangle_arguments(self.backbone, states.hidden, keep)] * depth
        own: Sequence[Mapping[str, Any]] = [{}] * depth
        if adapter.layer_arguments is not None:
            own = adapter.layer_arguments(self.backbone, states.hidden, positions)
        plan = PaddedPlan(states.keep)
        return [{"plan": plan, **more} for more in own]

    def _decided(
        self, layer: int, depth: int, states: PaddedStates, runs: Tensor | None, found: ExitState
    ) -> ExitState:
        """Decide at the exit after 1-based `layer` for the live rows that ran it; at the last layer for all."""
        rule = self.criterion.exit_rule
        exit_, aux = read_exit(self.heads, layer, states, found.memory, rule.needs)
        z, memory = exit_logits(exit_.features, exit_.weight, exit_.bias), exit_.memory
        answer, leave, state = torch_step(rule, z, aux, found.state, layer, depth, rule.params(layer))
        valid, here = valid_rows(z, aux), found.exit_layer == 0
        if layer == depth:
            leave = here
        else:
            here = here if runs is None else here & runs
            leave = here & valid & leave
        return ExitState(
            torch.where(here & valid, state, found.state),
            memory if runs is None else {name: _chosen(runs, x, found.memory[name]) for name, x in memory.items()},
            _chosen(leave, _chosen(valid, answer, z), found.answers),
            torch.where(leave, layer, found.exit_layer),
        )


def with_a_token(keep: Tensor) -> Tensor:
    """Return the kept tokens ``[N, S]``, with the first one of a row that has none, as in `pack`."""
    first_column = torch.arange(keep.shape[1], device=keep.device) == 0
    return keep | (first_column & ~keep.any(dim=1, keepdim=True))


def kept_columns(keep: Tensor) -> Tensor:
    """Return the column of each slot ``[N, S]``, for masked slots that of the first kept token of the row.

    Masked slots then repeat a token of their own row, and the first slot holds the first kept token.
    """
    columns = torch.arange(keep.shape[1], device=keep.device)
    return torch.where(keep, columns, keep.int().argmax(dim=1, keepdim=True))


def padded_row_keys(ids: Tensor, keep: Tensor | None) -> Tensor:
    """Return the keys ``[N]`` of `packing.row_keys` from padded ids ``[N, S]``."""
    if keep is None:
        return token_keys(ids, torch.arange(ids.shape[1], device=ids.device)).sum(dim=1)
    return torch.where(keep, token_keys(ids, keep.cumsum(dim=1) - 1), 0).sum(dim=1)


def _chosen(which: Tensor, these: Tensor, others: Tensor) -> Tensor:
    """Return the rows of `these` where ``which [N]`` is True, else of `others`, both ``[N, ...]``."""
    return torch.where(which.view(-1, *[1] * (these.dim() - 1)), these, others)


def _at(tokens: Tensor, columns: Tensor) -> Tensor:
    """Return the tokens ``[N, F]`` at one column ``[N]`` of each row ``[N, S, F]``."""
    return tokens.gather(1, columns[:, None, None].expand(-1, 1, tokens.shape[2]))[:, 0]
