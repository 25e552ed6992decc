"""Converters of the command line's arguments, each with its range; argparse names the argument in their errors."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn

from earlyexit_kernels.tuning.grids import FEWEST_POINTS


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line on stderr."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"error: {' '.join(message.split())}; `{self.prog} --help` lists the arguments\n")


def real(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """A finite number in ``[low, high]``; with `above`, `low` itself is excluded."""
    least = f"above {low:g}" if above else f"at least {low:g}"
    allowed = least if math.isinf(high) else f"{least} and at most {high:g}"

    def convert(text: str) -> float:
        value = _number(float, text)
        if not math.isfinite(value) or not low <= value <= high or (above and value == low):
            raise argparse.ArgumentTypeError(f"expected a finite number {allowed}, got {_shown(text)}")
        return value

    return convert


def whole(low: int, high: int) -> Callable[[str], int]:
    """A whole number in ``[low, high]``."""

    def convert(text: str) -> int:
        value = _number(int, text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number in [{low}, {high}], got {_shown(text)}")
        return int(value)

    return convert


def _number(parse: Callable[[str], float], text: str) -> float:
    """The number that a text is, or NaN, which lies in no range."""
    try:
        return parse(text)
    except ValueError:
        return math.nan


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else f"{text[:80]}...")


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """One of some names."""

    def convert(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, got {_shown(text)}")
        return text

    return convert


def path(text: str) -> Path:
    """A path that is not empty: an empty one would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return Path(text).expanduser()


def source(text: str) -> str:
    """A path or a hub name that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a folder or a hub name, got {text!r}")
    return text


def png(text: str) -> Path:
    """A path whose name ends in ``.png``."""
    found = path(text)
    if found.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"expected a file name that ends in .png, got {_shown(text)}")
    return found


def rate_or_same(text: str) -> float | None:
    """A learning rate, or None for ``same``."""
    return None if text == "same" else learning_rate(text)


#: The ranges; each upper limit is far above any sensible value and far below where a library fails.
rows = whole(1, 10**9)
rows_or_none = whole(0, 10**9)
batch_size = whole(1, 10**6)
max_length = whole(1, 10**6)
seed = whole(0, 2**32 - 1)
threads = whole(1, 1024)
points = whole(FEWEST_POINTS, 1000)
epochs = real(0, 10_000, above=True)
learning_rate = real(0, 1, above=True)
drop = real(0, 2)
