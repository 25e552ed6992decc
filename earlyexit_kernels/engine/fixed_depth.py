"""The masked full-depth mode: no shape and no branch hangs on the data.

    ids, mask -> embeddings -> [ gate? -> layer -> exit -> rule ] x L -> answers, all of it on all rows

Rows stay padded. A row that has left keeps its answer and runs on unseen; one that skips a layer takes its hidden state
past it. The rules run in torch, so that an exported program is made of torch's own ops.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.engine.full_depth import first
from earlyexit_kernels.engine.inputs import check_inputs
from earlyexit_kernels.engine.packing import check_attention
from earlyexit_kernels.hashing import token_keys
from earlyexit_kernels.heads import ExitHeads, exit_logits
from earlyexit_kernels.ops.exit_step import meaningful
from earlyexit_kernels.types import read_aux


class PaddedStates(NamedTuple):
    """Hidden states ``[N, S, H]`` of padded rows, and which tokens they have ``[N, S]``, None where all."""

    hidden: Tensor
    keep: Tensor | None

    @property
    def rows(self) -> int:
        """As in `RowStates`, like what follows."""
        return self.hidden.shape[0]

    @property
    def mask(self) -> Tensor | None:
        """The tokens as attention wants them, ``[N, 1, 1, S]``."""
        return None if self.keep is None else self.keep[:, None, None, :]

    def pool(self, tokens: Tensor, pooling: str | None) -> Tensor:
        """Of tokens ``[N, S, F]``."""
        if pooling != "mean":
            return tokens[:, 0]
        if self.keep is None:
            return tokens.float().mean(dim=1)
        kept = self.keep[:, :, None]
        return torch.where(kept, tokens.float(), 0.0).sum(dim=1) / kept.sum(dim=1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
        """Of ``[N, S, heads, D]``."""
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, dropout_p=dropout).transpose(1, 2)


class Decisions(NamedTuple):
    """What is known of the rows after some layers.

    Attributes:
        state: ``[K, N]`` float32 of the rule.
        memory: of the exits, ``[N, F]`` by name.
        answers: ``[N, C]`` float32.
        exit_layer: ``[N]`` int64, 0 where the row hasn't left.
    """

    state: Tensor
    memory: dict[str, Tensor]
    answers: Tensor
    exit_layer: Tensor


class FixedDepth(nn.Module):
    """A model's answers and exit layers from a pass of fixed shape; `model.fixed_depth()` builds it.

    Args:
        adapter, backbone, heads: of the model; parameters are shared, and have the same names here.
        criterion: who may leave, and skip, where; another one asks for another `fixed_depth()`.
        classes: C.

    Raises:
        RuntimeError: the modules are in train mode.

    The model looks at its input and at its logits, this can't: ids outside of the vocabulary aren't caught, no logits
    without a meaning are counted, and where the first token is masked, exits read the first one that isn't.
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
            logits ``[N, C]`` float32 and exit_layer ``[N]`` int64, those of the model up to rounding.

        Raises:
            RuntimeError: the modules are in train mode.
            ValueError: input of a wrong shape, dtype or device.
            AttentionReplacedError: somebody set another attention on the backbone.
        """
        self._check_mode()
        check_attention(self.backbone.config._attn_implementation)
        device = self.backbone.device
        ids = check_inputs(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            device=device,
            longest=self.adapter.longest(self.backbone.config),
            limits={},
        )
        rows = ids.shape[0]
        answers = torch.zeros(rows, self.classes, dtype=torch.float32, device=device)
        exit_layer = torch.zeros(rows, dtype=torch.int64, device=device)
        if rows == 0:
            return answers, exit_layer
        states, keys = self._embedded(ids, attention_mask, token_type_ids, position_ids)
        rule, skips, layers = self.criterion.exit_rule, self.criterion.skip_from, self.adapter.layers(self.backbone)
        state = rule.new_state(rows, device, self.classes, keys)
        memory = {} if rule.needs is None else self.heads.first_memory(states, rule.needs)
        found = Decisions(state, memory, answers, exit_layer)
        for layer, run_layer in enumerate(layers, start=1):
            runs = None if skips is None else ~(torch.sigmoid(self.heads.gate(layer, states).float()) >= skips)
            after = first(run_layer(states.hidden, states.mask))
            states = states._replace(hidden=after if runs is None else _chosen(runs, after, states.hidden))
            if rule.is_due(layer, len(layers)):
                found = self._decided(layer, len(layers), states, runs, found)
        # no_grad isn't part of what is exported where somebody has turned gradients off before
        return found.answers.detach(), found.exit_layer

    def _check_mode(self) -> None:
        if self.training or self.backbone.training or self.heads.training:
            raise RuntimeError("fixed_depth: expected the model in eval mode, got train mode; call model.eval() first")

    def _embedded(
        self, ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor | None
    ) -> tuple[PaddedStates, Tensor | None]:
        """The rows after the embeddings, and their keys where the rule draws."""
        keep = None if attention_mask is None else with_a_token(attention_mask != 0)
        if position_ids is None:
            position_ids = self.adapter.positions(self.backbone, ids)
        types = torch.zeros_like(ids) if token_type_ids is None else token_type_ids
        ids, positions, types = (x.expand(ids.shape).long() for x in (ids, position_ids, types))
        if keep is not None:
            columns = kept_columns(keep)
            ids, positions, types = (x.gather(1, columns) for x in (ids, positions, types))
        hidden = self.adapter.first_states(self.backbone, ids, positions, types)
        return PaddedStates(hidden, keep), padded_row_keys(ids, keep) if self.criterion.exit_rule.uses_keys else None

    def _decided(
        self, layer: int, depth: int, states: PaddedStates, runs: Tensor | None, found: Decisions
    ) -> Decisions:
        """What the exit after 1-based `layer` says of the rows present that ran it, or of all at the last layer."""
        rule = self.criterion.exit_rule
        features, weight, bias, raw, memory = self.heads.fused(layer, states, found.memory, rule.needs)
        z = exit_logits(features, weight, bias)
        aux = None if raw is None or rule.needs is None else read_aux(raw, rule.needs)
        answer, leave, state = rule.rule(z, aux, found.state, layer, depth, rule.params(layer))
        valid, here = meaningful(z, aux), found.exit_layer == 0
        if layer == depth:
            leave = here
        else:
            here = here if runs is None else here & runs
            leave = here & valid & leave
        return Decisions(
            torch.where(here & valid, state, found.state),
            memory if runs is None else {name: _chosen(runs, x, found.memory[name]) for name, x in memory.items()},
            _chosen(leave, _chosen(valid, answer, z), found.answers),
            torch.where(leave, layer, found.exit_layer),
        )


def with_a_token(keep: Tensor) -> Tensor:
    """The tokens ``[N, S]`` of the rows, where a row without any has its first one, as in `pack`."""
    first_column = torch.arange(keep.shape[1], device=keep.device) == 0
    return keep | (first_column & ~keep.any(dim=1, keepdim=True))


def kept_columns(keep: Tensor) -> Tensor:
    """For each slot ``[N, S]`` its column, or that of its row's first token where the slot is masked.

    A masked slot then holds nothing that the row itself doesn't, and the first slot holds the row's first token.
    """
    columns = torch.arange(keep.shape[1], device=keep.device)
    return torch.where(keep, columns, keep.int().argmax(dim=1, keepdim=True))


def padded_row_keys(ids: Tensor, keep: Tensor | None) -> Tensor:
    """The keys ``[N]`` of `row_keys`, from padded ids ``[N, S]``."""
    if keep is None:
        return token_keys(ids, torch.arange(ids.shape[1], device=ids.device)).sum(dim=1)
    return torch.where(keep, token_keys(ids, keep.cumsum(dim=1) - 1), 0).sum(dim=1)


def _chosen(which: Tensor, these: Tensor, others: Tensor) -> Tensor:
    """Rows of ``[N, ...]`` from `these` where ``which [N]`` says so, else from `others`."""
    return torch.where(which.view(-1, *[1] * (these.dim() - 1)), these, others)
