"""The README's numbers come from committed results, and its Python runs on names that exist."""

import re

import pytest
import torch
from transformers import Trainer

import earlyexit_kernels as ee
from benchmarks.readme import DOCUMENTS, TABLES, rewrite
from earlyexit_kernels.cli.train import training_arguments
from earlyexit_kernels.criteria import CRITERIA, RULES
from earlyexit_kernels.objectives import OBJECTIVES
from earlyexit_kernels.tasks import toy

README, BENCHMARKS = (path.read_text(encoding="utf-8") for path in DOCUMENTS)


def test_tables_are_those_of_the_committed_results():
    found = re.findall(r"<!-- table:(\w+) -->", README + BENCHMARKS)
    assert len(found) == len(set(found)) and set(found) == set(TABLES)
    assert rewrite(check=True), "run `python -m benchmarks.readme`"


def rows_of(table: str) -> dict[str, dict[str, str]]:
    """A table of the README as first cell -> title -> cell."""
    block = re.search(rf"<!-- table:{table} -->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert block is not None
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block[1].splitlines()]
    header, _, *rows = lines
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_every_method_and_criterion_is_in_its_table():
    assert set(re.findall(r"`(\w+)`", " ".join(rows_of("methods")))) == set(OBJECTIVES)
    assert [call[1:].partition("(")[0] for call in rows_of("criteria")] == [cls.__name__ for cls in CRITERIA.values()]


@pytest.mark.parametrize(
    ("method", "cells"),
    [
        ("`smartbert`", {"exit rule": "`skip_gate`", "regression": "", "replay": ""}),
        ("`deebert`", {"phases": "backbone, exits", "regression": "by another rule", "replay": "yes"}),
        ("`palbert`", {"exit rule": "`q_exit`", "regression": "yes", "several labels": "yes"}),
        ("`berxit`", {"regression": "yes", "several labels": ""}),
    ],
)
def test_the_table_of_methods_says_what_is_known(method, cells):
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
def test_the_table_of_criteria_says_what_is_known(criterion, cells):
    row = rows_of("criteria")[criterion]
    assert {title: row[title] for title in cells} == cells
    assert sum(row["replay"] == "yes" for row in rows_of("criteria").values()) == len(RULES)


def test_names_in_the_readme_exist():
    names = set(re.findall(r"\bee\.([A-Za-z_]+)", README))
    assert names and all(hasattr(ee, name) for name in names), names
    for room in (ee.criteria, ee.objectives):
        named = set(re.findall(rf"\bee\.{room.__name__.rpartition('.')[2]}\.([A-Za-z_]+)", README))
        assert named and all(hasattr(room, name) for name in named), named


def test_linked_files_exist():
    for path in DOCUMENTS:
        links = re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text(encoding="utf-8"))
        assert links and all((path.parent / link).exists() for link in links), links


def test_the_ten_lines_run_and_what_they_saved_loads(tmp_path, monkeypatch):
    """The first blocks as they stand, with a tiny model in the place of the hub's."""
    ten_lines, on_random_weights, elsewhere = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[:3]
    monkeypatch.chdir(tmp_path)
    tokenizer = toy.toy_tokenizer()
    toy.toy_model(0, layers=3, hidden=16).save_pretrained("bert-base-uncased")
    tokenizer.save_pretrained("bert-base-uncased")
    rows = toy.write_splits(train_rows=8, dev_rows=0, test_rows=0)["train"]
    sentences = [row.text for row in rows]
    names = {
        "sentences": sentences,
        "training_args": training_arguments(tmp_path, seed=0, epochs=1, lr=1e-3, batch_size=8),
        "train_set": [{**tokenizer(row.text), "labels": row.label} for row in rows],
    }
    exec(ten_lines, names)
    assert names["out"].logits.shape == (8, 2) and names["out"].exit_layer.shape == (8,)
    assert str(names["model"].explain(**names["batch"])).startswith("engine 'eager': ")
    later = {"sentences": sentences}
    exec(elsewhere, later)
    assert later["model"].criterion == names["model"].criterion == ee.criteria.Entropy(threshold=0.3)
    torch.manual_seed(0)
    exec(on_random_weights, seeded := {})
    assert len(seeded["model"](input_ids=torch.randint(0, 30000, (32, 16))).exit_layer.unique()) > 1


def test_the_training_loop_runs(tmp_path):
    """The block as it stands, on a tiny model and eight sentences."""
    (block,) = [b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "ee.phases" in b]
    sentences = toy.write_splits(train_rows=8, dev_rows=0, test_rows=0)["train"]
    tokenizer = toy.toy_tokenizer()
    rows = [dict(tokenizer(s.text)) for s in sentences]
    names = {
        "ee": ee,
        "Trainer": Trainer,
        "tokenizer": tokenizer,
        "stock": toy.toy_model(0, layers=3, hidden=16),
        "training_args": training_arguments(tmp_path, seed=0, epochs=1, lr=1e-3, batch_size=8),
        "train_set": [{**row, "labels": s.label} for row, s in zip(rows, sentences, strict=True)],
    }
    exec(block, names)
    assert names["phase"].name == "exits" and names["model"].criterion == ee.criteria.Entropy(threshold=0.3)
