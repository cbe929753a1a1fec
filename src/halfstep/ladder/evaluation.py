"""What a search did, what it knows by that, and how the journal keeps it: evaluations of the metric, and decisions."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from halfstep.evaluate import Resampled, Score
from halfstep.journal import Entry, Journal
from halfstep.ladder.goal import Goal


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the metric.

    Attributes:
        what: the candidate, in words.
        score: its value in the metric's unit, over the examples seen.
        seconds: what it took.
        examples: how many examples were scored; None where the metric is not a mean over examples.
        total: how many there are.
        key: the candidate's fingerprint.
        rung: that asked for it; ``"float"`` for the baseline, ``"deployed"`` for a file.
        examined: which candidate this is, in the order in which they were first looked at, from 1; a file has its
            candidate's. None for what no search can accept, such as the float model.
    """

    what: str
    score: float
    seconds: float
    examples: int | None = None
    total: int | None = None
    key: str = ""
    rung: str = ""
    examined: int | None = None

    @property
    def share(self) -> float:
        """The share of a full evaluation that it took, 0 to 1."""
        return self.examples / self.total if self.examples is not None and self.total else 1.0


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate meets the goal.

    Attributes:
        met: whether it does.
        score: over the examples seen; its ``per_example`` is in the data's own order only if ``complete``.
        complete: whether all examples were seen, or the verdict was given early.
        allowed: the drop that an early verdict was given against.
    """

    met: bool
    score: Score
    complete: bool
    allowed: float | None = None

    def holds(self, max_drop: float) -> bool:
        """Whether an early verdict stands against another allowed drop: "met" if that is as large, else if as small."""
        assert self.allowed is not None
        return self.allowed <= max_drop if self.met else self.allowed >= max_drop


@dataclass(frozen=True)
class Decision:
    """What was decided and why.

    Attributes:
        rung: that was being climbed; empty before the first.
        key: what tells it from the rung's others, the same in a run that goes on: the sentence, or where that tells of
            times that are measured anew, the sentence without them.
        sentence: as it is said.
    """

    rung: str
    key: str
    sentence: str

    @classmethod
    def of(cls, entry: Entry) -> Decision:
        """What :meth:`keep` wrote."""
        return cls(entry.data["rung"], entry.data["key"], entry.data["measured"]["sentence"])

    def keep(self, journal: Journal) -> None:
        """Write it, unless the same one is there."""
        journal.write("decision", rung=self.rung, key=self.key, measured={"sentence": self.sentence})


class Evaluations:
    """Every evaluation of a search, and what is known of its candidates by them: nothing is scored twice.

    Candidates go by their fingerprints, see :func:`.fingerprint`.

    Args:
        journal: where they are kept; those that it holds already are known.
        made: before the search began.

    Attributes:
        made: the evaluations, in order.
        verdicts: by candidate. There may be several early ones, against different goals.
    """

    def __init__(self, journal: Journal, made: Iterable[Evaluation] = ()) -> None:
        self.journal = journal
        self.made = list(made)
        self.verdicts: dict[str, list[Verdict]] = {}
        self._asked: set[str] = set()
        self._examined: dict[str, int] = {}
        for entry in journal.of("evaluation"):
            self._add(*kept(entry))

    def record(self, made: Evaluation, verdict: Verdict) -> None:
        """Remember an evaluation, here and in the journal."""
        self._asked.add(made.key)
        self._add(made, verdict)
        keep(self.journal, made, verdict)

    def _add(self, made: Evaluation, verdict: Verdict) -> None:
        self.made.append(made)
        self.verdicts.setdefault(made.key, []).append(verdict)
        if made.examined is not None and made.rung != "deployed":
            self._examined[made.key] = made.examined

    def examined(self, key: str) -> int:
        """Which candidate this is, in the order in which they were first looked at, from 1.

        Kept in the journal, so that a resumed run counts alike. Early verdicts count too: if only those did that came
        through them, luck would have chosen whom the next share of the error goes to.
        """
        return self._examined.get(key, len(self._examined) + 1)

    def recall(self, key: str, goal: Goal) -> Verdict | None:
        """What is remembered of a candidate; its evaluation counts from now on, if a run before this one made it.

        An early verdict is remembered while the goal is the one that it was given against, or one that makes it
        all the surer.
        """
        self._asked.add(key)
        known = self.verdicts.get(key, [])
        for verdict in known:
            if verdict.complete:
                return replace(verdict, met=goal.met(verdict.score))
        early = [verdict for verdict in known if verdict.holds(goal.max_drop)]
        return max(early, key=lambda verdict: verdict.score.count or 0, default=None)  # the surest

    def taken(self, key: str) -> torch.Tensor | None:
        """The most scores that were taken of a candidate for early verdicts, in the order drawn; None if none were."""
        early = [verdict.score.per_example for verdict in self.verdicts.get(key, []) if not verdict.complete]
        return max((scores for scores in early if scores is not None), key=len, default=None)

    def replay(self, rung: str) -> None:
        """Let the evaluations count that an earlier run made for a rung."""
        self._asked.update(made.key for made in self.made if made.rung == rung)

    @property
    def cost(self) -> float:
        """What all of them cost, in evaluations of every example, an interrupted run's included."""
        return sum(evaluation.share for evaluation in self.made)

    @property
    def replayed_cost(self) -> float:
        """The same of those that a resumed run, which replays, has come to by now."""
        return sum(evaluation.share for evaluation in self._replayed())

    @property
    def saved(self) -> int:
        """Examples that no candidate had to be scored on, thanks to early stopping."""
        seen: dict[str, int] = {}
        totals: dict[str, int] = {}
        for evaluation in self._replayed():
            if evaluation.rung == "float":
                continue
            if evaluation.examples is not None and evaluation.total is not None and evaluation.key:
                seen[evaluation.key] = seen.get(evaluation.key, 0) + evaluation.examples
                totals[evaluation.key] = evaluation.total
        return sum(totals[key] - seen[key] for key in seen)

    def _replayed(self) -> list[Evaluation]:
        return [made for made in self.made if made.rung == "float" or not made.key or made.key in self._asked]


def keep(journal: Journal, made: Evaluation, verdict: Verdict) -> None:
    """Write an evaluation with the scores of all its examples."""
    journal.write(
        "evaluation",
        rung=made.rung,
        what=made.what,
        key=made.key,
        examined=made.examined,
        examples=made.examples,
        total=made.total,
        met=verdict.met,
        complete=verdict.complete,
        allowed=verdict.allowed,
        score=_pack(verdict.score),
        measured={"seconds": round(made.seconds, 4)},
    )


def kept(entry: Entry) -> tuple[Evaluation, Verdict]:
    """What :func:`keep` wrote."""
    data = entry.data
    score = _unpack(data["score"]).numbered(data["examined"] or 1)
    names = ("examples", "total", "key", "rung", "examined")
    evaluation = Evaluation(
        data["what"], score.value, data["measured"]["seconds"], *(data[name] for name in names)
    )
    return evaluation, Verdict(data["met"], score, data["complete"], data.get("allowed"))


def _pack(score: Score) -> dict[str, Any]:
    """A score as plain data, to the last bit."""
    others = {name: _pack(part) for name, part in score.others.items()}
    plain = {"value": score.value, "per_example": _plain(score.per_example)}
    if score.resampled is not None:
        plain["resampled"] = {name: _plain(value) for name, value in vars(score.resampled).items()}
    return {**plain, "others": others} if others else plain


def _unpack(data: dict[str, Any]) -> Score:
    others = {name: _unpack(part) for name, part in data.get("others", {}).items()}
    resampled = data.get("resampled")
    if resampled is not None:
        resampled = Resampled(**{name: _rich(value) for name, value in resampled.items()})
    return Score(data["value"], _rich(data["per_example"]), others, resampled=resampled)


def _plain(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    array = value.numpy()
    content = base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes())).decode()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "zlib": content}


def _rich(value: Any) -> Any:
    if not isinstance(value, dict) or "zlib" not in value:
        return value
    content = zlib.decompress(base64.b64decode(value["zlib"]))
    return torch.from_numpy(np.frombuffer(content, value["dtype"]).reshape(value["shape"]).copy())
