"""The lookup by upper bits against a binary search, over all patterns and at every threshold."""

import numpy as np
import pytest
import torch

from halfstep.formats import Codebook
from halfstep.functional import fake_quantize, fake_quantize_learned, lookup, quantize

ONE = torch.ones(())
CROWDED = Codebook(torch.tensor([-1e-40, 0.0, 1e-45, 1.0, 1.0000001, 1.0000002, 1.001, 3e38]), name="crowded")
TIED = Codebook.rule([-2, -1, 0, 1, 2], [-1, 0.0, 1e-45, 1.5], ties_up=True)


def every_pattern(codebook):
    """All upper halves with the lower halves that matter, and each threshold with its neighbours."""
    upper = np.arange(2**16, dtype=np.uint32) << 16
    patterns = np.concatenate([upper | low for low in (0, 1, 0x7FFF, 0x8000, 0xFFFF)])
    thresholds = codebook.thresholds.numpy()
    around = [thresholds] + [np.nextafter(thresholds, np.float32(end)) for end in (-np.inf, np.inf)]
    return torch.from_numpy(np.concatenate([patterns.view(np.float32), *around]))


@pytest.mark.parametrize(
    "codebook", [Codebook.nf4(), Codebook.mu_law(8), CROWDED, TIED, Codebook.binary()], ids=str
)
def test_it_is_the_binary_search(codebook):
    x = every_pattern(codebook)
    assert lookup.serves(x, codebook.thresholds)
    finite = np.where(np.isnan(x.numpy()), 0, x.numpy())
    side = "right" if codebook.ties_up else "left"
    codes = np.searchsorted(codebook.thresholds.numpy(), finite, side=side)
    assert np.array_equal(quantize(x, ONE, None, codebook).numpy(), codes)
    simulated = fake_quantize(x, ONE, None, codebook)
    assert torch.equal(simulated.isnan(), x.isnan())
    assert np.array_equal(simulated[~x.isnan()].numpy(), codebook.values.numpy()[codes][~x.isnan().numpy()])


def test_ties_at_zero_go_up_where_the_processor_flushes_subnormals():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush")
    try:
        x = torch.zeros(lookup.WORTHWHILE)
        x[1::2] = -0.0
        assert bool((fake_quantize(x, ONE, None, Codebook.binary()) == 1).all())
        rule = Codebook.rule([0, 1, 2], [0, 1], ties_up=True)
        assert bool((fake_quantize(x, ONE, None, rule) == 1).all())
    finally:
        torch.set_flush_denormal(False)


def test_threads_share_the_work_without_gaps():
    x = torch.randn(3 * lookup.PIECE + 17)
    table = Codebook.nf4()
    scale, _ = table.parameters(x.min(), x.max())
    expected = table.values[torch.bucketize(x / scale, table.thresholds)] * scale
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            assert torch.equal(fake_quantize(x, scale, None, table), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_is_kept(layout):
    x = torch.randn(2, 8, 64, 64).to(memory_format=layout)
    found = fake_quantize(x, torch.tensor(3.0), None, Codebook.nf4())
    assert found.is_contiguous(memory_format=layout)
    assert torch.equal(found, fake_quantize(x.contiguous(), torch.tensor(3.0), None, Codebook.nf4()))
    strided = x[:, ::2]
    assert torch.equal(fake_quantize(strided, torch.tensor(3.0), None, Codebook.nf4()), found[:, ::2])


def test_small_tensors_and_other_dtypes_are_searched():
    thresholds = Codebook.nf4().thresholds
    assert not lookup.serves(torch.zeros(lookup.WORTHWHILE - 1), thresholds)
    assert not lookup.serves(torch.zeros(lookup.WORTHWHILE, dtype=torch.float64), thresholds)
    assert lookup.serves(torch.zeros(lookup.WORTHWHILE), thresholds)


@pytest.mark.parametrize("elements", [1000, lookup.WORTHWHILE, 3 * lookup.PIECE + 17])
def test_learned_values_get_the_sum_of_their_cells_gradients(elements):
    x = torch.randn(elements)
    x[::97], x[5], x[6] = float("nan"), float("inf"), -float("inf")
    values, grad = torch.linspace(-2, 2, 7).requires_grad_(), torch.randn(elements)
    real = ~x.isnan()
    codes = (x[real, None] - values.detach()).abs().clamp(max=1e30).argmin(1)
    codes[x[real] == float("inf")] = 6
    found = fake_quantize_learned(x, values)
    assert torch.equal(found[real], values.detach()[codes])
    (sums,) = torch.autograd.grad(found, values, grad)
    expected = torch.zeros(7, dtype=torch.float64).index_add(0, codes, grad[real].double())
    assert torch.allclose(sums.double(), expected, atol=1e-5 * elements**0.5)
