"""Weights in another width than the recipe's: formats, ranges, and what comes back."""

import copy

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import RecipeError, RunError
from halfstep.fidelity.compare import compare
from halfstep.graph.layer_precision import STEPS, WIDTHS
from halfstep.precision import bits_on_request, fits, groups_of
from halfstep.runtime.deployed import DeployedModel
from halfstep.snapshot import Snapshot, fingerprint

INPUTS = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))


def quantized(recipe=None, target="onnxruntime", calibrated=True):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    q = hs.prepare(network.eval(), INPUTS[:4], recipe or hs.Recipe.int8(portable=True), target)
    hs.observe(q, [INPUTS])
    if calibrated:
        hs.calibrate(q)
    return q


def bits(q):
    return [q.sites[f"{name}.weight"].format.bits for name in ("0", "2", "4") if f"{name}.weight" in q.sites]


def test_a_width_changes_the_weight_alone_and_the_usual_one_comes_back_exactly():
    q = quantized(hs.Recipe.int8(portable=False))
    usual, before = {name: site.format for name, site in q.sites.items()}, fingerprint(q)
    q.bits4_layers, q.bits2_layers = ["2"], ["4"]
    assert bits(q) == [8, 4, 2]
    assert all(site.format == usual[name] for name, site in q.sites.items() if not name.endswith("weight"))
    assert bits_on_request(q) == -4 * 256 - 6 * 64
    q.bits4_layers = q.bits2_layers = []
    assert fingerprint(q) == before


@pytest.mark.parametrize("width", WIDTHS)
def test_its_range_is_the_nearest_and_the_file_answers_as_the_simulation(width, tmp_path):
    q = quantized()
    setattr(q, f"bits{width}_layers", q.layer_names)
    assert bits(q) == [min(width, 7)] * 3  # portable: where sums of pairs would saturate
    for name in ("0", "2", "4") if width < 8 else ():
        site = q.sites[f"{name}.weight"]
        low, high = hs.MSE().weight_range(q.weight(f"{name}.weight").detach(), site.format, site.granularity)
        assert torch.equal(site.scale, site.format.parameters(low, high)[0])
    file = hs.export_onnx(q, tmp_path / "model.onnx")
    assert compare(q, DeployedModel(file), [INPUTS]).sqnr > 60


def test_of_several_widths_the_widest_and_activations_have_their_own():
    q = quantized(hs.Recipe.int8(portable=False))
    q.bits2_layers, q.bits4_layers, q.int16_layers = ["2", "4"], ["2"], ["4"]
    assert bits(q) == [8, 4, 2]
    wide = [name for name, site in q.sites.items() if site.format.bits == 16]
    assert wide == ["3:int16"]
    q.float_layers = ["2"]
    assert bits(q) == [8, 2]


def test_widths_asked_for_before_calibration_are_calibrated_with_the_rest():
    q = quantized(calibrated=False)
    q.bits3_layers = ["2"]
    assert not q.sites["2.weight"].calibrated
    hs.calibrate(q)
    assert bool(q.sites["2.weight"].calibrated) and bits(q)[1] == 3


def test_codebooks_and_weights_in_float_have_no_width():
    for recipe in (hs.Recipe.codebook(hs.Codebook.nf4()), hs.Recipe.uniform(None, 8)):
        q = quantized(recipe)
        before = fingerprint(q)
        q.bits4_layers = q.layer_names
        assert fingerprint(q) == before


def test_an_integer_flavour_keeps_its_own_rules():
    q = quantized(hs.Recipe.uniform(hs.Integer(8, symmetric=False), 8, ends=None, portable=False))
    q.bits4_layers = ["2"]
    assert q.sites["2.weight"].format == hs.Integer(4, symmetric=False)


def test_a_copy_a_snapshot_and_a_state_dict_keep_widths():
    q = quantized()
    q.bits4_layers = ["2"]
    answer, kept = q(INPUTS), Snapshot.of(q)
    assert q.precision["bits4"] == {"2"}
    assert torch.equal(copy.deepcopy(q)(INPUTS), answer)
    state = {name: tensor.clone() for name, tensor in q.state_dict().items()}
    q.bits4_layers = ["0"]
    kept.restore()
    assert torch.equal(q(INPUTS), answer) and q.bits4_layers == {"2"}
    q.bits4_layers = []
    with pytest.raises(
        RunError, match=r"saved with bits4 layers \['2'\], this model has \[\]; set bits4_layers"
    ):
        q.load_state_dict(state)
    assert "bits4_layers" not in q.precision.to_dict()


def test_new_ranges_forget_those_of_widths_that_are_not_in_use():
    q = quantized()
    q.bits4_layers = ["2"]
    before = q.sites["2.weight"].scale.clone()
    q.bits4_layers = []
    with torch.no_grad():
        q.weight("2.weight").mul_(2.0)
    hs.calibrate(q)
    q.bits4_layers = ["2"]
    assert torch.allclose(q.sites["2.weight"].scale, 2 * before)


def test_a_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(RecipeError, match="pattern 'conv' matches no layer"):
        quantized().bits4_layers = ["conv"]


def test_wider_weights_are_a_step_towards_float_and_narrower_ones_are_none():
    q = quantized(hs.Recipe.uniform(4, 8, ends=None, portable=False))
    fitting = {name for name, step in STEPS.items() if fits(step, q, groups_of(q)[1])}
    assert fitting == {"bits6", "bits8", "dynamic", "int16", "float"}
    assert [step.bits for step in WIDTHS.values()] == [2, 3, 4, 6, 8]
