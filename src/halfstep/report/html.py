"""Pieces of HTML: escaped text, figures that carry their exact value, tables."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Html:
    """Markup that is safe as it stands."""

    text: str

    def __str__(self) -> str:
        return self.text


def escape(value: Any) -> str:
    """Text for HTML; markup of ours as it is."""
    return value.text if isinstance(value, Html) else html.escape(str(value))


def figure(name: str, value: float, shown: str) -> Html:
    """A number as shown, with the exact one and its name in attributes, so that a test can compare them."""
    return Html(f'<span data-figure="{escape(name)}" data-value="{value!r}">{escape(shown)}</span>')


def table(
    headers: Sequence[str], rows: Iterable[Sequence[Any]], numeric: Sequence[int] = (), caption: str = ""
) -> str:
    """A table; columns in ``numeric`` are set right. Wide ones scroll inside their own frame."""
    place = ["number" if index in numeric else "" for index in range(len(headers))]
    head = "".join(
        f'<th scope="col" class="{c}">{escape(h)}</th>' for h, c in zip(headers, place, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{c}">{escape(v)}</td>' for v, c in zip(row, place, strict=True))
        + "</tr>"
        for row in rows
    )
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption or headers[0])}">'
        f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def number(value: float | None, digits: int = 4) -> str:
    """A number with so many significant digits; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"


def size(count: float) -> str:
    """Bytes, readable."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
