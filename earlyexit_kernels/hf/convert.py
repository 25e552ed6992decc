"""Conversion of a stock sequence classifier to an early-exit model that shares its encoder parameters."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from earlyexit_kernels.backbones import BackboneAdapter, StockHead, adapter_of
from earlyexit_kernels.criteria import Criterion
from earlyexit_kernels.heads import ExitHeads, HeadConfig
from earlyexit_kernels.hf.config import EarlyExitConfig
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.hf.separation import check_separation
from earlyexit_kernels.methods import Method, method_of
from earlyexit_kernels.types import default_problem_type

#: Fields of `HeadConfig` that follow from the family and its config, and not from the method.
OF_FAMILY = (
    *("pooling", "family_pooling", "activation", "dropout", "dropout_before_dense"),
    *("dense_bias", "norm", "norm_eps", "norm_bias"),
)
#: Bank of `ExitHeads` -> fields of `HeadConfig` that have to agree for its parameters to have the same meaning.
MEANING = {
    **dict.fromkeys(("dense", "norm", "attention", "out"), ("form", "width", "attention_heads")),
    "halting": ("form", "halting_input", "halting_layers"),
    "uncertainty": ("form",),
    **dict.fromkeys(("gates", "projectors", "contrast"), ("width",)),
}


class Source(NamedTuple):
    """What a conversion starts from.

    Attributes:
        adapter: of the family.
        backbone: the encoder, whose parameters the new model shares.
        given: fields of `HeadConfig` that do not depend on the method.
        head: a module on the device of the new exits.
        copy_to: copies weights into the new exits.
    """

    adapter: BackboneAdapter
    backbone: nn.Module
    given: dict[str, Any]
    head: nn.Module
    copy_to: Callable[[ExitHeads], None]


def to_early_exit(
    hf_model: PreTrainedModel,
    *,
    method: str | Method = "joint",
    criterion: Criterion | None = None,
    pooling: str | None = None,
    form: str | None = None,
    halting: bool = False,
    strict: bool = False,
) -> EarlyExitForSequenceClassification:
    """Convert a sequence classifier of transformers to one with an exit after every layer.

    The new model has modules and a config of its own, but the *same* encoder parameters: training one trains both, and
    ``.half()`` or ``.to()`` on one moves both. The given instance is otherwise unchanged; hooks and adapters that are
    added to it later have no effect on the new model.

    A model that has exits already is converted to another method: the new model shares its encoder parameters, and
    starts with copies of the exits, halting outputs and gates that both methods have in the same form; others are new.
    So DACT may start from exits trained with ``"joint"``.

    Args:
        hf_model: a ``...ForSequenceClassification`` instance of a supported family, or an early-exit model.
        method: training method: a name, for the settings of the paper, or one of `earlyexit_kernels.methods`, such
            as ``Palbert(beta=0.1)``. It determines the exits: halting heads, gates, attention exits.
        criterion: exit criterion. Default: full depth, or the method's own inference rule if it differs (DACT's
            accumulated answer, SmartBERT's skip gates). `set_criterion` changes it later.
        pooling: None: each exit has the head of the family and starts as a copy of the stock head; its dense module is
            shared or its own, as the method requires. ``"first"``, ``"mean"``, or for a decoder ``"last"``: a new
            linear on the pooled hidden state; the last one starts as a copy of the stock output layer if the shapes
            agree. The head of a decoder is such a linear. For a model with exits None keeps the pooling of that model.
        form: ``"linear"`` or ``"attention"`` (self-attention of width 128 before the pooling), as in `HeadConfig`.
            None: that of the method's paper, which is attention for FastBERT and SmartBERT.
        halting: add an untrained halting head (for experiments).
        strict: raise on invalid logits (NaN, several +inf, or all -inf).

    Raises:
        ValueError: an unsupported family, an adapter that does not fit, an unknown method, pooling or form, a criterion
            that does not fit, ``chunk_size_feed_forward > 0``, or an encoder with causal attention.
        TypeError: not a sequence classifier.

    Example:

        >>> import earlyexit_kernels as ee
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
        >>> stock = BertForSequenceClassification(BertConfig(**sizes))
        >>> model = ee.to_early_exit(stock, method="palbert", criterion=ee.criteria.QExit(q=0.5))
        >>> model.depth, model.heads.aux_names
        (3, ('hidden_cosine', 'halting'))
        >>> ee.to_early_exit(model, method="dact").backbone.embeddings.word_embeddings.weight is (
        ...     model.backbone.embeddings.word_embeddings.weight
        ... )
        True
    """
    with_exits = isinstance(hf_model, EarlyExitForSequenceClassification)
    source = _with_exits(hf_model, pooling) if with_exits else _stock(hf_model, pooling)
    method = method_of(method)
    changes = {"halting": halting, **method.head_changes(source.adapter.shares_layers)}
    if form is not None:
        changes["form"] = form
    memo = {id(t): t for t in [*source.backbone.parameters(), *source.backbone.buffers()]}
    backbone: Any = copy.deepcopy(source.backbone, memo)
    for module in backbone.modules():
        module._is_hf_initialized = True
    config: Any = hf_model.config
    outer = EarlyExitConfig(
        backbone_config=backbone.config,
        method=method.to_dict(),
        heads=HeadConfig(**source.given, **changes).to_dict(),
        criterion=method.answering(),
        strict=strict,
        problem_type=config.problem_type or default_problem_type(config.num_labels),
        id2label=dict(config.id2label),
        label2id=dict(config.label2id),
        pad_token_id=config.pad_token_id,
        initializer_range=getattr(config, "initializer_range", 0.02),
        dtype=hf_model.dtype,
    )
    model = EarlyExitForSequenceClassification(outer, backbone)
    source.copy_to(model.heads)
    model.heads.to(device=next(source.head.parameters()).device, dtype=hf_model.dtype)
    if criterion is not None:
        model.set_criterion(criterion)
    if not with_exits:
        check_separation(model.eval().view())
    return model.train(hf_model.training)


def _with_exits(model: EarlyExitForSequenceClassification, pooling: str | None) -> Source:
    """Read a model that has exits; their pooling must be the requested one."""
    config = model.heads.config
    if pooling not in (None, config.pooling):
        raise ValueError(
            f"to_early_exit: the exits of this model have pooling={config.pooling!r}, got pooling={pooling!r}; leave "
            "the argument out, or convert the stock model"
        )
    given = {name: getattr(config, name) for name in OF_FAMILY}
    copies = functools.partial(_copy_exits, model.heads)
    return Source(model.adapter, model.backbone, given, model.heads, copies)


def _copy_exits(old: ExitHeads, new: ExitHeads) -> None:
    """Copy the modules that two methods have in the same form.

    A module that all layers shared starts each of several; one for all layers starts as the last of several.
    """
    for name, fields in MEANING.items():
        bank, given = getattr(new, name), getattr(old, name)
        if len(given) and all(getattr(new.config, field) == getattr(old.config, field) for field in fields):
            for number, module in enumerate(bank):
                module.load_state_dict(given[number if len(given) == len(bank) else -1].state_dict())


def _stock(hf_model: Any, pooling: str | None) -> Source:
    """Read a stock classifier, or raise ValueError or TypeError as `to_early_exit` does."""
    if hasattr(hf_model, "merge_and_unload"):
        raise TypeError(
            f"to_early_exit: expected a model instance of transformers, got {type(hf_model).__name__} of PEFT; merge "
            "its adapters first, to_early_exit(peft_model.merge_and_unload()), or convert first and then call "
            "get_peft_model"
        )
    if not isinstance(hf_model, PreTrainedModel):
        got = type(hf_model).__name__ if isinstance(hf_model, nn.Module) else repr(hf_model)
        raise TypeError(
            f"to_early_exit: expected a model instance of transformers, got {got}; load it with "
            "AutoModelForSequenceClassification"
        )
    config: Any = hf_model.config
    adapter = adapter_of(config.model_type)
    stock, names = adapter.head, dict(hf_model.named_modules())
    _check_parts(hf_model, adapter, names)
    useful = (None, "mean", "last" if stock.pooling == "last" else "first")
    if pooling not in useful:
        raise ValueError(
            f"to_early_exit: pooling: expected one of {useful} for a {config.model_type} model, got {pooling!r}"
        )
    dropout: Any = None if stock.dropout is None else names[stock.dropout]
    given = {
        "pooling": stock.pooling if stock.dense is None and pooling is None else pooling,
        "family_pooling": stock.pooling,
        "activation": stock.activation,
        "dropout": 0.0 if dropout is None else dropout.p,
        "dropout_before_dense": stock.dropout_before_dense,
        "norm": stock.norm is not None,
        **stock.settings(config),
    }
    copies = functools.partial(_copy_stock, stock, names)
    return Source(adapter, names[adapter.base], given, names[stock.out], copies)


def _check_parts(hf_model: nn.Module, adapter: BackboneAdapter, names: dict[str, nn.Module]) -> None:
    """Check that a model has an encoder and a head of linears where its adapter says."""
    config: Any = hf_model.config
    stock, kind = adapter.head, type(hf_model).__name__
    parts = (adapter.base, stock.dense, stock.norm, stock.out)
    missing = [name for name in parts if name is not None and name not in names]
    if missing and kind.endswith("ForSequenceClassification"):
        raise ValueError(
            f"to_early_exit: the adapter of {config.model_type!r} does not fit {kind}, which has no "
            f"{' and no '.join(missing)}"
        )
    if missing or getattr(names[stock.out], "out_features", None) != config.num_labels:
        raise TypeError(
            f"to_early_exit: expected a model of type {config.model_type} for sequence classification, got {kind}; "
            "load it with AutoModelForSequenceClassification"
        )
    if wrapped := [n for n in (stock.dense, stock.out) if n and not isinstance(names[n], nn.Linear)]:
        found = ", ".join(f"{name} is a {type(names[name]).__name__}" for name in wrapped)
        raise TypeError(
            f"to_early_exit: expected torch.nn.Linear in the head, {found}; merge its adapters first (merge_and_unload "
            "of PEFT), and quantize only after the conversion"
        )


def _copy_stock(stock: StockHead, names: dict[str, nn.Module], heads: ExitHeads) -> None:
    """Copy the dense module and the output layer of the stock head into the exits, if the shapes agree."""
    for bank, name in ((heads.dense, stock.dense), (heads.norm, stock.norm)):
        for module in bank:
            module.load_state_dict(names[str(name)].state_dict())
    given: Any = names[stock.out]
    outs: Any = heads.out if len(heads.dense) else heads.out[-1:]
    for out in outs:
        if out.weight.shape == given.weight.shape:
            bias = torch.zeros_like(out.bias) if given.bias is None else given.bias
            out.load_state_dict({"weight": given.weight, "bias": bias})
