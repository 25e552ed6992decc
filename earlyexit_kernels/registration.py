"""Registration of classes from outside the package: the checks that they share, and their entry in a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

#: ``class ->`` what is expected of it and what it has instead, or an empty string.
Problem = Callable[[Any], str]


def path_of(thing: Any) -> str:
    """Return the module and qualified name of a class or function."""
    return f"{thing.__module__}.{thing.__qualname__}"


def defined_again(new: Any, known: Any) -> bool:
    """Return whether a class or function replaces another of the same module and qualified name.

    A notebook cell that runs again, and a module that is reloaded, define their classes and functions again.
    """
    named = all(hasattr(thing, "__qualname__") for thing in (new, known))
    return named and path_of(new) == path_of(known)


def check_class(cls: Any, base: type, problems: Iterable[Problem]) -> None:
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
