"""Which ONNX type holds a format's codes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from halfstep.errors import ExportError
from halfstep.formats import Format, Integer
from halfstep.packing import pack


@dataclass(frozen=True)
class Container:
    """An ONNX integer type and its range."""

    dtype: ir.DataType
    low: int
    high: int

    def exact(self, format: Format) -> bool:
        """Whether the type saturates exactly where the format does."""
        return isinstance(format, Integer) and (format.quant_min, format.quant_max) == (self.low, self.high)

    def initializer(self, graph: ir.Graph, name: str, codes: np.ndarray) -> ir.Value:
        """The initializer called ``name`` with these codes, made when first asked for; stored as raw data."""
        if name not in graph.initializers:
            array = np.array(codes, order="C")  # keeps 0-d arrays 0-d
            if array.size and not self.low <= int(array.min()) <= int(array.max()) <= self.high:
                raise ExportError(
                    f"{name}: codes from {array.min()} to {array.max()} do not fit {self.dtype}"
                )
            tensor = ir.Tensor(array.astype(self.dtype.numpy()), dtype=self.dtype, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(self.dtype), const_value=tensor
            )
            graph.register_initializer(value)
        return graph.initializers[name]


SIGNED = (
    Container(ir.DataType.INT8, -128, 127),
    Container(ir.DataType.INT16, -(2**15), 2**15 - 1),
)
UNSIGNED = (
    Container(ir.DataType.UINT8, 0, 255),
    Container(ir.DataType.UINT16, 0, 2**16 - 1),
)


def packed_initializer(graph: ir.Graph, name: str, codes: torch.Tensor, signed: bool) -> ir.Value:
    """The initializer called ``name`` in ONNX's 4-bit type, two codes to a byte, stored as raw data."""
    if name not in graph.initializers:
        dtype = ir.DataType.INT4 if signed else ir.DataType.UINT4
        raw = pack(codes.reshape(-1), 4).numpy()
        tensor = ir.PackedTensor(raw, dtype, shape=ir.Shape(codes.shape), name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape(codes.shape), type=ir.TensorType(dtype), const_value=tensor)
        )
    return graph.initializers[name]


def container(format: Format, name: str) -> Container:
    """The smallest type of at least 8 bits that holds the format's codes: what integer kernels read.

    Raises:
        ExportError: naming the site, if the format is not an integer one.
    """
    if isinstance(format, Integer):
        for box in SIGNED if format.quant_min < 0 else UNSIGNED:
            if box.low <= format.quant_min and format.quant_max <= box.high:
                return box
    raise ExportError(
        f"site {name!r}: {format} has no integer type in ONNX; quantize it in an Integer format for this target"
    )
