"""What the arguments of an objective may be: checks that return the argument, or say what came and what is allowed."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

#: ``(where, value) -> value``; `where` begins the message, e.g. ``"Palbert(beta=...)"``.
Check: TypeAlias = Callable[[str, Any], Any]


def number(*, low: float = -math.inf, high: float = math.inf, inside: bool = False) -> Check:
    """A finite number in ``[low, high]``, made a float; with `inside` the ends are excluded."""
    ends = "({:g}, {:g})" if inside else "[{:g}, {:g}]"
    above = f" above {low:g}" if inside else f" at least {low:g}"
    allowed = "" if math.isinf(low) else above if math.isinf(high) else " in " + ends.format(low, high)

    def check(where: str, value: Any) -> float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        finite = real and -sys.float_info.max <= value <= sys.float_info.max
        if not finite or not (low < value < high if inside else low <= value <= high):
            raise ValueError(f"{where}: expected a finite number{allowed}, got {value!r}")
        return float(value)

    return check


def whole(*, low: int) -> Check:
    """A whole number from `low` on, made an int."""

    def check(where: str, value: Any) -> int:
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_whole or value < low:
            raise ValueError(f"{where}: expected a whole number at least {low}, got {value!r}")
        return int(value)

    return check


def flag(where: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{where}: expected True or False, got {value!r}")
    return value


def choice(*allowed: str) -> Check:
    """One of some words."""

    def check(where: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"{where}: expected one of {allowed}, got {value!r}")
        return value

    return check


def optional(check: Check) -> Check:
    """None, or what `check` allows."""

    def checked(where: str, value: Any) -> Any:
        return None if value is None else check(where, value)

    return checked
