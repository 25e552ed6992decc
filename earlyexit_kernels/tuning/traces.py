"""Collect the trace of a data set; save it with its labels in one safetensors file, and load it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from earlyexit_kernels.hf.predict import INPUTS, LABELS, PadRight
from earlyexit_kernels.types import ANY_TASK, AUX_ACTIVATIONS, ExitTrace

FORMAT, VERSION = "earlyexit_kernels.trace", "1"
AUX = "aux."


@torch.inference_mode()
def collect_trace(
    model: Any,
    dataset: Any,
    *,
    collate_fn: Callable | None = None,
    batch_size: int = 32,
    progress: str | None = None,
) -> tuple[ExitTrace, Any]:
    """Run all layers over a data set and collect the outputs of every exit; the criterion of the model is ignored.

    Args:
        model: an early-exit model; left in eval mode, with its criterion unchanged.
        dataset: items are mappings with ``input_ids`` and optionally ``labels``, as from `tasks.load.encode`.
        collate_fn: pads a list of items; default: pad on the right with the pad token of the backbone.
        batch_size: rows per batch.
        progress: title of a progress bar, or None for none.

    Returns:
        the trace, float32 on the CPU, and the labels ``[N]``, or None if the items have none.

    Raises:
        ValueError: no items, or only some have labels.

    Example:

        >>> import earlyexit_kernels as ee
        >>> from transformers import BertConfig
        >>> sizes = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
        >>> model = ee.EarlyExitForSequenceClassification(ee.EarlyExitConfig(backbone_config=BertConfig(**sizes)))
        >>> rows = [{"input_ids": [101, 7, 102], "labels": 1}, {"input_ids": [101, 102], "labels": 0}]
        >>> trace, labels = ee.collect_trace(model, rows)
        >>> trace.logits.shape, labels.tolist()
        (torch.Size([2, 3, 2]), [1, 0])
    """
    model.eval()
    traces, labels = [], []
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate_fn or PadRight.of(model))
    with without_criterion(model):
        for batch in tqdm(loader, desc=progress, disable=progress is None or None, leave=False):
            labels += [batch[name] for name in LABELS if name in batch]
            trace = model.trace(**{name: batch[name].to(model.device) for name in INPUTS if name in batch})
            aux = {name: values.float().cpu() for name, values in trace.aux.items()}
            keys = None if trace.keys is None else trace.keys.cpu()
            traces.append(replace(trace, logits=trace.logits.float().cpu(), aux=aux, keys=keys))
    if not traces or len(labels) not in (0, len(traces)):
        raise ValueError(
            f"collect_trace: expected items, all with labels or all without, got {len(traces)} batches, "
            f"{len(labels)} of them with labels"
        )
    return ExitTrace.cat(traces), torch.cat(labels).numpy() if labels else None


@contextmanager
def without_criterion(model: Any) -> Iterator[None]:
    """Remove the criterion within the block: models with a rule that skips layers cannot be traced."""
    before = model.criterion
    model.set_criterion(None)
    try:
        yield
    finally:
        model.set_criterion(before)


def save_trace(path: str | Path, trace: ExitTrace, labels: ArrayLike | None = None) -> None:
    """Save a trace, and the labels of its rows, in a safetensors file.

    The file is written beside its place and then moved there, so that a failure leaves an earlier file as it was.

    Args:
        path: of the file, whose folder exists.
        trace: of N rows, as from `collect_trace`; projections are not saved.
        labels: ``[N]``, or ``[N, C]`` for several labels a row.

    Raises:
        ValueError: another number of labels than rows.
        OSError: the file cannot be written.

    >>> import tempfile, torch
    >>> import earlyexit_kernels as ee
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ee.save_trace(f"{folder}/dev.safetensors", ee.ExitTrace(torch.zeros(2, 3, 5)), [4, 0])
    ...     trace, labels = ee.load_trace(f"{folder}/dev.safetensors")
    >>> trace.logits.shape, labels.tolist()
    (torch.Size([2, 3, 5]), [4, 0])
    """
    tensors = {"logits": trace.logits, **{f"{AUX}{name}": values for name, values in trace.aux.items()}}
    if trace.keys is not None:
        tensors["keys"] = trace.keys
    if labels is not None:
        tensors["labels"] = torch.as_tensor(np.asarray(labels))
        if tensors["labels"].shape[:1] != trace.logits.shape[:1]:
            rows, given = trace.logits.shape[0], list(tensors["labels"].shape)
            raise ValueError(f"save_trace: expected a label for each of the {rows} rows of the trace, got {given}")
    metadata = {"format": FORMAT, "version": VERSION, "problem_type": trace.problem_type or ""}
    place = Path(path)
    unfinished = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, unfinished, metadata)
        unfinished.replace(place)
    except SafetensorError as error:
        raise OSError(f"save_trace: {path} could not be written ({error})") from error
    finally:
        unfinished.unlink(missing_ok=True)


def load_trace(path: str | Path) -> tuple[ExitTrace, NDArray | None]:
    """Load a trace that `save_trace` wrote; its numbers are read from the file when they are used.

    Args:
        path: of the file.

    Returns:
        the trace, on the CPU, and the labels, or None if none were saved.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or not one of `save_trace`.

    >>> import tempfile, torch
    >>> import earlyexit_kernels as ee
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ee.save_trace(f"{folder}/dev.safetensors", ee.ExitTrace(torch.zeros(2, 3, 5)))
    ...     ee.load_trace(f"{folder}/dev.safetensors")[0].depth
    3
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"load_trace: expected a file that save_trace wrote, {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"load_trace: {path} is damaged or not a safetensors file ({error})") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        found = f"{metadata.get('format')!r}, version {metadata.get('version')!r}"
        raise ValueError(f"load_trace: expected a file that save_trace wrote, of version {VERSION}, {path} is {found}")
    aux = {name.removeprefix(AUX): t for name, t in tensors.items() if name.startswith(AUX)}
    _check(path, tensors, aux, metadata["problem_type"])
    labels = tensors["labels"].numpy() if "labels" in tensors else None
    return ExitTrace(tensors["logits"], aux, tensors.get("keys"), problem_type=metadata["problem_type"] or None), labels


def _check(path: str | Path, tensors: dict[str, torch.Tensor], aux: dict[str, torch.Tensor], task: str) -> None:
    """Check names, shapes and dtypes of a file.

    Raises:
        ValueError: names the tensor and what was expected.
    """
    known = {"logits", "keys", "labels", *(f"{AUX}{name}" for name in (*AUX_ACTIVATIONS, "gate"))}
    logits = tensors.get("logits")
    if logits is None or logits.dim() != 3 or not logits.is_floating_point() or not set(tensors) <= known:
        raise ValueError(
            f"load_trace: expected logits [N, L, C] and tensors among {sorted(known)} in {path}, got "
            f"{ {name: list(t.shape) for name, t in tensors.items()} }"
        )
    rows = {name: t.shape[:1] for name, t in tensors.items() if t.shape[:1] != logits.shape[:1]}
    wrong = [name for name, values in aux.items() if values.shape != logits.shape[:2]]
    if rows or wrong or task not in {"", *ANY_TASK}:
        raise ValueError(
            f"load_trace: expected tensors of {logits.shape[0]} rows, aux [N, L] and a problem type in {path}, got "
            f"{rows or wrong or task!r}"
        )
