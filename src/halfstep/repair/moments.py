"""What a layer's output error depends on: its weight as rows, and second moments of what it reads.

A quantized layer's weight, as the rows that its outputs are made of.

A conv is a linear layer on patches, a grouped one several side by side. Where the float layer makes y of its input, and
the quantized one multiplies its input x' by v, the output's mean squared error is
``E (v x' - y)^2 = v H v - 2 C v + P`` with ``H = E x' x'^T``, ``C = E y x'^T``, ``P = E y^2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, fx

from halfstep.fake_quantize import FakeQuantize
from halfstep.formats import Codebook
from halfstep.graph.operators import Operator
from halfstep.graph.placement import Layer, Site
from halfstep.model import QuantizedModel


@dataclass(frozen=True)
class LayerWeight:
    """The float weight of a layer with the site that quantizes it.

    Attributes:
        op: the layer's operator.
        site: the weight's quantizer.
        tensor: the float weight.
    """

    op: Operator
    site: FakeQuantize
    tensor: Tensor

    @classmethod
    def of(cls, model: QuantizedModel, layer: Layer) -> LayerWeight:
        """The weight of a layer that is not :func:`why_not_rounded`."""
        assert layer.operator.weight is not None
        name = str(layer.operator.weight.target)
        return cls(layer.operator, model.sites[name], model.weight(name).detach())

    def rows(self) -> Tensor:
        """The float weight, (groups, out, inputs)."""
        return as_rows(self.op, self.tensor)

    def rounded_rows(self) -> Tensor:
        """The quantized weight, (groups, out, inputs)."""
        return as_rows(self.op, self.site.rounded(self.tensor))

    def tensor_of(self, rows: Tensor) -> Tensor:
        """Rows put back to the weight's own shape."""
        return from_rows(self.op, rows, self.tensor.shape)

    def round_to(self, rows: Tensor) -> None:
        """Let the weight round to these rows, numbers of its format at its range."""
        self.site.round_to(self.tensor, self.tensor_of(rows).to(self.tensor.dtype))


def why_not_rounded(model: QuantizedModel, layer: Layer) -> str:
    """Why passes that work on a layer's rows leave it alone; empty if they do not."""
    weight = layer.operator.weight
    if weight is None or str(weight.target) not in model.sites:
        return "its weight is not quantized"
    if not has_rows(layer.operator):
        return f"a {layer.operator.kind} is no sum over rows of its weight"
    site = next(site for site in model.placement.sites if site.name == str(weight.target))
    if is_shared(site):
        return SHARED
    if isinstance(site.format, Codebook) and site.format.values.dim() > 1:
        return "its codebook has a table for every row"
    return ""


#: Why a layer is left alone whose weight's site :func:`is_shared`.
SHARED = "its weight is shared with another layer"


def is_shared(site: Site) -> bool:
    """Whether several layers read a weight through this site."""
    return sum(len(position.readers) for position in site.positions) > 1


aten = torch.ops.aten

#: Bytes of patches that are made at once.
CHUNK = 2**24

#: Positions that the moments of a layer average over, where there are so many.
POSITIONS = 2**15

_STRINGS = frozenset({aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding})


#: Bytes that a layer's moments and what is made of them may take; layers that need more are left alone.
MEMORY = 2**32


@dataclass(frozen=True)
class Moments:
    """Mean products of a layer's inputs and float outputs (without bias), float64.

    Attributes:
        inputs: H = E x' x'^T, (groups, inputs, inputs).
        cross: C = E y x'^T, (groups, out, inputs).
        outputs: P = E y^2, (groups, out).
        count: positions that were averaged over.
    """

    inputs: Tensor
    cross: Tensor
    outputs: Tensor
    count: int

    def error(self, rows: Tensor) -> Tensor:
        """The mean square of each output's error, (groups, out), at least 0.

        Args:
            rows: what the quantized layer multiplies by, (groups, out, inputs).
        """
        rows = rows.double()
        products = (rows @ self.inputs).sub_(self.cross, alpha=2).mul_(rows)
        return (products.sum(-1) + self.outputs).clamp_min(0.0)


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
    # (n, groups, channels, places, taps)
    view = view[:, :, first % thinned :: thinned].unflatten(1, (groups, -1))
    outer, inner = [1, 0, *range(3, 3 + rank)], [2, *range(3 + rank, 3 + 2 * rank)]
    rows: Tensor = view.permute(*outer, *inner).reshape(groups, -1, prod(kernel) * view.shape[2])
    return rows


def too_large(op: Operator) -> str:
    """Why the moments of a layer are not taken: they would need more than :data:`MEMORY`; empty if they do not."""
    assert op.weight is not None
    shape = op.weight.meta["val"].shape
    inputs = shape[0] if op.kind == "matmul" else prod(shape[1:])
    # In float64 at a time: four matrices of (inputs, inputs) for each group, and eight of the weight's own shape.
    needed = 8 * (4 * _groups(op) * inputs**2 + 8 * shape.numel())
    if needed <= MEMORY:
        return ""
    return (
        f"the second moments of its {inputs} inputs would take {needed / 2**30:.2g} GiB, more than the "
        f"{MEMORY / 2**30:.2g} allowed"
    )


def gather(op: Operator, weight: Tensor, inputs: Sequence[Tensor], float_inputs: Sequence[Tensor]) -> Moments:
    """The moments of a layer over all batches, in chunks of bounded size.

    A conv on large images has more positions than its moments need: then rows of positions are left out evenly, down
    to about :data:`POSITIONS` or eight for each input, whichever is more.

    Args:
        op: the layer, not :func:`too_large`.
        weight: the float layer's, (groups, out, inputs).
        inputs: in the quantized network, a tensor for each batch.
        float_inputs: in the float network.
    """
    groups, out, taps = weight.shape
    positions = sum(x.numel() for x in inputs) // inputs[0].shape[1 if op.kind == "conv" else -1]
    thinned = max(1, positions // max(POSITIONS, 8 * taps))
    square, cross, power = (
        torch.zeros(shape, dtype=torch.float64, device=weight.device)
        for shape in ((groups, taps, taps), (groups, out, taps), (groups, out))
    )
    count = 0
    chunks = [
        pair
        for quantized, plain in zip(inputs, float_inputs, strict=True)
        for pair in zip(quantized.split(_chunk(op, quantized)), plain.split(_chunk(op, plain)), strict=True)
    ]
    for first, (quantized, plain) in enumerate(chunks):
        x, y = patches(op, quantized, thinned, first), patches(op, plain, thinned, first) @ weight.mT
        square += x.mT @ x
        cross += y.mT @ x
        power += y.double().square().sum(1)
        count += x.shape[1]
    return Moments(square.div_(count), cross.div_(count), power.div_(count), count)


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
