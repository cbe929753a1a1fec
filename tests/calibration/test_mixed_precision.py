"""Calibration data may pass in mixed precision: what is seen is counted in float32, and all that decides is float32."""

import copy

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError, RunError
from halfstep.evaluate import as_scorers
from halfstep.journal import Journal
from halfstep.ladder.goal import GoalSpec
from halfstep.ladder.identity import claim_run


class Net(nn.Module):
    """A residual block, normed, and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = torch.relu(self.inner(x) + x)
        return self.head(self.norm(x.mean((2, 3))))


BATCHES = [torch.randn(8, 1, 12, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def observed(net, autocast):
    q = hs.prepare(net, BATCHES[0], autocast=autocast)
    hs.observe(q, BATCHES)
    return q


def in_bfloat16(histogram):
    """Whether every value has the upper 16 bits of a float32 alone."""
    return not histogram.state_dict()["offsets"].any()


def test_layers_compute_in_bfloat16_and_ranges_stay_near(net):
    exact, mixed = observed(net, None), observed(net, torch.bfloat16)
    seen, fine = ({name: site.histogram for name, site in q.sites.items()} for q in (mixed, exact))
    halves = {name for name, histogram in seen.items() if histogram.count and in_bfloat16(histogram)}
    assert "relu" in halves and "input" not in halves  # the data are what they were
    assert not any(in_bfloat16(histogram) for histogram in fine.values() if histogram.count)
    for name in seen:
        if fine[name].count:
            assert seen[name].count == fine[name].count
            assert seen[name].max == pytest.approx(fine[name].max, rel=0.05, abs=0.05)
    assert all(tensor.dtype == torch.float32 for tensor in mixed.sample)
    for q in (exact, mixed):
        hs.calibrate(q)
    assert all(site.scale.dtype == torch.float32 for site in mixed.sites.values())
    wanted = net(BATCHES[0])
    for q in (exact, mixed):
        noise = (q(BATCHES[0]) - wanted).square().sum() / wanted.square().sum()
        assert noise < 0.01


def test_all_but_observation_is_float32(net):
    exact, mixed = observed(net, None), observed(net, torch.bfloat16)
    for q in (mixed, copy.deepcopy(mixed)):
        with q.using(hs.model.Mode.FLOAT):
            assert torch.equal(q(BATCHES[0]), exact(BATCHES[0]))
    assert copy.deepcopy(mixed).autocast is torch.bfloat16


def test_another_type_is_refused(net):
    with pytest.raises(
        ArgumentError, match=r"autocast: got torch.float16, needed torch.bfloat16, which has the range"
    ):
        hs.prepare(net, BATCHES[0], autocast=torch.float16)


def test_a_run_goes_on_in_the_type_that_it_began_in(net, tmp_path):
    scorer = as_scorers(hs.Accuracy([(BATCHES[0], torch.zeros(8, dtype=torch.long))]))
    aim = GoalSpec(0.01)
    with Journal(tmp_path) as journal:
        claim_run(journal, hs.prepare(net, BATCHES[0]), scorer, aim, None)
    with (
        Journal(tmp_path) as journal,
        pytest.raises(RunError, match=r"another configuration .*, calibrated in bfloat16\)"),
    ):
        claim_run(journal, hs.prepare(net, BATCHES[0], autocast=torch.bfloat16), scorer, aim, None)
