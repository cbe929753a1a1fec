"""The first and last layers, and the bits they get."""

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.graph.operators import ends


class Two(nn.Module):
    """Two branches in, two heads out, one layer in the middle."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.middle, self.up, self.down = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x, y):
        z = self.middle(torch.relu(self.left(x)) + self.right(y))
        return self.up(z), self.down(z)


@pytest.fixture(scope="module")
def q():
    x = torch.randn(2, 4)
    return hs.prepare(Two(), (x, x), hs.Recipe.uniform(4, 4, portable=False))


def bits(q):
    return {layer.name: tuple(q.sites[name].format.bits for name in layer.sites) for layer in q.layers}


def test_every_branch_has_a_first_layer_and_every_head_a_last(q):
    nodes = {layer.operator.node: layer.name for layer in q.layers}
    assert {nodes[node] for node in ends(q.graph, list(nodes))} == {"left", "right", "up", "down"}


def test_few_bits_leave_the_ends_at_eight(q):
    assert bits(q) == {"left": (8, 8), "right": (8, 8), "middle": (4, 4), "up": (8, 8), "down": (8, 8)}


EIGHT = hs.Recipe.uniform(4, 8, portable=False)
CHAIN = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (EIGHT, [(8, 8), (8, 4), (8, 8)]),
        (hs.Recipe.uniform(6, 8), [(8, 6), (8, 6), (8, 6)]),
        (hs.Recipe.uniform(4, 8, ends=None), [(8, 4), (8, 4), (8, 4)]),
        (hs.Recipe.uniform(3, 8, ends=6), [(8, 6), (8, 3), (8, 6)]),
        (EIGHT.override("0", hs.LayerSpec(hs.TensorSpec(3))), [(8, 3), (8, 4), (8, 8)]),
        (EIGHT.override("4", None), [(8, 8), (8, 4), ()]),
    ],
)
def test_recipes(recipe, expected):
    assert list(bits(hs.prepare(CHAIN, torch.randn(2, 4), recipe)).values()) == expected


def test_a_network_that_is_all_ends_gets_what_was_asked():
    q = hs.prepare(nn.Linear(4, 4), torch.randn(2, 4), hs.Recipe.uniform(4, 8))
    assert list(bits(q).values()) == [(8, 4)]
