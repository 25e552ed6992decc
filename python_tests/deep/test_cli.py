"""Mistakes at the command line: exit code 0 with a sound result, or 2 and one line; never a traceback.

Invalid values and files must be refused (False in the tables), valid ones must succeed (True), and both are correct for
questionable ones (None).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.command_values import INVALID
from support.commands import exit_code
from support.random_settings import chance, choice

from earlyexit_cli import build_parser
from earlyexit_kernels.cli.saved import RECORD
from earlyexit_kernels.data import toy

Verdict = bool | None
BASE = {
    "train": "base --data many.csv --output new --holdout 52 --epochs 1 --batch-size 8",
    "eval": "trained",
    "calibrate": "trained",
    "predict": "trained rows.csv --output new.csv",
    "demo": "--quick",
}
OWN_LINE = "base --output new --data train.csv --epochs 1 --batch-size 8"
RATE = {"1e-3": True}
#: Command -> option -> value -> verdict, beside the values of `INVALID`.
VALUES: dict[str, dict[str, dict[str, Verdict]]] = {
    "train": {
        "--lr": {**RATE, "1e30": False},
        "--head-lr": {"same": True, "1e-2": True},
        "--gate-lr": RATE,
        "--epochs": {"1": True, "0.5": None},
        "--batch-size": {"4": True, "1000": True},
        "--max-length": {"16": True, "1": None, "2": None, "100000": None},
        "--holdout": {"8": True, "0": False, "10000": False},
        "--seed": {"1": True},
        "--pooling": {"mean": True, "first": True},
        "--set": {"x": False, "nothing=1": False, "=": False, "equilibrium=true": None, "equilibrium=nan": False},
        "--method": {"joint": True, "deebert": True},
        "--data": {"many.csv": True, "taken.csv": False, "nowhere.csv": False},
        "--output": {"/dev/full": False, "taken.csv": False},
    },
    "eval": {
        "--drop": {"0.01": True, "0": True},
        "--batch-size": {"4": True},
        "--data": {"many.csv": True, "other.csv": None, "nowhere.csv": False},
        "--output": {"out.json": True, "/dev/full": False, ".": False, "nowhere/out.json": None},
    },
    "calibrate": {
        "--metric": {"accuracy": True, "pearson": False},
        "--criterion": {"auto": None, "patience": None, "learned": False},
        "--batch-size": {"4": True},
        "--data": {"many.csv": None, "other.csv": None, "nowhere.csv": False},
        "--output": {"out.json": True, "/dev/full": False, ".": False},
        "--epsilon": {"0.1": None},
    },
    "predict": {
        "--output": {"new.csv": True, "new.tsv": True, "new.jsonl": True, "rows.csv": False},
        "--text-column": {"text": True, "words": False},
        "--pair-column": {"words": False, "text": False},
        "--max-tokens": {"4": True},
    },
    "demo": {"--output": {"/dev/full": False, "trained": False}},
}
#: Pairs of a command and one of these options; those for the targets of `calibrate` are in `TARGETS`.
OPTIONS = [
    (command, option)
    for command in BASE
    for option in sorted({*VALUES[command], *INVALID[command]} - {"--max-drop", "--speed-up", "--latency-ms", "--risk"})
]
#: Targets of `calibrate`.
TARGETS: dict[str, Verdict] = {
    "--max-drop=0.5": True,
    "--max-drop=1": False,
    "--speed-up=1.5": True,
    "--speed-up=1000": False,
    "--latency-ms=10000": True,
    "--risk=0.5": None,
    "--risk=0.001": False,
    "--max-drop=0.1 --speed-up=2": False,
}
GOOD, BAD = b"the plot was dull .,a\n", b"the cast was brilliant .,b\n"
#: Contents of a train file of one's own.
OWN: dict[str, tuple[bytes, Verdict]] = {
    "classes": (b"text,label\n" + (GOOD + BAD) * 20, True),
    "quoted": (b"text,label\r\n" + b'"the plot, was dull .",a\r\n"the ""cast""\nwas .",b\r\n' * 20, True),
    "mixed labels": (b"text,label\n" + (GOOD + BAD.replace(b",b", b",1")) * 20, False),
    "one class": (b"text,label\n" + GOOD * 20, False),
    "empty label": (b"text,label\n" + (GOOD.replace(b",a", b",") + BAD) * 20, False),
    "NaN": (b"text,label\n" + b"the plot was dull .,nan\nthe cast was brilliant .,1.5\n" * 20, False),
    "doubled column": (b"text,label,text\n" + b"the plot was dull .,a,b\nthe cast was .,b,c\n" * 20, False),
    "no label": (b"text\n" + b"the plot was dull .\nthe cast was brilliant .\n" * 20, False),
    "open quote": (b"text,label\n" + (GOOD + BAD) * 20 + b'"the', False),
}
#: Damage to a file of rows.
DAMAGE: dict[str, tuple[Callable[[bytes], bytes], Verdict]] = {
    "empty": (lambda data: b"", False),
    "header only": (lambda data: data.split(b"\n")[0] + b"\n", False),
    "no header": (lambda data: data.split(b"\n", 1)[1], False),
    "cut short": (lambda data: data[: len(data) * 2 // 3], None),
    "not UTF-8": (lambda data: data.replace(b"dull", b"d\xff\xfell"), False),
    "UTF-16": (lambda data: data.decode().encode("utf-16"), False),
    "byte order mark": (lambda data: b"\xef\xbb\xbf" + data, None),
    "NUL bytes": (lambda data: data.replace(b"plot", b"p\0ot"), None),
    "a long line": (lambda data: data.replace(b"dull", b"dull " * 60000, 1), None),
    "a column less": (lambda data: data.replace(b",0", b" 0", 1), False),
    "a column more": (lambda data: data.replace(b"the plot", b"the,plot", 1), False),
    **{
        f"label {label}": (lambda data, label=label: data.replace(b",1\n", f",{label}\n".encode(), 1), verdict)
        for label, verdict in {"7": None, "nan": False, "-1": None, "1.0": None, "1.5": False}.items()
    },
    "carriage returns": (lambda data: data.replace(b"\n", b"\r\n"), True),
    "unknown words": (lambda data: data.replace(b"the", b"zzz").replace(b"was", b"qqq"), None),
    "empty sentences": (lambda data: data.replace(b"the plot was dull .", b""), False),
}
#: Values that are invalid for most fields of records and configs.
WRONG = ([], {}, "x", -1, 1e9, math.nan, True, [1], {"name": 3})


@functools.cache
def originals() -> Path:
    """Return a folder with ``base`` (a tiny stock model), ``trained`` (with exits) and tables of rows."""
    root = Path(tempfile.mkdtemp(prefix="deep-cli-"))
    atexit.register(shutil.rmtree, root)
    toy.toy_model(0, layers=2, hidden=16).save_pretrained(root / "base")
    toy.toy_tokenizer().save_pretrained(root / "base")
    sentences = "the plot was dull .|the cast was brilliant .|the film was not funny .|the music was superb .".split(
        "|"
    )
    lines = "".join(f"{sentences[i % 4]},{i % 2}\n" for i in range(100))
    (root / "many.csv").write_text(f"text,label\n{lines}")
    (root / "rows.csv").write_text("text,truth\nthe plot was dull .,a\nthe \u00e9 was,\n")
    (root / "rows.tsv").write_text("text\ttruth\nthe plot was dull .\ta\nthe \u00e9 was\t\n")
    (root / "other.csv").write_text("text,label\nthe plot was dull .,a\nthe cast was brilliant .,b\n")
    (root / "taken.csv").write_text("text,label,predicted_label\nthe plot was dull .,a,b\n")
    with inside(root):
        code, error = run("train", BASE["train"].replace("new", "trained").split())
    assert code == 0, error
    return root


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Work in a folder, without the hub; restore what commands change."""
    before, threads = Path.cwd(), torch.get_num_threads()
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}):
            yield
    finally:
        os.chdir(before)
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)


def run(command: str, argv: list[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it wrote to stderr."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        code = exit_code([command, *argv])
    return code, err.getvalue()


def judge(command: str, argv: list[str], verdict: Verdict) -> None:
    """Run a command and compare its exit code, its error or its result with the verdict."""
    config = Path("trained/config.json")
    before = config.read_bytes() if config.is_file() else b""
    code, err = run(command, argv)
    lines = [line for line in re.sub(r"[^\n]*?\d+%\|[^\]\n]*\]", "", err).splitlines() if line.strip()]  # progress bars
    assert code in (0, 2), f"exit code {code}: {err[-500:]}"
    if code == 2:
        named = [line for line in lines if line.startswith("error: ") or ": error: " in line]
        assert "Traceback" not in err and named == lines[-1:], f"not one last line for the error: {err[-500:]}"
        assert verdict is not True, f"refused: {lines[-1]}"
        return
    assert verdict is not False, "an invalid value or file was accepted"
    output = getattr(build_parser().parse_args([command, *argv]), "output", None)
    if command == "train":
        check_trained(output)
    if command == "calibrate":
        assert config.read_bytes() != before, "nothing is saved"
    if command == "predict":
        assert output.is_file() and output.stat().st_size, f"{output} is not written"


def check_trained(folder: Path) -> None:
    weights, record = load_file(folder / "model.safetensors"), json.loads((folder / RECORD).read_text())
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values()), "weights are not finite"
    assert all(math.isfinite(value) for score in record["scores"] for value in score.values()), record["scores"]


def both(*verdicts: Verdict) -> Verdict:
    """Return the verdict on a command of several changes."""
    return False if False in verdicts else None if None in verdicts else True


def values(draw: Any) -> tuple[str, list[str], Verdict]:
    """Draw one or two options of a command."""
    command, first = choice(draw, OPTIONS)
    others = draw(st.lists(st.sampled_from([name for of, name in OPTIONS if of == command]), max_size=1))
    argv, verdicts = [], []
    for option in dict.fromkeys((first, *others)):
        invalid: dict[str, Verdict] = dict.fromkeys(INVALID[command].get(option, ()), False)
        table = invalid | VALUES[command].get(option, {})
        valid = [value for value, verdict in table.items() if verdict is not False]
        value = choice(draw, valid if valid and chance(draw, 40) else list(table))
        argv.append(f"{option}={value}")
        verdicts.append(table[value])
    if command == "calibrate":
        target = choice(draw, sorted(TARGETS))
        argv += target.split()
        verdicts.append(TARGETS[target])
    return command, [*BASE[command].split(), *argv], both(*verdicts)


def own_file(draw: Any) -> tuple[str, list[str], Verdict]:
    """Train on a file of one's own, which may be cut at any byte."""
    data, verdict = OWN[choice(draw, sorted(OWN))]
    if chance(draw, 30):
        data, verdict = data[: draw(st.integers(0, len(data)))], None
    Path("train.csv").write_bytes(data)
    return "train", OWN_LINE.split(), verdict


def rows_file(draw: Any) -> tuple[str, list[str], Verdict]:
    """Damage a file of rows, and train or evaluate."""
    change, verdict = DAMAGE[choice(draw, sorted(DAMAGE))]
    path = Path("many.csv")
    if chance(draw, 10):
        verdict = None
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(change(path.read_bytes()))
    command, more = choice(draw, (("train", ""), ("eval", " --data many.csv")))
    return command, (BASE[command] + more).split(), verdict if command == "train" or verdict is True else None


def model_file(draw: Any) -> tuple[str, list[str], Verdict]:
    """Damage a file of the model, and train or evaluate."""
    command, folder = choice(draw, (("eval", Path("trained")), ("train", Path("base"))))
    path = choice(draw, sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")))
    data = path.read_bytes()
    path.unlink()
    contents = {"cut": data[: len(data) // 2], "empty": b"", "list": b"[]", "gone": None, "folder": None}
    kind = choice(draw, sorted(contents))
    if kind == "folder":
        path.mkdir()
    elif contents[kind] is not None:
        path.write_bytes(contents[kind])
    needed = path.name in ("config.json", "model.safetensors") or (
        path.name == RECORD and kind in ("cut", "empty", "list")
    )
    return command, BASE[command].split(), False if needed else None


def record_field(draw: Any) -> tuple[str, list[str], Verdict]:
    """Set an invalid value in the record or the config of the model, or remove a field, and evaluate."""
    path = Path("trained") / choice(draw, (RECORD, RECORD, "config.json"))
    data, is_record = json.loads(path.read_text()), path.name == RECORD
    key = choice(draw, sorted(data) if is_record else ("criterion", "method", "heads", "model_type"))
    removed, value = chance(draw, 20), choice(draw, WRONG)
    data.pop(key, None)
    path.write_text(json.dumps(data if removed else data | {key: value}))
    checked = is_record and key in ("rows", "unseen_rows", "seed", "columns") and value != 1e9
    return "eval", BASE["eval"].split(), False if checked and not removed else None


MISTAKES = (values, values, values, values, own_file, rows_file, model_file, record_field)


@pytest.mark.thorough
@given(st.sampled_from(MISTAKES), st.data())
def test_mistakes(mistake, data):
    root = originals()
    with tempfile.TemporaryDirectory(prefix="deep-run-") as name:
        here = Path(shutil.copytree(root, Path(name) / "here"))
        with inside(here):
            command, argv, verdict = mistake(data.draw)
            data.draw(st.just((command, argv, verdict)), label="command")
            judge(command, argv, verdict)
