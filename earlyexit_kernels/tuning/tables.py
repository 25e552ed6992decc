"""Report measurements: the environment, JSON files and markdown tables."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from earlyexit_kernels.backends import first_line
from earlyexit_kernels.criteria import Criterion

_PACKAGES = ("earlyexit_kernels", "torch", "transformers", "triton", "accelerate", "numpy")


def environment() -> dict[str, Any]:
    """Return JSON-ready facts about the machine, the versions of packages, the threads and the commit."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": _gpu_names(),
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "flush_denormal": _flushes_denormals(),
    }


def device_text(facts: Mapping[str, Any]) -> str:
    """Return the device of an `environment` for titles, e.g. ``"AMD EPYC, 2 threads"`` or the names of the GPUs."""
    threads = f"{facts['threads']} thread{'s' * (facts['threads'] != 1)}"
    return ", ".join(facts["gpus"]) or f"{facts['cpu']}, {threads}"


def _gpu_names() -> list[str]:
    if not torch.cuda.is_available():
        return []
    try:
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception as error:  # of almost any class, by what is broken
        return [f"unusable ({first_line(error)})"]


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    # processors of one name have different vector instructions, which decide how fast a layer is
    limit = os.environ.get("ATEN_CPU_CAPABILITY")
    if limit:
        return f"{name}, ATEN_CPU_CAPABILITY={limit}"
    return f"{name}, AVX-512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else name


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def _commit() -> str | None:
    """Return the commit of the checkout that contains this file.

    A ``+`` marks uncommitted changes other than to results and texts. Outside of a checkout or without git, return the
    value of EARLYEXIT_COMMIT, or None.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return os.environ.get("EARLYEXIT_COMMIT")
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        written = [f":(exclude){pattern}" for pattern in ("benchmarks/results", "*.md")]
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", ".", *written)
        return f"{commit}+" if changed else commit
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return os.environ.get("EARLYEXIT_COMMIT")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _flushes_denormals() -> bool:
    """Return whether the CPU flushes denormal numbers to zero, as after `torch.set_flush_denormal(True)`."""
    return bool((torch.full((1,), 1e-30) * 1e-10 == 0).item())


def write_json(path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]], **fields: Any) -> Path:
    """Write ``{"environment": ..., **fields, "records": [...]}``; infinities and NaN become null.

    Args:
        path: output file; missing folders are created.
        records: JSON-ready data.
        fields: further top-level entries, e.g. the arguments of the command.
    """
    document = _finite({"environment": environment(), **fields, "records": list(records)})
    return write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write a text file whole or not at all.

    Args:
        path: output file; missing folders are created.
        text: its contents, written as UTF-8.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = partial_file(target)
    if beside is None:
        target.write_text(text, encoding="utf-8")
    else:  # renamed when complete, so that an interrupted write does not destroy earlier results
        beside.write_text(text, encoding="utf-8")
        beside.replace(target.resolve())
    return target


def partial_file(target: Path) -> Path | None:
    """Return the file that `write_text` writes first and then renames; None for a device or pipe, written directly."""
    if target.exists() and not target.is_file():
        return None
    file = target.resolve()
    return file.with_name(f"{file.name}.part")


def _finite(value: Any) -> Any:
    """Replace infinities and NaN, which JSON does not have, by None."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parameter_text(criterion: Criterion) -> str:
    """Describe the parameters of a criterion, e.g. ``threshold 0.35``."""
    words = []
    for name, value in criterion.to_dict().items():
        if isinstance(value, dict):
            inner: Any = getattr(criterion, name)
            text = parameter_text(inner)
            words.append(f"{name} {inner.name}" + (f" ({text})" if text else ""))
        elif isinstance(value, float):
            words.append(f"{name} {value:.4g}")
        elif name != "name" and value is not None and value is not False:
            words.append(f"{name} {value}")
    return ", ".join(words)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a markdown table with padded columns and numbers aligned right, readable as plain text too.

    Args:
        header: one title per column.
        rows: cells, converted with `str`; format numbers first.

    Raises:
        ValueError: a row has another length than the header.
    """
    body = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    wrong = [row for row in body if len(row) != len(header)]
    if wrong:
        raise ValueError(f"markdown_table: expected {len(header)} cells per row, got {wrong[0]}")
    columns = list(zip(header, *body, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [bool(body) and all(_is_number(cell) for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([line(list(header)), rule, *map(line, body)])


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in "+-." or cell == ""
