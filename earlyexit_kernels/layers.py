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
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter, LayerNames
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.ops import ENCODER_LAYERS
from earlyexit_kernels.packing import AttentionPlan

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


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one encoder layer, in the order of `ops.encoder_layer`; only query, key and value are copied.

    Attributes:
        tensors: weight and bias of query, key and value as one, of out, of the first norm, of inner, of outer, of the
            second norm.
        eps: of the norms.
        heads: of the attention.
        activation: name and variant, a value of `ACTIVATIONS`.
    """

    tensors: list[Tensor]
    eps: list[float]
    heads: int
    activation: tuple[str, str]

    @staticmethod
    def of(layer: nn.Module, names: LayerNames, heads: int) -> LayerWeights:
        """Those of a family's layer, of which `why_not` has nothing to say."""
        part: dict[str, Any] = {name: layer.get_submodule(getattr(names, name)) for name in PART_TYPES}
        attention = [part["query"], part["key"], part["value"]]
        qkv = [_joined(attention, "weight"), _joined(attention, "bias")]
        out, first, inner, outer, second = (
            [part[name].weight.detach(), part[name].bias.detach()]
            for name in ("attention_out", "attention_norm", "inner", "outer", "norm")
        )
        eps = [part["attention_norm"].eps, part["norm"].eps]
        activation = ACTIVATIONS[type(part["activation"]).__name__]
        return LayerWeights([*qkv, *out, *first, *inner, *outer, *second], eps, heads, activation)

    @property
    def linears(self) -> list[Tensor]:
        """The weights of the four products."""
        return [self.tensors[i] for i in (0, 2, 6, 8)]


@dataclass(frozen=True)
class FusedLayer:
    """One encoder layer over packed tokens, called as the family's own is: ``layer(hidden, None, plan=...)``.

    Attributes:
        weights: of the layer.
        packed: those of its products as oneDNN wants them, or nothing.
        products: how the products are computed.
        run: the op.
    """

    weights: LayerWeights
    packed: list[Tensor]
    products: Products
    run: Callable[..., Tensor]

    @staticmethod
    def of(weights: LayerWeights, backend: str) -> FusedLayer:
        """Pack a layer's weights."""
        # where oneDNN's names are missing they mustn't even be looked up
        onednn = not why_not_onednn(weights.tensors[0].dtype)
        return FusedLayer(
            weights=weights,
            packed=[torch.ops.mkldnn._reorder_linear_weight(w, None) for w in weights.linears] if onednn else [],
            products=PRODUCTS.get(torch.backends.cpu.get_cpu_capability(), PRODUCTS["DEFAULT"]),
            run=ENCODER_LAYERS[backend],
        )

    def __call__(self, hidden: Tensor, mask: None, *, plan: AttentionPlan) -> Tensor:
        """``[1, T, H] -> [1, T, H]``."""
        x, own = hidden[0], self.weights
        packed = self.packed if x.shape[0] <= self.products.packed_up_to else []
        how = (own.eps, own.heads, *own.activation, self.products.with_activation)
        return self.run(x, own.tensors, packed, *how, *plan.bucket_lists, plan.inverse)[None]


def _joined(linears: Sequence[nn.Linear], name: str) -> Tensor:
    """Weights or biases of linears that read the same, as those of one."""
    return torch.cat([getattr(linear, name).detach() for linear in linears])


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
        if hooked(module):
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


def why_not_all(adapter: BackboneAdapter, layers: Sequence[nn.Module]) -> str:
    """Empty where every layer of a backbone, as its adapter lists them, can be computed from its weights alone."""
    reasons = [why_not(part, adapter.names) for layer in dict.fromkeys(layers) for part in adapter.parts(layer)]
    reasons += [f"a layer ({type(layer).__name__}) has a forward hook" for layer in layers if hooked(layer)]
    return next((reason for reason in reasons if reason), "")


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says; `accelerate` replaces the forward of an instance."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


@dataclass(frozen=True)
class Seen:
    """What a packing was made from, to tell whether it still holds.

    Asked at every batch, where a loop in Python over all weights would take as long as several exits: what is looked
    at is listed once, and compared by what runs in C.

    Attributes:
        tables, bare: children and parameters of each module, those that hold something and those that hold nothing.
        hooks, own: hooks of each module, and its own attributes.
        entries: what the tables hold.
        tensors, versioned: the parameters, and those of them that count their writes.
        marks: whether a hook is there or a forward replaced, addresses, and writes counted.
    """

    tables: tuple[dict[str, Any], ...]
    bare: tuple[dict[str, Any], ...]
    hooks: tuple[dict[int, Any], ...]
    own: tuple[dict[str, Any], ...]
    entries: tuple[Any, ...]
    tensors: tuple[Tensor, ...]
    versioned: tuple[Tensor, ...]
    marks: list[int]

    @staticmethod
    def of(layers: Sequence[nn.Module]) -> Seen:
        """What these modules and those in them are made of now."""
        modules = tuple({id(m): m for layer in layers for m in layer.modules()}.values())
        tables: list[dict[str, Any]] = [table for m in modules for table in (m._modules, m._parameters)]
        full = tuple(table for table in tables if table)
        entries = tuple(_values(full))
        tensors = tuple(entry for entry in entries if isinstance(entry, Tensor))
        seen = Seen(
            full,
            tuple(table for table in tables if not table),
            tuple(table for m in modules for table in (m._forward_hooks, m._forward_pre_hooks)),
            tuple(m.__dict__ for m in modules),
            entries,
            tensors,
            # a tensor made in inference mode keeps no version
            tuple(tensor for tensor in tensors if not tensor.is_inference()),
            [],
        )
        seen.marks.extend(seen._looks())
        return seen

    def holds(self) -> bool:
        """Whether all of it is as it was."""
        now = tuple(_values(self.tables))
        same = len(now) == len(self.entries) and all(map(operator.is_, now, self.entries))
        return same and not any(self.bare) and self._looks() == self.marks

    def _looks(self) -> list[int]:
        replaced = any("forward" in table for table in self.own)
        return [any(self.hooks), replaced, *map(Tensor.data_ptr, self.tensors), *map(_VERSION, self.versioned)]


_VERSION = operator.attrgetter("_version")


def _values(tables: Sequence[dict[str, Any]]) -> Iterator[Any]:
    return itertools.chain.from_iterable(map(dict.values, tables))


class FusedLayers:
    """The fused layers of one model, packed when first asked for, and again when something about them has changed.

    Seen are another module, hook or weight, and a weight written to; one written to through ``weight.data``, behind
    autograd's back, isn't: `forget` it. Copies and pickles of the model start without.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._packed: tuple[Seen, tuple[Callable[..., Tensor], ...] | None, str] | None = None

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
                packed = self._packed
                if packed is None or not packed[0].holds():
                    packed = self._packed = _pack(adapter, backbone)
        return packed[1], packed[2]


def _pack(adapter: BackboneAdapter, backbone: nn.Module) -> tuple[Seen, tuple[Callable[..., Tensor], ...] | None, str]:
    layers: Any = tuple(adapter.layers(backbone))
    config: Any = backbone.config
    seen = Seen.of(layers)
    parts = {layer: adapter.parts(layer) for layer in layers}
    reason = why_not_all(adapter, layers)
    if reason:
        return seen, None, reason
    heads, backend = config.num_attention_heads, "torch" if available_backends("cpu")["cpp"] else "cpp"
    fused = {
        layer: _in_turn([FusedLayer.of(LayerWeights.of(part, adapter.names, heads), backend) for part in each])
        for layer, each in parts.items()
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
