"""Layers at a step between the recipe and float: what becomes of the sites round them, and of their ranges."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.errors import ExportError, NotObservedError
from halfstep.export.verify import layer_fates
from halfstep.fidelity.compare import compare
from halfstep.graph.layer_precision import STEPS, LayerPrecision
from halfstep.precision import assigned, groups_of
from halfstep.runtime.deployed import DeployedModel, inspect_kernels
from halfstep.snapshot import Snapshot

IMAGES = torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(x + self.b(x))
        return self.fc(F.relu(self.c(x)).mean((2, 3)))


def quantized(target="onnxruntime", calibrator=None):
    torch.manual_seed(0)
    q = hs.prepare(Residual().eval(), IMAGES[:4], target=target)
    hs.observe(q, [IMAGES])
    hs.calibrate(q, calibrator)
    return q


def widths(q):
    return {name: module.format.bits for name, module in q.sites.items() if not name.endswith("weight")}


# 'b' and the add read what 'a' writes; 'c' reads the add, the pool reads 'c', and 'fc' the pool.
CASES = {
    "a": ({"x:int16": 16, "relu": 8, "b": 8, "relu:2": 8, "relu:3": 8, "global_average_pool": 8}, {"a"}),
    "b": ({"x": 8, "relu:int16": 16, "relu:2": 8, "relu:3": 8, "global_average_pool": 8}, {"a", "b"}),
    "c": ({"x": 8, "relu": 8, "b": 8, "relu:2:int16": 16, "global_average_pool": 8}, {"c"}),
    "fc": ({"x": 8, "relu": 8, "b": 8, "relu:2": 8, "relu:3": 8, "reshape:int16": 16}, {"fc"}),
}


@pytest.mark.parametrize("layer", CASES)
def test_16_bits_cost_integer_kernels_next_to_them_and_nowhere_else(layer, tmp_path):
    q = quantized()
    q.int16_layers = [layer]
    wide, floating = CASES[layer]
    assert widths(q) == wide
    file = hs.export_onnx(q, tmp_path / "model.onnx")
    assert compare(q, DeployedModel(file), [IMAGES]).sqnr > 50
    fates = {fate.name: fate for fate in layer_fates(q, inspect_kernels(file))}
    assert {name for name, fate in fates.items() if not fate.integer} == floating
    assert "onnxruntime computes layers with 16-bit activations in float" in fates[layer].reason


def test_the_range_of_16_bits_is_all_that_was_seen_and_the_usual_one_comes_back():
    q = quantized(calibrator=hs.Percentile(90))
    usual, answer = q.sites["relu"].range(), q(IMAGES)
    q.int16_layers = ["b"]
    _, high = q.sites["relu:int16"].range()
    assert float(high) == pytest.approx(q.sites["relu:int16"].histogram.max, rel=1e-3)
    assert float(high) > 1.5 * float(usual[1])
    twin = copy.deepcopy(q)
    assert twin.int16_layers == {"b"} and torch.equal(twin(IMAGES), q(IMAGES))
    q.int16_layers = []
    assert torch.equal(q(IMAGES), answer)
    hs.calibrate(q, hs.Max())
    hs.observe(q, [10 * IMAGES])
    q.int16_layers = ["b"]
    assert float(q.sites["relu:int16"].range()[1]) > 5 * float(high)  # it covers what was seen since


def test_without_statistics_16_bits_take_the_usual_range():
    q = quantized()
    _, high = q.sites["relu"].range()
    q.sites["relu"].forget()
    q.int16_layers = ["b"]
    assert torch.allclose(q.sites["relu:int16"].range()[1], high, rtol=1e-3)


def test_float_comes_before_16_bits_and_these_before_ranges_at_run_time():
    q = quantized()
    q.int16_layers, q.dynamic_layers = ["fc"], ["fc"]
    assert "reshape:int16" in q.sites
    q.float_layers = ["fc"]
    assert q.layers[-1].sites == () and not any("int16" in name for name in q.sites)
    assert q.precision.to_dict() == {"float_layers": ["fc"], "int16_layers": ["fc"], "dynamic_layers": ["fc"]}


def test_activations_that_have_no_fixed_range_stay_as_they_are():
    for recipe in (hs.Recipe.weight_only(8, group=None), hs.Recipe.dynamic()):
        q = hs.prepare(nn.Linear(32, 8).eval(), torch.randn(4, 32), recipe)
        before = list(q.sites)
        q.int16_layers = q.layer_names
        assert list(q.sites) == before


def test_tensorrt_refuses_16_bits(tmp_path):
    q = quantized("tensorrt")
    q.int16_layers = ["c"]
    with pytest.raises(ExportError, match="TensorRT stores codes as int8, int4, fp8 or fp4"):
        hs.export_onnx(q, tmp_path / "model.onnx")


class Bracketed(nn.Module):
    """Layers whose names are patterns too, of which one would match its neighbour."""

    def __init__(self):
        super().__init__()
        self.rows = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("a[0]", "a0", "b*", "b", "c?")})

    def forward(self, x):
        for layer in self.rows.values():
            x = layer(x).tanh()
        return x


def test_a_layer_whose_name_is_a_pattern_is_chosen_by_its_name():
    x = torch.randn(4, 4)
    q = hs.prepare(Bracketed(), x, hs.Recipe.int8().override("rows.c?", None))
    hs.observe(q, [x])
    hs.calibrate(q)
    for name in ("rows.a[0]", "rows.b*", "rows.c?"):
        q.float_layers = [name]
        assert q.float_layers == {name}
    assert next(layer for layer in q.layers if layer.name == "rows.c?").reason
    q.float_layers = ["rows.b?*", "rows.a?"]
    assert q.float_layers == {"rows.b*", "rows.a0"}


def test_a_candidate_of_several_steps_is_placed_once(monkeypatch):
    x = torch.randn(4, 4)
    q = hs.prepare(Bracketed(), x)
    hs.observe(q, [x])
    hs.calibrate(q)
    before = Snapshot.of(q)
    built = []
    build = hs.QuantizedModel._build
    monkeypatch.setattr(
        hs.QuantizedModel, "_build", lambda model: (built.append(model.precision), build(model))
    )
    first, second, third, *_ = groups_of(q)
    q.choose(
        assigned(LayerPrecision.of(float=first.layers), {second: STEPS["int16"], third: STEPS["dynamic"]})
    )
    wanted = LayerPrecision.of(float=first.layers, int16=second.layers, dynamic=third.layers)
    assert built == [wanted]
    before.restore()
    assert built == [wanted, LayerPrecision()]


def test_a_snapshot_brings_back_ranges_and_statistics_and_that_there_were_none():
    x = torch.randn(4, 4)
    q = hs.prepare(Bracketed(), x)
    hs.observe(q, [x])
    bare = Snapshot.of(q)
    hs.calibrate(q, hs.Max())
    ranged = Snapshot.of(q)
    name, site = next(iter(q.sites.items()))
    seen, scale = site.histogram, site.scale.clone()
    site.forget()
    hs.observe(q, [10 * x])
    hs.calibrate(q, hs.MSE())
    assert q.sites[name].histogram is not seen and not torch.equal(site.scale, scale)
    ranged.restore()
    assert q.sites[name].histogram is seen and torch.equal(site.scale, scale)
    assert site.calibrated_by == hs.Max()
    bare.restore()
    assert not any(site.calibrated for site in q.sites.values())
    with pytest.raises(NotObservedError, match="has no range yet"):
        site.range()


def test_a_model_has_a_list_for_every_step_and_no_other():
    lists = {name for name in dir(hs.QuantizedModel) if name.endswith("_layers")}
    assert lists == {step.attribute for step in STEPS.values()}


def test_journals_tell_the_precisions_with_all_lists_or_with_those_that_name_a_layer():
    put = LayerPrecision.of(float=["b", "a"], bits4=["c"])
    assert LayerPrecision.of_dict(put.to_dict()) == put
    whole = {step.attribute: [] for step in STEPS.values()}
    assert (
        LayerPrecision.of_dict({**whole, "float_layers": ["a", "b"], "bits4_layers": ["c"], "mode": ""})
        == put
    )


def test_weights_have_one_width_and_the_dearest_step_is_the_layer_s():
    put = LayerPrecision.of(bits4=["a", "b"], dynamic=["a"]).with_layers("bits8", ["a"])
    assert put == LayerPrecision.of(bits4=["b"], bits8=["a"], dynamic=["a"])
    assert [put.step_of(name) for name in "abc"] == ["dynamic", "bits4", None]
    assert put.but(dynamic=(), bits4=["a"]).with_layers("float", "a") == LayerPrecision.of(
        bits4=["a"], bits8=["a"], float=["a"]
    )
    assert hash(put) == hash(LayerPrecision.of(dynamic=["a"], bits8=["a"], bits4=["b"]))
