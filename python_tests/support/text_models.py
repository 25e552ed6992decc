"""Small early-exit models with a tokenizer, and texts whose rows leave at different layers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from support.models import stock, tokenizer, varied_entropy

import earlyexit_kernels as ee

WORDS = "a bad dull film good great is it not of play the was witty".split()


def texts(rows: int = 40, *, longest: int = 30, seed: int = 0) -> list[str]:
    """Return texts of one to `longest` words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(1, longest))) for _ in range(rows)]


def model_and_tokenizer(rows: list[str], *, exits: bool = True, **sizes: Any) -> tuple[Any, Any]:
    """Return a model in eval mode and its tokenizer; with `exits`, the rows leave at three layers or more."""
    words = tokenizer()
    model = ee.to_early_exit(stock(vocab_size=len(words), **sizes), pooling="mean")
    if exits:
        batch = words(rows, padding=True, return_tensors="pt")
        model.set_criterion(varied_entropy(model.trace(**batch)))
        assert len(model(**batch).exit_layer.unique()) >= 3
    return model, words


def answers_one_by_one(model: Any, words: Any, rows: list[Any]) -> list[tuple[torch.Tensor, int]]:
    """Return logits and exit layer of each row, run alone."""
    found = []
    for row in rows:
        out = model(**words(*([row] if isinstance(row, str) else row), return_tensors="pt"))
        found.append((out.logits[0], int(out.exit_layer[0])))
    return found


def saved_model(folder: Path, rows: list[str]) -> Path:
    """Save the model and the tokenizer of `model_and_tokenizer` in a folder, and return it."""
    for one in model_and_tokenizer(rows):
        one.save_pretrained(folder)
    return folder
