"""The groups of cases, and the recording of a selection of them by the package that this process imports."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

import earlyexit_kernels as ee
from benchmarks.answers import eval_cases, lifecycle_cases, replay_cases, training_cases
from benchmarks.answers.models import DEPTH, FAMILIES, FUSED
from benchmarks.answers.recording import RAISED, ROUNDING, Case, Recording

_FEW = ("bert", "albert", "roberta-prelayernorm", "modernbert", "deberta", "qwen3")
#: Group -> its cases of a family, and the families.
GROUPS: dict[str, tuple[Callable[[str], Iterator[Case]], Sequence[str]]] = {
    "forward": (eval_cases.forward, tuple(FAMILIES)),
    "modes": (eval_cases.modes, tuple(FAMILIES)),
    "inputs": (eval_cases.inputs, tuple(FAMILIES)),
    "stored": (eval_cases.stored, FUSED),
    "dtypes": (eval_cases.dtypes, _FEW),
    "training": (training_cases.training, tuple(FAMILIES)),
    "tasks": (training_cases.tasks, _FEW),
    "conversions": (lifecycle_cases.conversions, tuple(FAMILIES)),
    "changes": (lifecycle_cases.changes, tuple(FAMILIES)),
    "files": (lifecycle_cases.files, tuple(FAMILIES)),
    "replays": (lambda family: replay_cases.replays(), ("bert",)),
}


def record(
    groups: Sequence[str] = (),
    families: Sequence[str] = (),
    *,
    written: Path | None = None,
    read: Path | None = None,
) -> Recording:
    """Return the answers of the package that is imported here.

    Args:
        groups, families: what to record; default: all.
        written, read: folders of saved models, as for `lifecycle_cases.files`.
    """
    package = str(Path(ee.__file__).resolve().parent)
    about = {"package": package, "torch": torch.__version__, "transformers": transformers.__version__}
    recording = Recording(about=about)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products of torch round by the number of threads
    try:
        for family in families or FAMILIES:
            for group in groups or GROUPS:
                cases, having = GROUPS[group]
                if group == "files":
                    cases = partial(lifecycle_cases.files, written=written, read=read)
                if family in having:
                    _add(recording, f"{group} | {family} | stopped", cases(family))
    finally:
        torch.set_num_threads(threads)
    return recording


def prepare() -> None:
    """Set up a process that only records."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("earlyexit_kernels").setLevel(logging.ERROR)


def _add(recording: Recording, stopped: str, cases: Iterator[Case]) -> None:
    """Record the cases of a group; an error between them is recorded as a case too."""
    try:
        recording.add(cases)
    except Exception as error:
        print(f"{stopped}: {error!r}", file=sys.stderr)
        recording.answers[stopped], recording.tolerances[stopped] = {RAISED: type(error).__name__}, ROUNDING


def spread(recording: Recording) -> str:
    """Return how the rows of the group ``forward`` leave, a line for each criterion; empty without such cases."""
    found: dict[str, list[torch.Tensor]] = defaultdict(list)
    for name, answer in recording.answers.items():
        group, _, rule, *_ = name.split(" | ")
        layers: Any = answer.get("exit_layer")
        if group == "forward" and layers is not None:
            found[rule].append(torch.bincount(layers, minlength=DEPTH + 1)[1:])
    lines = [f"{'criterion':26}{'left early':>12}{'2 exits or more':>18}{'3 or more':>12}{'cases':>8}"]
    for rule, counts in found.items():
        table = torch.stack(counts)
        exits, early = (table > 0).sum(dim=1), 1 - (table[:, -1].sum() / table.sum()).item()
        shares = [(exits >= least).float().mean().item() for least in (2, 3)]
        lines.append(f"{rule:26}{early:>12.0%}{shares[0]:>18.0%}{shares[1]:>12.0%}{len(counts):>8}")
    return "\n".join(lines) if found else ""


def summary(recording: Recording) -> str:
    """Return the number of cases, and those that raised an error by group and class."""
    raised: dict[str, int] = defaultdict(int)
    for name, answer in recording.answers.items():
        if RAISED in answer:
            raised[f"{name.split(' | ')[0]}: {answer[RAISED]}"] += 1
    lines = [f"{len(recording.answers)} cases of {recording.about['package']}"]
    return "\n".join([*lines, *(f"  {number} raised an error, {what}" for what, number in sorted(raised.items()))])
