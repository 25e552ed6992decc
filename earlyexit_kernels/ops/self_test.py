"""The test that a back-end passes on a device before it is chosen there.

A back-end that can be imported may still not work: Triton finds no C compiler, the extension was compiled for another
architecture, a kernel gives wrong numbers on a card that nobody has tried. So each back-end runs the ops of the loop
once per device on four small rows, one of which has left, and its results are compared with those of torch on the CPU.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.backends import first_line
from earlyexit_kernels.criteria import PatientConfidence
from earlyexit_kernels.ops.exit_call import ExitCall
from earlyexit_kernels.ops.schema import op_of

#: Environment variable that switches the test off.
VARIABLE = "EARLYEXIT_SELF_TEST"
#: Four rows of 3, 1, 2 and 5 tokens, the third of which has left; each id is a place in the request.
ROW_IDS, OFFSETS = (2, 0, -1, 1), (0, 3, 4, 6, 11)
REQUESTED, WIDTH, CLASSES, LAYER, DEPTH = 3, 40, 3, 1, 3
#: The threshold of `PatientConfidence` and its patience.
PARAMS = (0.5, 2.0)
DTYPES = (torch.float32, torch.bfloat16)
#: Greatest difference of a float; the values below are exact in any order of sums.
TOLERANCE = 1e-4

COMPACTED = {"row ids": [2, 0, 1, -1], "offsets": [0, 3, 4, 9, 9], "sources": [0, 1, 3, -1]}
#: Pooling -> logits of the row that leaves.
LOGITS = {"first": [14.0, 27.0, 1.0], "mean": [28.0, 54.0, 2.0]}
#: What `exit_step` leaves behind beside the answers: the first row leaves, the second is in doubt, and the fourth is
#: sure for the first time.
EXITED = {"row ids": [-1, 0, -1, 1], "states": [[0.0, 1.0, 2.0]], "exit layers": [0, 0, LAYER], "counts": [2, 6, 0]}

#: (back-end, device) -> why it does not work there, or ``""``.
_FAILURES: dict[tuple[str, torch.device], str] = {}


def failure(backend: str, device: torch.device) -> str:
    """Return why a back-end does not work on a device, found out once per process.

    Not tested, and taken to work, are: torch, whose results are the expected ones, every back-end with
    ``EARLYEXIT_SELF_TEST=0``, CUDA where torch finds no GPU, and a back-end that is met first while a CUDA graph is
    captured.

    Args:
        backend: ``"torch"``, ``"triton"`` or ``"cpp"``, which can be imported.
        device: with its index.

    Returns:
        ``""`` if it works, or else the op and its exception or difference, with the card.

    Raises:
        ValueError: ``EARLYEXIT_SELF_TEST`` is neither ``0`` nor ``1``.
        torch.OutOfMemoryError: no memory is left on the device.
    """
    key = backend, device
    if backend == "torch" or not switched_on() or key in _FAILURES:
        return _FAILURES.get(key, "")
    if device.type == "cuda" and (not torch.cuda.is_available() or _capturing()):
        return ""
    _FAILURES[key] = _in_thread(functools.partial(_failure, backend, device))
    return _FAILURES[key]


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def switched_on() -> bool:
    """Return whether back-ends and captures are tested before they are used.

    Raises:
        ValueError: ``EARLYEXIT_SELF_TEST`` is neither ``0`` nor ``1``.
    """
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE}: expected 1, to test back-ends before they are chosen, or 0, got {value!r}")
    return value == "1"


def _in_thread(run: Callable[[], str]) -> str:
    """Return what `run` returns in a new thread, which has none of the modes of this one.

    Tracing, fake tensors, autocast, inference mode, the current device and the current stream belong to a thread.
    """
    with ThreadPoolExecutor(1, "earlyexit_kernels self-test") as pool:
        return pool.submit(run).result()


def _failure(backend: str, device: torch.device) -> str:
    op = "making tensors"
    try:
        for op, expected, got in _results(backend, device):
            for (name, right), value in zip(expected.items(), got, strict=True):
                if not _equal(right, values := value.tolist()):
                    return f"its self-test failed on {_card(device)}: {op}: {name} are {values}, expected {right}"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, it is the reason not to choose this back-end, and is reported
        return f"its self-test failed on {_card(device)}: {op}: {first_line(error)}"
    return ""


def _card(device: torch.device) -> str:
    """Return the name and architecture of a device."""
    if device.type != "cuda":
        return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"
    try:
        major, minor = torch.cuda.get_device_capability(device)
        return f"{device} ({torch.cuda.get_device_name(device)}, sm_{major}{minor})"
    except Exception as error:  # of almost any class, by what is broken
        return f"{device}, whose name cannot be read ({first_line(error)})"


def _equal(expected: Any, got: Any) -> bool:
    """Compare nested lists: floats up to the tolerance, so not if one is NaN, and integers exactly."""
    if isinstance(expected, list):
        return len(expected) == len(got) and all(map(_equal, expected, got))
    return abs(expected - got) <= TOLERANCE if isinstance(expected, float) else expected == got


def _results(backend: str, device: torch.device) -> Iterator[tuple[str, dict[str, Any], Sequence[Tensor]]]:
    """Run the ops of a back-end on a device; give the name of each, and what it has to write and has written."""
    row_ids, offsets = _integers(ROW_IDS, device), _integers(OFFSETS, device)
    yield "compact", COMPACTED, op_of("compact", backend)(row_ids, offsets)
    new_offsets, source = _integers(COMPACTED["offsets"], device), _integers(COMPACTED["sources"], device)
    for dtype in DTYPES:
        hidden, weight = (x.to(device, dtype) for x in _hidden_and_weight())
        moved = torch.zeros_like(hidden)
        op_of("gather_rows", backend)(hidden, offsets, source, new_offsets, moved)
        tokens = hidden.tolist()
        left = [[0.0] * WIDTH] * (OFFSETS[3] - OFFSETS[2])
        yield f"gather_rows of {dtype}", {"tokens": [*tokens[: OFFSETS[2]], *tokens[OFFSETS[3] :], *left]}, [moved]
        for pooling, logits in LOGITS.items():
            written = _exit(backend, pooling, hidden, weight, row_ids.clone(), offsets)
            expected = {**EXITED, "answers": [[0.0] * CLASSES, [0.0] * CLASSES, logits]}
            yield f"exit_step of {dtype}, {pooling} pooling", expected, written


def _exit(
    backend: str, pooling: str, hidden: Tensor, weight: Tensor, row_ids: Tensor, offsets: Tensor
) -> tuple[Tensor, ...]:
    """Return what one exit writes, in the order of `EXITED`, and the answers."""
    device = hidden.device
    state = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float32, device=device)
    answers = torch.zeros(REQUESTED, CLASSES, dtype=torch.float32, device=device)
    exit_layer = torch.zeros(REQUESTED, dtype=torch.int64, device=device)
    bias = torch.zeros_like(weight[:, 0])
    tensors = (hidden, offsets, weight, bias, None, None, row_ids, state, answers, exit_layer)
    call = ExitCall(*tensors, PatientConfidence.name, PARAMS, pooling, LAYER, DEPTH)
    counts = op_of("exit_step", backend)(*call)
    return row_ids, state, exit_layer, counts, answers


def _hidden_and_weight() -> tuple[Tensor, Tensor]:
    """Return tokens ``[T, H]`` and a head ``[C, H]`` of whole numbers.

    The logits of the row in doubt are 0, those of the others far apart. The tokens of the row that has left are NaN.
    """
    weight = torch.arange(WIDTH) * torch.arange(1, CLASSES + 1)[:, None] % 3 - 1.0
    hidden = (torch.arange(OFFSETS[-1])[:, None] % 3 + 1.0) * weight[1]
    hidden[OFFSETS[1] : OFFSETS[2]] = 0.0
    hidden[OFFSETS[2] : OFFSETS[3]] = torch.nan
    return hidden, weight


def _integers(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)
