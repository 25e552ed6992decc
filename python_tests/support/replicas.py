"""`nn.DataParallel` on the CPU: torch's own replicas, threads and gathering, with copies instead of transfers."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

_REPLICATE = importlib.import_module("torch.nn.parallel.replicate")
_GATHER = importlib.import_module("torch.nn.parallel.scatter_gather")


def _copies(tensors: Sequence[Tensor], devices: Sequence[Any], detach: bool = False) -> list[list[Tensor]]:
    """Return a copy of each tensor for each device, through which gradients reach the original unless detached."""
    return [[x.detach().clone() if detach else x.clone() for x in tensors] for _ in devices]


def replicas_of(model: nn.Module, count: int) -> list[Any]:
    """Return replicas as torch makes them: modules without parameters, whose weights are results of an operation."""
    with mock.patch.object(_REPLICATE, "_broadcast_coalesced_reshape", _copies):
        return _REPLICATE.replicate(model, list(range(count)), not torch.is_grad_enabled())


class CpuDataParallel(nn.DataParallel):
    """`nn.DataParallel` over two replicas on the CPU, in two threads."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.device_ids, self.output_device, self.dim = [0, 1], 0, 0
        self.src_device_obj = torch.device("cpu")

    def replicate(self, module: Any, device_ids: Sequence[Any]) -> list[Any]:
        return replicas_of(module, len(device_ids))

    def scatter(self, inputs: Any, kwargs: Any, device_ids: Sequence[Any]) -> Any:
        assert not inputs
        parts = {name: x.chunk(len(device_ids)) for name, x in kwargs.items() if isinstance(x, Tensor)}
        count = min(map(len, parts.values()))
        scattered = [{**kwargs, **{name: each[i] for name, each in parts.items()}} for i in range(count)]
        return ((),) * count, scattered

    def parallel_apply(self, replicas: Sequence[Any], inputs: Any, kwargs: Any) -> list[Any]:
        return in_threads(replicas, kwargs)

    def gather(self, outputs: Any, output_device: Any) -> Any:
        def joined(device: Any, dim: int, *parts: Tensor) -> Tensor:
            return torch.cat([part if part.dim() else part[None] for part in parts], dim)

        with mock.patch.object(_GATHER.Gather, "apply", joined):
            return super().gather(outputs, output_device)


def in_threads(replicas: Sequence[Any], batches: Sequence[dict[str, Any]]) -> list[Any]:
    """Return the outputs of replicas, each of which runs its batch in a thread with the settings of this one."""
    grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    def run(replica: Any, batch: dict[str, Any]) -> Any:
        with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return replica(**batch)

    with ThreadPoolExecutor(len(replicas)) as pool:
        return list(pool.map(run, replicas, batches))
