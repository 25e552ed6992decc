"""Readers of modules that can be computed from their weights and settings, without calling them.

A reader returns what the weights and settings are, without copies, or raises `Unsupported` with the reason why the
module may compute something else. Everything unknown is refused: an adapter inside a layer, a hook, a quantized linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.activations import ACT2CLS

from earlyexit_kernels.errors import Unsupported

#: Classes of the activations that a config of transformers can name.
ACTIVATION_CLASSES = {each[0] if isinstance(each, tuple) else each for each in ACT2CLS.values()}
#: Modules that return their input in eval mode.
WITHOUT_EFFECT = (nn.Dropout, nn.Identity)
#: Settings by which attention modules of transformers ask for a window, and for soft-capped scores.
ATTENTION_SETTINGS = ("sliding_window", "attn_logit_softcapping")


def hooked(module: nn.Module) -> bool:
    """Return whether an instance has hooks, or its own `forward`, as `accelerate` sets one."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def read_parts(
    layer: nn.Module,
    readers: Mapping[str, Callable[[nn.Module], Any]],
    attention: str | None,
    refused: Sequence[str] = ATTENTION_SETTINGS,
) -> dict[str, Any]:
    """Return what the reader of each part returns, by dotted name.

    Args:
        layer: of a family, or its embeddings.
        readers: dotted name of each part ``->`` its reader.
        attention: dotted name of the module that computes attention from some of the parts; None for embeddings.
        refused: those of `ATTENTION_SETTINGS` that this module, or its config, may not have.

    Raises:
        Unsupported: the layer may compute something else than its parts tell.
    """
    modules = dict(layer.named_modules())
    missing = sorted(readers.keys() - modules.keys())
    if missing:
        hint = "" if attention is None else "; an adapter of layers of another form has names=None"
        raise Unsupported(f"{type(layer).__name__} has no module {missing[0]}, which the adapter names{hint}")
    parts = {}
    for path, module in modules.items():
        title = f"{path or 'the layer'} ({type(module).__name__})"
        if hooked(module):
            raise Unsupported(f"{title} has a forward hook")
        try:
            if path in readers:
                parts[path] = readers[path](module)
            elif type(module) not in WITHOUT_EFFECT:
                if path == attention:
                    _check_attention(module, refused)
                _check_holds_modules_only(module)
        except Unsupported as error:
            raise Unsupported(f"{title} {error}") from None
    return parts


def _check_holds_modules_only(module: nn.Module) -> None:
    if module._parameters or not len(module._modules) or not type(module).__module__.startswith("transformers."):
        raise Unsupported("is not supported")


def _check_attention(module: Any, refused: Sequence[str]) -> None:
    """Check that an attention module is softmax(q k / sqrt(D)) v over tokens on both sides of a token."""
    for name in refused:
        for holder in (module, getattr(module, "config", None)):
            if (value := getattr(holder, name, None)) is not None:
                raise Unsupported(f"has {name} {value}, which layers of this form do not")
    if getattr(module, "is_causal", False):
        raise Unsupported("is causal")
    scaling, size = getattr(module, "scaling", None), head_width(module)
    if scaling is not None and size and not math.isclose(scaling, size**-0.5):
        raise Unsupported(f"scales by {scaling:g}, expected 1 / sqrt({size})")


def head_width(module: Any) -> int | None:
    """Return the width of the heads of an attention module, or None where it does not tell."""
    return getattr(module, "attention_head_size", None) or getattr(module, "head_dim", None)
