"""What a pass reads: inputs, and the parts and settings of a model, taken once, so that no later change reaches it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlyexit_kernels.backbones import BackboneAdapter
from earlyexit_kernels.criteria import Criterion, resolve_backend
from earlyexit_kernels.errors import BackendUnavailableError
from earlyexit_kernels.heads import ExitHeads

#: Setting -> its values; the first is the default. Back-ends are checked where the device is known.
OPTIONS = {
    "path": ("auto", "eager", "fused", "captured"),
    "weights": ("float32", "float16", "bfloat16", "int8"),
    "compaction": ("auto", "always", "never"),
}


class Inputs(NamedTuple):
    """The inputs of one batch, in the order of the arguments of `forward`.

    Attributes:
        input_ids: ``[N, S]``, int64 once checked.
        attention_mask: ``[N, S]``, nonzero for tokens; None: all are tokens.
        token_type_ids, position_ids: ``[N, S]`` or ``[1, S]`` integers; None: those of the stock model.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None

    @property
    def rows(self) -> int:
        """N."""
        return self.input_ids.shape[0]


@dataclass(frozen=True)
class Settings:
    """How a model runs its batches; `model.configure` changes them, and they are not saved.

    Attributes:
        path: what runs the layers in eval mode. ``"eager"``: the layers of the family, on any device. ``"fused"``: the
            same function, up to rounding, from packed copies of the weights (CPU). ``"captured"``: the layers of the
            family in CUDA graphs. ``"auto"``: fused or captured where supported.
        weights: type in which fused layers store their weights; another one than ``"float32"`` needs path ``"fused"``.
        backend: of the ops: ``"auto"``, ``"torch"``, ``"triton"`` or ``"cpp"``.
        compaction: when live rows are moved together: ``"auto"`` (where it pays), ``"always"`` (at every exit) or
            ``"never"``.

    Raises:
        ValueError: an unknown value, or weights that the path does not have.
    """

    path: str = "auto"
    weights: str = "float32"
    backend: str = "auto"
    compaction: str = "auto"

    def __post_init__(self) -> None:
        for name, options in OPTIONS.items():
            if (value := getattr(self, name)) not in options:
                raise ValueError(f"{name}: expected one of {options}, got {value!r}")
        if self.weights != "float32" and self.path != "fused":
            raise ValueError(
                f"weights={self.weights!r} changes results, so it must be asked for with path 'fused', got "
                f"{self.path!r}"
            )


@dataclass(frozen=True)
class View:
    """The parts of a model that a pass reads.

    Attributes:
        adapter, backbone: the encoder.
        heads: its exits.
        criterion: decides which rows leave.
        classes: C.
        task: the problem type, as in transformers.
        strict: whether invalid logits raise.
        settings: how batches run.
        layer_macs: multiply-adds of one layer on one token.
    """

    adapter: BackboneAdapter
    backbone: Any
    heads: ExitHeads
    criterion: Criterion
    classes: int
    task: str = "single_label_classification"
    strict: bool = False
    settings: Settings = Settings()
    layer_macs: int = 0

    @functools.cached_property
    def device(self) -> torch.device:
        """The device of the encoder."""
        return embedding_weight(self.backbone).device

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of the encoder."""
        return embedding_weight(self.backbone).dtype

    @functools.cached_property
    def layers(self) -> Sequence[nn.Module]:
        """The L layers."""
        return self.adapter.layers(self.backbone)  # type: ignore[return-value]

    @property
    def exit_norm(self) -> nn.Module | None:
        """The norm at the end of the encoder, which its layers do not have, or None."""
        return self.adapter.exit_norm(self.backbone)

    @property
    def replica_reason(self) -> str:
        """Why nothing may be made from the weights and kept, or ``""``: they are those of a replica."""
        return "the weights of a replica of nn.DataParallel last for one batch" if is_replica(self.backbone) else ""

    @property
    def backend(self) -> str:
        """The name of the back-end that the ops were asked to run on; a float64 model runs on torch only.

        Raises:
            BackendUnavailableError: another one was asked for in a float64 model.
        """
        name = self.settings.backend
        if self.dtype != torch.float64:
            return name
        if name not in ("auto", "torch"):
            raise BackendUnavailableError(
                f"backend {name!r} does not support a float64 model; use 'auto' or 'torch', or call model.float()"
            )
        return "torch"

    @property
    def exit_backend(self) -> str:
        """The back-end of the exits on the device of the model.

        Raises:
            ValueError: an unknown name.
            BackendUnavailableError: it cannot run there or in float64, or does not implement the criterion.
        """
        return resolve_backend(self.criterion.exit_rule.name, self.backend, self.device)


def embedding_weight(backbone: Any) -> Tensor:
    """Return the weight of the token embeddings, for its dtype and device.

    A replica of `torch.nn.DataParallel` has no parameters, so that its `device` and `dtype` raise; its modules hold
    their weights as plain attributes.
    """
    return backbone.get_input_embeddings().weight


def is_replica(module: nn.Module) -> bool:
    """Return whether a module is part of a replica that `torch.nn.DataParallel` made for one batch.

    Replicas have new modules around new tensors, share all other attributes with the model, and run in threads.
    """
    return getattr(module, "_is_replica", False)
