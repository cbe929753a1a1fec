"""The count in torch operations equals the compiled one, bit for bit; on a GPU, and on the CPU where there is none."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch

from halfstep.formats import Codebook
from halfstep.functional import fake_quantize, kmeans_codebook
from halfstep.statistics import Histogram, counting


def awkward(size: int) -> torch.Tensor:
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    for start, value in enumerate((0.0, -0.0, 6.0, 1e30, -1e-44, 1e-44, math.nan, math.inf, -math.inf)):
        x[start::31] = value
    return x


@pytest.mark.parametrize("size", [1, 100, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_tally_equals_the_compiled_count(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_PIECE", 700)
    x = awkward(size).to(dtype)
    compiled, tallied = Histogram(), Histogram()
    compiled.update(x)
    tallied._pending = counting.Tally(torch.device("cpu"))
    tallied._pending.add(x)
    assert tallied.nan_count == compiled.nan_count  # before anything else is handed over
    for name, tensor in compiled.state_dict().items():
        assert torch.equal(tallied.state_dict()[name], tensor), name


def state_without_compiling() -> list[list[int]]:
    """What is counted, rounded to a codebook and clustered; the same numbers whether numba compiles or not."""
    histogram = Histogram(batch_ranges=True)
    for batch in awkward(100_000).nan_to_num(nan=1.0, posinf=None, neginf=None).split(40_000):
        histogram.update(batch)
    assert histogram.max > 1e29
    rounded = fake_quantize(awkward(2**16), torch.tensor(2.0), None, Codebook.nf4())
    values = kmeans_codebook(torch.randn(60, generator=torch.Generator().manual_seed(1)), 2).values
    numbers = [*histogram.state_dict().values(), rounded.view(torch.int32), values.view(torch.int32)]
    return [tensor.flatten().tolist() for tensor in numbers]


def test_it_counts_on_the_host_where_numba_may_not_compile() -> None:
    code = "import json; from tests.statistics.test_device_tally import *; print(json.dumps(state_without_compiling()))"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, timeout=300, check=False
    )
    assert not done.returncode, done.stderr.decode()
    assert json.loads(done.stdout) == state_without_compiling()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_either_device_give_the_same_state() -> None:
    x = awkward(200_000)
    on_host, mixed = Histogram(), Histogram()
    for index, batch in enumerate(x.split(30_000)):
        on_host.update(batch)
        mixed.update(batch.cuda() if index % 2 else batch)
    for name, tensor in on_host.state_dict().items():
        assert torch.equal(mixed.state_dict()[name], tensor), name
