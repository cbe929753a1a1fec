"""Extremes per channel."""

from __future__ import annotations

import math

import pytest
import torch

from halfstep.errors import ArgumentError, DataError, NotObservedError
from halfstep.statistics import ChannelRange


def seen(*batches: torch.Tensor, axis: int = 1) -> ChannelRange:
    channels = ChannelRange(axis)
    for batch in batches:
        channels.update(batch)
    return channels


def test_extremes_by_hand() -> None:
    low, high = seen(torch.tensor([[1.0, -2.0, math.nan], [3.0, math.inf, 5.0]])).range()
    assert low.tolist() == [1.0, -2.0, 5.0]
    assert high.tolist() == [3.0, -2.0, 5.0]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_any_axis_any_split(axis: int) -> None:
    x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    others = [a for a in range(3) if a != axis % 3]
    low, high = seen(x, axis=axis).range()
    assert torch.equal(low, x.amin(others))
    assert torch.equal(high, x.amax(others))
    a, b = (seen(part, axis=axis) for part in x.tensor_split([1], dim=others[0]))
    a.merge(b)
    a.merge(ChannelRange(axis))
    assert torch.equal(torch.stack(a.range()), torch.stack((low, high)))


def test_state_survives() -> None:
    for channels in (seen(torch.tensor([[1.0, 2.0]])), ChannelRange()):
        restored = ChannelRange()
        restored.load_state_dict(channels.state_dict())
        assert all(torch.equal(restored.state_dict()[k], v) for k, v in channels.state_dict().items())
    with pytest.raises(DataError, match="needed high and low of one shape"):
        ChannelRange().load_state_dict({"low": torch.ones(2), "high": torch.ones(3)})


def test_what_was_not_seen_has_no_range() -> None:
    with pytest.raises(NotObservedError, match="no value was observed"):
        seen(torch.empty(0, 3)).range()
    with pytest.raises(NotObservedError, match=r"channels \[1\]: no finite value"):
        seen(torch.tensor([[1.0, math.nan]])).range()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ArgumentError, match=r"axis: got 1 for a tensor of shape \(3,\)"):
        seen(torch.ones(3))
    with pytest.raises(ArgumentError, match="channels: got 3, needed 2"):
        seen(torch.ones(1, 2), torch.ones(1, 3))
    with pytest.raises(ArgumentError, match="got channels along axis 0, needed axis 1"):
        ChannelRange(1).merge(ChannelRange(0))
