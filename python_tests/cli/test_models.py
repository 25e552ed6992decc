"""Folders of models that are damaged: one line on stderr that names the folder, before anything is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.commands import error_of
from support.own_files import write_rows

from earlyexit_cli import main
from earlyexit_kernels.cli import eval, train
from earlyexit_kernels.cli.saved import RECORD

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(autouse=True)
def no_work(request, monkeypatch):
    """Fail a test that starts training or evaluation, but not the training of its model."""

    def start(*arguments, **named):
        pytest.fail("work started")

    request.getfixturevalue("trained")
    for module, name in ((train, "_train_phase"), (eval, "collect_trace")):
        monkeypatch.setattr(module, name, start)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _config(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


#: Damage to the folder of a model.
BROKEN = {
    "truncated weights": lambda folder: _truncate(folder / WEIGHTS),
    "empty weights": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "config cut short": lambda folder: _truncate(folder / CONFIG),
    "config not UTF-8": lambda folder: (folder / CONFIG).write_bytes(b'{"model_type": "\xff"}'),
    "config a list": lambda folder: (folder / CONFIG).write_text("[]"),
    "config of a decoder": lambda folder: (folder / CONFIG).write_text('{"model_type": "gpt2"}'),
    "tokenizer broken": lambda folder: (folder / "tokenizer.json").write_text("{}"),
}
BROKEN_EXITS = {
    "criterion a list": lambda folder: _config(folder / CONFIG, criterion=[]),
    "criterion a string": lambda folder: _config(folder / CONFIG, criterion="entropy"),
    "unknown heads": lambda folder: _config(folder / CONFIG, heads={"size": 3}),
    "no backbone": lambda folder: _config(folder / CONFIG, backbone_config={}),
    "backbone a number": lambda folder: _config(folder / CONFIG, backbone_config=3),
    "method a number": lambda folder: _config(folder / CONFIG, method=3),
    "other classes": lambda folder: _config(folder / CONFIG, id2label={"0": "a", "1": "b", "2": "c"}),
    "no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "no heldout rows": lambda folder: (folder / "heldout.parquet").unlink(),
    "other rows": lambda folder: (folder / "heldout.parquet").write_bytes(b"PAR1"),
}


@pytest.mark.parametrize("case", [*BROKEN, *BROKEN_EXITS])
def test_eval_names_the_folder(capsys, model, case):
    {**BROKEN, **BROKEN_EXITS}[case](model)
    assert str(model) in error_of(capsys, ["eval", str(model)])


@pytest.mark.parametrize("case", BROKEN)
def test_train_names_the_folder(capsys, base, tmp_path, case):
    folder, rows = tmp_path / "copy", write_rows(tmp_path / "rows.csv", 40)
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    BROKEN[case](folder)
    words = ["train", str(folder), "--data", str(rows), "--output", str(tmp_path / "out")]
    assert str(folder) in error_of(capsys, words) or case == "config of a decoder"


RECORDS = {
    "rows": [-1, 0, 1.5, None, "3", True],
    "unseen_rows": [-1, 1.5, None],
    "seed": [-1, 1.5, "0", None, True],
    "columns": ["text", [], {}, None, {"text": 3}, {"text": None, "pair": None, "label": "label", "group": None}],
    "data": [3, None, []],
    "scores": [[3], 3, [{"accuracy": "x"}]],
    "other": [1],
}


@pytest.mark.parametrize("name", RECORDS)
def test_broken_record_is_refused(capsys, model, name):
    path = model / RECORD
    before = path.read_text()
    for value in RECORDS[name]:
        path.write_text(json.dumps({**json.loads(before), name: value}))
        assert f"{path} is not a record of this version" in error_of(capsys, ["eval", str(model)]), value


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{", b"\xff\xfe{}", b"[" * 90_000, b'{"data": "toy"}'])
def test_file_that_is_not_a_record_is_refused(capsys, model, text):
    (model / RECORD).write_bytes(text)
    assert "is not a record" in error_of(capsys, ["eval", str(model)])


def test_stock_model_is_refused(capsys, base):
    assert "expected a model with exits, got a BertForSequenceClassification" in error_of(capsys, ["eval", str(base)])
    with pytest.raises(ValueError, match="expected a model with exits"):
        main(["--debug", "predict", str(base), "--text", "a"])
