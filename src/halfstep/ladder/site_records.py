"""What pictures need of a model: each site's histogram, ranges and levels, and an input as formats see it.

Small enough for a line of the journal, so that a report can be made from the journal alone.
"""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from halfstep import functional
from halfstep.calibrators import MSE, Calibrator, Entropy, Max, Percentile, range_of
from halfstep.errors import HalfstepError
from halfstep.fake_quantize import FakeQuantize
from halfstep.graph.inputs import tensors_of
from halfstep.graph.placement import Site
from halfstep.model import QuantizedModel
from halfstep.statistics import Histogram

#: Bars of a histogram, and how many of a model's sites have one.
BARS, SITES = 120, 1500


#: Elements of a weight that are looked at together.
BLOCK = 2**20


#: Formats with no more levels than this are drawn level by level.
LEVELS = 64


#: Whose ranges are drawn.
CALIBRATORS: tuple[Calibrator, ...] = (Max(), Percentile(99.99), Entropy(), MSE())


#: An input is drawn up to this many pixels a side.
PIXELS = 256


def record_sites(model: QuantizedModel) -> dict[str, Any]:
    """Calibrated sites as plain data: ``sites``, and ``of``, how many there are.

    Each has ``name``, ``layers`` that read it, ``weight``, ``format``, ``bits``, ``granularity``, ``low``, ``high``,
    ``step`` (None where steps differ), ``levels`` (None if many), ``sqnr`` in dB, ``count``, ``min``, ``max``,
    ``clipped`` (share outside the range), ``bars`` (``low``, ``high``, ``counts``) and ``ranges`` by calibrator.

    Of more than :data:`SITES` as many are taken, evenly spaced among the activations and weights alike. Of a weight no
    copy is made but the rounded one that a forward pass makes too; one that memory does not suffice for is left out.
    """
    readers: dict[str, list[str]] = {}
    for layer in model.layers:
        for site in layer.sites:
            readers.setdefault(site, []).append(layer.name)
    known = [place for place in model.placement.sites if _is_known(model, place)]
    count = min(SITES, len(known))
    sites = []
    for place in (known[index * len(known) // count] for index in range(count)):
        about = {"name": place.name, "layers": readers.get(place.name, []), "weight": place.is_weight}
        module = model.sites[place.name]
        try:
            found = (
                _weight(module, model.weight(place.name).detach()) if place.is_weight else _activation(module)
            )
        except (MemoryError, RuntimeError) as error:
            if not _is_shortage(error):
                raise
            continue
        sites.append({**about, **_format(module), **found})
    return {"sites": sites, "of": len(known)}


def _is_known(model: QuantizedModel, place: Site) -> bool:
    """Whether a site has a range, and values that it was seen with."""
    module = model.sites[place.name]
    return module.calibrated and (place.is_weight or bool(module.histogram.count))


def _is_shortage(error: Exception) -> bool:
    """Whether an error is one of memory; torch raises a plain RuntimeError on the CPU."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def portray_input(model: QuantizedModel) -> dict[str, Any] | None:
    """The first kept input, if it is an image of one or three channels; None otherwise.

    Returns:
        ``shape`` (channels, height, width) and float32 ``pixels`` packed by :func:`pack_array`.
    """
    if not model.sample:
        return None
    tensor = tensors_of(model.sample[0])[0]
    if tensor.dim() != 4 or tensor.shape[1] not in (1, 3) or not tensor.is_floating_point():
        return None
    image = tensor[0].detach().cpu().float()
    stride = -(-max(image.shape[1:]) // PIXELS)
    image = image[:, ::stride, ::stride].contiguous()
    return {"shape": list(image.shape), "pixels": pack_array(image.numpy())}


def pack_array(array: np.ndarray) -> str:
    """Bytes of an array, compressed, as text."""
    return base64.b64encode(zlib.compress(np.ascontiguousarray(array).tobytes())).decode()


def unpack_array(text: str, shape: list[int], dtype: str = "float32") -> np.ndarray:
    """Undo :func:`pack_array`."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).reshape(shape)


def _format(module: FakeQuantize) -> dict[str, Any]:
    low, high = _ends(module)
    single = module.scale.numel() == 1
    levels = None
    if single:
        unique = torch.unique(_rounded(module, torch.linspace(low, high, 64 * LEVELS + 1)))
        levels = [round(value, 9) for value in unique.tolist()] if len(unique) <= LEVELS else None
    return {
        "format": str(module.format),
        "bits": module.format.bits,
        "granularity": str(module.granularity),
        "low": low,
        "high": high,
        "step": float(module.scale) if single else None,
        "levels": levels,
    }


def _rounded(module: FakeQuantize, x: torch.Tensor) -> torch.Tensor:
    """``x`` as one scale of the site would round it."""
    scale, zero_point = module.scale.detach().cpu().reshape(()), module.zero_point.detach().cpu().reshape(())
    return functional.fake_quantize(x, scale, zero_point, module.format)


def _activation(module: FakeQuantize) -> dict[str, Any]:
    """What was observed at a site, and what other calibrators answer to it."""
    values, counts = module.histogram.bins()
    sqnr = None
    if module.scale.numel() == 1:
        x = torch.from_numpy(values).float()
        sqnr = _decibels(*_power(x, _rounded(module, x), torch.from_numpy(counts)))
    low, high = _ends(module)
    clipped = int(counts[(values < low) | (values > high)].sum())
    return {**_spread(module.histogram, module, clipped), "sqnr": sqnr, "ranges": _ranges(module)}


def _weight(module: FakeQuantize, weight: torch.Tensor) -> dict[str, Any]:
    """What a weight consists of, block by block."""
    low, high = _ends(module)
    with torch.no_grad():
        rounded = module.rounded(weight)
    histogram, clipped, signal, noise = Histogram(), 0, 0.0, 0.0
    for x, y in zip(_blocks(weight), _blocks(rounded), strict=True):
        histogram.update(x.float())
        clipped += int(((x < low) | (x > high)).sum())
        more = _power(x, y, torch.ones((), device=x.device))
        signal, noise = signal + more[0], noise + more[1]
    return {**_spread(histogram, module, clipped), "sqnr": _decibels(signal, noise), "ranges": {}}


def _blocks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(tensor.reshape(-1).split(BLOCK))


def _ends(module: FakeQuantize) -> tuple[float, float]:
    """The range of a site; of several, from the lowest to the highest."""
    low, high = module.range()
    return float(low.min()), float(high.max())


def _spread(histogram: Histogram, module: FakeQuantize, clipped: int) -> dict[str, Any]:
    """Bars over the range and the bulk of the values, whichever reaches further."""
    values, counts = histogram.bins()
    low, high = _ends(module)
    share = np.cumsum(counts) / counts.sum()
    bulk = values[np.searchsorted(share, (0.0005, 0.9995))]
    start, stop = min(low, float(bulk[0])), max(high, float(bulk[1]))
    if start == stop:
        start, stop = start - 0.5, stop + 0.5
    margin = 0.04 * (stop - start)
    bars, _ = np.histogram(values, BARS, (start - margin, stop + margin), weights=counts)
    return {
        "count": histogram.count,
        "min": histogram.min,
        "max": histogram.max,
        "clipped": clipped / histogram.count,
        "bars": {"low": start - margin, "high": stop + margin, "counts": [int(bar) for bar in bars]},
    }


def _power(x: torch.Tensor, rounded: torch.Tensor, counts: torch.Tensor) -> tuple[float, float]:
    """Sums of squares of the values and of their rounding errors, each value ``counts`` times."""
    x = x.double()
    return float((counts * x**2).sum()), float((counts * (x - rounded.double()) ** 2).sum())


def _decibels(signal: float, noise: float) -> float | None:
    """Signal to noise in dB, rounded to hundredths; None where there is no noise or no signal."""
    return round(10 * math.log10(signal / noise), 2) if noise > 0 and signal > 0 else None


def _ranges(module: FakeQuantize) -> dict[str, list[float]]:
    found = {}
    for calibrator in CALIBRATORS:
        try:
            low, high = range_of(calibrator, module.histogram, module.format)
        except HalfstepError:
            continue  # too few values for this one
        found[str(calibrator)] = [float(low), float(high)]
    return found
