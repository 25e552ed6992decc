"""Values of the options of the command line that must be refused."""

from __future__ import annotations

REQUIRED = {
    "train": ["base", "--data", "in.csv", "--output", "out"],
    "calibrate": ["trained", "--max-drop", "0.1"],
    "eval": ["trained"],
    "predict": ["trained", "in.csv", "--output", "out.csv"],
    "serve": ["trained"],
    "demo": [],
    "env": [],
}
NUMBERS = ["nan", "inf", "-1", "x", ""]
FILES = ["", " ", "rows", "rows.txt", "rows.csv.gz", ".."]
COLUMNS = {"--text-column": ["", " "], "--pair-column": [""]}
UNSEEN = {
    "--data": FILES,
    **COLUMNS,
    "--label-column": [""],
    "--group-column": [""],
    "--batch-size": [*NUMBERS, "0"],
    "--output": [""],
    "--import": ["", " "],
}
#: Command -> option -> values that must be refused.
INVALID = {
    "train": {
        "--data": FILES,
        "--dev": FILES,
        **COLUMNS,
        **dict.fromkeys(("--label-column", "--group-column"), ("",)),
        "--problem": ["", "numbers"],
        "--no-keep-rows": ["yes"],
        "--output": [""],
        "--method": ["", "magic"],
        "--pooling": ["max", "none"],
        "--form": ["bilinear", ""],
        "--holdout": [*NUMBERS, "0", "1e3", "1.5", "9" * 5000],
        "--epochs": [*NUMBERS, "0", "1e9", "1e400"],
        "--lr": [*NUMBERS, "0", "2", "1e400"],
        "--head-lr": [*NUMBERS, "0", "2", "Same"],
        "--gate-lr": [*NUMBERS, "0", "2"],
        "--batch-size": [*NUMBERS, "0", "1.5", "9" * 30],
        "--max-length": [*NUMBERS, "0", "-5", "1e9"],
        "--seed": [*NUMBERS, "4294967296"],
        "--import": ["", " "],
        "--nothing": ["1"],
    },
    "calibrate": {
        **UNSEEN,
        "--max-drop": [*NUMBERS, "3"],
        "--speed-up": [*NUMBERS, "0.5", "1e9"],
        "--latency-ms": [*NUMBERS, "0"],
        "--risk": [*NUMBERS, "0", "1"],
        "--latency-batch-size": [*NUMBERS, "0"],
        "--epsilon": [*NUMBERS, "0", "1"],
        "--against": ["", "both"],
        "--metric": ["bleu", ""],
        "--criterion": ["", " "],
        "--per-layer": ["yes"],
        "--temperature": ["2"],
        "--dry-run": ["no"],
    },
    "eval": {
        **UNSEEN,
        "--drop": [*NUMBERS, "3"],
        "--metric": ["bleu", ""],
        "--report": ["", "page.htm", "page", ".html"],
        "--no-texts": ["yes"],
    },
    "predict": {
        **COLUMNS,
        "--text": ["", " "],
        "--output": ["", " "],
        "--no-truncate": ["1"],
        "--overwrite": ["1"],
        "--max-tokens": [*NUMBERS, "0"],
        "--workers": [*NUMBERS, "0"],
        "--import": [""],
    },
    "serve": {
        "--port": [*NUMBERS, "65536"],
        "--max-wait-ms": [*NUMBERS, "0"],
        **{f"--{name}": [*NUMBERS, "0"] for name in ("workers", "max-tokens", "max-queue", "max-inputs")},
        "--max-body-bytes": [*NUMBERS, "0"],
        "--import": [""],
    },
    "demo": {"--output": [""], "--threads": [*NUMBERS, "0", "1000000000"]},
    "env": {"--nothing": ["1"]},
}
