"""The tables of well-known codebooks, computed from their definitions and normalised to a largest value of 1."""

from __future__ import annotations

from itertools import product
from math import exp, log

import torch
from torch import Tensor

from halfstep.errors import FormatError

#: Dettmers et al. 2023, "QLoRA", appendix E: quantiles of N(0, 1), the two halves made to share an exact
#: zero.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def mu_law(bits: int, mu: float) -> Tensor:
    """Values whose compressed form ``ln(1 + mu x) / ln(1 + mu)`` is a uniform grid from -1 to 1 with a zero.

    >>> mu_law(2, 255.0)
    tensor([-1.,  0.,  1.])

    Source: ITU-T G.711 (continuous form).
    """
    if not mu > 0:
        raise FormatError(f"mu: got {mu}, needed more than 0")
    steps = _positive_steps(bits)
    return _mirrored([((1 + mu) ** (i / steps) - 1) / mu for i in range(1, steps + 1)])


def a_law(bits: int, a: float) -> Tensor:
    """Values whose A-law compressed form is a uniform grid from -1 to 1 with a zero.

    The compressed form is ``a x / (1 + ln a)`` up to 1/a, and ``(1 + ln(a x)) / (1 + ln a)`` above.

    Source: ITU-T G.711 (continuous form).
    """
    if not a >= 1:
        raise FormatError(f"a: got {a}, needed 1 or more")
    steps, whole = _positive_steps(bits), 1 + log(a)
    grid = [i * whole / steps for i in range(1, steps + 1)]
    return _mirrored([y / a if y < 1 else exp(y - 1) / a for y in grid])


def power_of_two(bits: int) -> Tensor:
    """0 and +-2**-i for i from 0 to ``2**(bits - 1) - 2``.

    >>> power_of_two(3)
    tensor([-1.0000, -0.5000, -0.2500,  0.0000,  0.2500,  0.5000,  1.0000])
    """
    steps = _positive_steps(bits, most=8)  # 2**-126 is the smallest normal float32
    return _mirrored([2.0**-i for i in reversed(range(steps))])


def apot(bits: int, signed: bool) -> Tensor:
    """Additive powers of two: each value is a sum of one number from each of several small sets of powers.

    With B bits of magnitude there are B // 2 sets {0, p, q, r}, and one set {0, p} if B is odd; the exponents
    -1, -2, ... are dealt out in rounds, the odd set getting one in the third round only.

    >>> apot(3, signed=False)
    tensor([0.0000, 0.1000, 0.2000, 0.3000, 0.4000, 0.6000, 0.8000, 1.0000])

    Source: Li, Dong, Wang 2020, "Additive Powers-of-Two Quantization", section 2.2; k = 2.
    """
    magnitude = bits - 1 if signed else bits
    if not 1 <= magnitude <= 8:
        raise FormatError(f"bits: got {bits}, needed {2 if signed else 1} to {9 if signed else 8} for APoT")
    pairs, odd = divmod(magnitude, 2)
    sets: list[list[float]] = [[0.0] for _ in range(pairs + odd)]
    order = [*range(pairs)] * 2 + [pairs] * odd + [*range(pairs)]
    for exponent, term in enumerate(order, start=1):
        sets[term].append(2.0**-exponent)
    sums = sorted(sum(choice) for choice in product(*sets))
    levels = [level / sums[-1] for level in sums]
    return _mirrored(levels[1:]) if signed else torch.tensor(levels, dtype=torch.float32)


def _positive_steps(bits: int, most: int = 16) -> int:
    """Return how many positive values a signed table of ``2**bits - 1`` values has."""
    if not 2 <= bits <= most:
        raise FormatError(f"bits: got {bits}, needed 2 to {most}")
    steps: int = 2 ** (bits - 1) - 1
    return steps


def _mirrored(positive: list[float]) -> Tensor:
    """Return the table of increasing positive values, zero, and their negatives."""
    return torch.tensor([-v for v in reversed(positive)] + [0.0] + positive, dtype=torch.float32)
