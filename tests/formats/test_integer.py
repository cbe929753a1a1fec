import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.errors import FormatError
from halfstep.formats import Format, Integer
from halfstep.functional import quantize

U8 = Integer(8, signed=False, symmetric=False)
S8 = Integer(8)

finite = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32)


def scalar(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize(
    ("format", "quant_min", "quant_max", "zero_point", "dtype", "name"),
    [
        (Integer(8), -127, 127, 0, torch.int8, "s8 scale"),
        (Integer(8, narrow=False), -128, 127, 0, torch.int8, "s8 scale full"),
        (Integer(8, signed=False), 0, 255, 128, torch.uint8, "u8 scale"),
        (Integer(8, signed=False, narrow=True), 1, 255, 128, torch.uint8, "u8 scale narrow"),
        (Integer(8, symmetric=False), -128, 127, None, torch.int8, "s8 affine"),
        (U8, 0, 255, None, torch.uint8, "u8 affine"),
        (Integer(2), -1, 1, 0, torch.int8, "s2 scale"),
        (Integer(3), -3, 3, 0, torch.int8, "s3 scale"),
        (Integer(9, signed=False), 0, 511, 256, torch.int16, "u9 scale"),
        (Integer(16), -32767, 32767, 0, torch.int16, "s16 scale"),
        (Integer(16, signed=False), 0, 65535, 32768, torch.int32, "u16 scale"),
        (Integer(4, mid_rise=True), -8, 7, 0, torch.int8, "s4 scale mid-rise"),
        (Integer(4, power_of_two=True), -7, 7, 0, torch.int8, "s4 scale power-of-two"),
    ],
    ids=str,
)
def test_facts(format, quant_min, quant_max, zero_point, dtype, name):
    assert isinstance(format, Format)
    assert (format.quant_min, format.quant_max, format.fixed_zero_point) == (quant_min, quant_max, zero_point)
    assert (format.dtype, str(format)) == (dtype, name)
    assert format.levels == quant_max - quant_min + 1 <= 2**format.bits
    info = torch.iinfo(dtype)
    assert info.min <= quant_min <= quant_max <= info.max
    scale, _ = format.parameters(scalar(-3.0), scalar(1.0))
    assert scale.dtype == torch.float32
    # The outermost mid-rise level lies half a step inside the range, others at its end.
    assert (format.reach + format.half) * scale.item() >= 3.0 * (1 - 1e-6)


def test_narrow_none_is_resolved_so_that_equal_formats_are_equal():
    assert Integer(8) == Integer(8, narrow=True)
    assert hash(Integer(8)) == hash(Integer(8, narrow=True))
    assert Integer(8) != Integer(8, narrow=False)


@given(st.integers(2, 16), finite, finite)
def test_affine_parameters_are_the_missions(bits, one, other):
    """s = (2^b - 1) / (alpha - beta), z = -round(beta s) - 2^(b-1); here scale = 1 / s."""
    beta, alpha = min(one, other, 0.0), max(one, other, 0.0)
    if alpha - beta < 1e-25:
        return
    scale, zero_point = Integer(bits, symmetric=False).parameters(scalar(beta), scalar(alpha))
    s = (2**bits - 1) / (alpha - beta)
    assert scale.item() == np.float32((alpha - beta) / (2**bits - 1))
    rounded = -np.rint(beta / scale.item()) - 2 ** (bits - 1)
    assert zero_point.item() == min(max(rounded, -(2 ** (bits - 1))), 2 ** (bits - 1) - 1)
    # The mission's own s is not rounded to float32: 2**-24 of at most 2**16 steps.
    assert abs(zero_point.item() - (-beta * s - 2 ** (bits - 1))) <= 0.5 + 2.0**-8


@given(st.integers(2, 16), finite.map(abs))
def test_scale_parameters_are_the_missions(bits, alpha):
    """s = (2^(b-1) - 1) / alpha; here scale = 1 / s."""
    if alpha < 1e-25:
        return
    scale, zero_point = Integer(bits).parameters(scalar(-alpha), scalar(alpha))
    assert scale.item() == np.float32(alpha / (2 ** (bits - 1) - 1))
    assert zero_point.item() == 0


@pytest.mark.parametrize("symmetric", [True, False])
@given(low=finite, high=finite)
def test_unsigned_is_the_same_grid(symmetric, low, high):
    low, high = scalar(min(low, high)), scalar(max(low, high))
    if max(-low, high) < 1e-25:
        return
    signed, zero = Integer(8, symmetric=symmetric, narrow=False).parameters(low, high)
    unsigned, shifted = Integer(8, signed=False, symmetric=symmetric).parameters(low, high)
    assert signed == unsigned
    assert shifted == zero + 128


@given(finite, finite)
def test_the_range_covers_what_was_asked_for_up_to_half_a_step(low, high):
    low, high = scalar(min(low, high)), scalar(max(low, high))
    if max(-low, high) < 1e-25:
        return
    for format in (S8, U8, Integer(4, mid_rise=True), Integer(5, power_of_two=True)):
        scale, zero_point = format.parameters(low, high)
        first, last = format.range(scale.double(), zero_point)
        slack = 1e-6 * scale * format.reach + (0 if format.symmetric else scale / 2)
        assert first <= min(low, 0) + slack
        assert last >= max(high, 0) - slack


def test_a_range_far_from_zero_is_widened_to_zero():
    """Without it the zero point of [1e6, 1e6 + 1] would be -255000128."""
    scale, zero_point = U8.parameters(scalar(1e6), scalar(1e6 + 1))
    assert zero_point == 0
    assert scale == torch.tensor((1e6 + 1) / 255)
    _, zero_point = U8.parameters(scalar(-5.0), scalar(-4.0))
    assert zero_point == 255


def test_a_zero_range_gives_scale_1_and_zero_point_0():
    zero = torch.zeros(3)
    for format in (S8, U8, Integer(8, symmetric=False), Integer(4, power_of_two=True)):
        scale, zero_point = format.parameters(zero, zero)
        assert scale.tolist() == [1, 1, 1]
        assert zero_point.tolist() == [0, 0, 0]
    narrow = Integer(8, signed=False, symmetric=False, narrow=True)
    assert narrow.parameters(zero, zero)[1].tolist() == [1, 1, 1], "the code nearest to 0 that exists"


def test_a_mid_rise_format_has_no_zero_so_a_dead_channel_gets_the_smallest_scale():
    scale, _ = Integer(4, mid_rise=True).parameters(scalar(0.0), scalar(0.0))
    assert scale == 2.0**-126


def test_mid_rise_levels_are_odd_half_steps():
    format = Integer(2, mid_rise=True)
    scale, _ = format.parameters(scalar(-1.0), scalar(1.0))
    assert scale == 0.5
    codes = quantize(torch.tensor([-1.0, -0.6, -0.1, 0.0, 0.4, 0.9]), scale, None, format)
    assert codes.tolist() == [-2, -2, -1, 0, 0, 1]
    assert [end.item() for end in format.range(scale)] == [-1.0, 1.0]


@given(st.integers(-125, 120), st.floats(0.5, 1.0))
def test_power_of_two_scales_are_the_least_powers_of_two_that_cover_the_range(exponent, mantissa):
    wanted = mantissa * 2.0**exponent
    scale, _ = Integer(8, power_of_two=True).parameters(scalar(-127 * wanted), scalar(0.0))
    assert np.frexp(scale.item())[0] == 0.5
    assert wanted * (1 - 1e-15) <= scale.item() < 2 * wanted * (1 + 1e-15)


def test_a_scale_below_the_smallest_normal_float_is_treated_as_zero_with_a_warning():
    with pytest.warns(UserWarning, match="treated as zero"):
        scale, _ = U8.parameters(scalar(0.0), scalar(1e-37))
    assert scale == 1
    scale, _ = U8.parameters(scalar(0.0), scalar(1e-35))
    assert scale.item() == pytest.approx(1e-35 / 255), "no absolute floor such as torch's 1.19e-7"


def test_parameters_keep_the_shape():
    low = -torch.rand(2, 3, 4)
    scale, zero_point = U8.parameters(low, low + 2)
    assert scale.shape == zero_point.shape == low.shape
    assert zero_point.dtype == torch.int32


@pytest.mark.parametrize(
    ("low", "high"), [(float("nan"), 1.0), (0.0, float("inf")), (-float("inf"), 0.0), (2.0, 1.0)]
)
def test_a_range_that_cannot_be(low, high):
    with pytest.raises(FormatError, match=r"range: got low .* needed finite numbers with low <= high"):
        U8.parameters(scalar(low), scalar(high))


def test_a_range_beyond_float32():
    with pytest.raises(FormatError, match="does not fit float32"):
        U8.parameters(scalar(0.0), scalar(1e300))


@pytest.mark.parametrize("bits", [-1, 0, 1, 17])
def test_bits_out_of_range(bits):
    with pytest.raises(FormatError, match=f"bits: got {bits}, needed 2 to 16"):
        Integer(bits)


@pytest.mark.parametrize("options", [{"symmetric": False}, {"narrow": True}])
def test_mid_rise_needs_an_even_symmetric_grid(options):
    with pytest.raises(FormatError, match="mid_rise: got an affine or narrow format"):
        Integer(4, mid_rise=True, **options)


def test_an_affine_format_needs_a_zero_point():
    with pytest.raises(
        FormatError, match="zero_point: got None, needed a tensor for the affine format u8 affine"
    ):
        U8.range(scalar(1.0), None)
