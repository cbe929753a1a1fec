"""Sums that saturate: which files answer otherwise on processors that add two products in 16 bits."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import halfstep as hs
from halfstep.runtime.saturation import holds_on, saturable_layers, saturates_here

GENERATOR = np.random.default_rng(0)


def product(weight, op="MatMul", activation=np.uint8, clip=None, **attributes):
    """A file with one product of codes between quantizers; scales of 1."""
    zero = np.array(0, activation)
    shape = ["n", weight.shape[0]] if op in ("MatMul", "Gemm") else ["n", None, None, None]
    tensors = {
        "w": weight,
        "s": np.float32(1),
        "out": np.float32(2**14),
        "z": zero,
        "wz": np.array(0, weight.dtype),
    }
    nodes = []
    if clip is not None:
        tensors |= {"low": np.float32(0), "high": np.float32(clip)}
        nodes.append(helper.make_node("Clip", ["x", "low", "high"], ["c"]))
    nodes += [
        helper.make_node("QuantizeLinear", ["x" if clip is None else "c", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s", "wz"], ["dw"]),
        helper.make_node(op, ["d", "dw"], ["sums"], "layer/product", **attributes),
        helper.make_node("QuantizeLinear", ["sums", "out", "z"], ["qo"]),
        helper.make_node("DequantizeLinear", ["qo", "out", "z"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name="halfstep"
    )


def saved(model, folder):
    onnx.save(model, folder / "product.onnx")
    return folder / "product.onnx"


def column(*codes):
    return np.array(codes, np.int8)[:, None]


FILES = {
    "two large codes": (product(column(127, 2, 3, 2)), True),
    "two large codes apart": (product(column(127, 0, 0, 2)), True),
    "of different signs": (product(column(127, -127, 0, 0)), False),
    "two negative ones": (product(column(-127, 0, 0, -3)), True),
    "at the edge": (product(column(64, 64, 0, 0)), False),
    "one beyond it": (product(column(65, 64, 0, 0)), True),
    "one product alone": (product(column(127)), False),
    "each in a channel of its own": (product(np.diag([127, 127]).astype(np.int8)), False),
    "channels first": (product(column(127, 127).T, "Gemm", transB=1), True),
    "channels first, each alone": (product(column(127, 127), "Gemm", transB=1), False),
    "few codes of activations": (product(column(127, 127), clip=128.0), False),
    "one code too many": (product(column(127, 127), clip=130.0), True),
    "signed activations": (product(column(127, 127), activation=np.int8), True),
    "weights without a sign": (product(column(127, 127).astype(np.uint8)), False),
    "a conv": (product(np.full((4, 2, 1, 1), 127, np.int8), "Conv"), True),
    "a depthwise conv": (product(np.full((4, 1, 3, 3), 127, np.int8), "Conv", group=4), False),
    "two outputs of each channel": (product(np.full((8, 1, 3, 3), 127, np.int8), "Conv", group=4), True),
    "transposed": (product(np.full((4, 1, 2, 2), 127, np.int8), "ConvTranspose"), True),
}


@pytest.mark.parametrize("name", FILES)
def test_a_layer_may_saturate_where_two_products_of_a_channel_exceed_16_bits(name, tmp_path):
    model, expected = FILES[name]
    assert saturable_layers(saved(model, tmp_path)) == (("layer",) if expected else ())


def saturating_sums(activations, weight):
    """What vpmaddubsw makes: neighbouring products are added in 16 bits."""
    pairs = (
        (activations.astype(np.int64)[:, :, None] * weight)
        .reshape(len(activations), -1, 2, weight.shape[1])
        .sum(2)
    )
    return np.clip(pairs, -(2**15), 2**15 - 1).sum(1)


@pytest.mark.parametrize("bits", [7, 8])
def test_sums_of_codes_of_7_bits_are_exact_in_pairs_of_16_bits(bits):
    low, high = hs.Integer(bits).quant_min, hs.Integer(bits).quant_max
    weight = GENERATOR.integers(low, high + 1, (256, 64))
    activations = np.concatenate([np.full((1, 256), 255), GENERATOR.integers(0, 256, (500, 256))])
    exact = np.array_equal(saturating_sums(activations, weight), activations @ weight)
    assert exact == (bits == 7)


def test_the_runtime_does_as_the_processor_is_said_to():
    """The largest codes there are, on the kernels of this processor."""
    x, weight = np.full((4, 64), 255, np.float32), np.full((64, 16), 127, np.int8)
    model = product(weight)
    plain = onnxruntime.SessionOptions()
    precise = onnxruntime.SessionOptions()
    precise.add_session_config_entry("session.x64quantprecision", "1")
    found, exact = (
        onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]
        for options in (plain, precise)
    )
    assert exact[0, 0] == pytest.approx(64 * 255 * 127, rel=0.01)
    assert bool((found < 0.9 * exact).any()) == saturates_here()


class Net(nn.Module):
    """Convs, a depthwise one among them, and a linear layer; large weights, so that sums are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.body = nn.Conv2d(16, 32, 3)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = torch.relu(self.depthwise(torch.relu(self.stem(x))))
        return self.fc(torch.relu(self.body(x)).mean((2, 3)))


X = torch.randn(64, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def exported(path, target, **options):
    q = hs.prepare(Net().eval(), X[:4], hs.Recipe.int8(**options), target)
    hs.observe(q, [X])
    hs.calibrate(q, hs.Max())
    return q, hs.export_onnx(q, path, check=False)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_portable_file_answers_as_simulated_on_any_processor(target, tmp_path):
    q, file = exported(tmp_path / "model.onnx", target, portable=True)
    proof = hs.verify(file, q, [X], rounds=3)
    assert proof.saturable == () and holds_on(proof.saturable) == "every processor"
    assert proof.parity.reaches(60.0) and proof.integer_layers == 4


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_file_of_8_bits_says_which_layers_may_saturate(target, tmp_path):
    q, file = exported(tmp_path / "model.onnx", target, portable=False)
    proof = hs.verify(file, q, [X], rounds=3)
    assert proof.saturable == ("stem", "body", "fc") and "3 layers may saturate" in holds_on(proof.saturable)
    assert proof.parity.reaches(60.0) != saturates_here()


def test_a_saturating_file_is_refused_with_the_cure(tmp_path):
    if not saturates_here():
        pytest.skip("needs a processor without VNNI")
    q, _ = exported(tmp_path / "model.onnx", "onnxruntime", portable=False)
    with pytest.raises(hs.HalfstepError, match=r"no instructions for 8-bit dot products.*portable=True"):
        hs.export_onnx(q, tmp_path / "checked.onnx")


def test_a_portable_file_is_the_same_to_kernels_that_add_in_32_bits(tmp_path):
    """ONNX Runtime's own switch to slower kernels that cannot saturate."""
    _, file = exported(tmp_path / "model.onnx", "onnxruntime", portable=True)
    precise = onnxruntime.SessionOptions()
    precise.add_session_config_entry("session.x64quantprecision", "1")
    answers = [
        onnxruntime.InferenceSession(str(file), options).run(None, {"x": X.numpy()})[0]
        for options in (onnxruntime.SessionOptions(), precise)
    ]
    assert np.array_equal(*answers)
