"""What a decision costs: each rule at a middle layer, from ready logits, over what entropy costs there.

The op is called as the engine calls it, without `exit_step`'s checks. Every rule stands in the middle of its grid, DACT
without a threshold at both its bounds, and starts from the state that five layers have left it. Row ids, state and
answers are put back between timings, outside of the clock; one timing runs the op on many copies of them, so that each
call finds its rows present. All rules of a batch size take turns; ratios are medians of per-round ratios with their .2
and .8 quantiles. ``entropy, again`` is the same rule timed twice: what its ratio is off 1 is noise. Run with
``python -m benchmarks.run --suite decision_cost``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from earlyexit_kernels.backends import TRITON_INTERPRETED, available_backends
from earlyexit_kernels.criteria import Criterion, Dact
from earlyexit_kernels.grids import settings
from earlyexit_kernels.ops import exit_step_op
from earlyexit_kernels.timing import interleave, paired_ratio, quantiles
from earlyexit_kernels.types import AUX_ACTIVATIONS, ExitTrace, read_aux

SUITE = "decision_cost"
CLASSES, DEPTH, LAYER = 3, 12, 6
BATCHES = (32, 256, 1024)
#: Back-end -> calls of the op in one timing, some milliseconds together; a single one would drown in noise.
CALLS = {"torch": 16, "triton": 64, "cpp": 64}
ROUNDS_A_REPEAT = 5
BASELINE, AGAIN = "entropy", "entropy, again"
#: Rule -> the ratio to entropy that was set as a goal.
GOALS = {"voting": 1.3, "dact": 1.3}


def random_trace(rows: int) -> ExitTrace:
    """Exits that mostly agree from layer to layer, with every scalar a rule may read."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    logits = 2 * normal(rows, 1, CLASSES) + normal(rows, DEPTH, CLASSES)
    raw = {name: normal(rows, DEPTH) - 1.5 for name in AUX_ACTIVATIONS}
    raw["hidden_cosine"] = raw["hidden_cosine"].tanh()
    return ExitTrace(logits, raw, torch.arange(rows))


def rules(trace: ExitTrace) -> dict[str, Criterion]:
    """Every rule that decides at a middle layer, at the middle of its grid, and entropy a second time."""
    found = {name: group[len(group) // 2] for name, group in settings(trace).items()}
    return {**found, "dact": Dact(), "dact, tight": Dact(bound="tight"), AGAIN: found[BASELINE]}


class Decision:
    """One rule at the middle layer, on copies of one batch.

    Args:
        rule: the criterion.
        trace: of the batch, on the device.
        backend: of the op.
    """

    def __init__(self, rule: Criterion, trace: ExitTrace, backend: str) -> None:
        rows, device = trace.logits.shape[0], trace.logits.device
        self.rule, self.op = rule, exit_step_op(backend, device.type)
        self.logits = [trace.logits[:, k].contiguous() for k in range(LAYER)]
        self.aux: list[Tensor | None] = [None] * LAYER
        if rule.needs is not None:
            values = read_aux(trace.aux[rule.needs], rule.needs)
            self.aux = [values[:, k].contiguous() for k in range(LAYER)]
        ids = torch.arange(rows, dtype=torch.int32, device=device)
        answers = torch.zeros(rows, CLASSES, device=device)
        exit_layer = torch.zeros(rows, dtype=torch.int64, device=device)
        state = rule.new_state(rows, device, CLASSES, trace.keys)
        for layer in range(1, LAYER):
            self._decide(layer, (ids.clone(), state, answers, exit_layer))
        self.before = (ids, state, answers, exit_layer)
        self.copies = [tuple(x.clone() for x in self.before) for _ in range(CALLS[backend])]
        self.left = rows - int(self._decide(LAYER, self.copies[0])[0])

    def _decide(self, layer: int, buffers: tuple[Tensor, ...]) -> Tensor:
        logits, aux = self.logits[layer - 1], self.aux[layer - 1]
        rule = self.rule
        return self.op(
            None, None, None, None, logits, aux, *buffers, rule.name, rule.params(layer), "none", layer, DEPTH
        )

    def restore(self) -> None:
        """Put every copy back to what it was before the layer."""
        for copy in self.copies:
            for x, before in zip(copy, self.before, strict=True):
                x.copy_(before)

    def __call__(self) -> None:
        """Decide once on each copy."""
        logits, aux, op, name, params = self.logits[-1], self.aux[-1], self.op, self.rule.name, self.rule.params(LAYER)
        for copy in self.copies:
            op(None, None, None, None, logits, aux, *copy, name, params, "none", LAYER, DEPTH)


def _on(trace: ExitTrace, device: str) -> ExitTrace:
    aux = {name: values.to(device) for name, values in trace.aux.items()}
    keys = None if trace.keys is None else trace.keys.to(device)
    return ExitTrace(trace.logits.to(device), aux, keys)


def records(repeats: int) -> Iterator[dict[str, Any]]:
    """One record for each back-end, batch size and rule; back-ends that can't be timed here say why."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sync: Callable[[], None] | None = torch.cuda.synchronize if device == "cuda" else None
    for backend, why_not in available_backends(device).items():
        if backend == "triton" and device == "cpu":
            why_not = "no GPU; the interpreter's time says nothing of the kernel's"
        if why_not or (backend == "triton" and TRITON_INTERPRETED):
            yield {"suite": SUITE, "backend": backend, "device": device, "not_measured": why_not}
            continue
        for rows in BATCHES:
            trace = _on(random_trace(rows), device)
            decisions = {name: Decision(rule, trace, backend) for name, rule in rules(random_trace(rows)).items()}
            times = interleave(
                decisions,
                repeats=ROUNDS_A_REPEAT * repeats,
                sync=sync,
                prepare=lambda name: decisions[name].restore(),  # noqa: B023  called within this turn of the loop
                progress=f"{backend}, B {rows}",
            )
            for name, decision in decisions.items():
                ratio = paired_ratio(times[name], times[BASELINE])
                yield {
                    "suite": SUITE,
                    "backend": backend,
                    "device": device,
                    "rule": name,
                    "criterion": decision.rule.to_dict(),
                    "rows": rows,
                    "left": decision.left,
                    "microseconds": round(quantiles(times[name], (0.5,))[0] * 1000 / len(decision.copies), 3),
                    "ratio": round(ratio.median, 4),
                    "ratio_low": round(ratio.low, 4),
                    "ratio_high": round(ratio.high, 4),
                    "goal": GOALS.get(name),
                }
