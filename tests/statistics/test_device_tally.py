"""The count in torch operations equals the compiled one, bit for bit; on a GPU, and on the CPU where there is none."""

from __future__ import annotations

import math

import pytest
import torch

from halfstep.statistics import Histogram, device


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
    monkeypatch.setattr(device, "_PIECE", 700)
    x = awkward(size).to(dtype)
    compiled, tallied = Histogram(), Histogram()
    compiled.update(x)
    tallied._pending = device.Tally(torch.device("cpu"))
    tallied._pending.add(x)
    assert tallied.nan_count == compiled.nan_count  # before anything else is handed over
    for name, tensor in compiled.state_dict().items():
        assert torch.equal(tallied.state_dict()[name], tensor), name


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
