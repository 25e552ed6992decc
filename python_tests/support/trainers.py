"""Small runs of the Trainer of transformers on CPU."""

from __future__ import annotations

import torch
import transformers as tf
from support.models import CLASSES, VOCABULARY

ROWS = 23


_OF_THE_TRAINER = ("compute_loss_func", "compute_metrics", "processing_class", "eval_dataset")


def dataset(rows=ROWS, label="labels"):
    """Return rows of ten ids with random lengths and labels."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, VOCABULARY - 5, (rows, 10), generator=generator)
    mask = (torch.arange(10)[None] < torch.randint(2, 11, (rows, 1), generator=generator)).long()
    ids = ids.masked_fill(mask == 0, 0)
    labels = torch.randint(0, CLASSES, (rows,), generator=generator)
    return [{"input_ids": i, "attention_mask": m, label: y} for i, m, y in zip(ids, mask, labels, strict=True)]


def batch_of(data):
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def trainer(model, tmp_path, data=None, **arguments):
    settings = {
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.1,
        "max_steps": 3,
    }
    settings["save_strategy"] = "no"
    own = {name: arguments.pop(name) for name in _OF_THE_TRAINER if name in arguments}
    args = tf.TrainingArguments(
        output_dir=str(tmp_path / "out"),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        optim="sgd",
        lr_scheduler_type="constant",
        seed=3,
        **{**settings, **arguments},
    )
    return tf.Trainer(model=model, args=args, train_dataset=data, **own)


def logged_losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]
