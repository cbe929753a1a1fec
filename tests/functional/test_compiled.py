"""torch.compile and distributed training."""

import copy

import pytest
import torch
from torch import distributed, multiprocessing, nn

from halfstep.formats import E2M1, E4M3, Codebook, Integer
from halfstep.functional import LSQ, fake_quantize, fake_quantize_learned
from halfstep.granularity import PerChannel, PerGroup, PerTensor

# Tracing itself uses what torch has deprecated: it makes instances of autograd functions, and torch.jit.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

CASES = [
    (Integer(8, signed=False, symmetric=False), PerTensor()),
    (Integer(8), PerChannel(0)),
    (Integer(4, symmetric=False), PerGroup(1, 5)),
    (Integer(3, mid_rise=True), PerTensor()),
    (Codebook.nf4(), PerChannel(0)),
    (Codebook(torch.randn(4, 3).sort().values), PerChannel(0)),
    (E4M3, PerTensor()),
    (E2M1, PerTensor()),
]


def leaves(format, granularity, dtype):
    x = torch.randn(4, 12).to(dtype).requires_grad_()
    reach = granularity.reduce(x.detach().float(), "absmax")
    low, high = -0.7 * reach, reach
    scale, zero_point = format.parameters(low, high)
    return x, scale.requires_grad_(), zero_point


def check(backend, format, granularity, dtype):
    torch.compiler.reset()
    x, scale, zero_point = leaves(format, granularity, dtype)

    def function(x, scale):
        return fake_quantize(x, scale, zero_point, format, granularity, LSQ) * 2

    compiled = torch.compile(function, backend=backend, fullgraph=True)
    found, expected = compiled(x, scale), function(x, scale)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x, scale), grad),
        torch.autograd.grad(expected, (x, scale), grad),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, scale), expected.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "granularity"), CASES, ids=str)
def test_it_is_traced_as_one_graph_with_its_gradient(format, granularity, dtype):
    check("aot_eager", format, granularity, dtype)


def test_learned_values_are_traced_as_one_graph():
    torch.compiler.reset()
    x, values = torch.randn(4, 12, requires_grad=True), torch.randn(4, requires_grad=True)
    compiled = torch.compile(fake_quantize_learned, backend="aot_eager", fullgraph=True)
    found, expected = compiled(x, values), fake_quantize_learned(x, values)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), (x, values)),
        torch.autograd.grad(expected.square().sum(), (x, values)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("format", "granularity"), CASES, ids=str)
def test_inductors_code_computes_the_same(format, granularity, dtype):
    check("inductor", format, granularity, dtype)


class Quantized(nn.Module):
    """A linear layer with learned activation steps and a learned codebook for its weight."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(0.05))
        self.values = nn.Parameter(torch.linspace(-0.5, 0.5, 4))

    def forward(self, x):
        x = fake_quantize(x, self.scale, None, Integer(8), PerTensor(), LSQ)
        return nn.functional.linear(
            x, fake_quantize_learned(self.linear.weight, self.values), self.linear.bias
        )


def train_share(rank, state, x, path, results):
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    model = Quantized()
    model.load_state_dict(state)
    parallel = nn.parallel.DistributedDataParallel(model)
    parallel(x[rank::2]).square().mean().backward()
    if rank == 0:
        results.put({name: p.grad.tolist() for name, p in model.named_parameters()})
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_average_to_the_gradient_of_one(tmp_path):
    model = Quantized()
    x = torch.randn(8, 6)
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    state = copy.deepcopy(model.state_dict())
    processes = [
        context.Process(target=train_share, args=(rank, state, x, tmp_path / "store", results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    found = results.get()
    # A balanced step is divided by the root of the elements that a process sees, and DDP takes the mean.
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        factor = 2**0.5 if name == "scale" else 1.0
        torch.testing.assert_close(torch.tensor(found[name]), parameter.grad * factor, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("format", "granularity"), CASES, ids=str)
def test_cuda_computes_the_same(format, granularity):
    x, scale, zero_point = leaves(format, granularity, torch.float32)
    expected = fake_quantize(x, scale, zero_point, format, granularity, LSQ)
    by_x, by_scale = torch.autograd.grad(expected.square().sum(), (x, scale))
    there = [t.detach().cuda() for t in (x, scale, zero_point)]
    there[0].requires_grad_(), there[1].requires_grad_()
    found = fake_quantize(*there, format, granularity, LSQ)
    assert torch.equal(found.cpu(), expected)
    slopes = torch.autograd.grad(found.square().sum(), there[:2])
    torch.testing.assert_close(slopes[0].cpu(), by_x)
    torch.testing.assert_close(slopes[1].cpu(), by_scale, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("format", "granularity"), CASES, ids=str)
def test_inductor_fuses_it(format, granularity):
    from torch._inductor import metrics
    from torch._inductor.utils import fresh_cache

    torch.compiler.reset()
    metrics.reset()
    x, scale, zero_point = leaves(format, granularity, torch.float32)
    with torch.no_grad(), fresh_cache():  # what comes from the cache is not counted
        compiled = torch.compile(fake_quantize, fullgraph=True)
        compiled(x, scale, zero_point, format, granularity)
    searched = isinstance(format, Codebook)  # the search among thresholds is a kernel of its own
    assert metrics.generated_kernel_count == (2 if searched else 1)
