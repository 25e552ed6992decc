"""Small random stock models of every family, ragged batches, and other helpers of several test files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

import earlyexit_kernels as ee

tf.utils.logging.disable_progress_bar()

FAMILIES = ("bert", "roberta", "albert", "electra", "distilbert", "xlm-roberta", "camembert")
#: Families whose layers compute attention themselves, from the distance of two tokens: no holes, no sdpa.
RECTANGULAR = ("deberta", "deberta-v2", "mpnet")
#: Families whose tests are those of what they have of their own.
MORE_FAMILIES = ("data2vec-text", "roberta-prelayernorm", "xlm-roberta-xl", "modernbert", "eurobert", *RECTANGULAR)
#: Families that answer from the last token of a row.
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
ALL_FAMILIES = (*FAMILIES, *MORE_FAMILIES, *DECODERS)
#: Families whose head reads the first token of a row.
FIRST_TOKEN = tuple(family for family in ALL_FAMILIES if family not in ("eurobert", *DECODERS))
ATTENDED = ("full", "right", "holes", "real_ids_masked", "pad_ids_attended")
LENGTHS = (17, 3, 9, 12)
VARIED_LENGTHS = (3, 5, 8, 9, 10, 11, 12, 14, 17, 18, 19, 20)
DEPTH, CLASSES, VOCABULARY = 4, 3, 120

LOADERS = {
    "class": ee.EarlyExitForSequenceClassification.from_pretrained,
    "auto": tf.AutoModelForSequenceClassification.from_pretrained,
}

_SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 70,
    "initializer_range": 0.15,
    "num_labels": CLASSES,
}
_DISTILBERT_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
}
_SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
_FAMILY_SIZES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 32, "num_hidden_groups": 2},
    "electra": {"embedding_size": 32},
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "camembert": {"pad_token_id": 1},
    "data2vec-text": {"pad_token_id": 1},
    "roberta-prelayernorm": {"pad_token_id": 1},
    "xlm-roberta-xl": {"pad_token_id": 1},
    "modernbert": {"pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 3, **_SPECIAL_IDS},
    "eurobert": {"pad_token_id": 0, "num_key_value_heads": 2, "mask_token_id": 4, **_SPECIAL_IDS},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 2},
    "deberta-v2": {**_DISENTANGLED, "norm_rel_ebd": "layer_norm", "position_buckets": 8, "share_att_key": True},
    "mpnet": {"pad_token_id": 1},
    "llama": {"pad_token_id": 0, "num_key_value_heads": 2, **_SPECIAL_IDS},
    "mistral": {"pad_token_id": 0, "num_key_value_heads": 1, "sliding_window": 5, **_SPECIAL_IDS},
    "qwen2": {"pad_token_id": 0, "num_key_value_heads": 2, **_SPECIAL_IDS, **_WINDOWS},
    "qwen3": {"pad_token_id": 0, "num_key_value_heads": 2, "head_dim": 10, **_SPECIAL_IDS},
    "gemma2": {"pad_token_id": 0, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5, **_SPECIAL_IDS},
    "gemma3_text": {"pad_token_id": 0, "num_key_value_heads": 2, "head_dim": 12, "sliding_window": 5, **_SPECIAL_IDS},
}
_DROPOUTS = {
    "albert": ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
    "distilbert": ("dropout", "attention_dropout", "seq_classif_dropout"),
    "modernbert": ("embedding_dropout", "mlp_dropout", "attention_dropout", "classifier_dropout"),
    **dict.fromkeys(("eurobert", *DECODERS), ("attention_dropout",)),
    **dict.fromkeys(("deberta", "deberta-v2"), ("hidden_dropout_prob", "attention_probs_dropout_prob", "cls_dropout")),
}
_COMMON_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")


def stock(family: str = "bert", *, seed: int = 0, dropout: float = 0.1, attention: str = "sdpa", **sizes: Any) -> Any:
    """Return a small stock classifier in eval mode with random parameters, including biases and layer norms."""
    arguments = {**_SIZES, **_FAMILY_SIZES.get(family, {}), **sizes}
    if family == "distilbert":
        arguments = {_DISTILBERT_NAMES.get(name, name): value for name, value in arguments.items()}
    arguments.update(dict.fromkeys(_DROPOUTS.get(family, _COMMON_DROPOUTS), dropout))
    config = tf.AutoConfig.for_model(family, **arguments)
    attention = attention if attention in attentions_of(family) else "eager"
    torch.manual_seed(seed)
    model = tf.AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def kinds_of(family: str) -> tuple[str, ...]:
    """Return the kinds of batches that the stock model of a family answers from attended tokens."""
    refused = "real_ids_masked" if family in DECODERS else "holes" if family in RECTANGULAR else None
    return tuple(kind for kind in ATTENDED if kind != refused)


def holes_of(family: str) -> str:
    """Return the kind of batches with holes, or with padding on the right where a family refuses holes."""
    return "right" if family in RECTANGULAR else "holes"


def attentions_of(family: str) -> tuple[str, ...]:
    """Return the attention implementations of the stock model; sdpa has no soft-capped scores."""
    return ("eager",) if family in ("gemma2", *RECTANGULAR) else ("sdpa", "eager")


def encoder_of(model: Any) -> nn.Module:
    """Return the encoder of a stock classifier."""
    return model.base_model


def pad_id(model: Any) -> int:
    """Return the pad token of a stock or early-exit model."""
    config = model.config
    return getattr(config, "backbone_config", config).pad_token_id


def ragged(kind: str = "right", *, lengths: Sequence[int] = LENGTHS, pad: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Return ids and mask ``[N, S]``.

    `kind`: ``"full"`` (no padding), ``"right"``, ``"left"``, ``"holes"`` (right padding, and masked tokens inside the
    rows, always including the second), ``"real_ids_masked"`` (real ids as padding), ``"pad_ids_attended"`` (a pad id as
    an attended token).
    """
    generator = torch.Generator().manual_seed(seed)
    n, s = len(lengths), max(lengths)
    ids = torch.randint(5, VOCABULARY - 5, (n, s), generator=generator)
    column, length = torch.arange(s)[None], torch.tensor(lengths)[:, None]
    mask = torch.ones(n, s, dtype=torch.long)
    if kind == "left":
        mask = (column >= s - length).long()
    elif kind != "full":
        mask = (column < length).long()
    if kind != "real_ids_masked":
        ids = ids.masked_fill(mask == 0, pad)
    if kind == "holes":
        holes = (column == 1) | ((column >= 5) & (column < 7))
        mask = mask.masked_fill(holes & (column < length - 1), 0)  # the last token stays
    if kind == "pad_ids_attended":
        ids[:, 2] = pad
    return {"input_ids": ids, "attention_mask": mask}


def batch_for(model: Any, kind: str = "right", **arguments: Any) -> dict[str, Tensor]:
    """Return `ragged` with the pad token of the model."""
    return ragged(kind, pad=pad_id(model), **arguments)


def rows_of(batch: dict[str, Tensor], labels: Tensor | None = None) -> list[dict[str, Tensor]]:
    """Return the rows of a batch as a data set, without padding."""
    rows = []
    for i in range(batch["input_ids"].shape[0]):
        tokens = int(batch["attention_mask"][i].nonzero().max()) + 1
        row = {name: values[i, :tokens] for name, values in batch.items()}
        rows.append(row if labels is None else {**row, "labels": labels[i]})
    return rows


def early_exit(family: str = "bert", *, seed: int = 0, gain: float = 1.5, **arguments: Any) -> Any:
    """Return an early-exit model in eval mode whose exits give different logits."""
    of_stock = (
        "dropout",
        "problem_type",
        "num_labels",
        "num_hidden_layers",
        "num_hidden_groups",
        "classifier_pooling",
        "hidden_size",
    )
    sizes = {name: arguments.pop(name) for name in of_stock if name in arguments}
    model = ee.to_early_exit(stock(family, seed=seed, **sizes), **arguments)
    generator = torch.Generator().manual_seed(seed + 1)
    bank = model.heads
    heads = [*bank.out, *bank.uncertainty, *(module.out for module in (*bank.halting, *bank.gates))]
    with torch.no_grad():
        for head in heads:
            spread = torch.randn(head.weight.shape, generator=generator)
            head.weight.copy_(spread * gain / head.weight.shape[1] ** 0.5)
    return model


@torch.no_grad()
def balance_classes(model: Any, batch: dict[str, Tensor]) -> None:
    """Shift the biases of the exits so that no class dominates on this batch and labels differ between exits."""
    means = model.trace(**batch).logits.float().mean(0)
    for head, mean in zip(model.heads.out, means, strict=True):
        head.bias.sub_(mean)


def entropies(logits: Tensor) -> Tensor:
    """Return the entropy in nats over the last axis, float64."""
    p = logits.double().softmax(-1)
    return torch.special.entr(p).sum(-1)


def varied_entropy(trace: ee.ExitTrace) -> ee.criteria.Entropy:
    """Return an entropy rule with which about half of the live rows leave at each exit, none near the threshold."""
    scores = entropies(trace.logits)
    present = torch.ones(len(scores), dtype=torch.bool)
    thresholds = []
    for layer in range(trace.depth - 1):
        left = scores[present, layer].sort().values
        threshold = 0.0
        if len(left) > 1:
            middle = len(left) // 2
            threshold = float((left[middle - 1] + left[middle]) / 2)
        thresholds.append(threshold)
        present = present & (scores[:, layer] >= threshold)
    return ee.criteria.Entropy(threshold=thresholds)


def varied(family: str = "bert", **arguments: Any) -> tuple[Any, dict[str, Tensor]]:
    """Return an early-exit model and a batch of 12 rows that leave at different exits."""
    model = early_exit(family, **arguments)
    batch = batch_for(model, lengths=VARIED_LENGTHS)
    model.set_criterion(varied_entropy(model.trace(**batch)))
    return model, batch


def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Return a word-level tokenizer with [CLS] and [SEP]."""
    words = "[PAD] [UNK] [CLS] [SEP] a bad dull film good great is it not of play the was witty".split()
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


TEXTS = (
    "the film was good",
    "it is not a dull play",
    "great",
    "the play was witty and the film was not bad at all",
    "a film of a play",
    "bad bad bad film",
    "is it good",
    "the witty film",
    "not good not bad",
    "dull",
    "it was a great film",
)


@contextmanager
def parameter_set(parameter: Tensor, index: Any, value: Any) -> Iterator[None]:
    """Change elements of a parameter within the block."""
    old = parameter.detach().clone()
    with torch.no_grad():
        parameter[index] = value
    try:
        yield
    finally:
        with torch.no_grad():
            parameter.copy_(old)


def python_environment(**variables: str) -> dict[str, str]:
    """Return the environment of a single-threaded Python process that can import the package and these tests."""
    here = Path(__file__).resolve().parents[1]
    paths = [str(here.parent), str(here), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(p for p in paths if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def run_python(code: str, *arguments: str, timeout: float = 120, **variables: str) -> str:
    """Run `code` in a new interpreter and return its output; fail the test if it fails."""
    command, environment = [sys.executable, "-c", code, *arguments], python_environment(**variables)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}\n{done.stderr[-4000:]}"
    return done.stdout
