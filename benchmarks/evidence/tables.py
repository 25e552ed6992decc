"""Tables of the evidence, from ``benchmarks/results/evidence.jsonl``: means and standard deviations over the seeds."""

from __future__ import annotations

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from benchmarks.evidence import plans
from benchmarks.evidence.plans import SEEDS, SHARED, SIX, TWELVE, Training
from benchmarks.evidence.results import RESULTS, Mix, Result, stored
from benchmarks.tables import NOT_MEASURED
from earlyexit_kernels.methods import METHODS
from earlyexit_kernels.tuning.tables import markdown_table

#: Shares of the multiply-adds of full depth at which rules are compared.
SHARES = (0.67, 0.5)


def found(trainings: Iterable[Training], results: Path) -> list[Result]:
    """Return the results that there are."""
    known = stored(results)
    return [known[training.name] for training in trainings if training.name in known]


def spread(values: Iterable[float | None], digits: int = 3) -> str:
    """Return mean and standard deviation; empty if a value is missing."""
    numbers = list(values)
    known = [x for x in numbers if x is not None]
    if not known or len(known) < len(numbers):
        return ""
    if len(known) == 1:
        return f"{known[0]:.{digits}f}"
    return f"{statistics.mean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f}"


def seeds_note(group: Sequence[Result]) -> str:
    """Return how many seeds a row has, if they are not all."""
    return "" if len(group) == len(SEEDS) else f" ({len(group)} of {len(SEEDS)} seeds)"


def _scores(mixes: Sequence[Mix | None]) -> str:
    return spread(None if mix is None else mix.score for mix in mixes)


def _group(arm: Callable[[int], Training], results: Path) -> list[Result]:
    return found((arm(seed) for seed in SEEDS), results)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown_table(header, rows) if rows else NOT_MEASURED


def methods(task: str, *, results: Path = RESULTS) -> str:
    """Every method with linear exits, and with the exits of its paper where these are others."""
    header = ["method", "exits", "rule", "full depth"]
    for share in SHARES:
        header += [f"own rule at {share:g}", "random exit"]
    header += [f"entropy at {SHARES[-1]:g}", f"fixed depth at {SHARES[-1]:g}"]
    rows = []
    for method, other_form in plans.METHODS.items():
        for own_form in (False, True) if other_form else (False,):
            group = _group(functools.partial(plans.of_method, task, method, own_form=own_form), results)
            if not group:
                continue
            rule = "skips and exits" if method == "smartbert" else METHODS[method].rule
            cells = [spread(r.full_depth for r in group)]
            for share in SHARES:
                mixes = [r.rule(rule, share) for r in group]
                cells += [_scores(mixes), spread(None if m is None else m.random for m in mixes)]
            cells.append(_scores([r.rule("entropy", SHARES[-1]) for r in group]))
            cells.append(_scores([r.fixed_depth(SHARES[-1]) for r in group]))
            form = "attention" if own_form else "linear"
            rows.append((method + seeds_note(group), form, rule.replace("_", " "), *cells))
    return _table(header, rows)


def dact(*, results: Path = RESULTS) -> str:
    """DACT by its bound alone, beside entropy on the model that it started from at the same multiply-adds."""
    header = ("ponder", "bound alone", "fewer layers, x", "multiply-adds", "joint and entropy there")
    rows = []
    for ponder in plans.PONDERS:
        arm = functools.partial(plans.dact_after_joint, ponder=ponder)
        known = stored(results)
        group = {seed: known[arm(seed).name] for seed in SEEDS if arm(seed).name in known}
        if not group:
            continue
        bound = {seed: r.columns("bound") for seed, r in group.items()}
        depth = len(next(iter(group.values())).layers["reporting"])
        starts = {seed: known[plans.dact_start(seed).name] for seed in group}
        rows.append(
            (
                f"{ponder:g}{seeds_note(list(group.values()))}",
                spread(columns["score"][0] for columns in bound.values()),
                spread((depth / columns["layers"][0] for columns in bound.values()), 2),
                spread((columns["macs"][0] for columns in bound.values()), 2),
                _scores([starts[seed].rule("entropy", columns["macs"][0]) for seed, columns in bound.items()]),
            )
        )
    return _table(header, rows)


def smartbert(task: str, *, results: Path = RESULTS) -> str:
    """SmartBERT's four arms for each start of the gates, and exits of a model that was trained without gates."""
    header = ["gates: bias, weight, rate", "neither", "skips alone", "layers run"]
    for share in SHARES:
        header += [f"exits at {share:g}", f"skips and exits at {share:g}"]
    rows = []
    arms: dict[str, Callable[[int], Training]] = {
        "no gates": functools.partial(plans.without_gates, task),
    }
    for bias, weight, rate in plans.GATES:
        arm = functools.partial(plans.with_gates, task, bias=bias, weight=weight, rate=rate)
        arms[f"{bias:g}, {weight:g}, {rate or plans.LR:g}"] = arm
    for name, arm in arms.items():
        group = _group(arm, results)
        if not group:
            continue
        both = [r.record("rule", rule="skips and exits") for r in group]
        alone = [b["reporting"] for b in both if b]
        cells = [spread(r.full_depth for r in group)]
        cells += [spread(b["score"][0] for b in alone), spread((b["layers"][0] for b in alone), 2)]
        exits = "exits alone" if alone else "entropy"
        for share in SHARES:
            cells += [_scores([r.rule(exits, share) for r in group])]
            cells += [_scores([r.rule("skips and exits", share) for r in group]) if alone else ""]
        rows.append((name + seeds_note(group), *cells))
    return _table(header, rows)


def palbert(*, results: Path = RESULTS) -> str:
    """Q-exit beside the sampled exit at the same layers, for each weight and prior of PALBERT's loss."""
    header: tuple[str, ...] = (
        "beta",
        "prior",
        "q = 0.5",
        "layers",
        "sampled exit",
        "layers",
        "Q-exit there",
        "random exit there",
    )
    header += ("expectation", "entropy there")
    arms = [(beta, prior, False) for beta, prior in itertools.product(plans.BETAS, plans.PRIORS)]
    rows = []
    for beta, prior, other_rows in (*arms, (plans.BETAS[-1], plans.PRIORS[-1], True)):
        arm = functools.partial(plans.palbert, beta=beta, prior=prior, other_rows=other_rows)
        if group := _group(arm, results):
            sampled = [r.columns("sampled_exit") for r in group]
            shares = [statistics.mean(columns["macs"]) for columns in sampled]
            there = [r.rule("q_exit", share) for r, share in zip(group, shares, strict=True)]
            entropy = [r.rule("entropy", share) for r, share in zip(group, shares, strict=True)]
            half = [r.setting("q_exit", q=0.5) for r in group]
            rows.append(
                (
                    f"{beta:g}" + (", halting head on other rows" if other_rows else "") + seeds_note(group),
                    f"{prior:g}",
                    spread(x["score"] for x in half),
                    spread((x["layers"] for x in half), 2),
                    spread(statistics.mean(columns["score"]) for columns in sampled),
                    spread((statistics.mean(columns["layers"]) for columns in sampled), 2),
                    _scores(there),
                    spread(None if mix is None else mix.random for mix in there),
                    spread(r.columns("expectation")["score"][0] for r in group),
                    _scores(entropy),
                )
            )
    return _table(header, rows)


def ensemble(task: str, *, results: Path = RESULTS) -> str:
    """The ensemble's diversity loss: what it does to the exits, and to votes, patience and entropy."""
    header = ["diversity", "full depth", "disagreement of exits", "some exit right"]
    header += [f"{rule} at {share:g}" for share in SHARES for rule in ("voting", "patience", "entropy")]
    rows = []
    for diversity in plans.DIVERSITIES:
        if group := _group(functools.partial(plans.ensemble, task, diversity=diversity), results):
            exits = [r.record("exits") or {} for r in group]
            cells = [spread(r.full_depth for r in group)]
            cells += [spread(e[name] for e in exits) for name in ("disagreement", "oracle")]
            for share in SHARES:
                cells += [_scores([r.rule(rule, share) for r in group]) for rule in ("voting", "patience", "entropy")]
            rows.append((f"{diversity:g}{seeds_note(group)}", *cells))
    return _table(header, rows)


#: Encoder -> how the tables call it.
ENCODERS = {SIX: "6 layers", TWELVE: "12 layers grown from 6", SHARED: "12 steps of one layer"}
#: 1 / 1.57, the speed-up that PABEE's abstract names.
PABEE_SHARE = 0.637


def pabee(*, results: Path = RESULTS) -> str:
    """Patience at the speed-up of its paper, beside other rules, random exits and fixed depth."""
    header = ("task", "encoder", "full depth", f"patience at {PABEE_SHARE:g}", "random exit", "fixed depth", "entropy")
    header += ("best patience", "layers", "neighbours agree")
    rows = []
    for task, encoder in itertools.product(("sst2", "trec"), ENCODERS):
        if group := _group(functools.partial(plans.at_depth, task, encoder=encoder), results):
            patience = [r.rule("patience", PABEE_SHARE) for r in group]
            best = [r.best("patience") for r in group]
            agree = [statistics.mean((r.record("exits") or {})["neighbours_agree"]) for r in group]
            rows.append(
                (
                    task,
                    ENCODERS[encoder] + seeds_note(group),
                    spread(r.full_depth for r in group),
                    _scores(patience),
                    spread(None if mix is None else mix.random for mix in patience),
                    _scores([r.fixed_depth(PABEE_SHARE) for r in group]),
                    _scores([r.rule("entropy", PABEE_SHARE) for r in group]),
                    spread(x["score"] for x in best),
                    spread((x["layers"] for x in best), 2),
                    spread(agree),
                )
            )
    return _table(header, rows)


def noise(*, results: Path = RESULTS) -> str:
    """What typing errors cost full depth and each patience, on the twelve layers grown from six."""
    group = _group(functools.partial(plans.at_depth, "sst2", encoder=TWELVE), results)
    records = [(r, r.record("noise"), r.record("rule", rule="patience")) for r in group]
    known = [(r, noisy, rule) for r, noisy, rule in records if noisy and rule]
    rows = []
    if known:
        clean, hit = [r.full_depth for r, _, _ in known], [noisy["full_depth"] for _, noisy, _ in known]
        losses = (a - b for a, b in zip(clean, hit, strict=True))
        rows.append(("full depth" + seeds_note(group), spread(clean), spread(hit), spread(losses)))
        for number in range(len(known[0][1]["patience"])):
            clean = [rule["reporting"]["score"][number] for _, _, rule in known]
            hit = [noisy["patience"][number] for _, noisy, _ in known]
            losses = (a - b for a, b in zip(clean, hit, strict=True))
            rows.append((f"patience {number + 1}", spread(clean), spread(hit), spread(losses)))
    return _table(("rule", "clean", "typing errors in 20 % of the words", "loss"), rows)


TABLES: dict[str, Callable[[], str]] = {
    **{f"evidence_methods_{task}": functools.partial(methods, task) for task in plans.ROWS},
    "evidence_dact": dact,
    "evidence_palbert": palbert,
    "evidence_pabee": pabee,
    "evidence_noise": noise,
    **{f"evidence_smartbert_{task}": functools.partial(smartbert, task) for task in ("cola", "mrpc")},
    **{f"evidence_ensemble_{task}": functools.partial(ensemble, task) for task in ("trec", "sst2")},
}
