"""Parse the arguments of the command `earlyexit`, without importing torch.

Importing `earlyexit_kernels` imports torch and transformers, which takes seconds. This module lies beside the package,
so that ``--help`` and ``--version`` answer at once; the package is imported to check a value or to run a command.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

TASKS = ("toy", "sst2", "cola", "mrpc", "rte", "stsb", "wnli", "qnli", "trec")
METHODS = ("berxit", "dact", "deebert", "ensemble", "fastbert", "joint", "pabee", "palbert", "smartbert")
POOLINGS = ("first", "mean", "family")
FORMS = ("linear", "attention")
HOLDOUT = 1000


class Parser(argparse.ArgumentParser):
    """A parser that reports an error in one line on stderr."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"error: {' '.join(message.split())}; `{self.prog} --help` lists the arguments\n")


class Version(argparse.Action):
    """Print the version of the installed package."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        print(f"earlyexit {_version()}")
        parser.exit()


def _version() -> str:
    try:
        return importlib.metadata.version("earlyexit_kernels")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        from earlyexit_kernels import __version__

        return __version__


def _checked(name: str) -> Callable[[str], Any]:
    """Return the converter `name` of `earlyexit_kernels.cli.arguments`, imported when there is a value to convert."""

    def convert(text: str) -> Any:
        from earlyexit_kernels.cli import arguments

        return getattr(arguments, name)(text)

    return convert


def add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit demo`."""
    add = parser.add_argument
    add("--output", type=_checked("path"), default=Path("demo_output"), help="output folder (default: %(default)s)")
    add("--seed", type=_checked("seed"), default=0, help="random seed (default: %(default)s)")
    add("--threads", type=_checked("threads"), default=1, help="CPU threads; more do not help (default: %(default)s)")
    add("--quick", action="store_true", help="train on a tenth of the rows: shows the steps, not the result")


def _add_rows_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the rows to train on."""
    add = parser.add_argument
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--task", type=_checked("task"), help=f"one of {', '.join(TASKS)}")
    rows.add_argument("--train", type=_checked("table"), help="own rows: a CSV, TSV, JSON lines or Parquet file")
    add("--dev", type=_checked("table"), help="rows to report on, with --train (default: the rows held out)")
    add("--text-column", type=_checked("column"), help="column of the text, with --train (default: text)")
    add("--pair-column", type=_checked("column"), help="column of the second text, with --train (default: none)")
    add(
        "--label-column",
        type=_checked("column"),
        help="column of the label, with --train: names, whole numbers (classes) or decimals (default: label)",
    )
    add("--group-column", type=_checked("column"), help="column of the query to rank a row for, with --train")


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit train`."""
    add = parser.add_argument
    add("--model", required=True, type=_checked("source"), help="folder or hub name of an encoder or a classifier")
    _add_rows_arguments(parser)
    add("--output", required=True, type=_checked("path"), help="folder to save the model in")
    add("--overwrite", action="store_true", help="replace a model that --output has already")
    add(
        "--method", type=_checked("method"), default="joint", help=f"one of {', '.join(METHODS)} (default: %(default)s)"
    )
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="option of the method, repeatable: ponder=0.05")
    add(
        "--pooling",
        choices=POOLINGS,
        help="input of the exits: the first token, the mean of the tokens, or what the head of the base model reads "
        "(default: that of a trained classifier, mean for an encoder without one)",
    )
    add("--form", choices=FORMS, help="form of the exits (default: that of the method's paper)")
    add("--train-rows", type=_checked("rows"), help="number of rows to train on (default: all that are not held out)")
    add(
        "--holdout",
        type=_checked("rows_or_none"),
        help=f"number of train rows held out to tune thresholds (default: {HOLDOUT}; of --train at most a fifth, and "
        "none if there is a --dev)",
    )
    add(
        "--epochs",
        type=_checked("epochs"),
        nargs="+",
        help="one number for all phases, or one per phase (default: those of the paper)",
    )
    add(
        "--lr",
        type=_checked("learning_rate"),
        nargs="+",
        help="peak learning rate of the encoder, for all phases or one per phase (default: those of the paper)",
    )
    add(
        "--head-lr",
        type=_checked("rate_or_same"),
        default=1e-3,
        help="peak learning rate of the exits, or 'same' for the encoder's as in the papers, with which new exits "
        "learn little in few epochs (default: %(default)s)",
    )
    add("--halting-lr", type=_checked("learning_rate"), help="peak learning rate of halting heads (default: --head-lr)")
    add("--gate-lr", type=_checked("learning_rate"), help="peak learning rate of skip gates (default: the encoder's)")
    add("--batch-size", type=_checked("batch_size"), default=32, help="rows per batch (default: %(default)s)")
    add("--bf16", action="store_true", help="train in bfloat16 mixed precision, faster on processors that have it")
    add("--max-length", type=_checked("max_length"), default=128, help="maximum tokens per row (default: %(default)s)")
    add("--seed", type=_checked("seed"), default=0, help="random seed (default: %(default)s)")


def add_dev_argument(parser: argparse.ArgumentParser) -> None:
    """Add the argument that replaces the rows of a model trained with --train."""
    parser.add_argument(
        "--dev",
        type=_checked("table"),
        help="file with other rows, in the columns of the file that the model was trained on (default: the rows that "
        "were held out, or the dev file)",
    )


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit eval`."""
    add = parser.add_argument
    add("--model", required=True, type=_checked("path"), nargs="+", help="folders written by `earlyexit train`")
    add("--task", type=_checked("task"), help="task to evaluate on (default: the one the model was trained on)")
    add_dev_argument(parser)
    add(
        "--drop",
        type=_checked("drop"),
        default=0.0,
        help="maximum score loss allowed on the tuning split (default: %(default)s)",
    )
    add(
        "--points",
        type=_checked("points"),
        default=24,
        help="number of thresholds to try per criterion, at least 8 (default: %(default)s)",
    )
    add("--batch-size", type=_checked("batch_size"), default=32, help="rows per batch (default: %(default)s)")
    add(
        "--metric",
        type=_checked("metric"),
        nargs="+",
        help="scores, the first of which decides (default: those of the task, or accuracy)",
    )
    add("--output", type=_checked("path"), help="JSON file to write")
    add("--plot", type=_checked("png"), help="PNG file to write; NAME-1.png, NAME-2.png, ... for several models")


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit report`."""
    add = parser.add_argument
    add("--model", required=True, type=_checked("path"), help="folder written by `earlyexit train`")
    add(
        "--output",
        type=_checked("page"),
        default=Path("report.html"),
        help="HTML file to write; the numbers go beside it, with the ending .json (default: %(default)s)",
    )
    add(
        "--drop",
        type=_checked("drop"),
        help="maximum score loss on the held-out rows, for the settings of the other rules (default: that of the "
        "model's calibration, or 0)",
    )
    add("--batch-size", type=_checked("batch_size"), default=32, help="rows per batch (default: %(default)s)")
    add_dev_argument(parser)
    add("--no-texts", action="store_true", help="leave the texts of the rows out of both files")


def add_calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit calibrate`."""
    add = parser.add_argument
    add("--model", required=True, type=_checked("path"), help="folder written by `earlyexit train`")
    target = parser.add_mutually_exclusive_group(required=True).add_argument
    target("--max-drop", type=_checked("max_drop"), help="target: maximum loss of the score, e.g. 0.005")
    target("--speed-up", type=_checked("speed_up"), help="target: layers of the model per layer run, e.g. 2")
    target("--latency-ms", type=_checked("milliseconds"), help="target: milliseconds of a batch on this machine")
    target(
        "--risk", type=_checked("probability"), help="target: guaranteed maximum share of rows made wrong, e.g. 0.01"
    )
    add("--latency-batch-size", type=_checked("batch_size"), help="rows of a batch of --latency-ms (default: 1)")
    add("--epsilon", type=_checked("probability"), help="probability that --risk is exceeded (default: 0.05)")
    add(
        "--against",
        choices=("labels", "full_depth"),
        help="--risk counts rows that full depth answers correctly, or rows with another answer than full depth "
        "(default: labels)",
    )
    add("--metric", type=_checked("metric"), help="score, e.g. macro_f1 (default: that of the task, or accuracy)")
    add_dev_argument(parser)
    add("--batch-size", type=_checked("batch_size"), default=32, help="rows per batch (default: %(default)s)")
    add(
        "--apply",
        type=_checked("rule"),
        metavar="CRITERION",
        help="save this criterion with the model, or `auto` for the best of all",
    )
    add("--output", type=_checked("path"), help="JSON file to write")


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit predict`."""
    add = parser.add_argument
    add("--model", required=True, type=_checked("path"), help="folder with a saved early-exit model")
    rows = parser.add_mutually_exclusive_group(required=True).add_argument
    rows("--input", type=_checked("table"), help="CSV, TSV, JSON lines or Parquet file to read")
    rows("--text", action="append", help="a text; repeatable; the answers are printed")
    add(
        "--output",
        type=_checked("table"),
        help="new file: the columns of --input, and label, score and exit_layer (predicted_label, ... if it has these)",
    )
    _add_scorer_arguments(parser)


def _add_scorer_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that predict and score share."""
    add = parser.add_argument
    add("--text-column", type=_checked("column"), help="column of the text (default: that of training, or text)")
    add("--pair-column", type=_checked("column"), help="column of the second text (default: that of training)")
    add("--max-tokens", type=_checked("count"), default=4096, help="tokens per batch (default: %(default)s)")


def add_score_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit score`."""
    add = parser.add_argument
    add("--model", required=True, type=_checked("path"), help="folder with a saved early-exit model")
    add(
        "--input", required=True, nargs="+", help="files, folders or patterns; also URIs, such as s3://bucket/*.parquet"
    )
    add("--output", required=True, type=_checked("path"), help="folder for a Parquet file of each unit of the input")
    _add_scorer_arguments(parser)
    add("--truncate", action="store_true", help="cut texts that are too long, which otherwise have no answer")
    add(
        "--workers",
        type=_checked("count"),
        default=1,
        help="copies of the model; more than one on Ray, on this machine or the cluster of RAY_ADDRESS (default: 1)",
    )
    add("--overwrite", action="store_true", help="remove the rows of an earlier run, instead of going on with it")


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `earlyexit serve`."""
    add = parser.add_argument
    count = _checked("count")
    add("model", metavar="MODEL", type=_checked("path"), help="folder with a saved early-exit model")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 is every one (default: %(default)s)")
    add("--port", type=_checked("port"), default=8000, help="port; 0 is any free one (default: %(default)s)")
    add("--workers", type=count, default=1, help="processes with a copy of the model each (default: %(default)s)")
    add("--max-tokens", type=count, default=2048, help="tokens of a batch (default: %(default)s)")
    add(
        "--max-wait-ms",
        type=_checked("milliseconds"),
        default=5000.0,
        help="an input that no worker has begun after this time is refused with 503 (default: %(default)s)",
    )
    add("--max-queue", type=count, default=4096, help="inputs that may wait; more get 503 (default: %(default)s)")
    add("--max-inputs", type=count, default=256, help="inputs of a request; more get 413 (default: %(default)s)")
    add("--max-body-bytes", type=count, default=2**20, help="size of a request (default: %(default)s)")


def add_no_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: `earlyexit env` takes no arguments."""


class Command(NamedTuple):
    """A command of `earlyexit`.

    Attributes:
        summary: one line for ``earlyexit --help``.
        details: further lines for ``earlyexit <command> --help``.
        add_arguments: adds the arguments to a parser.
    """

    summary: str
    details: str
    add_arguments: Callable[[argparse.ArgumentParser], None]


COMMANDS = {
    "demo": Command(
        "Train a small early-exit model on a generated task and measure the time that early exit saves.",
        "Takes about a minute and a half on two CPU cores and needs no network. All printed numbers are measured.",
        add_demo_arguments,
    ),
    "train": Command(
        "Train a classifier with an exit after every layer, with the Trainer of transformers.",
        "Saves the model, its tokenizer and earlyexit_task.json (the rows trained on and the score of every exit)\n"
        "in --output, from where `earlyexit eval` reads them.",
        add_train_arguments,
    ),
    "eval": Command(
        "Choose a threshold for every criterion on held-out train rows, and report on the dev split.",
        "Prints tables; --output writes every point as JSON, --plot draws score against layers run. The exit rule\n"
        "from the method's paper is listed first and marked with *. Rules that skip layers run the model once per\n"
        "threshold; all others are replayed from one full-depth pass.",
        add_eval_arguments,
    ),
    "report": Command(
        "Write a page about a model: what early exit costs and saves, which rows leave where, and what to mend.",
        "Describes the criterion saved with the model, or one chosen on the held-out rows. The HTML page needs no\n"
        "network and no script; every number in it is also in the JSON file. Requires the extra plot.",
        add_report_arguments,
    ),
    "calibrate": Command(
        "Choose the setting of every criterion for a target, and save one with the model.",
        "Runs the model once over the rows that were held out, or the dev file. Every setting is chosen on one half\n"
        "of them and measured on the other half. --apply changes config.json and the model card, not the weights.",
        add_calibrate_arguments,
    ),
    "predict": Command(
        "Classify the rows of a file, or texts, with a saved early-exit model.",
        "Adds the columns label, score and exit_layer to those of the input. An existing file is not overwritten.",
        add_predict_arguments,
    ),
    "score": Command(
        "Classify the rows of many files, in this process or by workers of Ray.",
        "Writes to --output the columns of the input, label, score, exit_layer and error. The same command again\n"
        "goes on where a run has ended. Requires the extra ray.",
        add_score_arguments,
    ),
    "serve": Command(
        "Serve a saved early-exit model over HTTP.",
        "Listens when the model is loaded: POST /predict, and /, /health, /info, /metrics. SIGTERM ends it when the\n"
        "requests under way are answered. Clients must send the key in the variable EARLYEXIT_API_KEY, where there is\n"
        "one. Requires the extra serve.",
        add_serve_arguments,
    ),
    "env": Command("Show versions, the machine, and the back-ends that are available.", "", add_no_arguments),
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(prog="earlyexit", description="Early exit for Hugging Face text classifiers.")
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    debug: dict[str, Any] = {"action": "store_true", "help": "show the traceback of an error"}
    parser.add_argument("--debug", **debug)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        added = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary}\n\n{command.details}".rstrip(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(added)
        added.add_argument("--debug", default=argparse.SUPPRESS, **debug)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments after the program's name (default: those of the process).

    Returns:
        exit code: 0, 2 after an error in the input, reported in one line on stderr, or 130 after an interrupt.
    """
    args = build_parser().parse_args(argv)
    from earlyexit_kernels.cli import run  # after --help and --version have been answered

    return run(args)


if __name__ == "__main__":
    raise SystemExit(main())
