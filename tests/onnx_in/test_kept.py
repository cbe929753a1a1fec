"""What stays of a file: names, functions in which nothing is quantized; and what is said where something does not."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import halfstep as hs
from halfstep.errors import ArgumentError, ExportError, RecipeError
from halfstep.export.calls import changes
from halfstep.onnx_in.from_file import layers_of
from halfstep.runtime.deployed import DeployedModel, inspect_kernels
from halfstep.runtime.file import float_nodes
from halfstep.runtime.saturation import saturable_layers
from halfstep.targets import find_target
from tests.onnx_in.files import write

make = helper.make_node


def calibrated(path, x, recipe=None, **chosen):
    q = hs.prepare(path, x, recipe)
    for name, layers in chosen.items():
        setattr(q, name, layers)
    hs.observe(q, [x])
    hs.calibrate(q, hs.Max())
    return q


@pytest.fixture
def slashes(tmp_path):
    rng = np.random.default_rng(0)
    stored = {"w": rng.normal(size=(8, 3, 3, 3)), "f": rng.normal(size=(8, 4)), "g": rng.normal(size=(4, 4))}
    stored = {name: value.astype(np.float32) for name, value in stored.items()}
    nodes = [
        make("Conv", ["x", "w"], ["c"], name="/layer1/conv/Conv", pads=[1, 1, 1, 1]),
        make("Relu", ["c"], ["r"], name="/layer1/act/Relu"),
        make("GlobalAveragePool", ["r"], ["p"], name="/pool/GlobalAveragePool"),
        make("Flatten", ["p"], ["l"], name="/Flatten"),
        make("MatMul", ["l", "f"], ["h"], name="/fc/MatMul"),
        make("MatMul", ["h", "g"], ["y"], name="/layer1/MatMul"),
    ]
    return write(tmp_path / "m.onnx", nodes, {"x": ["n", 3, 6, 6]}, {"y": ["n", 4]}, stored)


def test_layers_have_the_whole_names_of_their_nodes(slashes, tmp_path):
    layers = ["/layer1/conv/Conv", "/fc/MatMul", "/layer1/MatMul"]
    assert layers_of(slashes) == layers
    x = torch.randn(4, 3, 6, 6)
    q = calibrated(slashes, x, float_layers=["/fc/*"])
    assert q.layer_names == layers and q.float_layers == {"/fc/MatMul"}
    out = hs.export_onnx(q, tmp_path / "q.onnx")
    floats = float_nodes(out, inspect_kernels(out), find_target("onnxruntime"))
    assert [node.name for node in floats if node.operator == "MatMul"] == ["/fc/MatMul"]
    assert set(saturable_layers(out)) <= set(layers)
    with pytest.raises(RecipeError, match="'fc' matches no layer; the nearest names are '/fc/MatMul'"):
        calibrated(slashes, x, float_layers=["fc"])


def block(name, weight):
    """A call of the function that all blocks share."""
    return make("Block", [name, weight], [f"{name}{name}"], name=f"/{name}/Block", domain="mine")


@pytest.fixture
def functions(tmp_path):
    """Three calls of one function, two of which multiply by a weight, and one of another."""
    body = [make("MatMul", ["a", "b"], ["m"], name="MatMul"), make("Relu", ["m"], ["o"], name="Relu")]
    ends = [
        make("Softmax", ["a"], ["s"], name="Softmax", axis=-1),
        make("Mul", ["s", "a"], ["o"], name="Mul"),
    ]
    imports = [helper.make_opsetid("", 21)]
    rng = np.random.default_rng(0)
    stored = {name: rng.normal(size=(4, 4)).astype(np.float32) for name in ("u", "v")}
    nodes = [block("x", "u"), block("xx", "v"), make("Ends", ["xxxx"], ["y"], name="/Ends", domain="mine")]
    nodes.append(make("Ends", ["y"], ["z"], name="/Ends_1", domain="mine"))
    return write(
        tmp_path / "m.onnx",
        nodes,
        {"x": ["n", 4]},
        {"z": ["n", 4]},
        stored,
        domains=("mine",),
        functions=[
            helper.make_function("mine", "Block", ["a", "b"], ["o"], body, imports),
            helper.make_function("mine", "Ends", ["a"], ["o"], ends, imports),
        ],
    )


def test_functions_stay_where_nothing_in_them_is_quantized(functions, tmp_path):
    x = torch.randn(4, 4)
    q = calibrated(functions, x)
    first, second = q.layer_names
    q.float_layers = [second]
    out = hs.export_onnx(q, tmp_path / "q.onnx")
    model = onnx.load(out)
    assert [n.name for n in model.graph.node if n.domain == "mine"] == ["/xx/Block", "/Ends", "/Ends_1"]
    assert sorted(f.name for f in model.functions) == ["Block", "Ends"]
    (said,) = changes(q.captured.origin.source, out)
    assert "1 of 2 calls of the file's function 'Block' are written out" in said
    q.float_layers = []
    out = hs.export_onnx(q, tmp_path / "q.onnx")
    assert [f.name for f in onnx.load(out).functions] == ["Ends"]
    whole = hs.export_float(q, tmp_path / "float.onnx")
    assert [n.name for n in onnx.load(whole).graph.node] == [n.name for n in onnx.load(functions).graph.node]
    assert not changes(q.captured.origin.source, whole) and first


def test_a_version_that_is_raised_is_said_of_the_run(tmp_path):
    stored = {"w": np.random.default_rng(0).normal(size=(64, 32)).astype(np.float32)}
    node = make("MatMul", ["x", "w"], ["y"], name="fc")
    path = write(tmp_path / "m.onnx", [node], {"x": ["n", 64]}, {"y": ["n", 32]}, stored, opset=17)
    x = torch.randn(64, 64)
    outcome = hs.quantize(
        path,
        x,
        [x],
        hs.Cosine([torch.randn(64, 64)]),
        0.5,
        hs.Recipe.uniform(4, 8, ends=None),
        rungs=["ptq"],
        progress=False,
    )
    assert any("operator set 17 became 21" in str(decision) for decision in outcome.decisions)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_half_precision_becomes_float32_in_the_file_s_own_graph(kind, tmp_path):
    rng = np.random.default_rng(0)
    nodes = [
        make("Conv", ["x", "w"], ["c"], name="/conv/Conv", pads=[1, 1, 1, 1]),
        make("Cast", ["c"], ["e"], name="/Cast", to=TensorProto.FLOAT),
        make("Relu", ["e"], ["r"], name="/Relu"),
        make("Cast", ["r"], ["k"], name="/Cast_1", to=kind),
        make("GlobalAveragePool", ["k"], ["p"], name="/pool"),
        make("Flatten", ["p"], ["l"], name="/Flatten"),
        make("MatMul", ["l", "f"], ["y"], name="/fc/MatMul"),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"x": (kind, ["n", 3, 6, 6])}, {"y": (kind, ["n", 4])})
    model = onnx.load(path)
    for name, shape in {"w": (8, 3, 3, 3), "f": (8, 4)}.items():
        values = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(helper.make_tensor(name, kind, shape, values.reshape(-1)))
    onnx.save(model, path)
    half = torch.float16 if kind == TensorProto.FLOAT16 else torch.bfloat16
    x = torch.randn(4, 3, 6, 6).to(half)
    with pytest.warns(UserWarning, match=f"The file is in {half}; it is read, and written, in torch.float32"):
        q = calibrated(path, x)
    out = hs.export_onnx(q, tmp_path / "q.onnx")
    after = onnx.load(out)
    assert {n.name for n in model.graph.node} <= {n.name for n in after.graph.node}
    assert [v.type.tensor_type.elem_type for v in (*after.graph.input, *after.graph.output)] == [1, 1]
    assert torch.equal(q(x), q(x.float())) and DeployedModel(out)(x).dtype is torch.float32
    assert inspect_kernels(out).integer


def test_the_file_that_a_network_is_read_from_is_never_written_over(slashes, tmp_path):
    x = torch.randn(4, 3, 6, 6)
    source = slashes.rename(tmp_path / "float.onnx")
    content = source.read_bytes()
    q = calibrated(source, x)
    for write_file in (hs.export_onnx, hs.export_float):
        with pytest.raises(ExportError, match="is the file that the network was read from"):
            write_file(q, tmp_path / "." / "float.onnx")
    for model in (source, str(source), hs.from_onnx(source, x)):
        with pytest.raises(
            ArgumentError, match=r"directory: .* holds float\.onnx, which the network is read from"
        ):
            hs.quantize(model, x, [x], hs.Agreement([x]), 0.5, directory=tmp_path)
    source.rename(tmp_path / "model.onnx")  # anyone's, since no journal tells of it
    with pytest.raises(ArgumentError, match=r"holds model\.onnx and no journal, .* or fresh=True"):
        hs.quantize(torch.nn.Linear(4, 4), x[:, 0, :4, 0], [], hs.Agreement([]), 0.5, directory=tmp_path)
    assert (tmp_path / "model.onnx").read_bytes() == content
