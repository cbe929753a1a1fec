import ml_dtypes
import numpy as np
import pytest
import torch

from halfstep.errors import FormatError
from halfstep.formats import E2M1, E4M3, E5M2, Floating, Format
from halfstep.functional import dequantize, fake_quantize, quantize

ONE = torch.ones(())


def test_facts_of_the_standards():
    assert (E4M3.largest, E5M2.largest, E2M1.largest) == (448.0, 57344.0, 6.0)
    assert (Floating(3, 2).largest, Floating(2, 3).largest) == (28.0, 7.5)
    assert [f.bits for f in (E4M3, E5M2, E2M1)] == [8, 8, 4]
    assert [str(f) for f in (E4M3, E5M2, E2M1)] == ["E4M3", "E5M2", "E2M1"]
    assert isinstance(E4M3, Format)
    assert E2M1.symmetric
    assert E2M1.levels == 16


def test_all_numbers_of_e2m1():
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    numbers = dequantize(torch.arange(16), ONE, None, E2M1)
    assert numbers.tolist() == positive + [-v for v in positive]
    assert numbers.signbit().tolist() == [False] * 8 + [True] * 8


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        (E4M3, ml_dtypes.float8_e4m3fn),
        (E5M2, ml_dtypes.float8_e5m2),
        (E2M1, ml_dtypes.float4_e2m1fn),
        (Floating(3, 2), ml_dtypes.float6_e3m2fn),
        (Floating(2, 3), ml_dtypes.float6_e2m3fn),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype_in", [torch.float32, torch.float64])
def test_rounding_is_ml_dtypes_on_every_number_and_every_midpoint(format, dtype, dtype_in):
    """Both torch's own conversion and our arithmetic, at all finite numbers, ties and their neighbours."""
    patterns = np.arange(format.levels, dtype=np.uint8)
    numbers = patterns.view(dtype).astype(np.float64)
    numbers = np.unique(numbers[np.isfinite(numbers) & (np.abs(numbers) <= format.largest)])
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = np.concatenate([numbers, ties, np.nextafter(ties.astype(np.float32), np.float32(9e9)), [3e38, -3e38]])
    x = np.concatenate([x, np.nextafter(ties.astype(np.float32), np.float32(-9e9))])
    expected = (np.clip(x, -format.largest, format.largest) + 0.0).astype(dtype).astype(np.float64)
    found = fake_quantize(torch.tensor(x, dtype=dtype_in), ONE, None, format)
    assert found.tolist() == expected.tolist()
    assert found.signbit().tolist() == np.signbit(expected).tolist()


@pytest.mark.parametrize(
    "format", [E4M3, E5M2, E2M1, Floating(3, 2), Floating(2, 3), Floating(5, 1)], ids=str
)
def test_every_code_comes_back(format):
    codes = torch.arange(format.levels, dtype=torch.uint8)
    numbers = dequantize(codes, ONE, None, format, dtype=torch.float64)
    finite = numbers.isfinite() & (numbers.abs() <= format.largest)
    finite &= (numbers != 0) | ~numbers.signbit()  # as in ONNX -0.0 is taken for 0.0
    assert torch.equal(quantize(numbers, ONE, None, format)[finite], codes[finite])
    assert torch.equal(fake_quantize(numbers, ONE, None, format)[finite], numbers[finite])


def test_float64_is_rounded_once():
    """By way of float32 this would become the tie 1.0625 and go down to 1."""
    x = torch.tensor(1.0625 + 2.0**-40, dtype=torch.float64)
    assert fake_quantize(x, ONE, None, E4M3) == 1.125


@pytest.mark.parametrize("format", [E4M3, E5M2, E2M1, Floating(3, 2)], ids=str)
def test_it_saturates_and_keeps_nan(format):
    x = torch.tensor([float("inf"), -float("inf"), 1e30, float("nan")])
    found = fake_quantize(x, torch.tensor(2.0), None, format)
    assert found[:3].tolist() == [2 * format.largest, -2 * format.largest, 2 * format.largest]
    assert found[3].isnan()
    nan = dequantize(quantize(x, ONE, None, format), ONE, None, format)[3]
    assert nan.isnan() if format.storage else nan == 0


def test_parameters_put_the_farther_end_on_the_largest_number():
    scale, zero_point = E4M3.parameters(torch.tensor([-7.0, 0.0]), torch.tensor([3.5, 0.0]))
    assert scale.tolist() == [7 / 448, 1.0]
    assert zero_point.tolist() == [0, 0]
    assert [end.tolist() for end in E4M3.range(scale)] == [[-7.0, -448.0], [7.0, 448.0]]


def test_bad_input():
    with pytest.raises(FormatError, match="got 1 exponent and 3 mantissa bits, needed 2 to 5 and 1 to 3"):
        Floating(1, 3)
    with pytest.raises(FormatError, match=r"storage: got torch.float8_e5m2, needed the torch dtype of E4M3"):
        Floating(4, 3, torch.float8_e5m2)
