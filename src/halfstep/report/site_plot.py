"""A picture of one site: what was seen there, each calibrator's range, and the levels that it would have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from halfstep.calibration.candidates import CALIBRATORS
from halfstep.calibrators import Calibrator, levels
from halfstep.calibrators.error import Slabs
from halfstep.errors import ArgumentError, NotObservedError, RunError, named
from halfstep.formats import Format
from halfstep.model import QuantizedModel
from halfstep.statistics import Float64, Histogram

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BARS = 160
_DRAWN_ON = 40  # formats with more levels have them drawn beside their range only
_FAR = 8.0  # where ranges differ more than that, the axis is logarithmic outside of the narrowest
_INK, _FILL, _LEVEL = "#202830", "#8fb3d9", "#d1495b"


def plot_site(model: QuantizedModel, site: str, calibrators: Sequence[Calibrator] = CALIBRATORS) -> Figure:
    """Draw what was seen at a site, and what each calibrator makes of it.

    Above: the share of the values in each bar, on a logarithmic scale, with the range in use (shaded) and its levels.
    Below: each calibrator's range with its levels, the share of values that it clips, and its signal to noise.
    A weight is drawn in steps of its own channels, with the range in use.

    Args:
        model: observed; the range in use is drawn once it is calibrated.
        site: its name, as ``print(model)`` shows it.
        calibrators: whose ranges to draw.

    Returns:
        A figure of matplotlib; ``figure.savefig("site.png")`` writes it.

    Raises:
        ArgumentError: no site is called so, or its range is computed at run time.
        NotObservedError: the site saw no data, or a weight was not calibrated.
        RunError: matplotlib is not installed.
    """
    if site not in model.sites:
        raise ArgumentError(f"site: got {site!r}, needed one of {', '.join(map(repr, model.sites))}")
    module = model.sites[site]
    if module.dynamic:
        raise ArgumentError(
            f"site {site!r}: its range is computed from each input at run time; nothing is observed there"
        )
    title = f"{site}: {module.format}, {module.granularity}"
    in_use: tuple[float, float] | None = None
    if any(place.name == site and place.is_weight for place in model.placement.sites):
        module.range()  # raises unless calibrated
        steps = Histogram()
        scale = module.granularity.expand(module.scale, model.weight(site).shape)
        steps.update(model.weight(site).detach() / scale)
        unit = torch.ones(())
        ends = module.format.range(unit, torch.zeros_like(unit, dtype=torch.int32))
        in_use = (float(ends[0]), float(ends[1]))
        return site_figure(
            steps, module.format, {"in use": in_use}, in_use, f"{title}, in steps of its scales"
        )
    with named(f"site {site!r}"):
        ranges = {str(c): c.range(module.histogram, module.format) for c in calibrators}
        if not module.histogram.count:
            raise NotObservedError("no value was observed; run observe() first")
    if module.calibrated:
        low, high = module.range()
        in_use = (float(low.min()), float(high.max()))
    return site_figure(module.histogram, module.format, ranges, in_use, title)


def site_figure(
    histogram: Histogram,
    format: Format,
    ranges: Mapping[str, tuple[float, float]],
    in_use: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """Draw a histogram with ranges and their levels.

    Args:
        histogram: not empty.
        format: what is placed on each range.
        ranges: (low, high) by name, drawn in this order.
        in_use: shaded, its levels drawn over the histogram; None shades nothing.
        title: above it all.

    Raises:
        NotObservedError: the histogram is empty.
        RunError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RunError("plots need matplotlib: pip install 'halfstep[plot]'") from error
    figure = Figure(figsize=(9, 3.6 + 0.28 * len(ranges)), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 0.35 + 0.32 * len(ranges)))
    slabs = Slabs.of(histogram)
    threshold = _bend(ranges)
    start, stop = _view(histogram, [*ranges.values(), *([in_use] if in_use else [])], threshold)
    if threshold:
        upper.set_xscale("symlog", linthresh=threshold)
    edges = _edges(start, stop, threshold)
    upper.stairs(_shares(slabs, edges), edges, fill=True, color=_FILL)
    upper.set_yscale("log")
    upper.set_ylabel("share of values")
    upper.set_title(title, loc="left", fontsize=10, color=_INK)
    if in_use:
        upper.axvspan(*in_use, color=_LEVEL, alpha=0.08, linewidth=0)
        numbers = levels(format, *in_use)
        if numbers.size <= _DRAWN_ON:
            upper.vlines(numbers, 0, 1, transform=upper.get_xaxis_transform(), color=_LEVEL, linewidth=0.6)
    errors = slabs.mean_squared_error(
        np.array([low for low, _ in ranges.values()]), np.array([high for _, high in ranges.values()]), format
    )
    power = float((slabs.counts @ (slabs.centres**2 + slabs.halves**2 / 3)) / slabs.counts.sum())
    for row, ((low, high), noise) in enumerate(zip(ranges.values(), errors, strict=True)):
        numbers = levels(format, low, high)
        lower.hlines(row, low, high, color=_INK, linewidth=1)
        thin = min(1.0, 60 / numbers.size)
        lower.vlines(numbers, row - 0.3, row + 0.3, color=_LEVEL, linewidth=max(0.25, thin))
        lower.vlines([low, high], row - 0.4, row + 0.4, color=_INK, linewidth=1.4)
        clipped = 1 - float(
            _below(slabs, np.array([high]), True)[0] - _below(slabs, np.array([low]), False)[0]
        )
        words = (
            f"{_decibels(power, noise)}, clips {clipped:.2g}" if clipped > 5e-9 else _decibels(power, noise)
        )
        lower.annotate(
            words, (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=_INK
        )
    lower.set_yticks(range(len(ranges)), list(ranges), fontsize=8)
    lower.set_ylim(len(ranges) - 0.4, -0.6)
    lower.set_xlim(start, stop)
    lower.set_xlabel("value")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _view(
    histogram: Histogram, ranges: Sequence[tuple[float, float]], threshold: float
) -> tuple[float, float]:
    """What the axis shows: all values and all ranges, and a little room."""
    low = min(histogram.min, *(low for low, _ in ranges))
    high = max(histogram.max, *(high for _, high in ranges))
    if threshold:  # the same share of either side's decades
        return min(1.15 * low, -0.05 * threshold), max(1.15 * high, 0.05 * threshold)
    room = 0.02 * (high - low) or 1.0
    return low - room, high + room


def _bend(ranges: Mapping[str, tuple[float, float]]) -> float:
    """Where the axis turns logarithmic: the narrowest range's end if others are far wider; else 0, it stays linear."""
    reaches = [max(-low, high) for low, high in ranges.values()]
    narrowest = min((reach for reach in reaches if reach > 0), default=0.0)
    return narrowest if narrowest and max(reaches) > _FAR * narrowest else 0.0


def _edges(start: float, stop: float, threshold: float) -> Float64:
    """Edges of bars that are equally wide on the axis."""
    if not threshold:
        return np.linspace(start, stop, _BARS + 1)
    bent = [
        np.sign(x) * (min(abs(x) / threshold, 1.0) + np.log10(max(abs(x) / threshold, 1.0)))
        for x in (start, stop)
    ]
    line = np.linspace(bent[0], bent[1], _BARS + 1)
    size = np.abs(line)
    edges: Float64 = np.sign(line) * threshold * np.where(size <= 1, size, 10.0 ** (size - 1))
    return edges


def _below(slabs: Slabs, at: Float64, inclusive: bool) -> Float64:
    """The share of values below each number; ``inclusive`` counts those equal to it."""
    low, width = slabs.centres - slabs.halves, 2 * slabs.halves
    share = slabs.counts / slabs.counts.sum()
    inside = np.clip((at[:, None] - low) / np.where(width > 0, width, 1.0), 0.0, 1.0)
    point = (low <= at[:, None]) if inclusive else (low < at[:, None])
    below: Float64 = np.where(width > 0, inside, point) @ share
    return below


def _shares(slabs: Slabs, edges: Float64) -> Float64:
    return np.diff(_below(slabs, edges, inclusive=False))


def _decibels(power: float, noise: float) -> str:
    return "exact" if noise <= 0 else f"{10 * np.log10(power / noise):.1f} dB"
