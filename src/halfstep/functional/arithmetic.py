"""Which arithmetic serves which kind of format: the one table to extend."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.formats import Codebook, Floating, Format, Integer
from halfstep.functional import codebook, floating, uniform
from halfstep.granularity import Granularity


class Arithmetic(Protocol):
    """What a module of arithmetic provides. Nothing here is differentiated; no argument is modified."""

    def quantize(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Any, granularity: Granularity
    ) -> Tensor:
        """Return codes."""

    def dequantize(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        format: Any,
        granularity: Granularity,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return real numbers."""

    def fake_quantize(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Any, granularity: Granularity
    ) -> Tensor:
        """Return the real numbers of the codes of ``x``."""


_TABLE: dict[type, Arithmetic] = {Integer: uniform, Codebook: codebook, Floating: floating}


def arithmetic(format: Format) -> Arithmetic:
    """Return the arithmetic of a format's kind.

    Raises:
        FormatError: an object that is no format.
    """
    if type(format) not in _TABLE:
        needed = ", ".join(kind.__name__ for kind in _TABLE)
        raise FormatError(f"format: got {format!r}, needed one of {needed}")
    return _TABLE[type(format)]
