"""The rows of a batch, packed and embedded: what the first encoder layer reads."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from earlyexit_kernels.engine.attention_plan import rows_of_tokens
from earlyexit_kernels.engine.encoder import Embed
from earlyexit_kernels.engine.inputs import Inputs
from earlyexit_kernels.engine.layer_calls import RequestRectangles, RequestRows, RequestTokens
from earlyexit_kernels.engine.packing import PackedBatch, pack, row_keys
from earlyexit_kernels.engine.states import last_kept
from earlyexit_kernels.engine.view import ModelView


class EmbeddedRows(NamedTuple):
    """Packed rows after the embeddings.

    Attributes:
        hidden: ``[1, T, H]``.
        batch: the rows.
        keys: ``[N]`` int64 of `packing.row_keys`, or None.
        request: what the layers need to know about the request, or None.
    """

    hidden: Tensor
    batch: PackedBatch
    keys: Tensor | None
    request: RequestRows | None


def embed_rows(view: ModelView, inputs: Inputs, embed: Embed, *, with_keys: bool) -> EmbeddedRows:
    """Pack and embed a batch of at least one row.

    Args:
        view: of the model.
        inputs: checked.
        embed: of the encoder.
        with_keys: compute a key for each row, for criteria that draw random numbers.

    Raises:
        ValueError: the first token of a row is masked and the exits read it.
    """
    ids, mask, types, positions = inputs
    adapter, reads = view.adapter, view.heads.config.reads
    if reads == "last":
        mask = up_to_last(ids, mask, view.backbone.config.pad_token_id)
    batch = pack(ids, mask, first_token=reads == "first")
    if positions is None:
        positions = adapter.positions(view.backbone, ids)
    types = torch.zeros_like(ids) if types is None else types
    tokens, places = batch.take(ids), batch.take(positions.expand(ids.shape))
    kinds = batch.take(types.expand(ids.shape))
    hidden = embed(tokens, places, kinds)
    keys = row_keys(tokens, batch.offsets) if with_keys else None
    return EmbeddedRows(hidden, batch, keys, request_rows(view, batch, ids.shape[1], places[0]))


def request_rows(view: ModelView, batch: PackedBatch, length: int, positions: Tensor) -> RequestRows | None:
    """Return what the layers need to know about the rows of a request, or None where that is nothing.

    Args:
        view: of the model.
        batch: all rows of the request.
        length: S, of the padded rows.
        positions: ``[T]`` of the packed tokens.

    Raises:
        ValueError: a row has holes, which the family does not support.
    """
    adapter = view.adapter
    if adapter.layer_arguments is not None:
        arguments = functools.partial(adapter.layer_arguments, view.backbone)
        columns = None if batch.tokens is None else batch.tokens % length
        if columns is not None and batch.lengths is not None and not _has_holes(batch, columns):
            columns = None
        return RequestTokens(batch.offsets, positions, columns, arguments)
    if adapter.rectangle_arguments is None:
        return None
    if batch.tokens is not None and _has_holes(batch, batch.tokens % length):
        raise ValueError(
            f"attention_mask: expected padding at the ends of rows only, a row has it between tokens; layers of "
            f"{adapter.model_type!r} read the distance of two tokens, so leave such tokens out of input_ids"
        )
    return RequestRectangles(functools.partial(adapter.rectangle_arguments, view.backbone))


def _has_holes(batch: PackedBatch, columns: Tensor) -> bool:
    """Return whether the tokens of a row are not next to each other, by their columns ``[T]``; on CUDA it waits."""
    row, place = rows_of_tokens(batch.offsets, columns.shape[0])
    first = columns[batch.offsets[:-1].long()]
    return not torch.equal(columns, first[row] + place)


def up_to_last(ids: Tensor, mask: Tensor | None, pad_token_id: int | None) -> Tensor | None:
    """Return the mask ``[N, S]`` without tokens behind the one that a stock decoder answers from, None for no mask.

    That is the last token of a row that is not the padding token. Those behind it do not affect a causal answer.

    Args:
        ids: ``[N, S]``.
        mask: ``[N, S]`` or None.
        pad_token_id: of the backbone, or None: the answer is that of the last token that is kept.

    Raises:
        ValueError: that token is masked, on the CPU.
    """
    if pad_token_id is None:
        return mask
    last = last_kept(ids != pad_token_id)
    columns = torch.arange(ids.shape[1], device=ids.device)
    keep = columns <= last[:, None]
    if mask is None:
        return keep
    kept = mask != 0
    if ids.device.type == "cpu" and not torch.compiler.is_compiling():
        masked = kept.any(dim=1) & ~kept.gather(1, last[:, None])[:, 0]
        if bool(masked.any()):
            raise ValueError(
                f"attention_mask: the last token of row {int(masked.nonzero()[0])} that is not padding is masked, but "
                "the answer is read from it; keep it, or replace masked ids by the padding token"
            )
    return kept & keep
