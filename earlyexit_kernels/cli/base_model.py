"""Load the model that a training begins with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from earlyexit_kernels.backbones import BACKBONES
from earlyexit_kernels.cli.checks import check_encoder, loaded_from
from earlyexit_kernels.data.rows import Labels
from earlyexit_kernels.hf.config import EarlyExitConfig


def load_base(name: str, labels: Labels) -> tuple[Any, Any, bool]:
    """Load a stock classifier for labels, or a model with exits for them; its tokenizer; whether its head is new.

    A folder is loaded without network access; other names are those of the hub.

    Args:
        name: folder or hub name.
        labels: of the classifier.

    Raises:
        OSError: the folder is incomplete, or the hub does not have the name or cannot be reached.
        ValueError: weights of the encoder are missing, exits for other labels, or no padding token.
    """
    loading: dict[str, Any] = {"local_files_only": True} if Path(name).is_dir() else {}
    with loaded_from(name):
        tokenizer = AutoTokenizer.from_pretrained(name, **loading)
        if AutoConfig.from_pretrained(name, **loading).model_type == EarlyExitConfig.model_type:
            model = AutoModelForSequenceClassification.from_pretrained(name, **loading)
            return _with_exits(model, labels), tokenizer, False
        with _without_load_report():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name,
                num_labels=len(labels.names),
                id2label=dict(enumerate(labels.names)),
                label2id={label: i for i, label in enumerate(labels.names)},
                problem_type=labels.problem_type,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **loading,
            )
        new = check_encoder(model, info)
        if reads_last_token(model):
            _share_padding(model, tokenizer)
        elif tokenizer.pad_token is None:
            raise ValueError("its tokenizer has no padding token; give it that of the model, and save it in the folder")
    return model, tokenizer, new


def reads_last_token(model: Any) -> bool:
    """Return whether the head of a stock classifier reads the last token of a row, as on decoders."""
    adapter = BACKBONES.get(model.config.model_type)
    return adapter is not None and adapter.head.pooling == "last"


def _share_padding(model: Any, tokenizer: Any) -> None:
    """Give the model of a decoder the padding token of its tokenizer; default: the end token, for both.

    Raises:
        ValueError: the tokenizer has neither of them.
    """
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError("its tokenizer has neither a padding token nor an end token; add one and save it")
        tokenizer.pad_token = tokenizer.eos_token
        print(f"The tokenizer has no padding token: rows are padded with its end token, {tokenizer.eos_token}.")
    for config in (model.config, model.base_model.config):
        config.pad_token_id = tokenizer.pad_token_id


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Silence the table of missing weights: only a classifier may be new, which `check_encoder` checks."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def _with_exits(model: Any, labels: Labels) -> Any:
    """Return a model with exits, to be converted to another method, if it was trained for these labels.

    Raises:
        ValueError: it was trained for other labels.
    """
    names = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    if (names, model.problem_type) != (labels.names, labels.problem_type):
        raise ValueError(
            f"its exits are for {model.problem_type} of {list(names)}, the rows have {labels.problem_type} of "
            f"{list(labels.names)}; give a model for these labels, or the stock model that it was converted from"
        )
    return model
