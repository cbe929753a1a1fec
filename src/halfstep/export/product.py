"""A product with a quantized weight, as the exported graph has it."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from halfstep import functional
from halfstep.export.editing import replace
from halfstep.fake_quantize import FakeQuantize
from halfstep.granularity import PerChannel, PerGroup
from halfstep.targets import Target


@dataclass(frozen=True)
class Product:
    """A node that reads a weight through a marker: MatMul, Gemm, Conv, Gather.

    Attributes:
        node: the node.
        operand: which of its inputs the weight is.
        site: the weight's quantizer.
        tensor: the weight in float, on the CPU.
        permutation: of the weight's axes, as the node reads them.
        marker: the marker in front of its activation, if that is quantized.
        activation: the activation's quantizer, if it is quantized.
        target: the runtime that the file is for.
    """

    node: ir.Node
    operand: int
    site: FakeQuantize
    tensor: torch.Tensor
    permutation: tuple[int, ...]
    marker: ir.Node | None
    activation: FakeQuantize | None
    target: Target

    @property
    def layer(self) -> str:
        """The layer's name."""
        return (self.node.name or "").rpartition("/")[0]

    @property
    def name(self) -> str:
        """Of the weight with its axes as the node reads them."""
        transposed = self.permutation != tuple(sorted(self.permutation))
        return f"{self.site.name}_transposed" if transposed else self.site.name

    @property
    def is_matrix(self) -> bool:
        """Whether it is ``x @ W`` with a weight of two axes: a MatMul, or a Gemm without options."""
        node = self.node
        if self.operand != 1 or self.tensor.dim() != 2 or node.op_type not in ("MatMul", "Gemm"):
            return False
        factors = (node.attributes.get_float(name, 1.0) for name in ("alpha", "beta"))
        return not node.attributes.get_int("transA", 0) and all(factor == 1.0 for factor in factors)

    @property
    def bias(self) -> ir.Value | None:
        """A Gemm's bias."""
        return self.node.inputs[2] if self.node.op_type == "Gemm" and len(self.node.inputs) > 2 else None

    def codes(self) -> torch.Tensor:
        """The weight's codes, its axes as the model has them."""
        site = self.site
        scale, zero_point = site.scale.detach().cpu(), site.zero_point.detach().cpu()
        return functional.quantize(
            site.shifted(self.tensor), scale, zero_point, site.format, site.granularity
        )

    def rows(self) -> Rows | None:
        """The weight as rows along which its groups lie; None if its parameters do not lie so.

        For a product the rows are the outputs, (N, K), whatever the layout it is stored in; for a Gather those of the
        table.
        """
        if self.tensor.dim() != 2:
            return None
        along = 1
        if self.node.op_type != "Gather" and not self.node.attributes.get_int("transB", 0):
            along = 0  # a MatMul sums over the first axis that it reads
        axis, across = self.permutation[along], self.permutation[1 - along]
        length, granularity = self.tensor.shape[axis], self.site.granularity
        size, parameters = length, (self.site.scale, self.site.zero_point)
        scale, zero_point = (parameter.detach().cpu() for parameter in parameters)
        if isinstance(granularity, PerGroup):
            if granularity.axis % 2 != axis:
                return None
            size = granularity.size
            scale, zero_point = scale.movedim(axis, -1), zero_point.movedim(axis, -1)
        elif isinstance(granularity, PerChannel) and granularity.axis % 2 != across:
            return None
        else:
            count = self.tensor.shape[across]
            scale, zero_point = (p.reshape(-1, 1).expand(count, 1) for p in (scale, zero_point))
        return Rows(self.codes().movedim(axis, -1), scale, zero_point, size)

    def becomes(self, graph: ir.Graph, result: ir.Value) -> None:
        """Let the readers of the product read ``result``, and take the product out."""
        old = self.node.outputs[0]
        result.shape, result.type = old.shape, old.type
        replace(graph, old, result)
        graph.remove(self.node, safe=True)


@dataclass(frozen=True)
class Rows:
    """Integer codes in rows, with parameters for each group of neighbours in a row.

    Attributes:
        codes: (rows, length).
        scale: (rows, groups), float32.
        zero_point: (rows, groups), int32.
        size: of a group; the last one of a row may be shorter.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    size: int

    def block(self) -> int | None:
        """The block size for kernels that want a power of two from 16; None if these groups have none.

        A single group is a larger block that ends early.
        """
        if self.scale.shape[1] == 1:
            return max(16, 1 << (self.codes.shape[1] - 1).bit_length())
        return self.size if self.size >= 16 and self.size & (self.size - 1) == 0 else None

    def unsigned(self, bits: int, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and zero points shifted to start at 0, for kernels that take unsigned ones of ``bits`` bits."""
        shift = 2 ** (bits - 1) if signed else 0
        return self.codes.int() + shift, self.zero_point + shift
