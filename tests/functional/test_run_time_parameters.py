"""Ranges at run time: ONNX's own vectors, its reference evaluator, and the edges."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

import halfstep as hs
from halfstep.errors import FormatError
from halfstep.functional import quantize, run_time_parameters

U8 = hs.Integer(8, signed=False, symmetric=False)


def onnx_dynamic_quantize():
    make = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero_point"])
    outputs = [make("y", onnx.TensorProto.UINT8, None), make("scale", onnx.TensorProto.FLOAT, [])]
    outputs.append(make("zero_point", onnx.TensorProto.UINT8, []))
    graph = onnx.helper.make_graph([node], "g", [make("x", onnx.TensorProto.FLOAT, None)], outputs)
    return ReferenceEvaluator(onnx.helper.make_model(graph))


REFERENCE = onnx_dynamic_quantize()


@pytest.mark.parametrize(
    ("x", "scale", "zero_point"),
    [
        ([0, 2, -3, -2.5, 1.34, 0.5], 0.0196078438, 153),
        ([-1.0, -2.1, -1.3, -2.5, -3.34, -4.0], 0.0156862754, 255),
        ([1, 2.1, 1.3, 2.5, 3.34, 4.0, 1.5, 2.6, 3.9, 4.0, 3.0, 2.345], 0.0156862754, 0),
    ],
)
def test_onnx_vectors(x, scale, zero_point):
    got_scale, got_zero_point = run_time_parameters(torch.tensor(x), U8, hs.PerTensor())
    assert got_scale.item() == np.float32(scale)
    assert got_zero_point.item() == zero_point


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_codes_equal_those_of_onnx_s_reference(values):
    x = np.asarray(values, np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):  # it divides by a range of 0
        codes, scale, zero_point = REFERENCE.run(None, {"x": x})
    got_scale, got_zero_point = run_time_parameters(torch.from_numpy(x), U8, hs.PerTensor())
    if x.min() == x.max() == 0 or float(scale) < 2.0**-126:
        return  # the reference divides 0 by 0, and formats know no scale below float32's normal numbers
    assert got_scale.item() == scale
    assert got_zero_point.item() == zero_point
    ours = quantize(torch.from_numpy(x), got_scale, got_zero_point, U8)
    np.testing.assert_array_equal(ours.numpy(), codes)


def test_groups_of_a_row_have_ranges_of_their_own():
    x = torch.tensor([[1.0, -2.0, 0.0, 0.0, 127.0]])
    scale, zero_point = run_time_parameters(x, hs.Integer(8), hs.PerGroup(-1, 2))
    torch.testing.assert_close(scale, torch.tensor([[2 / 127, 1.0, 1.0]]))
    assert not zero_point.any()


def test_what_has_no_range_is_refused():
    with pytest.raises(FormatError, match="empty"):
        run_time_parameters(torch.zeros(0), U8, hs.PerTensor())
    with pytest.raises(FormatError, match="needed a format with zero point 0"):
        run_time_parameters(torch.zeros(2), hs.Integer(8, signed=False), hs.PerTensor())
