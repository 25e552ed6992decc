"""The model card of a trained model: README.md in its folder, with a section that a calibration renews."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from earlyexit_kernels.cli.saved import HELD_OUT, Record
from earlyexit_kernels.criteria import from_dict
from earlyexit_kernels.data.rows import NUMBERS, Labels, listed
from earlyexit_kernels.tuning.record import Calibration
from earlyexit_kernels.tuning.tables import markdown_table, parameter_text

README = "README.md"
#: Around the section of the calibration; everything outside of it stays when it is renewed.
BEGIN, END = "<!-- earlyexit: calibration -->", "<!-- earlyexit: end -->"
SECTION = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
#: Rows of the table of the curve.
CURVE_ROWS = 12
CARD = """---
library_name: transformers
pipeline_tag: text-classification
tags:
- early-exit
---

# {title}

A {family} encoder of {depth} layers with an exit after every layer, trained with `earlyexit_kernels` by the method
`{method}`.

- Rows: {rows}
- Labels: {labels}

## Use

```python
import earlyexit_kernels  # first: it registers the model type "early-exit"
from transformers import pipeline

classify = pipeline("text-classification", model="{folder}", truncation=True, max_length={length})
print(classify({example}))
```

## Score of every exit

On {evaluation_rows} {evaluation}, which the model was not trained on.

{scores}

{calibration}
"""
NOT_CALIBRATED = """## Calibration

No criterion is set, so that every row runs all layers. This chooses one:

    earlyexit calibrate {folder} --max-drop 0.005
"""


def card(folder: Path, record: Record, labels: Labels, model: Any, *, length: int, keep: bool) -> str:
    """Return the model card after training; files are named without their folders.

    Args:
        folder: of the model.
        record: of the training.
        labels: what the model predicts.
        model: the trained model.
        length: maximum tokens of a row.
        keep: whether the rows that were not trained on are saved in the folder.
    """
    columns = record.columns
    texts = " and ".join(_plain(name) for name in (columns.text, columns.pair) if name is not None)
    query = "" if columns.group is None else f", query in {_plain(columns.group)}"
    kept = f"; the latter are in {HELD_OUT}, texts included" if keep else ""
    return CARD.format(
        title=f"Early exits for {_plain(record.data)}",
        family=model.config.backbone_config.model_type,
        depth=model.depth,
        method=model.method.name,
        rows=f"file {_plain(record.data)}, column {texts}, label in {_plain(columns.label)}{query}; {record.rows} rows "
        f"trained on, {record.unseen_rows} {_plain(record.unseen)} not trained on (seed {record.seed}){kept}",
        labels="numbers (regression)"
        if labels.problem_type == NUMBERS
        else f"{len(labels.names)} classes, {_plain(listed(labels.names))}",
        folder=folder.name,
        length=length,
        example='{"text": "a text", "text_pair": "its pair"}' if columns.pair else '"a text"',
        evaluation_rows=record.unseen_rows,
        evaluation=_plain(record.unseen),
        scores=score_table(record.scores, tuple(record.scores[0])),
        calibration=f"{BEGIN}\n{NOT_CALIBRATED.format(folder=folder.name)}{END}",
    )


def score_table(scores: Sequence[Mapping[str, float]], metrics: Sequence[str]) -> str:
    """Return a table of the metrics of each exit alone."""
    rows = [(k, *(f"{score[m]:.4f}" for m in metrics)) for k, score in enumerate(scores, start=1)]
    return markdown_table(("exit after layer", *metrics), rows)


def _plain(text: str) -> str:
    """Return a text on one line, without characters that begin code or HTML."""
    return re.sub(r"[`<>]", "", " ".join(text.split()))


def renewed(folder: Path, found: Calibration) -> str | None:
    """Return the model card of a folder with the section of a calibration; None if it has no such section."""
    path = folder / README
    if not path.is_file() or BEGIN.encode() not in path.read_bytes():
        return None
    text = path.read_text(encoding="utf-8")
    return SECTION.sub(lambda _: f"{BEGIN}\n{_section(found)}\n{END}", text, count=1) if SECTION.search(text) else None


def _section(found: Calibration) -> str:
    target = ", ".join(f"{name} {value}" for name, value in found.target.items())
    low, high = found.drop_interval
    facts = [
        ("criterion", f"{found.criterion.name}, {parameter_text(found.criterion)}"),
        ("target", target.removeprefix("name ")),
        (f"{found.metric}, early exit", f"{found.score:.4f}"),
        (f"{found.metric}, full depth", f"{found.full_depth:.4f}"),
        ("drop", f"{found.drop:.4f} (95 %: {low:.4f} to {high:.4f})"),
        ("mean exit layer", f"{found.mean_exit_layer:.2f} of {found.depth}"),
        ("layer speed-up", f"{found.layer_speed_up:.2f}"),
        ("rows that leave at each layer", " ".join(f"{share:.0%}" for share in found.exit_shares)),
    ]
    if found.guarantee is not None:
        g = found.guarantee
        bound = f"at most {g.delta:g} with probability {1 - g.epsilon:g}, measured {g.risk:.4f}"
        facts.append((f"risk against {g.against}", bound))
    if found.latency is not None:
        facts.append(("latency", f"{found.latency:.2f} ms a batch"))
    # settings that differ in neither number are one row
    points = {(f"{p.mean_exit_layer:.2f}", f"{p.score:.4f}"): _setting(p.criterion) for p in found.curve}
    step = -(-len(points) // CURVE_ROWS) or 1
    curve = [(setting, *numbers) for numbers, setting in sorted(points.items(), key=lambda item: float(item[0][0]))]
    return "\n\n".join(
        [
            "## Calibration",
            f"Chosen on {found.rows['tuning']} rows, measured on {found.rows['check']} others, {found.date[:10]}.",
            markdown_table(("", "value"), facts),
            f"Settings of the same criterion on the {found.rows['tuning']} rows:",
            markdown_table(("setting", "mean exit layer", found.metric), curve[::step]),
        ]
    )


def _setting(data: Any) -> str:
    return parameter_text(from_dict(data))
