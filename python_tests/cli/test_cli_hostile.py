"""Invalid options, data, models and outputs: one line on stderr and exit code 2, before training or evaluation."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.command_values import INVALID, REQUIRED
from support.commands import error_of

from earlyexit_cli import build_parser, main
from earlyexit_kernels import to_early_exit
from earlyexit_kernels.cli import calibrate, evaluate, predict, train
from earlyexit_kernels.cli.outputs import check_file
from earlyexit_kernels.cli.recipe import RECIPE_FILE, Recipe
from earlyexit_kernels.data import toy
from earlyexit_kernels.tasks.sources import DATA_VARIABLE
from earlyexit_kernels.tuning.tables import write_json

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(autouse=True)
def no_work(monkeypatch):
    """Fail a test that starts training or evaluation."""

    def start(*arguments, **named):
        pytest.fail("work started")

    for module, name in (
        (train, "_train_phase"),
        (train, "collect_trace"),
        (evaluate, "collect_trace"),
        (calibrate, "collect_trace"),
        (predict, "Scorer"),
    ):
        monkeypatch.setattr(module, name, start)


@pytest.fixture
def trained(tmp_path, small_task):
    """Folder as written by `earlyexit train`, without training."""
    folder = tmp_path / "trained"
    to_early_exit(toy.toy_model(0, layers=2, hidden=16)).save_pretrained(folder)
    toy.toy_tokenizer().save_pretrained(folder)
    recipe = Recipe("toy", 0, 24, 32, 64, "dev", {"name": "joint"}, ({"name": "joint"},), ({"accuracy": 0.5},) * 2)
    recipe.save(folder)
    return folder


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command, options in INVALID.items() for option in options]
)
def test_value_out_of_range_is_refused(capsys, monkeypatch, trained, command, option):
    monkeypatch.chdir(trained.parent)
    for value in INVALID[command][option]:
        message = error_of(capsys, [command, *REQUIRED[command], f"{option}={value}"])
        assert option in message and len(message) < 500, value


def test_every_option_has_invalid_values():
    parser = build_parser()
    commands = next(action for action in parser._actions if action.dest == "command").choices
    # without values, or with values that only the network knows
    others = {*"--help -h --debug --set --quick --bf16 --overwrite --truncate --host --address --input".split()}
    tried = {name: set(options) | others for name, options in INVALID.items()}
    for name, command in commands.items():
        assert {option for action in command._actions for option in action.option_strings} <= tried[name]


@pytest.mark.parametrize("text", ["beta", "=1", "beta=", "beta=[[1]]", f"beta={'9' * 5000}", f"beta={'[' * 9000}"])
def test_invalid_method_option_is_refused(capsys, text):
    message = error_of(capsys, ["train", *REQUIRED["train"], "--method", "palbert", "--set", text])
    assert "beta" in message or "--set" in message


# data


HEADER, PAIR = "idx\tlabel\tsentence\n", "idx\tlabel\tsentence1\tsentence2\n"
ROWS = "".join(f"{i}\t{i % 2}\tthe plot was dull .\n" for i in range(40))
PAIRS = "".join(f"{i}\t{i % 6}\tthe plot\twas dull .\n" for i in range(40))
#: Task, train.tsv, dev.tsv, and words of the error.
DATA = {
    "empty train": ("sst2", "", HEADER + ROWS, ["train.tsv, line 1", "expected a header"]),
    "train header only": ("sst2", HEADER, HEADER + ROWS, ["train.tsv, line 2", "at least one row"]),
    "dev header only": ("sst2", HEADER + ROWS, HEADER, ["dev.tsv, line 2", "at least one row"]),
    "empty dev": ("sst2", HEADER + ROWS, "", ["dev.tsv, line 1"]),
    "one class": ("sst2", HEADER + ROWS.replace("\t1\t", "\t0\t"), HEADER + ROWS, ["40 train rows", "0 (negative)"]),
    "unseen class": (
        "trec",
        HEADER + ROWS,
        HEADER + "0\t5\twhat ?\n",
        ["'dev' split", "5 (NUM)", "no row of the train split"],
    ),
    "label out of range": ("sst2", HEADER + ROWS, HEADER + ROWS + "40\t2\tfine\n", ["dev.tsv, line 42", "[-1, 1]"]),
    "NaN label": ("stsb", PAIR + PAIRS, PAIR + PAIRS + "40\tnan\ta\tb\n", ["dev.tsv, line 42", "a number as label"]),
    "infinite label": ("stsb", PAIR + PAIRS + "40\tinf\ta\tb\n", PAIR + PAIRS, ["train.tsv, line 42"]),
    "constant numbers": ("stsb", PAIR + "0\t2.5\ta\tb\n" * 9, PAIR + PAIRS, ["9 train rows", "label 2.5"]),
    "missing column": ("sst2", HEADER + ROWS, "idx\tsentence\n0\tfine\n", ["dev.tsv, line 1", "['idx', 'sentence']"]),
    "missing value": ("sst2", HEADER + ROWS + "40\t1\n", HEADER + ROWS, ["train.tsv, line 42", "got 2"]),
    "hidden labels": ("sst2", HEADER + ROWS, HEADER + ROWS.replace("\t1\t", "\t-1\t"), ["'dev'", "hidden"]),
    "huge label": ("sst2", HEADER + f"0\t{'9' * 5000}\tfine\n", HEADER + ROWS, ["train.tsv, line 2"]),
    "huge header": ("sst2", "x" * 200_000, HEADER + ROWS, ["train.tsv, line 1"]),
    "Latin-1": ("sst2", HEADER + ROWS, (HEADER + "0\t1\tcaf\xe9\n").encode("latin-1"), ["dev.tsv, line 2", "UTF-8"]),
    "UTF-16": ("sst2", (HEADER + ROWS).encode("utf-16"), HEADER + ROWS, ["train.tsv, line 1", "UTF-8", "0xff"]),
}


@pytest.mark.parametrize("case", DATA)
def test_invalid_data_are_refused_before_training(capsys, base, tmp_path, monkeypatch, case):
    task, train_rows, dev_rows, words = DATA[case]
    (tmp_path / task).mkdir()
    for name, rows in (("train", train_rows), ("dev", dev_rows)):
        (tmp_path / task / f"{name}.tsv").write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    output = tmp_path / "out"
    message = error_of(
        capsys, ["train", "--model", str(base), "--task", task, "--output", str(output), "--holdout", "0"]
    )
    assert all(word in message for word in words) and len(message) < 1000, message
    assert not output.exists()


def test_max_length_that_does_not_fit_is_refused(capsys, base, tmp_path, monkeypatch):
    (tmp_path / "sst2").mkdir()
    for name in ("train", "dev"):
        long = "40\t1\t" + "the plot was dull . " * 7_000  # longer than the field limit of csv, 128 kB
        (tmp_path / "sst2" / f"{name}.tsv").write_text(f"{HEADER}{ROWS}{long}\n", encoding="utf-8")
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    arguments = ["train", "--model", str(base), "--task", "sst2", "--output", str(tmp_path / "out"), "--holdout", "0"]
    message = error_of(capsys, [*arguments, "--max-length", "2"])
    assert "--max-length: expected at least 3 for this tokenizer" in message
    message = error_of(capsys, [*arguments, "--max-length", "128"])
    assert "a row of the train split has 128 tokens, the model takes at most 64" in message
    with pytest.raises(pytest.fail.Exception, match="work started"):
        main([*arguments, "--max-length", "64"])


# models


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def _config(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


#: Damage to the folder of a model.
BROKEN = {
    "truncated weights": lambda folder: _truncate(folder / WEIGHTS),
    "empty weights": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no config": lambda folder: (folder / CONFIG).unlink(),
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
}


@pytest.mark.parametrize("case", [*BROKEN, *BROKEN_EXITS])
def test_eval_names_broken_model(capsys, trained, case):
    {**BROKEN, **BROKEN_EXITS}[case](trained)
    assert str(trained) in error_of(capsys, ["eval", "--model", str(trained)])


@pytest.mark.parametrize("case", BROKEN)
def test_train_names_broken_model(capsys, base, small_task, tmp_path, case):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    BROKEN[case](folder)
    arguments = ["--task", "toy", "--output", str(tmp_path / "out"), "--train-rows", "32", "--holdout", "24"]
    message = error_of(capsys, ["train", "--model", str(folder), *arguments])
    assert str(folder) in message or case == "config of a decoder"


def test_checkpoint_without_an_encoder_weight_is_refused(capsys, base, small_task, tmp_path):
    toy.toy_tokenizer().save_pretrained(tmp_path)
    (tmp_path / CONFIG).write_bytes((base / CONFIG).read_bytes())
    weights = load_file(base / WEIGHTS)
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / WEIGHTS, metadata={"format": "pt"})
    arguments = ["--task", "toy", "--output", str(tmp_path / "out"), "--train-rows", "32", "--holdout", "24"]
    message = error_of(capsys, ["train", "--model", str(tmp_path), *arguments])
    assert "1 weight(s) of the encoder" in message and "layer.1.output.dense.weight" in message


def test_model_that_is_a_file_is_refused(capsys, base, small_task, tmp_path):
    arguments = ["--task", "toy", "--output", str(tmp_path / "out"), "--holdout", "24"]
    assert "is a file" in error_of(capsys, ["train", "--model", str(base / CONFIG), *arguments])


RECIPES = {
    "task": ["sst3", 3, None, []],
    "seed": [-1, 1.5, "0", None, True],
    "holdout": [-1, 1.5, "24", None, 10**9],
    "train_rows": [-1, 0, 1.5, None, 10**9],
    "max_length": [0, -5, "64", 2.5, 1],
    "evaluation_split": ["train", None, 3],
    "method": ["joint", [], {}, {"name": "magic"}, {"name": "palbert", "beta": "x"}, {"name": "joint", "x": 1}, 3],
    "other": [1],
}


@pytest.mark.parametrize("name", RECIPES)
def test_broken_recipe_is_refused(capsys, trained, name):
    path = trained / RECIPE_FILE
    before = path.read_text()
    for value in RECIPES[name]:
        path.write_text(json.dumps({**json.loads(before), name: value}))
        message = error_of(capsys, ["eval", "--model", str(trained)])
        words = (RECIPE_FILE, "rows to train on and to hold out", "--max-length")
        assert any(word in message for word in words), value


@pytest.mark.parametrize("text", [b"", b"[]", b"3", b"{", b"\xff\xfe{}", b"[" * 90_000, b'{"task": "toy"}'])
def test_file_that_is_not_a_recipe_is_refused(capsys, trained, text):
    (trained / RECIPE_FILE).write_bytes(text)
    assert "is not a recipe" in error_of(capsys, ["eval", "--model", str(trained)])


# files to write


@pytest.mark.parametrize("option", ["--output", "--plot"])
def test_eval_checks_output_files_first(capsys, trained, tmp_path, option):
    pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for path in (tmp_path / "file" / "x.png", tmp_path / "folder.png", tmp_path / f"{'x' * 300}" / "x.png"):
        message = error_of(capsys, ["eval", "--model", str(trained), option, str(path)])
        assert option in message and str(path.parent) in message


def test_check_file_accepts_what_write_json_can_write(tmp_path):
    """`write_json` writes a new file beside the target and renames it, so the target itself may be read-only."""
    file, link = tmp_path / "file.json", tmp_path / "link.json"
    file.write_text('{"environment": {}}')
    file.chmod(0o400)
    link.symlink_to(file)
    for target in (file, link, tmp_path / "new" / "file.json", tmp_path / f"{'x' * 250}"):
        check_file("--output", target)
    assert "environment" in file.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.json", "link.json", "new"]
    check_file("--output", Path("/dev/null"))


def test_check_file_refuses_what_write_json_cannot_write(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "file.part").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "file")
    for target in (tmp_path / "file", tmp_path / "link", tmp_path / f"{'x' * 251}"):
        with pytest.raises(OSError, match="--output: expected a file that can be written to"):
            check_file("--output", target)
        with pytest.raises(OSError):
            write_json(target, [])


@pytest.mark.parametrize("command", ["train", "demo"])
def test_output_folder_is_checked_first(capsys, base, small_task, tmp_path, command):
    (tmp_path / "file").touch()
    arguments = ["--model", str(base), "--task", "toy", "--holdout", "24"] if command == "train" else ["--quick"]
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        message = error_of(capsys, [command, *arguments, "--output", str(folder)])
        assert "--output: expected a folder that can be written to" in message and str(folder) in message


def test_full_disk_names_the_folder(capsys, base, small_task, tmp_path, monkeypatch):
    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(train, "_train_phase", lambda *arguments: None)
    monkeypatch.setattr(train, "collect_trace", lambda *arguments, **named: (None, [0]))
    monkeypatch.setattr(train, "truncations", lambda *arguments, **named: ({"accuracy": 0.5},) * 2)
    monkeypatch.setattr(Recipe, "save", full)
    arguments = ["--model", str(base), "--task", "toy", "--holdout", "24", "--output", str(tmp_path / "out")]
    message = error_of(capsys, ["train", *arguments])
    assert message.startswith(f"error: nothing could be saved, neither in {tmp_path / 'out'} ([Errno 28] No space left")
