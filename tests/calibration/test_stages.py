"""A network is observed stage by stage: the statistics of one pass, with the parameters of one block at a time."""

import math
import weakref

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.calibration import stages
from halfstep.calibration.shards import _state
from halfstep.errors import ArgumentError, DataError
from halfstep.fidelity.replay import Replay


class Block(nn.Module):
    """Attention and an MLP, each with a skip."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm, self.mlp = (
            nn.LayerNorm(width),
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
        )

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = (y.reshape(batch, tokens, self.heads, -1).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.out(y)
        return x + self.mlp(self.norm(x))


class Transformer(nn.Module):
    """A few blocks; what comes out of the first is returned too."""

    def __init__(self, depth=4):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(depth)), nn.Linear(16, 5)
        self.scale = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x):
        x = early = self.blocks[0](x) * self.scale.exp()
        for block in self.blocks[1:]:
            x = block(x)
        return self.head(x.mean(1)), early


def residual():
    """Convolutions around a skip, a weight that is computed, and a constant that is made anew."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.inner = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 6, 3, padding=1))
            self.head = nn.Linear(6, 3)

        def forward(self, x):
            x = torch.relu(self.norm(self.stem(x)))
            x = torch.relu(self.inner(x) + x) + torch.arange(8, device=x.device)
            return self.head(x.mean((2, 3)))

    return Net()


NETWORKS = {"transformer": (Transformer, (6, 16)), "residual": (residual, (1, 8, 8))}


def made(name, **options):
    network, shape = NETWORKS[name]
    torch.manual_seed(0)
    batches = [torch.randn(count, *shape) for count in (4, 4, 3)]
    return hs.prepare(network().eval(), batches[0], **options), batches


def observed(name, device=None, **options):
    q, batches = made(name, **options)
    hs.observe(q, batches, device=device)
    return q


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_statistics_are_those_of_one_pass(name, autocast):
    whole, staged = (observed(name, device, autocast=autocast) for device in (None, "cpu"))
    wanted, found = _state(whole), _state(staged)
    assert wanted.keys() == found.keys() and len(wanted) > 20
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key
    assert all(map(torch.equal, staged.sample, whole.sample))
    assert staged.mode is whole.mode


def test_every_stage_has_the_parameters_of_one_block():
    q, _ = made("transformer")
    plan = stages.stages(q)
    owners = [
        {str(node.target).split(".")[1] for node in stage.parameters if "blocks" in str(node.target)}
        for stage in plan
    ]
    assert owners == [{"0"}, set(), {"1"}, {"2"}, {"3"}, set()]
    assert sum(len(stage.nodes) for stage in plan) + sum(len(stage.constants) for stage in plan) == sum(
        node.op == "call_function" for node in q.graph.nodes
    )


class Loaded:
    """Bytes of parameters that are alive, and the most there were."""

    def __init__(self):
        self.alive = self.most = self.total = 0

    def parameter(self, tensor):
        copy = tensor.clone()
        self.alive += copy.nbytes
        self.total += copy.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(copy.untyped_storage(), self._gone, copy.nbytes)
        return copy

    def _gone(self, size):
        self.alive -= size


def loaded(monkeypatch, q, batches):
    """As if parameters had to be loaded to be read."""
    seen, read = Loaded(), Replay.parameter
    with monkeypatch.context() as patch:
        patch.setattr(Replay, "parameter", lambda self, node: seen.parameter(read(self, node)))
        hs.observe(q, batches, device="cpu")
    return seen


def test_the_parameters_of_one_block_are_alive_at_a_time(monkeypatch):
    q, batches = made("transformer")
    largest = sum(p.nbytes for p in Block().parameters())
    total = sum(p.nbytes for p in Transformer().parameters())
    seen = loaded(monkeypatch, q, batches)
    assert (seen.alive, seen.most, seen.total) == (0, largest, total)  # each is read once for all batches

    plan = stages.stages(q)  # the same measure, where all is one stage
    every = [
        tuple(x for stage in plan for x in getattr(stage, part))
        for part in ("nodes", "constants", "parameters")
    ]
    monkeypatch.setattr(stages, "stages", lambda model: [stages.Stage(*every)])
    assert loaded(monkeypatch, q, batches).most == total > 3 * largest


def test_values_are_dropped_behind_their_last_reader(monkeypatch):
    q, batches = made("transformer")
    waiting = []
    through = stages._Run._through

    def look(self, number, stage, parameters, batch):
        through(self, number, stage, parameters, batch)
        waiting.append(len(batch.values))

    monkeypatch.setattr(stages._Run, "_through", look)
    hs.observe(q, batches, device="cpu")
    assert max(waiting) <= 2 and waiting[-1] == 0  # the stream between blocks, and sizes


def test_nan_is_told_with_its_batch_and_site():
    q, batches = made("residual")
    batches[1][0, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match="calibration batch 1: site 'x': 1 of 256 values are NaN"):
        hs.observe(q, batches, device="cpu")


def test_a_device_that_is_not_there():
    q, batches = made("residual")
    with pytest.raises(
        ArgumentError, match=r"device: 'xpu:7' cannot be used here: .*; needed one that holds tensors"
    ):
        hs.observe(q, batches, device="xpu:7")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_accelerator_holds_one_block():
    q, batches = made("transformer")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    hs.observe(q, batches, device="cuda")
    assert q.device.type == "cpu"
    bound = sum(p.nbytes for p in Block().parameters()) + 2**22 * len(q.sites)  # and what counting takes
    assert torch.cuda.max_memory_allocated() - before < bound
    for name, histogram in ((name, site.histogram) for name, site in q.sites.items()):
        assert histogram.count or name in q.layer_names
