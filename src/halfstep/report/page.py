"""One self-contained HTML page from a run: no network, nothing beside it."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from halfstep.files import write_whole
from halfstep.report.html import escape
from halfstep.report.run import Run
from halfstep.report.sections import SECTIONS


def write_report(run: Run, path: str | Path) -> Path:
    """Write the page; it appears whole or not at all.

    Raises:
        RunError: if it cannot be written.
    """
    path = Path(path)
    write_whole(path, page(run).encode())
    return path


def page(run: Run) -> str:
    """The page as text: sections that the run has something to tell of, its style, its script, its sites."""
    found = [(address, title, make(run)) for address, title, make in SECTIONS]
    told = [(address, title, content) for address, title, content in found if content]
    links = "".join(f'<li><a href="#{address}">{escape(title)}</a></li>' for address, title, _ in told)
    body = "".join(
        f'<section id="{address}" aria-labelledby="{address}-title"><h2 id="{address}-title">{escape(title)}</h2>'
        f"{content}</section>"
        for address, title, content in told
    )
    target = run.settings.get("target")
    about = f"for {escape(target)}, " if target else ""
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(run.name)}: halfstep report</title><style>{_asset('page.css')}</style></head><body>"
        f'<a class="skip" href="#summary">Skip to the summary</a><header><h1>{escape(run.name)}</h1>'
        f'<p class="quiet">{about}made by halfstep from the journal of the run</p>'
        f'<nav aria-label="Sections"><ul>{links}</ul></nav></header><main>{body}</main>'
        f'<script type="application/json" id="site-data">{_json(run.sites)}</script>'
        f"<script>{_asset('page.js')}</script></body></html>"
    )


def _asset(name: str) -> str:
    return (files("halfstep.report") / "assets" / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that cannot end the element it stands in, and that every browser reads: no NaN, no infinity."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")
