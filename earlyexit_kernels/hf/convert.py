"""Conversion: from a Hugging Face sequence classifier to one with exits, around the same encoder parameters."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from earlyexit_kernels.backbones import BackboneAdapter, StockHead, adapter_of
from earlyexit_kernels.criteria import Criterion, from_dict
from earlyexit_kernels.heads import ExitHeads, HeadConfig
from earlyexit_kernels.hf.config import EarlyExitConfig, check_encoder, default_problem_type
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.objectives import Objective, objective_of


def to_early_exit(
    hf_model: PreTrainedModel,
    *,
    method: str | Objective = "joint",
    criterion: Criterion | None = None,
    pooling: str | None = None,
    halting: bool = False,
    strict: bool = False,
) -> EarlyExitForSequenceClassification:
    """Give a Hugging Face sequence classifier an exit after every layer.

    The new model has modules and a config of its own around the *same* encoder parameters, so training one trains both,
    and ``.half()`` or ``.to()`` on one moves both. The instance given is otherwise left as it was; hooks and adapters
    put on it later aren't seen.

    Args:
        hf_model: a ``...ForSequenceClassification`` instance of a supported family.
        method: training method, a name for the paper's own settings, or one of `earlyexit_kernels.objectives`, such
            as ``Palbert(beta=0.1)``. It brings the exits it trains: halting outputs, gates, attention exits.
        criterion: who may leave where. None is full depth, or the method's own answer where that is another one: DACT's
            accumulated one, and SmartBERT's with gates that skip. `set_criterion` changes it later.
        pooling: None for the family's own head at every exit (each starts as a copy of the stock head, and all share
            one dense module, or have their own where the method wants that), ``"first"`` or ``"mean"`` for a fresh
            linear on the pooled hidden state (the last one starts from the stock output layer where the shapes allow).
        halting: add a halting output to a method that has none of its own and doesn't train it: for experiments.
        strict: raise on logits without a meaning.

    Raises:
        ValueError: an unsupported family, an unknown method or pooling, a criterion that doesn't fit, or
            ``chunk_size_feed_forward > 0``, or a decoder.
        TypeError: not a sequence classifier.
    """
    adapter, base, names = _parts(hf_model)
    config: Any = hf_model.config
    objective = objective_of(method)
    stock = adapter.head
    head_config = HeadConfig(
        pooling=pooling,
        activation=stock.activation,
        dropout=names[stock.dropout].p,
        dropout_before_dense=stock.dropout_before_dense,
        **{"halting": halting, **objective.head_changes(adapter.shares_layers)},
    )
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
    _start_from_stock(model.heads, names, stock)
    reference = next(names[stock.out].parameters())
    model.heads.to(device=reference.device, dtype=hf_model.dtype)
    data = objective.answering()
    model.set_criterion(from_dict(data) if criterion is None and data is not None else criterion)
    return model.train(hf_model.training)


def _parts(hf_model: Any) -> tuple[BackboneAdapter, Any, dict[str, Any]]:
    """The adapter of a stock classifier, its encoder, and its modules by name.

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
    if config.model_type == EarlyExitConfig.model_type:
        raise ValueError(
            "to_early_exit: the model has exits already; set_criterion changes who leaves, and another method "
            "needs the stock model"
        )
    adapter = adapter_of(config.model_type)
    base = getattr(hf_model, adapter.base, None)
    names = dict(hf_model.named_modules())
    out: Any = names.get(adapter.head.out)
    if base is None or adapter.head.dense not in names or getattr(out, "out_features", None) != config.num_labels:
        raise TypeError(
            f"to_early_exit: expected a {config.model_type} model for sequence classification, got "
            f"{type(hf_model).__name__}; load it with AutoModelForSequenceClassification"
        )
    if wrapped := [n for n in (adapter.head.dense, adapter.head.out) if not isinstance(names[n], nn.Linear)]:
        found = ", ".join(f"{name} is a {type(names[name]).__name__}" for name in wrapped)
        raise TypeError(
            f"to_early_exit: expected torch.nn.Linear in the head, {found}; merge its adapters first (merge_and_unload "
            "of PEFT), and quantize only after the conversion"
        )
    check_encoder(config)
    return adapter, base, names


def _short(thing: Any) -> str:
    """What came, for a message: the type of a module, whose repr has a line for each of its parts."""
    return type(thing).__name__ if isinstance(thing, nn.Module) else repr(thing)


def _start_from_stock(heads: ExitHeads, names: dict[str, Any], stock: StockHead) -> None:
    """Copy the stock head's dense module and its output layer into the exits, where shapes allow."""
    for dense in heads.dense:
        dense.load_state_dict(names[stock.dense].state_dict())
    own = heads.out if len(heads.dense) else heads.out[-1:]
    for out in own:
        if out.weight.shape == names[stock.out].weight.shape:
            out.load_state_dict(names[stock.out].state_dict())
