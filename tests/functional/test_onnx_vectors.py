"""The ONNX standard's own node tests for quantization, and bit-equality with ONNX Runtime."""

import warnings
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from halfstep.formats import E2M1, E4M3, E5M2, Integer
from halfstep.functional import dequantize, fake_quantize, quantize
from halfstep.granularity import PerChannel, PerGroup, PerTensor

INTEGERS = {
    f"{sign}int{bits}": Integer(bits, signed=not sign, symmetric=False)
    for sign in ("", "u")
    for bits in (2, 4, 8, 16)
}
FLOATS = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2, "float4_e2m1fn": E2M1}

# Every node test of these operators is run; none is left out. The "expanded" cases are the same vectors for the
# operator written out as a function.
NAMES = [
    "convinteger_without_padding",
    "convinteger_with_padding",
    "dequantizelinear",
    "dequantizelinear_axis",
    "dequantizelinear_e4m3fn",
    "dequantizelinear_e4m3fn_float16",
    "dequantizelinear_e4m3fn_zero_point",
    "dequantizelinear_e5m2",
    "dequantizelinear_uint16",
    "dequantizelinear_int16",
    "dequantizelinear_uint4",
    "dequantizelinear_int4",
    "dequantizelinear_uint2",
    "dequantizelinear_int2",
    "dequantizelinear_float4e2m1",
    "dequantizelinear_blocked",
    "dynamicquantizelinear",
    "dynamicquantizelinear_expanded",
    "dynamicquantizelinear_max_adjusted",
    "dynamicquantizelinear_max_adjusted_expanded",
    "dynamicquantizelinear_min_adjusted",
    "dynamicquantizelinear_min_adjusted_expanded",
    "matmulinteger",
    "qlinearconv",
    "qlinearmatmul_2D_uint8_float32",
    "qlinearmatmul_3D_uint8_float32",
    "qlinearmatmul_2D_uint8_float16",
    "qlinearmatmul_3D_uint8_float16",
    "qlinearmatmul_2D_int8_float32",
    "qlinearmatmul_3D_int8_float32",
    "qlinearmatmul_2D_int8_float16",
    "qlinearmatmul_3D_int8_float16",
    "quantizelinear",
    "quantizelinear_axis",
    "quantizelinear_e4m3fn",
    "quantizelinear_e5m2",
    "quantizelinear_uint16",
    "quantizelinear_int16",
    "quantizelinear_uint4",
    "quantizelinear_int4",
    "quantizelinear_uint2",
    "quantizelinear_int2",
    "quantizelinear_float4e2m1",
    "quantizelinear_blocked_asymmetric",
    "quantizelinear_blocked_symmetric",
]


@cache
def node_tests():
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the wheel computes other operators' cases with overflows
        cases = {case.name.removeprefix("test_"): case for case in load_model_tests(kind="node")}
    words = ("quantizelinear", "qlinear", "integer")
    return {name: case for name, case in cases.items() if any(word in name for word in words)}


def test_no_node_test_is_left_out():
    assert sorted(node_tests()) == sorted(NAMES)
    assert len(NAMES) == 45


def array(value):
    return numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)


def plain(value):
    """As a tensor: floats as they are, integers as int32, codes of small floats as their bit patterns."""
    value = array(value)
    if value.dtype.name in FLOATS:
        return torch.from_numpy(value.view(np.uint8).astype(np.int32))
    return torch.from_numpy(value if value.dtype.kind == "f" else value.astype(np.int32))


def format_of(value):
    return {**INTEGERS, **FLOATS}[array(value).dtype.name]


def granularity_of(scale, attributes):
    axis = attributes.get("axis", 1)
    if scale.dim() == 0:
        return PerTensor()
    return PerGroup(axis, attributes["block_size"]) if "block_size" in attributes else PerChannel(axis)


def quantize_linear(x, scale, zero_point, format, attributes):
    scale = plain(scale)
    zero_point = (
        torch.zeros(scale.shape, dtype=torch.int32)
        if zero_point is None
        else plain(zero_point).reshape(scale.shape)
    )
    return quantize(plain(x), scale, zero_point, format, granularity_of(scale, attributes))


def dequantize_linear(codes, scale, zero_point=None, dtype=torch.float32, **attributes):
    scale = plain(scale)
    zero_point = (
        torch.zeros(scale.shape, dtype=torch.int32)
        if zero_point is None
        else plain(zero_point).reshape(scale.shape)
    )
    return dequantize(
        plain(codes), scale, zero_point, format_of(codes), granularity_of(scale, attributes), dtype
    )


def single(value):
    """Scale or zero point of one element as a scalar."""
    value = array(value)
    return value.reshape(()) if value.size == 1 else value


def run(operator, attributes, inputs):
    """Compute an operator's outputs with our functions."""
    inputs = [*inputs, None, None]
    match operator:
        case "QuantizeLinear":
            x, scale, zero_point = inputs[:3]
            format = (
                INTEGERS["int16"]
                if attributes.get("output_dtype") == TensorProto.INT16
                else format_of(zero_point)
            )
            return [quantize_linear(x, scale, zero_point, format, attributes)]
        case "DequantizeLinear":
            codes, scale, zero_point = inputs[:3]
            dtype = torch.from_numpy(np.zeros(0, array(scale).dtype)).dtype
            return [dequantize_linear(codes, scale, zero_point, dtype, **attributes)]
        case "DynamicQuantizeLinear":
            x, format = plain(inputs[0]), INTEGERS["uint8"]
            scale, zero_point = format.parameters(x.min(), x.max())
            return [quantize(x, scale, zero_point, format), scale, zero_point]
        case "ConvInteger" | "MatMulInteger":
            a, b, a_zero, b_zero = inputs[:4]
            a = dequantize_linear(a, np.float32(1), single(a_zero), torch.float64)
            b_zero = np.zeros((), np.uint8) if b_zero is None else single(b_zero)
            b = dequantize_linear(b, np.ones(b_zero.shape, np.float32), b_zero, torch.float64, axis=0)
            if operator == "MatMulInteger":
                return [a @ b]
            return [torch.nn.functional.conv2d(a, b, padding=attributes.get("pads", [0])[0])]
        case "QLinearConv" | "QLinearMatMul":
            a, a_scale, a_zero, b, b_scale, b_zero, scale, zero = inputs[:8]
            a = dequantize_linear(a, single(a_scale), single(a_zero), torch.float64)
            b = dequantize_linear(b, single(b_scale), single(b_zero), torch.float64)
            y = a @ b if operator == "QLinearMatMul" else torch.nn.functional.conv2d(a, b)
            return [quantize_linear(y.numpy(), single(scale), single(zero), format_of(zero), {})]
    raise AssertionError(operator)


@pytest.mark.parametrize("name", NAMES)
def test_node(name):
    case = node_tests()[name]
    node = node_tests()[name.removesuffix("_expanded")].model.graph.node[0]
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    inputs, outputs = case.data_sets[0]
    found = run(node.op_type, attributes, inputs)
    for ours, expected in zip(found, outputs, strict=True):
        expected = plain(expected)
        if expected.is_floating_point():
            assert torch.equal(ours, expected)
            assert ours.dtype == expected.dtype
        else:
            assert torch.equal(ours.to(torch.int32), expected)


def runtime(x, scale, zero_point, kind, **attributes):
    """Codes and numbers of ONNX Runtime's QuantizeLinear and DequantizeLinear."""
    container = {TensorProto.INT8: np.int8, TensorProto.UINT8: np.uint8, TensorProto.UINT16: np.uint16}
    zero_point = zero_point.numpy().astype(container[kind])
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    graph = helper.make_graph(
        nodes,
        "pair",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor_value_info("q", kind, x.shape),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, x.shape),
        ],
        [numpy_helper.from_array(scale.numpy(), "s"), numpy_helper.from_array(zero_point, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    codes, numbers = session.run(None, {"x": x.numpy()})
    return torch.from_numpy(codes.astype(np.int32)), torch.from_numpy(numbers)


@pytest.mark.parametrize(
    ("kind", "format", "granularity", "attributes"),
    [
        (TensorProto.UINT8, Integer(8, signed=False, symmetric=False), PerTensor(), {}),
        (TensorProto.INT8, Integer(8, symmetric=False), PerTensor(), {}),
        (TensorProto.INT8, Integer(8, narrow=False), PerChannel(0), {"axis": 0}),
        (TensorProto.UINT8, Integer(8, signed=False, symmetric=False), PerChannel(1), {"axis": 1}),
        (TensorProto.UINT16, Integer(16, signed=False, symmetric=False), PerTensor(), {}),
        (TensorProto.INT8, Integer(8, symmetric=False), PerGroup(1, 16), {"axis": 1, "block_size": 16}),
    ],
    ids=str,
)
def test_onnx_runtime_agrees_bit_for_bit(kind, format, granularity, attributes):
    """Random numbers, exact ties, and numbers far outside the range."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 4096, generator=generator) * torch.logspace(-3, 3, 64)[:, None]
    clipped = x.clamp(-50, 50)
    low, high = granularity.reduce(clipped, "min") * 0.7, granularity.reduce(clipped, "max") * 0.9
    if format.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scale, zero_point = format.parameters(low, high)
    ties = granularity.expand(scale, x.shape) * (torch.randint(-99, 99, x.shape, generator=generator) + 0.5)
    for numbers in (x, ties):
        codes, expected = runtime(numbers, scale, zero_point, kind, **attributes)
        assert torch.equal(quantize(numbers, scale, zero_point, format, granularity).int(), codes)
        found = fake_quantize(numbers, scale, zero_point, format, granularity)
        assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
