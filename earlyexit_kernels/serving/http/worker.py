"""The process that runs the model: ``python -m earlyexit_kernels.serving.http.worker``, started by the server only."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from earlyexit_kernels.backends import working_device
from earlyexit_kernels.hf.model import EarlyExitForSequenceClassification
from earlyexit_kernels.hf.saving import CONFIG
from earlyexit_kernels.serving.http.batches import Batches, Done
from earlyexit_kernels.serving.http.protocol import Channel, Order, Row
from earlyexit_kernels.serving.source import check_tokenizer
from earlyexit_kernels.tuning.record import Calibration


def main() -> None:
    """Load the model that the first message names, and answer rows until the input ends."""
    channel = Channel(os.dup(0), os.dup(1))
    os.dup2(2, 1)  # what libraries print must not come between the messages
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # sent to the whole group; the server ends the worker when it has drained
    logging.basicConfig(level=logging.WARNING, format="worker: %(message)s")
    disable_progress_bar()
    first = channel.receive(wait=True)
    if not first:
        return
    order = Order(**first[0])
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(order.threads)
    torch.set_flush_denormal(True)
    try:
        model = load(order.model)
    except ValueError as error:
        channel.send({"failed": str(error)})
        return
    batches = Batches(model, order.max_tokens)
    warm_up(batches)
    digest = hashlib.sha256((Path(order.model) / CONFIG).read_bytes()).hexdigest()
    channel.send({"ready": {**described(model), "config_sha256": digest}})
    serve(channel, batches)


def load(folder: str) -> EarlyExitForSequenceClassification:
    """Load an early-exit model in eval mode, on the GPU if there is one.

    Raises:
        ValueError: the folder contains another model, a tokenizer of another one, or damaged files.
    """
    try:
        model = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        if not isinstance(model, EarlyExitForSequenceClassification):
            raise ValueError(f"expected a model with exits, {folder} contains a {type(model).__name__}; train it first")
        check_tokenizer(AutoTokenizer.from_pretrained(folder, local_files_only=True), model)
    except Exception as error:  # transformers raises almost any class for a broken file
        reason = " ".join(str(error).removeprefix("Scorer: ").split())
        raise ValueError(reason or type(error).__name__) from error
    model.to(working_device())
    model.config.strict = False  # rows with invalid logits fail alone; strict fails their whole batch
    return model.eval()


@torch.inference_mode()
def warm_up(batches: Batches) -> None:
    """Run a row, so that the first request does not wait for packed copies of the weights."""
    batches.add([Row(0, [0])])
    while batches.busy:
        batches.step()


def described(model: EarlyExitForSequenceClassification) -> dict[str, Any]:
    """Return what the server and its clients may know of a model, JSON-ready."""
    config: Any = model.config
    calibration = Calibration.of(model)
    return {
        "model_type": config.backbone_config.model_type,
        "method": model.method.to_dict(),
        "problem_type": model.problem_type,
        "labels": [config.id2label[index] for index in range(config.num_labels)],
        "depth": model.depth,
        "criterion": model.view().criterion.to_dict(),
        "skips_layers": model.view().criterion.skip_from is not None,
        "calibration": None if calibration is None else calibration.to_dict(),
        "max_length": model.adapter.longest(config.backbone_config),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": model.explain().path,
    }


@torch.inference_mode()
def serve(channel: Channel, batches: Batches) -> None:
    """Run steps while there are rows; return when the channel is closed."""
    while True:
        dropped: list[int] = []
        for message in channel.receive(wait=not batches.busy):
            batches.add(Row(*row) for row in message.get("rows", ()))
            dropped += batches.drop(message.get("drop", ()))
        if channel.closed:
            return
        done = batches.step() if batches.busy else Done([], [])
        if done.answers or done.failed or dropped:
            channel.send({"answers": done.answers, "failed_rows": done.failed, "dropped": dropped})


if __name__ == "__main__":
    main()
