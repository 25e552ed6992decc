"""The output of the model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class EarlyExitOutput(ModelOutput):
    """Output of `EarlyExitForSequenceClassification`, one row for each row of the batch, in order.

    Attributes:
        loss: scalar; in train mode the loss of the training method, in eval mode the task loss of `logits`; None
            without labels.
        logits: ``[N, C]``; in eval mode float32 and computed by the exit that answered.
        exit_layer: ``[N]`` int64, 1-based layer of that exit.
        layers_run: ``[N]`` int64, number of layers computed for the row.
        all_logits: ``[N, L, C]``, logits of every exit, in train mode or with ``output_all_logits=True``; else None.

    Example:

        >>> import torch
        >>> from earlyexit_kernels import EarlyExitOutput
        >>> output = EarlyExitOutput(logits=torch.tensor([[0.0, 2.0]]), exit_layer=torch.tensor([3]))
        >>> output.logits.argmax(dim=1).tolist(), output["exit_layer"].tolist()
        ([1], [3])
        >>> list(output)
        ['logits', 'exit_layer']
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_layer: Tensor | None = None
    layers_run: Tensor | None = None
    all_logits: Tensor | None = None
