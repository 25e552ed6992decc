"""A small model whose rows leave at several layers, and some of whose words make it slow, silent or fail."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any

import torch

import earlyexit_kernels as ee
from earlyexit_kernels.data import toy

SLOW_SECONDS = 0.05
#: What a batch with a row that has the word does.
ORDERS = {"slow": "opera", "end": "series", "fail": "record", "hang": "novel", "nan": "book", "device": "play"}
IDS = {order: toy.vocabulary().index(word) for order, word in ORDERS.items()}
MAX_LENGTH = 64


def faulty_model() -> Any:
    """Return the model in eval mode; it is the same in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ee.to_early_exit(toy.toy_model(layers=4, hidden=16), pooling="mean").eval()
    rows = [row.text for row in toy.write_splits(train_rows=0, dev_rows=100, test_rows=0)["dev"]]
    sure = model.trace(**toy.toy_tokenizer()(rows, padding=True, return_tensors="pt")).logits[:, 0].softmax(-1).amax(-1)
    model.set_criterion(ee.criteria.MaxProbability(threshold=float(sure.median())))  # half of them leave at layer 1
    model.backbone.get_input_embeddings().register_forward_hook(_obeyed)
    return model


def _obeyed(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    ids = set(inputs[0].flatten().tolist())
    if IDS["end"] in ids:
        os._exit(9)
    while IDS["hang"] in ids:
        time.sleep(60)
    if IDS["slow"] in ids:
        time.sleep(SLOW_SECONDS)
    if IDS["device"] in ids:
        raise torch.AcceleratorError("the device is lost")
    if IDS["fail"] in ids:
        raise RuntimeError("secret of the server")
    return output.masked_fill((inputs[0] == IDS["nan"])[..., None], float("nan"))


@dataclass(frozen=True)
class FaultySource:
    """The model of this file, where a server expects a folder."""

    name: str = "faulty"
    title: str = "faulty"

    def load(self) -> tuple[Any, Any]:
        return faulty_model(), toy.toy_tokenizer()
