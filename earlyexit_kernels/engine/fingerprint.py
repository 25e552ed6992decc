"""Detects changes of modules that packed weights or CUDA graphs were built from.

Version counters do not suffice: fused optimizers, writes through ``weight.data``, NumPy or DLPack views, and writes in
inference mode leave them unchanged. A fingerprint therefore also holds the identity of every module, attribute and
setting of a config from the backbone down, the address and layout of every parameter, and a few elements of each copied
weight.

Not detected: a change of elements that are not sampled, by a write that no version counter records.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from earlyexit_kernels.backends import available_backends

#: Number and length of the runs of neighbouring elements that are compared in each copied weight; each run costs a
#: memory page lookup. An optimizer step changes all of them.
RUNS, RUN = 2, 8
#: The fractional part of the golden ratio, which spreads the runs over rows and columns.
_STEP = 0.6180339887498949
#: Attributes of a module that are dicts whose values are compared: hooks even while empty, parts only if not empty.
_HOOKS, _PARTS = ("_forward_hooks", "_forward_pre_hooks"), ("_parameters", "_buffers", "_modules")
#: Attributes of every module that do not affect its forward in eval mode.
_IGNORED = set(nn.Module().__dict__) - {*_HOOKS, *_PARTS}


class PythonFingerprint:
    """Reference implementation of the compiled ``_C.Fingerprint``, used without the extension.

    Args:
        modules: compared by type.
        tables: dicts, compared by the identity of their values.
        ignored: keys whose values are not compared.
        tensors: compared by address, dtype, shape and strides.
        copied: some of `tensors`, on the CPU, compared by version counter and by the bytes of a few elements too.
        elements: flat positions of these elements, for each of `copied`.
        kept: unused here; the compiled one appends the objects that the caller must keep alive.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        tables: list[dict[Any, Any]],
        ignored: set[str],
        tensors: list[Tensor],
        copied: list[Tensor],
        elements: list[list[int]],
        kept: list[Any],
    ) -> None:
        self._modules, self._tables, self._tensors, self._copied = modules, tables, tensors, copied
        self._ignored = ignored
        self._elements = [
            (tensor, torch.unravel_index(torch.tensor(positions), tensor.shape))
            for tensor, positions in zip(copied, elements, strict=True)
            if positions
        ]
        self._types = [type(module) for module in modules]
        self._sizes = [len(table) for table in tables]
        self._values = self._values_of_tables()
        self._layouts = [_layout(tensor) for tensor in tensors]
        self._versions = [_version(tensor) for tensor in copied]
        self._samples = self._read()

    def is_current(self) -> bool:
        """Return whether nothing has changed since the snapshot."""
        return (
            [type(module) for module in self._modules] == self._types
            and [len(table) for table in self._tables] == self._sizes
            and len(now := self._values_of_tables()) == len(self._values)
            and all(map(operator.is_, now, self._values))
            and [_layout(tensor) for tensor in self._tensors] == self._layouts
            and [_version(tensor) for tensor in self._copied] == self._versions
            and self._read() == self._samples
        )

    def _values_of_tables(self) -> list[Any]:
        return [value for table in self._tables for key, value in table.items() if key not in self._ignored]

    @torch.no_grad()
    def _read(self) -> list[bytes]:
        picked = (tensor.detach()[index] for tensor, index in self._elements)
        # compared as bytes, since NaN is not equal to itself
        return [each.reshape(-1).view(torch.uint8).numpy().tobytes() for each in picked]


class ModuleFingerprint:
    """Snapshot of modules, used to detect later changes.

    Args:
        roots: modules to compare, with everything inside them.
        copied: parameters inside them, on the CPU, whose contents are compared too, by version counter and a few
            elements. The other parameters may change in place.
    """

    def __init__(self, roots: Sequence[nn.Module], copied: Sequence[Tensor] = ()) -> None:
        self._roots = tuple(roots)
        modules = list({id(m): m for root in roots for m in root.modules()}.values())
        own = [m.__dict__ for m in modules]
        # layers may read their config at each call
        held = [names.get("config") for names in own]
        configs = list({id(c): vars(c) for c in held if isinstance(c, PretrainedConfig)}.values())
        hooks = [table for names in own for name in _HOOKS if isinstance(table := names.get(name), dict)]
        parts = [table for names in own for name in _PARTS if isinstance(table := names.get(name), dict) and table]
        named = [x for m in modules for x in (*m._parameters.values(), *m._buffers.values()) if x is not None]
        # tensors of other layouts have no address; they are replaced rather than written to
        tensors = list({id(x): x for x in named if x.layout == torch.strided and not x.is_nested}.values())
        contents = list({id(x): x for x in copied}.values())
        elements = [sampled_elements(x.numel()) for x in contents]
        self._kept: list[Any] = []
        self._snapshot = _snapshot_class()(
            modules, [*own, *configs, *hooks, *parts], _IGNORED, tensors, contents, elements, self._kept
        )

    def is_current(self, roots: Sequence[nn.Module]) -> bool:
        """Return whether `roots` are the same modules as before and nothing inside them has changed."""
        return (
            len(roots) == len(self._roots)
            and all(map(operator.is_, roots, self._roots))
            and bool(self._snapshot.is_current())
        )


def _snapshot_class() -> Any:
    if available_backends("cpu")["cpp"]:
        return PythonFingerprint
    return importlib.import_module("earlyexit_kernels._C").Fingerprint


def sampled_elements(size: int) -> list[int]:
    """Return the flat positions of the compared elements in a tensor of `size` elements."""
    starts = [int((k + 0.5) * _STEP % 1.0 * size) for k in range(RUNS)]
    return sorted({position for start in starts for position in range(start, min(start + RUN, size))})


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _version(tensor: Tensor) -> int:
    # tensors created in inference mode have no version counter
    return -1 if tensor.is_inference() else tensor._version
