"""A worker of the server whose model raises on rows with the word "opera", and gives NaN for those with "record"."""

from typing import Any

import torch

from earlyexit_kernels.data import toy
from earlyexit_kernels.serving.http import worker

RAISES, GIVES_NAN = (toy.vocabulary().index(word) for word in ("opera", "record"))


def _spoiled(_: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    if (inputs[0] == RAISES).any():
        raise RuntimeError("secret of the server")
    return output.masked_fill((inputs[0] == GIVES_NAN)[..., None], float("nan"))


def _load(folder: str) -> Any:
    model = _loaded(folder)
    model.backbone.get_input_embeddings().register_forward_hook(_spoiled)
    return model


if __name__ == "__main__":
    _loaded, worker.load = worker.load, _load
    worker.main()
