"""A simulated pass holds one quantized weight at a time, not all of them from the beginning."""

import weakref

import pytest
import torch
from torch import nn

import halfstep as hs


class Shared(nn.Module):
    """Layers in a row, one of them twice, and a weight that is computed."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x):
        x = torch.relu(self.twice(torch.relu(self.first(x))))
        return self.last(torch.relu(self.twice(x)) + self.first.bias)


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("recipe", [hs.Recipe.int8(), hs.Recipe.weight_only(4, 16)])
def test_quantized_weights_are_alive_one_at_a_time(recipe):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).eval()
    q = hs.prepare(model, X, recipe)
    hs.observe(q, [X])
    hs.calibrate(q)
    alive, most = set(), []

    def made(module, args, output):
        alive.add(id(output))
        weakref.finalize(output, alive.discard, id(output))
        most.append(len(alive))

    for site in q.placement.sites:
        if site.is_weight:
            q.sites[site.name].register_forward_hook(made)
    with torch.no_grad():
        q(X)
    assert len(most) == 6 and max(most) <= 2  # the one before is dropped behind its reader


def test_the_same_is_computed():
    torch.manual_seed(0)
    model = Shared().eval()
    q = hs.prepare(model, X)
    assert torch.equal(q(X), model(X))
    hs.observe(q, [X])
    hs.calibrate(q)
    q(X).sum().backward()
    assert all(parameter.grad is not None for parameter in q.parameters())
