"""Non-uniform formats: a sorted table of values, and thresholds that say which value a number becomes.

The tables of well-known codebooks, computed from their definitions and normalised to a largest value of 1.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from math import exp, log

import torch
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.formats.format import checked_range, storable

#: Bits of float32: all but the sign, those of the largest subnormal number, and those of the largest one.
_MAGNITUDE, _SUBNORMAL, _LARGEST = 0x7FFFFFFF, 0x007FFFFF, 0x7F7FFFFF


def midpoints(values: Tensor) -> Tensor:
    """Return the thresholds halfway between neighbouring values: shape (..., n) -> (..., n - 1).

    Between two neighbouring floats there is none: the lower one is the threshold then, and what lies above it is the
    upper one. So thresholds strictly increase where values do.

    >>> midpoints(torch.tensor([-1.0, 0.0, 0.5]))
    tensor([-0.5000,  0.2500])
    """
    lower, upper = values[..., :-1], values[..., 1:]
    halfway = ((lower.double() + upper.double()) / 2).to(values.dtype)
    return torch.where(halfway < upper, halfway, lower)


def increasing(values: Tensor) -> Tensor:
    """Return finite numbers as sorted float32 that strictly increase along the last axis.

    Equal ones, which k-means and training can give, are moved up to the next free floats (down at the very top).
    Subnormal numbers become zero: a processor may take them for it.

    >>> increasing(torch.tensor([2.0, 1.0, 2.0, 0.0])).diff() > 0
    tensor([True, True, True])
    """
    bits = values.detach().float().sort(dim=-1).values.view(torch.int32).long()
    # Every float32 that is not subnormal has a rank, 0 being zero's.
    ranks = (bits & _MAGNITUDE).sub(_SUBNORMAL).clamp(min=0) * torch.where(bits < 0, -1, 1)
    places = torch.arange(ranks.shape[-1], device=ranks.device)
    ranks = (ranks - places).cummax(dim=-1).values + places
    ranks = torch.minimum(ranks, places - places[-1] + _LARGEST - _SUBNORMAL)
    magnitudes = torch.where(ranks == 0, 0, ranks.abs() + _SUBNORMAL).int().view(torch.float32)
    return magnitudes * ranks.sign()


@dataclass(frozen=True, eq=False, repr=False)
class Codebook:
    """n values and the n - 1 thresholds between their cells; real = scale * values[code].

    A code is the number of thresholds below ``x / scale``. Equality and hash go by content.

    Args:
        values: (n,), strictly increasing; or (\\*parameters, n), one table for each parameter of the
            granularity it is used with. Stored as float32.
        thresholds: (n - 1,) or (\\*parameters, n - 1), strictly increasing. None stands for the midpoints,
            which makes the value the nearest one.
        ties_up: what becomes of a number equal to a threshold: the lower value, or (True) the upper one.
        scaled: whether values are multiples of a scale, as normalised tables are; if False they are absolute,
            and :meth:`parameters` answers with scale 1.
        name: what ``str()`` calls it.

    Raises:
        FormatError: fewer than 2 values, not finite, not strictly increasing, or thresholds that do not fit.

    >>> Codebook.rule(values=[0, 1, 2], thresholds=[0, 1], ties_up=True)  # below 0, [0, 1), 1 and above
    Codebook(rule, 3 values, 2 bits)
    """

    values: Tensor
    thresholds: Tensor = None  # type: ignore[assignment]  # None only until __post_init__
    ties_up: bool = False
    scaled: bool = True
    name: str = "codebook"
    lowest: float = field(init=False)
    highest: float = field(init=False)

    def __post_init__(self) -> None:
        values = _table("values", self.values, at_least=2)
        thresholds = midpoints(values) if self.thresholds is None else self.thresholds
        thresholds = _table("thresholds", thresholds, at_least=1)
        if thresholds.shape != (*values.shape[:-1], values.shape[-1] - 1):
            raise FormatError(
                f"thresholds: got shape {tuple(thresholds.shape)} for values of shape {tuple(values.shape)}; "
                "needed one threshold less than values"
            )
        for name, value in (
            ("values", values),
            ("thresholds", thresholds),
            ("lowest", values.amin().item()),
            ("highest", values.amax().item()),
        ):
            object.__setattr__(self, name, value)

    @classmethod
    def rule(cls, values: Sequence[float], thresholds: Sequence[float], ties_up: bool = False) -> Codebook:
        """A rule of one's own: absolute values and thresholds, with the side that a tie goes to.

        Warns where zero is none of the values, because padding and ReLU produce zeros.

        >>> Codebook.rule([0, 1, 2], [0, 1], ties_up=True).thresholds
        tensor([0., 1.])
        """
        if 0.0 not in list(values):
            warnings.warn("this rule has no value 0: zeros from padding and ReLU will change", stacklevel=2)
        return cls(
            torch.tensor(values, dtype=torch.float32),
            torch.tensor(thresholds, dtype=torch.float32),
            ties_up,
            scaled=False,
            name="rule",
        )

    @classmethod
    def mu_law(cls, bits: int, mu: float = 255.0) -> Codebook:
        """``2**bits - 1`` values, evenly spaced after mu-law compression: fine steps near zero."""
        return cls(mu_law(bits, mu), name="mu-law")

    @classmethod
    def a_law(cls, bits: int, a: float = 87.6) -> Codebook:
        """``2**bits - 1`` values, evenly spaced after A-law compression."""
        return cls(a_law(bits, a), name="A-law")

    @classmethod
    def power_of_two(cls, bits: int) -> Codebook:
        """0 and +-1, +-1/2, +-1/4, ...: ``2**bits - 1`` values, a product is a shift."""
        return cls(power_of_two(bits), name="power-of-two")

    @classmethod
    def apot(cls, bits: int, signed: bool = True) -> Codebook:
        """Additive powers of two (Li, Dong, Wang 2020): sums of few powers of two, a product is a few shifts."""
        return cls(apot(bits, signed), name="APoT" if signed else "unsigned APoT")

    @classmethod
    def nf4(cls) -> Codebook:
        """NormalFloat of 4 bits (Dettmers et al. 2023): quantiles of N(0, 1); meant for groups of 64."""
        return cls(torch.tensor(NF4, dtype=torch.float32), name="NF4")

    @classmethod
    def binary(cls) -> Codebook:
        """-1 and 1, with sign(0) = +1; :func:`~halfstep.functional.binary_scale` gives its best scale."""
        return cls(torch.tensor([-1.0, 1.0]), torch.tensor([0.0]), ties_up=True, name="binary")

    @classmethod
    def ternary(cls) -> Codebook:
        """-1, 0 and 1; :func:`~halfstep.functional.ternary_scale` gives its best scale."""
        return cls(torch.tensor([-1.0, 0.0, 1.0]), name="ternary")

    @property
    def levels(self) -> int:
        """How many values a table has."""
        return self.values.shape[-1]

    @property
    def bits(self) -> int:
        """Bits of a stored code."""
        return (self.levels - 1).bit_length()

    @property
    def dtype(self) -> torch.dtype:
        """The smallest torch dtype that holds every code: uint8, int16 or int32."""
        return torch.uint8 if self.levels <= 2**8 else torch.int16 if self.levels <= 2**15 else torch.int32

    @property
    def symmetric(self) -> bool:
        """Whether the lowest value is minus the highest."""
        return self.lowest == -self.highest

    @property
    def reach(self) -> float:
        """The largest magnitude of a value."""
        return max(-self.lowest, self.highest)

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest scale whose range covers [low, high], and zeros for the zero point.

        A side that the table lacks (no negative values, say) is left out: its numbers saturate. A zero range,
        and a codebook of absolute values, get scale 1.

        Args:
            low: lower ends, any shape; with one table per parameter that shape.
            high: upper ends, same shape.

        Returns:
            scale (float32) and zero_point (int32), both of that shape.

        Raises:
            FormatError: an end that is NaN or infinite, ``low > high``, or a scale beyond float32.

        >>> Codebook.nf4().parameters(torch.tensor(-3.0), torch.tensor(2.0))
        (tensor(3.), tensor(0, dtype=torch.int32))
        """
        low, high = checked_range(low, high)
        zero_point = torch.zeros_like(low, dtype=torch.int32)
        if not self.scaled:
            return torch.ones_like(low, dtype=torch.float32), zero_point
        first, last = self._ends(low.device)
        below = torch.where(first < 0, low / first.clamp(max=-1e-300), 0.0)
        above = torch.where(last > 0, high / last.clamp(min=1e-300), 0.0)
        return storable(torch.maximum(below, above)), zero_point

    def range(self, scale: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the lowest and the highest value, times ``scale``; ``zero_point`` is not read."""
        first, last = self._ends(scale.device)
        return scale * first.to(scale.dtype), scale * last.to(scale.dtype)

    def _ends(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the first and last values of each table in float64, or plain scalars for a single table."""
        values = self.values.to(device)
        return values[..., 0].double(), values[..., -1].double()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Codebook) and self._content() == other._content()

    def __hash__(self) -> int:
        return hash(self._content())

    def _content(self) -> tuple[object, ...]:
        numbers = (self.values.cpu().numpy(), self.thresholds.cpu().numpy())
        digests = [hashlib.sha256(n.tobytes()).digest() for n in numbers]
        return (self.name, self.ties_up, self.scaled, tuple(self.values.shape), *digests)

    def __repr__(self) -> str:
        tables = " per parameter" if self.values.dim() > 1 else ""
        return f"Codebook({self.name}, {self.levels} values{tables}, {self.bits} bits)"

    def __str__(self) -> str:
        return f"{self.name} of {self.levels}"


def _table(name: str, numbers: Tensor, at_least: int) -> Tensor:
    """Return numbers as float32, checked to be finite and strictly increasing along the last axis."""
    numbers = torch.as_tensor(numbers, dtype=torch.float32).detach().clone() + 0.0  # no -0.0
    if numbers.dim() < 1 or numbers.shape[-1] < at_least:
        raise FormatError(
            f"{name}: got shape {tuple(numbers.shape)}, needed {at_least} or more along the last axis"
        )
    if not bool(numbers.isfinite().all()) or not bool((numbers.diff(dim=-1) > 0).all()):
        raise FormatError(
            f"{name}: got {numbers.tolist()}, needed finite float32 numbers that strictly increase"
        )
    return numbers


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
