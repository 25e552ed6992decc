"""Fused encoder layers: a family's own layer in fewer and faster steps, for inference on the CPU.

A layer of the original form (`backbones.LayerNames`) becomes one product for query, key and value, attention over the
packed tokens, and three products that add, activate or both in the same step, from weights that oneDNN has packed once.
The family's own weights stay where they are; the packed ones are a second copy, made anew when they change.

oneDNN caches each product by its number of tokens, so memory grows until the token counts up to
`Products.packed_up_to`, or 1024 products in all, have occurred. The environment variable
ONEDNN_PRIMITIVE_CACHE_CAPACITY sets a lower limit. Token counts are not rounded up to steps instead, because the added
tokens slow the products down.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter, LayerNames
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.engine.fingerprint import ModuleFingerprint
from earlyexit_kernels.engine.packing import AttentionPlan
from earlyexit_kernels.ops import ENCODER_LAYERS

#: Activation of transformers -> the name and variant that oneDNN and torch know it by.
ACTIVATIONS = {
    "GELUActivation": ("gelu", "none"),
    "NewGELUActivation": ("gelu", "tanh"),
    "GELUTanh": ("gelu", "tanh"),
    "ReLU": ("relu", ""),
}


@dataclass(frozen=True)
class Products:
    """How a layer's products are computed.

    Attributes:
        packed_up_to: tokens up to which oneDNN's products of packed weights are used; beyond, torch's own are faster.
        with_activation: whether oneDNN computes the activation in the product too.
    """

    packed_up_to: float
    with_activation: bool


#: By what the CPU computes with, as torch calls it; benchmarks/micro/layer_products.py measures both.
PRODUCTS = {
    "DEFAULT": Products(128, with_activation=False),
    "AVX2": Products(128, with_activation=False),
    "AVX512": Products(math.inf, with_activation=True),
}
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


class Pair(NamedTuple):
    """Weight and bias of a module, detached: they share its memory."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one encoder layer, without copies.

    Attributes:
        query, key, value, attention_out, attention_norm, inner, outer, norm: as in `backbones.LayerNames`.
        eps: of the two norms.
        heads: number of attention heads.
        activation: name and variant, a value of `ACTIVATIONS`.
    """

    query: Pair
    key: Pair
    value: Pair
    attention_out: Pair
    attention_norm: Pair
    inner: Pair
    outer: Pair
    norm: Pair
    eps: list[float]
    heads: int
    activation: tuple[str, str]

    @staticmethod
    def of(layer: nn.Module, names: LayerNames, heads: int) -> LayerWeights:
        """The weights of a layer for which `why_not` returns no reason."""
        part: dict[str, Any] = {name: layer.get_submodule(getattr(names, name)) for name in PART_TYPES}
        pairs = {
            name: Pair(part[name].weight.detach(), part[name].bias.detach())
            for name, kind in PART_TYPES.items()
            if kind
        }
        eps = [part["attention_norm"].eps, part["norm"].eps]
        return LayerWeights(**pairs, eps=eps, heads=heads, activation=ACTIVATIONS[type(part["activation"]).__name__])

    @property
    def projections(self) -> tuple[Pair, Pair, Pair]:
        """Query, key and value."""
        return self.query, self.key, self.value


@dataclass(frozen=True)
class FusedLayer:
    """One encoder layer over packed tokens, called as the family's own is: ``layer(hidden, None, plan=...)``.

    Attributes:
        weights: of the layer.
        tensors: what the op reads: weight and bias of query, key and value concatenated (copies), of the attention's
            output, of the first norm, of inner, of outer, of the second norm.
        packed: weights of the four products in oneDNN's layout (copies), or nothing.
        products: how the products are computed.
        run: the op.
    """

    weights: LayerWeights
    tensors: list[Tensor]
    packed: list[Tensor]
    products: Products
    run: Callable[..., Tensor]

    @staticmethod
    def of(weights: LayerWeights, backend: str) -> FusedLayer:
        """Pack the weights of a layer."""
        joined = Pair(*(torch.cat(each) for each in zip(*weights.projections, strict=True)))
        after = (weights.attention_out, weights.attention_norm, weights.inner, weights.outer, weights.norm)
        products = [joined.weight, weights.attention_out.weight, weights.inner.weight, weights.outer.weight]
        # where oneDNN's names are missing they mustn't even be looked up
        onednn = not why_not_onednn(joined.weight.dtype)
        return FusedLayer(
            weights=weights,
            tensors=[*joined, *itertools.chain.from_iterable(after)],
            packed=[torch.ops.mkldnn._reorder_linear_weight(w, None) for w in products] if onednn else [],
            products=PRODUCTS.get(torch.backends.cpu.get_cpu_capability(), PRODUCTS["DEFAULT"]),
            run=ENCODER_LAYERS[backend],
        )

    def __call__(self, hidden: Tensor, mask: None, *, plan: AttentionPlan) -> Tensor:
        """``[1, T, H] -> [1, T, H]``."""
        x, own = hidden[0], self.weights
        packed = self.packed if x.shape[0] <= self.products.packed_up_to else []
        how = (own.eps, own.heads, *own.activation, self.products.with_activation)
        return self.run(x, self.tensors, packed, *how, *plan.bucket_lists, plan.inverse)[None]


def why_not(layer: nn.Module, names: LayerNames) -> str:
    """Empty where `FusedLayer.of` computes what a layer computes, else what about the layer is its own.

    Whatever isn't known is refused: an adapter put into the layer, a hook, a quantised linear.
    """
    wanted = {getattr(names, name): kind for name, kind in PART_TYPES.items()}
    found, attention = dict(layer.named_modules()), names.query.rpartition(".")[0]
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        return f"the layer has no module {missing[0]}"
    for path, module in found.items():
        title = f"{path or 'the layer'} ({type(module).__name__})"
        kind = wanted.get(path)
        if hooked(module):
            return f"{title} has a forward hook"
        if kind is not None:
            if type(module) is not kind or {type(module._parameters.get(n)) for n in Pair._fields} != {nn.Parameter}:
                return f"{title} isn't a plain {kind.__name__} with weight and bias"
        elif path in wanted:
            if type(module).__name__ not in ACTIVATIONS:
                return f"{title} is none of the activations {sorted(ACTIVATIONS)}"
        elif isinstance(module, nn.Dropout):
            continue
        elif path == attention and (reason := _why_not_attention(module)):
            return f"{title} {reason}"
        elif module._parameters or not len(module._modules) or not type(module).__module__.startswith("transformers."):
            return f"{title} isn't known"
    return ""


def _why_not_attention(module: Any) -> str:
    """Empty where a family's attention module computes softmax(q k / sqrt(D)) v over all tokens of a row."""
    if getattr(module, "is_causal", False):
        return "is causal"
    scaling, size = getattr(module, "scaling", None), getattr(module, "attention_head_size", None)
    if scaling is not None and size and not math.isclose(scaling, size**-0.5):
        return f"scales by {scaling:g}, expected 1 / sqrt({size})"
    return ""


def why_not_all(adapter: BackboneAdapter, layers: Sequence[nn.Module]) -> str:
    """Empty where every layer of a backbone, as its adapter lists them, can be computed from its weights alone."""
    reasons = [why_not(part, adapter.names) for layer in dict.fromkeys(layers) for part in adapter.parts(layer)]
    reasons += [f"a layer ({type(layer).__name__}) has a forward hook" for layer in layers if hooked(layer)]
    return next((reason for reason in reasons if reason), "")


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says; `accelerate` replaces the forward of an instance."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


class FusedLayers:
    """The fused layers of one model: packed at first use, and again when anything they were made from has changed.

    Copies and pickles of the model start without.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._packed: _Packed | None = None
        _ALL.add(self)

    def __deepcopy__(self, memo: Any) -> FusedLayers:
        return FusedLayers()

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedLayers, ()

    def forget(self) -> None:
        """Drop what is packed, also what another thread is packing now."""
        with self._lock:
            self._packed = None

    def of(self, adapter: BackboneAdapter, backbone: nn.Module) -> tuple[Sequence[Callable[..., Any]] | None, str]:
        """The L layers of a backbone, fused; None and the reason where they can't be.

        Args:
            adapter: of its family.
            backbone: on the CPU.
        """
        packed = self._packed
        if packed is None or not packed.made_from.is_current([backbone]):
            with self._lock:
                packed = self._packed
                if packed is None or not packed.made_from.is_current([backbone]):
                    packed = self._packed = _pack(adapter, backbone)
        return packed.layers, packed.reason

    def why_not(self, adapter: BackboneAdapter, backbone: nn.Module) -> str:
        """The reason that `of` would give; packs nothing."""
        packed = self._packed
        if packed is not None and packed.made_from.is_current([backbone]):
            return packed.reason
        return why_not_all(adapter, adapter.layers(backbone))  # type: ignore[arg-type]


class _Packed(NamedTuple):
    made_from: ModuleFingerprint
    layers: tuple[Callable[..., Tensor], ...] | None
    reason: str


#: All instances, for `_reset_locks`.
_ALL: weakref.WeakSet[FusedLayers] = weakref.WeakSet()


def _reset_locks() -> None:
    """Give a forked child new locks: a thread that held one in the parent doesn't exist in the child."""
    for each in _ALL:
        each._lock = threading.Lock()


os.register_at_fork(after_in_child=_reset_locks)


def _pack(adapter: BackboneAdapter, backbone: nn.Module) -> _Packed:
    layers: Any = tuple(adapter.layers(backbone))
    reason = why_not_all(adapter, layers)
    if reason:
        return _Packed(ModuleFingerprint([backbone]), None, reason)
    config: Any = backbone.config
    heads, backend = config.num_attention_heads, "torch" if available_backends("cpu")["cpp"] else "cpp"
    parts = {layer: adapter.parts(layer) for layer in layers}
    # taken before the weights are copied, so that a change during the copy is detected at the next batch
    made_from = ModuleFingerprint([backbone], [x for each in parts.values() for x in _copied(each, adapter.names)])
    fused = {
        layer: _in_turn([FusedLayer.of(LayerWeights.of(part, adapter.names, heads), backend) for part in each])
        for layer, each in parts.items()
    }
    return _Packed(made_from, tuple(fused[layer] for layer in layers), "")


def _copied(parts: Sequence[nn.Module], names: LayerNames) -> Iterator[Tensor]:
    """The parameters that `FusedLayer.of` copies."""
    for part in parts:
        for name in ("query", "key", "value", "attention_out", "inner", "outer"):
            linear: Any = part.get_submodule(getattr(names, name))
            yield linear.weight
            if name in ("query", "key", "value"):
                yield linear.bias


def _in_turn(parts: Sequence[FusedLayer]) -> Callable[..., Tensor]:
    if len(parts) == 1:
        return parts[0]

    def run(hidden: Tensor, mask: None, *, plan: AttentionPlan) -> Tensor:
        for part in parts:
            hidden = part(hidden, mask, plan=plan)
        return hidden

    return run
