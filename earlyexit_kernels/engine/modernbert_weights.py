"""The weights of ModernBERT's layers, and which layers are computed from their weights alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from earlyexit_kernels.engine.fused_layers import ACTIVATIONS, hooked

#: Path of each module of a layer -> its type, by name; `Identity` and `Dropout` do nothing in inference.
PARTS = {
    "": ("ModernBertEncoderLayer",),
    "attn_norm": ("LayerNorm", "Identity"),
    "attn": ("ModernBertAttention",),
    "attn.Wqkv": ("Linear",),
    "attn.Wo": ("Linear",),
    "attn.out_drop": ("Dropout", "Identity"),
    "mlp_norm": ("LayerNorm",),
    "mlp": ("ModernBertMLP",),
    "mlp.Wi": ("Linear",),
    "mlp.act": tuple(ACTIVATIONS),
    "mlp.drop": ("Dropout",),
    "mlp.Wo": ("Linear",),
}
#: Where the modules are defined; a module of the same name from elsewhere may compute something else.
HOMES = ("torch.nn.modules.", "transformers.models.modernbert.", "transformers.activations")


class Affine(NamedTuple):
    """Weight and bias of a linear or a norm, detached; they share its memory."""

    weight: Tensor
    bias: Tensor | None

    @staticmethod
    def of(module: Any) -> Affine:
        """Return those of a module."""
        return Affine(module.weight.detach(), None if module.bias is None else module.bias.detach())


@dataclass(frozen=True)
class ModernBertWeights:
    """The weights of one layer, without copies: ``y = x + out(attend(norm x))``, then ``y + outer(f(a) b)``.

    ``[a, b]`` are the halves of ``inner(norm y)``.

    Attributes:
        attention_norm: before attention, or None in the first layer, which has none.
        projections: ``[3 H, H]``, of query, key and value.
        attention_out, norm, inner, outer: as above; `inner` is ``[2 I, H]``.
        eps: of `attention_norm` and `norm`; 0 for no norm.
        heads: number of attention heads.
        window: a token attends to those fewer than this many columns away; None: to all of its row.
        activation: name and variant, a value of `fused_layers.ACTIVATIONS`.
    """

    attention_norm: Affine | None
    projections: Affine
    attention_out: Affine
    norm: Affine
    inner: Affine
    outer: Affine
    eps: tuple[float, float]
    heads: int
    window: int | None
    activation: tuple[str, str]

    @staticmethod
    def of(layer: Any) -> ModernBertWeights:
        """Return the weights of a layer that `modernbert_unsupported_reason` accepts."""
        attention, mlp, first = layer.attn, layer.mlp, isinstance(layer.attn_norm, nn.Identity)
        return ModernBertWeights(
            attention_norm=None if first else Affine.of(layer.attn_norm),
            projections=Affine.of(attention.Wqkv),
            attention_out=Affine.of(attention.Wo),
            norm=Affine.of(layer.mlp_norm),
            inner=Affine.of(mlp.Wi),
            outer=Affine.of(mlp.Wo),
            eps=(0.0 if first else layer.attn_norm.eps, layer.mlp_norm.eps),
            heads=attention.Wqkv.out_features // (3 * attention.head_dim),
            window=attention.sliding_window,
            activation=ACTIVATIONS[type(mlp.act).__name__],
        )


def modernbert_unsupported_reason(layer: nn.Module) -> str | None:
    """Return why a layer may compute something else than its `ModernBertWeights` say, or None if it computes that.

    Everything unknown is refused: an adapter inside the layer, a hook, a quantized linear.
    """
    found = dict(layer.named_modules())
    if missing := sorted(PARTS.keys() - found.keys()):
        return f"the layer has no module {missing[0]}"
    for path, module in found.items():
        title = f"{path or 'the layer'} ({type(module).__name__})"
        if hooked(module):
            return f"{title} has a forward hook"
        if path not in PARTS:
            if path.startswith("mlp.act.") and not module._parameters:
                continue
            return f"{title} is not supported"
        if type(module).__name__ not in PARTS[path] or not type(module).__module__.startswith(HOMES):
            return f"{title} is not one of {PARTS[path]} of torch or transformers"
        if (reason := affine_unsupported_reason(module)) or (reason := _attention_unsupported_reason(module)):
            return f"{title} {reason}"
    return None


def affine_unsupported_reason(module: nn.Module) -> str | None:
    """Return why a linear or a norm has something else than a weight and perhaps a bias, or None."""
    parameters: dict[str, Any] = module._parameters
    if not isinstance(module, (nn.Linear, nn.LayerNorm)):
        return "has parameters of its own" if any(x is not None for x in parameters.values()) else None
    kinds = {name: type(x) for name, x in parameters.items()}
    plain = kinds.keys() == {"weight", "bias"} and kinds["weight"] is nn.Parameter
    return None if plain and kinds["bias"] in (nn.Parameter, type(None)) else "has no plain weight and bias"


def _attention_unsupported_reason(module: Any) -> str | None:
    """Return why an attention module is not softmax(q k / sqrt(D)) v over all tokens of a row or window, or None."""
    if type(module).__name__ != "ModernBertAttention":
        return None
    if getattr(module, "is_causal", False):
        return "is causal"
    if module.Wqkv.out_features % (3 * module.head_dim) or module.Wo.in_features * 3 != module.Wqkv.out_features:
        return f"has projections of {module.Wqkv.out_features} columns for heads of {module.head_dim}"
    return None
