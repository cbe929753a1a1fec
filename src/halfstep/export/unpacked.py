"""Weights of any format as packed codes that become floats at load: small in the file, and as fast as float."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from halfstep import functional
from halfstep.export.containers import UNSIGNED, container
from halfstep.export.editing import add, existing, initializer
from halfstep.export.product import Product
from halfstep.export.stored import look_up, stored_codes
from halfstep.fake_quantize import FakeQuantize
from halfstep.formats import Codebook, Format, Integer
from halfstep.granularity import Granularity, PerChannel, PerGroup

_FLOAT = ir.DataType.FLOAT


def unpack_at_load(graph: ir.Graph, product: Product) -> bool:
    """Let the product read floats computed from codes: ``scale * (code - zero_point)``, or a look-up times scale."""
    site, permutation, node = product.site, product.permutation, product.node
    suffix = "" if permutation == tuple(sorted(permutation)) else "_transposed"
    name = f"{site.name}{suffix}"
    floats = existing(graph, f"{name}/floats")
    if floats is None:
        codes = product.codes().permute(permutation).contiguous()
        layout = Layout(graph, node, name, site.granularity, permutation, tuple(product.tensor.shape))
        make = _uniform if isinstance(site.format, Integer) and not site.format.mid_rise else _table
        floats = _scaled(layout, site, make(layout, site, codes))
    node.replace_input_with(product.operand, floats)
    return True


class Layout:
    """Where a weight's parameters lie, for operators that work on the weight with its axes permuted.

    Args:
        graph: that gets the operators, in front of ``before``.
        before: a node.
        name: of the weight.
        granularity: on the axes that the weight has in the model.
        permutation: of these axes.
        shape: of the weight in the model.
    """

    def __init__(
        self,
        graph: ir.Graph,
        before: ir.Node,
        name: str,
        granularity: Granularity,
        permutation: tuple[int, ...],
        shape: tuple[int, ...],
    ) -> None:
        self.graph, self.before, self.name = graph, before, name
        self.granularity, self.permutation = granularity, permutation
        self.shape = [shape[axis] for axis in permutation]

    def add(
        self, op_type: str, inputs: list[ir.Value | None], ending: str, dtype: ir.DataType | None
    ) -> ir.Value:
        """An operator with a result of the weight's shape."""
        return add(self.graph, self.before, op_type, inputs, f"{self.name}/{ending}", self.shape, dtype)

    def cast(self, value: ir.Value, dtype: ir.DataType, ending: str) -> ir.Value:
        """The same in another type."""
        name = f"{self.name}/{ending}"
        return add(self.graph, self.before, "Cast", [value], name, self.shape, dtype, to=int(dtype))

    def expand(self, parameter: torch.Tensor, ending: str) -> ir.Value:
        """A parameter of the granularity's shape, so that it broadcasts to the weight."""
        name = f"{self.name}_{ending}"
        if isinstance(self.granularity, PerChannel):
            axis = self.permutation.index(self.granularity.axis % len(self.shape))
            parameter = parameter.reshape([-1 if i == axis else 1 for i in range(len(self.shape))])
        elif isinstance(self.granularity, PerGroup):
            axis = self.permutation.index(self.granularity.axis % len(self.shape))
            length, size = self.shape[axis], self.granularity.size
            stored = initializer(self.graph, name, parameter.permute(self.permutation).numpy())
            groups = (np.arange(length) // size).astype(np.int32)
            index = initializer(self.graph, f"unpack/groups_{length}_{size}", groups)
            return add(self.graph, self.before, "Gather", [stored, index], f"{name}/expanded", axis=axis)
        return initializer(self.graph, name, parameter.numpy())


def _uniform(layout: Layout, site: FakeQuantize, codes: torch.Tensor) -> ir.Value:
    """Integers less their zero points, as floats."""
    box = container(site.format, site.name)
    stored = stored_codes(
        layout.graph, layout.before, f"{layout.name}_quantized", codes, site.format.bits, box
    )
    numbers = layout.cast(stored, _FLOAT, "numbers")
    zero_point = site.zero_point.detach().cpu()
    if not bool(zero_point.any()):
        return numbers
    return layout.add("Sub", [numbers, layout.expand(zero_point.float(), "zero_point")], "centred", _FLOAT)


def _table(layout: Layout, site: FakeQuantize, codes: torch.Tensor) -> ir.Value:
    """The numbers that codes stand for, looked up in the table of all of them, or in one for each parameter."""
    graph, before, name = layout.graph, layout.before, layout.name
    table = _numbers(site.format)
    unsigned = codes.int() & (2**site.format.bits - 1)
    box = next(box for box in UNSIGNED if site.format.levels - 1 <= box.high)
    stored = stored_codes(graph, before, f"{name}_quantized", unsigned, site.format.bits, box)
    if table.dim() > 1:
        count = site.scale.numel()
        first = torch.arange(count, dtype=torch.int32).reshape(site.scale.shape) * table.shape[-1]
        indices = layout.cast(stored, ir.DataType.INT32, "codes")
        stored = layout.add("Add", [indices, layout.expand(first, "table")], "places", ir.DataType.INT32)
    values = initializer(graph, f"{name}_values", table.reshape(-1).numpy())
    numbers = look_up(graph, before, name, values, stored)
    numbers.shape, numbers.dtype = ir.Shape(layout.shape), _FLOAT
    return numbers


def _numbers(format: Format) -> torch.Tensor:
    """The number of each code at scale 1: (codes,), or (*parameters, codes) where each parameter has a table."""
    if isinstance(format, Codebook):
        return format.values.detach().cpu()
    codes = torch.arange(2**format.bits, dtype=torch.int32)
    if isinstance(format, Integer) and format.signed:
        codes = torch.where(codes >= 2 ** (format.bits - 1), codes - 2**format.bits, codes)
    one, zero = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    return functional.dequantize(codes.to(format.dtype), one, zero, format)


def _scaled(layout: Layout, site: FakeQuantize, numbers: ir.Value) -> ir.Value:
    """Times the scale; absolute codebooks have none."""
    if isinstance(site.format, Codebook) and not site.format.scaled:
        return layout.add("Identity", [numbers], "floats", _FLOAT)
    scale = layout.expand(site.scale.detach().cpu(), "scale")
    return layout.add("Mul", [numbers, scale], "floats", _FLOAT)
