"""The models that are timed: a plain Hugging Face classifier, and the same encoder with exits, by kind of its layers.

BERT-base, ModernBERT-base, Qwen3-0.6B and ALBERT (of MiniLM's width, one layer at all twelve depths) have random
weights. MiniLM (H 384, 6 layers) has random weights too, unless EARLYEXIT_MODEL names a folder written by ``earlyexit
train``; its plain model is then the plain encoder with the trained last exit.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    ModernBertConfig,
    Qwen3Config,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import earlyexit_kernels as ee
from benchmarks.machine import DTYPES, MODEL_VARIABLE, NotMeasuredError, device, runs_natively
from earlyexit_kernels.errors import BackendUnavailableError

CLASSES = 3
Model: TypeAlias = ee.EarlyExitForSequenceClassification


@dataclass(frozen=True, eq=False)
class Subject:
    """One model in one dtype.

    Attributes:
        name: e.g. ``"BERT-base"``.
        weights: ``"random"`` or ``"trained"``.
        dtype: a name of `DTYPES`.
        plain: the plain classifier, ``(input_ids, attention_mask) -> .logits``.
        encoder: the plain encoder inside it.
        model: the same encoder with a linear exit on the pooled state after every layer.
        family: the same encoder with the family's own exits; the last one is the plain model's head.
        tokenizer: of the trained model, or None.
        origin: the float32 subject that this one was cast from, or None.
    """

    name: str
    weights: str
    dtype: str
    plain: nn.Module
    encoder: Any
    model: Model
    family: Model
    tokenizer: Any = None
    origin: Subject | None = None

    @property
    def depth(self) -> int:
        """Number of layers L."""
        return self.model.depth

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return int(self.encoder.config.vocab_size)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the plain model's logits ``[N, C]`` in float32."""
        return self.plain(**batch).logits.float()


#: Sizes of a small encoder.
SMALL = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
QWEN3_SIZES = {
    "vocab_size": 151936, "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072,
}  # fmt: skip


def random_subject(name: str, config: Any) -> Subject:
    """Return a model with random weights and sdpa attention; its exits read the first token, of decoders the last."""
    torch.manual_seed(0)
    config._attn_implementation = "sdpa"
    plain = AutoModelForSequenceClassification.from_config(config).eval().to(device())
    reads_last = ee.backbones.adapter_of(config.model_type).head.pooling == "last"
    model = ee.to_early_exit(plain, pooling="last" if reads_last else "first")
    return Subject(name, "random", "float32", plain, plain.base_model, model, ee.to_early_exit(plain))


def trained_subject(name: str, folder: str) -> Subject:
    """Return a model written by ``earlyexit train``, beside the plain encoder with its last exit.

    Raises:
        NotMeasuredError: its exits are not plain linears, so the baselines cannot compute them.
    """
    model = Model.from_pretrained(folder, local_files_only=True).eval().to(device())
    if model.heads.config.pooling is None or model.heads.config.form != "linear":
        raise NotMeasuredError(f"{MODEL_VARIABLE}: expected exits that are linears on a pooled state (--pooling mean)")
    config = copy.deepcopy(model.backbone.config)
    config._attn_implementation = "sdpa"
    encoder = AutoModel.from_config(config)
    encoder.pooler = None
    encoder.load_state_dict(model.backbone.state_dict())
    plain = EncoderWithExit(encoder, model.heads, model.depth).eval().to(device())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Subject(name, "trained", "float32", plain, plain.encoder, model, model, tokenizer)


def minilm() -> Subject:
    """Return MiniLM-L6-H384, trained if a folder is named."""
    folder = os.environ.get(MODEL_VARIABLE)
    if folder:
        return trained_subject("MiniLM", folder)
    return random_subject("MiniLM", BertConfig(num_labels=CLASSES, num_hidden_layers=6, **SMALL))


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "BERT-base": lambda: random_subject("BERT-base", BertConfig(num_labels=CLASSES)),
    "MiniLM": minilm,
    "ModernBERT-base": lambda: random_subject("ModernBERT-base", ModernBertConfig(num_labels=CLASSES)),
    "Qwen3-0.6B": lambda: random_subject("Qwen3-0.6B", Qwen3Config(num_labels=CLASSES, pad_token_id=0, **QWEN3_SIZES)),
    "ALBERT": lambda: random_subject("ALBERT", AlbertConfig(num_labels=CLASSES, num_hidden_layers=12, **SMALL)),
}


@functools.cache
def subject(name: str, dtype: str = "float32") -> Subject:
    """Return a model of `SUBJECTS`, built once.

    Raises:
        NotMeasuredError: this machine does not compute in the dtype.
    """
    if not runs_natively(dtype):
        raise NotMeasuredError(f"this processor has no {dtype} arithmetic of its own")
    # weights made in inference mode have no version counter, which the engines read, and compile differently
    with torch.inference_mode(False):
        return SUBJECTS[name]() if dtype == "float32" else cast(subject(name), dtype)


def cast(origin: Subject, dtype: str) -> Subject:
    """Return a copy in another dtype; its parts share parameters as those of the original do."""
    parts = copy.deepcopy({name: getattr(origin, name) for name in ("plain", "encoder", "model", "family")})
    for part in parts.values():
        part.to(DTYPES[dtype])
    return replace(origin, dtype=dtype, origin=origin, **parts)


class EncoderWithExit(nn.Module):
    """A plain encoder answered by one exit of an early-exit model."""

    def __init__(self, encoder: nn.Module, heads: nn.Module, layer: int) -> None:
        super().__init__()
        self.encoder, self.heads, self.layer = encoder, heads, layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Return logits ``[N, C]`` of padded rows ``[N, S]``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=exit_logits(self.heads, self.layer, hidden, attention_mask))


def exit_logits(heads: Any, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
    """Return the float32 logits of the linear exit after 1-based `layer`, in plain torch on padded rows.

    Args:
        hidden: ``[N, S, H]``.
        mask: ``[N, S]``.
    """
    if heads.config.pooling == "first":
        pooled = hidden[:, 0].float()
    elif heads.config.pooling == "last":
        pooled = hidden[torch.arange(len(hidden)), mask.sum(dim=1) - 1].float()
    else:
        weights = mask[:, :, None].float()
        pooled = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)
    out = heads.out[min(layer, len(heads.out)) - 1]
    return F.linear(pooled, out.weight.float(), out.bias.float())


FAMILY_LAYERS, FUSED_LAYERS, CAPTURED_LAYERS = "family layers", "fused layers", "captured layers"
#: Engine, a kind of layers -> function that sets it on a converted model, with further options. Looks for `configure`
#: when it is called, since older versions lack it.
ENGINES: dict[str, Callable[..., Any]] = {
    FAMILY_LAYERS: lambda model, **options: model.configure(path="eager", **options),
    FUSED_LAYERS: lambda model, **options: model.configure(path="fused", **options),
    CAPTURED_LAYERS: lambda model, **options: model.configure(path="captured", **options),
}
#: Calls until layers are captured: the first runs eagerly, the second captures, others may reach further levels.
CALLS_TO_CAPTURE = 4


@functools.cache
def engine_model(
    subject: Subject, engine: str, backend: str = "auto", *, family: bool = False, stored: str = ""
) -> Model:
    """Return a subject's early-exit model under an engine and a back-end: its own module on the shared parameters.

    Args:
        subject: the model.
        engine: a name of `ENGINES`.
        backend: of the ops.
        family: with the family's own exits, the last of which is the plain model's head.
        stored: type that packed weights are stored in; default: that of the model.

    Raises:
        NotMeasuredError: the back-end or the layers cannot run here.
    """
    source = subject.family if family else subject.model
    model = copy.deepcopy(source, {id(x): x for x in [*source.parameters(), *source.buffers()]})
    try:
        ENGINES[engine](model, backend=backend, **({"weights": stored} if stored else {}))
    except BackendUnavailableError as error:
        raise NotMeasuredError(str(error)) from error
    return model


def refused_captures(model: Model) -> str:
    """Return why layers of a model were not captured, ``""`` if all were."""
    return "; ".join(sorted(model.runner.paths["captured"].layers._logged))
