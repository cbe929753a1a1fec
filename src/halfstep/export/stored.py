"""Codes in a file: packed as tightly as their format promises, and unpacked by operators that fold away at load.

A runtime that folds constants computes the unpacking once, when it loads the file, and executes what it would have
executed on unpacked codes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from halfstep.export.containers import Container, packed_initializer
from halfstep.export.editing import add, existing, initializer
from halfstep.packing import pack

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
    old = (
        graph.opset_imports.get("", UNPACKING) < UNPACKING
    )  # of a file that was given; codes of 4 bits raise it
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
