"""Every public function beside the scalar reference, on tensors that hypothesis makes."""

import numpy as np
import pytest
import scalar_reference as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.formats import E2M1, E4M3, E5M2, Codebook, Floating, Integer
from halfstep.functional import dequantize, fake_quantize, quantize
from halfstep.granularity import PerChannel, PerGroup, PerTensor

FORMATS = [
    Integer(8),
    Integer(8, signed=False),
    Integer(8, symmetric=False),
    Integer(8, signed=False, symmetric=False),
    Integer(8, signed=False, symmetric=False, round_shifted=True),
    Integer(2),
    Integer(3, mid_rise=True),
    Integer(4, signed=False, mid_rise=True),
    Integer(5, power_of_two=True),
    Integer(16, symmetric=False),
    Integer(16, signed=False, symmetric=False),
    Codebook.nf4(),
    Codebook.apot(3, signed=False),
    Codebook.binary(),
    Codebook.ternary(),
    Codebook.rule([0, 1, 2], [0, 1], ties_up=True),
    E4M3,
    E5M2,
    E2M1,
    Floating(3, 2),
]
GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(-1), PerGroup(1, 2)]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, 1e-40, -1e-45, 6e-8, 3e38, -3e38]
SPECIAL += [float("nan"), float("inf"), -float("inf")]

numbers = st.one_of(st.sampled_from(SPECIAL), st.floats(-8, 8, width=32), st.floats(width=32))


@st.composite
def tensors(draw):
    """A tensor of two or three axes, empty ones and single elements too, and not always contiguous."""
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    if draw(st.integers(0, 9)) == 0:
        shape = (0, *shape[1:])
    elements = draw(
        st.one_of(
            st.lists(numbers, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))),
            numbers.map(lambda v: [v] * int(np.prod(shape))),
        )
    )
    x = torch.tensor(elements, dtype=draw(st.sampled_from(DTYPES))).reshape(shape)
    match draw(st.sampled_from(["as it is", "transposed", "strided"])):
        case "transposed":
            x = x.transpose(0, 1)
        case "strided":
            x = x.repeat_interleave(2, -1)[..., ::2]
    return x


@st.composite
def cases(draw, format, granularity):
    x = draw(tensors())
    shape = granularity.parameter_shape(x.shape)
    count = int(np.prod(shape))
    scale = draw(
        st.lists(st.sampled_from([1.0, 0.5, 0.1, 0.013, 3.7, 2.0**-100]), min_size=count, max_size=count)
    )
    zero_point = [0] * count
    if isinstance(format, Integer):
        codes = st.integers(format.quant_min, format.quant_max)
        zero_point = draw(st.lists(codes, min_size=count, max_size=count))
    return x, torch.tensor(scale).reshape(shape), torch.tensor(zero_point, dtype=torch.int32).reshape(shape)


def bits(x):
    """Bit patterns, so that -0.0 differs from 0.0; any NaN is the same NaN."""
    size = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return torch.where(x.isnan(), 7, x.contiguous().view(size))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_fast_is_the_scalar_reference_bit_for_bit(format, granularity):
    @settings(deadline=None, max_examples=25)
    @given(cases(format, granularity))
    def check(case):
        x, scale, zero_point = case
        before = x.clone()
        codes = quantize(x, scale, zero_point, format, granularity)
        back = dequantize(codes, scale, zero_point, format, granularity, dtype=x.dtype)
        simulated = fake_quantize(x, scale, zero_point, format, granularity)
        assert torch.equal(bits(x), bits(before)), "x is not modified"
        assert codes.dtype == format.dtype
        assert simulated.dtype == back.dtype == x.dtype
        assert codes.shape == simulated.shape == back.shape == x.shape
        kind = np.float64 if x.dtype == torch.float64 else np.float32
        expected_codes, expected = torch.zeros(x.shape, dtype=torch.int64), torch.zeros_like(x)
        for index in np.ndindex(*x.shape):
            own = reference.owner(index, granularity)
            s, z, number = scale[own].item(), zero_point[own].item(), kind(x[index].item())
            code = reference.code(number, s, z, format, ())
            expected_codes[index] = code
            with np.errstate(all="ignore"):
                expected[index] = float(reference.value(code, s, z, format, (), kind))
        assert torch.equal(codes.long(), expected_codes)
        assert torch.equal(bits(back), bits(expected))
        expected[x.isnan()] = float("nan")
        assert torch.equal(bits(simulated), bits(expected))

    check()


@settings(deadline=None, max_examples=25)
@given(st.data())
def test_one_table_per_parameter_is_the_scalar_reference(data):
    granularity = data.draw(st.sampled_from(GRANULARITIES[1:]))
    x = data.draw(tensors())
    shape = granularity.parameter_shape(x.shape)
    if 0 in shape:
        return
    steps = torch.tensor(data.draw(st.lists(st.integers(1, 9), min_size=4, max_size=4)), dtype=torch.float32)
    starts = torch.arange(float(np.prod(shape))).reshape(shape) - 3
    table = Codebook(starts[..., None] + steps.cumsum(0) / 4, scaled=data.draw(st.booleans()))
    scale = torch.full(shape, 0.5)
    codes = quantize(x, scale, None, table, granularity)
    kind = np.float64 if x.dtype == torch.float64 else np.float32
    for index in np.ndindex(*x.shape):
        own = reference.owner(index, granularity)
        code = reference.code(kind(x[index].item()), 0.5, 0, table, own)
        assert codes[index] == code
    back = dequantize(codes, scale, None, table, granularity, dtype=x.dtype)
    simulated = fake_quantize(x, scale, None, table, granularity)
    assert torch.equal(bits(simulated)[~x.isnan()], bits(back)[~x.isnan()])
    assert simulated[x.isnan()].isnan().all()
