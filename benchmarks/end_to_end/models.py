"""The models that are timed: a plain Hugging Face classifier, and the same encoder with exits.

BERT-base's shape has random weights. MiniLM's shape has them too, unless the variable EARLYEXIT_MODEL names a folder of
``earlyexit train``; its plain model is then the plain encoder under the trained last exit.
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
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

import earlyexit_kernels as ee

MODEL_VARIABLE = "EARLYEXIT_MODEL"
CLASSES = 3
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Model: TypeAlias = ee.EarlyExitForSequenceClassification


class NotMeasuredError(Exception):
    """Something can't be timed on this machine; the message says why, and goes into the record."""


@dataclass(frozen=True, eq=False)
class Subject:
    """One shape of model in one dtype.

    Attributes:
        name, weights: in words.
        dtype: a name of `DTYPES`.
        plain: the plain classifier, ``(input_ids, attention_mask) -> .logits``.
        encoder: the plain encoder inside it.
        model: the same encoder with an exit after every layer, each a linear on the pooled state.
        family: the same encoder with exits whose last one is the plain model's head.
        tokenizer: of the trained model, or None.
        origin: the float32 one that this one is a copy of.
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
        """L."""
        return self.model.depth

    @property
    def trained(self) -> bool:
        """Whether its exits mean anything."""
        return self.weights == "trained"

    @property
    def vocabulary(self) -> int:
        """Ids there are."""
        return int(self.encoder.config.vocab_size)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """The plain model's answers ``[N, C]``, float32."""
        return self.plain(**batch).logits.float()


def device() -> str:
    """Where everything runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_subject(name: str, **sizes: Any) -> Subject:
    """A BERT of some sizes with random weights and sdpa attention; its exits read each row's first token."""
    torch.manual_seed(0)
    config = BertConfig(num_labels=CLASSES, **sizes)
    config._attn_implementation = "sdpa"
    plain = BertForSequenceClassification(config).eval().to(device())
    model = ee.to_early_exit(plain, pooling="first")
    return Subject(name, "random", "float32", plain, plain.bert, model, ee.to_early_exit(plain))


def trained_subject(name: str, folder: str) -> Subject:
    """A model that ``earlyexit train`` wrote, beside the plain encoder under its last exit.

    Raises:
        NotMeasuredError: its exits aren't plain linears, so that the baselines can't compute them.
    """
    model = Model.from_pretrained(folder, local_files_only=True).eval().to(device())
    if model.heads.config.pooling is None or model.heads.config.form != "linear":
        raise NotMeasuredError(f"{MODEL_VARIABLE}: expected exits that are linears on a pooled state (--pooling mean)")
    config = copy.deepcopy(model.backbone.config)
    config._attn_implementation = "sdpa"
    encoder = AutoModel.from_config(config)
    encoder.pooler = None
    encoder.load_state_dict(model.backbone.state_dict())
    plain = UnderExit(encoder, model.heads, model.depth).eval().to(device())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Subject(name, "trained", "float32", plain, plain.encoder, model, model, tokenizer)


def minilm() -> Subject:
    """The shape of MiniLM-L6-H384, trained where a folder is given."""
    folder = os.environ.get(MODEL_VARIABLE)
    if folder:
        return trained_subject("MiniLM", folder)
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    return random_subject("MiniLM", **sizes)


SUBJECTS: dict[str, Callable[[], Subject]] = {"BERT-base": lambda: random_subject("BERT-base"), "MiniLM": minilm}


@functools.cache
def subject(name: str, dtype: str = "float32") -> Subject:
    """A model of `SUBJECTS`, built once.

    Raises:
        NotMeasuredError: this machine has no arithmetic of its own for the dtype.
    """
    if not runs_natively(dtype):
        raise NotMeasuredError(f"this processor has no {dtype} arithmetic of its own")
    # whoever asks: weights made in inference mode count no writes, which the engines look at, and compile otherwise
    with torch.inference_mode(False):
        return SUBJECTS[name]() if dtype == "float32" else narrowed(subject(name), dtype)


def runs_natively(dtype: str) -> bool:
    """Whether a dtype is computed in and not emulated here."""
    if dtype == "float32" or device() == "cuda":
        return True
    ops = torch.ops.mkldnn
    return bool(ops._is_mkldnn_bf16_supported() if dtype == "bfloat16" else ops._is_mkldnn_fp16_supported())


def narrowed(origin: Subject, dtype: str) -> Subject:
    """A copy in another dtype; its parts share their parameters as those of the original do."""
    parts = copy.deepcopy({name: getattr(origin, name) for name in ("plain", "encoder", "model", "family")})
    for part in parts.values():
        part.to(DTYPES[dtype])
    return replace(origin, dtype=dtype, origin=origin, **parts)


class UnderExit(nn.Module):
    """A plain encoder, answered by one exit of an early-exit model."""

    def __init__(self, encoder: nn.Module, heads: nn.Module, layer: int) -> None:
        super().__init__()
        self.encoder, self.heads, self.layer = encoder, heads, layer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Padded rows ``[N, S]``; logits ``[N, C]``."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return SequenceClassifierOutput(logits=exit_logits(self.heads, self.layer, hidden, attention_mask))


def exit_logits(heads: Any, layer: int, hidden: Tensor, mask: Tensor) -> Tensor:
    """The linear exit after 1-based `layer` as one writes it on padded rows, float32.

    Args:
        hidden: ``[N, S, H]``.
        mask: ``[N, S]``.
    """
    if heads.config.pooling == "first":
        pooled = hidden[:, 0].float()
    else:
        weights = mask[:, :, None].float()
        pooled = (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)
    out = heads.out[min(layer, len(heads.out)) - 1]
    return F.linear(pooled, out.weight.float(), out.bias.float())
