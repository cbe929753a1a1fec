"""ReLUs in place: the same numbers and gradients, and never over a value that somebody else reads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import halfstep as hs
from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.functional import one_pass
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


class Quantized(nn.Module):
    """Sites behind a convolution, a ReLU that overwrites, a sum that is read twice, and the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        y = y + self.second(y)
        return self.last(y) + self.last(torch.relu(y))


def test_quantizers_write_into_what_they_alone_read_and_answer_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, 16, 16)
    q = hs.prepare(Quantized().eval(), x)
    hs.observe(q, [x])
    hs.calibrate(q)
    flags = [node.kwargs for node in overwrite(q.simulation().graph).nodes if node.op == "call_module"]
    assert {"overwrite": True} in flags and {} in flags
    threads, given = torch.get_num_threads(), x.clone()
    torch.set_num_threads(1)  # where one pass over memory serves
    try:
        with torch.no_grad():
            answer = q(given)
            seen = []
            site = next(module for module in q.sites.values() if not module.name.endswith("weight"))
            handle = site.register_forward_hook(lambda _, args, out: seen.append((args[0].clone(), out)))
            assert torch.equal(q(given), answer)
            handle.remove()
            monkeypatch.setattr(FakeQuantize, "forward", lambda self, x, overwrite=False: self.rounded(x))
            assert torch.equal(q(given), answer)
        assert torch.equal(given, x)
        before, after = seen[0]
        assert torch.equal(site.rounded(before), after) and not torch.equal(before, after)
    finally:
        torch.set_num_threads(threads)


def test_the_pass_that_overwrites_rounds_as_the_other_one() -> None:
    x = torch.cat(
        [torch.randn(5000), torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 0.05, 0.15, -0.05])]
    )
    scale, own = torch.tensor(0.1), x.clone()
    expected = one_pass.fake_quantize(x, scale, -8.0, 7.0)
    found = one_pass.fake_quantize(own, scale, -8.0, 7.0, overwrite=True)
    assert found is own
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
