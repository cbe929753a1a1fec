"""How many scales a tensor has: one, one per channel, or one per group of neighbours along an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf, prod
from typing import Literal

import torch
from torch import Tensor

from halfstep.errors import FormatError

Reduction = Literal["min", "max", "absmax", "sum", "mean", "absmean"]


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor.

    >>> PerTensor().parameter_shape((64, 3, 7, 7))
    ()
    """

    def parameter_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of ``scale`` and ``zero_point`` for a tensor of ``shape``: a scalar."""
        return ()

    def expand(self, parameter: Tensor, shape: Sequence[int]) -> Tensor:
        """Return ``parameter`` (shape ``()``) as it is: a scalar broadcasts against everything."""
        return parameter

    def rows(self, x: Tensor, fill: float) -> Tensor:
        """Return ``x`` as a matrix with one row per parameter; here a single row.

        Args:
            x: any shape.
            fill: what pads a ragged last group; nothing is padded here.
        """
        return x.reshape(1, -1)

    def unrows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo :meth:`rows`: a matrix of one row back to ``shape``."""
        return rows.reshape(tuple(shape))

    def reduce(self, x: Tensor, how: Reduction) -> Tensor:
        """Reduce ``x`` to one number per parameter. See :func:`reduce`."""
        return reduce(self, x, how)

    def __str__(self) -> str:
        return "per tensor"


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of ``axis``, as for the output channels of a weight.

    >>> PerChannel(0).parameter_shape((64, 3, 7, 7))
    (64,)
    """

    axis: int = 0

    def parameter_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of ``scale`` and ``zero_point`` for a tensor of ``shape``: ``(shape[axis],)``.

        Raises:
            FormatError: the tensor has no such axis.
        """
        return (shape[_index(self.axis, shape)],)

    def expand(self, parameter: Tensor, shape: Sequence[int]) -> Tensor:
        """Return ``parameter`` (shape ``(C,)``) with ones for the other axes, to broadcast to ``shape``."""
        axis = _index(self.axis, shape)
        return parameter.reshape((-1,) + (1,) * (len(shape) - 1 - axis))  # (C, 1, ..., 1)

    def rows(self, x: Tensor, fill: float) -> Tensor:
        """Return ``x`` as a matrix with one row per channel, ``(C, numel / C)``; ``fill`` is not used."""
        axis = _index(self.axis, x.shape)
        return x.movedim(axis, 0).reshape(x.shape[axis], prod(x.shape) // max(x.shape[axis], 1))

    def unrows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo :meth:`rows`: a matrix ``(C, numel / C)`` back to ``shape``."""
        axis = _index(self.axis, shape)
        others = tuple(shape[:axis]) + tuple(shape[axis + 1 :])
        return rows.reshape((shape[axis], *others)).movedim(0, axis)

    def reduce(self, x: Tensor, how: Reduction) -> Tensor:
        """Reduce ``x`` to one number per channel, ``(C,)``. See :func:`reduce`."""
        return reduce(self, x, how)

    def __str__(self) -> str:
        return f"per channel of axis {self.axis}"


@dataclass(frozen=True)
class PerGroup:
    """One scale per ``size`` neighbours along ``axis``; the last group may be shorter.

    ONNX calls it blocked quantization (QuantizeLinear, ``block_size``).

    >>> PerGroup(axis=1, size=32).parameter_shape((64, 100))
    (64, 4)
    """

    axis: int
    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise FormatError(f"group size: got {self.size}, needed 1 or more")

    def parameter_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of ``scale`` and ``zero_point``: ``shape`` with ``ceil(shape[axis] / size)`` at ``axis``.

        Raises:
            FormatError: the tensor has no such axis.
        """
        axis = _index(self.axis, shape)
        return (*shape[:axis], ceil(shape[axis] / self.size), *shape[axis + 1 :])

    def expand(self, parameter: Tensor, shape: Sequence[int]) -> Tensor:
        """Return ``parameter`` repeated ``size`` times along ``axis`` and cut to ``shape``."""
        axis = _index(self.axis, shape)
        repeated = parameter.unsqueeze(axis + 1)  # (..., groups, 1, ...)
        repeated = repeated.expand(*(-1,) * (axis + 1), self.size, *(-1,) * (len(shape) - 1 - axis))
        return repeated.flatten(axis, axis + 1).narrow(axis, 0, shape[axis])

    def rows(self, x: Tensor, fill: float) -> Tensor:
        """Return ``x`` as a matrix with one row per group, ``(groups, size)``.

        Rows come in the order of the flattened parameter. A ragged last group is padded with ``fill``.
        """
        axis = _index(self.axis, x.shape)
        groups = self.parameter_shape(x.shape)[axis]
        x = x.movedim(axis, -1)
        missing = groups * self.size - x.shape[-1]
        if missing:
            x = torch.nn.functional.pad(x, (0, missing), value=fill)
        x = x.reshape(*x.shape[:-1], groups, self.size)
        return x.movedim(-2, axis).reshape(-1, self.size)

    def unrows(self, rows: Tensor, shape: Sequence[int]) -> Tensor:
        """Undo :meth:`rows`: a matrix ``(groups, size)`` back to ``shape``, without the padding."""
        axis = _index(self.axis, shape)
        grouped = rows.reshape((*self.parameter_shape(shape), self.size))
        x = grouped.movedim(axis, -2).flatten(-2)  # (..., groups * size)
        return x[..., : shape[axis]].movedim(-1, axis)

    def reduce(self, x: Tensor, how: Reduction) -> Tensor:
        """Reduce ``x`` to one number per group. See :func:`reduce`."""
        return reduce(self, x, how)

    def __str__(self) -> str:
        return f"per group of {self.size} along axis {self.axis}"


Granularity = PerTensor | PerChannel | PerGroup

#: What each reduction does to the rows, and the padding that leaves its result alone.
_REDUCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "min": (lambda rows: rows.amin(1), inf),
    "max": (lambda rows: rows.amax(1), -inf),
    "absmax": (lambda rows: rows.abs().amax(1), 0.0),
    "sum": (lambda rows: rows.sum(1), 0.0),
    "mean": (lambda rows: rows.sum(1), 0.0),
    "absmean": (lambda rows: rows.abs().sum(1), 0.0),
}


def reduce(granularity: Granularity, x: Tensor, how: Reduction) -> Tensor:
    """Reduce a tensor to one number per parameter.

    NaN propagates. An empty tensor has no minimum and no maximum.

    Args:
        granularity: how the elements share parameters.
        x: any shape that has the granularity's axis.
        how: ``min``, ``max``, ``absmax``, ``sum``, ``mean`` or ``absmean`` (the mean of \\|x\\|).

    Returns:
        A tensor of ``granularity.parameter_shape(x.shape)`` in ``x``'s dtype.

    Raises:
        FormatError: an unknown ``how``, no such axis, or an extreme of an empty tensor.

    >>> reduce(PerGroup(axis=0, size=2), torch.tensor([1.0, -4.0, 3.0]), "absmax")
    tensor([4., 3.])
    """
    if how not in _REDUCTIONS:
        raise FormatError(f"reduction: got {how!r}, needed one of {', '.join(_REDUCTIONS)}")
    shape = granularity.parameter_shape(x.shape)
    if 0 in shape:
        return x.new_zeros(shape)
    if x.numel() == 0 and how != "sum":
        raise FormatError(f"{how} of an empty tensor of shape {tuple(x.shape)}: needed at least one element")
    function, fill = _REDUCTIONS[how]
    reduced = function(granularity.rows(x, fill)).reshape(shape)
    return reduced / counts(granularity, x).to(x.dtype) if how.endswith("mean") else reduced


def counts(granularity: Granularity, x: Tensor) -> Tensor:
    """Return how many elements of ``x`` share each parameter, as int64 of the parameter's shape.

    >>> counts(PerGroup(axis=0, size=2), torch.zeros(5))
    tensor([2, 2, 1])
    """
    shape = granularity.parameter_shape(x.shape)
    if not isinstance(granularity, PerGroup):
        return torch.full(shape, x.numel() // max(prod(shape), 1), device=x.device)
    axis = _index(granularity.axis, x.shape)
    lengths = torch.full((shape[axis],), granularity.size, device=x.device)
    lengths[-1:] -= shape[axis] * granularity.size - x.shape[axis]
    return lengths.reshape((-1,) + (1,) * (len(shape) - 1 - axis)).expand(shape)


def _index(axis: int, shape: Sequence[int]) -> int:
    """Return ``axis`` counted from the front, or say that the shape has no such axis."""
    if not -len(shape) <= axis < len(shape):
        raise FormatError(
            f"axis: got {axis} for a tensor of shape {tuple(shape)}, which has {len(shape)} axes"
        )
    return axis % len(shape)
