"""The README's numbers come from committed results, and its Python runs on names that exist."""

import re
from pathlib import Path

import earlyexit_kernels as ee
from benchmarks.readme import TABLES, rewrite

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_committed_results():
    assert set(re.findall(r"<!-- table:(\w+) -->", README)) == set(TABLES)
    assert rewrite(check=True), "run `python -m benchmarks.readme`"


def test_names_in_the_readme_exist():
    names = set(re.findall(r"\bee\.([A-Za-z_]+)", README))
    assert names and all(hasattr(ee, name) for name in names), names
    criteria = set(re.findall(r"\bee\.criteria\.([A-Za-z_]+)", README))
    assert criteria and all(hasattr(ee.criteria, name) for name in criteria), criteria


def test_linked_files_exist():
    root = Path(__file__).resolve().parents[1]
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert links and all((root / link).exists() for link in links), links
