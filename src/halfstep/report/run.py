"""A run as frozen data, read from its journal alone.

Two runs side by side, as rows of words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.export.verify import Fact
from halfstep.journal import Entry, read
from halfstep.ladder.evaluation import Decision, Evaluation, kept
from halfstep.ladder.outcome import run_facts


@dataclass(frozen=True)
class Run:
    """What a journal tells.

    Attributes:
        name: of the run: its directory's.
        settings: what was asked last: target, recipe, max_drop ... ; empty in a run that was killed very early.
        environment: versions and processor, by name.
        evaluations: every one, in order.
        decisions: sentences, in order.
        steps: the rungs climbed, of those asked for last, with what came of each.
        sweep: the calibrators compared, best first.
        sites: as :func:`halfstep.ladder.site_records.record_sites` made them.
        known_sites: how many there are, of which ``sites`` are some or all.
        picture: an input, if it is an image.
        findings: what rungs found out, by name: ``"sensitivity"``, ``"training"`` ...
        outcome: the end of what was asked last; empty in a run that has not come there.
    """

    name: str
    settings: dict[str, Any]
    environment: dict[str, str]
    evaluations: tuple[Evaluation, ...]
    decisions: tuple[str, ...]
    steps: tuple[dict[str, Any], ...]
    sweep: tuple[dict[str, Any], ...]
    sites: tuple[dict[str, Any], ...]
    known_sites: int
    picture: dict[str, Any] | None
    findings: dict[str, dict[str, Any]]
    outcome: dict[str, Any]

    @classmethod
    def read(cls, folder: str | Path) -> Run:
        """The run whose journal lies in ``folder``.

        Raises:
            RunError: if there is none, or it is damaged.
        """
        return cls.of(read(folder), Path(folder).resolve().name)

    @classmethod
    def of(cls, entries: Sequence[Entry], name: str = "run") -> Run:
        """The run that ``entries`` tell of; of what was written several times the last counts."""
        last = {entry.kind: entry.data for entry in entries}
        settings, outcome = last.get("settings", {}), last.get("outcome", {})
        calls = sum(entry.kind == "settings" for entry in entries)
        steps = {entry.data["rung"]: entry.data for entry in entries if entry.kind == "step"}
        return cls(
            name=name,
            settings=settings,
            environment=last.get("environment", {}).get("packages", {}),
            evaluations=tuple(kept(entry)[0] for entry in entries if entry.kind == "evaluation"),
            decisions=tuple(Decision.of(entry).sentence for entry in entries if entry.kind == "decision"),
            steps=tuple(steps[rung] for rung in settings.get("rungs", steps) if rung in steps),
            sweep=tuple(last.get("sweep", {}).get("candidates", ())),
            sites=tuple(last.get("sites", {}).get("sites", ())),
            known_sites=last.get("sites", {}).get("of", 0),
            picture=last.get("picture"),
            findings={e.data["name"]: e.data["measured"]["finding"] for e in entries if e.kind == "finding"},
            outcome=outcome if outcome.get("call", calls) == calls else {},
        )

    @property
    def seconds(self) -> float:
        """What all evaluations together took."""
        return sum(made.seconds for made in self.evaluations)

    def facts(self) -> list[Fact]:
        """What came of it, a line a fact; empty in a run that has not come to its end."""
        return run_facts({**self.outcome, **self.outcome["measured"]}) if self.outcome else []


def comparison(first: Run, second: Run) -> list[tuple[str, str, str]]:
    """(what, first, second) for all that was asked and all that came of it."""
    a, b = _facts(first), _facts(second)
    return [(what, a.get(what, ""), b.get(what, "")) for what in {**a, **b}]


def _facts(run: Run) -> dict[str, str]:
    asked = {
        name: str(run.settings.get(name, "")) for name in ("target", "recipe", "asked", "metric", "examples")
    }
    if not run.outcome:
        return {**asked, "state": f"not finished, {len(run.evaluations)} evaluations"}
    state = "target met" if run.outcome["met"] else "target not met"
    return {**asked, "state": state, **{fact.name: fact.words for fact in run.facts()}}
