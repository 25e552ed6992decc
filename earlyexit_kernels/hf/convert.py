"""Conversion of a stock sequence classifier to an early-exit model that shares its encoder parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from earlyexit_kernels.backbones import BackboneAdapter, StockHead, adapter_of
from earlyexit_kernels.criteria import Criterion, from_dict
from earlyexit_kernels.engine.separation import check_separation
from earlyexit_kernels.heads import ExitHeads, HeadConfig
from earlyexit_kernels.hf.config import EarlyExitConfig, check_encoder
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.objectives import Objective, objective_of
from earlyexit_kernels.types import default_problem_type

#: Fields of `HeadConfig` that follow from the family and its config, and not from the method.
OF_FAMILY = (
    *("pooling", "family_pooling", "activation", "dropout", "dropout_before_dense"),
    *("dense_bias", "norm", "norm_eps", "norm_bias"),
)


def to_early_exit(
    hf_model: PreTrainedModel,
    *,
    method: str | Objective = "joint",
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
        method: training method: a name, for the settings of the paper, or one of `earlyexit_kernels.objectives`, such
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
    adapter, base, names = (hf_model.adapter, hf_model.backbone, {}) if with_exits else _parts(hf_model)
    config: Any = hf_model.config
    objective = objective_of(method)
    given = (
        _given_with_exits(hf_model, pooling) if with_exits else _given_by_stock(adapter.head, names, pooling, config)
    )
    changes = {"halting": halting, **objective.head_changes(adapter.shares_layers)}
    if form is not None:
        changes["form"] = form
    head_config = HeadConfig(**given, **changes)
    memo = {id(t): t for t in [*base.parameters(), *base.buffers()]}
    backbone = copy.deepcopy(base, memo)
    for module in backbone.modules():
        module._is_hf_initialized = True
    outer = EarlyExitConfig(
        backbone_config=backbone.config,
        method=objective.to_dict(),
        heads=head_config.to_dict(),
        strict=strict,
        problem_type=config.problem_type or default_problem_type(config.num_labels),
        id2label=dict(config.id2label),
        label2id=dict(config.label2id),
        pad_token_id=config.pad_token_id,
        initializer_range=getattr(config, "initializer_range", 0.02),
        dtype=hf_model.dtype,
    )
    model = EarlyExitForSequenceClassification(outer, backbone)
    if with_exits:
        carried = hf_model.heads
        _start_from_exits(model.heads, carried)
    else:
        carried = names[adapter.head.out]
        _start_from_stock(model.heads, names, adapter.head)
    reference = next(carried.parameters())
    model.heads.to(device=reference.device, dtype=hf_model.dtype)
    data = objective.answering()
    model.set_criterion(from_dict(data) if criterion is None and data is not None else criterion)
    if not with_exits:
        check_separation(model.eval().view())
    return model.train(hf_model.training)


def _parts(hf_model: Any) -> tuple[BackboneAdapter, Any, dict[str, Any]]:
    """Return the adapter of a stock classifier, its encoder, and its modules by name.

    Raises:
        ValueError: an unsupported family or setting.
        TypeError: not a sequence classifier.
    """
    if hasattr(hf_model, "merge_and_unload"):
        raise TypeError(
            f"to_early_exit: expected a model instance of transformers, got {type(hf_model).__name__} of PEFT; merge "
            "its adapters first, to_early_exit(peft_model.merge_and_unload()), or convert first and then call "
            "get_peft_model"
        )
    if not isinstance(hf_model, PreTrainedModel):
        raise TypeError(
            f"to_early_exit: expected a model instance of transformers, got {_short(hf_model)}; load it with "
            "AutoModelForSequenceClassification"
        )
    config: Any = hf_model.config
    adapter = adapter_of(config.model_type)
    base = getattr(hf_model, adapter.base, None)
    names = dict(hf_model.named_modules())
    out: Any = names.get(adapter.head.out)
    required = [name for name in (adapter.head.dense, adapter.head.norm) if name is not None]
    if (
        base is None
        or any(name not in names for name in required)
        or getattr(out, "out_features", None) != config.num_labels
    ):
        name = type(hf_model).__name__
        told = [adapter.base] * (base is None) + [n for n in (*required, adapter.head.out) if n not in names]
        if name.endswith("ForSequenceClassification") and told:
            raise ValueError(
                f"to_early_exit: the adapter of {config.model_type!r} does not fit {name}, which has no "
                f"{' and no '.join(told)}"
            )
        raise TypeError(
            f"to_early_exit: expected a model of type {config.model_type} for sequence classification, got {name}; "
            "load it with AutoModelForSequenceClassification"
        )
    if wrapped := [n for n in (adapter.head.dense, adapter.head.out) if n and not isinstance(names[n], nn.Linear)]:
        found = ", ".join(f"{name} is a {type(names[name]).__name__}" for name in wrapped)
        raise TypeError(
            f"to_early_exit: expected torch.nn.Linear in the head, {found}; merge its adapters first (merge_and_unload "
            "of PEFT), and quantize only after the conversion"
        )
    check_encoder(config)
    return adapter, base, names


def _given_by_stock(stock: StockHead, names: dict[str, Any], pooling: str | None, config: Any) -> dict[str, Any]:
    """Return the fields of `HeadConfig` that follow from a stock head.

    Raises:
        ValueError: a pooling that there is not, or that is of no use for the family.
    """
    useful = (None, "mean", "last" if stock.pooling == "last" else "first")
    if pooling not in useful:
        raise ValueError(
            f"to_early_exit: pooling: expected one of {useful} for a {config.model_type} model, got {pooling!r}"
        )
    given = {
        "pooling": stock.pooling if stock.dense is None and pooling is None else pooling,
        "family_pooling": stock.pooling,
        "activation": stock.activation,
        "dropout": 0.0 if stock.dropout is None else names[stock.dropout].p,
        "dropout_before_dense": stock.dropout_before_dense,
        "norm": stock.norm is not None,
    }
    return {**given, **stock.settings(config)}


def _given_with_exits(model: EarlyExitForSequenceClassification, pooling: str | None) -> dict[str, Any]:
    """Return these fields for a model that has exits.

    Raises:
        ValueError: it has another pooling.
    """
    config = model.heads.config
    if pooling not in (None, config.pooling):
        raise ValueError(
            f"to_early_exit: the exits of this model have pooling={config.pooling!r}, got pooling={pooling!r}; leave "
            "the argument out, or convert the stock model"
        )
    return {name: getattr(config, name) for name in OF_FAMILY}


def _short(thing: Any) -> str:
    """Describe a value for a message; the repr of a module would have a line for each submodule."""
    return type(thing).__name__ if isinstance(thing, nn.Module) else repr(thing)


def _start_from_stock(heads: ExitHeads, names: dict[str, Any], stock: StockHead) -> None:
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


#: Bank of `ExitHeads` -> fields of `HeadConfig` that have to agree for its parameters to have the same meaning.
MEANING = {
    **dict.fromkeys(("dense", "norm", "attention", "out"), ("form", "width", "attention_heads")),
    "halting": ("form", "halting_input", "halting_layers"),
    "uncertainty": ("form",),
    **dict.fromkeys(("gates", "projectors", "contrast"), ("width",)),
}


def _start_from_exits(heads: ExitHeads, others: ExitHeads) -> None:
    """Copy the modules that two methods have in the same form.

    A module that all layers shared starts each of several; one for all layers starts as the last of several.
    """
    for name, fields in MEANING.items():
        bank, given = getattr(heads, name), getattr(others, name)
        if len(given) and all(getattr(heads.config, field) == getattr(others.config, field) for field in fields):
            for number, module in enumerate(bank):
                source = given[number] if len(given) == len(bank) else given[-1]
                module.load_state_dict(source.state_dict())
