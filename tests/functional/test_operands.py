"""What each function says about operands that cannot be."""

import pytest
import torch

from halfstep.errors import FormatError
from halfstep.formats import Codebook, Integer
from halfstep.functional import dequantize, fake_quantize, fake_quantize_learned, quantize
from halfstep.granularity import PerChannel, PerGroup, PerTensor

ONE = torch.ones(())
S8, U8 = Integer(8), Integer(8, signed=False, symmetric=False)


@pytest.mark.parametrize("function", [quantize, fake_quantize])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_floats_are_needed(function, dtype):
    with pytest.raises(FormatError, match=rf"x: got {dtype}, needed float16, bfloat16, float32 or float64"):
        function(torch.zeros(3).to(dtype), ONE, None, S8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_codes_are_integers(dtype):
    with pytest.raises(FormatError, match=rf"codes: got {dtype}, needed integers"):
        dequantize(torch.zeros(3, dtype=dtype), ONE, None, S8)


@pytest.mark.parametrize("function", [quantize, fake_quantize])
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
def test_scales_are_positive_and_finite(function, scale, granularity):
    scales = torch.full(granularity.parameter_shape((2, 3)), scale)
    if scales.dim():
        scales[0] = 1.0
    with pytest.raises(FormatError, match=r"scale: got .* needed positive finite numbers"):
        function(torch.zeros(2, 3), scales, None, S8, granularity)


def test_parameters_have_the_granularitys_shape():
    x = torch.zeros(2, 3)
    message = r"scale: got shape \(2,\), needed \(3,\) for a tensor of shape \(2, 3\) quantized per channel of axis 1"
    with pytest.raises(FormatError, match=message):
        fake_quantize(x, torch.ones(2), None, S8, PerChannel(1))
    with pytest.raises(FormatError, match=r"zero_point: got shape \(2,\), needed \(\)"):
        fake_quantize(x, ONE, torch.zeros(2, dtype=torch.int32), U8)
    with pytest.raises(FormatError, match=r"scale: got shape \(2, 1\), needed \(2, 2\)"):
        fake_quantize(x, torch.ones(2, 1), None, S8, PerGroup(1, 2))


def test_scale_is_a_float():
    with pytest.raises(FormatError, match=r"scale: got torch.int64, needed a float tensor"):
        fake_quantize(torch.zeros(3), torch.ones((), dtype=torch.int64), None, S8)


def test_an_affine_format_needs_a_zero_point():
    with pytest.raises(
        FormatError, match="zero_point: got None, needed a tensor for the affine format u8 affine"
    ):
        fake_quantize(torch.zeros(3), ONE, None, U8)


def test_a_format_is_needed():
    with pytest.raises(FormatError, match="format: got 'int8', needed one of Integer, Codebook, Floating"):
        fake_quantize(torch.zeros(3), ONE, None, "int8")  # type: ignore[arg-type]


def test_learned_values_are_at_least_two():
    with pytest.raises(FormatError, match=r"values: got shape \(1,\), needed 2 or more"):
        fake_quantize_learned(torch.zeros(3), torch.zeros(1))
    with pytest.raises(
        FormatError, match=r"codebook: got tables for parameters of shape \(3,\), needed \(2,\)"
    ):
        fake_quantize_learned(torch.zeros(2, 3), torch.randn(3, 4), None, PerChannel(0))


def test_the_fixed_zero_point_is_not_read():
    x = torch.randn(100)
    nonsense = torch.tensor(99)
    for format in (S8, Integer(8, signed=False), Codebook.nf4()):
        expected = fake_quantize(x, ONE, None, format)
        assert torch.equal(fake_quantize(x, ONE, nonsense, format), expected)
