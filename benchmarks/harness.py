"""The harness of all benchmarks: variants, answers checked before timing, interleaved timing, goals, records, results.

A *case* is one piece of work on one input. A *variant* is one way of doing it: an engine, a back-end, a dtype, a mix of
exits. `prepare` builds the variants of a case and checks their answers. A variant that cannot run on this machine is
recorded as ``not_measured``, one whose answer is wrong as ``refused``; neither is timed. `PreparedCase.times` calls the
others in turns. Records are dicts; a suite's records are stored in ``results/<machine>.json``.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from benchmarks.machine import NotMeasuredError, first_line
from earlyexit_kernels.tuning.tables import environment, write_json
from earlyexit_kernels.tuning.timing import interleave, paired_ratio, quantiles

Record: TypeAlias = dict[str, Any]
Call: TypeAlias = Callable[[], Any]
RESULTS = Path(__file__).parent / "results"
NOT_MEASURED, REFUSED = "not_measured", "refused"


def do_nothing(*_: Any) -> None:
    """Do nothing: the default preparation of a call."""


class Variant(NamedTuple):
    """Identifies one way of doing a case's work, as its records do."""

    engine: str
    backend: str = ""
    dtype: str = ""
    exits: str = ""


class Skipped(NamedTuple):
    """A variant without a number: `kind` is ``"not_measured"`` or ``"refused"``."""

    variant: Variant
    kind: str
    reason: str


class Checked(NamedTuple):
    """Result of checking a variant's answer: what is wrong with it (empty if nothing is), and facts for its records."""

    wrong: str = ""
    facts: Mapping[str, Any] = {}


@dataclass(frozen=True, eq=False)
class Implementation:
    """A variant that can be called.

    Attributes:
        variant: its names.
        call: what is timed.
        check: runs the work once and compares the answer with the reference.
        prepare: called before each call, untimed; restores what `call` changes.
        ours: whether it is one of this package's engines, for which goals are set.
        model: the early-exit model of one of ours.
    """

    variant: Variant
    call: Call
    check: Callable[[], Checked] = Checked
    prepare: Call = do_nothing
    ours: bool = False
    model: Any = None


@dataclass(frozen=True)
class PreparedCase:
    """The variants of a case whose answers are right, the facts found while checking, and the skipped variants."""

    ready: dict[Variant, Implementation] = field(default_factory=dict)
    facts: dict[Variant, Mapping[str, Any]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)

    def times(
        self, *, rounds: int, warmup: int = 0, prepare: Call = do_nothing, awake: bool = False, **how: Any
    ) -> dict[Variant, list]:
        """Time all variants in interleaved rounds.

        Args:
            rounds: timed rounds.
            warmup: untimed rounds before them.
            prepare: called before each call, after the variant's own preparation.
            awake: then make the same call once, untimed: after a rest, threads and the processors of a virtual machine
                take up to milliseconds to wake up.
            how: ``sync``, ``clock`` and ``progress`` of `interleave`.

        Returns:
            variant -> milliseconds of each round.
        """
        if not self.ready:
            return {}
        variants = {str(i): variant for i, variant in enumerate(self.ready)}

        def prepared(name: str) -> None:
            self.ready[variants[name]].prepare()
            prepare()
            if awake:
                calls[name]()

        calls = {name: self.ready[variant].call for name, variant in variants.items()}
        found = interleave(calls, repeats=rounds, warmup=warmup, prepare=prepared, **how)
        return {variant: found[name] for name, variant in variants.items()}

    def skipped_records(self, header: Callable[[Variant], Record]) -> Iterator[Record]:
        """Yield a record for each skipped variant."""
        yield from (header(variant) | {kind: reason} for variant, kind, reason in self.skipped)


def prepare(builders: Iterable[tuple[Variant, Callable[[], Implementation]]]) -> PreparedCase:
    """Build variants and check their answers.

    Args:
        builders: pairs of a variant, as named if it cannot be built, and a function that builds it. A builder or a
            check may raise NotMeasuredError; any other error of a check refuses the variant.
    """
    case = PreparedCase()
    built = []
    # all are built before the first check: a builder may reset what torch has compiled
    for named, build in builders:
        try:
            built.append(build())
        except NotMeasuredError as error:
            case.skipped.append(Skipped(named, NOT_MEASURED, str(error)))
    for implementation in built:
        variant = implementation.variant
        try:
            checked = _checked(implementation)
        except NotMeasuredError as error:
            case.skipped.append(Skipped(variant, NOT_MEASURED, str(error)))
            continue
        if checked.wrong:
            case.skipped.append(Skipped(variant, REFUSED, checked.wrong))
        else:
            case.ready[variant], case.facts[variant] = implementation, checked.facts
    return case


def _checked(implementation: Implementation) -> Checked:
    try:
        return implementation.check()
    except NotMeasuredError:
        raise
    except Exception as error:
        return Checked(first_line(error))


def record_header(suite: str, case: str, variant: Variant, *, shape: str = "", baseline: str = "") -> Record:
    """Return the fields that identify a record."""
    return {"suite": suite, "case": case, "shape": shape, **variant._asdict(), "baseline": baseline}


def line_of(record: Record) -> str:
    """Return a record on one line."""
    return " ".join(f"{key}={value}" for key, value in record.items() if value not in (None, ""))


def time_fields(times: Sequence[float], calls: int = 1) -> Record:
    """Return the quantiles of one variant's rounds, per call.

    Args:
        times: milliseconds of each round.
        calls: of the timed work in a round.
    """
    names = ("low_ms", "median_ms", "high_ms", "p90_ms", "p99_ms")
    found = quantiles(times, (0.2, 0.5, 0.8, 0.9, 0.99))
    return {"rounds": len(times)} | {n: round(x / calls, 6) for n, x in zip(names, found, strict=True)}


def ratio_fields(times: Sequence[float], baseline: Sequence[float]) -> Record:
    """Return the ratio of a variant's time to a baseline's, from rounds in which both ran."""
    return paired_ratio(times, baseline).fields()


#: Fields of records of which more is better.
AT_LEAST = ("efficiency", "operations_share", "bytes_share")


@dataclass(frozen=True)
class Goal:
    """A number to reach.

    Attributes:
        value: the number.
        of: field of the record that is compared. Those of `AT_LEAST` must be at least `value`, others at most.
    """

    value: float
    of: str = "ratio"

    def met(self, record: Mapping[str, Any]) -> bool:
        """Return whether a record reaches the goal."""
        number = record[self.of]
        return bool(number >= self.value if self.of in AT_LEAST else number <= self.value)


def goal_fields(goal: Goal | None, record: Mapping[str, Any]) -> Record:
    """Return a record's fields about its goal; None in each if there is no goal."""
    if goal is None:
        return {"goal": None, "goal_of": None, "goal_met": None}
    return {"goal": goal.value, "goal_of": goal.of, "goal_met": goal.met(record)}


class Measured(NamedTuple):
    """One suite on one machine: the machine's name, the environment when the suite ran, and the records."""

    machine: str
    facts: dict[str, Any]
    records: list[Record]


def machine_name() -> str:
    """Return a file name for this machine: its GPU, or its CPU and the threads used."""
    facts = environment()
    name = facts["gpus"][0] if facts["gpus"] else f"{facts['cpu']} {facts['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def documents(results: Path | None = None) -> dict[str, dict[str, Any]]:
    """Return machine -> its JSON."""
    paths = sorted((results or RESULTS).glob("*.json"))
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}
    return {machine: document for machine, document in found.items() if "suites" in document}


def measured(suite: str, results: Path | None = None) -> list[Measured]:
    """Return a suite's records, machine by machine."""
    return [
        Measured(
            machine,
            document["environment"] | document["suites"][suite],
            [record for record in document["records"] if record["suite"] == suite],
        )
        for machine, document in documents(results).items()
        if suite in document["suites"]
    ]


def save(suite: str, records: Sequence[Record], *, results: Path | None = None, **facts: Any) -> Path:
    """Replace a suite's records in this machine's JSON; the records of other suites stay.

    Args:
        suite: name of the suite.
        records: JSON-ready; their own ``suite`` may be a part of it.
        results: folder; default: the committed results.
        facts: about the run, e.g. its repeats. Time, commit and package versions are added.
    """
    path = (results or RESULTS) / f"{machine_name()}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"records": [], "suites": {}}
    if before.get("environment", {}).get("platform", platform.platform()) != platform.platform():
        print(f"note: {path.name} has results of another machine with this name; those of {suite} are replaced")
    mine = {suite, *(record["suite"] for record in records)}
    kept = [record for record in before["records"] if record["suite"] not in mine]
    now = environment()
    run = {name: now[name] for name in ("time", "commit", "packages", "flush_denormal")} | facts
    return write_json(path, [*kept, *records], suites=before["suites"] | dict.fromkeys(sorted(mine), run))
