"""The search for the ranges of least mean squared error of a weight, many rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep.calibrators.maximum import Max
from halfstep.errors import ArgumentError, FormatError
from halfstep.formats import Codebook, Format
from halfstep.functional import fake_quantize
from halfstep.granularity import Granularity, PerChannel

_ROWS = PerChannel(0)
_AT_ONCE = 1 << 18  # elements searched together: 1 MiB, so that the temporary tensors stay in the cache
_STEP = 1 / 16  # octaves between the candidates of the first search
_STEPS = 160  # ten octaves inwards at most
_CHECK = 4  # candidates after which the search asks whether narrower ones can still win
_FINER = (1 / 64, 1 / 256)  # octaves between the candidates around the best of a symmetric range
_SIDES = (1 / 4, 1 / 16, 1 / 64, 1 / 256)  # the same for either end of an affine one
_WINDOW = (-3, -2, -1, 1, 2, 3)


def best_weight_range(
    weight: Tensor, format: Format, granularity: Granularity, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return low and high of least mean squared error; arguments as :meth:`.MSE.weight_range`."""
    if isinstance(format, Codebook) and format.values.dim() > 1:
        raise FormatError(f"{format}: got one table per parameter, needed a single one to search ranges for")
    weight = weight.detach().float()
    shape = granularity.parameter_shape(weight.shape)
    rows = granularity.rows(weight, 0.0).contiguous()
    importance = _padding(weight, granularity, rows) if importance is None else _checked(importance, weight)
    weights = None if importance is None else granularity.rows(importance.expand(weight.shape), 0.0)
    count = max(1, _AT_ONCE // max(1, rows.shape[1]))
    lows, highs = [torch.empty(0, device=rows.device)], [torch.empty(0, device=rows.device)]
    for first in range(0, rows.shape[0], count):
        some = slice(first, first + count)
        low, high = _Search(rows[some], format, None if weights is None else weights[some]).best()
        lows.append(low)
        highs.append(high)
    return torch.cat(lows).reshape(shape), torch.cat(highs).reshape(shape)


class _Search:
    """Shrinks every row's range in the same steps, and keeps for each the best it has seen.

    An affine range is shrunk as a whole first, then at either end.
    """

    def __init__(self, rows: Tensor, format: Format, weights: Tensor | None) -> None:
        self.rows, self.format, self.weights = rows, format, weights
        self.low, self.high = self.widest = Max().weight_range(rows, format, _ROWS)
        self.error = self._error(self.low, self.high)

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the best low and high of each row."""
        widest_low, widest_high = self.widest
        for k in range(1, _STEPS):
            low, high = (end * 2.0 ** (-_STEP * k) for end in self.widest)
            if k % _CHECK == 0 and bool((self._clipping(low, high) > self.error).all()):
                break
            self._try(low, high)
        for step in _FINER if self.format.symmetric else _SIDES:
            for moves_low, moves_high in [(1, 1)] if self.format.symmetric else [(1, 0), (0, 1)]:
                low, high = self.low, self.high
                for i in _WINDOW:
                    self._try(
                        (low * 2.0 ** (step * i * moves_low)).maximum(widest_low),
                        (high * 2.0 ** (step * i * moves_high)).minimum(widest_high),
                    )
        return self.low, self.high

    def _try(self, low: Tensor, high: Tensor) -> None:
        error = self._error(low, high)
        better = error < self.error
        self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)
        self.error = torch.where(better, error, self.error)

    def _error(self, low: Tensor, high: Tensor) -> Tensor:
        """Return each row's sum of squared errors."""
        scale, zero_point = self.format.parameters(low, high)
        return self._sum(fake_quantize(self.rows, scale, zero_point, self.format, _ROWS).sub_(self.rows))

    def _clipping(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the part of it that clipping alone causes; it only grows as the range shrinks."""
        return self._sum(self.rows.clamp(low[:, None], high[:, None]).sub_(self.rows))

    def _sum(self, difference: Tensor) -> Tensor:
        if self.weights is None:
            return difference.square_().sum(dim=1)
        return difference.square_().mul_(self.weights).sum(dim=1)


def _padding(weight: Tensor, granularity: Granularity, rows: Tensor) -> Tensor | None:
    """Return ones if rows are padded, which a format without zero must not be blamed for; None if there are none."""
    return torch.ones_like(weight) if rows.numel() > weight.numel() else None


def _checked(importance: Tensor, weight: Tensor) -> Tensor:
    importance = importance.detach().to(weight.device, torch.float32)
    try:
        importance.expand(weight.shape)
    except RuntimeError:
        raise ArgumentError(
            f"importance: got shape {tuple(importance.shape)}, needed one that broadcasts to {tuple(weight.shape)}"
        ) from None
    if not bool(((importance >= 0) & importance.isfinite()).all()):
        raise ArgumentError("importance: got negative, NaN or infinite numbers, needed 0 or more")
    return importance
