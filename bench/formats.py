"""How long fake_quantize takes, per format, beside a plain copy and torch's own operator.

    python -m bench.formats [--elements 1600000] [--threads 2] [--rounds 40] [--device cpu]

Every row is timed in turn within each round, so that a machine that is busy for a while is busy for all of them. The
best time of all rounds is what the work takes; the median says how quiet the machine was. "ratio" is the time over
that of a copy into a buffer that already exists. A result of its own costs memory that the system may have to clear
first: the row "clone" shows what that alone takes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from halfstep.formats import E2M1, E4M3, E5M2, Codebook, Format, Integer
from halfstep.functional import (
    CLIPPED_STE,
    LSQ,
    Gradient,
    fake_quantize,
    fake_quantize_learned,
    kmeans_codebook,
)
from halfstep.granularity import Granularity, PerChannel, PerGroup, PerTensor

Work = Callable[[], object]


def inference(x: Tensor, format: Format, granularity: Granularity) -> Work:
    """fake_quantize without gradients."""
    scale, zero_point = calibrated(x, format, granularity)

    def work() -> object:
        with torch.no_grad():
            return fake_quantize(x, scale, zero_point, format, granularity)

    return work


def training(x: Tensor, format: Format, granularity: Granularity, gradient: Gradient, learned: bool) -> Work:
    """fake_quantize forward and backward, to the input and, if learned, to the scale."""
    scale, zero_point = calibrated(x, format, granularity)
    leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)
    leaves = (leaf, scale.requires_grad_()) if learned else (leaf,)

    def work() -> object:
        return torch.autograd.grad(
            fake_quantize(leaf, scale, zero_point, format, granularity, gradient), leaves, grad
        )

    return work


def learned_values(x: Tensor) -> Work:
    """A codebook of 16 learned values, forward and backward."""
    values = torch.linspace(-3, 3, 16, device=x.device).requires_grad_()
    leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)
    return lambda: torch.autograd.grad(fake_quantize_learned(leaf, values), (leaf, values), grad)


def torchs_own(x: Tensor, with_gradient: bool) -> Work:
    """torch.fake_quantize_per_tensor_affine."""
    scale, zero_point = calibrated(x, Integer(8, signed=False, symmetric=False), PerTensor())
    leaf, grad = x.clone().requires_grad_(with_gradient), torch.randn_like(x)

    def work() -> object:
        y = torch.fake_quantize_per_tensor_affine(leaf, scale, zero_point, 0, 255)
        return torch.autograd.grad(y, leaf, grad) if with_gradient else y

    return work


def calibrated(x: Tensor, format: Format, granularity: Granularity) -> tuple[Tensor, Tensor]:
    low, high = granularity.reduce(x, "min"), granularity.reduce(x, "max")
    scale, zero_point = format.parameters(low, high)
    return scale.to(x.device), zero_point.to(x.device)


def rows(x: Tensor) -> dict[str, Work]:
    buffer = torch.empty_like(x)
    affine, scaled, nf4 = Integer(8, signed=False, symmetric=False), Integer(8), Codebook.nf4()
    fitted = kmeans_codebook(x.flatten()[:10_000].cpu(), 4)
    whole, channel = PerTensor(), PerChannel(0)
    return {
        "copy": lambda: buffer.copy_(x),
        "clone": x.clone,
        "torch's own": torchs_own(x, with_gradient=False),
        "u8 affine per tensor": inference(x, affine, whole),
        "s8 scale per channel": inference(x, scaled, channel),
        "s4 scale per group of 64": inference(x, Integer(4), PerGroup(1, 64)),
        "u8 affine, literal rounding": inference(x, Integer(8, False, False, round_shifted=True), whole),
        "NF4 per tensor": inference(x, nf4, whole),
        "NF4 per group of 64": inference(x, nf4, PerGroup(1, 64)),
        "k-means of 16 values": inference(x, fitted, whole),
        "mu-law of 255 values": inference(x, Codebook.mu_law(8), whole),
        "E4M3": inference(x, E4M3, whole),
        "E5M2": inference(x, E5M2, whole),
        "E2M1": inference(x, E2M1, whole),
        "torch's own, forward and backward": torchs_own(x, with_gradient=True),
        "u8 affine, forward and backward": training(x, affine, whole, CLIPPED_STE, learned=False),
        "s8 per channel, forward and backward": training(x, scaled, channel, CLIPPED_STE, learned=False),
        "u8 affine, LSQ": training(x, affine, whole, LSQ, learned=True),
        "NF4, forward and backward": training(x, nf4, whole, CLIPPED_STE, learned=False),
        "16 learned values": learned_values(x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=1_600_000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x = torch.randn(options.elements // 3200, 3200, device=options.device)
    works = rows(x)
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        for _ in range(3):  # compile, and warm the allocator
            work()
    for _ in range(options.rounds):
        for name, work in works.items():
            work()  # brings x back into the cache after the row before
            synchronize(options.device)
            start = time.perf_counter()
            work()
            synchronize(options.device)
            times[name].append(time.perf_counter() - start)
    copy = min(times["copy"])
    print(f"{x.numel():,} float32 on {options.device}, {options.threads} threads, torch {torch.__version__}")
    print(f"{'':38} {'best ms':>8} {'ms per M':>9} {'ratio':>7} {'median ms':>10}")
    for name, samples in times.items():
        best, median = min(samples), statistics.median(samples)
        rate = best * 1e9 / x.numel()
        print(f"{name:38} {best * 1e3:8.3f} {rate:9.3f} {best / copy:7.1f} {median * 1e3:10.3f}")


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
