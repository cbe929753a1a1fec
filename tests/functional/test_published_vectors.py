"""Numbers that others printed, and closed forms."""

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from halfstep.formats import Codebook, Integer
from halfstep.functional import binary_scale, fake_quantize, quantize, ternary_scale
from halfstep.granularity import PerTensor

# Optimal clipping in scale mode: distribution, bits, alpha, mean squared error (exact integrals).
OPTIMA = [
    (stats.norm(), 2, 1.2240, 0.190174),
    (stats.norm(), 3, 1.9523, 0.046860),
    (stats.norm(), 4, 2.4739, 0.0128894),
    (stats.norm(), 5, 2.8987, 0.00369322),
    (stats.norm(), 6, 3.2701, 0.00106929),
    (stats.norm(), 7, 3.6075, 3.08622e-4),
    (stats.norm(), 8, 3.9205, 8.8308e-5),
    (stats.laplace(), 2, 2.0000, 0.528482),
    (stats.laplace(), 3, 3.4864, 0.166173),
    (stats.laplace(), 4, 4.8199, 0.0547904),
    (stats.laplace(), 5, 6.0980, 0.0181703),
    (stats.laplace(), 6, 7.3586, 0.00595903),
    (stats.laplace(), 7, 8.6178, 0.00191989),
    (stats.laplace(), 8, 9.8827, 6.06603e-4),
]


def expected_error(distribution, format, alpha):
    """E (x - x^)**2 by a fine midpoint sum over the distribution's quantiles' support."""
    edges = np.linspace(-30, 30, 2_000_001)
    x = torch.from_numpy((edges[1:] + edges[:-1]) / 2)
    scale, zero_point = format.parameters(torch.tensor(-alpha), torch.tensor(alpha))
    error = (fake_quantize(x, scale, zero_point, format) - x).square().numpy()
    return float((error * distribution.pdf(x.numpy())).sum() * (edges[1] - edges[0]))


@pytest.mark.parametrize(
    ("distribution", "bits", "alpha", "mse"), OPTIMA, ids=[f"{d.dist.name}-{b}" for d, b, _, _ in OPTIMA]
)
def test_optimal_clipping_has_the_closed_forms_error(distribution, bits, alpha, mse):
    format = Integer(bits)
    best = expected_error(distribution, format, alpha)
    assert best == pytest.approx(mse, rel=1e-4)
    for other in (alpha * 0.97, alpha * 1.03):
        assert expected_error(distribution, format, other) > best


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_uniform_input_has_an_error_of_a_twelfth_of_the_squared_step(bits):
    format = Integer(bits, signed=False, symmetric=False)
    scale, zero_point = format.parameters(torch.tensor(0.0), torch.tensor(1.0))
    x = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    error = (fake_quantize(x, scale, zero_point, format) - x).square().mean()
    assert error.item() == pytest.approx(scale.item() ** 2 / 12, rel=1e-3)


def test_nvidias_user_guide():
    """pytorch-quantization's tutorial: 8 bits, scale mode."""
    x = torch.tensor([0.9817, 0.8796, 0.9921, 0.4611, 0.0832, 0.1784, 0.3674, 0.5676, 0.3376, 0.2119])
    format = Integer(8)
    scale, zero_point = format.parameters(-x.max(), x.max())
    codes = quantize(x, scale, zero_point, format)
    assert codes.tolist() == [126, 113, 127, 59, 11, 23, 47, 73, 43, 27]


def test_dynamic_quantize_linear():
    """ONNX, DynamicQuantizeLinear's first example."""
    x = torch.tensor([0, 2, -3, -2.5, 1.34, 0.5])
    format = Integer(8, signed=False, symmetric=False)
    scale, zero_point = format.parameters(x.min(), x.max())
    assert scale == torch.tensor(0.0196078438)
    assert zero_point == 153
    assert quantize(x, scale, zero_point, format).tolist() == [153, 255, 0, 26, 221, 179]


def normal_samples(count=1_000_001):
    return torch.from_numpy(stats.norm.ppf((np.arange(count) + 0.5) / count))


def test_binary_scale_of_the_normal_distribution():
    """mean|x| = sqrt(2 / pi); what is left is 1 - 2 / pi."""
    x = normal_samples()
    scale = binary_scale(x, PerTensor())
    assert scale.item() == pytest.approx(np.sqrt(2 / np.pi), rel=1e-4)
    error = (fake_quantize(x, scale, None, Codebook.binary()) - x).square().mean()
    assert error.item() == pytest.approx(1 - 2 / np.pi, rel=1e-3)


def test_ternary_scale_of_the_normal_distribution():
    """Threshold .612, scale 1.224, error .19017: the same as 2 bits in scale mode."""
    x = normal_samples()
    scale = ternary_scale(x, PerTensor())
    assert scale.item() == pytest.approx(1.2240, abs=2e-4)
    found = fake_quantize(x, scale, None, Codebook.ternary())
    assert x[found > 0].min().item() == pytest.approx(0.612, abs=1e-3)
    assert (found - x).square().mean().item() == pytest.approx(0.190174, rel=1e-3)
    assert torch.equal(found, fake_quantize(x, scale, None, Integer(2)))


def test_integrals_agree_with_the_sum():
    """The yardstick of this file: two ways to the same expected error."""
    step, alpha = 2.4739 / 7, 2.4739
    inside = sum(
        integrate.quad(
            lambda x, k=k: (x - k * step) ** 2 * stats.norm.pdf(x), (k - 0.5) * step, (k + 0.5) * step
        )[0]
        for k in range(-6, 7)
    )
    tails = 2 * integrate.quad(lambda x: (x - alpha) ** 2 * stats.norm.pdf(x), 6.5 * step, 40)[0]
    assert inside + tails == pytest.approx(expected_error(stats.norm(), Integer(4), alpha), rel=1e-6)
