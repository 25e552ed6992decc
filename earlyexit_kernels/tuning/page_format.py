"""Numbers, words and tables of a report page."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

#: Metrics of which a hundredth is called a point.
POINTS = {"accuracy", "f1", "macro_f1", "agreement"}
NONE = "\N{EN DASH}"


def fixed(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed number of decimals; a dash for None."""
    return NONE if value is None else f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def percent(share: float | None) -> str:
    """Return a share as a percentage with one decimal; a dash for None."""
    return NONE if share is None else f"{fixed(100 * share, 1)} %"


def table(
    name: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str, classes: Mapping[str, str]
) -> str:
    """Return a table that scrolls sideways where it is wider than the page.

    Args:
        name: id of the caption.
        header: titles of the columns.
        rows: HTML of the cells; the first cell of a row is its heading.
        caption: above the table.
        classes: title of a column -> its class, ``"number"`` unless given: ``"text"``, or ``"setting"`` and
            ``"long"`` for texts that need some width.
    """
    kinds = ["" if not k else f' class="{classes.get(title, "number")}"' for k, title in enumerate(header)]
    head = "".join(f'<th scope="col"{kind}>{html.escape(name)}</th>' for kind, name in zip(kinds, header, strict=True))
    body = []
    for first, *others in rows:
        tail = "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds[1:], others, strict=True))
        body.append(f'<tr><th scope="row">{first}</th>{tail}</tr>')
    lines = "\n".join(body)
    return (
        f'<figure class="table"><figcaption id="{name}">{caption}</figcaption>\n'
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}">\n<table aria-labelledby="{name}">\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>\n</div></figure>"
    )


def words(name: str) -> str:
    """Return a name as HTML, with spaces for underscores."""
    return html.escape(name.replace("_", " "))


def loss(value: float, metric: str) -> str:
    """Return a difference of scores in words."""
    size, unit = (100 * abs(value), " points") if metric in POINTS else (abs(value), "")
    shown = fixed(size, 1 if unit else 3)
    return f"loses {shown}{unit}" if value > 0 else f"gains {shown}{unit}" if value < 0 else "loses nothing"


def interval(ends: Sequence[float], metric: str) -> str:
    """Return an interval of losses in words."""
    scale, digits, unit = (100, 1, " points") if metric in POINTS else (1, 3, "")
    low, high = (fixed(scale * end, digits) for end in ends)
    return f"{low} to {high}{unit}"
