"""What a histogram says against trusting a range that is asked of it: as data, for the caller to name and show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil, inf, isfinite, log10
from typing import Literal

import numpy as np

from halfstep.calibrators.calibrator import Calibrator, Max
from halfstep.calibrators.error import place
from halfstep.calibrators.percentile import Percentile
from halfstep.formats.format import Format
from halfstep.statistics import Histogram, distance

APART = 2.0  # calibrators whose ranges differ by more than this factor disagree


BEYOND = 10  # samples that a percentile needs to leave out before it says more than the largest samples do


FAR = 0.1  # distance of the evaluation's values from the calibration's that is worth a word

STEADY = 1.25  # ranges of two halves of the data that differ by more than this factor rest on too few of them


BULK = Percentile(99.9)  # whose range outliers hardly move, so that it shows how steady the data are

Kind = Literal[
    "unobserved",
    "not finite",
    "only zeros",
    "few samples",
    "sparse",
    "disagreement",
    "unlike",
    "unsteady",
    "lost",
]


@dataclass(frozen=True)
class Concern:
    """One reason for a second look.

    Attributes:
        kind: which, for programs.
        message: what was found and what to do, for people; the caller puts the site's name before it.
    """

    kind: Kind
    message: str

    def __str__(self) -> str:
        return self.message


def data_concerns(histogram: Histogram, calibrators: Sequence[Calibrator] = ()) -> list[Concern]:
    """Return what is wrong with the values seen, for the calibrators that shall use them.

    Args:
        histogram: what was seen.
        calibrators: those to be asked; a percentile needs enough samples to leave some out, and enough that are not
            zero to have some left.

    >>> histogram = Histogram()
    >>> histogram.update(torch.zeros(100))
    >>> [str(concern) for concern in data_concerns(histogram)]
    ['all 100 values are zero: the site is dead on these data, any range will do']
    """
    found = []
    unfit = histogram.nan_count + histogram.inf_count
    if unfit:
        found.append(
            Concern(
                "not finite",
                f"{histogram.nan_count} NaN and {histogram.inf_count} infinite values were left out of the range",
            )
        )
    if not histogram.count:
        return [
            *found,
            Concern("unobserved", "no finite value was observed: the model never gets here on these data"),
        ]
    if histogram.zero_count == histogram.count:
        dead = f"all {histogram.count} values are zero: the site is dead on these data, any range will do"
        return [*found, Concern("only zeros", dead)]
    for calibrator in calibrators:
        if isinstance(calibrator, Percentile) and calibrator.share < 1:
            needed = ceil(BEYOND / (1 - calibrator.share))
            if histogram.count < needed:
                few = f"{calibrator} of {histogram.count} values rests on fewer than {BEYOND} of them: needs {needed}"
                found.append(Concern("few samples", few))
            live, left_out = histogram.count - histogram.zero_count, calibrator.left_out(histogram.count)
            if 2 * left_out >= live:
                sparse = (
                    f"only {live} of {histogram.count} values are not zero, and {calibrator} leaves out {left_out} on "
                    "a side (if that leaves only zero, its share of those that are not): choose another calibrator, "
                    "such as mse"
                )
                found.append(Concern("sparse", sparse))
    return found


def disagreements(ranges: Mapping[Calibrator, tuple[float, float]]) -> list[Concern]:
    """Return the pair of calibrators that are furthest apart, if more than twofold; else nothing.

    A range's width is what is compared. Such a site has outliers that some calibrators keep and others clip: there the
    choice of calibrator matters.

    Args:
        ranges: what each calibrator answered for one site and format.

    >>> [concern.kind for concern in disagreements({Max(): (-9.0, 9.0), Percentile(99.9): (-1.0, 1.0)})]
    ['disagreement']
    """
    widths = {calibrator: high - low for calibrator, (low, high) in ranges.items()}
    pairs = [sorted(pair, key=lambda c: widths[c]) for pair in combinations(widths, 2)]
    apart = [(small, large) for small, large in pairs if widths[large] > APART * widths[small]]
    if not apart:
        return []
    small, large = max(
        apart, key=lambda pair: widths[pair[1]] / widths[pair[0]] if widths[pair[0]] else float("inf")
    )
    message = (
        f"{large} answers [{ranges[large][0]:.4g}, {ranges[large][1]:.4g}] and {small} "
        f"[{ranges[small][0]:.4g}, {ranges[small][1]:.4g}]: outliers decide here, compare calibrators"
    )
    return [Concern("disagreement", message)]


def unsteady(first: Histogram, second: Histogram, format: Format) -> list[Concern]:
    """Return a concern if two halves of the calibration data give ranges of different widths; else nothing.

    Args:
        first: what one half made of a site.
        second: what the other half made of it.
        format: of the site.

    Raises:
        NotObservedError: either is empty.

    >>> halves = Histogram(), Histogram()
    >>> for half, scale in zip(halves, (1.0, 1.5)):
    ...     half.update(scale * torch.linspace(-1, 1, 999))
    >>> [concern.kind for concern in unsteady(*halves, Integer(8))]
    ['unsteady']
    """
    ranges = [tuple(map(float, BULK.range(half, format))) for half in (first, second)]
    (low, high), (other_low, other_high) = ranges
    small, large = sorted((high - low, other_high - other_low))
    if large <= STEADY * small:
        return []
    message = (
        f"{BULK} answers [{low:.4g}, {high:.4g}] on one half of the calibration data and [{other_low:.4g}, "
        f"{other_high:.4g}] on the other: give more examples, in random order"
    )
    return [Concern("unsteady", message)]


def unlike(calibration: Histogram, evaluation: Histogram) -> list[Concern]:
    """Return a concern if the values of the evaluation are not distributed as those of the calibration.

    Args:
        calibration: what the range was taken from.
        evaluation: what the same site sees now.

    Raises:
        NotObservedError: either is empty.
    """
    apart = distance(calibration, evaluation)
    if apart <= FAR:
        return []
    message = (
        f"calibration and evaluation values differ (distance {apart:.2f}; 0 is equal, 1 disjoint): "
        "calibrate on data like those the model will see"
    )
    return [Concern("unlike", message)]


def lost(part: Histogram, whole: Histogram, format: Format) -> list[Concern]:
    """Return a concern if codes for the whole leave a part of it less than half of the bits that it would have alone.

    Bits are those of the signal-to-noise ratio, at 6.02 dB each: the part's variance over its expected squared rounding
    error, summed over its histogram, once with the range of the whole and once with its own, the largest values both
    times. Half of 8 bits is 4: a part sixteen times as narrow as the whole.

    Args:
        part: what was seen of one input of a concat.
        whole: what was seen of its output.
        format: of the codes that hold both.

    Raises:
        NotObservedError: either is empty.
    """
    alone, left = (_bits(part, Max().range(histogram, format), format) for histogram in (part, whole))
    if not (isfinite(alone) and left < alone / 2):
        return []
    message = (
        f"{part.min:.4g} to {part.max:.4g} has {max(left, 0.0):.1f} of {alone:.1f} bits in the codes that it shares "
        f"with {whole.min:.4g} to {whole.max:.4g}"
    )
    return [Concern("lost", message)]


def _bits(histogram: Histogram, range: tuple[float, float], format: Format) -> float:
    """The bits that values keep in a range; infinity where they lose nothing, or are all the same."""
    values, counts = histogram.bins()
    low, high = (np.array([float(end)]) for end in range)
    error = float(place(format, low, high).squared_error(values)[0] @ counts) / histogram.count
    variance = histogram.sum_of_squares / histogram.count - (histogram.sum / histogram.count) ** 2
    return 10 * log10(variance / error) / (20 * log10(2)) if error > 0 and variance > 0 else inf
