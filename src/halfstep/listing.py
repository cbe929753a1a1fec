"""A model as a list of its sites, as text and as a notebook shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from halfstep.fake_quantize import FakeQuantize


@dataclass(frozen=True)
class Listing:
    """What there is to say of a model.

    Attributes:
        head: one line.
        rows: the name of a site or a float layer, and its description.
    """

    head: str
    rows: Sequence[tuple[str, str]]

    def __str__(self) -> str:
        width = max((len(name) for name, _ in self.rows), default=0)
        return "\n".join([self.head, *(f"  {name:<{width}}  {words}" for name, words in self.rows)])

    def html(self) -> str:
        """The same as a table."""
        return f"<p>{escape(self.head)}</p>{html_table(self.rows)}"


def html_table(rows: Sequence[tuple[str, str]]) -> str:
    """Names and descriptions as a notebook shows them."""
    left = "style='text-align:left'"
    cells = (
        f"<tr><th {left}>{escape(name)}</th><td {left}>{escape(words)}</td></tr>" for name, words in rows
    )
    return f"<table>{''.join(cells)}</table>"


def describe_site(module: FakeQuantize) -> str:
    """Format, granularity and range of a site in one line."""
    if module.dynamic:
        return f"{module.format}, {module.granularity}, range computed at run time"
    if not module.calibrated:
        return f"{module.format}, {module.granularity}, not calibrated"
    low, high = module.range()
    return f"{module.format}, {module.granularity}, range {float(low.min()):.4g} to {float(high.max()):.4g}"
