"""Count the multiply-adds of an early-exit model per row, including exits and gates.

Matrix products are counted; one multiply-add is two of the FLOPs that torch's `FlopCounterMode` reports. For a row of S
tokens, width H, C classes and exits of width W:

- encoder: every linear of a layer on every token, and the two products of attention, ``2 S A`` per token for queries
  of width A (usually H), also where a mask leaves part of them out; the projection of the embeddings, if there is one;
- each exit computed: a linear on the pooled state ``H C``, the head of the family ``H H + H C`` (``S H H + H C`` if it
  reads each token), or an attention exit ``S (H W + 3 W W + 2 S W) + W W + W C``; and the scalar that the rule reads:
  halting (its hidden layers and its linear) or uncertainty;
- each gate computed, also those of skipped layers: ``S (H W + 3 W W + 2 S W) + W``.

Not counted: operations other than matrix products (look-ups, norms, activations, pooling, cosines, the decision), the
products with relative positions of DeBERTa, and work that depends on the batch (empty slots of an attention bucket,
rows that have left but are not yet removed).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones.base import linear_weights, query_width
from earlyexit_kernels.criteria import Criterion, FullDepth
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification


@dataclass(frozen=True)
class RowMacs:
    """Multiply-adds of each row, ``[N]`` int64 each.

    Attributes:
        encoder: projection of the embeddings and the layers run.
        exits: exits computed, with their scalars.
        gates: gates computed.
    """

    encoder: Tensor
    exits: Tensor
    gates: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of encoder, exits and gates, ``[N]``."""
        return self.encoder + self.exits + self.gates


def row_macs(
    model: EarlyExitForSequenceClassification,
    lengths: Sequence[int] | Tensor,
    exit_layer: Sequence[int] | Tensor,
    layers_run: Sequence[int] | Tensor | None = None,
    *,
    criterion: Criterion | None = None,
) -> RowMacs:
    """Count the multiply-adds of each row of a data set.

    Without gates, exits 1 to `exit_layer` are computed, as far as the rule reads them (full depth: the last one only).
    With a `SkipGate`, the gates of layers 1 to `exit_layer` are computed, and the exits of the layers that ran. The
    last exit is computed for every row that reaches it. `layers_run` does not tell *which* layers ran: if a row reached
    the last exit and skipped a layer, the last layer is assumed to be skipped; one exit too many is counted otherwise.

    Args:
        model: the model whose layers and heads are counted.
        lengths: ``[N]`` tokens of each row, with special tokens, without padding.
        exit_layer: ``[N]``, 1-based, as from the model or `replay`.
        layers_run: ``[N]`` (default: `exit_layer`).
        criterion: the criterion of that run (default: the criterion of the model).

    Raises:
        ValueError: the numbers contradict each other or the depth of the model.
    """
    rule = criterion or model.criterion or FullDepth()
    skips = rule.skip_from is not None
    tokens, left_at = (torch.as_tensor(values, dtype=torch.int64) for values in (lengths, exit_layer))
    ran = left_at if layers_run is None else torch.as_tensor(layers_run, dtype=torch.int64)
    _check(tokens, left_at, ran, model.depth, skips)
    exits = exits_computed(left_at, ran, [rule.exit_rule.is_due(k, model.depth) for k in range(1, model.depth + 1)])
    return RowMacs(
        encoder=encoder_macs(model, tokens, ran),
        exits=exits * exit_macs(model, tokens, rule.exit_rule.needs),
        gates=left_at * gate_macs(model, tokens) if skips else torch.zeros_like(left_at),
    )


def exits_computed(exit_layer: Tensor, layers_run: Tensor, due: Sequence[bool]) -> Tensor:
    """Return the number of exits ``[N]`` computed for each row.

    Args:
        exit_layer, layers_run: ``[N]`` int64.
        due: whether the rule reads exit k, for k = 1..L.
    """
    depth = len(due)
    layers = torch.arange(1, depth + 1)
    reads_early = (layers <= exit_layer[:, None]) & torch.tensor(due) & (layers < depth)  # [N, L]
    reaches_last = exit_layer == depth
    runs_last = reaches_last & (layers_run == exit_layer)
    early_layers_run = layers_run - runs_last.long()
    return torch.minimum(reads_early.sum(1), early_layers_run) + reaches_last.long()


def encoder_macs(
    model: EarlyExitForSequenceClassification, lengths: Tensor, layers_run: Tensor | int | None = None
) -> Tensor:
    """Return the multiply-adds ``[N]`` of the embedding projection and the layers, without exits and gates.

    Args:
        model: the model whose backbone is counted.
        lengths: ``[N]`` int64 tokens of each row.
        layers_run: ``[N]`` int64, or one number for all rows (default: all layers).
    """
    layers: Any = model.adapter.layers(model.backbone)
    # shared layers count once
    embedding = linear_weights(model.backbone) - linear_weights(*{id(each): each for each in layers}.values())
    # one step of ALBERT may be a group of several layers, each with its own attention
    config: Any = model.config
    attentions = getattr(config.backbone_config, "inner_group_num", 1)
    per_token = linear_weights(layers[0])
    run = model.depth if layers_run is None else layers_run
    queries = query_width(config.backbone_config)
    return lengths * (embedding + run * (per_token + attentions * 2 * lengths * queries))


def exit_macs(model: EarlyExitForSequenceClassification, lengths: Tensor, needs: str | None = None) -> Tensor:
    """Return the multiply-adds ``[N]`` of one exit.

    Args:
        model: the model whose heads are counted.
        lengths: ``[N]`` int64 tokens of each row.
        needs: name of the scalar computed with it, or None.
    """
    heads = model.heads
    modules: list[nn.Module] = [heads.out[0]]
    tokens = torch.zeros_like(lengths)
    if len(heads.dense) and heads.config.family_pooling == "late":
        tokens = lengths * linear_weights(heads.dense[0])
    else:
        modules += heads.dense[:1]
    if len(heads.attention):
        features: Any = heads.attention[0]
        tokens = _attention_macs(features.attention, lengths)
        modules.append(features.dense)
    scalars = {"halting": heads.halting[:1], "uncertainty": heads.uncertainty[:1]}
    modules += scalars.get(needs or "", ())
    return tokens + linear_weights(*modules)


def gate_macs(model: EarlyExitForSequenceClassification, lengths: Tensor) -> Tensor:
    """Return the multiply-adds ``[N]`` of one gate on rows of `lengths` ``[N]`` tokens."""
    gate: Any = model.heads.gates[0]
    return _attention_macs(gate.attention, lengths) + gate.out.weight.numel()


def _attention_macs(attention: Any, lengths: Tensor) -> Tensor:
    return lengths * (linear_weights(attention) + 2 * lengths * attention.query.out_features)


def _check(lengths: Tensor, exit_layer: Tensor, layers_run: Tensor, depth: int, skips: bool) -> None:
    if not lengths.shape == exit_layer.shape == layers_run.shape or lengths.dim() != 1:
        shapes = [list(x.shape) for x in (lengths, exit_layer, layers_run)]
        raise ValueError(f"row_macs: expected lengths, exit_layer and layers_run [N] of one length N, got {shapes}")
    if bool(((exit_layer < 1) | (exit_layer > depth) | (layers_run < 0) | (layers_run > exit_layer)).any()):
        raise ValueError(f"row_macs: expected 1 <= exit_layer <= {depth} and 0 <= layers_run <= exit_layer")
    if not skips and not torch.equal(exit_layer, layers_run):
        raise ValueError(
            "row_macs: expected layers_run == exit_layer for a criterion that skips no layers, got fewer layers run; "
            "pass the SkipGate of that run as criterion=..."
        )
