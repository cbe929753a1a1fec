"""Quantizing some elements: compiled as by torch's operators, forwards and back."""

import pytest
import torch

from halfstep.formats import Integer
from halfstep.functional import CLIPPED_STE, LSQ, PACT, fake_quantize, quantize_some
from halfstep.functional.dropping import _serves

AFFINE = Integer(4, signed=False, symmetric=False)


def operands(format, learned=True, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 16, 16, generator=generator).contiguous(memory_format=layout).requires_grad_()
    mask = (torch.rand(x.shape, generator=generator) < 0.5).float().contiguous(memory_format=layout)
    scale = torch.tensor(0.21, requires_grad=learned)
    zero_point = torch.tensor(6.3, requires_grad=learned) if format is AFFINE else None
    return x, mask, scale, zero_point


def by_torch(x, mask, scale, zero_point, format, gradient):
    return torch.lerp(x, fake_quantize(x, scale, zero_point, format, gradient=gradient), mask)


@pytest.mark.parametrize("format", [Integer(4), AFFINE, Integer(2, signed=False)])
@pytest.mark.parametrize("gradient", [CLIPPED_STE, LSQ])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_as_by_torchs_operators(format, gradient, layout):
    found, wanted = operands(format, layout=layout), operands(format, layout=layout)
    assert _serves(*found[:3], format, gradient)
    y = quantize_some(*found, format, gradient=gradient)
    z = by_torch(*wanted, format, gradient)
    assert torch.equal(y, z) and y.stride() == found[0].stride()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for each in (y, z):
        (each * weights).sum().backward()
    assert torch.equal(found[0].grad, wanted[0].grad)
    for a, b in zip(found[2:], wanted[2:], strict=True):
        if a is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


def test_what_no_loop_serves_is_left_to_torch():
    x, mask, scale, _ = operands(Integer(4))
    assert not _serves(x.double(), mask.double(), scale, Integer(4), LSQ)
    assert not _serves(x, mask, scale, Integer(4), PACT)
    assert not _serves(x, mask, torch.full((8,), 0.2), Integer(4), LSQ)
    assert not _serves(x, mask.contiguous(memory_format=torch.channels_last), scale, Integer(4), LSQ)
    y = quantize_some(x, mask, scale, None, Integer(4), gradient=PACT)
    assert torch.equal(y, by_torch(x, mask, scale, None, Integer(4), PACT))


def test_none_and_all():
    x, mask, scale, zero_point = operands(AFFINE)
    assert torch.equal(quantize_some(x, mask * 0, scale, zero_point, AFFINE), x)
    whole = quantize_some(x, mask * 0 + 1, scale, zero_point, AFFINE)
    assert torch.equal(whole, fake_quantize(x, scale, zero_point, AFFINE))


def test_without_gradients_and_of_ranges_that_are_not_learned():
    x, mask, scale, zero_point = operands(AFFINE, learned=False)
    with torch.no_grad():
        assert torch.equal(
            quantize_some(x, mask, scale, zero_point, AFFINE),
            by_torch(x, mask, scale, zero_point, AFFINE, LSQ),
        )
    quantize_some(x, mask, scale, zero_point.int(), AFFINE).sum().backward()
    assert x.grad is not None and scale.grad is None
