"""Codes in a file: their container, packed, and unpacked by operators that fold away at load.

Which ONNX type holds a format's codes.

Codes of 1 to 8 bits as bytes and back, in the order in which ONNX stores its 2- and 4-bit types.

A runtime that folds constants computes the unpacking once, when it loads the file, and executes what it would have
executed on unpacked codes.

Weights of any format as packed codes that become floats at load: small in the file, and as fast as float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from halfstep import functional
from halfstep.errors import ExportError, FormatError
from halfstep.export.editing import add, existing, initializer
from halfstep.export.product import Product
from halfstep.fake_quantize import FakeQuantize
from halfstep.formats import Codebook, Format, Integer
from halfstep.granularity import Granularity, PerChannel, PerGroup


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


#: Codes that are packed or unpacked at once: what is made in between stays below some 10 MB. A multiple of 8, so that
#: every block begins with a byte.
BLOCK = 2**18


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the low ``bits`` bits of each code into bytes.

    Element i takes the bits ``i * bits`` and up of one stream that fills every byte from its lowest bit. For
    2 and 4 bits that is ONNX's layout (the first element in the low bits); 3-bit codes cross byte borders, 8
    codes in 3 bytes. The rest of the last byte is zero.

    Args:
        codes: integers, any shape, in row-major order; signed codes in two's complement.
        bits: 1 to 8.

    Returns:
        uint8, ``ceil(codes.numel() * bits / 8)`` bytes, one-dimensional.

    Raises:
        FormatError: codes that are no integers or do not fit, or another width.

    >>> pack(torch.tensor([1, -2, 3]), bits=4)
    tensor([225,   3], dtype=torch.uint8)

    Source: ONNX, "4 bit integer types", packing and unpacking.
    """
    _check_bits(bits)
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise FormatError(f"codes: got {codes.dtype}, needed integers")
    flat = codes.reshape(-1)
    packed = torch.empty(-(-len(flat) * bits // 8), dtype=torch.uint8, device=codes.device)
    # Whole codes fill a byte where they can, else their single bits do.
    width = bits if 8 % bits == 0 else 1
    places, bytes_places = _places(bits, codes.device), _places(8, codes.device)[::width]
    for start, block in zip(range(0, len(flat), BLOCK), flat.split(BLOCK), strict=False):
        _check_codes(block, bits)  # before they are narrowed
        stream = block.to(torch.uint8)
        stream = (
            stream & (2**bits - 1) if width == bits else ((stream.unsqueeze(1) >> places) & 1).reshape(-1)
        )
        stream = torch.nn.functional.pad(stream, (0, -len(stream) % (8 // width))).reshape(-1, 8 // width)
        first = start * bits // 8
        packed[first : first + len(stream)] = (stream << bytes_places).sum(1, dtype=torch.uint8)
    return packed


def unpack(packed: Tensor, bits: int, shape: Sequence[int], signed: bool) -> Tensor:
    """Undo :func:`pack`.

    Args:
        packed: uint8, one-dimensional.
        bits: 1 to 8.
        shape: of the codes.
        signed: whether codes are two's complement.

    Returns:
        int8 if signed, else uint8, of ``shape``.

    Raises:
        FormatError: another width, or another number of bytes than ``shape`` needs.

    >>> unpack(torch.tensor([225, 3], dtype=torch.uint8), bits=4, shape=(3,), signed=True)
    tensor([ 1, -2,  3], dtype=torch.int8)
    """
    _check_bits(bits)
    count = prod(int(size) for size in shape)
    needed = -(-count * bits // 8)
    if packed.dtype != torch.uint8 or packed.shape != (needed,):
        raise FormatError(
            f"packed: got {packed.dtype} of shape {tuple(packed.shape)}, needed uint8 of shape ({needed},) for "
            f"{count} codes of {bits} bits"
        )
    codes = torch.empty(count, dtype=torch.int8 if signed else torch.uint8, device=packed.device)
    places, byte = _places(bits, packed.device), _places(8, packed.device)
    for start in range(0, count, BLOCK):
        block = codes[start : start + BLOCK]
        first = start * bits // 8
        some = packed[first : first + -(-len(block) * bits // 8)]
        stream = ((some.unsqueeze(1) >> byte) & 1).reshape(-1)[: len(block) * bits].reshape(-1, bits)
        numbers = (stream << places).sum(1, dtype=torch.uint8)
        if signed:  # the sign's bit is repeated above it
            numbers = torch.where(numbers >= 2 ** (bits - 1), numbers | (256 - 2**bits), numbers)
        block.copy_(numbers.view(codes.dtype))
    return codes.reshape(tuple(shape))


def _places(bits: int, device: torch.device) -> Tensor:
    """Return how far each bit of a code is from the lowest."""
    return torch.arange(bits, dtype=torch.uint8, device=device)


def _check_codes(codes: Tensor, bits: int) -> None:
    """Raise unless codes fit in so many bits, signed or unsigned."""
    lowest, highest = -(2 ** (bits - 1)), 2**bits - 1
    low, high = map(int, torch.aminmax(codes))
    if not lowest <= low <= high <= highest:
        raise FormatError(f"codes: got {low} to {high}, needed {lowest} to {highest} for {bits} bits")


def _check_bits(bits: int) -> None:
    """Raise unless codes of this width are packed into bytes."""
    if not 1 <= bits <= 8:
        raise FormatError(f"bits: got {bits}, needed 1 to 8; wider codes are stored as they are")


#: The version of ONNX's operators that has all those that unpack.
UNPACKING = 21


#: Fewer bytes saved than this do not pay for the operators that unpack.
WORTH_PACKING = 2048


def stored_codes(
    graph: ir.Graph,
    before: ir.Node,
    name: str,
    codes: torch.Tensor,
    bits: int,
    box: Container,
    stretch: int = 1,
) -> ir.Value:
    """Codes times ``stretch``, of the type of ``box``, taking ``bits`` bits each in the file.

    Codes of 4 bits are stored in ONNX's own type and cast. Others are split into planes of 4, 2 and 1 bits, several
    codes to a byte, put together by shifts. Signed and stretched ones are looked up in the table of all codes.

    Args:
        graph: gets the initializers and operators.
        before: the node in front of which they go.
        name: of the tensor.
        codes: integers, in the layout that is wanted.
        bits: that hold every code; 8 and more are stored as they are, and all in a graph of an older version of ONNX.
        box: the type wanted.
        stretch: a power of two.
    """
    # Of a file that was given; codes of 4 bits raise it.
    old = graph.opset_imports.get("", UNPACKING) < UNPACKING
    if bits >= 8 or old or codes.numel() * (8 - bits) // 8 < WORTH_PACKING:
        return box.initializer(graph, name, (codes if stretch == 1 else codes.int() * stretch).numpy())
    if (found := existing(graph, f"{name}/unpacked")) is not None:
        return found
    signed = box.low < 0
    if bits == 4 and stretch == 1:
        stored = packed_initializer(graph, name, codes, signed)
        return _cast(graph, before, f"{name}/unpacked", stored, box.dtype)
    unsigned = codes.int() & (2**bits - 1)
    result: ir.Value | None = None
    offset = 0
    for width in (4, 2, 1):
        if not bits & width:
            continue
        plane = _plane(graph, before, f"{name}_bits{offset}", (unsigned >> offset) & (2**width - 1), width)
        if offset:
            shift = initializer(graph, f"unpack/{offset}", np.asarray(offset, np.uint8))
            plane = add(
                graph, before, "BitShift", [plane, shift], f"{name}_bits{offset}/place", direction="LEFT"
            )
        result = (
            plane
            if result is None
            else add(graph, before, "BitwiseOr", [result, plane], f"{name}/join{offset}")
        )
        offset += width
    assert result is not None
    if signed or stretch > 1:
        every = np.arange(2**bits)
        numbers = np.where(every >= 2 ** (bits - 1), every - 2**bits, every) if signed else every
        kind = f"{'signed' if signed else 'unsigned'}{bits}" + (f"_times{stretch}" if stretch > 1 else "")
        table = box.initializer(graph, f"unpack/{kind}", numbers * stretch)
        result = look_up(graph, before, name, table, result)
    shape = initializer(graph, f"{name}_shape", np.asarray(codes.shape, np.int64))
    return add(graph, before, "Reshape", [result, shape], f"{name}/unpacked", codes.shape, box.dtype)


def look_up(graph: ir.Graph, before: ir.Node, name: str, table: ir.Value, codes: ir.Value) -> ir.Value:
    """The entries of a table, one for each code."""
    indices = _cast(graph, before, f"{name}/indices", codes, ir.DataType.INT32)
    return add(graph, before, "Gather", [table, indices], f"{name}/look_up", axis=0)


def _plane(graph: ir.Graph, before: ir.Node, name: str, codes: torch.Tensor, width: int) -> ir.Value:
    """Flat uint8 codes of 4, 2 or 1 bits."""
    if width == 4:
        stored = packed_initializer(graph, name, codes.reshape(-1), signed=False)
        return _cast(graph, before, f"{name}/bytes", stored, ir.DataType.UINT8)
    packed = initializer(graph, name, pack(codes, width).reshape(-1, 1).numpy())  # (bytes, 1)
    places = initializer(graph, f"unpack/places{width}", np.arange(0, 8, width, dtype=np.uint8))
    mask = initializer(graph, f"unpack/mask{width}", np.asarray(2**width - 1, np.uint8))
    shifted = add(graph, before, "BitShift", [packed, places], f"{name}/shift", direction="RIGHT")
    masked = add(graph, before, "BitwiseAnd", [shifted, mask], f"{name}/mask")  # (bytes, codes in a byte)
    flat = initializer(graph, "unpack/flat", np.asarray([-1], np.int64))
    every = add(graph, before, "Reshape", [masked, flat], f"{name}/flat")
    if codes.numel() % (8 // width) == 0:
        return every
    start = initializer(graph, "unpack/start", np.asarray([0], np.int64))
    count = initializer(graph, f"unpack/count{codes.numel()}", np.asarray([codes.numel()], np.int64))
    return add(graph, before, "Slice", [every, start, count], f"{name}/cut")


def _cast(graph: ir.Graph, before: ir.Node, name: str, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    return add(graph, before, "Cast", [value], name, value.shape, dtype, to=int(dtype))


_FLOAT = ir.DataType.FLOAT


def unpack_at_load(graph: ir.Graph, product: Product) -> bool:
    """Let the product read floats computed from codes: ``scale * (code - zero_point)``, or a look-up times scale."""
    site, permutation, node, name = product.site, product.permutation, product.node, product.name
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
