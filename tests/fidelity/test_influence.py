"""What quantizing one site would do, estimated for all sites at once, against doing it."""

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import Reference
from halfstep.fidelity.fisher import influences
from halfstep.ranges import activation_sites

RANGES = [(torch.tensor(-high), torch.tensor(high)) for high in (3.0, 1.0, 0.3)]
FOUR_BITS = hs.Recipe.uniform(8, 4)


def prepared(classes, examples=32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, classes))
    q = hs.prepare(model, torch.randn(2, 6), recipe=FOUR_BITS)
    hs.observe(q, [torch.randn(examples, 6)])
    return q, Reference(q, examples)


def alone(q, site, low, high):
    """The model with a single activation quantized."""
    q.sites[site].set_range(low, high)
    q.set_mode(Mode.FLOAT)
    q.sites[site].mode = Mode.QUANTIZE
    return q


def test_exact_where_all_that_follows_is_linear_and_has_one_output():
    q, reference = prepared(classes=1)
    last = list(activation_sites(q))[-1]
    losses = influences(q, reference, {last: RANGES}, "sqnr")[last]
    (x,) = q.sample
    with torch.no_grad():
        wanted = q(x).double()
        for loss, (low, high) in zip(losses, RANGES, strict=True):
            got = alone(q, last, low, high)(x).double()
            q.set_mode(Mode.FLOAT)
            assert loss == pytest.approx(float((got - wanted).square().sum()), rel=1e-4)


def test_an_estimate_of_the_divergence():
    """A drawn answer an example: the estimate's standard error over 2048 examples is below a tenth of it."""
    q, reference = prepared(classes=3, examples=2048)
    q.sample[0] = torch.randn(2048, 6)
    reference = Reference(q, 2048)
    first, last = activation_sites(q)
    losses = influences(q, reference, {first: RANGES[:2], last: RANGES[:2]}, "kl")
    for site in (first, last):
        for loss, (low, high) in zip(losses[site], RANGES, strict=False):
            measured = reference.compare(alone(q, site, low, high)).kl
            assert loss / 2 / 2048 == pytest.approx(measured, rel=0.5)
            q.set_mode(Mode.FLOAT)


def test_repeatable_and_without_a_trace():
    q, reference = prepared(classes=3)
    choices = dict.fromkeys(activation_sites(q), RANGES)
    before = {name: tensor.clone() for name, tensor in q.state_dict().items()}
    assert influences(q, reference, choices, "kl") == influences(q, reference, choices, "kl")
    # The scale of a site without a range is NaN, which is to stay as it is.
    torch.testing.assert_close(dict(q.state_dict()), before, rtol=0, atol=0, equal_nan=True)
    assert all(parameter.grad is None for parameter in q.parameters())
    assert q.mode is Mode.FLOAT
    assert not any(module._forward_hooks for module in q.sites.values())


def test_a_single_choice_costs_nothing_and_outputs_that_do_not_depend_are_left_out():
    q, reference = prepared(classes=3)
    first, last = activation_sites(q)
    assert set(influences(q, reference, {first: RANGES[:1], last: RANGES}, "kl")) == {last}

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return (self.fc(x) > 0).float()

    q = hs.prepare(Constant(), torch.randn(2, 6))
    hs.observe(q, [torch.randn(8, 6)])
    assert influences(q, Reference(q), dict.fromkeys(activation_sites(q), RANGES), "sqnr") == {}
