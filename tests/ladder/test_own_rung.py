"""A rung of somebody's own: one class in one file, and the ladder, the journal and the outcome know what to do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import halfstep as hs
from halfstep.errors import ArgumentError
from tests.ladder.climbing import climb


@dataclass(frozen=True)
class WiderEnds(hs.Rung):
    """The first and the last layer in float."""

    name, title = "wider_ends", "Ends in float"
    layers: tuple[str, ...]
    needs: str = ""

    def climb(self, search):
        search.model.float_layers = self.layers
        return search.evaluate(f"{', '.join(self.layers)} in float")

    def cost(self, search):
        return hs.Cost(evaluations=1)

    def missing(self):
        return self.needs

    def identity(self):
        return repr(self.layers)


def ends(outcome):
    """The first and the last layer."""
    names = outcome.model.layer_names
    return names[0], names[-1]


@pytest.fixture(scope="module")
def rung():
    return WiderEnds(ends(climb(None, max_drop=1.0, rungs=("ptq",))))


def test_it_is_climbed_where_it_stands(rung, tmp_path):
    asked = {"max_drop": 0.0, "strict": True, "rungs": ("ptq", rung), "training": None}
    outcome = climb(tmp_path / "run", **asked)
    assert [step.rung for step in outcome.path] == ["ptq", "wider_ends"]
    assert "wider_ends 1" in next(said for said in outcome.decisions if said.startswith("Estimate"))
    made = [evaluation for evaluation in outcome.history if evaluation.rung == "wider_ends"]
    assert [evaluation.what for evaluation in made] == [f"{', '.join(rung.layers)} in float"]
    assert outcome.path[-1].what == made[0].what or outcome.path[-1].score >= made[0].score

    again = climb(tmp_path / "run", **asked)  # remembered like any other
    assert len(again.history) == len(outcome.history)
    assert again.decisions[1:] == outcome.decisions[1:]  # the first one estimates times
    outcome.report(tmp_path / "page.html")
    assert "wider_ends" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_it_is_left_out_where_it_lacks_something():
    lacking = WiderEnds(("none",), needs="a better day")
    outcome = climb(None, max_drop=1.0, rungs=("ptq", lacking), training=None)
    assert outcome.decisions[0] == "Ends in float is left out: it needs a better day"


def test_rungs_as_records_are_the_short_forms():
    short = climb(None, max_drop=0.03, rungs=("ptq", "partial"), max_float=1.0, training=None)
    records = climb(
        None, max_drop=0.03, rungs=(hs.PTQ(), hs.Partial(max_float=1.0)), max_float=None, training=None
    )
    assert [step.rung for step in short.path] == [step.rung for step in records.path]
    assert short.float_layers == records.float_layers and short.score == records.score


def test_what_cannot_be():
    with pytest.raises(
        ArgumentError, match=r"rungs: got 'wider_ends', 'ptq', needed each once and from the bottom"
    ):
        climb(None, rungs=(WiderEnds(()), "ptq"))
    with pytest.raises(ArgumentError, match=r"needed each once"):
        climb(None, rungs=("ptq", WiderEnds(()), WiderEnds(())))
    training = hs.Training([(torch.ones(2, 2), torch.ones(2))], torch.nn.functional.mse_loss)
    with pytest.raises(ArgumentError, match=r"training: given beside a rung that has its own, hs.QAT\(...\)"):
        climb(None, rungs=("ptq", hs.QAT(training)), training=training)
    with pytest.raises(ArgumentError, match=r"max_float: given beside a rung that has its own, hs.Partial"):
        climb(None, rungs=("ptq", hs.Partial()), max_float=0.1, training=None)
    with pytest.raises(ArgumentError, match=r"max_float: got 2, needed a share of the layers, 0 to 1"):
        hs.Partial(max_float=2)
