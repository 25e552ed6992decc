"""Write the tables of the documents, between ``<!-- table:NAME -->`` and ``<!-- end -->``, from the committed results
and from the package's own tables.

``python -m benchmarks.readme`` rewrites them; ``python -m benchmarks.readme --check`` fails where they are out of date.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import summary
from benchmarks.calibration import tables as calibration
from benchmarks.end_to_end import tables as end_to_end
from benchmarks.evidence import tables as evidence
from benchmarks.gpu import tables as gpu
from benchmarks.http import tables as http
from benchmarks.micro import tables as micro
from benchmarks.scoring import tables as scoring
from earlyexit_kernels.criteria import CRITERIA, RULES, Criterion, FullDepth
from earlyexit_kernels.methods import METHODS, Method
from earlyexit_kernels.tuning.grids import settings, skip_settings
from earlyexit_kernels.tuning.report import markdown_table
from earlyexit_kernels.types import AUX_ACTIVATIONS, ExitTrace

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_BLOCK = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _load(pattern: str) -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob(pattern))]


def sst2_layers() -> str:
    """Accuracy of static truncation to each exit of the real encoder."""
    (document,) = _load("sst2-*.json")
    rows = [
        (record["layer"], *(f"{record[split]['accuracy']:.3f}" for split in ("tuning", "reporting")))
        for record in document["records"]
        if record["kind"] == "static_truncation"
    ]
    return markdown_table(("exit after layer", "held-out train rows", "dev"), rows)


def sst2_criteria() -> str:
    """The settings chosen on held-out train rows, and every patience, on dev."""
    (document,) = _load("sst2-*.json")
    rows = []
    for record in document["records"]:
        if record["kind"] != "point" or not (record["chosen"] or record["criterion"]["name"] == "patience"):
            continue
        criterion, dev = dict(record["criterion"]), record["reporting"]
        name = criterion.pop("name").replace("_", " ")
        numbers = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in criterion.values() if v not in (None, False)]
        chosen = "yes" if record["chosen"] else ""
        accuracy, random = f"{dev['scores']['accuracy']:.3f}", f"{dev['random_exit']:.3f}"
        cells = (f"{dev['mean_exit_layer']:.2f}", f"{dev['layer_speed_up']:.2f}", accuracy, random)
        rows.append((f"{name} {' '.join(numbers)}", chosen, *cells))
    header = ("criterion", "chosen", "mean exit layer", "fewer layers, x", "accuracy", "random exit, same mix")
    return markdown_table(header, rows)


#: Problem type of transformers -> how the tables call it.
TASKS = {
    "single_label_classification": "classes",
    "regression": "regression",
    "multi_label_classification": "several labels",
}


def methods() -> str:
    """Every training method with its phases, its paper's exit rule, and where both have a meaning and run."""
    names: dict[type[Method], list[str]] = {}
    for name, cls in METHODS.items():
        names.setdefault(cls, []).append(name)
    rows = []
    for cls, found in names.items():
        rule = CRITERIA[cls.rule]
        method = cls()
        fused = _fused(_examples()[cls.rule].exit_rule.name)
        rows.append(
            (
                " or ".join(f"`{name}`" for name in found),
                ", ".join(phase.name for phase in method.phases),
                f"`{cls.rule}`",
                *(_trains_for(cls, rule, task) for task in TASKS),
                *(_yes(fused[backend]) for backend in ("torch", "triton", "cpp")),
                _yes(cls.rule in RULES),
            )
        )
    header = ("method", "phases", "exit rule", *TASKS.values(), "torch", "triton", "cpp", "replay")
    return markdown_table(header, rows)


def criteria() -> str:
    """Every exit rule with its arguments, what it needs and keeps, and where it has a meaning."""
    rows = []
    for name, cls in CRITERIA.items():
        example = _examples()[name]
        skips = example.skip_from is not None
        needs = [cls.needs or "", "gate" * skips, "row keys" * cls.uses_keys]
        rows.append(
            (
                f"`{_signature(cls)}`",
                _first_sentence(cls),
                ", ".join(need for need in needs if need),
                "as `exit`" if skips else ", ".join(word for task, word in TASKS.items() if task in cls.tasks),
                "as `exit`" if skips else _state(name),
                _yes(name in RULES),
            )
        )
    return markdown_table(("criterion", "what it does", "needs", "for", "numbers kept for a row", "replay"), rows)


def _first_sentence(cls: type) -> str:
    """The first line of a docstring, a sentence of its own."""
    return (cls.__doc__ or "").partition("\n")[0].rstrip(".")


def method_settings() -> str:
    """What can be set about each training method, with the paper's values."""
    rows = []
    for cls in dict.fromkeys(METHODS.values()):
        given = ", ".join(f"{name}={value!r}" for name, value in cls().to_dict().items() if name != "name")
        rows.append((f"`{cls.__name__}`", f"`{given}`" if given else ""))
    return markdown_table(("`ee.methods`", "settings"), rows)


@functools.cache
def _examples(classes: int = 3) -> dict[str, Criterion]:
    """A setting of every criterion, from the grids over a trace that has all outputs."""
    generator = torch.Generator().manual_seed(0)
    rows, depth = 16, 4
    aux = {name: torch.rand(rows, depth, generator=generator) for name in AUX_ACTIVATIONS}
    trace = ExitTrace(torch.randn(rows, depth, classes, generator=generator), aux, torch.arange(rows))
    groups = {name: group[0] for name, group in settings(trace).items()}
    return {"full_depth": FullDepth(), **groups, "skip_gate": skip_settings(trace)[0]}


def _trains_for(method: type[Method], rule: type[Criterion], task: str) -> str:
    if task not in method.tasks:
        return ""
    return "yes" if task in rule.tasks else "by another rule"


def _fused(rule: str) -> dict[str, bool]:
    """Which back-ends have the rule: its parts are there, and listed."""
    listed = re.findall(r"X\((\w+), \w+\)", (ROOT / "csrc" / "criteria" / "all.h").read_text(encoding="utf-8"))
    cls = RULES[rule]
    return {
        "torch": cls.rule is not Criterion.rule,
        "triton": hasattr(cls, "triton_step"),
        "cpp": rule in listed,
    }


def _signature(cls: type[Criterion]) -> str:
    """The call that builds a criterion, with its defaults."""
    arguments = [
        field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default!r}"
        for field in dataclasses.fields(cls)
    ]
    return f"{cls.__name__}({', '.join(arguments)})"


def _state(name: str) -> str:
    """K as a formula of the number of classes C."""
    few, many = (len(_examples(classes)[name].initial_state(classes)) for classes in (3, 4))
    by_class = many - few
    rest = few - 3 * by_class
    terms = ["C" if by_class == 1 else f"{by_class} C"] * bool(by_class) + [str(rest)] * bool(rest)
    return " + ".join(terms) or "none"


def _yes(is_so: bool) -> str:
    return "yes" if is_so else ""


TABLES = {
    "methods": methods,
    "method_settings": method_settings,
    "criteria": criteria,
    "sst2_layers": sst2_layers,
    "sst2_criteria": sst2_criteria,
    **micro.TABLES,
    **summary.TABLES,
    **calibration.TABLES,
    **evidence.TABLES,
    **end_to_end.TABLES,
    **gpu.TABLES,
    **http.TABLES,
    **scoring.TABLES,
}
#: The documents that may hold tables.
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


def rewrite(*, check: bool = False) -> bool:
    """Write the tables into the documents.

    Args:
        check: change nothing.

    Returns:
        Whether all tables were up to date.
    """
    up_to_date = True
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        new = _BLOCK.sub(lambda block, path=path: f"{block[1]}{_table(block[2], path)}\n{block[3]}", text)
        up_to_date &= new == text
        if not check:
            path.write_text(new, encoding="utf-8")
    return up_to_date


def _table(name: str, document: Path) -> str:
    """One table, with links relative to the document instead of the root."""
    up = "../" * (len(document.relative_to(ROOT).parts) - 1)
    return TABLES[name]().replace("](benchmarks/", f"]({up}benchmarks/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    checking = parser.parse_args().check
    current = rewrite(check=checking)
    if checking and not current:
        sys.exit("the tables are out of date; run `python -m benchmarks.readme`")
    print("the tables were up to date" if current else "rewrote the tables")
