"""Show versions, the machine, and the back-ends that are available."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from earlyexit_kernels.backends import available_backends, resolve
from earlyexit_kernels.tuning.tables import environment, markdown_table


def run(args: argparse.Namespace) -> int:
    """Print the environment and the back-ends."""
    parts = [markdown_table(("environment", "value"), _rows(environment()))]
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for device in ("cpu", *(f"cuda:{i}" for i in range(gpus))):
        rows = [(name, reason or "usable") for name, reason in available_backends(device).items()]
        parts.append(f"Back-ends on {device} tensors ('auto' selects {resolve('auto', device)!r}):")
        parts.append(markdown_table(("back-end", "state"), rows))
    print("\n\n".join(parts))
    return 0


def _rows(facts: dict[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += [(package, version or "not installed") for package, version in value.items()]
        else:
            rows.append((name, _text(value)))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "unknown" if value is None else str(value)
