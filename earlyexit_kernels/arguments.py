"""Checks of constructor arguments and of registered classes.

The check of an argument returns the checked value or raises ValueError.

A class lists its checks in a table, ``checks = {"threshold": number(low=0.0)}``, and `check_fields` applies it. Every
message says what was expected and what was given.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

#: ``(where, value) -> value``; `where` begins the message, e.g. ``"Palbert(beta=...)"``.
Check: TypeAlias = Callable[[str, Any], Any]
#: ``class ->`` what is expected of it and what it has instead, or an empty string.
Problem: TypeAlias = Callable[[Any], str]


def check_fields(instance: Any, checks: Mapping[str, Check]) -> None:
    """Replace fields of a frozen dataclass by their checked values.

    Args:
        instance: the dataclass instance, changed in place.
        checks: field name -> its check.

    Raises:
        ValueError: a field has a value that its check does not allow.
    """
    for name, check in checks.items():
        value = check(f"{type(instance).__name__}({name}=...)", getattr(instance, name))
        object.__setattr__(instance, name, value)


def number(*, low: float = -math.inf, high: float = math.inf, inside: bool = False) -> Check:
    """Allow finite numbers in ``[low, high]`` and convert them to float; with `inside` the ends are excluded."""
    ends = "({:g}, {:g})" if inside else "[{:g}, {:g}]"
    above = f" above {low:g}" if inside else f" at least {low:g}"
    allowed = "" if math.isinf(low) else above if math.isinf(high) else " in " + ends.format(low, high)

    def check(where: str, value: Any) -> float:
        real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if real and not isinstance(value, numbers.Integral):  # which may be too large for a float
            value = float(value)
        finite = real and -sys.float_info.max <= value <= sys.float_info.max
        if not finite or not (low < value < high if inside else low <= value <= high):
            raise ValueError(f"{where}: expected a finite number{allowed}, got {_shown(value)}")
        return float(value)

    return check


def whole(*, low: int, high: int | None = None, hint: str = "") -> Check:
    """Allow whole numbers in ``[low, high]`` and convert them to int; `hint` ends the message."""
    allowed = f"at least {low}" if high is None else f"in [{low}, {high}]"

    def check(where: str, value: Any) -> int:
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_whole or value < low or (high is not None and value > high):
            raise ValueError(f"{where}: expected a whole number {allowed}, got {value!r}{hint}")
        return int(value)

    return check


def flag(where: str, value: Any) -> bool:
    """Allow True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{where}: expected True or False, got {value!r}")
    return value


def choice(*allowed: str | None) -> Check:
    """Allow the given strings, or None where it is among them."""

    def check(where: str, value: Any) -> Any:
        if not (value is None or isinstance(value, str)) or value not in allowed:
            raise ValueError(f"{where}: expected one of {allowed}, got {value!r}")
        return value

    return check


def optional(check: Check) -> Check:
    """Allow None and what `check` allows."""

    def checked(where: str, value: Any) -> Any:
        return None if value is None else check(where, value)

    return checked


def one_or_each(check: Check) -> Check:
    """Allow one number that `check` allows, or a list or tuple with one for each exit, which becomes a tuple."""

    def checked(where: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(check(where, item) for item in value)
        if not isinstance(value, numbers.Real):
            raise ValueError(
                f"{where}: expected a finite number, or a list or tuple of them, one for each exit before the last, "
                f"got {_shown(value)}"
            )
        return check(where, value)

    return checked


def _shown(value: Any) -> str:
    """Describe a refused value for a message; the repr of a tensor or an array may have many lines."""
    if hasattr(value, "tolist") and not isinstance(value, numbers.Real):
        return f"a {type(value).__name__}; its tolist() gives a number or a list of numbers"
    return repr(value)


def path_of(thing: Any) -> str:
    """Return the module and qualified name of a class or function."""
    return f"{thing.__module__}.{thing.__qualname__}"


def defined_again(new: Any, known: Any) -> bool:
    """Return whether a class or function replaces another of the same module and qualified name.

    A notebook cell that runs again, and a module that is reloaded, define their classes and functions again.
    """
    named = all(hasattr(thing, "__qualname__") for thing in (new, known))
    return named and path_of(new) == path_of(known)


def check_registered(cls: Any, base: type, problems: Iterable[Problem]) -> None:
    """Check that a class extends `base`, is a frozen dataclass with a name, and has none of the problems.

    Raises:
        TypeError: not a subclass of `base`.
        ValueError: names the missing or wrong part of the class.
    """
    if not (isinstance(cls, type) and issubclass(cls, base)):
        public = f"{base.__module__.removesuffix('.base')}.{base.__qualname__}"
        raise TypeError(f"register: expected a subclass of {public}, got {cls!r}")
    for problem in (_dataclass_problem, _name_problem, *problems):
        found = problem(cls)
        if found:
            raise ValueError(f"register({cls.__name__}): {found}")


def enter(table: dict[str, Any], cls: Any) -> None:
    """Add a class to a table under its name, or replace one that it defines again.

    Raises:
        ValueError: the name belongs to another class.
    """
    known = table.setdefault(cls.name, cls)
    if known is not cls and not defined_again(cls, known):
        raise ValueError(
            f"register({cls.__name__}): the name {cls.name!r} belongs to {path_of(known)}; give the class another name"
        )
    table[cls.name] = cls


def _dataclass_problem(cls: Any) -> str:
    parameters = vars(cls).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        return (
            "expected a frozen dataclass; write @dataclasses.dataclass(frozen=True, kw_only=True) above the class and "
            "@register above that"
        )
    return ""


def _name_problem(cls: Any) -> str:
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        return f"expected a class attribute `name: ClassVar[str]` such as 'my_rule', got {name!r}"
    return ""
