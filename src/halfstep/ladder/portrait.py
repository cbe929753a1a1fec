"""What pictures need of a model: each site's histogram, ranges and levels, and an input as formats see it.

Small enough for a line of the journal, so that a report can be made from the journal alone.
"""

from __future__ import annotations

import base64
import math
import zlib
from typing import Any

import numpy as np
import torch

from halfstep import functional
from halfstep.calibrators import MSE, Calibrator, Entropy, Max, Percentile
from halfstep.errors import HalfstepError
from halfstep.fake_quantize import FakeQuantize
from halfstep.graph.inputs import tensors_of
from halfstep.model import QuantizedModel

#: Bars of a histogram, and how many of a model's sites have one.
BARS, SITES = 120, 1500
#: Formats with no more levels than this are drawn level by level.
LEVELS = 64
#: Whose ranges are drawn.
CALIBRATORS: tuple[Calibrator, ...] = (Max(), Percentile(99.99), Entropy(), MSE())
#: An input is drawn up to this many pixels a side.
PIXELS = 256


def portray_sites(model: QuantizedModel) -> list[dict[str, Any]]:
    """Every calibrated site as plain data.

    Each has ``name``, ``layers`` that read it, ``weight``, ``format``, ``bits``, ``granularity``, ``low``, ``high``,
    ``step`` (None where steps differ), ``levels`` (None if many), ``sqnr`` in dB, ``count``, ``min``, ``max``,
    ``clipped`` (share outside the range), ``bars`` (``low``, ``high``, ``counts``) and ``ranges`` by calibrator.
    """
    readers: dict[str, list[str]] = {}
    for layer in model.layers:
        for site in layer.sites:
            readers.setdefault(site, []).append(layer.name)
    sites = []
    for place in model.placement.sites[:SITES]:
        module = model.sites[place.name]
        if not module.calibrated:
            continue
        about = {"name": place.name, "layers": readers.get(place.name, []), "weight": place.is_weight}
        if place.is_weight:
            weight = model.weight(place.name).detach()
            with torch.no_grad():
                rounded = module.rounded(weight)
            sqnr = _sqnr(weight, rounded, torch.ones(()))
            values = weight.cpu().double().flatten().numpy()
            spread, ranges = _spread(values, np.ones(len(values), np.int64), module), {}
        elif module.histogram.count:
            values, counts = module.histogram.bins()
            x = torch.from_numpy(values).float()
            single = module.scale.numel() == 1
            sqnr = _sqnr(x, _rounded(module, x), torch.from_numpy(counts)) if single else None
            spread, ranges = _spread(values, counts, module), _ranges(module)
        else:
            continue
        sites.append({**about, **_format(module), **spread, "sqnr": sqnr, "ranges": ranges})
    return sites


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
    low, high = (float(end) for end in (module.range()[0].min(), module.range()[1].max()))
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


def _spread(values: np.ndarray, counts: np.ndarray, module: FakeQuantize) -> dict[str, Any]:
    """Bars over the range and the bulk of the values, whichever reaches further, and what rounding costs."""
    low, high = (float(end) for end in (module.range()[0].min(), module.range()[1].max()))
    order = np.argsort(values, kind="stable")
    share = np.cumsum(counts[order]) / counts.sum()
    bulk = values[order][np.searchsorted(share, (0.0005, 0.9995))]
    start, stop = min(low, float(bulk[0])), max(high, float(bulk[1]))
    if start == stop:
        start, stop = start - 0.5, stop + 0.5
    margin = 0.04 * (stop - start)
    bars, _ = np.histogram(values, BARS, (start - margin, stop + margin), weights=counts)
    return {
        "count": int(counts.sum()),
        "min": float(values.min()),
        "max": float(values.max()),
        "clipped": float(counts[(values < low) | (values > high)].sum() / counts.sum()),
        "bars": {"low": start - margin, "high": stop + margin, "counts": [int(bar) for bar in bars]},
    }


def _sqnr(x: torch.Tensor, rounded: torch.Tensor, counts: torch.Tensor) -> float | None:
    """Signal to rounding noise in dB, rounded to hundredths; None where there is no noise or no signal."""
    noise = float((counts * (x - rounded).double() ** 2).sum())
    signal = float((counts * x.double() ** 2).sum())
    return round(10 * math.log10(signal / noise), 2) if noise > 0 and signal > 0 else None


def _ranges(module: FakeQuantize) -> dict[str, list[float]]:
    found = {}
    for calibrator in CALIBRATORS:
        try:
            low, high = calibrator.range(module.histogram, module.format)
        except HalfstepError:
            continue  # too few values for this one
        found[str(calibrator)] = [float(low), float(high)]
    return found
