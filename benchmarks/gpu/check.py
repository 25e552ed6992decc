"""``make gpu-check``: build for the card that is here, run the tests that want one, and measure, within nine minutes.

Whatever is done is written to results/<gpu>.json at once. Run again, it goes on with the sections that aren't there yet
for these sources. Needs torch with CUDA, triton and transformers; without nvcc, pytest or text data the parts that want
them say so. An interrupted or failed section is tried again.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import store
from benchmarks.gpu import card, steps
from benchmarks.gpu.bench import Record, head
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.steps import Outcome, Worker
from benchmarks.gpu.tables import bar_table
from earlyexit_kernels.tuning.report import environment

MINUTES = 9.0
#: Seconds of the rest that a step isn't begun within; and the share of its own time that a section isn't.
TOO_LATE, SHARE = 30, 1 / 3


@dataclass(frozen=True)
class Step:
    """One thing to do.

    Attributes:
        run: given the seconds it has.
        seconds: at most.
        always: even where its records are there already, or others were asked for.
        least: seconds, of all that are left, that it isn't begun within.
    """

    run: Callable[[float], Outcome]
    seconds: float
    always: bool = False
    least: float = TOO_LATE


@dataclass
class Summary:
    """What became of the steps.

    Attributes:
        done, there, failed, late: names of those measured now, there already, stopped by an error, and not begun.
        wrong: records refused.
    """

    done: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    wrong: list[Record] = field(default_factory=list)

    def __str__(self) -> str:
        named = {
            "measured": self.done,
            "there already": self.there,
            "failed, to be tried again": self.failed,
            "left for the next run": self.late,
        }
        lines = [f"{word}: {', '.join(names)}" for word, names in named.items() if names]
        return "\n".join([*lines, *(f"refused: {words_of(record)}" for record in self.wrong)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Do it all; 0 where nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = ["build", "tests", *SECTIONS]
    parser.add_argument("--section", choices=names, action="append", help="only these; default: all")
    parser.add_argument("--redo", action="store_true", help="also what is there already for these sources")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for everything (default: %(default)s)")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu-check: expected an NVIDIA GPU, torch sees none; nothing was measured", file=sys.stderr)
        return 2
    if environment()["commit"] is None:
        print(
            "note: there is no git checkout here; set EARLYEXIT_COMMIT, or the results say no commit", file=sys.stderr
        )
    with Worker() as worker:
        chosen = args.section or names
        wanted = {name: step for name, step in plan(worker).items() if step.always or name in chosen}
        summary = check(wanted, minutes=args.minutes, redo=args.redo)
    print(f"\n{bar_table()}\n\n{summary}")
    rewrite_readme()
    return 1 if summary.failed or summary.wrong else 0


def plan(worker: Worker) -> dict[str, Step]:
    """All steps, in order."""
    sections = {
        name: Step(functools.partial(worker.ask, name), section.seconds, least=max(TOO_LATE, section.seconds * SHARE))
        for name, section in SECTIONS.items()
    }
    return {"build": Step(steps.build, 300, always=True), "tests": Step(steps.tests, 240, least=80), **sections}


def check(
    wanted: Mapping[str, Step],
    *,
    minutes: float,
    redo: bool = False,
    results: Path | None = None,
    now: Callable[[], float] = time.monotonic,
) -> Summary:
    """Run steps while there is time, and write each one's records when it ends.

    Args:
        wanted: by name, in order.
        minutes: for all of them.
        redo: also those whose records are there.
        results: the folder; default: the committed results.
        now: a clock in seconds.
    """
    summary, end, sources = Summary(), now() + 60 * minutes, card.fingerprint()
    for name, step in wanted.items():
        if not redo and not step.always and name in finished(sources, results):
            summary.there.append(name)
            continue
        start = now()
        if end - start < step.least:
            summary.late.append(name)
            continue
        print(f"-- {name}", flush=True)
        outcome = step.run(min(step.seconds, end - start))
        records = list(outcome.records)
        if outcome.failed:
            records.append(head(f"gpu_{name}", name, "the rest") | {"not_measured": outcome.failed})
        facts = {"finished": not outcome.failed, "sources": sources, "seconds": round(now() - start), **card.facts()}
        store.save(f"gpu_{name}", records, results=results, **facts)
        _say(records)
        (summary.failed if outcome.failed else summary.done).append(name)
        summary.wrong += [record for record in records if "refused" in record]
        if outcome.without:
            sources += f" without {outcome.without}"
    return summary


def finished(sources: str, results: Path | None = None) -> set[str]:
    """Sections of this machine that were measured to their end with these sources."""
    suites = store.documents(results).get(store.machine_name(), {"suites": {}})["suites"]
    return {
        name.removeprefix("gpu_")
        for name, facts in suites.items()
        if name.startswith("gpu_") and facts.get("finished") and facts.get("sources") == sources
    }


def _say(records: Iterable[Record]) -> None:
    for record in records:
        print(words_of(record), flush=True)
        if "entry" in record:
            gpu = torch.cuda.get_device_name(0)
            print(
                f"to paste into engine_choice.FASTEST:\n    {gpu!r}: {tuple(map(tuple, record['entry']))!r},",
                flush=True,
            )


def words_of(record: Record) -> str:
    """A record on one line."""
    return " ".join(f"{key}={value}" for key, value in record.items() if value not in (None, ""))


def rewrite_readme() -> None:
    """Put the numbers into the READMEs' tables."""
    from benchmarks.readme import rewrite

    rewrite()


if __name__ == "__main__":
    sys.exit(main())
