"""Write the tables of the documents, from the committed results and from the package's own tables.

``python -m benchmarks.readme`` rewrites those between ``<!-- table:NAME -->`` and ``<!-- end -->``, with ``--check`` it
fails where they are out of date. Those at ``<!-- site:NAME -->`` are only part of the site: ``--site FOLDER`` writes
each to a file, from which ``docs/hooks.py`` takes it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import sys
from pathlib import Path

import torch

from benchmarks import summary, tables
from benchmarks.gpu import prediction
from earlyexit_kernels.criteria import CRITERIA, RULES, Criterion, FullDepth
from earlyexit_kernels.methods import METHODS, Method
from earlyexit_kernels.tuning.settings import settings, skip_settings
from earlyexit_kernels.tuning.tables import markdown_table
from earlyexit_kernels.types import AUX_ACTIVATIONS, ExitTrace

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"(<!-- table:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_SITE = re.compile(r"<!-- site:(\w+) -->")


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
    listed = re.findall(r"X\((\w+), \w+\)", (ROOT / "csrc" / "criteria.h").read_text(encoding="utf-8"))
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
    **tables.TABLES,
    **summary.TABLES,
    **prediction.TABLES,
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


def write_site(folder: Path) -> None:
    """Write the tables that only the site shows to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in DOCUMENTS:
        for name in _SITE.findall(path.read_text(encoding="utf-8")):
            (folder / f"{name}.md").write_text(f"{_table(name, path)}\n", encoding="utf-8")


def _table(name: str, document: Path) -> str:
    """One table, with links relative to the document instead of the root."""
    up = "../" * (len(document.relative_to(ROOT).parts) - 1)
    return TABLES[name]().replace("](benchmarks/", f"]({up}benchmarks/")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--site", type=Path, metavar="FOLDER", help="write the tables of the site, and nothing else")
    args = parser.parse_args()
    if args.site is not None:
        write_site(args.site)
        sys.exit()
    current = rewrite(check=args.check)
    if args.check and not current:
        sys.exit("the tables are out of date; run `python -m benchmarks.readme`")
    print("the tables were up to date" if current else "rewrote the tables")
