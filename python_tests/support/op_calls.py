"""Random calls of the ops, drawn from their declared shapes: valid ones, and one change that makes a call invalid.

What a change breaks follows from the declaration alone; whether ids and offsets are valid is decided here, as the
documentation of the ops says it, without code of the package.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from support.exit_step_cases import NO_LAYER, UNTOUCHED
from torch import Tensor

from earlyexit_kernels import criteria
from earlyexit_kernels.ops.schema import SHAPES
from earlyexit_kernels.ops.shapes import Argument

LOWEST, HIGHEST = -(2**31), 2**31 - 1
POOLINGS = (None, "first", "mean", "none")

Arguments = dict[str, Any]


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def drawn(
    op: str,
    r: random.Random,
    *,
    rows: int | None = None,
    pooling: str | None = "any",
    has_offsets: bool | None = None,
) -> Arguments:
    """Return keyword arguments of a valid call; what is not given is drawn. `pooling` is None for logits.

    Where `exit_step` pools, tokens that it must not read, outside of the offsets or of rows that have left, are large.
    """
    rows = r.randrange(5) if rows is None else rows
    lengths = [r.choice((1, 1, 2, 3)) for _ in range(rows)]
    source = [r.randrange(-1, rows) if rows else -1 for _ in range(r.randrange(5))]
    requests = rows + r.randrange(3)
    ids = [-1 if r.random() < 0.3 else n for n in r.sample(range(requests), rows)]
    values = {
        "row_ids": ids,
        "offsets": ends_of(lengths, r.choice((0, 0, 2))),
        "source": source,
        "new_offsets": ends_of([lengths[i] if i >= 0 else r.randrange(3) for i in source]),
    }
    sizes = {"B": rows, "R": rows, "B2": len(source), "H": r.randrange(1, 4), "C": r.randrange(1, 4)}
    sizes |= {"K": r.randrange(1, 4), "N": requests, "T": values["offsets"][-1] + r.randrange(2)}
    sizes["T2"] = values["new_offsets"][-1] + r.randrange(2)
    shapes, settings, left_out = SHAPES[op].arguments, {}, set()
    if op == "exit_step":
        pooling = r.choice(POOLINGS) if pooling == "any" else pooling
        sizes["K"] = 1
        if has_offsets is False or (has_offsets is None and r.random() < 0.3):
            left_out.add("offsets")
        left_out |= {"logits"} if pooling else {"hidden", "weight", "bias"}
        settings = {"criterion": criteria.QExit(q=0.5), "layer": 1, "depth": r.choice((1, 2))}
        settings["pooling"] = pooling or "first"
        if pooling == "none" or "offsets" in left_out:
            sizes["T"] = rows
    elif op == "first_tokens_linear":
        settings = {"activation": "tanh"}
    arguments: Arguments = {}
    for name, argument in shapes.items():
        if name in left_out:
            continue
        dtypes = argument.dtypes
        dtype = arguments[dtypes].dtype if isinstance(dtypes, str) else r.choice(dtypes)
        if name in values:
            arguments[name] = int32(values[name])
        else:
            shape = [sizes[letter] + more for letter, more in argument.sizes]
            arguments[name] = torch.from_numpy(np.random.default_rng(r.randrange(99)).random(shape)).to(dtype)
    for name, content in (("answers", UNTOUCHED), ("exit_layer", NO_LAYER), ("out", UNTOUCHED)):
        if name in arguments:
            arguments[name].fill_(content)
    if op == "exit_step" and pooling in ("first", "mean") and "offsets" in arguments:
        read = [t for i, n in enumerate(ids) if n >= 0 for t in range(*values["offsets"][i : i + 2])]
        arguments["hidden"][[t for t in range(sizes["T"]) if t not in read]] = 300.0
    return {**arguments, **settings}


def ends_of(lengths: Sequence[int], start: int = 0) -> list[int]:
    return list(itertools.accumulate(lengths, initial=start))


def positional(op: str, arguments: Arguments) -> tuple:
    """Return the arguments in the order of the op's schema, for the raw op."""
    tensors = tuple(arguments.get(name) for name in SHAPES[op].arguments)
    if op == "exit_step":
        rule, layer = arguments["criterion"], arguments["layer"]
        pooling = arguments["pooling"] if arguments.get("hidden") is not None else "none"
        return *tensors, rule.name, rule.params(layer), pooling, layer, arguments["depth"]
    return *tensors, *([arguments["activation"]] if "activation" in arguments else [])


def tensors_of(arguments: Arguments) -> dict[str, Tensor]:
    return {name: x for name, x in arguments.items() if isinstance(x, Tensor)}


def in_one_buffer(first: Tensor, second: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Return both tensors in one buffer, the second one `shared` bytes before the end of the first."""
    sizes = [x.numel() * x.element_size() for x in (first, second)]
    memory = torch.zeros(sum(sizes) + 64, dtype=torch.uint8)
    start = sizes[0] - shared
    views = memory[: sizes[0]].view(first.dtype), memory[start : start + sizes[1]].view(second.dtype)
    for view, x in zip(views, (first, second), strict=True):
        view.copy_(x.flatten())
    return views[0].view(first.shape), views[1].view(second.shape)


def _other_dtype(x: Tensor, argument: Argument) -> Tensor:
    return x.to(torch.int64 if x.dtype == torch.int32 else torch.int32)


def _as_strided(x: Tensor, argument: Argument) -> Tensor | None:
    """Return the tensor with gaps, which only one that is written must not have."""
    apart = torch.stack([x] * 2, dim=-1)[..., 0]
    return apart if argument.written and not apart.is_contiguous() else None


#: Change -> function of a tensor and its declaration that returns what no op takes in its place; None where that is not
#: possible.
BROKEN: dict[str, Callable[[Tensor, Argument], Any]] = {
    "list": lambda x, argument: x.tolist(),
    "number": lambda x, argument: 3,
    "array": lambda x, argument: np.zeros(2),
    "absent": lambda x, argument: None if not argument.optional else x.tolist(),
    "dtype": _other_dtype,
    "axes": lambda x, argument: x[None],
    "sparse": lambda x, argument: x.to_sparse(),
    "meta": lambda x, argument: x.to("meta"),
    "strides": _as_strided,
}


def broken(op: str, arguments: Arguments, r: random.Random) -> str:
    """Change one argument of a valid call so that the declaration of the op forbids the call; return what changed."""
    shapes, tensors = SHAPES[op].arguments, tensors_of(arguments)
    name, kind = r.choice(list(tensors)), r.choice([*BROKEN, "size", "size"])
    x, argument = tensors[name], shapes[name]
    if kind == "size":
        uses = Counter(letter for other in tensors for letter, _ in shapes[other].sizes)
        uses["K"] += op == "exit_step"  # the criterion decides it
        uses["T"] += op == "exit_step" and ("offsets" not in tensors or arguments["pooling"] == "none")
        shared_axes = [k for k, (letter, _) in enumerate(argument.sizes) if uses[letter] > 1]
        if shared_axes:
            axis = r.choice(shared_axes)
            arguments[name] = torch.cat([x, x.new_zeros([1 if k == axis else n for k, n in enumerate(x.shape)])], axis)
            return f"{name} is longer on axis {axis}"
        kind = "axes"
    changed = BROKEN[kind](x, argument)
    if changed is None and kind != "absent":
        kind, changed = "axes", x[None]
    arguments[name] = changed
    return f"{name}: {kind}"


def with_any_values(op: str, arguments: Arguments, r: random.Random) -> None:
    """Replace some ids or offsets by any numbers."""
    whole = [name for name, x in tensors_of(arguments).items() if x.dtype == torch.int32 and x.numel()]
    for _ in range(r.choice((1, 1, 2))):
        if whole:
            values = arguments[r.choice(whole)]
            values[r.randrange(len(values))] = r.choice((-7, -1, 0, 1, 2, 3, 5, 9, LOWEST, HIGHEST, HIGHEST - 1))


def values_fit(op: str, arguments: Arguments) -> bool:
    """Return whether ids and offsets are as the documentation of the op says."""
    values = {name: x.tolist() for name, x in tensors_of(arguments).items() if x.dtype == torch.int32}
    offsets, tokens = values.get("offsets"), HIGHEST
    pools = op == "exit_step" and "hidden" in arguments and offsets is not None and arguments["pooling"] != "none"
    if op == "gather_rows" or pools:
        tokens = len(arguments["hidden"])
    if offsets is not None and not rising(offsets, tokens):
        return False
    if op == "gather_rows":
        new, lengths = values["new_offsets"], np.diff(np.array(offsets, dtype=object))
        return rising(new, len(arguments["out"])) and all(
            i < len(lengths) and new[j + 1] - new[j] == lengths[i] for j, i in enumerate(values["source"]) if i >= 0
        )
    present = [(i, n) for i, n in enumerate(values["row_ids"]) if n >= 0]
    named = [n for _, n in present]
    if len(set(named)) < len(named) or (op == "exit_step" and any(n >= len(arguments["answers"]) for n in named)):
        return False
    return not pools or all(offsets[i] < offsets[i + 1] for i, _ in present)


def rising(ends: Sequence[int], most: int) -> bool:
    return ends[0] >= 0 and all(a <= b for a, b in itertools.pairwise(ends)) and ends[-1] <= most
