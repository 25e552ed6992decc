"""Multiply-adds of an early-exit model, row by row, with everything an exit costs.

Counted are matrix products, one multiply-add being two of the FLOPs that torch's `FlopCounterMode` reports:

- the encoder: every linear of a layer on every token, and attention's two products, ``2 S H`` a token; a projection of
  the embeddings where the family has one;
- each exit the row met: a linear on the pooled state ``H C``; the family's head ``H H + H C``; an attention exit
  ``S (H W + 3 W W + 2 S W) + W W + W C``; and of the scalars beside it the one that the rule reads: halting (its hidden
  layers and its linear) or uncertainty;
- each gate the row met, skipped layers included: ``S (H W + 3 W W + 2 S W) + W``.

Not counted: what multiplies no matrix (look-ups, norms, activations, pooling, cosines, the decision itself), and what a
row doesn't need but its batch may do for it (slots that fill an attention bucket, rows that have left and are still
carried along).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earlyexit_kernels.criteria import Criterion, FullDepth
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification


@dataclass(frozen=True)
class RowMacs:
    """Multiply-adds of each row, ``[N]`` int64 each.

    Attributes:
        encoder: embeddings' projection and the layers run.
        exits: every exit met, its scalar included.
        gates: every gate met.
    """

    encoder: Tensor
    exits: Tensor
    gates: Tensor

    @property
    def total(self) -> Tensor:
        """All of it, ``[N]``."""
        return self.encoder + self.exits + self.gates


def row_macs(
    model: EarlyExitForSequenceClassification,
    lengths: Sequence[int] | Tensor,
    exit_layer: Sequence[int] | Tensor,
    layers_run: Sequence[int] | Tensor | None = None,
    *,
    criterion: Criterion | None = None,
) -> RowMacs:
    """What each row of a data set cost.

    Without a gate a row meets the exits 1 to `exit_layer` that the rule has computed (full depth: the last one alone).
    With a `SkipGate` it meets the gates of layers 1 to `exit_layer`, an exit only where it ran the layer, and the last
    exit if it came so far. `layers_run` doesn't say *which* layers ran: a row that came to the last exit and skipped
    something is counted as if the last layer had been among the skipped ones, which is one exit too many if it wasn't.

    Args:
        model: whose layers and heads are counted.
        lengths: ``[N]`` tokens of each row, marks included, padding not.
        exit_layer: ``[N]``, 1-based, as the model or `replay` gives it.
        layers_run: ``[N]``; default: `exit_layer`.
        criterion: the rule that gave them; default: the model's own.

    Raises:
        ValueError: numbers that don't fit each other or the model's depth.
    """
    rule = criterion or model.criterion or FullDepth()
    skips = rule.skip_from is not None
    s, left = (torch.as_tensor(values, dtype=torch.int64) for values in (lengths, exit_layer))
    ran = left if layers_run is None else torch.as_tensor(layers_run, dtype=torch.int64)
    _check(s, left, ran, model.depth, skips)
    due = torch.tensor([0, *(rule.exit_rule.is_due(k, model.depth) for k in range(1, model.depth + 1))]).cumsum(0)
    last = left == model.depth
    # where nothing was skipped, one of the layers run was the last
    before_last = ran - (last & (ran == left)).long()
    exits = torch.minimum(before_last, due[left - last.long()]) + last
    return RowMacs(
        encoder=encoder_macs(model, s, ran),
        exits=exits * exit_macs(model, s, rule.exit_rule.needs),
        gates=left * gate_macs(model, s) if skips else torch.zeros_like(left),
    )


def encoder_macs(
    model: EarlyExitForSequenceClassification, lengths: Tensor, layers_run: Tensor | int | None = None
) -> Tensor:
    """Multiply-adds ``[N]`` of the embeddings' projection and of some layers, by default all of them: no exit, no gate.

    Args:
        model: its backbone is counted.
        lengths: ``[N]`` int64 tokens of each row.
        layers_run: ``[N]`` int64, or one number for all rows.
    """
    layers: Any = model.adapter.layers(model.backbone)
    layer: nn.Module = layers[0]
    inside = {id(linear) for each in layers for linear in _linears(each)}
    embedding = sum(linear.weight.numel() for linear in _linears(model.backbone) if id(linear) not in inside)
    # a step of ALBERT may be a group of several layers, each with an attention of its own
    config: Any = model.config
    attentions = getattr(config.backbone_config, "inner_group_num", 1)
    per_token = sum(linear.weight.numel() for linear in _linears(layer))
    run = model.depth if layers_run is None else layers_run
    return lengths * (embedding + run * (per_token + attentions * 2 * lengths * config.backbone_config.hidden_size))


def exit_macs(model: EarlyExitForSequenceClassification, lengths: Tensor, needs: str | None = None) -> Tensor:
    """Multiply-adds ``[N]`` of one exit.

    Args:
        model: its heads are counted.
        lengths: ``[N]`` int64 tokens of each row.
        needs: the scalar computed with it, or None.
    """
    heads = model.heads
    modules: list[nn.Module] = [heads.out[0], *heads.dense[:1]]
    tokens = torch.zeros_like(lengths)
    if len(heads.attention):
        features: Any = heads.attention[0]
        tokens = _attention_macs(features.attention, lengths)
        modules.append(features.dense)
    scalars = {"halting": heads.halting[:1], "uncertainty": heads.uncertainty[:1]}
    modules += scalars.get(needs or "", ())
    return tokens + sum(linear.weight.numel() for module in modules for linear in _linears(module))


def gate_macs(model: EarlyExitForSequenceClassification, lengths: Tensor) -> Tensor:
    """Multiply-adds ``[N]`` of one gate on rows of `lengths` ``[N]`` tokens."""
    gate: Any = model.heads.gates[0]
    return _attention_macs(gate.attention, lengths) + gate.out.weight.numel()


def _attention_macs(attention: Any, lengths: Tensor) -> Tensor:
    per_token = sum(linear.weight.numel() for linear in _linears(attention))
    return lengths * (per_token + 2 * lengths * attention.query.out_features)


def _linears(module: nn.Module) -> Iterable[nn.Linear]:
    return (m for m in module.modules() if isinstance(m, nn.Linear))


def _check(lengths: Tensor, exit_layer: Tensor, layers_run: Tensor, depth: int, skips: bool) -> None:
    if not lengths.shape == exit_layer.shape == layers_run.shape or lengths.dim() != 1:
        shapes = [list(x.shape) for x in (lengths, exit_layer, layers_run)]
        raise ValueError(f"row_macs: expected lengths, exit_layer and layers_run [N] of one N, got {shapes}")
    if bool(((exit_layer < 1) | (exit_layer > depth) | (layers_run < 0) | (layers_run > exit_layer)).any()):
        raise ValueError(f"row_macs: expected 1 <= exit_layer <= {depth} and 0 <= layers_run <= exit_layer")
    if not skips and not torch.equal(exit_layer, layers_run):
        raise ValueError(
            "row_macs: rows ran fewer layers than their exit layer, but the criterion skips none; give the SkipGate "
            "that gave these numbers as criterion=..."
        )
