"""What a search did, and how the journal keeps it: evaluations of the metric, and decisions."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from halfstep.evaluate import Resampled, Score
from halfstep.journal import Entry, Journal


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
