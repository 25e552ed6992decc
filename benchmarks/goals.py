"""The goals: of whole models on a CPU by case, dtype and baseline, and of a GPU (an H200) by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from benchmarks.end_to_end.baselines import COMPILED_WHOLE, PLAIN
from benchmarks.end_to_end.forced import NEVER
from benchmarks.end_to_end.models import CAPTURED_LAYERS
from benchmarks.end_to_end.suites import STORED as STORED_SUITE
from benchmarks.harness import Goal, Record, goal_fields

#: Baselines that depend on the case: the faster of the other runtimes, and our own model at full depth.
PEER, OWN_FULL = "faster peer", "our full depth"


def _base(exits: str, shape: str) -> str:
    return f"BERT-base, {exits}, {shape}"


_RAGGED = "B 32, SST-2 lengths"
_NEVER = {"B 1, S 32": (0.72, 0.29), "B 1, S 128": (0.84, 0.25), "B 32, S 32": (0.91, 0.24), _RAGGED: (0.46, 0.15)}
_HALF = {"all at 50 %, B 1, S 32": (0.60, 0.65), "uniform, 50 %, B 32, S 32": (0.60, 0.65)}
_MIXED = [f"{mix}, {share} %" for mix in ("uniform", "long tail") for share in (39, 23, 18)]

#: (case, dtype, baseline) -> goal.
END_TO_END: dict[tuple[str, str, str], Goal] = {
    **{(_base("never exit", shape), "float32", PLAIN): Goal(goals[0]) for shape, goals in _NEVER.items()},
    **{(_base("never exit", shape), "bfloat16", PLAIN): Goal(goals[1]) for shape, goals in _NEVER.items()},
    **{(f"BERT-base, {case}", "float32", PEER): Goal(goals[0]) for case, goals in _HALF.items()},
    **{(f"BERT-base, {case}", "bfloat16", PEER): Goal(goals[1]) for case, goals in _HALF.items()},
    (_base("uniform, 50 %", _RAGGED), "float32", PEER): Goal(0.30),
    **{(_base(exits, "B 32, S 32"), "float32", OWN_FULL): Goal(0.99, "efficiency") for exits in _MIXED},
    **{(_base(exits, "B 32, S 32"), "float32", PLAIN): Goal(1.05, "efficiency") for exits in _MIXED},
    ("MiniLM, own exits, B 32, SST-2 lengths", "float32", PLAIN): Goal(0.25),
    ("MiniLM, own exits, B 1, SST-2 lengths", "float32", PLAIN): Goal(0.50),
}

#: (model, shape) -> type of stored weights -> largest ratio to the faster peer of that arithmetic, if no row exits and
#: at half the layers. Those of BERT-base in float32 and bfloat16 are for AVX-512; AVX2 has higher ones.
STORED: dict[tuple[str, str], dict[str, tuple[float | None, float | None]]] = {
    ("BERT-base", "B 1, S 32"): {"float32": (0.85, 0.45), "float16": (0.75, 0.35), "bfloat16": (0.75, None)},
    ("BERT-base", "B 1, S 128"): {"float32": (0.90, None), "float16": (0.92, None), "bfloat16": (0.80, None)},
    ("BERT-base", "B 32, S 32"): {"float32": (0.95, 0.48), "float16": (0.95, 0.48), "bfloat16": (0.95, None)},
    ("BERT-base", _RAGGED): {"float32": (0.50, None)},
    ("MiniLM", "B 1, S 32"): {"float32": (1.00, 0.45), "float16": (0.85, 0.35)},
    ("MiniLM", "B 32, S 32"): {"float32": (0.95, 0.48), "float16": (0.95, 0.48)},
}
for _shape in ("B 1, S 32", "B 32, S 32"):
    STORED["BERT-base", _shape]["int8"] = (0.95, None)
#: Shape -> goal of BERT-base in float32 without AVX-512.
STORED_AVX2 = {"B 1, S 32": 0.95, "B 1, S 128": 0.97, "B 32, S 32": 0.97}


def stored_goal(record: Mapping[str, Any], capability: str | None = None) -> Goal | None:
    """Return the goal of fused layers by the type of their stored weights over the faster peer, or None.

    Args:
        record: of one of our variants.
        capability: of the processor as torch names it; default: of this one.
    """
    subject, shape, dtype = record["subject"], record["shape"], record["dtype"]
    never, half = STORED.get((subject, shape), {}).get(dtype, (None, None))
    if (capability or torch.backends.cpu.get_cpu_capability()) != "AVX512" and dtype == "float32":
        never = STORED_AVX2.get(shape, never) if subject == "BERT-base" else never
    value = never if record["exits"] == NEVER else half
    return None if value is None else Goal(value)


def whole_goal(record: Mapping[str, Any], *, ours: bool) -> Record:
    """Return the fields of a whole model's record about its goal.

    Args:
        record: of a variant beside a baseline.
        ours: whether the variant is one of this package's engines.
    """
    baseline, full = record["baseline"], re.fullmatch(r"(B \d+), S \d+", record["shape"])
    if record["engine"] == CAPTURED_LAYERS:
        mix = "never exit" if record["exits"] == NEVER else "mean depth 6"
        return gpu_goal(f"{mix} over torch.compile, {full[1]}", record) if full and baseline == COMPILED_WHOLE else {}
    goal = END_TO_END.get((record["case"], record["dtype"], baseline))
    if record["suite"] == STORED_SUITE:
        goal = stored_goal(record) if baseline == PEER else None
    return goal_fields(goal if ours else None, record)


#: Type of stored weights -> tokens -> least share of an AVX2 processor's peak: of bytes at M 1, else of operations.
ROOFLINE: dict[str, dict[int, Goal]] = {
    stored: {
        1: Goal(0.75, "bytes_share"),
        32: Goal(at_32, "operations_share"),
        128: Goal(beyond, "operations_share"),
        1024: Goal(beyond, "operations_share"),
    }
    for stored, at_32, beyond in (("float32", 0.62, 0.72), ("float16", 0.72, 0.75))
}


def roofline_goal(stored: str, tokens: int, capability: str | None = None) -> Goal | None:
    """Return the goal of layers with stored weights beside the peaks of the processor, or None; AVX-512 has none.

    Args:
        stored: type of the weights.
        tokens: M.
        capability: of the processor as torch names it; default: of this one.
    """
    avx2 = (capability or torch.backends.cpu.get_cpu_capability()) == "AVX2"
    return ROOFLINE.get(stored, {}).get(tokens) if avx2 else None


#: Name -> goal of a GPU; a record that belongs to a goal has the name under ``goal_name``. Those of whole models are
#: estimates for captured layers that are not compiled.
GPU: dict[str, Goal] = {
    "exit step: launches": Goal(1, "launches"),
    "exit step: microseconds on the device": Goal(5, "median_us"),
    "exit step over the torch chain": Goal(1 / 8),
    "exit step over the compiled chain": Goal(1 / 2),
    "exit step on the mean over the time of its bytes, B 128": Goal(1.3),
    **{f"never exit over torch.compile, B {rows}": Goal(most) for rows, most in ((1, 1.25), (32, 1.03), (128, 1.0))},
    **{f"mean depth 6 over torch.compile, B {rows}": Goal(most) for rows, most in ((1, 0.65), (32, 0.56), (128, 0.53))},
    "host synchronisations a batch": Goal(1, "syncs"),
    "self-test of cpp, milliseconds": Goal(5, "median_ms"),
    "self-test of triton, milliseconds": Goal(50, "median_ms"),
}


def gpu_goal(name: str, record: Mapping[str, Any]) -> Record:
    """Return a record's fields about a goal of `GPU`; none if there is no goal of this name."""
    goal = GPU.get(name)
    return {} if goal is None else {"goal_name": name, **goal_fields(goal, record)}
