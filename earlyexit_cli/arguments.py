"""The arguments of each command, and the conversion of their values."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

METHODS = ("berxit", "dact", "deebert", "ensemble", "fastbert", "joint", "pabee", "palbert", "smartbert")
METRICS = ("accuracy", "matthews", "f1", "macro_f1", "pearson", "spearman", "auroc", "ece", "ndcg", "mrr")
ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet")
HOLDOUT = 1000
#: Characters of a value that an error shows.
SHOWN = 80


def _refuse(expected: str, text: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"expected {expected}, got {text[:SHOWN]!r}")


def number(low: float = -math.inf, high: float = math.inf, *, inside: bool = False) -> Callable[[str], float]:
    """Return a converter to a finite number in ``[low, high]``; with `inside` the ends are excluded."""
    ends = "({:g}, {:g})" if inside else "[{:g}, {:g}]"

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not (low < value < high if inside else low <= value <= high):
            _refuse(f"a finite number in {ends.format(low, high)}", text)
        return value

    return convert


def whole(low: int, high: int = 10**9) -> Callable[[str], int]:
    """Return a converter to a whole number in ``[low, high]``."""

    def convert(text: str) -> int:
        value = int(text) if text.strip().isdecimal() and len(text) < SHOWN else low - 1
        if not low <= value <= high:
            _refuse(f"a whole number in [{low}, {high}]", text)
        return value

    return convert


def text_of(what: str) -> Callable[[str], str]:
    """Return a converter that accepts a text that is not empty."""

    def convert(text: str) -> str:
        if not text.strip():
            _refuse(what, text)
        return text

    return convert


def path(text: str) -> Path:
    """Convert to a path; an empty one, which would be the current folder, is refused."""
    return Path(text_of("a path")(text)).expanduser()


def ending(*endings: str) -> Callable[[str], Path]:
    """Return a converter to a file name with one of these endings."""

    def convert(text: str) -> Path:
        file = path(text)
        if file.suffix.lower() not in endings:
            _refuse(f"a file name that ends in {', '.join(endings)}", text)
        return file

    return convert


def rate_or_same(text: str) -> float | None:
    """Convert to a learning rate, or None for ``same``."""
    return None if text == "same" else rate(text)


table, column = ending(*ENDINGS), text_of("the name of a column")
#: The upper limits are far above useful values and far below those at which libraries fail.
count, batch_size, seed = whole(1), whole(1, 10**6), whole(0, 2**32 - 1)
rate, share, milliseconds = number(0, 1, inside=True), number(0, 1, inside=True), number(0, 10**9, inside=True)


def _add_model(parser: argparse.ArgumentParser, what: str = "folder with a saved early-exit model") -> None:
    parser.add_argument("model", metavar="MODEL", type=path, help=what)


def _add_import(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        type=text_of("the name of a module"),
        help="module to import first, which registers criteria or model families of your own; repeatable",
    )


def _add_columns(parser: argparse.ArgumentParser, *names: str, default: str) -> None:
    helps = {
        "text": f"column of the text (default: {default}text)",
        "pair": f"column of the second text (default: {default}none)",
        "label": f"column of the label: names, or numbers (default: {default}label)",
        "group": f"column of the query to rank a row for (default: {default}none)",
    }
    for name in names:
        parser.add_argument(f"--{name}-column", metavar="NAME", type=column, help=helps[name])


def _add_unseen(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name labelled rows that the model was not trained on."""
    parser.add_argument(
        "--data", type=table, metavar="FILE", help="labelled rows (default: those that train kept in the folder)"
    )
    _add_columns(parser, "text", "pair", "label", "group", default="that of training, or ")
    parser.add_argument("--batch-size", type=batch_size, default=32, help="rows per batch (default: %(default)s)")


def add_train(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit train`."""
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        type=text_of("a folder or a hub name"),
        help="folder or hub name of an encoder or a classifier",
    )
    add(
        "--data",
        required=True,
        type=table,
        metavar="FILE",
        help="labelled rows: a CSV, TSV, JSON lines or Parquet file",
    )
    add("--output", required=True, type=path, metavar="DIR", help="folder to save the model in")
    _add_columns(parser, "text", "pair", "label", "group", default="")
    add(
        "--problem",
        choices=("classes", "regression"),
        help="what numbers as labels are (default: classes if they are whole, else regression)",
    )
    unseen = parser.add_mutually_exclusive_group().add_argument
    unseen("--dev", type=table, metavar="FILE", help="rows to choose and report on (default: rows held out)")
    unseen("--holdout", type=whole(1), help=f"number of rows to hold out (default: a fifth, at most {HOLDOUT})")
    add(
        "--no-keep-rows",
        dest="keep_rows",
        action="store_false",
        help="do not save the rows that were not trained on with the model, texts included",
    )
    add("--overwrite", action="store_true", help="replace a model that --output has already")
    add(
        "--method",
        type=text_of("a method"),
        choices=METHODS,
        default="joint",
        help="training method (default: %(default)s)",
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the method, repeatable: ponder=0.05")
    add(
        "--pooling",
        choices=("first", "mean", "family"),
        help="input of the exits: the first token, the mean of the tokens, or what the head of the base model reads "
        "(default: that of a trained classifier, mean for an encoder without one)",
    )
    add("--form", choices=("linear", "attention"), help="form of the exits (default: that of the method's paper)")
    add(
        "--epochs",
        type=number(0, 10_000, inside=True),
        nargs="+",
        help="one number for all phases, or one per phase (default: those of the paper)",
    )
    add("--lr", type=rate, nargs="+", help="peak learning rate of the encoder, likewise (default: those of the paper)")
    add(
        "--head-lr",
        type=rate_or_same,
        default=1e-3,
        help="peak learning rate of the exits, or 'same' for the encoder's as in the papers, with which new exits "
        "learn little in few epochs (default: %(default)s)",
    )
    add("--gate-lr", type=rate, help="peak learning rate of skip gates (default: the encoder's)")
    add("--batch-size", type=batch_size, default=32, help="rows per batch (default: %(default)s)")
    add("--bf16", action="store_true", help="train in bfloat16 mixed precision, faster on processors that have it")
    add("--max-length", type=batch_size, default=128, help="tokens at which longer rows are cut (default: %(default)s)")
    add("--seed", type=seed, default=0, help="random seed (default: %(default)s)")
    _add_import(parser)


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit calibrate`."""
    add = parser.add_argument
    _add_model(parser)
    target = parser.add_mutually_exclusive_group(required=True).add_argument
    target("--max-drop", type=number(0, 0.5), help="target: maximum loss of the score, e.g. 0.005")
    target("--speed-up", type=number(1, 1000), help="target: layers of the model per layer run, e.g. 2")
    target("--latency-ms", type=milliseconds, help="target: milliseconds of a batch on this machine")
    target("--risk", type=share, help="target: guaranteed maximum share of rows made wrong, e.g. 0.01")
    add("--latency-batch-size", type=batch_size, help="rows of a batch of --latency-ms (default: 1)")
    add("--epsilon", type=share, help="probability that --risk is exceeded (default: 0.05)")
    add(
        "--against",
        choices=("labels", "full_depth"),
        help="--risk counts rows that full depth answers correctly, or rows with another answer than full depth "
        "(default: labels)",
    )
    add("--criterion", type=text_of("a criterion"), default="auto", help="rule to save (default: the best of all)")
    add("--per-layer", action="store_true", help="search for a threshold of each layer too")
    add("--temperature", action="store_true", help="first scale the logits of each exit, which changes the weights")
    add("--metric", choices=METRICS, help="score (default: accuracy, or by what the labels are)")
    add("--dry-run", action="store_true", help="only show the table and the choice, save nothing")
    add("--output", type=path, metavar="FILE", help="JSON file to write")
    _add_unseen(parser)
    _add_import(parser)


def add_eval(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit eval`."""
    add = parser.add_argument
    _add_model(parser)
    _add_unseen(parser)
    add("--metric", choices=METRICS, nargs="+", help="scores, the first of which decides (default: by the labels)")
    add("--drop", type=number(0, 2), help="loss allowed where settings are chosen (default: that of calibrate, or 0)")
    add("--report", type=ending(".html"), metavar="PAGE", help="HTML page to write; its numbers go beside it as .json")
    add("--no-texts", dest="texts", action="store_false", help="leave the texts of the rows out of the page")
    add("--output", type=path, metavar="FILE", help="JSON file with every setting tried")
    _add_import(parser)


def add_predict(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit predict`."""
    add = parser.add_argument
    _add_model(parser)
    add(
        "input",
        metavar="INPUT",
        nargs="*",
        type=text_of("a file"),
        help="CSV, TSV, JSON lines or Parquet file; with a folder as --output any number of files, folders, patterns "
        "and URIs, such as s3://bucket/*.parquet",
    )
    add("--text", action="append", type=text_of("a text"), help="a text; repeatable; the answers are printed")
    add(
        "--output",
        type=path,
        help="new file: the columns of INPUT, and label, score and exit_layer; or a folder, for Parquet files",
    )
    add(
        "--no-truncate",
        dest="truncate",
        action="store_false",
        help="do not answer rows that are too long, instead of cutting them",
    )
    _add_columns(parser, "text", "pair", default="that of training, or ")
    add("--max-tokens", type=count, default=4096, help="tokens per batch (default: %(default)s)")
    add(
        "--workers",
        type=count,
        help="copies of the model for a folder; more than one on Ray, on this machine or the cluster of RAY_ADDRESS "
        "(default: 1)",
    )
    add("--overwrite", action="store_true", help="remove what an earlier run wrote to the folder, instead of going on")
    _add_import(parser)


def add_serve(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit serve`."""
    add = parser.add_argument
    _add_model(parser)
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is every one (default: %(default)s)")
    add("--port", type=whole(0, 65535), default=8000, help="port; 0 is any free one (default: %(default)s)")
    add("--workers", type=count, default=1, help="processes with a copy of the model each (default: %(default)s)")
    add("--max-tokens", type=count, default=2048, help="tokens of a batch (default: %(default)s)")
    add(
        "--max-wait-ms",
        type=milliseconds,
        default=5000.0,
        help="an input that no worker has begun after this time is refused with 503 (default: %(default)s)",
    )
    add("--max-queue", type=count, default=4096, help="inputs that may wait; more get 503 (default: %(default)s)")
    add("--max-inputs", type=count, default=256, help="inputs of a request; more get 413 (default: %(default)s)")
    add("--max-body-bytes", type=count, default=2**20, help="size of a request (default: %(default)s)")
    _add_import(parser)


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit demo`."""
    add = parser.add_argument
    add("--output", type=path, default=Path("demo_output"), metavar="DIR", help="output folder (default: %(default)s)")
    add("--threads", type=whole(1, 1024), default=1, help="CPU threads; more do not help (default: %(default)s)")
    add("--quick", action="store_true", help="train on a tenth of the rows: shows the steps, not the result")
