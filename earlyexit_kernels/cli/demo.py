"""Run train, calibrate, eval and predict on generated sentences, and measure the time that early exit saves."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from earlyexit_cli import main
from earlyexit_kernels.cli.saved import load_saved
from earlyexit_kernels.data import toy
from earlyexit_kernels.data.rows import Split, encode
from earlyexit_kernels.data.table import write_table
from earlyexit_kernels.tuning.tables import environment, markdown_table
from earlyexit_kernels.tuning.timing import interleave, paired_ratio

#: Levels of difficulty: plain sentences, and those with a concessive clause that says the opposite.
LEVELS = (1, 3)
#: Generated sentences, of which those of `LEVELS` are used; rows to classify; timed rounds. In full and with --quick.
FULL, QUICK = (24_000, 1000, 15), (2_400, 100, 3)
NAMES = ("bad", "good")
STEPS = {
    "Train an exit after every layer; a fifth of the rows is held out": "train {0}/base --data {0}/reviews.csv "
    "--output {0}/model --epochs 6 --lr 1e-3 --overwrite",
    "Choose the fastest rule that loses at most two points on the rows held out": "calibrate {0}/model --max-drop 0.02",
    "Say what every rule reaches, and draw it": "eval {0}/model --report {0}/report.html",
    "Classify other sentences": "predict {0}/model {0}/new.csv --output {0}/predictions.csv",
}
QUICK_NOTE = "--quick trains too little for meaningful numbers: those below only show the format."


def run(args: argparse.Namespace) -> int:
    """Write the files, run the steps, and time the model."""
    torch.set_num_threads(args.threads)
    generated, new, rounds = QUICK if args.quick else FULL
    folder: Path = args.output
    print(f"{environment()['cpu']}, {args.threads} thread(s), torch {torch.__version__}")
    if args.quick:
        print(QUICK_NOTE)
    texts = write_files(folder, generated, new)
    for number, (what, line) in enumerate(STEPS.items(), start=1):
        words = [word.format(folder) for word in line.split()]
        print(f"\n{number}. {what}\n\n    earlyexit {shlex.join(words)}\n", flush=True)
        if code := main(words):
            return code
    print(f"\n{len(STEPS) + 1}. Time it with and without early exit; both take turns\n")
    print(time_table(folder / "model", texts, rounds))
    return 0


def write_files(folder: Path, generated: int, new: int) -> list[str]:
    """Write a stock model, labelled sentences and sentences to classify; return the latter."""
    toy.toy_model(layers=4, hidden=64).save_pretrained(folder / "base")
    toy.toy_tokenizer().save_pretrained(folder / "base")
    rows = [row for row in toy.write_splits(train_rows=generated)["train"] if row.level in LEVELS]
    first, others = rows[:-new], [row.text for row in rows[-new:]]
    columns = {"text": [row.text for row in first], "label": [NAMES[row.label] for row in first]}
    for name, table in {"reviews.csv": columns, "new.csv": {"text": others}}.items():
        (folder / name).unlink(missing_ok=True)
        write_table(folder / name, table)
    (folder / "predictions.csv").unlink(missing_ok=True)
    return others


def time_table(folder: Path, texts: list[str], rounds: int) -> str:
    """Return a table of the milliseconds of a text, and of the time and the layers saved."""
    saved = load_saved(folder)
    model, criterion = saved.model, saved.model.criterion
    data = encode(Split(texts, [0] * len(texts)), saved.tokenizer)
    table = []
    for size in (1, 32):
        starts = range(0, min(len(texts), 96), size)
        batches = [saved.collate([{"input_ids": row["input_ids"]} for row in data[i : i + size]]) for i in starts]
        layers: list[float] = []

        def caller(rule: Any, batches: list[Any] = batches, layers: list[float] = layers) -> Callable[[], None]:
            def answer() -> None:
                model.set_criterion(rule)
                with torch.inference_mode():
                    for batch in batches:
                        layers.extend(model(**batch.to(model.device)).exit_layer.tolist() if rule else ())
                        if not rule:
                            model(**batch.to(model.device))

            return answer

        times = interleave({"full depth": caller(None), "early exit": caller(criterion)}, repeats=rounds, warmup=2)
        ratio = paired_ratio(times["early exit"], times["full depth"])
        rows = sum(len(batch["input_ids"]) for batch in batches)
        ms = (f"{sorted(times[name])[len(times[name]) // 2] / rows:.2f}" for name in ("full depth", "early exit"))
        spread = f"{1 - ratio.median:.0%} ({1 - ratio.high:.0%} to {1 - ratio.low:.0%})"
        share = 1 - sum(layers) / len(layers) / model.depth if layers else 0.0
        table.append((size, *ms, spread, f"{share:.0%}"))
    return markdown_table(
        ("batch", "full depth, ms a text", "early exit, ms a text", "time saved", "layers saved"), table
    )
