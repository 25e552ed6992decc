"""The fused layers of one model on the CPU: their forms, and packed copies of their weights that follow changes.

A fused layer computes the same as the family's own in fewer steps, from weights that were packed once. The original
weights stay in place. Each layer has a seal, compared when the loop reaches it: a changed layer is packed again, and
one that is no longer supported runs as the family's own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter, GatedLayerNames, LayerNames
from earlyexit_kernels.backbones.forms_bert import LayerWeights
from earlyexit_kernels.backbones.forms_gated import GatedWeights
from earlyexit_kernels.backbones.forms_layers import check_form, read_layer
from earlyexit_kernels.backends import available_backends
from earlyexit_kernels.core.encoder import Embed, Encoder
from earlyexit_kernels.core.seal import Seal
from earlyexit_kernels.core.view import embedding_weight
from earlyexit_kernels.cpu.bert import BertLayer, OneDnnLayer
from earlyexit_kernels.cpu.embed import embed_alone, embedding_modules
from earlyexit_kernels.cpu.gated import GatedLayer
from earlyexit_kernels.cpu.kernels import PackedLayer, kernels_name, kernels_unsupported_reason
from earlyexit_kernels.cpu.onednn import onednn_unsupported_reason, products_here
from earlyexit_kernels.errors import Unsupported


def pack_bert_layer(weights: LayerWeights, stored: torch.dtype) -> PackedLayer | OneDnnLayer | BertLayer:
    """Return the fused layer of some weights."""
    if kernels_unsupported_reason(weights.inner.weight.dtype, stored) is None:
        return PackedLayer.of(weights, stored)
    return (BertLayer if available_backends("cpu")["cpp"] else OneDnnLayer).of(weights, products_here())


def pack_gated_layer(weights: GatedWeights, stored: torch.dtype) -> GatedLayer:
    """Return the fused layer of some weights."""
    return GatedLayer.of(weights)


#: Class of `BackboneAdapter.names` -> ``(weights, stored) ->`` the fused layer, called as the original one.
PACKERS: dict[type, Callable[[Any, torch.dtype], Callable[..., Tensor]]] = {
    LayerNames: pack_bert_layer,
    GatedLayerNames: pack_gated_layer,
}
#: Those whose packed weights can be stored in another dtype than the model's, by the vector kernels.
STORED_FORMS = (LayerNames,)


def products_of(adapter: BackboneAdapter, dtype: torch.dtype) -> tuple[str, str]:
    """Return what computes the matrix products of fused layers, as `Explanation.products`, and why.

    Args:
        adapter: of a family whose layers have a form.
        dtype: of the model.
    """
    has_kernels = type(adapter.names) in STORED_FORMS
    no_kernels = kernels_unsupported_reason(dtype) if has_kernels else "only layers of BERT's form have them"
    if no_kernels is None:
        return kernels_name(), "vector kernels of the package"
    no_onednn, most = onednn_unsupported_reason(dtype), products_here().packed_up_to
    if no_onednn is not None:
        return "torch", f"no vector kernels ({no_kernels}) and no oneDNN ({no_onednn})"
    beyond = "" if math.isinf(most) else f"; torch's own beyond {most} tokens"
    return "onednn", f"no vector kernels ({no_kernels}){beyond}"


@dataclass(frozen=True)
class Source:
    """What the layers of a model are read from.

    Attributes:
        adapter, backbone: of the model, whose layers have a form.
        stored: dtype of the packed weights; float32 stands for the dtype of the model.
    """

    adapter: BackboneAdapter
    backbone: Any
    stored: torch.dtype

    def is_of(self, adapter: BackboneAdapter, backbone: Any) -> bool:
        """Return whether the layers are those of a model."""
        return self.adapter is adapter and self.backbone is backbone

    def read(self, layer: nn.Module) -> list[Any]:
        """Return the weights of the encoder layers that a layer runs in turn.

        Raises:
            Unsupported: they cannot be fused.
        """
        weights = read_layer(self.adapter, self.backbone, layer)
        if self.stored == torch.float32:
            return weights
        if type(self.adapter.names) not in STORED_FORMS:
            raise Unsupported(
                f"the weights of {self.adapter.model_type!r} cannot be stored in {self.stored}, only those of layers "
                "of BERT's form"
            )
        if reason := kernels_unsupported_reason(embedding_weight(self.backbone).dtype, self.stored):
            raise Unsupported(f"weights stored in {self.stored} require the vector kernels: {reason}")
        return weights

    def pack(self, weights: Any) -> Callable[..., Tensor]:
        """Return the fused layer of what `read` returned for an encoder layer."""
        return PACKERS[type(self.adapter.names)](weights, self.stored)

    def copied(self, layer: nn.Module) -> list[nn.Parameter]:
        """Return the parameters that a packed layer may copy."""
        names: Any = self.adapter.names
        linears = [part.get_submodule(path) for part in self.adapter.parts(layer) for path in names.linears]
        return [parameter for linear in linears for parameter in linear.parameters(recurse=False)]


class Made(NamedTuple):
    """What was made of a module.

    Attributes:
        seal: of the module.
        stored: dtype of the packed weights.
        run: what runs instead of it, or None.
        reason: why it runs itself, or None.
    """

    seal: Seal
    stored: torch.dtype
    run: Callable[..., Tensor] | None
    reason: str | None


class FusedLayers:
    """The fused layers of one model: packed when a batch first reaches them, and again after a change.

    Two threads may pack a layer at the same time, and use either copy. Copies and pickles of the model start without.
    """

    def __init__(self) -> None:
        self.forget()

    def __deepcopy__(self, memo: Any) -> FusedLayers:
        return FusedLayers()

    def __reduce__(self) -> tuple[Any, ...]:
        return FusedLayers, ()

    def forget(self) -> None:
        """Drop the packed weights, also those that another thread is packing now."""
        self._made: dict[nn.Module, Made] = {}
        self._embed: tuple[Source, Seal, Embed] | None = None
        self._checked: Source | None = None

    def encoder(
        self,
        adapter: BackboneAdapter,
        backbone: nn.Module,
        stored: torch.dtype,
        report: Callable[[int, str | None], None],
    ) -> Encoder:
        """Return the encoder of a backbone on the CPU, with fused layers where these are supported.

        Args:
            adapter, backbone: of the model.
            stored: dtype of the packed weights; float32 stands for the dtype of the model.
            report: called when a layer is reached that has been packed just now, or that runs as the family's own, with
                its 1-based number and the reason or None.

        Raises:
            Unsupported: no layer of the family can be fused.
        """
        source = self._source(adapter, backbone, stored)
        layers: Any = tuple(adapter.layers(backbone))
        return Encoder(self._embedding(source), LayersAtUse(self._made, source, layers, report))

    def refusals(self, adapter: BackboneAdapter, backbone: nn.Module, stored: torch.dtype) -> dict[int, str]:
        """Return the reason against each layer that would run as the family's own, by 1-based number. Packs nothing.

        Raises:
            Unsupported: no layer of the family can be fused.
        """
        source, layers = self._source(adapter, backbone, stored), adapter.layers(backbone)
        reasons = {layer: self._reason(source, layer) for layer in dict.fromkeys(layers)}
        return {number: reason for number, layer in enumerate(layers, start=1) if (reason := reasons[layer])}

    def _reason(self, source: Source, layer: Any) -> str | None:
        made = self._made.get(layer)
        if made is not None and made.stored == source.stored and made.seal.holds([layer]):
            return made.reason
        try:
            source.read(layer)
        except Unsupported as error:
            return str(error)
        return None

    def _source(self, adapter: BackboneAdapter, backbone: nn.Module, stored: torch.dtype) -> Source:
        known = self._checked
        if known is None or not known.is_of(adapter, backbone):
            check_form(adapter, backbone)
        self._checked = source = Source(adapter, backbone, stored)
        return source

    def _embedding(self, source: Source) -> Embed:
        adapter, backbone = source.adapter, source.backbone
        modules, made = embedding_modules(adapter, backbone), self._embed
        if made is None or not made[0].is_of(adapter, backbone) or not made[1].holds(modules):
            seal = Seal(modules, configs=[backbone.config])
            kernels = kernels_unsupported_reason(embedding_weight(backbone).dtype)
            alone = kernels is None and type(adapter.names) in STORED_FORMS
            embed = embed_alone(adapter, backbone) if alone else functools.partial(adapter.first_states, backbone)
            made = self._embed = (source, seal, embed)
        return made[2]


class LayersAtUse(Sequence[Callable[..., Any]]):
    """The layers of a model, each of which is checked, and packed at need, when it is taken from the sequence.

    Args:
        made: what was made of each layer.
        source: of the layers.
        layers: of the family.
        report: as for `FusedLayers.encoder`.
    """

    def __init__(
        self,
        made: dict[nn.Module, Made],
        source: Source,
        layers: tuple[nn.Module, ...],
        report: Callable[[int, str | None], None],
    ) -> None:
        self._made, self._source, self._layers, self._report = made, source, layers, report

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[Callable[..., Any]]:
        return map(self.__getitem__, range(len(self._layers)))

    def __getitem__(self, index: Any) -> Any:
        layer = self._layers[index]
        made = self._made.get(layer)
        if made is None or made.stored != self._source.stored or not made.seal.holds([layer]):
            made = self._make(layer)
            self._report(index + 1, made.reason)
        elif made.run is None:
            self._report(index + 1, made.reason)
        return layer if made.run is None else made.run

    def _make(self, layer: nn.Module) -> Made:
        # layers that have been replaced would stay in memory
        for gone in self._made.keys() - set(self._layers):
            self._made.pop(gone, None)
        made = self._made[layer] = _make(self._source, layer)
        return made


def _make(source: Source, layer: nn.Module) -> Made:
    """Pack a layer, or note why not."""
    # seals are made before what they seal is read, so that a change meanwhile is detected at the next batch
    configs = [source.backbone.config]
    checked = Seal([layer], configs=configs)
    try:
        weights = source.read(layer)
    except Unsupported as error:
        return Made(checked, source.stored, None, str(error))
    copied = Seal([layer], source.copied(layer), configs)
    try:
        runs = [source.pack(each) for each in weights]
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"there is not enough memory for a packed copy of the weights: {error}"
        return Made(checked, source.stored, None, reason)
    return Made(copied if checked.holds([layer]) else checked, source.stored, in_turn(runs), None)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory could not be allocated on the CPU."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("not enough memory", "can't allocate memory")
    )


def in_turn(parts: Sequence[Callable[..., Tensor]]) -> Callable[..., Tensor]:
    """Return one callable that runs the encoder layers of a group one after the other."""
    if len(parts) == 1:
        return parts[0]

    def run(hidden: Tensor, **arguments: Any) -> Tensor:
        for part in parts:
            hidden = part(hidden, **arguments)
        return hidden

    return run
