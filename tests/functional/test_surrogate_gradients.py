"""Every surrogate against finite differences of the smooth function that it stands for, and published vectors."""

import pytest
import torch

from halfstep.formats import E4M3, Codebook, Integer
from halfstep.functional import (
    CLIPPED_STE,
    LSQ,
    PACT,
    STE,
    XNOR,
    StraightThrough,
    Xnor,
    binary_scale,
    fake_quantize,
    fake_quantize_learned,
)
from halfstep.granularity import PerChannel, PerGroup, PerTensor

U8 = Integer(8, signed=False, symmetric=False)
FORMATS = [
    Integer(3),
    Integer(4, signed=False, symmetric=False),
    Integer(4, symmetric=False),
    Integer(3, mid_rise=True),
    Codebook.nf4(),
    E4M3,
]
GRANULARITIES = [PerTensor(), PerChannel(0), PerGroup(1, 3)]
BALANCED_ONLY = StraightThrough(balanced=True)


def problem(format, granularity, seed=0):
    """Float64 numbers inside and outside the range, and the parameters of their granularity."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 5, 3, generator=generator, dtype=torch.float64) * 2
    shape = granularity.parameter_shape(x.shape)
    scale = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5) * 2.5 / format.reach
    zero_point = torch.zeros(shape, dtype=torch.float64)
    if isinstance(format, Integer) and not format.symmetric:
        zero_point += format.quant_min + 5.0
    grad = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x, scale, zero_point, grad


def surrogate(format, granularity, gradient, x0, scale0, zero_point0):
    """The smooth function whose derivative at (x0, scale0, zero_point0) the gradient is.

    The round-off r of the normalised number is frozen, then f(u) = clip(u + r) to the end levels.
    """
    expand = lambda p: granularity.expand(p, x0.shape)  # noqa: E731
    rounded = fake_quantize(x0, scale0, zero_point0, format, granularity) / expand(scale0)
    low0, high0 = (expand(end / scale0) for end in format.range(scale0, zero_point0))
    u0 = x0 / expand(scale0)
    inside = (u0 >= low0) & (u0 <= high0) | torch.tensor(not gradient.clipped)
    residual = rounded - u0

    def function(x, scale, zero_point):
        moved = expand(zero_point - zero_point0)  # the end levels are code - zero_point
        u = x / expand(scale)
        ends = rounded - moved
        if not gradient.rounding:  # PACT: the numbers inside pass as they are
            return torch.where(inside, x + (residual * expand(scale0)), ends * expand(scale))
        return torch.where(inside, u + residual, ends) * expand(scale)

    return function


def differences(function, arguments, grad, epsilon=1e-6):
    """Central differences of sum(grad * function) by each element of each argument."""
    result = []
    for k, argument in enumerate(arguments):
        slopes = torch.zeros_like(argument)
        for i in range(argument.numel()):
            ends = []
            for sign in (1, -1):
                moved = [a.clone() for a in arguments]
                moved[k].view(-1)[i] += sign * epsilon
                ends.append((grad * function(*moved)).sum())
            slopes.view(-1)[i] = (ends[0] - ends[1]) / (2 * epsilon)
        result.append(slopes)
    return result


@pytest.mark.parametrize("gradient", [STE, CLIPPED_STE, PACT], ids=["STE", "clipped", "PACT"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_gradients_are_the_surrogates_slopes(format, granularity, gradient):
    x, scale, zero_point, grad = problem(format, granularity)
    function = surrogate(format, granularity, gradient, x, scale, zero_point)
    torch.testing.assert_close(
        function(x, scale, zero_point), fake_quantize(x, scale, zero_point, format, granularity)
    )
    expected = differences(function, [x, scale, zero_point], grad)
    leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
    found = fake_quantize(*leaves, format, granularity, gradient)
    assert torch.equal(found, fake_quantize(x, scale, zero_point, format, granularity)), (
        "the forward is the same"
    )
    slopes = torch.autograd.grad(found, leaves, grad, materialize_grads=True)
    torch.testing.assert_close(slopes[0], expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(slopes[1], expected[1], rtol=1e-6, atol=1e-7)
    if isinstance(format, Integer) and not format.symmetric and gradient is not STE:
        torch.testing.assert_close(slopes[2], expected[2], rtol=1e-6, atol=1e-7)


def test_lsqs_vector():
    """x = [-2, -.6, .2, .5, 3], step .5, Qn = Qp = 2: d x^/d step = [-2, .2, -.4, 0, 2]."""
    table = Codebook(
        torch.arange(-2.0, 3.0), name="five levels"
    )  # -2 to 2 is no power of two: a codebook's grid
    x = torch.tensor([-2, -0.6, 0.2, 0.5, 3])
    slopes = []
    for i in range(5):
        step = torch.tensor(0.5, requires_grad=True)
        fake_quantize(x, step, None, table)[i].backward()
        slopes.append(step.grad.item())
    assert slopes == pytest.approx([-2, 0.2, -0.4, 0, 2], abs=1e-6)


def test_lsqs_vector_on_integers():
    """The same step on 3 bits, Qn = Qp = 3, where -2 / .5 and 3 / .5 are still outside."""
    x = torch.tensor([-2, -0.6, 0.2, 0.5, 3])
    slopes = []
    for i in range(5):
        step = torch.tensor(0.5, requires_grad=True)
        fake_quantize(x, step, None, Integer(3))[i].backward()
        slopes.append(step.grad.item())
    assert slopes == pytest.approx([-3, 0.2, -0.4, 0, 3], abs=1e-6)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_lsq_balances_by_the_square_root_of_elements_times_steps(granularity):
    x, scale, zero_point, grad = problem(Integer(4, signed=False, symmetric=False), granularity)
    slopes = {}
    for gradient in (CLIPPED_STE, LSQ):
        leaves = [t.clone().requires_grad_() for t in (x, scale, zero_point)]
        found = fake_quantize(*leaves, Integer(4, signed=False, symmetric=False), granularity, gradient)
        slopes[gradient] = torch.autograd.grad(found, leaves, grad)
    ones = torch.ones_like(x)
    factor = 1 / torch.sqrt(granularity.reduce(ones, "sum") * 15)
    torch.testing.assert_close(slopes[LSQ][0], slopes[CLIPPED_STE][0])
    torch.testing.assert_close(slopes[LSQ][1], slopes[CLIPPED_STE][1] * factor)
    torch.testing.assert_close(slopes[LSQ][2], slopes[CLIPPED_STE][2] * factor)


def test_a_learned_log2_step():
    """d/dt of 2**t is 2**t ln 2, so the slope is the step's, times step and ln 2: free of the step's own size."""
    x = torch.randn(100, dtype=torch.float64)
    slopes = []
    for factor in (1.0, 1024.0):
        step = torch.tensor(0.1 * factor, dtype=torch.float64, requires_grad=True)
        fake_quantize(x * factor, step, None, Integer(3)).sum().backward()
        t = torch.tensor(0.1 * factor, dtype=torch.float64).log2().requires_grad_()
        fake_quantize(x * factor, torch.exp2(t), None, Integer(3)).sum().backward()
        torch.testing.assert_close(t.grad, step.grad * step.detach() * torch.tensor(2.0).log())
        slopes.append(t.grad / factor)
    torch.testing.assert_close(slopes[0], slopes[1])


def test_pacts_alpha():
    """With scale = alpha / 255 the slope by alpha is the gradient of what was clipped above."""
    x = torch.tensor([-1.0, 0.5, 2.0, 7.0, 9.0])
    alpha = torch.tensor(6.0, requires_grad=True)
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    fake_quantize(x, alpha / 255, torch.zeros((), dtype=torch.int32), U8, gradient=PACT).backward(grad)
    assert alpha.grad.item() == pytest.approx(8 + 16)


def test_clipping_is_over_the_effective_range():
    """U8 with scale 1 and zero point 10 represents -10 to 245; its ends are inside."""
    x = torch.tensor([-10.4, -10.0, 0.0, 245.0, 245.4], requires_grad=True)
    fake_quantize(x, torch.ones(()), torch.tensor(10), U8).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
def test_an_end_at_zero_is_inside(granularity):
    """After a sigmoid, say, the range is [0, 1], and an exact 0 still moves."""
    x = torch.tensor([[0.0, 1.0, -0.1, 1.1]], requires_grad=True)
    shape = granularity.parameter_shape(x.shape)
    scale, zero_point = torch.full(shape, 1 / 255), torch.zeros(shape, dtype=torch.int32)
    fake_quantize(x, scale, zero_point, U8, granularity).sum().backward()
    assert x.grad.tolist() == [[1, 1, 0, 0]]


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_sum_for_a_scale_is_right_to_a_part_in_ten_thousand(bits, layout):
    """A million activations after ReLU whose gradients go with them: sum g x^ and sum k x are far larger than their
    difference."""
    format = Integer(bits, signed=False, symmetric=False)
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(64, 16, 32, 32, generator=generator).relu().to(memory_format=layout)
    grad = torch.randn(x.shape, generator=generator) + 0.1 * x
    scale, zero_point = format.parameters(torch.zeros(()), torch.tensor(3.0))
    slopes = []
    for dtype in (torch.float32, torch.float64):
        step = scale.to(dtype, copy=True).requires_grad_()
        fake_quantize(x.to(dtype), step, zero_point, format, gradient=LSQ).backward(grad.to(dtype))
        slopes.append(step.grad.item())
    assert slopes[0] == pytest.approx(slopes[1], rel=1e-4)


@pytest.mark.parametrize(("bits", "allowed"), [(4, 1e-3), (8, 0.05), (12, 1e-4), (16, 1e-4)])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
def test_the_sum_for_a_scale_is_no_noise_where_gradients_are(bits, allowed, granularity):
    """Gradients that have nothing to do with their activations, none of them clipped: the sum is far smaller."""
    format = Integer(bits, signed=False, symmetric=False)
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(2, 500_000, generator=generator).relu()
    grad = torch.randn(x.shape, generator=generator)
    scale, zero_point = format.parameters(*torch.tensor([[0.0], [6.0]]).expand(2, 2))
    if isinstance(granularity, PerTensor):
        scale, zero_point = scale[0], zero_point[0]
    step = scale.clone().requires_grad_()
    fake_quantize(x, step, zero_point, format, granularity).backward(grad)
    round_off = fake_quantize(x, scale, zero_point, format, granularity).double() - x.double()
    slopes = round_off * grad / granularity.expand(scale.double(), x.shape)
    wanted = granularity.reduce(slopes, "sum") if step.dim() else slopes.sum()
    spread = slopes.square().sum().div(step.numel()).sqrt()
    assert float((step.grad - wanted).abs().max() / spread) < allowed


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0)], ids=str)
def test_the_element_that_set_the_range_still_gets_its_gradient(granularity):
    """float32 rounds alpha / 127, so alpha may lie an ulp or two outside 127 steps."""
    x = torch.randn(512, 33).requires_grad_()
    reach = granularity.reduce(x.detach(), "absmax")
    scale, _ = Integer(8).parameters(-reach, reach)
    assert bool((scale.double() * 127 < reach).any()) or granularity == PerTensor()
    fake_quantize(x, scale, None, Integer(8), granularity).sum().backward()
    assert (x.grad == 1).all()


def test_xnors_gradient_is_the_slope_of_scale_and_sign_together():
    """W~_i = mean|W| sign(W_i), the sign's slope taken as 1[|W_i| <= 1]: 1/n + mean|W| 1[|W_i| <= 1]."""
    w = torch.tensor([[0.3, -0.8, 1.7, -2.0], [0.1, 0.2, -0.3, 5.0]], dtype=torch.float64)
    grad = torch.tensor([[1.0, -2.0, 3.0, 0.5], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)

    def own(i, j, moved):
        v = w.clone()
        v[i, j] = moved
        hard = w[i, j].sign() + (moved - w[i, j]) * (w[i, j].abs() <= 1)
        return v[i].abs().mean() * hard

    leaf = w.clone().requires_grad_()
    scale = binary_scale(w, PerChannel(0)).double()
    found = fake_quantize(leaf, scale, None, Codebook.binary(), PerChannel(0), XNOR)
    torch.testing.assert_close(found, scale[:, None] * w.sign())
    found.backward(grad)
    for i in range(2):
        for j in range(4):
            slope = (own(i, j, w[i, j] + 1e-6) - own(i, j, w[i, j] - 1e-6)) / 2e-6
            assert leaf.grad[i, j].item() == pytest.approx((slope * grad[i, j]).item(), rel=1e-6)
    assert Xnor(limit=2.0) != XNOR


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("own_tables", [False, True])
def test_learned_values(granularity, own_tables):
    """Codes do not change under a small step, so the values' slopes are plain differences of the forward."""
    x, scale, _, grad = problem(Codebook.nf4(), granularity)
    shape = granularity.parameter_shape(x.shape)
    values = torch.randn((*shape, 4) if own_tables else (4,), dtype=torch.float64)
    leaves = [x.clone().requires_grad_(), values.clone().requires_grad_(), scale.clone().requires_grad_()]
    found = fake_quantize_learned(*leaves, granularity)
    sorted_values = values.float().sort().values
    table = Codebook(sorted_values)
    torch.testing.assert_close(found, fake_quantize(x, scale, None, table, granularity), rtol=1e-6, atol=1e-6)
    by_x, by_values, by_scale = torch.autograd.grad(found, leaves, grad)
    expected = differences(lambda v: fake_quantize_learned(x, v, scale, granularity), [values], grad)[0]
    torch.testing.assert_close(by_values, expected, rtol=1e-6, atol=1e-7)
    x_fixed, scale_fixed = x.clone().requires_grad_(), scale.clone().requires_grad_()
    fixed = fake_quantize(x_fixed, scale_fixed, None, table, granularity)
    same = torch.autograd.grad(fixed, [x_fixed, scale_fixed], grad)
    torch.testing.assert_close(by_x, same[0])
    torch.testing.assert_close(by_scale, same[1], rtol=1e-5, atol=1e-5)


def test_learned_values_without_a_scale_and_with_nan():
    x = torch.tensor([0.2, float("nan"), 9.0, -float("inf")], requires_grad=True)
    values = torch.tensor([1.0, 0.0], requires_grad=True)
    found = fake_quantize_learned(x, values)
    assert found.nan_to_num(nan=7.0).tolist() == [0, 7, 1, 0]
    found[[0, 2, 3]].sum().backward()
    assert values.grad.tolist() == [1, 2], "in the order in which the values were given"
    assert x.grad[[0, 2, 3]].tolist() == [1, 0, 0]


def test_training_the_values_lowers_the_error():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    values = torch.linspace(-2, 2, 8).requires_grad_()
    optimizer = torch.optim.SGD([values], lr=0.5)
    errors = []
    for _ in range(100):
        optimizer.zero_grad()
        error = (fake_quantize_learned(x, values) - x).square().mean()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.037 < errors[0], "8 values on N(0, 1) can reach .0345"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_half_precision_gradients_keep_dtype_and_sum_in_float32(dtype, format):
    x, scale, zero_point, grad = problem(format, PerChannel(0))
    half = x.to(dtype)
    leaves = [half.requires_grad_(), scale.float().requires_grad_(), zero_point.float().requires_grad_()]
    found = fake_quantize(*leaves, format, PerChannel(0), LSQ)
    assert found.dtype == dtype
    slopes = torch.autograd.grad(found, leaves, grad.to(dtype), materialize_grads=True)
    assert [s.dtype for s in slopes] == [dtype, torch.float32, torch.float32]
    wide = [t.detach().float().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(
        fake_quantize(*wide, format, PerChannel(0), LSQ), wide, grad.to(dtype).float(), materialize_grads=True
    )
    torch.testing.assert_close(slopes[0].float(), expected[0])
    torch.testing.assert_close(slopes[1], expected[1])
    torch.testing.assert_close(slopes[2], expected[2])


def test_no_gradient_is_computed_where_none_is_asked_for():
    x = torch.randn(10)
    assert not fake_quantize(x, torch.ones(()), None, Integer(8)).requires_grad
    with torch.no_grad():
        assert not fake_quantize(x.requires_grad_(), torch.ones(()), None, Integer(8)).requires_grad
