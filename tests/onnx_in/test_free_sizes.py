"""Sizes of a file's inputs: a batch that is fixed becomes one of any size, dimensions with names vary."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

import halfstep as hs
from bench.networks.vit import SmallViT
from halfstep.errors import CaptureError, DataError
from halfstep.fake_quantize import Mode
from halfstep.runtime.deployed import DeployedModel
from tests.onnx_in.files import export, write

make = helper.make_node


def shapes(path):
    graph = onnx.load(path).graph
    return {
        value.name: [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def calibrated(path, example, batch, **options):
    q = hs.prepare(path, example, **options)
    hs.observe(q, [batch])
    hs.calibrate(q, hs.Max())
    return q


@pytest.fixture
def patches(tmp_path):
    """The beginning of a ViT as exporters write it for a fixed batch: the token is stored once for each example."""

    def file(size):
        rng = np.random.default_rng(0)
        stored = {"w": rng.normal(size=(8, 1, 2, 2)), "f": rng.normal(size=(8, 5))}
        stored["token"] = np.broadcast_to(rng.normal(size=8), (size, 1, 8))
        stored = {name: value.astype(np.float32) for name, value in stored.items()}
        stored |= {
            "flat": np.array([size, 8, 9]),
            "heads": np.array([size * 2, 10, 4]),
            "back": np.array([size, 80]),
        }
        nodes = [
            make("Conv", ["x", "w"], ["c"], name="/patch/Conv", strides=[2, 2]),
            make("Reshape", ["c", "flat"], ["r"], name="/patch/Reshape"),
            make("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
            make("Concat", ["token", "t"], ["a"], name="/Concat", axis=1),
            make("Reshape", ["a", "heads"], ["h"], name="/heads"),
            make("Relu", ["h"], ["u"], name="/Relu"),
            make("Reshape", ["u", "back"], ["k"], name="/back"),
            make("Add", ["k", "k"], ["y"], name="/Add"),
        ]
        return write(tmp_path / "m.onnx", nodes, {"x": [size, 1, 6, 6]}, {"y": [size, 80]}, stored)

    return file


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("example", [None, 1, 2])
def test_a_fixed_batch_becomes_one_of_any_size(size, example, patches, tmp_path):
    path = patches(size)
    given = None if example is None else torch.randn(example * size, 1, 6, 6)
    with pytest.warns(
        UserWarning, match=f"fixes its batch at {size}; it is read, and written, with a batch of any"
    ):
        q = calibrated(path, given, torch.randn(7, 1, 6, 6))
    x = torch.randn(size, 1, 6, 6)
    with q.using(Mode.FLOAT), torch.no_grad():
        assert torch.allclose(q(x), DeployedModel(path, runtime="onnxruntime")(x), atol=1e-5)
    out = hs.export_onnx(q, tmp_path / "q.onnx")
    assert DeployedModel(out)(torch.randn(5, 1, 6, 6)).shape == (5, 80)
    assert shapes(out) == {"x": ["batch", 1, 6, 6], "y": ["batch", 80]}


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 4])
def test_an_exported_network_with_a_fixed_batch(size, tmp_path):
    torch.manual_seed(0)
    model, x = SmallViT(width=24, depth=1).eval(), torch.randn(size, 1, 28, 28)
    network = hs.from_onnx(export(model, x, tmp_path / "m.onnx", fixed=True), x)
    x = torch.randn(7, 1, 28, 28)
    with torch.no_grad():
        assert torch.allclose(network(x), model(x), atol=1e-5)


def test_recurrent_layers_and_resizing_with_a_fixed_batch(tmp_path):
    rng = np.random.default_rng(0)
    stored = {"w": rng.normal(size=(1, 24, 4)), "r": rng.normal(size=(1, 24, 6)), "h": np.zeros((1, 1, 6))}
    stored = {name: value.astype(np.float32) for name, value in stored.items()}
    stored |= {"sizes": np.array([1, 2, 8, 4]), "flat": np.array([1, 16, 4])}
    nodes = [
        make("Resize", ["x", "", "", "sizes"], ["z"], name="resize", mode="nearest"),
        make("Reshape", ["z", "flat"], ["f"], name="flatten"),
        make("Transpose", ["f"], ["t"], perm=[1, 0, 2]),
        make("LSTM", ["t", "w", "r", "", "", "h", "h"], ["s", "last", "c"], name="lstm", hidden_size=6),
        make("Squeeze", ["last"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes[:-1], {"x": [1, 2, 4, 2]}, {"s": None}, stored)
    with pytest.raises(
        CaptureError, match=r"batch is fixed at 1 and cannot be made one of any size.*output 's'"
    ):
        hs.from_onnx(path)  # its output has the steps first
    nodes[-1] = make("Transpose", ["s"], ["y"], perm=[2, 0, 1, 3])
    path = write(tmp_path / "m.onnx", nodes, {"x": [1, 2, 4, 2]}, {"y": None}, stored)
    assert hs.from_onnx(path)(torch.randn(3, 2, 4, 2)).shape == (3, 16, 1, 6)


def test_a_batch_that_cannot_vary_is_refused_with_the_runtime_s_words(tmp_path):
    node = make("Gather", ["x", "second"], ["y"], name="pick", axis=0)
    path = write(tmp_path / "m.onnx", [node], {"x": [2, 3]}, {"y": None}, {"second": np.array([1, 0])})
    with pytest.raises(
        CaptureError, match=r"batch is fixed at 2 .* of 2 batches at once is another.*dynamic batch"
    ):
        hs.from_onnx(path)


def test_no_whole_number_of_batches(tmp_path):
    path = write(tmp_path / "m.onnx", [make("Relu", ["x"], ["y"])], {"x": [4, 3]}, {"y": None})
    with pytest.raises(DataError, match="input 'x': got a batch of 3, needed a multiple of 4"):
        hs.from_onnx(path, torch.randn(3, 3))


@pytest.fixture
def encoder(tmp_path):
    """Embeddings, attention with a mask, and a linear layer over tokens of any number."""
    rng = np.random.default_rng(0)
    stored = {
        "table": rng.normal(size=(9, 8)),
        "w": rng.normal(size=(8, 5)),
        "big": np.array(1e4),
        "one": np.array(1),
    }
    stored = {name: value.astype(np.float32) for name, value in stored.items()}
    stored["middle"] = np.array([1])
    nodes = [
        make("Gather", ["table", "ids"], ["e"], name="/embed"),
        make("Cast", ["mask"], ["m"], to=TensorProto.FLOAT),
        make("Sub", ["m", "one"], ["less"]),
        make("Mul", ["less", "big"], ["far"]),
        make("Unsqueeze", ["far", "middle"], ["wide"]),
        make("Transpose", ["e"], ["turned"], perm=[0, 2, 1]),
        make("MatMul", ["e", "turned"], ["scores"], name="/scores"),
        make("Add", ["scores", "wide"], ["masked"]),
        make("Softmax", ["masked"], ["chances"], axis=-1),
        make("MatMul", ["chances", "e"], ["mixed"], name="/mix"),
        make("MatMul", ["mixed", "w"], ["y"], name="/head/fc"),
    ]

    def file(ids=("batch", "tokens"), mask=("batch", "tokens"), nodes=nodes):
        inputs = {"ids": (TensorProto.INT64, list(ids)), "mask": (TensorProto.INT64, list(mask))}
        return write(tmp_path / "m.onnx", nodes, inputs, {"y": ["batch", "tokens", 5]}, stored)

    return file


def batch(size, tokens):
    return {"ids": torch.randint(0, 9, (size, tokens)), "mask": torch.ones(size, tokens, dtype=torch.int64)}


@pytest.mark.parametrize("names", [("tokens", "tokens"), ("tokens", "length"), (None, None)])
def test_dimensions_with_names_vary(encoder, names, tmp_path):
    path = encoder(("batch", names[0]), ("batch", names[1]))
    q = calibrated(path, batch(2, 6), batch(4, 9))
    out = hs.export_onnx(q, tmp_path / "q.onnx")
    x = batch(3, 5)
    assert torch.allclose(DeployedModel(out)(*x.values()), q(**x), atol=1e-4)
    assert shapes(out) == shapes(path)


def test_none_vary_on_request(encoder):
    q = hs.prepare(encoder(), batch(2, 6), dynamic={})
    with pytest.raises(DataError, match=r"needed \(batch, 6\)"):
        q(**batch(3, 5))


def test_what_the_graph_fixes_is_said(tmp_path):
    rng = np.random.default_rng(0)
    stored = {
        "w": rng.normal(size=(1, 24, 4)),
        "r": rng.normal(size=(1, 24, 6)),
        "f": rng.normal(size=(6, 3)),
    }
    stored = {name: value.astype(np.float32) for name, value in stored.items()} | {"one": np.array([1])}
    nodes = [
        make("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        make("LSTM", ["t", "w", "r"], ["s"], name="lstm", hidden_size=6),
        make("Squeeze", ["s", "one"], ["q"]),
        make("Transpose", ["q"], ["b"], perm=[1, 0, 2]),
        make("MatMul", ["b", "f"], ["y"], name="fc"),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"x": ["batch", "time", 4]}, {"y": ["batch", "time", 3]}, stored)
    with pytest.warns(
        UserWarning, match="lets 'time' vary, but its network is captured with the sizes of the example"
    ):
        q = calibrated(path, torch.randn(2, 5, 4), torch.randn(4, 5, 4))
    out = hs.export_onnx(q, tmp_path / "q.onnx")
    assert DeployedModel(out)(torch.randn(3, 9, 4)).shape == (3, 9, 3)  # the graph is the file's own
