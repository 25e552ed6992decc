"""Where our time goes, for every case that has a goal: the profile behind those that miss it.

Fused layers, the back-end that ``auto`` takes. Times of torch's own profiler, of each op without those it calls, added
up by kind; what is left is Python, views and allocation. The rate of the matrix products is held against the best that
the same library reaches on this machine with many tokens: below it, weights wait for memory.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from benchmarks.end_to_end.contenders import Case, Contender, line_up
from benchmarks.end_to_end.engines import FUSED_LAYERS
from benchmarks.end_to_end.forced import FULL, NEVER, OWN
from benchmarks.end_to_end.measure import head
from benchmarks.end_to_end.models import NotMeasuredError, subject
from benchmarks.end_to_end.offline import HALF, MIXED
from benchmarks.end_to_end.single_stream import HALF as HALF_OF_ONE
from benchmarks.end_to_end.workloads import Fixed, Sst2, Workload
from earlyexit_kernels.tuning.timing import quantiles

SUITE = "profile"
CASES = (
    Case("BERT-base", Fixed(1, 32), (NEVER, HALF_OF_ONE)),
    Case("BERT-base", Fixed(1, 128), (NEVER,)),
    Case("BERT-base", Fixed(32, 32), (FULL, NEVER, HALF, *MIXED)),
    Case("BERT-base", Sst2(32, 1), (NEVER, HALF)),
    Case("MiniLM", Sst2(1, 48), (OWN,)),
    Case("MiniLM", Sst2(32, 4), (FULL, OWN)),
)
#: Kind of work -> the ops it is made of.
KINDS = {
    "products": ("mkldnn::_linear_pointwise", "aten::addmm", "aten::mm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::index_select", "aten::cat"),
    "norms_and_activations": ("aten::native_layer_norm", "aten::gelu_", "aten::relu_", "aten::add_"),
    "exits": tuple(f"earlyexit_kernels::exit_step_{name}" for name in ("cpp", "torch")),
    "moves": tuple(f"earlyexit_kernels::{op}_{name}" for op in ("compact", "gather_rows") for name in ("cpp", "torch")),
}
LAYER_OPS = tuple(f"earlyexit_kernels::encoder_layer_{name}" for name in ("cpp", "torch"))
RUNS = 5
MANY_TOKENS = 1024


def records() -> Iterator[dict[str, Any]]:
    """One record a case."""
    if torch.cuda.is_available():
        yield {"suite": SUITE, "not_measured": "the profile is one of fused layers on a CPU"}
        return
    torch.set_flush_denormal(True)
    with torch.inference_mode():
        fastest: dict[str, float] = {}
        for case in CASES:
            try:
                work = case.work.build(subject(case.subject))
            except NotMeasuredError as error:
                yield {"suite": SUITE, "case": f"{case.subject}, {case.work.name}", "not_measured": str(error)}
                continue
            config = subject(case.subject).encoder.config
            width, inner = config.hidden_size, config.intermediate_size
            best = fastest.setdefault(case.subject, best_rate(width, inner))
            contenders, left_out = line_up(dataclasses.replace(case, family_exits=()), work)
            yield from (head(SUITE, case, said) | {"not_measured": why} for said, why in left_out)
            for contender in (c for c in contenders if c.said.engine == FUSED_LAYERS):
                yield head(SUITE, case, contender.said) | profiled(contender, work, layer_macs(width, inner), best)


def layer_macs(width: int, inner: int) -> int:
    """Multiply-adds of a layer's four products on one token, H and I wide."""
    return 4 * width * width + 2 * width * inner


def best_rate(width: int, inner: int) -> float:
    """Multiply-adds a second of torch's products of a layer's shapes, on many tokens and weights that aren't cached."""
    weights = [torch.randn(n, k) for n, k in ((3 * width, width), (width, width), (inner, width), (width, inner)) * 4]
    inputs = [torch.randn(MANY_TOKENS, weight.shape[1]) for weight in weights]

    def run() -> None:
        for x, weight in zip(inputs, weights, strict=True):
            F.linear(x, weight)

    run()
    return 4 * MANY_TOKENS * layer_macs(width, inner) / min(_seconds(run) for _ in range(RUNS))


def _seconds(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def profiled(contender: Contender, work: Workload, macs: int, best: float) -> dict[str, Any]:
    """Time all batches, then profile them.

    Args:
        contender: one of ours.
        work: its batches.
        macs: multiply-adds of a layer on one token.
        best: multiply-adds a second that the machine's products reach.
    """
    verdict = contender.judged(work)
    if verdict.refused:
        return {"refused": verdict.refused}
    contender.ready()

    def run() -> None:
        for batch in work.batches:
            contender.answer(batch)

    run()
    times = [_seconds(run) for _ in range(RUNS)]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as events:
        watched = sum(_seconds(run) for _ in range(RUNS))
    by_shape = events.key_averages(group_by_input_shape=True)
    spent = {
        kind: sum(e.self_cpu_time_total for e in by_shape if e.key in ops) / 1e6 / watched
        for kind, ops in KINDS.items()
    }
    # an op's first argument is [tokens, width]
    tokens = sum(e.count * e.input_shapes[0][0] for e in by_shape if e.key in LAYER_OPS) / RUNS
    (median,) = quantiles(times, (0.5,))
    rate = tokens * macs / (spent["products"] * watched / RUNS)
    return {
        "layer_rows": round(verdict.layer_rows, 4),
        "median_ms": round(1000 * median, 3),
        "token_layers": round(tokens),
        **{f"{kind}_share": round(share, 4) for kind, share in spent.items()},
        "rest_share": round(1 - sum(spent.values()), 4),
        "products_gflops": round(2e-9 * rate, 1),
        "best_gflops": round(2e-9 * best, 1),
    }
