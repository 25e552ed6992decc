"""Where a scorer gets its model from, and whether model and tokenizer fit."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from earlyexit_kernels.backends import working_device
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification, early_exit_model_in
from earlyexit_kernels.hf.saving import CONFIG
from earlyexit_kernels.hf.weight_files import find_file


@dataclass(frozen=True)
class Source:
    """A folder or hub name that a scorer is made from.

    Attributes:
        name: absolute path, or hub name.
        config_digest: SHA-256 of its config, in which the digest of the weights stands.
        tokenizer: instead of that of the folder, or None.
    """

    name: str
    config_digest: str
    tokenizer: Any

    @property
    def title(self) -> str:
        """The name without its folders."""
        return os.path.basename(self.name)

    @staticmethod
    def of(name: str | os.PathLike[str], tokenizer: Any) -> Source:
        """Return the source as it is now.

        Raises:
            OSError: there is no such folder or name, or it has no config.
        """
        name = os.path.abspath(name) if os.path.isdir(name) else os.fspath(name)
        return Source(name, _config_digest(name), tokenizer)

    def load(self) -> tuple[Any, Any]:
        """Return the model, on the GPU if there is one, and the tokenizer.

        Raises:
            RuntimeError: the model has been saved again since.
            ValueError: the tokenizer cannot be loaded.
        """
        if self.config_digest != _config_digest(self.name):
            raise RuntimeError(
                f"Scorer: {self.name} has been saved again since this scorer was made, whose copies would answer "
                "otherwise; make a new one"
            )
        model = AutoModelForSequenceClassification.from_pretrained(self.name)
        return model.to(working_device()), self._tokenizer()

    def _tokenizer(self) -> Any:
        if self.tokenizer is not None:
            return self.tokenizer
        try:
            return AutoTokenizer.from_pretrained(self.name)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"Scorer: the tokenizer of {self.name} cannot be loaded ({reason}); save the model's own tokenizer "
                "there, or pass it"
            ) from error


def _config_digest(name: str) -> str:
    expected = f"Scorer: expected the folder or hub name of a saved model, {name}"
    try:
        path = find_file(name, CONFIG, {})
    except OSError as error:
        raise OSError(f"{expected} cannot be found: {error}") from error
    if path is None:
        if os.path.isdir(name):
            raise FileNotFoundError(f"{expected} has no {CONFIG}")
        raise FileNotFoundError(
            f"{expected} is no folder, and neither the hub, if it can be reached, nor its cache has a {CONFIG} of that "
            "name"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def checked_model(model: Any) -> EarlyExitForSequenceClassification:
    """Return the early-exit model that a module is or wraps.

    Raises:
        TypeError: there is none.
    """
    found = early_exit_model_in(model) if isinstance(model, torch.nn.Module) else None
    if found is None:
        raise TypeError(
            f"Scorer: expected an early-exit model, or the folder or hub name of one, got {type(model).__name__}"
        )
    return found


def check_tokenizer(tokenizer: Any, model: EarlyExitForSequenceClassification) -> None:
    """Refuse what is no tokenizer, and tokenizers that cannot be that of the model.

    Raises:
        TypeError: not a tokenizer of transformers.
        ValueError: it knows no words, or has more tokens than the model has embeddings.
    """
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"Scorer: expected the tokenizer of the model, got {type(tokenizer).__name__}")
    ids = set(tokenizer.get_vocab().values())
    if not ids - set(tokenizer.all_special_ids):
        raise ValueError(
            "Scorer: the tokenizer knows no words, as when the folder of the model has no files of one; save the "
            "model's own tokenizer there, or pass it"
        )
    backbone: Any = model.backbone
    embeddings = backbone.get_input_embeddings().num_embeddings
    if max(ids) >= embeddings:
        raise ValueError(
            f"Scorer: expected the tokenizer of the model, which has embeddings of {embeddings} tokens, got one of "
            f"another vocabulary, with token ids up to {max(ids)}"
        )


def length_limit(max_length: int | None, tokenizer: Any, model: EarlyExitForSequenceClassification) -> int:
    """Return the maximum number of tokens of a row.

    Raises:
        ValueError: more than the model takes.
    """
    longest = model.adapter.longest(model.config.backbone_config)
    if max_length is None:
        return min(tokenizer.model_max_length, longest)
    if max_length > longest:
        raise ValueError(f"Scorer: expected max_length of at most {longest} for this model, got {max_length}")
    return max_length
