"""Charts and images as markup: inline SVG and PNG, no library, no network.

Small images as PNG in a data address: what a page without a network can show.

An image as number formats see it: quantized, dequantized, drawn.

Charts as inline SVG: no library, no network; colours come from the page's style, so they follow light and dark.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from halfstep import functional
from halfstep.formats import E4M3, Codebook, Format, Integer
from halfstep.ladder.site_records import unpack_array
from halfstep.report.html import escape


def png_address(pixels: np.ndarray) -> str:
    """An image as ``data:image/png;base64,...``.

    Args:
        pixels: uint8, (height, width) for grey or (height, width, 3) for colours.

    Source: PNG specification, third edition, sections 5 and 11.2.
    """
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    rows = pixels.reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)  # filter 0: as it is
    content = (
        b"\x89PNG\r\n\x1a\n"
        + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))
        + _chunk(b"IDAT", zlib.compress(raw, 9))
        + _chunk(b"IEND", b"")
    )
    return "data:image/png;base64," + base64.b64encode(content).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


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


Point = tuple[float, float]

LEFT, RIGHT, TOP, BOTTOM = 72, 16, 14, 44


@dataclass
class Chart:
    """Axes, and what is drawn between them.

    Args:
        title: what a screen reader says.
        x_label, y_label: of the axes.
        x, y: the ends of the axes.
        width, height: of the drawing, in its own units; the page scales it.
    """

    title: str
    x_label: str
    y_label: str
    x: Point
    y: Point
    width: int = 640
    height: int = 320
    parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.x, self.y = widened(self.x), widened(self.y)

    def place(self, point: Point) -> Point:
        """Where a point of the data lies in the drawing."""
        (x0, x1), (y0, y1) = self.x, self.y
        across = (point[0] - x0) / (x1 - x0)
        up = (point[1] - y0) / (y1 - y0)
        return LEFT + across * (self.width - LEFT - RIGHT), self.height - BOTTOM - up * (
            self.height - TOP - BOTTOM
        )

    def line(self, points: Sequence[Point], style: str) -> None:
        """A line through ``points``."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.place, points))
        self.parts.append(f'<polyline class="{style}" points="{path}"/>')

    def dot(self, point: Point, style: str, hint: str, label: str = "", below: bool = False) -> None:
        """A dot that says ``hint`` when pointed at, with a label above it, or below."""
        x, y = self.place(point)
        self.parts.append(
            f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="5"><title>{escape(hint)}</title></circle>'
        )
        if label:
            right = x > self.width * 0.72
            self.parts.append(
                f'<text class="label" x="{x - 9 if right else x + 9:.1f}" y="{y + (20 if below else -10):.1f}" '
                f'text-anchor="{"end" if right else "start"}">{escape(label)}</text>'
            )

    def upright(self, x: float, low: float, high: float, style: str) -> None:
        """A vertical bar from ``low`` to ``high``, for an interval."""
        (a, b), (_, c) = self.place((x, low)), self.place((x, high))
        self.parts.append(f'<line class="{style}" x1="{a:.1f}" x2="{a:.1f}" y1="{b:.1f}" y2="{c:.1f}"/>')

    def level(self, y: float, label: str, style: str) -> None:
        """A horizontal line across, named below it: what meets a target lies above, where higher is better."""
        _, height = self.place((self.x[0], y))
        self.parts.append(
            f'<line class="{style}" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{height:.1f}" y2="{height:.1f}"/>'
            f'<text class="label" x="{self.width - RIGHT}" y="{height + 14:.1f}" text-anchor="end">'
            f"{escape(label)}</text>"
        )

    def svg(self, x_ticks: Sequence[tuple[float, str]] | None = None) -> str:
        """The chart; ticks of the x axis may be given with their words."""
        axes = []
        for x, words in x_ticks if x_ticks is not None else labelled(ticks(self.x)):
            across, _ = self.place((x, self.y[0]))
            axes.append(
                f'<text class="tick" x="{across:.1f}" y="{self.height - BOTTOM + 17}" text-anchor="middle">'
                f"{escape(words)}</text>"
            )
        for y, words in labelled(ticks(self.y)):
            _, up = self.place((self.x[0], y))
            axes.append(
                f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{up:.1f}" y2="{up:.1f}"/>'
                f'<text class="tick" x="{LEFT - 7}" y="{up + 4:.1f}" text-anchor="end">{escape(words)}</text>'
            )
        middle = (LEFT + self.width - RIGHT) / 2
        axes.append(
            f'<text class="axis" x="{middle}" y="{self.height - 8}" text-anchor="middle">{escape(self.x_label)}</text>'
            f'<text class="axis" transform="translate(8 {self.height / 2 - 10}) rotate(-90)" text-anchor="middle">'
            f"{escape(self.y_label)}</text>"
        )
        return (
            f'<svg class="chart" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{escape(self.title)}">{"".join(axes)}{"".join(self.parts)}</svg>'
        )


def widened(ends: Point) -> Point:
    """The ends with a little room, and never equal."""
    low, high = ends
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def ticks(ends: Point) -> list[float]:
    """About five round numbers between the ends.

    >>> ticks((0.0, 10.0))
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """
    low, high = ends
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.9999)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def labelled(places: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with their numbers as words."""
    return [(place, f"{place:.10g}") for place in places]
