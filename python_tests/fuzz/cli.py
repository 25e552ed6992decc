"""Target `cli`: invalid arguments and files for `earlyexit` give exit code 0 and a valid result, or 2 and one line.

Runs in the process of the worker. Invalid values must be refused, valid values must succeed, and both are correct for
questionable values. No command may end in a traceback.
"""

from __future__ import annotations

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
from unittest import mock

import torch
from safetensors.torch import load_file

from earlyexit_cli import main
from earlyexit_kernels.cli import demo
from earlyexit_kernels.cli.recipe import RECIPE_FILE
from earlyexit_kernels.tasks import toy
from earlyexit_kernels.tasks.sources import DATA_VARIABLE
from fuzz.case import AcceptedError, Case, WrongError
from fuzz.worker import CONTEXT

#: Value -> expected result: True for success, False for refusal, None for either.
Values = dict[str, "bool | None"]
POSITIVE: Values = {"0": False, "-1": False, "nan": False, "inf": False, "-inf": False, "1e400": False, "x": False}
WHOLE: Values = {
    "0": False,
    "-5": False,
    "1.5": False,
    "nan": False,
    "x": False,
    "": False,
    "99999999999999999999": None,
}
TRAIN: dict[str, Values] = {
    "--lr": {"1e-3": True, "1e30": None, **POSITIVE},
    "--head-lr": {"same": True, "1e-2": True, **POSITIVE},
    **{option: {"1e-3": True, **POSITIVE} for option in ("--halting-lr", "--gate-lr")},
    "--epochs": {"1": True, "0.5": None, **POSITIVE},
    "--batch-size": {"4": True, "1000": True, **WHOLE},
    "--max-length": {"16": True, "1": None, "2": None, "100000": None, **WHOLE},
    "--train-rows": {"8": True, "10000": False, **WHOLE},
    "--holdout": {"8": True, "0": True, "10000": False, **{k: v for k, v in WHOLE.items() if k != "0"}},
    "--seed": {"1": True, "-1": None, "1.5": False, "x": False, "99999999999999999999": None},
    "--pooling": {"mean": True, "first": True, "max": False},
    "--set": {"x": False, "nothing=1": False, "=": False, "equilibrium=true": None, "equilibrium=nan": False},
    "--method": {"joint": True, "deebert": True, "magic": False, "": False},
    "--task": {"sst2": True, "sst3": False, "mrpc": False, "../sst2": False},
}
EVAL: dict[str, Values] = {
    "--points": {"8": True, "9": True, "7": False, "1000000000": False, **WHOLE},
    "--drop": {"0.01": True, "0": True, "nan": False, "inf": None, "-1": False, "x": False},
    "--batch-size": {"4": True, **WHOLE},
    "--task": {"sst2": True, "sst3": False, "stsb": False},
    "--output": {"out.json": True, "/dev/full": False, ".": False, "nowhere/out.json": None},
}
CALIBRATE: dict[str, Values] = {
    "--metric": {"accuracy": True, "pearson": False, "bleu": False, "": False},
    "--apply": {"auto": None, "patience": None, "learned": False, "magic": False, "": False},
    "--batch-size": {"4": True, **WHOLE},
    "--dev": {"other.csv": None, "dev.tsv": False, "nowhere.csv": False, "x": False},
    "--output": {"out.json": True, "/dev/full": False, ".": False},
    "--epsilon": {"0.1": None, **POSITIVE},
}
TARGETS: Values = {
    "--max-drop=0.5": True,
    "--max-drop=1": False,
    "--speed-up=1.5": True,
    "--speed-up=1000": False,
    "--latency-ms=10000": True,
    "--risk=0.5": None,
    "--risk=0.001": False,
    "--speed-up=0.5": False,
    "--max-drop=0.1 --speed-up=2": False,
}
PREDICT: dict[str, Values] = {
    "--input": {"rows.csv": True, "rows.tsv": True, "other.csv": True, "taken.csv": False, "x": False, "..": False},
    "--output": {"new.csv": True, "new.tsv": True, "new.jsonl": True, "rows.csv": False, "new": False, "": False},
    "--text-column": {"text": True, "words": False, "": False},
    "--pair-column": {"words": False, "text": True, "": False},
    "--max-tokens": {"4": True, **WHOLE},
}
DEMO: dict[str, Values] = {
    "--threads": {"0": False, "-1": False, "x": False, "1.5": False, "nan": False},
    "--seed": {"-1": None, "x": False, "1.5": False},
    "--output": {"/dev/full": False, "config.json": False},
}
MAX_TRAINING_SECONDS = 100


@functools.cache
def folders() -> Path:
    """Return a folder with ``base`` (a tiny stock model) and ``data``; `prepare` adds ``trained``."""
    root = Path(tempfile.mkdtemp(prefix="fuzz-cli-"))
    toy.toy_model(0, layers=2, hidden=16).save_pretrained(root / "base")
    toy.toy_tokenizer().save_pretrained(root / "base")
    sentences = [
        "the plot was dull .",
        "the cast was brilliant .",
        "the film was not funny .",
        "the music was superb .",
    ]
    for split, rows in (("train", 100), ("dev", 12)):
        lines = "".join(f"{i}\t{i % 2}\t{sentences[i % 4]}\n" for i in range(rows))
        (root / "data" / "sst2").mkdir(parents=True, exist_ok=True)
        (root / "data" / "sst2" / f"{split}.tsv").write_text(f"idx\tlabel\tsentence\n{lines}")
    return root


def prepare() -> None:
    """Train the model to evaluate, in a separate process: forks of a process that ran a backward pass may hang."""
    root = folders()
    demo.FULL = demo.QUICK = demo.Sizes(train_rows=64, rows=40, rounds=3, batches={1: 2, 32: 1})
    child = CONTEXT.Process(target=_train, args=(root,))
    child.start()
    child.join(MAX_TRAINING_SECONDS)
    if child.exitcode != 0:
        raise RuntimeError(f"earlyexit train with valid values ended with {child.exitcode}")


def _train(root: Path) -> None:
    code, _, err = command(root / "data", train_line(root / "base", root / "trained", []))
    if code:
        raise RuntimeError(err)


def train_line(base: Path, output: Path, changed: list[str]) -> list[str]:
    rows = ["--train-rows", "16", "--holdout", "52", "--epochs", "1", "--batch-size", "8", "--task", "sst2"]
    return ["train", "--model", str(base), "--output", str(output), *rows, *changed]


def command(data: Path, argv: list[str]) -> tuple[int, str, str]:
    """Run a command in this process; return its exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    variables = mock.patch.dict(os.environ, {DATA_VARIABLE: str(data), "HF_HUB_OFFLINE": "1"})
    with restored(), variables, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as stop:  # of argparse
            code = stop.code if isinstance(stop.code, int) else 1
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Restore the state of the process that commands change."""
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(1)


def run(case: Case) -> None:
    """Run one command with changed values or files."""
    root = folders()
    with tempfile.TemporaryDirectory(prefix="fuzz-run-") as name:
        here = Path(name)
        for name in ("base", "trained", "data"):
            shutil.copytree(root / name, here / name)
        values = (_values_of_train, _values_of_eval, _values_of_calibrate, _values_of_predict, _values_of_demo)
        kinds = (*values, _data, _data, _own_files, _own_files, _model, _recipe)
        before = Path.cwd()
        os.chdir(here)
        try:
            case.choice(kinds)(case, here)
        finally:
            os.chdir(before)


def judge(case: Case, here: Path, argv: list[str], verdict: bool | None, sound: Callable[[], str]) -> None:
    """Run a command and compare its exit code with the expected one; `case.note` describes the changes.

    Args:
        verdict: expected result for the values and files.
        sound: returns what is wrong with the result of a successful command, or "".
    """
    case.calls += 1
    code, _, err = command(here / "data", argv)
    line = " ".join(argv).replace(str(here), "$HERE")
    bars = re.compile(r"[^\n]*?\d+%\|[^\]\n]*\]")  # progress bars
    lines = [line for line in bars.sub("", err).splitlines() if line.strip()]
    if code not in (0, 2):
        raise WrongError(f"exit code {code} for {case.note}\n  {line}\n  {err[-500:]}")
    if code == 2:
        one = [line for line in lines if line.startswith("error: ") or ": error: " in line]
        if "Traceback" in err or len(one) != 1 or lines[-1] != one[0]:
            raise WrongError(
                f"exit code 2 without one last line for the error, for {case.note}\n  {line}\n  {err[-500:]}"
            )
        if verdict is True:
            raise WrongError(f"{case.note} refused: {lines[-1]}\n  {line}")
        return
    if verdict is False:
        raise AcceptedError(f"exit code 0 for {case.note}\n  {line}")
    if wrong := sound():
        raise AcceptedError(f"exit code 0 for {case.note}, but {wrong}\n  {line}")


def trained_well(folder: Path) -> str:
    """Return what is wrong with the output of `earlyexit train`, or an empty string."""
    if not (folder / "model.safetensors").is_file():
        return "no weights are saved"
    bad = [k for k, v in load_file(folder / "model.safetensors").items() if not bool(torch.isfinite(v).all())]
    scores = json.loads((folder / RECIPE_FILE).read_text())["scores"]
    if bad:
        return f"weights that are not finite are saved ({len(bad)} tensors)"
    return "" if all(math.isfinite(v) for score in scores for v in score.values()) else f"scores are {scores}"


def drawn(case: Case, table: dict[str, Values]) -> tuple[list[str], bool | None]:
    """Return one or two arguments and their expected result."""
    verdict: bool | None = True
    argv = []
    for name in case.draw.sample(sorted(table), case.choice((1, 1, 2))):
        value = case.choice(sorted(table[name]))
        argv += [f"{name}={value}"]
        expected = table[name][value]
        verdict = False if False in (verdict, expected) else None if None in (verdict, expected) else True
    case.note = " ".join(argv)
    return argv, verdict


def _values_of_train(case: Case, here: Path) -> None:
    argv, verdict = drawn(case, TRAIN)
    output = here / "new"
    judge(case, here, train_line(here / "base", output, argv), verdict, lambda: trained_well(output))


def _values_of_eval(case: Case, here: Path) -> None:
    argv, verdict = drawn(case, EVAL)
    judge(case, here, ["eval", "--model", str(here / "trained"), "--points", "8", *argv], verdict, lambda: "")


def _values_of_demo(case: Case, here: Path) -> None:
    argv, verdict = drawn(case, DEMO)
    shutil.copy(here / "trained" / "config.json", here / "config.json")
    judge(case, here, ["demo", "--quick", *argv], verdict, lambda: "")


def _values_of_calibrate(case: Case, here: Path) -> None:
    target = case.choice(sorted(TARGETS))
    argv, verdict = drawn(case, CALIBRATE)
    case.note = f"{target} {case.note}"
    (here / "other.csv").write_text("text,label\nthe plot was dull .,a\nthe cast was brilliant .,b\n")
    expected = TARGETS[target]
    both = False if False in (verdict, expected) else None if None in (verdict, expected) else True
    saved = (here / "trained" / "config.json").read_bytes()
    argv = ["calibrate", "--model", str(here / "trained"), *target.split(), *argv]

    def sound() -> str:
        changed = (here / "trained" / "config.json").read_bytes() != saved
        applied = any(argument.startswith("--apply") for argument in argv)
        return "" if changed == applied else f"config.json is {'' if changed else 'not '}changed"

    judge(case, here, argv, both, sound)


def _values_of_predict(case: Case, here: Path) -> None:
    rows = [("text", "truth"), ("the plot was dull .", "a"), ("the \u00e9 was", "")]
    (here / "rows.csv").write_text("".join(f"{a},{b}\n" for a, b in rows))
    (here / "rows.tsv").write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    (here / "other.csv").write_text("text,label\nthe plot was dull .,a\n")
    (here / "taken.csv").write_text("text,label,predicted_label\nthe plot was dull .,a,b\n")
    argv, verdict = drawn(case, PREDICT)
    output = next((value for name, _, value in (one.partition("=") for one in argv) if name == "--output"), "new.csv")
    given = ["--input=rows.csv", "--output=new.csv", *argv]

    def sound() -> str:
        return "" if Path(output).is_file() and Path(output).stat().st_size else f"{output} is not written"

    judge(case, here, ["predict", "--model", str(here / "trained"), *given], verdict, sound)


#: Own files: contents of train.csv, and the expected result.
OWN: dict[str, tuple[bytes, bool | None]] = {
    "classes": (b"text,label\n" + b"the plot was dull .,a\nthe cast was brilliant .,b\n" * 20, True),
    "quoted": (b"text,label\r\n" + b'"the plot, was dull .",a\r\n"the ""cast""\nwas .",b\r\n' * 20, True),
    "mixed labels": (b"text,label\n" + b"the plot was dull .,a\nthe cast was brilliant .,1\n" * 20, False),
    "one class": (b"text,label\n" + b"the plot was dull .,a\n" * 20, False),
    "empty label": (b"text,label\n" + b"the plot was dull .,\nthe cast was brilliant .,b\n" * 20, False),
    "NaN": (b"text,label\n" + b"the plot was dull .,nan\nthe cast was brilliant .,1.5\n" * 20, False),
    "doubled column": (b"text,label,text\n" + b"the plot was dull .,a,b\nthe cast was brilliant .,b,c\n" * 20, False),
    "no label": (b"text\n" + b"the plot was dull .\nthe cast was brilliant .\n" * 20, False),
    "open quote": (b"text,label\n" + b"the plot was dull .,a\nthe cast was brilliant .,b\n" * 20 + b'"the', False),
}


def _own_files(case: Case, here: Path) -> None:
    """Train on a file of one's own, which may be cut at any byte."""
    kind = case.choice(sorted(OWN))
    data, verdict = OWN[kind]
    if case.chance(0.3):
        kind, verdict, data = f"{kind}, cut", None, data[: case.integer(0, len(data))]
    (here / "train.csv").write_bytes(data)
    case.note = f"train.csv, {kind}"
    options = ["--train", "train.csv", "--epochs", "1", "--batch-size", "8"]
    argv = ["train", "--model", str(here / "base"), "--output", str(here / "new"), *options]
    judge(case, here, argv, verdict, lambda: trained_well(here / "new"))


#: Damage to a TSV file: function of its bytes, and the expected result.
FILES: dict[str, tuple[Callable[[bytes], bytes], bool | None]] = {
    "empty": (lambda data: b"", False),
    "header only": (lambda data: data.split(b"\n")[0] + b"\n", False),
    "no header": (lambda data: data.split(b"\n", 1)[1], False),
    "cut short": (lambda data: data[: len(data) * 2 // 3], None),
    "not UTF-8": (lambda data: data.replace(b"dull", b"d\xff\xfell"), False),
    "UTF-16": (lambda data: data.decode().encode("utf-16"), False),
    "byte order mark": (lambda data: b"\xef\xbb\xbf" + data, None),
    "NUL bytes": (lambda data: data.replace(b"plot", b"p\0ot"), None),
    "a long line": (lambda data: data.replace(b"dull", b"dull " * 60000, 1), None),
    "a column less": (lambda data: data.replace(b"\tthe plot", b" the plot", 1), False),
    "a column more": (lambda data: data.replace(b"the plot", b"the\tplot", 1), False),
    "label 7": (lambda data: data.replace(b"\t1\t", b"\t7\t", 1), False),
    "label nan": (lambda data: data.replace(b"\t1\t", b"\tnan\t", 1), False),
    "label -1": (lambda data: data.replace(b"\t1\t", b"\t-1\t", 1), False),
    "label 1.0": (lambda data: data.replace(b"\t1\t", b"\t1.0\t", 1), None),
    "carriage returns": (lambda data: data.replace(b"\n", b"\r\n"), True),
    "unknown words": (lambda data: data.replace(b"the", b"zzz").replace(b"was", b"qqq"), None),
    "empty sentences": (lambda data: data.replace(b"the plot was dull .", b""), None),
}


def _data(case: Case, here: Path) -> None:
    """Damage a TSV file, and run train or eval."""
    kind, split = case.choice(sorted(FILES)), case.choice(("train", "dev"))
    change, verdict = FILES[kind]
    path = here / "data" / "sst2" / f"{split}.tsv"
    if case.chance(0.1):
        kind, verdict = "a folder", None
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(change(path.read_bytes()))
    case.note = f"{split}.tsv, {kind}"
    output = here / "new"
    if case.chance(0.6):
        judge(case, here, train_line(here / "base", output, []), verdict, lambda: trained_well(output))
    else:
        judge(case, here, ["eval", "--model", str(here / "trained"), "--points", "8"], verdict, lambda: "")


def _model(case: Case, here: Path) -> None:
    """Damage the folder of a model, and run train or eval."""
    trains = case.chance(0.4)
    folder = here / ("base" if trains else "trained")
    path = case.choice(sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")))
    data = path.read_bytes()
    kind = case.choice(("cut", "empty", "gone", "folder", "list"))
    if kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "list": b"[]"}[kind])
    needed = path.name in ("config.json", "model.safetensors", RECIPE_FILE)
    verdict = False if needed else None
    output = here / "new"
    line = train_line(folder, output, []) if trains else ["eval", "--model", str(folder), "--points", "8"]
    case.note = f"{path.name}, {kind}"
    judge(case, here, line, verdict, lambda: trained_well(output) if trains else "")


#: Values that are invalid for most fields of recipes and criteria.
INVALID = ([], {}, "x", -1, 1e9, math.nan, True, [1], {"name": 3})


def _recipe(case: Case, here: Path) -> None:
    """Set an invalid value in the recipe or the config, and run eval."""
    name = case.choice((RECIPE_FILE, RECIPE_FILE, "config.json"))
    path = here / "trained" / name
    data = json.loads(path.read_text())
    key = (
        case.choice(sorted(data))
        if name == RECIPE_FILE
        else case.choice(("criterion", "method", "heads", "model_type"))
    )
    value = case.choice(INVALID)
    if case.chance(0.2):
        del data[key]
    else:
        data[key] = value
    path.write_text(json.dumps(data))
    case.note = f"{name} with {key} = {data.get(key, 'removed')!r}"
    rows = name == RECIPE_FILE and key in ("train_rows", "holdout", "seed", "task", "max_length")
    invalid = rows and key in data and data[key] not in (True, 1e9)
    arguments = ["eval", "--model", str(here / "trained"), "--points", "8"]
    judge(case, here, arguments, False if invalid else None, lambda: "")
