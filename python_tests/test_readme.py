"""The tables of the documents come from the committed results and from the package's own tables."""

import re

import pytest

import earlyexit_kernels as ee
from benchmarks.readme import DOCUMENTS, ROOT, TABLES, rewrite, write_site
from earlyexit_kernels.criteria import CRITERIA, RULES
from earlyexit_kernels.methods import METHODS

TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in DOCUMENTS}
README, METHODS_PAGE = TEXTS["README.md"], TEXTS["docs/methods.md"]


def test_tables_are_those_of_the_committed_results():
    found = re.findall(r"<!-- (?:table|site):(\w+) -->", "".join(TEXTS.values()))
    assert len(found) == len(set(found)) and set(found) == set(TABLES)
    assert rewrite(check=True), "run `python -m benchmarks.readme`"


def test_tables_of_the_site_are_written(tmp_path):
    write_site(tmp_path)
    wanted = re.findall(r"<!-- site:(\w+) -->", "".join(TEXTS.values()))
    assert wanted and sorted(f"{name}.md" for name in wanted) == sorted(path.name for path in tmp_path.iterdir())
    assert (tmp_path / "offline.md").read_text().count("\n|") > 100


def rows_of(table: str) -> dict[str, dict[str, str]]:
    """A table of docs/methods.md as first cell -> title -> cell."""
    block = re.search(rf"<!-- table:{table} -->\n(.*?)<!-- end -->", METHODS_PAGE, re.DOTALL)
    assert block is not None
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[1].splitlines()]
    header, _, *rows = lines
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_every_method_and_criterion_is_listed():
    names = [cls.__name__ for cls in CRITERIA.values()]
    assert set(re.findall(r"`(\w+)`", " ".join(rows_of("methods")))) == set(METHODS)
    assert [call[1:].partition("(")[0] for call in rows_of("criteria")] == names
    section = README.partition("## Criteria")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"`([A-Z]\w+)`", section)) == sorted(names)
    formulas = METHODS_PAGE.partition("| criterion | condition | source |")[2].partition("\n\n")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", formulas, re.MULTILINE)) == sorted(names)
    for text in (README, METHODS_PAGE):
        first_cells = " ".join(re.findall(r"^\| (`.*?`.*?) \|", text, re.MULTILINE))
        assert set(re.findall(r"\w+", first_cells)) >= set(METHODS)


@pytest.mark.parametrize(
    ("method", "cells"),
    [
        ("`smartbert`", {"exit rule": "`skip_gate`", "regression": "", "replay": ""}),
        ("`deebert`", {"phases": "backbone, exits", "regression": "by another rule", "replay": "yes"}),
        ("`palbert`", {"exit rule": "`q_exit`", "regression": "yes", "several labels": "yes"}),
        ("`berxit`", {"regression": "yes", "several labels": ""}),
    ],
)
def test_the_table_of_methods_is_right(method, cells):
    row = rows_of("methods")[method]
    assert {title: row[title] for title in cells} == cells
    assert row["classes"] == row["torch"] == row["triton"] == row["cpp"] == "yes"


@pytest.mark.parametrize(
    ("criterion", "cells"),
    [
        ("`Patience(patience, tolerance=None)`", {"needs": "", "numbers kept for a row": "2"}),
        ("`Expectation()`", {"needs": "halting", "for": "classes, regression", "numbers kept for a row": "C + 1"}),
        ("`SampledExit(seed)`", {"needs": "halting, row keys", "replay": "yes"}),
        ("`SkipGate(threshold, exit)`", {"needs": "gate", "for": "as `exit`", "replay": ""}),
    ],
)
def test_the_table_of_criteria_is_right(criterion, cells):
    row = rows_of("criteria")[criterion]
    assert {title: row[title] for title in cells} == cells
    assert sum(row["replay"] == "yes" for row in rows_of("criteria").values()) == len(RULES)


def test_names_of_the_package_exist():
    for document, text in TEXTS.items():
        check_names(document, text)


def check_names(document, text) -> None:
    defined = set(re.findall(r"^class (\w+)", text, re.MULTILINE))  # by the page itself
    for dotted in re.findall(r"\bee\.([A-Za-z_.]*\w)", text):
        if dotted.rpartition(".")[2] in defined:
            continue
        value = ee
        for name in dotted.split("."):
            assert hasattr(value, name), f"{document}: ee.{dotted}"
            value = getattr(value, name)
