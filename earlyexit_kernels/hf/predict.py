"""Predictions and exit layers over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from earlyexit_kernels.core.view import Inputs
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification, early_exit_model_in

INPUTS = Inputs._fields
LABELS = ("labels", "label")


@dataclass(frozen=True)
class ExitPredictions:
    """Predictions over a data set, in its order.

    Attributes:
        logits: ``[N, C]`` float32.
        exit_layer: ``[N]`` int64, 1-based layer of the exit that answered.
        layers_run: ``[N]`` int64, number of layers computed for the row.
        labels: ``[N]`` or ``[N, C]``, or None if the data set has none.

    Example:

        >>> import numpy as np
        >>> from earlyexit_kernels import ExitPredictions
        >>> exits = np.array([1, 3])
        >>> found = ExitPredictions(np.array([[2.0, 0.0], [0.0, 1.0]]), exits, exits, np.array([0, 0]))
        >>> float((found.logits.argmax(axis=1) == found.labels).mean()), float(found.layers_run.mean())
        (0.5, 2.0)
    """

    logits: np.ndarray
    exit_layer: np.ndarray
    layers_run: np.ndarray
    labels: np.ndarray | None


def predict_with_exits(
    model_or_trainer: Any,
    dataset: Any,
    *,
    batch_size: int = 32,
    collate_fn: Callable[[list[Any]], Mapping[str, Tensor]] | None = None,
) -> ExitPredictions:
    """Run an early-exit model over a data set in eval mode and keep exit layers, which ``Trainer.predict`` drops.

    Args:
        model_or_trainer: the model, which may be wrapped as by PEFT, or a Trainer, whose collator and evaluation batch
            size are then used.
        dataset: items are mappings with `input_ids` and optionally `attention_mask`, `token_type_ids`, `position_ids`,
            `labels`.
        batch_size: without a Trainer.
        collate_fn: without a Trainer; default: pad on the right with the pad token of the backbone.

    Returns:
        The predictions of the whole data set, in every process of a distributed Trainer.

    Raises:
        TypeError: neither an early-exit model nor a Trainer of one.

    Example:

        >>> import earlyexit_kernels as ee
        >>> from transformers import BertConfig
        >>> sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
        >>> model = ee.EarlyExitForSequenceClassification(ee.EarlyExitConfig(backbone_config=BertConfig(**sizes)))
        >>> model.set_criterion(ee.criteria.MaxProbability(threshold=0.4))  # two classes always pass this
        >>> rows = [{"input_ids": [101, 7, 102], "label": 1}, {"input_ids": [101, 102], "label": 0}]
        >>> found = ee.predict_with_exits(model, rows)
        >>> found.logits.shape, found.exit_layer.tolist(), found.labels.tolist()
        ((2, 2), [1, 1], [1, 0])
    """
    trainer = model_or_trainer if hasattr(model_or_trainer, "get_test_dataloader") else None
    given = model_or_trainer if trainer is None else trainer.model
    model = early_exit_model_in(given) if isinstance(given, torch.nn.Module) else None
    if model is None:
        raise TypeError(
            "predict_with_exits: expected an early-exit model or a Trainer of one, got "
            f"{type(model_or_trainer).__name__}"
        )
    was_training = model.training
    model.eval()
    try:
        if trainer is not None:
            return predict_batches(model, trainer.get_test_dataloader(dataset), trainer.accelerator.gather_for_metrics)
        collate_fn = collate_fn or PadRight.of(model)
        return predict_batches(model, DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn))
    finally:
        model.train(was_training)


def predict_batches(
    model: EarlyExitForSequenceClassification,
    batches: Iterable[Mapping[str, Tensor]],
    gather: Callable[[Any], Any] = lambda tensors: tensors,
) -> ExitPredictions:
    """Run a model in eval mode over batches, in their order.

    Args:
        model: in eval mode.
        batches: inputs by name, on any device, and labels if there are any.
        gather: collects the rows of all processes.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    labels: list[np.ndarray] = []
    with torch.inference_mode():
        for batch in batches:
            out: Any = model(**{name: batch[name].to(model.device) for name in INPUTS if name in batch})
            answers = gather((out.logits.float(), out.exit_layer, out.layers_run))
            parts.append(tuple(x.cpu().numpy() for x in answers))
            labels.extend(gather(batch[name]).cpu().numpy() for name in LABELS if name in batch)
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return ExitPredictions(np.zeros((0, model.config.num_labels), np.float32), empty, empty.copy(), None)
    logits, exit_layer, layers_run = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ExitPredictions(logits, exit_layer, layers_run, np.concatenate(labels) if labels else None)


@dataclass(frozen=True)
class PadRight:
    """Collate token lists to the longest row of the batch."""

    pad_token_id: int

    @staticmethod
    def of(model: EarlyExitForSequenceClassification) -> PadRight:
        """Return the collator with the pad token of a model."""
        config: Any = model.config.backbone_config
        return PadRight(config.pad_token_id or 0)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        for row in rows:
            if not isinstance(row, Mapping) or "input_ids" not in row:
                got = f"keys {sorted(row)}" if isinstance(row, Mapping) else type(row).__name__
                raise ValueError(
                    f"expected items that are mappings with 'input_ids', got {got}; make them with "
                    "[tokenizer(text) for text in texts], or pass collate_fn"
                )
        batch = {}
        for name in [n for n in INPUTS if n in rows[0]]:
            values = [torch.as_tensor(row[name]) for row in rows]
            fill = self.pad_token_id if name == "input_ids" else 0
            batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill)
        if "attention_mask" not in batch:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
        for name in [n for n in LABELS if n in rows[0]]:
            numbers = np.asarray([row[name] for row in rows])
            if numbers.dtype.kind not in "biuf":
                raise ValueError(
                    f"expected numbers as {name!r}, got {rows[0][name]!r}; the numbers of classes by name are in "
                    "model.config.label2id"
                )
            batch[name] = torch.as_tensor(numbers)
        return batch
