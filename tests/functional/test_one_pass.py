"""One pass over memory gives what torch's operators give, to the last bit."""

import math

import pytest
import torch

from halfstep.formats import Integer
from halfstep.functional import fake_quantize, one_pass

FORMATS = {
    "symmetric": (Integer(8), None),
    "affine": (Integer(8, signed=False, symmetric=False), torch.tensor(117, dtype=torch.int32)),
    "narrow": (Integer(4), None),
    "wide": (Integer(16), None),
}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def values(scale):
    """Ties on both sides of zero, their neighbours, what is no number, what is too small for a normal one."""
    ties = (torch.arange(-600, 600) + 0.5) * scale
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38])
    drawn = torch.randn(8000, generator=torch.Generator().manual_seed(0)) * 40 * scale
    return torch.cat([ties, ties.nextafter(torch.tensor(0.0)), ties.nextafter(torch.tensor(9.0)), odd, drawn])


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_to_the_last_bit(name, one_thread, monkeypatch):
    format, zero_point = FORMATS[name]
    for size in (0.0237, 0.125, 3.7, 1e-30):
        scale = torch.tensor(size)
        x = values(scale)
        assert one_pass.serves(x, scale, format)
        found = fake_quantize(x, scale, zero_point, format)
        with monkeypatch.context() as patch:
            patch.setattr(one_pass, "serves", lambda *_: False)
            wanted = fake_quantize(x, scale, zero_point, format)
        assert torch.equal(found.isnan(), x.isnan()) and torch.equal(wanted.isnan(), x.isnan())
        real = ~x.isnan()
        assert torch.equal(found[real].view(torch.int32), wanted[real].view(torch.int32))


def test_others_are_left_to_torch(one_thread):
    scale, x = torch.tensor(0.1), torch.zeros(100, 100)
    assert one_pass.serves(x, scale, Integer(8))
    assert not one_pass.serves(x.t()[:, :50], scale, Integer(8))  # not dense
    assert not one_pass.serves(x.half(), scale, Integer(8))
    assert not one_pass.serves(x, torch.full((100,), 0.1), Integer(8))
    assert not one_pass.serves(x[:2, :2].contiguous(), scale, Integer(8))
    torch.set_num_threads(2)
    assert not one_pass.serves(x, scale, Integer(8))
