"""Detects changes of modules that packed weights or captured layers were made from.

Version counters do not suffice: fused optimizers, writes through ``weight.data``, NumPy or DLPack views, and writes in
inference mode leave them unchanged. A seal therefore also holds the identity of every module, attribute and setting of
a config inside its modules, the address and layout of every parameter, and a few elements of each copied weight.

Not detected: a change of elements that are not sampled, by a write that no version counter records.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Iterator, Sequence
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


class Seal:
    """What modules are now, to detect later changes.

    Args:
        modules: to compare, with everything inside them.
        copied: parameters inside them, on the CPU, whose contents are compared too, by version counter and a few
            elements. The other parameters may change in place.
        configs: to compare besides those that the modules hold.
    """

    def __init__(
        self, modules: Sequence[nn.Module], copied: Sequence[Tensor] = (), configs: Sequence[PretrainedConfig] = ()
    ) -> None:
        self._roots = tuple(modules)
        inside = list({id(m): m for root in modules for m in root.modules()}.values())
        own = [m.__dict__ for m in inside]
        # layers may read their config at each call
        held = [names.get("config") for names in own]
        settings = {id(c): vars(c) for c in (*configs, *held) if isinstance(c, PretrainedConfig)}
        hooks = [table for names in own for name in _HOOKS if isinstance(table := names.get(name), dict)]
        parts = [table for names in own for name in _PARTS if isinstance(table := names.get(name), dict) and table]
        named = [x for m in inside for x in (*m._parameters.values(), *m._buffers.values()) if x is not None]
        # tensors of other layouts have no address; they are replaced rather than written to
        tensors = list({id(x): x for x in named if x.layout == torch.strided and not x.is_nested}.values())
        contents = list({id(x): x for x in copied}.values())
        elements = [sampled_elements(x.numel()) for x in contents]
        self._kept: list[Any] = []
        self._compared = _implementation()(
            inside, [*own, *settings.values(), *hooks, *parts], _IGNORED, tensors, contents, elements, self._kept
        )

    def holds(self, modules: Sequence[nn.Module]) -> bool:
        """Return whether `modules` are those of the seal and nothing inside them has changed."""
        return (
            len(modules) == len(self._roots)
            and all(map(operator.is_, modules, self._roots))
            and bool(self._compared.holds())
        )


class PythonSeal:
    """The comparisons of the compiled ``_C.Seal``, used without the extension.

    Args:
        modules: compared by type.
        tables: dicts, compared by the identity of their values.
        ignored: keys whose values are not compared.
        tensors: compared by address, dtype, shape and strides.
        copied: some of `tensors`, on the CPU, compared by version counter and by the bytes of a few elements too.
        elements: flat positions of these elements, for each of `copied`.
        kept: receives the compared values, which the caller must keep alive.
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
        self._modules, self._tables, self._ignored = modules, tables, ignored
        self._tensors, self._copied, self._elements = tensors, copied, elements
        kept.extend(value for table in tables for value in table.values())
        self._then = list(self._now())

    def holds(self) -> bool:
        """Return whether nothing has changed."""
        return all(map(operator.eq, self._now(), self._then))

    def _now(self) -> Iterator[Any]:
        """Yield what is compared, contents last: the layouts tell whether they may be read."""
        yield [type(module) for module in self._modules]
        for table in self._tables:
            yield [id(value) for key, value in table.items() if key not in self._ignored]
        yield [(x.data_ptr(), x.dtype, x.shape, x.stride()) for x in self._tensors]
        for x, positions in zip(self._copied, self._elements, strict=True):
            # tensors created in inference mode have no version counter
            yield -1 if x.is_inference() else x._version
            yield _bytes_of(x, positions)


@torch.no_grad()
def _bytes_of(x: Tensor, positions: list[int]) -> bytes:
    """Return the bytes of some elements; NaN is not equal to itself."""
    if not positions:
        return b""
    picked = x.detach()[torch.unravel_index(torch.tensor(positions), x.shape)]
    return picked.reshape(-1).view(torch.uint8).numpy().tobytes()


def _implementation() -> Any:
    return PythonSeal if available_backends("cpu")["cpp"] else importlib.import_module("earlyexit_kernels._C").Seal


def sampled_elements(size: int) -> list[int]:
    """Return the flat positions of the compared elements in a tensor of `size` elements."""
    starts = [int((k + 0.5) * _STEP % 1.0 * size) for k in range(RUNS)]
    return sorted({position for start in starts for position in range(start, min(start + RUN, size))})
