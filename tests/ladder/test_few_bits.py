"""Two to four bits through the whole ladder: uniform and in codebooks, the first and the last layer in eight."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch

import halfstep as hs
from halfstep.fake_quantize import Mode
from tests.ladder.climbing import climb, data, network

RUNGS = ("ptq", "partial", "qat")


BOOKS = {
    2: hs.Codebook(torch.tensor([-1.5, -0.45, 0.45, 1.5])),
    3: hs.Codebook(
        torch.tensor([-2.15, -1.34, -0.76, -0.25, 0.25, 0.76, 1.34, 2.15])
    ),  # of a normal variable
}

RECIPES = {
    "W3A4": hs.Recipe.uniform(3, 4, portable=True),
    "W2A4": hs.Recipe.uniform(2, 4, portable=True),
    "W2A3": hs.Recipe.uniform(2, 3, portable=True),
    "codebook of 2 bits, A4": replace(hs.Recipe.codebook(BOOKS[2], 4, ends=8), portable=True),
    "codebook of 3 bits, A3": replace(hs.Recipe.codebook(BOOKS[3], 3, ends=8), portable=True),
}


@cache
def climbed(name):
    """A climb to the top: no layer may go back to float, and no drop is allowed. Also how to make it again."""
    folder = Path(mkdtemp())
    marks, pinned = folder / "marks", hs.Partial(keep_quantized=["*"])
    again = partial(climb, folder / "run", marks, recipe=RECIPES[name], max_drop=0.0, partial=pinned)
    return again(), again, marks


@pytest.mark.parametrize("name", RECIPES)
def test_every_rung_is_climbed_and_the_file_answers_as_simulated(name):
    outcome, *_ = climbed(name)
    assert [step.rung for step in outcome.path] == list(RUNGS)
    weights = {name: outcome.model.sites[f"{name}.weight"].format.bits for name in ("0", "2", "4")}
    few = RECIPES[name].default
    assert weights == {
        "0": 7,
        "2": few.weights.bits,
        "4": 7,
    }  # 8 in portable files, whose sums never saturate
    inputs, _ = data()
    with torch.no_grad(), outcome.model.using(Mode.QUANTIZE):
        read = outcome.model.sites["1"].rounded(network()[:2](inputs)).unique()
    assert len(read) <= 2**few.activations.bits
    assert outcome.verification.parity.top1 == 1.0
    assert outcome.deployed_score == pytest.approx(outcome.score)
    assert outcome.score >= outcome.path[0].score


@pytest.mark.parametrize("name", ["W2A3", "codebook of 2 bits, A4"])
def test_the_same_call_again_evaluates_nothing(name):
    outcome, climb_again, marks = climbed(name)
    before = marks.read_text()
    again = climb_again()
    assert marks.read_text() == before
    assert again.decisions[-1] == outcome.decisions[-1]
    assert again.deployed_score == outcome.deployed_score
    states = again.model.state_dict(), outcome.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(
        torch.equal(states[0][name], tensor) for name, tensor in states[1].items() if torch.is_tensor(tensor)
    )


@pytest.mark.parametrize(
    ("target", "recipe"),
    [("openvino", "W2A3"), ("openvino", "codebook of 2 bits, A4"), ("tensorrt", "W2A4")],
)
def test_files_for_other_runtimes(target, recipe, tmp_path):
    inputs, _ = data()
    q = hs.prepare(network(), inputs[:4], RECIPES[recipe], target=target)
    hs.observe(q, inputs.split(32))
    hs.calibrate(q, hs.MSE(), hs.MSE())
    hs.reconstruct(q, options=hs.Reconstruction(steps=8))
    proof = hs.verify(hs.export_onnx(q, tmp_path / "model.onnx"), q, [inputs])
    assert proof.parity.top1 == 1.0
