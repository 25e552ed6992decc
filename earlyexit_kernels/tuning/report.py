"""How measurements leave the package: the environment they were made in, JSON, markdown tables and plots."""

from __future__ import annotations

import bisect
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
from typing import Any, TypeAlias

import torch

_Points: TypeAlias = Sequence[tuple[float, float]]
_PACKAGES = ("earlyexit_kernels", "torch", "transformers", "triton", "accelerate", "numpy")


def environment() -> dict[str, Any]:
    """What a reader needs to judge a measurement: machine, versions, threads, commit. JSON-ready."""
    cuda = torch.cuda.is_available()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cuda": torch.version.cuda,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "commit": _commit(),
        "flush_denormal": _flushes_denormals(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return getattr(sys.modules.get(package), "__version__", None)


def _commit() -> str | None:
    """Commit of the checkout this file lies in, with ``+`` where it has uncommitted changes, but for results and texts.

    Outside of one, or without git, what EARLYEXIT_COMMIT says, or None.
    """
    root = Path(__file__).resolve().parents[1]
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
    """Whether the CPU rounds denormal numbers to zero, as `torch.set_flush_denormal(True)` asks."""
    return bool((torch.full((1,), 1e-30) * 1e-10 == 0).item())


def write_json(path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]], **fields: Any) -> Path:
    """Write ``{"environment": ..., **fields, "records": [...]}``; infinities and NaN become null.

    Args:
        path: of the file; missing folders are made.
        records: JSON-ready data.
        fields: further top-level entries, e.g. the command's arguments.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    document = _finite({"environment": environment(), **fields, "records": list(records)})
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    if target.exists() and not target.is_file():
        # a device or a pipe, which a rename would replace by a file
        target.write_text(text, encoding="utf-8")
        return target
    # whole or not at all: a file cut off would take what was measured before along
    place = target.resolve()
    beside = place.with_name(f"{place.name}.part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(place)
    return target


def _finite(value: Any) -> Any:
    """The same data without numbers that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A markdown table that also reads well as plain text: columns padded, numbers to the right.

    Args:
        header: one title a column.
        rows: cells, turned into text with `str`; give numbers their digits first.

    Raises:
        ValueError: a row of another length than the header.
    """
    body = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    wrong = [row for row in body if len(row) != len(header)]
    if wrong:
        raise ValueError(f"markdown_table: expected {len(header)} cells a row, got {wrong[0]}")
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


def plot_tradeoff(
    path: str | os.PathLike[str],
    curves: Mapping[str, _Points],
    *,
    baselines: Mapping[str, _Points],
    chosen: Mapping[str, tuple[float, float]],
    depth: int,
    metric: str,
    title: str,
) -> Path:
    """Draw score against the mean number of layers run.

    Args:
        path: of the PNG; missing folders are made.
        curves: criterion -> points (mean layers run, score), drawn in order of the first.
        baselines: the same, drawn dashed.
        chosen: criterion -> its chosen point, drawn as a ring.
        depth: L.
        metric: name of the score.
        title: of the plot.

    Raises:
        ImportError: matplotlib isn't installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: `pip install earlyexit_kernels[plot]`") from error
    figure = Figure(figsize=(8.0, 5.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ring: dict[str, Any] = {"marker": "o", "markersize": 11, "markerfacecolor": "none", "linestyle": "none"}
    for number, (name, points) in enumerate(baselines.items()):
        axes.plot(*_columns(points), color=_GREYS[number % len(_GREYS)], linestyle="--", marker="x", label=name)
    for number, (names, points) in enumerate(_merged(curves)):
        color, marker = f"C{number}", _MARKERS[number % len(_MARKERS)]
        axes.plot(*_columns(points), color=color, marker=marker, markersize=4, label=" = ".join(names))
        for x, y in {chosen[name] for name in names if name in chosen}:
            axes.plot([x], [y], color=color, **ring)
    if chosen:
        axes.plot([], [], color="black", label="chosen on the tuning split", **ring)
    axes.set(xlabel=f"mean layers run (of {depth})", ylabel=metric, title=title)
    axes.set_xlim(right=depth + 0.2)
    axes.set_xticks(range(1, depth + 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target)
    return target


def _columns(points: _Points) -> tuple[list[float], list[float]]:
    ordered = sorted(points)
    return [x for x, _ in ordered], [y for _, y in ordered]


def _merged(curves: Mapping[str, _Points]) -> list[tuple[list[str], _Points]]:
    """Curves that coincide, as one with several names: with two classes all confidence rules are the same."""
    merged: list[tuple[list[str], _Points]] = []
    for name, points in curves.items():
        for names, others in merged:
            if _coincide(points, others):
                names.append(name)
                break
        else:
            merged.append(([name], points))
    return merged


def _coincide(first: _Points, second: _Points, *, tolerance: float = 0.005) -> bool:
    """Whether two curves span the same costs and differ by less than a line's width of the score's range."""
    (x1, y1), (x2, y2) = _columns(first), _columns(second)
    if max(abs(x1[0] - x2[0]), abs(x1[-1] - x2[-1])) > 0.05:
        return False
    gaps = [abs(_height(x1, y1, x) - _height(x2, y2, x)) for x in {*x1, *x2}]
    return max(gaps) <= tolerance * (max(*y1, *y2) - min(*y1, *y2))


def _height(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Linear interpolation; the end values beyond the ends."""
    right = bisect.bisect_left(xs, x)
    if right in (0, len(xs)):
        return ys[min(right, len(xs) - 1)]
    share = (x - xs[right - 1]) / (xs[right] - xs[right - 1])
    return ys[right - 1] + share * (ys[right] - ys[right - 1])


_MARKERS = ("o", "s", "^", "D", "v", "P", "X")  # ten colours, so that 70 curves differ
_GREYS = ("0.35", "0.6")
