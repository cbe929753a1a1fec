"""Second moments of what a layer reads: all that its output error depends on.

A conv is a linear layer on patches, a grouped one several side by side. Where the float layer multiplies its input x by
w, and the quantized one its input x' by v, the output's mean squared error is
``E (v x' - w x)^2 = v H v - 2 v G w + w F w`` with ``H = E x' x'^T``, ``G = E x' x^T``, ``F = E x x^T``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from halfstep.graph.operators import Operator

aten = torch.ops.aten

#: Bytes of patches that are made at once.
CHUNK = 2**24

#: Positions that the moments of a layer average over, where there are so many.
POSITIONS = 2**15

_STRINGS = frozenset({aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding})


@dataclass(frozen=True)
class Moments:
    """Mean products of a layer's inputs, float64.

    Attributes:
        quantized: H = E x' x'^T, (groups, inputs, inputs).
        mixed: G = E x' x^T, the same shape.
        plain: F = E x x^T, the same shape.
        count: positions that were averaged over.
    """

    quantized: Tensor
    mixed: Tensor
    plain: Tensor
    count: int

    def error(self, rows: Tensor, weight: Tensor) -> Tensor:
        """The mean square of each output's error, (groups, out), at least 0.

        Args:
            rows: what the quantized layer multiplies by, (groups, out, inputs).
            weight: the float layer's weight, the same shape.
        """
        rows, weight = rows.double(), weight.double()
        terms = (
            (rows @ self.quantized * rows).sum(-1)
            - 2 * (rows @ self.mixed * weight).sum(-1)
            + (weight @ self.plain * weight).sum(-1)
        )
        return terms.clamp_min(0.0)


def has_rows(op: Operator) -> bool:
    """Whether :func:`as_rows` knows the layer: convs, linears, and products with a matrix."""
    assert op.weight is not None
    return op.kind in ("conv", "linear") or (op.kind == "matmul" and op.weight.meta["val"].dim() == 2)


def as_rows(op: Operator, weight: Tensor) -> Tensor:
    """A weight (or anything of its shape) as (groups, out, inputs); a view where it can be."""
    if op.kind == "matmul":
        return weight.t().unsqueeze(0)
    return weight.reshape(_groups(op), -1, prod(weight.shape[1:]))


def from_rows(op: Operator, rows: Tensor, shape: Sequence[int]) -> Tensor:
    """Undo :func:`as_rows`."""
    if op.kind == "matmul":
        return rows[0].t()
    return rows.reshape(tuple(shape))


def patches(op: Operator, x: Tensor, thinned: int = 1, first: int = 0) -> Tensor:
    """What each row of the weight is multiplied with, (groups, positions, inputs).

    A 2x2 conv on one channel of 3x3 has four positions of four inputs.

    Args:
        op: the layer.
        x: its input.
        thinned: take one of so many rows of positions.
        first: the first row taken.
    """
    if op.kind != "conv":
        return x.reshape(1, -1, x.shape[-1])[:, first % thinned :: thinned]
    assert op.weight is not None
    kernel = tuple(op.weight.meta["val"].shape[2:])
    stride, padding, dilation = _geometry(op.node, kernel)
    x = torch.nn.functional.pad(x, [side for pair in reversed(padding) for side in pair]).contiguous()
    places = [
        (size - apart * (taps - 1) - 1) // step + 1
        for size, taps, step, apart in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    steps = x.stride()[2:]
    view = x.as_strided(
        (*x.shape[:2], *places, *kernel),
        (
            *x.stride()[:2],
            *(a * b for a, b in zip(steps, stride, strict=True)),
            *(a * b for a, b in zip(steps, dilation, strict=True)),
        ),
    )
    rank, groups = len(kernel), _groups(op)
    thinned = min(thinned, places[0])
    view = view[:, :, first % thinned :: thinned].unflatten(
        1, (groups, -1)
    )  # (n, groups, channels, places, taps)
    outer, inner = [1, 0, *range(3, 3 + rank)], [2, *range(3 + rank, 3 + 2 * rank)]
    rows: Tensor = view.permute(*outer, *inner).reshape(groups, -1, prod(kernel) * view.shape[2])
    return rows


def gather(op: Operator, inputs: Sequence[Tensor], float_inputs: Sequence[Tensor]) -> Moments:
    """The moments of a layer's inputs over all batches, in chunks of bounded size.

    A conv on large images has more positions than its moments need: then rows of positions are left out evenly, down
    to about :data:`POSITIONS` or eight for each input, whichever is more.

    Args:
        op: the layer.
        inputs: in the quantized network, a tensor for each batch.
        float_inputs: in the float network.
    """
    assert op.weight is not None
    taps = prod(op.weight.meta["val"].shape[1:])
    positions = sum(x.numel() for x in inputs) // inputs[0].shape[1 if op.kind == "conv" else -1]
    thinned = max(1, positions // max(POSITIONS, 8 * taps))
    sums: list[Tensor] | None = None
    count = 0
    chunks = [
        pair
        for quantized, plain in zip(inputs, float_inputs, strict=True)
        for pair in zip(quantized.split(_chunk(op, quantized)), plain.split(_chunk(op, plain)), strict=True)
    ]
    for first, (quantized, plain) in enumerate(chunks):
        a, b = patches(op, quantized, thinned, first), patches(op, plain, thinned, first)
        products = [p.double() for p in (a.mT @ a, a.mT @ b, b.mT @ b)]
        sums = products if sums is None else [s + p for s, p in zip(sums, products, strict=True)]
        count += a.shape[1]
    assert sums is not None
    quantized_square, mixed, plain_square = (total / count for total in sums)
    return Moments(quantized_square, mixed, plain_square, count)


def _chunk(op: Operator, x: Tensor) -> int:
    """Examples whose patches take about :data:`CHUNK` bytes."""
    assert op.weight is not None
    taps: int = prod(op.weight.meta["val"].shape[2:]) if op.kind == "conv" else 1
    return max(1, CHUNK // max(1, x[:1].nbytes * taps))


def _groups(op: Operator) -> int:
    """Groups of a conv: (input, weight, bias, stride, padding, dilation, groups)."""
    if op.kind != "conv":
        return 1
    groups = op.node.args[6] if len(op.node.args) > 6 else 1
    assert isinstance(groups, int)
    return groups


def _geometry(node: fx.Node, kernel: tuple[int, ...]) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """Stride, padding on either side, and dilation of a conv, for each axis."""
    rank = len(kernel)
    arguments = [*node.args, *[None] * 7]
    stride, padding, dilation = (arguments[i] for i in (3, 4, 5))
    strides, dilations = _each(stride, 1, rank), _each(dilation, 1, rank)
    if node.target in _STRINGS:
        reach = [
            apart * (size - 1) if padding == "same" else 0
            for size, apart in zip(kernel, dilations, strict=True)
        ]
        return strides, [(total // 2, total - total // 2) for total in reach], dilations
    return strides, [(side, side) for side in _each(padding, 0, rank)], dilations


def _each(value: object, default: int, rank: int) -> list[int]:
    if value is None:
        return [default] * rank
    numbers = [value] if isinstance(value, int) else list(value)  # type: ignore[call-overload]
    return numbers * rank if len(numbers) == 1 else numbers
