"""The runner of `make mutants`: how a mutant is read and put in, what counts as killed, and which rows are kept."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import mutants.forked
import pytest
from mutants.__main__ import check_tests
from mutants.mutant import Mutant, StaleError, all_mutants, arguments_of, read_table
from mutants.results import NEEDS_A_TEST, Results, Row
from mutants.scratch import Scratch

TABLE = """# a comment
== package/file.py
tests: core/test_one.py -k 'two words'

first: sign
- a < b
+ a > b

second: dropped call
tests: triton ops/test_two.py
-     call()
-     return
+     return
"""
TEXT = "if a < b:\n    call()\n    return\n"
SETTINGS = "[pytest]\nmarkers =\n    gpu\n    thorough\n    triton\n"
TESTS = {
    "passes": ("def test(): pass", "survived", ""),
    "fails": ("def test(): assert 0", "killed", "test_case.py::test"),
    "cannot be imported": ("import nothing_of_this_name", "killed", "test_case.py"),
    "hangs": ("import time\ndef test(): time.sleep(60)", "killed", "hangs for 3 s"),
    "crashes": ("import os\ndef test(): os.abort()", "killed", "crash: SIGABRT"),
    "skipped": ("import pytest\ndef test(): pytest.skip('no card')", "error", "pytest ended with 0"),
    "missing": ("", "error", "pytest ended with 5"),
}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text(TABLE)
    return read_table(path)


def test_table_is_read(table):
    first, second = table
    assert first == Mutant(
        "first", "package/file.py", "sign", ("a < b",), ("a > b",), "core/test_one.py -k 'two words'"
    )
    assert arguments_of(first.tests) == ["python_tests/core/test_one.py", "-k", "two words"]
    assert (second.is_interpreted, first.is_interpreted) == (True, False)
    assert first.applied(TEXT).splitlines()[0] == "if a > b:"
    assert second.applied(TEXT) == "if a < b:\n    return\n"


def test_other_lines_and_names_that_occur_twice_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "table.txt"
    path.write_text(f"{TABLE}\nnot a mutant\n")
    with pytest.raises(ValueError, match=r"table.txt:15: .*'not a mutant'"):
        read_table(path)
    path.write_text(TABLE.replace("second", "first"))
    monkeypatch.setattr("mutants.mutant.FOLDER", tmp_path)
    with pytest.raises(ValueError, match="distinct names, got first"):
        all_mutants()


def test_text_that_has_moved_is_stale(table, tmp_path):
    first = table[0]
    with pytest.raises(StaleError, match=r"package/file\.py: there is no such file"):
        first.lines(tmp_path)
    (tmp_path / "package").mkdir()
    for text in ("if a <= b:", TEXT * 2):
        (tmp_path / first.file).write_text(text)
        with pytest.raises(StaleError, match=f"occurs {text.count('a < b')} times"):
            first.lines(tmp_path)
    (tmp_path / first.file).write_text(TEXT)
    assert first.lines(tmp_path) == ("if a < b:", "if a > b:")


@pytest.mark.parametrize("case", TESTS)
def test_what_counts_as_killed(case, tmp_path):
    mutants.forked.FORKED.set_forkserver_preload([])  # torch would take longer than the rest
    source, result, by = TESTS[case]
    tests = tmp_path / "python_tests"
    tests.mkdir()
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    (tests / "test_case.py").write_text(source)
    outcome = Scratch(tmp_path, 3.0 if case == "hangs" else 300.0, tmp_path)._test(["python_tests/test_case.py"])
    assert (outcome.result, outcome.by.partition(":")[0]) == (result, by.partition(":")[0])
    assert outcome.by.startswith(by)


@pytest.mark.parametrize(("before", "now"), [("test_two", "test_two"), ("test_gone", "test_one")])
def test_what_noticed_a_mutant_before_runs_first(before, now, table, tmp_path):
    mutants.forked.FORKED.set_forkserver_preload([])
    mutant = replace(table[0], tests="test_case.py")
    for folder in ("package", "python_tests"):
        (tmp_path / folder).mkdir()
    (tmp_path / mutant.file).write_text(TEXT)
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    source = f"def test_one(): assert 0\ndef test_two(): assert 'a < b' in open({mutant.file!r}).read()"
    (tmp_path / "python_tests" / "test_case.py").write_text(source)
    outcome = Scratch(tmp_path, 300.0, tmp_path).outcome(mutant, f"test_case.py::{before}")
    assert (outcome.result, outcome.by) == ("killed", f"test_case.py::{now}")
    assert (tmp_path / mutant.file).read_text() == TEXT


def test_finished_rows_of_the_same_line_and_tests_are_kept(table, tmp_path):
    first, place = table[0], tmp_path / table[0].file
    place.parent.mkdir()
    place.write_text(TEXT)
    results = Results(tmp_path / "results.csv", ["first", "second"])
    assert not results.has(first, tmp_path)
    results.put(Row.of(first, first.lines(tmp_path), "survived", "", "3", "abc"))
    assert not results.has(first, tmp_path) and results.rows["first"].reason == NEEDS_A_TEST and results.unexplained
    results.put(replace(results.rows["first"], result="killed"))
    again = Results(results.path, ["first", "second"])
    assert again.has(first, tmp_path) and not again.unexplained
    for text in (TEXT.replace("a < b", "a < b and c"), TEXT.replace("a < b", "a <= b")):
        place.write_text(text)
        assert not again.has(first, tmp_path)
    assert not Results(results.path, ["second"]).rows


def test_a_test_that_fails_without_the_mutant_too_has_noticed_nothing(table, tmp_path):
    results = Results(tmp_path / "results.csv", ["first", "second"])
    for mutant, by in zip(table, ("core/test_one.py::test_a[x - y]", "ops/test_two.py::test_b"), strict=True):
        results.put(Row.of(mutant, ("", ""), "killed", by, "3", "abc"))
    check_tests(SimpleNamespace(failures_without_mutant=lambda tests: set(tests[1:])), results, ["first", "second"])
    assert [row.result for row in results.rows.values()] == ["killed", "error"]


def test_tests_that_fail_or_are_gone_without_a_mutant_are_told(tmp_path):
    mutants.forked.FORKED.set_forkserver_preload([])
    (tmp_path / "python_tests").mkdir()
    (tmp_path / "pytest.ini").write_text(SETTINGS)
    (tmp_path / "python_tests" / "test_case.py").write_text("def test_one(): assert 0\ndef test_two(): pass")
    failing = ["test_case.py::test_one", "test_case.py::test_gone[a - b]", "test_gone.py::test_one"]
    scratch = Scratch(tmp_path, 300.0, tmp_path)
    assert scratch.failures_without_mutant([*failing, "test_case.py::test_two"]) == set(failing)
