"""Tables of the evidence, from ``benchmarks/results/evidence.jsonl``: means and standard deviations over the seeds."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from benchmarks.evidence import plans
from benchmarks.evidence.plans import SEEDS, SHARED, SIX, TWELVE, Training
from benchmarks.evidence.results import RESULTS, Mix, Result, stored
from benchmarks.tables import NOT_MEASURED
from earlyexit_kernels.methods import METHODS
from earlyexit_kernels.tuning.tables import markdown_table

#: Shares of the multiply-adds of full depth at which rules are compared.
SHARES = (0.67, 0.5)
#: A number of one training, None if it lacks it.
Number: TypeAlias = Callable[[Result], "float | None"]


class Arm(NamedTuple):
    """A row: its first cells, and its training with each seed."""

    cells: tuple[str, ...]
    training: Callable[[int], Training]


class Column(NamedTuple):
    """A title, the number that is shown as mean and deviation over the seeds, and the digits of both."""

    title: str
    number: Number
    digits: int = 3


def found(arm: Arm, results: Path) -> list[Result]:
    """Return the results of a row that there are."""
    known = stored(results)
    return [known[name] for seed in SEEDS if (name := arm.training(seed).name) in known]


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Return mean and standard deviation; empty if a value is missing."""
    numbers = list(values)
    known = [x for x in numbers if x is not None]
    if not known or len(known) < len(numbers):
        return ""
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{statistics.mean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f}"


def row(arm: Arm, columns: Sequence[Column], group: Sequence[Result]) -> tuple[str, ...]:
    """Return the cells of a row, the first one with the number of seeds if they are not all."""
    note = "" if len(group) == len(SEEDS) else f" ({len(group)} of {len(SEEDS)} seeds)"
    first, *others = arm.cells
    return first + note, *others, *(spread(map(c.number, group), c.digits) for c in columns)


def table(titles: Sequence[str], rows: Iterable[tuple[Arm, Sequence[Column]]], results: Path) -> str:
    """Return a table of arms that have a result; all of them have columns of the same titles."""
    drawn, header = [], list(titles)
    for arm, columns in rows:
        header = [*titles, *(column.title for column in columns)]
        if group := found(arm, results):
            drawn.append(row(arm, columns, group))
    return markdown_table(header, drawn) if drawn else NOT_MEASURED


def _score(mix: Mix | None) -> float | None:
    return None if mix is None else mix.score


def _at(rule: str, share: float) -> Number:
    return lambda r: _score(r.rule(rule, share))


def _random_at(rule: str, share: float) -> Number:
    return lambda r: None if (mix := r.rule(rule, share)) is None else mix.random


def _fixed_at(share: float) -> Number:
    return lambda r: _score(r.fixed_depth(share))


FULL = Column("full depth", lambda r: r.full_depth)


def methods(task: str, *, results: Path = RESULTS) -> str:
    """Every method with linear exits, and with the exits of its paper where these are others."""
    rows = []
    for method, other_form in plans.METHODS.items():
        rule = "skips and exits" if method == "smartbert" else METHODS[method].rule
        columns = [FULL]
        for share in SHARES:
            columns.append(Column(f"own rule at {share:g}", _at(rule, share)))
            columns.append(Column("random exit", _random_at(rule, share)))
        columns.append(Column(f"entropy at {SHARES[-1]:g}", _at("entropy", SHARES[-1])))
        columns.append(Column(f"fixed depth at {SHARES[-1]:g}", _fixed_at(SHARES[-1])))
        for own_form in (False, True) if other_form else (False,):
            cells = (method, "attention" if own_form else "linear", rule.replace("_", " "))
            rows.append((Arm(cells, functools.partial(plans.of_method, task, method, own_form=own_form)), columns))
    return table(("method", "exits", "rule"), rows, results)


def dact(*, results: Path = RESULTS) -> str:
    """DACT by its bound alone, beside entropy on the model that it started from at the same multiply-adds."""
    starts = {training.name: training.start for training in plans.all_trainings(("dact",)).values()}

    def bound(name: str) -> Number:
        return lambda r: r.columns("bound")[name][0]

    def of_start(r: Result) -> float | None:
        start = starts[r.document["name"]]
        assert start is not None
        return _score(stored(results)[start.name].rule("entropy", r.columns("bound")["macs"][0]))

    columns = (
        Column("bound alone", bound("score")),
        Column("fewer layers, x", lambda r: len(r.layers["reporting"]) / r.columns("bound")["layers"][0], 2),
        Column("multiply-adds", bound("macs"), 2),
        Column("joint and entropy there", of_start),
    )
    arms = (Arm((f"{p:g}",), functools.partial(plans.dact_after_joint, ponder=p)) for p in plans.PONDERS)
    return table(("ponder",), ((arm, columns) for arm in arms), results)


def smartbert(task: str, *, results: Path = RESULTS) -> str:
    """SmartBERT's four arms for each start of the gates, and exits of a model that was trained without gates."""

    def alone(name: str) -> Number:
        return lambda r: r.columns("skips and exits")[name][0] if r.record("rule", rule="skips and exits") else None

    def exits_at(share: float) -> Number:
        return lambda r: _score(r.rule("exits alone" if r.record("rule", rule="exits alone") else "entropy", share))

    columns = [Column("neither", FULL.number), Column("skips alone", alone("score"))]
    columns.append(Column("layers run", alone("layers"), 2))
    for share in SHARES:
        columns.append(Column(f"exits at {share:g}", exits_at(share)))
        columns.append(Column(f"skips and exits at {share:g}", _at("skips and exits", share)))
    arms = [Arm(("no gates",), functools.partial(plans.without_gates, task))]
    for bias, weight, rate in plans.GATES:
        training = functools.partial(plans.with_gates, task, bias=bias, weight=weight, rate=rate)
        arms.append(Arm((f"{bias:g}, {weight:g}, {rate or plans.LR:g}",), training))
    return table(("gates: bias, weight, rate",), ((arm, columns) for arm in arms), results)


def palbert(*, results: Path = RESULTS) -> str:
    """Q-exit beside the sampled exit at the same layers, for each weight and prior of PALBERT's loss."""

    def sampled(name: str) -> Callable[[Result], float]:
        return lambda r: statistics.mean(r.columns("sampled_exit")[name])

    def there(number: Callable[[str, float], Number], rule: str) -> Number:
        return lambda r: number(rule, sampled("macs")(r))(r)

    def half(name: str) -> Number:
        return lambda r: r.setting("q_exit", q=0.5)[name]

    columns = (
        *(Column("q = 0.5", half("score")), Column("layers", half("layers"), 2)),
        *(Column("sampled exit", sampled("score")), Column("layers", sampled("layers"), 2)),
        *(Column("Q-exit there", there(_at, "q_exit")), Column("random exit there", there(_random_at, "q_exit"))),
        Column("expectation", lambda r: r.columns("expectation")["score"][0]),
        Column("entropy there", there(_at, "entropy")),
    )
    settings = [(beta, prior, False) for beta, prior in product(plans.BETAS, plans.PRIORS)]
    arms = []
    for beta, prior, other_rows in (*settings, (plans.BETAS[-1], plans.PRIORS[-1], True)):
        cells = (f"{beta:g}" + ", halting head on other rows" * other_rows, f"{prior:g}")
        arms.append(Arm(cells, functools.partial(plans.palbert, beta=beta, prior=prior, other_rows=other_rows)))
    return table(("beta", "prior"), ((arm, columns) for arm in arms), results)


def _of_exits(name: str) -> Callable[[Result], Any]:
    return lambda r: (r.record("exits") or {})[name]


def ensemble(task: str, *, results: Path = RESULTS) -> str:
    """The ensemble's diversity loss: what it does to the exits, and to votes, patience and entropy."""
    columns = [FULL, Column("disagreement of exits", _of_exits("disagreement"))]
    columns.append(Column("some exit right", _of_exits("oracle")))
    for share, rule in product(SHARES, ("voting", "patience", "entropy")):
        columns.append(Column(f"{rule} at {share:g}", _at(rule, share)))
    arms = (Arm((f"{d:g}",), functools.partial(plans.ensemble, task, diversity=d)) for d in plans.DIVERSITIES)
    return table(("diversity",), ((arm, columns) for arm in arms), results)


#: Encoder -> how the tables call it.
ENCODERS = {SIX: "6 layers", TWELVE: "12 layers grown from 6", SHARED: "12 steps of one layer"}
#: 1 / 1.57, the speed-up that PABEE's abstract names.
PABEE_SHARE = 0.637


def pabee(*, results: Path = RESULTS) -> str:
    """Patience at the speed-up of its paper, beside other rules, random exits and fixed depth."""
    columns = (
        *(FULL, Column(f"patience at {PABEE_SHARE:g}", _at("patience", PABEE_SHARE))),
        Column("random exit", _random_at("patience", PABEE_SHARE)),
        *(Column("fixed depth", _fixed_at(PABEE_SHARE)), Column("entropy", _at("entropy", PABEE_SHARE))),
        Column("best patience", lambda r: r.best("patience")["score"]),
        Column("layers", lambda r: r.best("patience")["layers"], 2),
        Column("neighbours agree", lambda r: statistics.mean(_of_exits("neighbours_agree")(r))),
    )
    arms = (
        Arm((task, name), functools.partial(plans.at_depth, task, encoder=encoder))
        for task, (encoder, name) in product(("sst2", "trec"), ENCODERS.items())
    )
    return table(("task", "encoder"), ((arm, columns) for arm in arms), results)


def noise(*, results: Path = RESULTS) -> str:
    """What typing errors cost full depth and each patience, on the twelve layers grown from six."""

    def columns(clean: Callable[[Result], float], hit: Callable[[Result], float]) -> tuple[Column, ...]:
        loss = Column("loss", lambda r: clean(r) - hit(r))
        return Column("clean", clean), Column("typing errors in 20 % of the words", hit), loss

    def of_patience(number: int) -> tuple[Column, ...]:
        return columns(lambda r: r.columns("patience")["score"][number], lambda r: r.noise["patience"][number])

    training = functools.partial(plans.at_depth, "sst2", encoder=TWELVE)
    group = found(Arm((), training), results)
    rows = [(Arm(("full depth",), training), columns(FULL.number, lambda r: r.noise["full_depth"]))]
    for number in range(len(group[0].noise["patience"]) if group else 0):
        rows.append((Arm((f"patience {number + 1}",), training), of_patience(number)))
    return table(("rule",), rows, results)


TABLES: dict[str, Callable[[], str]] = {
    **{f"evidence_methods_{task}": functools.partial(methods, task) for task in plans.ROWS},
    "evidence_dact": dact,
    "evidence_palbert": palbert,
    "evidence_pabee": pabee,
    "evidence_noise": noise,
    **{f"evidence_smartbert_{task}": functools.partial(smartbert, task) for task in ("cola", "mrpc")},
    **{f"evidence_ensemble_{task}": functools.partial(ensemble, task) for task in ("trec", "sst2")},
}
