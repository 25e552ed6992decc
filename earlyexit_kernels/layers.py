"""Fused encoder layers: a family's own layer in fewer and faster steps, for inference on the CPU.

A layer of the original form (`backbones.LayerNames`) becomes one product for query, key and value, attention over the
packed tokens, and three products that add, activate or both in the same step, from weights that oneDNN has packed once.
The family's own weights stay where they are; the packed ones are a second copy, made anew when they change.
"""

from __future__ import annotations

import functools
import math
import operator
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter, LayerNames
from earlyexit_kernels.packing import AttentionPlan, attend

#: Activation of transformers -> the name and variant that oneDNN and torch know it by.
ACTIVATIONS = {
    "GELUActivation": ("gelu", "none"),
    "NewGELUActivation": ("gelu", "tanh"),
    "GELUTanh": ("gelu", "tanh"),
    "ReLU": ("relu", ""),
}
#: Up to how many tokens oneDNN's packed products are the faster ones, by what the CPU computes with; None: always.
#: Beyond, torch's own products of the same weights run. Measured by benchmarks/micro/layer_products.py.
PACKED_UP_TO: dict[str, int | None] = {"DEFAULT": 128, "AVX2": 128, "AVX512": None}
#: What each part of a layer has to be; the activation is one of `ACTIVATIONS`.
PART_TYPES: dict[str, type[nn.Module] | None] = {
    **dict.fromkeys(("query", "key", "value", "attention_out", "inner", "outer"), nn.Linear),
    **dict.fromkeys(("attention_norm", "norm"), nn.LayerNorm),
    "activation": None,
}


@functools.cache
def why_not_onednn(dtype: torch.dtype) -> str:
    """Empty where oneDNN's packed products can be had for a dtype, else the reason.

    They are private names of torch, so a product is tried.
    """
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "this CPU has no bfloat16 arithmetic"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it isn't used for {dtype}"
        x, w, b = torch.ones(3, 16, dtype=dtype), torch.eye(16, dtype=dtype), torch.ones(16, dtype=dtype)
        packed = torch.ops.mkldnn._reorder_linear_weight(w, None)
        plain = torch.ops.mkldnn._linear_pointwise(x, packed, b, "relu", [], "")
        added = torch.ops.mkldnn._linear_pointwise.binary(x, x, packed, b, "add")
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        return f"torch {torch.__version__} lacks what this needs of oneDNN ({error})"
    right = torch.equal(plain, x + 1) and torch.equal(added, x + 2)
    return "" if right else f"torch {torch.__version__} means something else by these names of oneDNN"


@dataclass(frozen=True)
class Product:
    """A linear with what may follow it in the same step.

    Attributes:
        weight: ``[out, in]``.
        bias: ``[out]``.
        packed: the weight as oneDNN wants it, or None.
        packed_up_to: tokens up to which it is used.
    """

    weight: Tensor
    bias: Tensor
    packed: Tensor | None = None
    packed_up_to: float = math.inf

    @staticmethod
    def of(*linears: nn.Linear) -> Product:
        """One product for linears that read the same, their outputs side by side."""
        weight, bias = (_beside([getattr(linear, name).detach() for linear in linears]) for name in ("weight", "bias"))
        if why_not_onednn(weight.dtype):
            return Product(weight, bias)
        limit = PACKED_UP_TO.get(torch.backends.cpu.get_cpu_capability(), PACKED_UP_TO["DEFAULT"])
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        return Product(weight, bias, packed, math.inf if limit is None else limit)

    def packed_for(self, x: Tensor) -> Tensor | None:
        """The packed weight where it is the faster one for ``x [T, in]``."""
        return self.packed if x.shape[0] <= self.packed_up_to else None

    def plain(self, x: Tensor) -> Tensor:
        """``x W + b``."""
        packed = self.packed_for(x)
        if packed is None:
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, "none", [], "")

    def activated(self, x: Tensor, name: str, variant: str) -> Tensor:
        """``f(x W + b)`` for an f of `ACTIVATIONS`."""
        packed = self.packed_for(x)
        if packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, packed, self.bias, name, [], variant)
        y = F.linear(x, self.weight, self.bias)
        return torch.ops.aten.gelu_(y, approximate=variant) if name == "gelu" else y.relu_()

    def added(self, x: Tensor, other: Tensor) -> Tensor:
        """``x W + b + other``."""
        packed = self.packed_for(x)
        if packed is None:
            return F.linear(x, self.weight, self.bias).add_(other)
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, packed, self.bias, "add")


def _beside(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tuple(tensors))


@dataclass(frozen=True)
class Norm:
    """A layer norm's numbers."""

    shape: tuple[int, ...]
    weight: Tensor
    bias: Tensor
    eps: float

    @staticmethod
    def of(norm: nn.LayerNorm) -> Norm:
        return Norm(tuple(norm.normalized_shape), norm.weight.detach(), norm.bias.detach(), norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class FusedLayer:
    """One encoder layer over packed tokens, called as the family's own is: ``layer(hidden, None, plan=...)``."""

    heads: int
    qkv: Product
    attention_out: Product
    attention_norm: Norm
    inner: Product
    activation: tuple[str, str]
    outer: Product
    norm: Norm

    @staticmethod
    def of(layer: nn.Module, names: LayerNames, heads: int) -> FusedLayer:
        """Pack a family's layer, of which `why_not` has nothing to say."""
        part: dict[str, Any] = {name: layer.get_submodule(getattr(names, name)) for name in PART_TYPES}
        return FusedLayer(
            heads,
            Product.of(part["query"], part["key"], part["value"]),
            Product.of(part["attention_out"]),
            Norm.of(part["attention_norm"]),
            Product.of(part["inner"]),
            ACTIVATIONS[type(part["activation"]).__name__],
            Product.of(part["outer"]),
            Norm.of(part["norm"]),
        )

    def __call__(self, hidden: Tensor, mask: None, *, plan: AttentionPlan) -> Tensor:
        """``[1, T, H] -> [1, T, H]``."""
        x = hidden[0]
        x = self.attention_norm(self.attention_out.added(attend(self.qkv.plain(x), plan, self.heads), x))
        return self.norm(self.outer.added(self.inner.activated(x, *self.activation), x))[None]


def why_not(layer: nn.Module, names: LayerNames) -> str:
    """Empty where `FusedLayer.of` computes what a layer computes, else what about the layer is its own.

    Whatever isn't known is refused: an adapter put into the layer, a hook, a quantised linear.
    """
    wanted = {getattr(names, name): kind for name, kind in PART_TYPES.items()}
    found = dict(layer.named_modules())
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        return f"the layer has no module {missing[0]}"
    for path, module in found.items():
        title = f"{path or 'the layer'} ({type(module).__name__})"
        kind = wanted.get(path)
        if _hooked(module):
            return f"{title} has a forward hook"
        if kind is not None:
            if type(module) is not kind or any(module._parameters.get(name) is None for name in ("weight", "bias")):
                return f"{title} isn't a plain {kind.__name__} with weight and bias"
        elif path in wanted:
            if type(module).__name__ not in ACTIVATIONS:
                return f"{title} is none of the activations {sorted(ACTIVATIONS)}"
        elif isinstance(module, nn.Dropout):
            continue
        elif module._parameters or not len(module._modules) or not type(module).__module__.startswith("transformers."):
            return f"{title} isn't known"
    return ""


def _hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says; `accelerate` replaces the forward of an instance."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


@dataclass(frozen=True)
class _Seen:
    """What a packing was made from, to tell whether it still holds; asked at every batch, so it takes no detours."""

    modules: tuple[nn.Module, ...]
    children: list[nn.Module | None]
    tensors: list[Tensor | None]
    written: list[int]

    @staticmethod
    def of(layers: Sequence[nn.Module]) -> _Seen:
        modules = tuple({id(m): m for layer in layers for m in layer.modules()}.values())
        return _Seen(modules, *_looks(modules))

    def holds(self) -> bool:
        children, tensors, written = _looks(self.modules)
        return (
            written == self.written
            and len(children) == len(self.children)
            and len(tensors) == len(self.tensors)
            and all(map(operator.is_, children, self.children))
            and all(map(operator.is_, tensors, self.tensors))
            and not any(map(_hooked, self.modules))
        )


def _looks(modules: Sequence[nn.Module]) -> tuple[list[nn.Module | None], list[Tensor | None], list[int]]:
    """The modules' children, their tensors, and address and version of each of these."""
    children = [child for m in modules for child in m._modules.values()]
    tensors = [tensor for m in modules for tensor in m._parameters.values()]
    there = [tensor for tensor in tensors if tensor is not None]
    # a tensor made in inference mode keeps no version
    versions = [tensor._version for tensor in there if not tensor.is_inference()]
    return children, tensors, [tensor.data_ptr() for tensor in there] + versions


class FusedLayers:
    """The fused layers of one model, packed when first asked for, and again when something about them has changed.

    Seen are another module, hook or weight, and a weight written to; one written to through ``weight.data``, behind
    autograd's back, isn't: `forget` it. Copies and pickles of the model start without.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._packed: tuple[_Seen, tuple[Callable[..., Tensor], ...] | None, str] | None = None

    def __deepcopy__(self, memo: Any) -> FusedLayers:
        return FusedLayers()

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedLayers, ()

    def forget(self) -> None:
        """Drop what is packed."""
        self._packed = None

    def of(self, adapter: BackboneAdapter, backbone: nn.Module) -> tuple[Sequence[Callable[..., Any]] | None, str]:
        """The L layers of a backbone, fused; None and the reason where they can't be.

        Args:
            adapter: of its family.
            backbone: on the CPU.
        """
        packed = self._packed
        if packed is None or not packed[0].holds():
            with self._lock:
                packed = self._packed = _pack(adapter, backbone)
        return packed[1], packed[2]


def _pack(adapter: BackboneAdapter, backbone: nn.Module) -> tuple[_Seen, tuple[Callable[..., Tensor], ...] | None, str]:
    layers: Any = tuple(adapter.layers(backbone))
    config: Any = backbone.config
    seen = _Seen.of(layers)
    parts = {layer: adapter.parts(layer) for layer in layers}
    reasons = [why_not(part, adapter.names) for each in parts.values() for part in each]
    reasons += [f"a layer ({type(layer).__name__}) has a forward hook" for layer in parts if _hooked(layer)]
    reason = next((reason for reason in reasons if reason), "")
    if reason:
        return seen, None, reason
    heads = config.num_attention_heads
    fused = {
        layer: _in_turn([FusedLayer.of(part, adapter.names, heads) for part in each]) for layer, each in parts.items()
    }
    return seen, tuple(fused[layer] for layer in layers), ""


def _in_turn(parts: Sequence[FusedLayer]) -> Callable[..., Tensor]:
    if len(parts) == 1:
        return parts[0]

    def run(hidden: Tensor, mask: None, *, plan: AttentionPlan) -> Tensor:
        for part in parts:
            hidden = part(hidden, mask, plan=plan)
        return hidden

    return run
