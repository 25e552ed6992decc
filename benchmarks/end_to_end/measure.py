"""One case: contenders built, their answers held to the truth, then timed in turns, and records made of the times."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.end_to_end import models
from benchmarks.end_to_end.baselines import LEAVE_EARLY, PEERS, PLAIN
from benchmarks.end_to_end.check import Verdict
from benchmarks.end_to_end.contenders import Case, Contender, Said, line_up
from benchmarks.end_to_end.forced import FULL
from benchmarks.end_to_end.goals import GOALS, OWN_FULL, PEER, efficiency
from benchmarks.end_to_end.models import NotMeasuredError
from benchmarks.end_to_end.workloads import Workload
from earlyexit_kernels.tuning.timing import interleave, paired_ratio, quantiles

#: Milliseconds that the rounds of a case may take for each repeat asked for: long rounds are repeated less often, but
#: these many times at least, or a quarter of the repeats.
BUDGET_MS = 250.0
FEWEST_ROUNDS, MOST_ROUNDS_A_REPEAT = 5, 10
#: Seconds of rest before each timed call: threads of the runtime before it spin on for some milliseconds.
REST = 0.02


def records(suite: str, cases: Sequence[Case], repeats: int) -> Iterator[dict[str, Any]]:
    """Time all cases; a record for each contender and baseline, and one for each that is left out."""
    torch.set_flush_denormal(True)
    with torch.inference_mode():
        for case in cases:
            yield from case_records(suite, case, repeats)


def case_records(
    suite: str, case: Case, repeats: int, *, rounds: int | None = None, warmup: int = 0
) -> Iterator[dict[str, Any]]:
    """Time one case.

    Args:
        suite: for the records.
        case: what is timed together.
        repeats: how much time the rounds may take.
        rounds, warmup: just so many rounds, in place of the time, after so many untimed ones.
    """
    entry = entered(suite, case)
    yield from entry.left_out
    if entry.work is None:
        return
    times = _times(case, entry.work, entry.contenders, repeats, rounds, warmup)
    for said, contender in entry.contenders.items():
        own = standing(case, entry, said) | _numbers(case, entry.work, times[said])
        compared_with = _baselines(case, contender, times)
        if not compared_with:
            yield head(suite, case, said) | own
        for baseline, against in compared_with.items():
            compared = _compared(entry.verdicts[said].layer_rows, times[said], times[against], against)
            record = head(suite, case, said, baseline) | own | compared | {"against": against.engine}
            yield record | _goal(record, contender.ours)


class Entry(NamedTuple):
    """A case ready to time.

    Attributes:
        work: its batches, or None where there is nothing to time.
        contenders, verdicts: those whose answers are right.
        left_out: records of the others.
    """

    work: Workload | None
    contenders: dict[Said, Contender]
    verdicts: dict[Said, Verdict]
    left_out: list[dict[str, Any]]


def entered(suite: str, case: Case) -> Entry:
    """Build a case's contenders and hold their answers to the truth."""
    try:
        work = case.work.build(models.subject(case.subject))
    except NotMeasuredError as error:
        return Entry(None, {}, {}, [head(suite, case, Said("everything", "", "", "")) | {"not_measured": str(error)}])
    contenders, missing = line_up(case, work)
    left_out = [head(suite, case, said) | {"not_measured": why_not} for said, why_not in missing]
    verdicts = {contender.said: contender.judged(work) for contender in contenders}
    left_out += [head(suite, case, said) | {"refused": v.refused} for said, v in verdicts.items() if v.refused]
    right = {contender.said: contender for contender in contenders if not verdicts[contender.said].refused}
    return Entry(work, right, {said: verdicts[said] for said in right}, left_out)


def head(suite: str, case: Case, said: Said, baseline: str = "") -> dict[str, Any]:
    """The fields by which a record is known."""
    label = ", ".join(word for word in (case.subject, said.exits, case.work.name) if word)
    fields = {"suite": suite, "case": label, "subject": case.subject, "shape": case.work.name}
    return fields | said._asdict() | {"baseline": baseline}


def standing(case: Case, entry: Entry, said: Said) -> dict[str, Any]:
    """What a record says of the model and of the answers."""
    subject, judged = models.subject(case.subject), entry.verdicts[said]
    return {
        "weights": subject.weights,
        "depth": subject.depth,
        "layer_rows": round(judged.layer_rows, 4),
        "mean_exit_layer": round(judged.layer_rows * subject.depth, 3),
        "flips": judged.flips,
    }


def _times(
    case: Case, work: Workload, contenders: Mapping[Said, Contender], repeats: int, rounds: int | None, warmup: int
) -> dict[Said, list[float]]:
    """Milliseconds of each call, by contender."""
    calls = {str(i): _call(contender, case, work) for i, contender in enumerate(contenders.values())}
    ready = {str(i): contender.ready for i, contender in enumerate(contenders.values())}
    on_gpu = models.device() == "cuda"

    def prepare(name: str) -> None:
        ready[name]()
        time.sleep(0 if on_gpu else REST)

    def timed(rounds: int, warmup: int) -> dict[str, list[float]]:
        title = f"{case.subject}, {case.work.name}"
        sync = torch.cuda.synchronize if on_gpu else None
        return interleave(calls, repeats=rounds, warmup=warmup, sync=sync, prepare=prepare, progress=title)

    # all have been called once, when their answers were checked
    if rounds is None:
        a_round = sum(found[0] + 1000 * REST for found in timed(1, 0).values())
        rounds = rounds_of(case.weight * repeats, a_round)
    if case.one_by_one:
        # every row as often as the others: shares of layer-rows are of all of them
        rounds = max(rounds // len(work.batches), 1) * len(work.batches)
    times = timed(rounds, warmup)
    return {said: times[str(i)] for i, said in enumerate(contenders)}


def rounds_of(repeats: float, milliseconds: float) -> int:
    """How often a round is repeated that takes some milliseconds."""
    fit = min(repeats * BUDGET_MS / max(milliseconds, 1e-3), MOST_ROUNDS_A_REPEAT * repeats)
    return max(int(fit), min(max(FEWEST_ROUNDS, int(repeats / 4)), int(repeats)), 1)


def _call(contender: Contender, case: Case, work: Workload) -> Callable[[], None]:
    """Answer all batches, or the next one in turn: in a round all contenders then have the same one."""
    turns = itertools.cycle(work.batches)

    def one() -> None:
        contender.answer(next(turns))

    def all_of_them() -> None:
        for batch in work.batches:
            contender.answer(batch)

    return one if case.one_by_one else all_of_them


def _baselines(case: Case, contender: Contender, times: Mapping[Said, Sequence[float]]) -> dict[str, Said]:
    """What a contender is compared with: name of the baseline -> who that is in this case."""
    engine, backend, dtype, exits = contender.said
    plain = Said(PLAIN, "", "float32", FULL)
    found = {PLAIN: plain, f"{PLAIN}, {dtype}": plain._replace(dtype=dtype)}
    if dtype == "float32":
        del found[f"{PLAIN}, {dtype}"]
    if contender.ours:
        peers = [said for said in times if said.engine in PEERS and said.dtype == dtype]
        if peers:
            found[PEER] = min(peers, key=lambda said: quantiles(times[said], (0.5,)))
        found[OWN_FULL] = Said(engine, backend, dtype, FULL)
        found |= {name: Said(name, "", dtype, FULL) for name in case.compared if name not in LEAVE_EARLY}
        found |= {name: Said(name, "", dtype, exits) for name in case.compared if name in LEAVE_EARLY}
    return {name: said for name, said in found.items() if said in times and said != contender.said}


def _numbers(case: Case, work: Workload, times: Sequence[float]) -> dict[str, Any]:
    """What a contender's times are by themselves."""
    median, p90, p99 = quantiles(times, (0.5, 0.9, 0.99))
    rows = work.rows // len(work.batches) if case.one_by_one else work.rows
    return {
        "rows": rows,
        "tokens": round(work.tokens, 4),
        "rounds": len(times),
        "median_ms": round(median, 3),
        "p90_ms": round(p90, 3),
        "p99_ms": round(p99, 3),
        "rows_per_second": round(1000 * rows / median, 2),
    }


def _compared(layer_rows: float, times: Sequence[float], baseline: Sequence[float], against: Said) -> dict[str, float]:
    """A contender's times beside those of a baseline, and efficiency where that one runs all layers."""
    ratio = paired_ratio(times, baseline)
    if against.engine in LEAVE_EARLY:
        return ratio.fields()
    return {**ratio.fields(), "efficiency": round(efficiency(layer_rows, ratio.median), 4)}


def _goal(record: Mapping[str, Any], ours: bool) -> dict[str, Any]:
    goal = GOALS.get((record["case"], record["dtype"], record["baseline"])) if ours else None
    return {"goal": goal and goal.value, "goal_of": goal and goal.of, "goal_met": goal and goal.met(record)}
