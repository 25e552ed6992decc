"""What becomes of measurements: one JSON a machine, tables, plots, and two versions compared."""

from __future__ import annotations

import pytest

from benchmarks import compare, store
from benchmarks.end_to_end import plots, tables
from benchmarks.end_to_end.goals import GOALS

MEASURED = {"suite": "offline", "subject": "BERT-base", "shape": "B 32, S 32", "backend": "cpp", "dtype": "float32"}
NUMBERS = {"layer_rows": 0.39, "tokens": 1.0, "flips": 1, "rows": 32, "median_ms": 80.0, "p90_ms": 81.0, "depth": 12}
NUMBERS |= {"p99_ms": 82.0, "rows_per_second": 400.0, "ratio": 0.4, "ratio_low": 0.39, "ratio_high": 0.42}
OURS = {"engine": "fused layers", "exits": "uniform, 39 %", "case": "BERT-base, uniform, 39 %, B 32, S 32"}
OTHER = {"engine": "OpenVINO", "backend": "", "exits": "full depth", "case": "BERT-base, full depth, B 32, S 32"}


def fake_records() -> list[dict]:
    goal = {"efficiency": 0.975, "goal": 1.05, "goal_of": "efficiency", "goal_met": False}
    plain = {"baseline": "transformers", "against": "transformers"}
    mine = {**MEASURED, **OURS, **NUMBERS, "mean_exit_layer": 4.7}
    return [
        {**mine, **plain, **goal},
        {**mine, **plain, **goal, "engine": "family layers"},
        {**mine, "exits": "never exit", **plain, "efficiency": 1.0, "goal": None},
        {**mine, "baseline": "our full depth", "against": "fused layers", "efficiency": 1.0, "goal": None},
        {**MEASURED, **OTHER, "baseline": "", "not_measured": "not installed"},
        {**MEASURED, **OURS, "engine": "mask loop", "baseline": "", "refused": "its logits are off"},
    ]


@pytest.fixture
def results(tmp_path):
    store.save("offline", fake_records(), results=tmp_path, repeats=3)
    return tmp_path


def test_tables_show_what_was_measured_and_what_was_not(results):
    *_, line, _, reached = tables.goals(results).splitlines()
    assert reached == f"Reached: 0 of 1 goals; not measured: {len(GOALS) - 1}."
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:] == ["fused layers, cpp", "transformers", "0.400 (0.390 to 0.420)", "0.97", "efficiency 1.05", "no"]
    text = tables.throughput(results)
    assert "| 0.39 |" in text.replace("       ", " ") and "400.0" in text
    assert "- Not measured: OpenVINO: not installed." in text
    assert f"- Refused: mask loop, cpp ({OURS['case']}): its logits are off." in text
    assert tables.latency(results) == tables.under_load(results) == "Not measured yet."


def test_the_table_of_goals_names_the_commits_of_all_that_it_shows(tmp_path):
    for suite, commit in (("single_stream", "aaaa"), ("offline", "bbbb")):
        store.save(suite, [record | {"suite": suite} for record in fake_records()], results=tmp_path, commit=commit)
    assert tables.goals(tmp_path).partition("\n")[0].endswith("commit aaaa, bbbb:")


def test_a_suite_replaces_its_own_records_only(results):
    store.save("server", [{"suite": "server", "case": "a"}], results=results)
    store.save("offline", fake_records()[:1], results=results, repeats=5)
    (document,) = store.documents(results).values()
    assert [r["suite"] for r in document["records"]] == ["server", "offline"]
    assert document["suites"]["offline"]["repeats"] == 5 and set(document["suites"]) == {"server", "offline"}
    (found,) = store.measured("server", results)
    assert found.records == [{"suite": "server", "case": "a"}] and found.facts["cpu"]


def test_plots_are_drawn_from_the_records(results):
    pytest.importorskip("matplotlib")
    profile = {"case": "a", "exits": "never exit", "median_ms": 1.0, "shape": "B 32, S 32", "subject": "BERT-base"}
    store.save("profile", [{"suite": "profile", **profile}], results=results)
    drawn = plots.write(results)
    assert [path.name.removeprefix(store.machine_name()) for path in drawn] == ["-exits.png", "-never_exit.png"]
    assert tables.goals(results).count("![") == 2


def test_versions_are_compared_where_they_answer_alike():
    class Fake:
        def __init__(self, milliseconds, logit):
            self.reply = {"milliseconds": milliseconds, "logits": [logit], "exit_layer": [1]}

        def ask(self, case):
            return self.reply

    assert compare._row("a", {"base": Fake(4.0, 1.0), "here": Fake(2.0, 1.0)}, 3) == (
        "a",
        "4.0",
        "2.0",
        "0.50 (0.50 to 0.50)",
        "1.00 (1.00 to 1.00)",
    )
    assert compare._row("a", {"base": Fake(4.0, 1.0), "here": Fake(2.0, 1.1)}, 3)[3] == "refused: logits differ by 0.1"
    moved = {"logits": [1.0], "exit_layer": [2]}
    assert compare.difference(moved, {**moved, "exit_layer": [1]}) == "rows leave at other layers"
