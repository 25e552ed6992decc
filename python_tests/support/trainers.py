"""Small runs of the Trainer of transformers on CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from support.models import CLASSES, VOCABULARY

ROWS = 23
_OF_THE_TRAINER = ("compute_loss_func", "compute_metrics", "processing_class", "eval_dataset", "callbacks")


def dataset(rows: int = ROWS, label: str = "labels") -> list[dict[str, Any]]:
    """Return rows of ten ids with random lengths and labels."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, VOCABULARY - 5, (rows, 10), generator=generator)
    mask = (torch.arange(10)[None] < torch.randint(2, 11, (rows, 1), generator=generator)).long()
    ids = ids.masked_fill(mask == 0, 0)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return [{"input_ids": i, "attention_mask": m, label: y} for i, m, y in zip(ids, mask, labels, strict=True)]


def batch_of(data: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def training_arguments(folder: Path, **changes: Any) -> tf.TrainingArguments:
    """Return arguments of three steps without a checkpoint, network or progress bar."""
    settings = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", "seed": 3, **changes}
    return tf.TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **settings)


def trainer(model: Any, tmp_path: Path, data: Any = None, **arguments: Any) -> tf.Trainer:
    """Return a Trainer with plain SGD at a constant rate; `arguments` are its own or those of the training."""
    settings = {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 8, "learning_rate": 0.1}
    settings |= {"optim": "sgd", "lr_scheduler_type": "constant"}
    of_trainer = {name: arguments.pop(name) for name in _OF_THE_TRAINER if name in arguments}
    args = training_arguments(tmp_path / "out", **{**settings, **arguments})
    return tf.Trainer(model=model, args=args, train_dataset=data, **of_trainer)


def logged_losses(run: tf.Trainer) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
