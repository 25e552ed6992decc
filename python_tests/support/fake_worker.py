"""A worker of the server without torch: its answers follow from the token ids, and some ids are orders.

    python fake_worker.py '{"slow": 12, "end": 13, "fail": 14, "hang": 15}'

It runs one row at a time. "slow" takes `SLOW_SECONDS`, "end" ends the process, "fail" fails on the row, and "hang" does
nothing for ever. Answers leave in the order of the rows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

SLOW_SECONDS = 0.05
DEPTH, LABELS = 4, ["no", "perhaps", "yes"]
#: Files of the folder of the model: a calibration, and a note that stands for other weights.
CALIBRATION, NOTE = "calibration.json", "note.txt"


def answer_to(input_ids: list[int]) -> tuple[int, list[float]]:
    """Return the exit layer and the logits of a row."""
    number = sum((place + 1) * one for place, one in enumerate(input_ids))
    return number % DEPTH + 1, [number % 97 / 97, number % 89 / 89, number % 83 / 83]


def _protocol():
    """Load the protocol without its package, which imports torch."""
    path = Path(__file__).resolve().parents[2] / "earlyexit_kernels" / "serving" / "http" / "protocol.py"
    spec = importlib.util.spec_from_file_location("protocol", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["protocol"] = module
    spec.loader.exec_module(module)
    return module


def main(orders: dict[str, int]) -> None:
    channel = _protocol().Channel(os.dup(0), os.dup(1))
    (order,) = channel.receive(wait=True)
    recorded = Path(order["model"]) / CALIBRATION
    about = {
        "labels": LABELS,
        "depth": DEPTH,
        "problem_type": "single_label_classification",
        "method": {"name": "joint"},
        "criterion": {"name": "entropy", "threshold": 0.5},
        "calibration": json.loads(recorded.read_text()) if recorded.is_file() else None,
        "max_length": 64,
        "device": "cpu",
        "skips_layers": False,
        "config_sha256": str((Path(order["model"]) / NOTE).is_file()),
    }
    channel.send({"ready": about})
    rows: list[list] = []
    while True:
        dropped = []
        for message in channel.receive(wait=not rows):
            rows += message.get("rows", [])
            unwanted = message.get("drop", [])
            dropped += [row[0] for row in rows if row[0] in unwanted]
            rows = [row for row in rows if row[0] not in unwanted]
        if channel.closed:
            return
        answers, failed = [], []
        if rows:
            key, ids, *_ = rows.pop(0)
            if orders["end"] in ids:
                os._exit(9)
            while orders["hang"] in ids:
                time.sleep(60)
            if orders["slow"] in ids:
                time.sleep(SLOW_SECONDS)
            if orders["fail"] in ids:
                failed.append(key)
            else:
                answers.append([key, *answer_to(ids)])
        if answers or failed or dropped:
            channel.send({"answers": answers, "failed_rows": failed, "dropped": dropped})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
