"""Attention within the rows of packed tokens.

`packed_attention` is registered with transformers as `PACKED_ATTENTION`, called by a family's own layers, and follows
the plan of the batch. What else a layer asks for is an `AttentionKind`: causal, a sliding window, soft-capped scores.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from earlyexit_kernels.backbones import BackboneAdapter
from earlyexit_kernels.core.attention_plan import FULL, AttentionKind, AttentionPlan, PaddedPlan
from earlyexit_kernels.errors import AttentionReplacedError

PACKED_ATTENTION = "earlyexit_packed"
#: Maximum head width and lowest compute capability of flash attention, and what head widths must be a multiple of.
MAX_FLASH_WIDTH = 256
FLASH_CAPABILITY = (8, 0)
HEAD_WIDTH_MULTIPLE = 8
#: Keyword arguments of families' layers that change how attention is computed, not its result.
WITHOUT_EFFECT = ("deterministic",)


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    plan: AttentionPlan | PaddedPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function registered with transformers; without a plan, attention by the mask alone.

    Args:
        query, key, value: ``[1, heads, T, D]`` of packed tokens, or ``[N, heads, S, D]`` of padded rows; key and value
            may have fewer heads, each of which several heads of the query share.
        plan: which tokens form a row; the loop passes it through the keyword arguments of the layers.
        kwargs: of the layers: ``sliding_window``, ``softcap`` and ``is_causal``; others must be None or False.

    Returns:
        ``[1, T, heads, D]`` or ``[N, S, heads, D]``, and None for the attention weights.

    Raises:
        ValueError: a plan together with a mask or another keyword argument, which are not implemented, a window
            below 1, or heads of keys and values that are not those of the layer.
    """
    if plan is None and kwargs.get("softcap") is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    _check_heads(module, query, key, value)
    kind = _kind(module, kwargs)
    if plan is None:  # soft-capped scores, which sdpa does not have
        mask = PaddedPlan(None).mask(kind, query) if attention_mask is None else attention_mask
        return _attend(query, key, value, mask, kind, scaling, dropout).transpose(1, 2), None
    _refuse_others(module, {"attention_mask": attention_mask, **kwargs})
    if isinstance(plan, PaddedPlan):
        return _attend(query, key, value, plan.mask(kind, query), kind, scaling, dropout).transpose(1, 2), None
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend_by_plan(q, k, v, plan, scaling, dropout, kind)[None], None


def _check_heads(module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that keys and values have the heads that the stock model expects of a layer."""
    heads, groups = query.shape[1], getattr(module, "num_key_value_groups", 1)
    if not key.shape[1] * groups == value.shape[1] * groups == heads:
        got = f"{key.shape[1]} and {value.shape[1]} from {type(module).__name__}"
        raise ValueError(
            f"attention: expected {heads / groups:g} heads of keys and values for {heads} of queries, {got}"
        )


def _kind(module: torch.nn.Module, given: dict[str, Any]) -> AttentionKind:
    """Return the kind of attention that a layer asks for by its keyword arguments, which are removed from `given`.

    Raises:
        ValueError: a window below 1.
    """
    causal, window, softcap = (given.pop(name, None) for name in ("is_causal", "sliding_window", "softcap"))
    if window is not None and window < 1:
        raise ValueError(f"sliding_window: expected at least 1, got {window} from {type(module).__name__}")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    return AttentionKind(bool(causal), window, softcap)


def _refuse_others(module: torch.nn.Module, given: dict[str, Any]) -> None:
    """Raise ValueError for arguments of a layer that are not implemented."""
    others = {name: value for name, value in given.items() if name not in WITHOUT_EFFECT}
    if asked := [name for name, value in others.items() if value is not None and value is not False]:
        got = f"{', '.join(asked)} from {type(module).__name__}"
        raise ValueError(
            "packed attention supports plan, scaling, dropout, is_causal, sliding_window and softcap, others as None "
            f"or False, got {got}"
        )


def attend_by_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scaling: float | None,
    dropout: float,
    kind: AttentionKind = FULL,
) -> Tensor:
    """Return attention within the rows of packed tokens, over and to ``[T, heads, D]``."""
    q, k, v = (_as_autocast(x) for x in (q, k, v))
    if plan.offsets is not None:
        if kind == AttentionKind(kind.causal) and q.dtype != torch.float64:
            k, v = (_for_heads(x, q.shape[1]) for x in (k, v))
            return _varlen(q, k, v, plan, scaling, dropout, causal=kind.causal)
        plan = plan.rectangle(q.shape[0])
    attended = []
    for bucket, mask in zip(plan.buckets, plan.masks_of(kind, q.device), strict=True):
        bq, bk, bv = (bucket.gather(x).transpose(1, 2) for x in (q, k, v))
        attended.append(_attend(bq, bk, bv, mask, kind, scaling, dropout).transpose(1, 2))
    return plan.join(attended)


def _as_autocast(x: Tensor) -> Tensor:
    """Return `x` in the dtype of autocast where that is active, as it gives sdpa; other kernels it does not know.

    Rotary positions make queries and keys float32 there, and leave values in half precision.
    """
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kind: AttentionKind, scaling: float | None, dropout: float
) -> Tensor:
    """Return attention over and to ``[rows, heads, width, D]``; without a mask it is causal if `kind` is."""
    k, v = (_for_heads(x, q.shape[1]) for x in (k, v))
    if kind.softcap is None:
        causal = kind.causal and mask is None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scaling
        )
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / kind.softcap) * kind.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, dropout) @ v


def _for_heads(x: Tensor, heads: int) -> Tensor:
    """Return keys or values ``[:, heads, ...]``, each head repeated for the heads of the query that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scaling: float | None,
    dropout: float,
    *,
    causal: bool = False,
) -> Tensor:
    """Variable-length attention on CUDA, ``[T, heads, D]``: flash attention, or else memory-efficient attention.

    Both are called by their private aten names. `torch.nn.attention.varlen.varlen_attn` calls the same flash kernel but
    has no dropout, which training needs, and no float32; there is no public function for the memory-efficient kernel.
    Both kernels skip rows without tokens and do not write tokens after the last row. They do not compare dtypes.

    Raises:
        ValueError: queries, keys and values of several dtypes.
    """
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: expected queries, keys and values of one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; "
            "convert the whole model with model.to(dtype), or run it under torch.autocast"
        )
    width, ends = q.shape[-1], (plan.offsets, plan.offsets, plan.longest, plan.longest, dropout)
    scale = width**-0.5 if scaling is None else scaling
    if width % HEAD_WIDTH_MULTIPLE:
        q, k, v = (F.pad(x, (0, -width % HEAD_WIDTH_MULTIPLE)) for x in (q, k, v))
    if _has_flash(q):
        out = torch.ops.aten._flash_attention_forward(q, k, v, *ends, causal, False, scale=scale)[0]
    else:
        learns = any(x.requires_grad for x in (q, k, v))
        q, k, v = (x[None] for x in (q, k, v))
        out = torch.ops.aten._efficient_attention_forward(q, k, v, None, *ends, int(causal), learns, scale=scale)[0][0]
    return out[..., :width]


def _has_flash(q: Tensor) -> bool:
    """Return whether flash attention takes queries ``[T, heads, D]``."""
    if q.dtype == torch.float32 or q.shape[-1] > MAX_FLASH_WIDTH:
        return False
    return capability(q.device) >= FLASH_CAPABILITY


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(device)


def attention_of(adapter: BackboneAdapter) -> str:
    """Return the name of the attention in a backbone's config: the packed one, or for layers with their own eager."""
    return PACKED_ATTENTION if adapter.rectangle_arguments is None else "eager"


def check_attention(attention: str, adapter: BackboneAdapter) -> None:
    """Raise AttentionReplacedError if the attention of a backbone is no longer that of `attention_of`."""
    expected = attention_of(adapter)
    if attention != expected:
        raise AttentionReplacedError(
            f"expected the backbone's attention to be {expected!r}, got {attention!r}, under which the rows of "
            "a batch would attend to each other. If it was set by set_attn_implementation, set it back; if "
            "model.backbone is a stock encoder now, put that encoder into the stock classifier and convert it with "
            "to_early_exit"
        )


def check_windows(adapter: BackboneAdapter, backbone: Any) -> None:
    """Check that windows are those of the config, which the stock model reads at each call and its layers only once.

    Layers with an `attention_type` choose by it instead of by the types in the config, in the stock model too.

    Raises:
        ValueError: a layer is of another type than in the config, or none has the window of the config.
    """
    if adapter.window is None:
        return
    config: Any = backbone.config
    windows: set[Any] = set()
    expected, types = adapter.window(config), config.layer_types
    for number, layer in enumerate(cast(Sequence[torch.nn.Module], adapter.layers(backbone))):
        kind = types[number] if number < len(types) else None
        for part in filter(None, layer._modules.values()):
            own = vars(part)
            if (made := own.get("layer_type")) not in (None, kind):
                raise ValueError(
                    f"layer {number + 1} was made as {made!r}, layer_types in the config now says {kind!r}; set the "
                    "config back, or give layer_types the order of the layers"
                )
            windows.add(own.get("sliding_window"))
    windows.discard(None)
    if windows and expected not in windows:
        held = " or ".join(map(str, sorted(windows)))
        raise ValueError(
            f"layers were made with a window of {held} tokens to each side, their own included; sliding_window or "
            f"local_attention in the config now means {expected}. Set the config back, or change it before the model "
            "is made"
        )


def register_attention() -> None:
    """Register `packed_attention` with transformers, also for masks: an unregistered name gets no padding mask."""
    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
