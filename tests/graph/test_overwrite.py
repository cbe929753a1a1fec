"""ReLUs in place: the same numbers and gradients, and never over a value that somebody else reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import halfstep as hs
from halfstep.fake_quantize import Mode
from halfstep.graph.fold import overwrite

aten = torch.ops.aten


class Net(nn.Module):
    """Two convolutions with a body of their own between them."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 3)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


def residual(y: Tensor) -> Tensor:
    return y.relu() + y


def joined(y: Tensor) -> Tensor:
    return (y.relu() + 1.0 * y).relu()


BODIES = {
    "alone": (torch.relu, 1),
    "read twice": (residual, 0),
    "sum": (joined, 1),
    "a view of it": (lambda y: y.flatten(1).relu().view_as(y), 0),
    "its own result kept": (lambda y: y.sigmoid().relu(), 0),
}


@pytest.mark.parametrize(("body", "count"), BODIES.values(), ids=BODIES.keys())
def test_the_result_and_the_gradients_are_those_of_the_users_model(
    body: Callable[[Tensor], Tensor], count: int
) -> None:
    model = Net(body).eval()
    x = torch.randn(3, 2, 6, 6)
    q = hs.prepare(model, x)
    targets = [node.target for node in overwrite(q.simulation().graph).nodes]
    assert targets.count(aten.relu_.default) == count
    own, users = x.clone().requires_grad_(), x.clone().requires_grad_()
    with q.using(Mode.FLOAT):
        answer = q(own)
    wanted = model(users)
    torch.testing.assert_close(answer, wanted)
    answer.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(own.grad, users.grad)


def test_the_users_input_is_not_overwritten() -> None:
    x = torch.randn(2, 3)
    q = hs.prepare(nn.Sequential(nn.ReLU(), nn.Linear(3, 2)), x.clone())
    before = x.clone()
    with q.using(Mode.FLOAT):
        q(x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
