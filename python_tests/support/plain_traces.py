"""Traces from plain numbers, and the exit layers of their rows."""

from __future__ import annotations

import numpy as np
import torch

import earlyexit_kernels as ee


def trace_of(logits, *, halting=None, uncertainty=None, cosine=None, keys=None) -> ee.ExitTrace:
    """Return a trace of logits ``[N, L, C]`` and scalars ``[N, L]``, given as probabilities and cosines."""
    aux = {"halting": halting, "uncertainty": uncertainty}
    aux = {name: torch.logit(floats(values)) for name, values in aux.items() if values is not None}
    if cosine is not None:
        aux["hidden_cosine"] = floats(cosine)
    return ee.ExitTrace(floats(logits), aux, None if keys is None else torch.as_tensor(keys))


def floats(values) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.float32)


def exit_layers(logits, criterion, *, backend="auto", **scalars) -> list[int]:
    """Return the exit layers for logits ``[N, L, C]``; the scalars are those of `trace_of`."""
    return ee.replay(trace_of(logits, **scalars), criterion, backend=backend)[1].tolist()


def labelled(labels, classes=2) -> torch.Tensor:
    """Return logits ``[1, L, C]`` whose exits have these labels."""
    return torch.nn.functional.one_hot(torch.tensor([labels]), classes).float()


def logits_of(*probabilities) -> torch.Tensor:
    """Return logits ``[1, L, C]`` with these class probabilities at each layer."""
    return torch.tensor([probabilities], dtype=torch.float64).log().float()
