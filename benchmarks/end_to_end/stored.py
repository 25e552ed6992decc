"""Fused layers on the vector kernels, by the type in which weights are stored, beside ONNX Runtime and OpenVINO.

Run with ``python -m benchmarks.run --suite stored_weights``. Every variant answers the same batches, twice in a row, of
which the second time counts; the peers run all layers on padded rows. The largest distance of the logits from those of
the plain float32 model, relative to their spread, is in each record, and a variant beyond the limit of its type is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import earlyexit_kernels as ee
from benchmarks import harness
from benchmarks.end_to_end import measure, models, peers
from benchmarks.end_to_end.engines import FUSED_LAYERS, engine_model
from benchmarks.end_to_end.forced import NEVER, rule_for
from benchmarks.end_to_end.suites import ONE_AT_HALF
from benchmarks.end_to_end.variants import Case
from benchmarks.end_to_end.workloads import Batch, Fixed, Sst2, Workload
from benchmarks.goals import PEER, stored_goal
from benchmarks.harness import Checked, Implementation, Record, Variant
from benchmarks.machine import NotMeasuredError
from earlyexit_kernels.errors import BackendUnavailableError
from earlyexit_kernels.tuning.timing import quantiles

SUITE = "stored_weights"
#: Type of stored weights -> largest distance of the logits over their spread.
STORED = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.2, "int8": 0.6}
#: OpenVINO as it runs unless told otherwise, a baseline of its own of the types that it is compared with.
DEFAULT, BESIDE_DEFAULT = "OpenVINO by default", ("float32", "bfloat16")
#: Peers by the arithmetic they use: the faster one of a kind is the baseline of our variants of the same kind.
PEERS: dict[str, tuple[str, Callable[[models.Subject], Any]]] = {
    "ONNX Runtime": ("float32", peers.onnx_runtime),
    "OpenVINO": ("float32", peers.openvino),
    "OpenVINO in bfloat16": ("bfloat16", partial(peers.openvino, precision="bfloat16")),
    "ONNX Runtime in int8": ("int8", partial(peers.onnx_runtime, quantized=True)),
    "OpenVINO in int8": ("int8", partial(peers.openvino, precision=peers.BY_DEFAULT, quantized=True)),
    DEFAULT: (peers.BY_DEFAULT, partial(peers.openvino, precision=peers.BY_DEFAULT)),
}
#: Kind of a peer -> largest distance of its logits over their spread.
LIMITS = STORED | {peers.BY_DEFAULT: STORED["bfloat16"]}
#: Type of stored weights -> kind of the peers that it is compared with.
COMPARED = {"float32": "float32", "float16": "float32", "bfloat16": "bfloat16", "int8": "int8"}


_EXITS = (NEVER, ONE_AT_HALF)
CASES = (
    *(Case("BERT-base", work, _EXITS, weight=3) for work in (Fixed(1, 32), Fixed(1, 128), Fixed(32, 32), Sst2(32, 1))),
    *(Case("MiniLM", work, _EXITS, weight=3) for work in (Fixed(1, 32), Fixed(32, 32))),
)


def records(repeats: int) -> Iterator[Record]:
    """Yield a record for each case, type of weights, mix of exits and peer."""
    torch.set_flush_denormal(True)
    with torch.inference_mode():
        for case in CASES:
            yield from _case_records(case, repeats)


def _case_records(case: Case, repeats: int) -> Iterator[Record]:
    subject = models.subject(case.subject)
    header = partial(_header, case)
    try:
        work = case.work.build(subject)
    except NotMeasuredError as error:
        yield header(Variant("everything")) | {"not_measured": str(error)}
        return
    found = harness.prepare(_builders(case, subject, work))
    yield from found.skipped_records(header)
    times = measure.times_of(case, work, found, repeats, awake=True)
    kinds = {kind for kind, _ in PEERS.values()}
    peer = {
        kind: min(own, key=lambda v: quantiles(times[v], (0.5,)))
        for kind in kinds
        if (own := [v for v in times if v.engine in PEERS and PEERS[v.engine][0] == kind])
    }
    for variant, own in times.items():
        record = header(variant) | dict(found.facts[variant]) | harness.time_fields(own)
        against = peer.get(COMPARED.get(variant.dtype, ""))
        if variant.engine in PEERS or against is None:
            yield record
            continue
        beside = {"baseline": PEER, "against": against.engine} | harness.ratio_fields(own, times[against])
        yield record | beside | harness.goal_fields(stored_goal(case.subject, case.work.name, variant), beside)
        if variant.dtype in BESIDE_DEFAULT and peers.BY_DEFAULT in peer:
            beside = {"baseline": DEFAULT, "against": DEFAULT} | harness.ratio_fields(
                own, times[peer[peers.BY_DEFAULT]]
            )
            yield record | beside | harness.goal_fields(None, beside)


def _header(case: Case, variant: Variant) -> Record:
    return measure.header(SUITE, case, variant) | {"cpu_capability": torch.backends.cpu.get_cpu_capability()}


def _builders(
    case: Case, subject: models.Subject, work: Workload
) -> Iterator[tuple[Variant, Callable[[], Implementation]]]:
    truth = [subject.logits(batch) for batch in work.batches]
    for stored in STORED:
        for exits in case.exits:
            variant = Variant(FUSED_LAYERS, "cpp", stored, exits)
            yield variant, partial(_ours, variant, subject, work, truth)
    for name, (kind, build) in PEERS.items():
        variant = Variant(name, "", kind, "")
        yield variant, partial(_peer, variant, build, subject, work, truth)


def _ours(variant: Variant, subject: models.Subject, work: Workload, truth: list[Tensor]) -> Implementation:
    """Return the model with linear exits; its layers are checked by the family's own exits, as the plain model's."""
    model, checked = (
        engine_model(subject, FUSED_LAYERS, family=family, stored=variant.dtype) for family in (False, True)
    )
    try:
        for each in (model, checked):
            each.configure(path="fused", weights=variant.dtype)
    except BackendUnavailableError as error:
        raise NotMeasuredError(str(error)) from error
    rule = rule_for(variant.exits, ee.ExitTrace.cat([model.trace(**batch) for batch in work.batches]), trained=False)
    # of the last exit: a trained model has a criterion of its own
    answers = [checked.trace(**batch).logits[:, -1] for batch in work.batches]
    check = partial(_checked, STORED[variant.dtype], answers, truth)
    call = partial(_all, model, work.batches)
    return Implementation(variant, call, check, partial(model.set_criterion, rule), ours=True, model=model)


def _peer(variant: Variant, build: Any, subject: models.Subject, work: Workload, truth: list[Tensor]) -> Implementation:
    answer = build(subject)
    check = partial(_checked, LIMITS[variant.dtype], [answer(batch)[0] for batch in work.batches], truth)

    def call() -> None:
        for batch in work.batches:
            answer(batch)

    return Implementation(variant, call, check)


def _all(model: Any, batches: tuple[Batch, ...]) -> None:
    for batch in batches:
        model(**batch)


def _checked(allowed: float, answers: list[Tensor], truth: list[Tensor]) -> Checked:
    plain = torch.cat(truth)
    spread = float((plain - plain.mean(dim=0)).std()) if len(plain) > 1 else float(plain.std())
    off = float((torch.cat(answers) - plain).abs().max()) / spread
    if not off <= allowed:
        return Checked(f"its logits are {off:.2g} of their spread off the plain model's ({allowed:g} allowed)")
    return Checked(facts={"error": round(off, 7)})
