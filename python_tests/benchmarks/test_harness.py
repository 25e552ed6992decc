"""The harness: answers are checked before timing, records are stored by suite, and two versions are compared."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from support import fake_gpu

from benchmarks import compare, compare_worker, harness, tables, versions
from benchmarks.end_to_end import models
from benchmarks.harness import Checked, Goal, Implementation, Variant
from benchmarks.machine import NotMeasuredError


def implementation(name, wrong="", **how):
    return Variant(name), lambda: Implementation(Variant(name), lambda: None, lambda: Checked(wrong, {"a": 1}), **how)


def missing(name):
    def build():
        raise NotMeasuredError("not installed")

    return Variant(name), build


def broken(name):
    def check():
        raise ValueError("no such thing\nas this")

    return Variant(name), lambda: Implementation(Variant(name), lambda: None, check)


def test_wrong_and_missing_variants_are_not_timed():
    case = harness.prepare([implementation("a"), implementation("b", "2 off"), missing("c"), broken("d")])
    assert set(case.times(rounds=2)) == {Variant("a")} and case.facts == {Variant("a"): {"a": 1}}
    skipped = list(case.skipped_records(lambda variant: {"engine": variant.engine}))
    assert skipped == [
        {"engine": "c", "not_measured": "not installed"},
        {"engine": "b", "refused": "2 off"},
        {"engine": "d", "refused": "ValueError: no such thing"},
    ]
    assert harness.PreparedCase().times(rounds=1) == {}


def test_variants_are_prepared_before_each_call():
    calls = []
    builders = [implementation(name, prepare=lambda name=name: calls.append(name)) for name in ("a", "b")]
    times = harness.prepare(builders).times(rounds=3, warmup=1, prepare=lambda: calls.append("-"))
    assert {variant.engine: len(found) for variant, found in times.items()} == {"a": 3, "b": 3}
    assert calls[1::2] == ["-"] * 8 and sorted(calls[::2]) == ["a"] * 4 + ["b"] * 4


def test_fields_of_records():
    fields = harness.time_fields([1.0, 2.0, 3.0], calls=2)
    assert (fields["rounds"], fields["median_ms"], fields["low_ms"], fields["high_ms"]) == (3, 1.0, 0.7, 1.3)
    reached = {"ratio": 0.5, "efficiency": 1.0}
    assert harness.goal_fields(Goal(0.5), reached) == {"goal": 0.5, "goal_of": "ratio", "goal_met": True}
    assert not Goal(0.4).met(reached) and not Goal(1.1, "efficiency").met(reached)
    assert Goal(1.0, "efficiency").met(reached) and harness.goal_fields(None, reached)["goal_met"] is None


def test_suite_replaces_its_own_records_only(tmp_path):
    harness.save("offline", [{"suite": "offline", "case": "b"}], results=tmp_path, repeats=3)
    harness.save("server", [{"suite": "server", "case": "a"}], results=tmp_path)
    harness.save("offline", [{"suite": "offline", "case": "c"}], results=tmp_path, repeats=5)
    (document,) = harness.documents(tmp_path).values()
    assert [(r["suite"], r["case"]) for r in document["records"]] == [("server", "a"), ("offline", "c")]
    assert document["suites"]["offline"]["repeats"] == 5 and set(document["suites"]) == {"server", "offline"}
    (found,) = harness.measured("server", tmp_path)
    assert found.records == [{"suite": "server", "case": "a"}] and found.facts["cpu"]


def test_every_committed_result_can_be_read():
    files = sorted(harness.RESULTS.rglob("*.json*"))
    assert len(files) > 5
    for path in files:
        text = path.read_text(encoding="utf-8")
        for document in map(json.loads, text.splitlines() if path.suffix == ".jsonl" else [text]):
            assert document["environment"]["packages"]["torch"] and document["records"], path.name


def test_cells_without_a_number_are_empty_and_reasons_are_listed():
    columns = (("case", "{case}"), ("ms", "{median_ms:.1f}"), ("n", lambda r: 2 * r["rows"]), ("goal", "{goal:.0f}"))
    numbers = {"case": "a", "rows": 2, "goal": None}
    skipped = {"case": "b", "engine": "ours", "dtype": "int8", "not_measured": "no such type"}
    text = tables.draw(columns, lambda record: "rows" in record, [numbers, numbers | {"median_ms": 1.25}, skipped])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert lines[0] == ["case", "ms", "n", "goal"] and lines[2:] == [["a", "", "4", ""], ["a", "1.2", "4", ""]]
    assert text.endswith("\n\n- Not measured: ours, int8: no such type.")


class FakeWorker:
    def __init__(self, milliseconds, logit):
        self.reply = {"milliseconds": milliseconds, "logits": [logit], "exit_layer": [1]}

    def ask(self, case):
        return self.reply


def test_versions_with_equal_answers_are_compared():
    workers = {name: FakeWorker(time, 1.0) for name, time in (("base", 4.0), ("here", 2.0), ("again", 4.0))}
    row = compare._row("a", workers, 3)
    assert row == ("a", "4.0", "2.0", "0.50 (0.50 to 0.50)", "1.00 (1.00 to 1.00)")
    refused = compare._row("a", {**workers, "here": FakeWorker(2.0, 1.1)}, 3)
    assert refused[3] == "refused: logits differ by 0.1"
    moved = {"logits": [1.0], "exit_layer": [2]}
    assert compare.difference(moved, {**moved, "exit_layer": [1]}) == "rows leave at other layers"


def test_a_base_without_the_extension_of_this_version_is_refused(monkeypatch, tmp_path):
    """The build leaves out what does not compile, and succeeds."""

    def run(command, **_):
        if "add" in command:
            tree.mkdir()
            (tree / "setup.py").touch()
        return SimpleNamespace(returncode=0, stdout="pure Python package", stderr="")

    tree, here = tmp_path / "tree", tmp_path / "here"
    library = here / versions.LIBRARY.replace("*", "")
    library.parent.mkdir(parents=True)
    library.touch()
    monkeypatch.setattr(versions, "ROOT", here)
    monkeypatch.setattr(versions.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="of main failed:\npure Python"), versions.checked_out("main", str(tmp_path)):
        pass
    library.unlink()
    shutil.rmtree(tree)
    with versions.checked_out("main", str(tmp_path)) as found:
        assert found == tree


def test_cases_of_the_comparison(monkeypatch):
    fake_gpu.use_tiny_models(monkeypatch)
    assert set(compare.SUBJECTS) <= set(models.SUBJECTS)
    with torch.inference_mode():
        outputs = {name: call() for name, call in compare_worker.cases("MiniLM").items()}
    fake_gpu.clear_caches()
    assert len(outputs) == 7 and {len(out.exit_layer) for out in outputs.values()} == {1, 32}
    mixed = outputs["MiniLM, uniform, 50 %, B 32, S 4 to 35"].exit_layer
    assert outputs["MiniLM, never exit, B 32, S 32"].exit_layer.tolist() == [2] * 32 and mixed.min() == 1
