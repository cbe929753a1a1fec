"""One pass over a stream of tensors, kept in fixed memory, from which every calibrator can be asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from halfstep.errors import ArgumentError, DataError, NotObservedError
from halfstep.statistics import counting
from halfstep.statistics import counting as device
from halfstep.statistics.bins import (
    BINS,
    NAN,
    NEGATIVE_INF,
    OFFSETS,
    POSITIVE_INF,
    SIGN,
    SPECIALS,
    TAIL,
    TINY_NEGATIVE,
    TINY_POSITIVE,
    Float64,
    Int64,
    Tails,
    exact_sum,
    exponent,
    order,
    significand,
)

Answer = TypeVar("Answer")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Histogram:
    """All that calibrators need to know about the values at one site, collected in one pass.

    The bins are fixed before the first value is seen: 128 of equal width in every power of two, of either
    sign, over the whole range of float32. So no value is out of range, one outlier costs no resolution, and
    two histograms add up exactly: any order of the batches and any split over processes give the same state,
    bit for bit.

    Exact: the counts (int64), ``min``, ``max``, ``sum`` (rounded once), the mean of every bin, and the 1024
    largest and 1024 smallest samples. All else is known to the width of a bin, 2^-7 of the value or less.
    NaN and infinities are counted apart and are part of nothing else; -0.0 counts as zero.

    Memory: 1 MiB for the bins, of which the operating system commits only the pages in use (often a fifth), and
    8 KiB for the ends, however much is seen. ``batch_ranges=True`` keeps a pair of floats per ``update`` more.

    Args:
        batch_ranges: also keep the extremes of every batch, which a moving average of ranges needs.

    Example:
        >>> histogram = Histogram()
        >>> histogram.update(torch.tensor([0.0, 0.5, -2.0]))
        >>> histogram.update(torch.tensor([[8.0]]))
        >>> histogram.count, histogram.min, histogram.max, histogram.sum
        (4, -2.0, 8.0, 6.5)
    """

    def __init__(self, *, batch_ranges: bool = False) -> None:
        self._counts: Int64 = np.zeros(BINS, np.int64)
        self._offsets: Int64 = np.zeros(BINS, np.int64)
        self._specials: Int64 = np.zeros(SPECIALS, np.int64)
        self._tails = Tails.empty()
        self._pending: device.Tally | None = None  # what torch has counted and not yet handed over
        self._answers: dict[Hashable, Any] = {}  # to what was asked since the last change
        self._batch_ranges: list[tuple[float, float]] | None = [] if batch_ranges else None

    def update(self, x: Tensor) -> int:
        """Count every element of ``x``, and return how many are NaN; of a tensor on an accelerator 0.

        That is not waited for: what it counted is known from :meth:`nans_there`, or when the histogram is asked.
        An empty tensor changes nothing. A tensor that is dense in memory is read in place, whatever its
        strides. Several threads may count at once.

        Args:
            x: any shape; float32, float16 or bfloat16, on any device.

        Raises:
            ArgumentError: another dtype.
        """
        if x.dtype not in _DTYPES:
            raise ArgumentError(
                f"histogram: got a {x.dtype} tensor, needed float32, float16 or bfloat16; convert it"
            )
        if x.numel() == 0:
            return 0
        self._answers.clear()
        flat = _flat(x.detach())
        if self._batch_ranges is not None:
            self._batch_ranges += _finite_range(flat)
        if flat.device.type != "cpu" or counting.interpreted():
            with counting.HANDING_OVER:
                if self._pending is None or self._pending.device != flat.device:
                    self.settle()
                    self._pending = device.Tally(flat.device)
                self._pending.add(flat)
            return int(flat.isnan().sum()) if flat.device.type == "cpu" else 0
        threads, nans = torch.get_num_threads(), 0
        # Narrow types are widened piece by piece, to bound the copy.
        for piece in (flat,) if flat.dtype == torch.float32 else flat.split(counting.PIECE):
            words = piece.float().numpy().view(np.int32)
            nans += counting.count(words, self._counts, self._offsets, self._specials, self._tails, threads)
        return nans

    def merge(self, other: Histogram) -> None:
        """Add what another histogram saw: the result is that of one histogram that saw both streams.

        Args:
            other: left as it is. If both keep batch ranges, its batches follow this one's.

        Raises:
            ArgumentError: only one of the two keeps batch ranges.
        """
        if (self._batch_ranges is None) != (other._batch_ranges is None):
            raise ArgumentError(
                "merge: one histogram keeps batch ranges, the other does not; observe both alike"
            )
        self._answers.clear()
        self.settle()
        other.settle()
        self._counts += other._counts
        self._offsets += other._offsets
        self._specials += other._specials
        self._tails.merge(other._tails)
        if self._batch_ranges is not None and other._batch_ranges is not None:
            self._batch_ranges += other._batch_ranges

    # What was seen.

    @property
    def count(self) -> int:
        """Finite values seen."""
        self.settle()
        return int(self._counts.sum())

    @property
    def nan_count(self) -> int:
        """NaN seen; cheap enough to be asked after every update."""
        pending = 0 if self._pending is None else int(self._pending.nans)
        return int(self._specials[NAN]) + pending

    @property
    def nans_there(self) -> Tensor | None:
        """How many NaN an accelerator has counted and not handed over, as a tensor there; None where nothing waits."""
        return None if self._pending is None else self._pending.nans

    @property
    def inf_count(self) -> int:
        """Infinities seen, of either sign."""
        self.settle()
        return int(self._specials[POSITIVE_INF] + self._specials[NEGATIVE_INF])

    @property
    def zero_count(self) -> int:
        """Zeros seen, of either sign."""
        self.settle()
        tiny = self._specials[TINY_POSITIVE] + self._specials[TINY_NEGATIVE]
        return int(self._counts[0] + self._counts[SIGN] - tiny)

    @property
    def min(self) -> float:
        """The smallest finite value. Raises :class:`~halfstep.errors.NotObservedError` if there was none."""
        return self._nth(1, of=self._require_count())

    @property
    def max(self) -> float:
        """The largest finite value. Raises :class:`~halfstep.errors.NotObservedError` if there was none."""
        count = self._require_count()
        return self._nth(count, of=count)

    @property
    def sum(self) -> float:
        """The sum of the finite values, rounded once."""
        self.settle()
        keys = np.flatnonzero(self._counts)
        return exact_sum(keys, self._counts[keys], self._offsets[keys])

    @property
    def sum_of_squares(self) -> float:
        """The sum of squares, right to 2^-16 of itself and the same for any order and split.

        Counts and sums of the bins are exact; only the spread within a bin is inferred (see :meth:`slabs`).
        """
        centres, halves, counts = self.slabs()
        return math.fsum(counts * (centres**2 + halves**2 / 3))

    @property
    def keeps_batch_ranges(self) -> bool:
        """Whether the extremes of every batch are kept."""
        return self._batch_ranges is not None

    @property
    def batch_ranges(self) -> list[tuple[float, float]]:
        """The smallest and largest finite value of every batch, in the order seen.

        Raises:
            ArgumentError: they were not asked for when the histogram was made.
        """
        if self._batch_ranges is None:
            raise ArgumentError("batch ranges: not kept by this histogram; observe with batch_ranges=True")
        return list(self._batch_ranges)

    def bins(self) -> tuple[Float64, Int64]:
        """Return the non-empty bins as (values, counts), values ascending.

        A value is the exact mean of the samples of its bin, rounded to float64. Zeros are one entry of their
        own.
        """
        centres, _, counts = self.slabs()
        return centres, counts

    def keyed_counts(self) -> tuple[Int64, Int64]:
        """Return (places, counts) of the non-empty bins; a place names the same bin in every histogram.

        Places ascend with the values.
        """
        self.settle()
        keys = np.flatnonzero(self._counts)
        counts = self._counts[keys]
        places = np.where(keys < SIGN, keys, SIGN - keys)  # the bin of zero is 0, as is that of -0.0
        ascending, which = np.unique(places, return_inverse=True)
        return ascending, np.bincount(which, counts).astype(np.int64)

    def slabs(self) -> tuple[Float64, Float64, Int64]:
        """Return the non-empty bins as (centres, half widths, counts), centres ascending.

        Each bin is modelled as a uniform density about the exact mean of its samples: the widest that lies in
        the bin and between ``min`` and ``max``. So evenly filled bins keep their width, and a value that is
        alone in its bin and lies at the bin's edge or at the end of the data (zero, the six of a ReLU6, a
        constant) is a point.
        """
        self.settle()
        counts, offsets = self._counts.copy(), self._offsets
        zeros = self.zero_count
        counts[0], counts[SIGN] = self._specials[TINY_POSITIVE], self._specials[TINY_NEGATIVE]
        keys = np.flatnonzero(counts)
        n = counts[keys]
        unit = np.ldexp(1.0, exponent(keys))
        low = significand(keys) * (OFFSETS * unit)  # magnitudes
        mean = low + offsets[keys] / n * unit
        high = low + OFFSETS * unit
        sign = np.where(keys < SIGN, 1.0, -1.0)
        if keys.size:
            low = np.maximum(low, np.where(sign > 0, self.min, -self.max))
            high = np.minimum(high, np.where(sign > 0, self.max, -self.min))
        half = np.clip(np.minimum(mean - low, high - mean), 0.0, None)
        centres, halves = sign * mean, half
        if zeros:
            centres, halves, n = np.append(centres, 0.0), np.append(halves, 0.0), np.append(n, zeros)
        ascending = np.argsort(centres, kind="stable")
        return centres[ascending], halves[ascending], n[ascending]

    def quantile(self, p: float | Fraction) -> float:
        """Return the smallest sample x such that a share ``p`` of all samples is at most x.

        Exact where fewer than 1024 samples lie beyond x; otherwise the mean of the bin that holds it, off by
        less than 2^-7 of x. The rank follows ``p`` as written in decimals: 0.9999 of 10,000 is 9,999.

        Args:
            p: from 0 (the minimum) to 1 (the maximum).

        Raises:
            ArgumentError: ``p`` is out of its domain.
            NotObservedError: nothing was observed.

        Source: ``inverted_cdf`` of R. J. Hyndman and Y. Fan, Sample quantiles in statistical packages, 1996.
        """
        count = self._require_count()
        return self._nth(_rank(p, count), of=count)

    def magnitude_quantile(self, p: float | Fraction) -> float:
        """Return :meth:`quantile` of the absolute values."""
        count = self._require_count()
        above = count - _rank(p, count)
        upper, lower = self._ends()
        lower = lower[: count - upper.size]  # of few samples the largest are among the smallest too
        ends = np.sort(np.abs(np.concatenate([upper, lower])))[::-1]
        if above < upper.size or ends.size == count:
            return float(ends[above])
        values, counts = self.bins()
        return _nth_of(np.abs(values), counts, count - above)

    def nth(self, rank: int) -> float:
        """Return the ``rank``-th smallest sample, 1 being the minimum; as exact as :meth:`quantile`."""
        return self._nth(rank, of=self._require_count())

    def once(self, question: Hashable, answer: Callable[[], Answer]) -> Answer:
        """What ``answer`` returns, asked once for a question until more is seen."""
        if question not in self._answers:
            self._answers[question] = answer()
        found: Answer = self._answers[question]
        return found

    # Keeping it.

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as CPU tensors that share no memory with it; equal streams give equal tensors.

        ``keys``, ``counts`` and ``offsets`` are the non-empty bins (int64), ``specials`` the counts of NaN,
        infinities and the smallest subnormals (int64), ``upper`` and ``lower`` the ends of the stream as
        ordered integers (int32), and ``batch_ranges`` is (batches, 2) float64 where these are kept.
        """
        self.settle()
        keys = np.flatnonzero(self._counts)
        state = {
            "keys": keys,
            "counts": self._counts[keys],
            "offsets": self._offsets[keys],
            "specials": self._specials.copy(),
            "upper": self._tails.upper,
            "lower": self._tails.lower,
        }
        if self._batch_ranges is not None:
            state["batch_ranges"] = np.array(self._batch_ranges, np.float64).reshape(-1, 2)
        return {name: torch.from_numpy(array) for name, array in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state by one that :meth:`state_dict` returned.

        Raises:
            DataError: a part is missing, unknown, or of the wrong shape.
        """
        shapes = {
            "keys": None,
            "counts": None,
            "offsets": None,
            "specials": SPECIALS,
            "upper": TAIL,
            "lower": TAIL,
        }
        needed = set(shapes)
        if set(state) - {"batch_ranges"} != needed:
            raise DataError(f"histogram state: got {sorted(state)}, needed {sorted(needed)}")
        arrays = {name: state[name].detach().cpu().numpy() for name in shapes}
        for name, size in shapes.items():
            wanted = (arrays["keys"].size if size is None else size,)
            if arrays[name].shape != wanted:
                raise DataError(f"histogram state, {name}: got shape {arrays[name].shape}, needed {wanted}")
        if arrays["keys"].size and not 0 <= arrays["keys"].min() <= arrays["keys"].max() < BINS:
            raise DataError(
                f"histogram state, keys: got some outside 0 .. {BINS - 1}, needed the names of bins"
            )
        self.__init__(batch_ranges="batch_ranges" in state)  # type: ignore[misc]
        self._counts[arrays["keys"]] = arrays["counts"]
        self._offsets[arrays["keys"]] = arrays["offsets"]
        self._specials[:] = arrays["specials"]
        self._tails = Tails.of(arrays["upper"], arrays["lower"])
        if "batch_ranges" in state:
            self._batch_ranges = [(low, high) for low, high in state["batch_ranges"].tolist()]

    @property
    def parts(self) -> tuple[Histogram, ...]:
        """The histograms that this one consists of: itself."""
        return (self,)

    def __repr__(self) -> str:
        if self.count == 0:
            return "Histogram(empty)"
        return f"Histogram(count={self.count}, min={self.min:.6g}, max={self.max:.6g})"

    # Inside.

    def settle(self) -> None:
        """Take over what torch has counted."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.empty_into(self._counts, self._offsets, self._specials, self._tails)

    def _require_count(self) -> int:
        count = self.count
        if count == 0:
            raise NotObservedError(
                "no finite value was observed; run at least one batch through the model first"
            )
        return count

    def _ends(self) -> tuple[Float64, Float64]:
        """Return the largest samples, descending, and the smallest, ascending."""
        kept = min(TAIL, int(self._counts.sum()))
        upper, lower = (
            order(tail[:kept]).view(np.float32) for tail in (self._tails.upper, self._tails.lower)
        )
        return upper.astype(np.float64) + 0.0, lower.astype(np.float64) + 0.0  # + 0.0: no negative zero

    def _nth(self, rank: int, of: int) -> float:
        """Return the sample of a rank, 1 being the smallest and ``of`` the largest."""
        upper, lower = self._ends()
        if rank <= lower.size:
            return float(lower[rank - 1])
        if of - rank < upper.size:
            return float(upper[of - rank])
        return _nth_of(*self.bins(), rank)


def _rank(p: float | Fraction, count: int) -> int:
    if not 0 <= p <= 1:
        raise ArgumentError(f"quantile: got {p}, needed a share from 0 to 1")
    share = p if isinstance(p, Fraction) else Fraction(repr(float(p)))
    return max(1, math.ceil(share * count))


def _nth_of(values: Float64, counts: Int64, rank: int) -> float:
    ascending = np.argsort(values, kind="stable")
    reached = np.cumsum(counts[ascending])
    return float(values[ascending][np.searchsorted(reached, rank)])


def _flat(x: Tensor) -> Tensor:
    """Return the elements in the order of memory: a view of a dense tensor, a copy of one with holes."""
    if x.is_contiguous():
        return x.view(-1)
    by_stride = sorted(range(x.dim()), key=x.stride, reverse=True)
    return x.permute(by_stride).reshape(-1).contiguous()


def _finite_range(x: Tensor) -> list[tuple[float, float]]:
    """Return the extremes of what is finite, as a list of one, or of none."""
    finite = x[torch.isfinite(x)]
    return [(float(finite.min()), float(finite.max()))] if finite.numel() else []
