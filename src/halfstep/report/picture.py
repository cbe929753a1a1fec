"""An image as number formats see it: quantized, dequantized, drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from halfstep import functional
from halfstep.formats import E4M3, Codebook, Format, Integer
from halfstep.ladder.site_records import unpack_array
from halfstep.report.png import png_address

#: What is shown beside the image itself. Ranges are the image's own smallest and largest value.
FORMATS: tuple[tuple[str, Format], ...] = (
    ("8 bits", Integer(8, signed=False, symmetric=False)),
    ("4 bits", Integer(4, signed=False, symmetric=False)),
    ("3 bits", Integer(3, signed=False, symmetric=False)),
    ("2 bits", Integer(2, signed=False, symmetric=False)),
    ("float, 8 bits (E4M3)", E4M3),
    ("mu-law, 4 bits", Codebook.mu_law(4)),
    ("NF4, 4 bits", Codebook.nf4()),
)


def as_formats_see_it(picture: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(name, words, PNG address) of the image as it is and in every format."""
    image = torch.from_numpy(unpack_array(picture["pixels"], picture["shape"]).copy())
    low, high = image.min(), image.max()
    shown = [("float32", "as it is", _address(image, low, high))]
    for name, format in FORMATS:
        scale, zero_point = format.parameters(low, high)
        seen = functional.fake_quantize(image, scale, zero_point, format)
        noise, signal = float(((image - seen) ** 2).sum()), float((image**2).sum())
        words = f"{10 * np.log10(signal / noise):.1f} dB" if noise > 0 and signal > 0 else "exact"
        shown.append((name, f"{len(torch.unique(seen))} values, {words}", _address(seen, low, high)))
    return shown


def _address(image: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> str:
    span = max(float(high - low), 1e-30)
    pixels = ((image - low) / span * 255).round().clamp(0, 255).to(torch.uint8)
    array = pixels.permute(1, 2, 0).numpy()
    return png_address(array[..., 0] if array.shape[2] == 1 else array)
