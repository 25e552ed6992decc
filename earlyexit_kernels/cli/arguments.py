"""Convert and check the arguments of the command line; argparse adds the name of the argument to the errors."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from earlyexit_kernels.arguments import Check, choice, number, whole
from earlyexit_kernels.data.table import FORMATS
from earlyexit_kernels.methods import METHODS
from earlyexit_kernels.tasks.load import TASK_NAMES
from earlyexit_kernels.tuning.metrics import METRIC_NAMES
from earlyexit_kernels.tuning.settings import GRIDS, MIN_POINTS

#: Characters of a text that an error shows.
SHOWN = 80


def _converter(parse: Callable[[str], Any], check: Check) -> Callable[[str], Any]:
    """Return a converter that parses a text and checks the value."""

    def convert(text: str) -> Any:
        try:
            value = parse(text)
        except ValueError:
            value = text[:SHOWN]
        try:
            return check("", value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from None

    return convert


def one_of(*names: str) -> Callable[[str], str]:
    """Return a converter that accepts these names only."""
    return _converter(lambda text: text[:SHOWN], choice(*names))


def path(text: str) -> Path:
    """Convert to a path; an empty one, which would be the current folder, is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return Path(text).expanduser()


def table(text: str) -> Path:
    """Convert to the path of a file with rows; its ending is that of a known format."""
    target = path(text)
    if target.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(
            f"expected a file name that ends in {', '.join(FORMATS)}, got {text[:SHOWN]!r}"
        )
    return target


def column(text: str) -> str:
    """Accept the name of a column that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected the name of a column, got {text!r}")
    return text


def source(text: str) -> str:
    """Accept a path or hub name that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a folder or a hub name, got {text!r}")
    return text


def _ending(suffix: str) -> Callable[[str], Path]:
    """Return a converter that accepts file names with this ending."""

    def convert(text: str) -> Path:
        target = path(text)
        if target.suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"expected a file name that ends in {suffix}, got {text[:SHOWN]!r}")
        return target

    return convert


def rate_or_same(text: str) -> float | None:
    """Convert to a learning rate, or None for ``same``."""
    return None if text == "same" else learning_rate(text)


png, page = _ending(".png"), _ending(".html")
#: Ranges of the numbers; the upper limits are far above useful values and far below those at which libraries fail.
rows = _converter(int, whole(low=1, high=10**9))
rows_or_none = _converter(int, whole(low=0, high=10**9))
batch_size = _converter(int, whole(low=1, high=10**6))
max_length = _converter(int, whole(low=1, high=10**6))
seed = _converter(int, whole(low=0, high=2**32 - 1))
threads = _converter(int, whole(low=1, high=1024))
points = _converter(int, whole(low=MIN_POINTS, high=1000))
epochs = _converter(float, number(low=0, high=10_000, inside=True))
learning_rate = _converter(float, number(low=0, high=1, inside=True))
drop = _converter(float, number(low=0, high=2))
max_drop = _converter(float, number(low=0, high=0.5))
speed_up = _converter(float, number(low=1, high=1000))
milliseconds = _converter(float, number(low=0, high=10**9, inside=True))
count = _converter(int, whole(low=1, high=10**9))
port = _converter(int, whole(low=0, high=65535))
probability = _converter(float, number(low=0, high=1, inside=True))

task = one_of(*TASK_NAMES)
method = one_of(*sorted(METHODS))
metric = one_of(*METRIC_NAMES)
#: A criterion to save with the model, or the best of all.
AUTO = "auto"
rule = one_of(AUTO, *GRIDS)
