"""Recognition of encoder layers that can be computed from their weights and settings, without calling their modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.activations import ACT2CLS

#: Classes of the activations that a config of transformers can name.
ACTIVATION_CLASSES = {each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()}
#: Modules that return their input in eval mode.
WITHOUT_EFFECT = (nn.Dropout, nn.Identity)
#: Settings by which attention modules of transformers ask for a window, and for soft-capped scores.
ATTENTION_SETTINGS = ("sliding_window", "attn_logit_softcapping")


def hooked(module: nn.Module) -> bool:
    """Return whether an instance has hooks, or its own `forward`, as `accelerate` sets one."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def parts_unsupported_reason(
    layer: nn.Module,
    checks: Mapping[str, Callable[[nn.Module], str | None]],
    attention: str | None,
    refused: Sequence[str] = ATTENTION_SETTINGS,
) -> str | None:
    """Return why a layer or embeddings may compute something else than their parts tell, or None if they do not.

    Everything unknown is refused: an adapter inside the layer, a hook, a quantized linear.

    Args:
        layer: of a family, or its embeddings.
        checks: dotted name of each part ``->`` why the module there is not such a part, or None.
        attention: dotted name of the module that computes attention from some of the parts; None for embeddings.
        refused: those of `ATTENTION_SETTINGS` that this module, or its config, may not have.
    """
    found = dict(layer.named_modules())
    missing = sorted(checks.keys() - found.keys())
    if missing:
        cure = "" if attention is None else "; an adapter of layers of another form has names=None"
        return f"{type(layer).__name__} has no module {missing[0]}, which the adapter names{cure}"
    for path, module in found.items():
        title = f"{path or 'the layer'} ({type(module).__name__})"
        if hooked(module):
            return f"{title} has a forward hook"
        if path in checks:
            if reason := checks[path](module):
                return f"{title} {reason}"
        elif type(module) in WITHOUT_EFFECT:
            continue
        elif path == attention and (reason := _attention_unsupported_reason(module, refused)):
            return f"{title} {reason}"
        elif module._parameters or not len(module._modules) or not type(module).__module__.startswith("transformers."):
            return f"{title} is not supported"
    return None


def _attention_unsupported_reason(module: Any, refused: Sequence[str]) -> str | None:
    """Return why an attention module is not softmax(q k / sqrt(D)) v over tokens on both sides of a token, or None."""
    for name in refused:
        for holder in (module, getattr(module, "config", None)):
            if (value := getattr(holder, name, None)) is not None:
                return f"has {name} {value}, which layers of this form do not"
    if getattr(module, "is_causal", False):
        return "is causal"
    scaling = getattr(module, "scaling", None)
    size = head_width(module)
    if scaling is not None and size and not math.isclose(scaling, size**-0.5):
        return f"scales by {scaling:g}, expected 1 / sqrt({size})"
    return None


def head_width(module: Any) -> int | None:
    """Return the width of the heads of an attention module, or None where it does not tell."""
    return getattr(module, "attention_head_size", None) or getattr(module, "head_dim", None)
