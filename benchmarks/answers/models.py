"""Models of four layers whose parameters depend on their names alone, and batches for them.

Every parameter is drawn from a generator that its name seeds, so that the answers do not depend on the order in which a
version of the package makes its modules.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn

import earlyexit_kernels as ee

DEPTH, CLASSES, VOCABULARY, PAD = 4, 3, 120, 1
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 70,
    "pad_token_id": PAD,
}
_ENDS = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
_GROUPED = {"num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
_WINDOW = {**_GROUPED, "sliding_window": 5}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
#: Model type of each family -> its own settings.
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: {} for name in ("bert", "roberta", "xlm-roberta", "camembert", "data2vec-text", "distilbert", "mpnet")},
    **{name: {} for name in ("roberta-prelayernorm", "xlm-roberta-xl")},
    "albert": {"embedding_size": 32, "num_hidden_groups": 2, "inner_group_num": 2},
    "electra": {"embedding_size": 32},
    "modernbert": {"local_attention": 8, "global_attn_every_n_layers": 3, **_ENDS},
    "eurobert": {**_GROUPED, "mask_token_id": 4},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2},
    "deberta-v2": {**_DISENTANGLED, "norm_rel_ebd": "layer_norm", "position_buckets": 8, "share_att_key": True},
    "llama": _GROUPED,
    "mistral": {**_WINDOW, "num_key_value_heads": 1},
    "qwen2": {**_WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {**_GROUPED, "head_dim": 10},
    "gemma2": {**_WINDOW, "head_dim": 12},
    "gemma3_text": {**_WINDOW, "head_dim": 12},
}
#: Families that answer from the last token.
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
#: Families that refuse masked tokens within a row.
WITHOUT_HOLES = ("deberta", "deberta-v2", "mpnet")
#: Families with layers of BERT's form, which the vector kernels compute.
BERT_FORM = ("bert", "roberta", "xlm-roberta", "camembert", "data2vec-text", "albert", "electra", "distilbert")
#: Families with fused layers.
FUSED = (*BERT_FORM, "modernbert", "eurobert")
_OTHER_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
_DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "classifier_dropout_prob"),
    *("dropout", "attention_dropout", "seq_classif_dropout", "embedding_dropout", "mlp_dropout", "cls_dropout"),
)
#: Form of the exits -> arguments of `to_early_exit`.
HEADS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("joint", "berxit", "palbert", "dact", "smartbert", "fastbert")},
    "first": {"pooling": "first"},
    "mean": {"pooling": "mean"},
}
#: Standard deviation of the weights of a linear over that of a linear that keeps the size of its input.
GAIN, GAIN_OF_EXITS = 1.3, 3.0


def stock(family: str, *, dropout: float = 0.0, **settings: Any) -> Any:
    """Return a stock classifier of a family in eval mode."""
    arguments = {**SIZES, **FAMILIES[family], "num_labels": CLASSES, **settings}
    if family == "distilbert":
        arguments = {_OTHER_NAMES.get(name, name): value for name, value in arguments.items()}
    config = transformers.AutoConfig.for_model(family, **arguments)
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, dropout)
    torch.manual_seed(0)
    return fill(transformers.AutoModelForSequenceClassification.from_config(config).eval(), family)


def fresh(family: str, *, dropout: float = 0.0, settings: Mapping[str, Any] | None = None, **arguments: Any) -> Any:
    """Return a new early-exit model in eval mode.

    Args:
        family: model type.
        dropout: of all parts.
        settings: further settings of the stock model's config.
        arguments: of `to_early_exit`.
    """
    return fill(ee.to_early_exit(stock(family, dropout=dropout, **(settings or {})), **arguments), family)


@lru_cache(maxsize=16)
def early_exit(family: str, heads: str = "joint", **settings: Any) -> Any:
    """Return the early-exit model of a family with exits of a form of `HEADS`; the same one for each call."""
    return fresh(family, settings=settings, **HEADS[heads])


@torch.no_grad()
def fill(model: nn.Module, family: str) -> Any:
    """Draw every parameter from a generator that family and name seed, and return the model."""
    for name, parameter in model.named_parameters():
        seed = zlib.crc32(f"{family}.{name}".encode())
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        if parameter.dim() < 2:
            kept = 0.0 if name.endswith("bias") else parameter.flatten()[0]  # norms start at 1, or at 0 as an addition
            parameter.copy_(kept + 0.1 * values)
        elif "embed" in name:
            # those that rows have in common are smaller; gemma multiplies by the root of the width
            scale = 0.3 if "position" in name or "type" in name else 0.125 if family.startswith("gemma") else 1.0
            parameter.copy_(values * scale)
        else:
            gain = GAIN_OF_EXITS if name.startswith("heads.out") else GAIN
            parameter.copy_(values * gain / parameter.shape[1] ** 0.5)
    return model


def configure(
    model: Any, *, path: str, backend: str = "auto", compaction: str = "auto", weights: str = "float32"
) -> None:
    """Choose how batches run, by the methods that the version has, unless the last call for a model chose the same.

    Args:
        model: early-exit model.
        path: layers: ``"auto"``, ``"eager"`` (those of transformers) or ``"fused"``.
        backend: of the ops.
        compaction: ``"auto"``, ``"always"`` or ``"never"``.
        weights: type in which fused layers are stored.
    """
    options = (path, backend, compaction, weights)
    if _configured.get(model) == options:
        return
    _configured.pop(model, None)
    _choose(model, path, backend, compaction, weights)
    _configured[model] = options


#: Model -> the options that it has been given last.
_configured: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()


def _choose(model: Any, path: str, backend: str, compaction: str, weights: str) -> None:
    if hasattr(model, "configure"):
        model.configure(path=path, weights=weights, backend=backend, compaction=compaction)
        return
    model.set_layers("family" if path == "eager" else path, weights=weights)
    model.set_backend(backend)
    model.compaction = compaction


#: Tokens of the rows of a ragged batch.
LENGTHS = (17, 3, 9, 12, 5, 20, 8, 1, 14, 2, 18, 7)
BATCHES = ("holes", "full")


def batch(family: str, kind: str) -> dict[str, Tensor]:
    """Return ids and mask of a batch.

    Args:
        family: of the model.
        kind: ``"full"``: no padding; ``"right"``: ragged; ``"holes"``: ragged, with masked tokens within the rows where
            the family allows them; ``"left"``: ragged, padded on the left; ``"large"``: ragged, of 96 rows; ``"one"``:
            one row; ``"none"``: no rows.
    """
    lengths = {"full": (10,) * 8, "large": LENGTHS * 8, "one": (7,)}.get(kind, LENGTHS)
    rows, columns = len(lengths), max(lengths)
    generator = torch.Generator().manual_seed(zlib.crc32(kind.encode()))
    ids = torch.randint(5, VOCABULARY, (rows, columns), generator=generator)
    column, length = torch.arange(columns)[None], torch.tensor(lengths)[:, None]
    mask = column >= columns - length if kind == "left" else column < length
    ids = ids.masked_fill(~mask, PAD)
    if kind == "holes" and family not in WITHOUT_HOLES:
        holes = (column == 1) | ((column >= 5) & (column < 7))
        mask = mask & ~(holes & (column < length - 1))  # the last token stays
    found = {"input_ids": ids, "attention_mask": mask.long()}
    return {name: values[:0] for name, values in found.items()} if kind == "none" else found
