"""Small images as PNG in a data address: what a page without a network can show."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np


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
