"""Uniform formats against other people's vectors and runtimes."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep import functional
from halfstep.formats import Integer
from halfstep.granularity import PerChannel, PerTensor

U8, S8 = Integer(8, signed=False, symmetric=False), Integer(8)


def test_nvidias_vector():
    x = torch.tensor([0.9817, 0.8796, 0.9921, 0.4611, 0.0832, 0.1784, 0.3674, 0.5676, 0.3376, 0.2119])
    scale, zero_point = S8.parameters(torch.tensor(-1.0), torch.tensor(1.0))
    codes = functional.quantize(x, scale, zero_point, S8, PerTensor())
    scaled = S8.parameters(-x.max(), x.max())
    assert codes.tolist() == [125, 112, 126, 59, 11, 23, 47, 72, 43, 27]
    codes = functional.quantize(x, *scaled, S8, PerTensor())
    assert codes.tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]


def test_onnxs_dynamic_vector():
    scale, zero_point = U8.parameters(torch.tensor(-3.0), torch.tensor(2.0))
    assert scale.item() == pytest.approx(0.0196078438, rel=1e-7)
    assert zero_point.item() == 153


def test_widths():
    assert [(Integer(b).quant_min, Integer(b).quant_max) for b in (2, 4, 8)] == [
        (-1, 1),
        (-7, 7),
        (-127, 127),
    ]
    assert (U8.quant_min, U8.quant_max) == (0, 255)
    assert (Integer(8, signed=True, symmetric=False).quant_min) == -128


@pytest.mark.parametrize("bits", [0, 1, 17])
def test_impossible_widths(bits):
    with pytest.raises(ValueError, match=str(bits)):
        Integer(bits)


def test_a_range_without_zero_is_widened_and_an_empty_one_is_harmless():
    scale, zero_point = U8.parameters(torch.tensor(1e6), torch.tensor(1e6 + 1))
    assert zero_point.item() == 0
    assert scale.item() == pytest.approx((1e6 + 1) / 255)
    scale, zero_point = U8.parameters(torch.tensor(0.0), torch.tensor(0.0))
    assert (scale.item(), zero_point.item()) == (1.0, 0)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50),
    st.integers(2, 16),
    st.sampled_from([(True, True), (True, False), (False, False)]),
)
def test_error_is_at_most_half_a_step_and_zero_is_exact(values, bits, flavour):
    format = Integer(bits, signed=flavour[0], symmetric=flavour[1])
    x = torch.tensor(values)
    scale, zero_point = format.parameters(x.min(), x.max())
    low, high = format.range(scale, zero_point)
    y = functional.fake_quantize(x, scale, zero_point, format, PerTensor())
    inside = (x >= low) & (x <= high)
    slack = 1 + 1e-5 * 2**bits
    assert ((y - x).abs()[inside] <= scale / 2 * slack).all()
    assert ((y - x).abs() <= scale * slack).all()  # rounding the zero point moves the ends by half a step
    assert functional.fake_quantize(torch.zeros(1), scale, zero_point, format, PerTensor()).item() == 0.0
    assert torch.equal(functional.fake_quantize(y, scale, zero_point, format, PerTensor()), y)


def test_codes_equal_onnx_runtimes():
    helper = onnx.helper
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])],
        "g",
        [
            helper.make_tensor_value_info("x", 1, [None]),
            helper.make_tensor_value_info("s", 1, []),
            helper.make_tensor_value_info("z", 2, []),
        ],
        [helper.make_tensor_value_info("y", 2, [None])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = torch.cat([torch.randn(100_000) * 3, torch.arange(-600, 600) / 4])  # ties as well
    for low, high in ((-3.0, 5.0), (0.0, 63.75), (-8.0, 55.75)):
        scale, zero_point = U8.parameters(torch.tensor(low), torch.tensor(high))
        feed = {"x": x.numpy(), "s": scale.numpy(), "z": zero_point.numpy().astype(np.uint8)}
        codes = functional.quantize(x, scale, zero_point, U8, PerTensor())
        np.testing.assert_array_equal(session.run(None, feed)[0], codes.numpy())


def test_fast_and_differentiable_paths_are_equal_bit_for_bit():
    x = torch.randn(16, 3, 5)
    scale, zero_point = S8.parameters(-x.abs().amax((1, 2)), x.abs().amax((1, 2)))
    with torch.no_grad():
        fast = functional.fake_quantize(x, scale, zero_point, S8, PerChannel(0))
    slow = functional.fake_quantize(x.clone().requires_grad_(), scale, zero_point, S8, PerChannel(0))
    codes = functional.quantize(x, scale, zero_point, S8, PerChannel(0))
    assert torch.equal(fast, slow.detach())
    assert torch.equal(fast, functional.dequantize(codes, scale, zero_point, S8, PerChannel(0)))


def test_clipped_straight_through_gradient():
    x = torch.tensor([-2.0, -0.5, 0.3, 0.9, 4.0], requires_grad=True)
    scale, zero_point = S8.parameters(torch.tensor(-1.0), torch.tensor(1.0))
    functional.fake_quantize(x, scale, zero_point, S8, PerTensor()).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]
