"""Weights of few bits in groups: ONNX Runtime's MatMulNBits.

Its ``accuracy_level`` is part of the arithmetic, so it is written into the file: at 1 activations stay float; at 4,
which the runtime picks by itself when it fuses DequantizeLinear and MatMul, each row of the activations is rounded to
8 bits in the weight's blocks. The latter is what :class:`.RunTimeQuantize` simulates per group, and is used only then.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from halfstep.export.editing import MICROSOFT, add, initializer
from halfstep.export.product import Product
from halfstep.formats import Integer
from halfstep.granularity import PerGroup
from halfstep.packing import pack

FLOAT_SUMS, INTEGER_SUMS = 1, 4

#: Widths that the kernel multiplies in float without losing to plain float. It unpacks 2 and 8 bits anew in every call,
#: at a fifth of float's speed for small batches.
FAST_IN_FLOAT = (3, 4)


def multiply_in_groups(graph: ir.Graph, product: Product) -> bool:
    """Make a MatMulNBits of the product, if it is one of integers in groups that the kernel takes."""
    format, activation = product.site.format, product.activation
    if not (product.packed and product.is_matrix and isinstance(format, Integer) and not format.mid_rise):
        return False
    in_groups = activation is not None and activation.dynamic and isinstance(activation.granularity, PerGroup)
    rows = product.rows()
    block = rows.block() if rows is not None else None
    if rows is None or block is None or not (in_groups or format.bits in FAST_IN_FLOAT):
        return False
    bits = _width(format.bits, block)
    node, name = product.node, product.site.name
    source = node.inputs[0]
    if in_groups:  # the kernel rounds the activation itself
        assert product.marker is not None
        source = product.marker.inputs[0]
    codes, zero_point = rows.unsigned(bits, format.signed)
    groups = rows.scale.shape[1]
    codes = torch.nn.functional.pad(
        codes, (0, groups * block - codes.shape[1])
    )  # what the kernel never reads
    packed = pack(codes, bits).reshape(len(codes), groups, block * bits // 8)
    inputs: list[ir.Value | None] = [
        source,
        initializer(graph, f"{name}_quantized", packed.numpy()),
        initializer(graph, f"{name}_scale", rows.scale.numpy().astype(np.float32)),
        None,
        None,
        product.bias,
    ]
    if not bool((zero_point == 2 ** (bits - 1)).all()):  # where the kernel takes it to be if none is given
        padded = torch.nn.functional.pad(zero_point, (0, -groups % (8 // bits)))
        inputs[3] = initializer(
            graph, f"{name}_zero_point", pack(padded, bits).reshape(len(codes), -1).numpy()
        )
    while inputs[-1] is None:
        inputs.pop()
    result = add(
        graph,
        node,
        "MatMulNBits",
        inputs,
        f"{product.layer}/MatMulNBits",
        domain=MICROSOFT,
        K=rows.codes.shape[1],
        N=len(codes),
        bits=bits,
        block_size=block,
        accuracy_level=INTEGER_SUMS if in_groups else FLOAT_SUMS,
    )
    product.becomes(graph, result)
    return True


def _width(bits: int, block: int) -> int:
    """The kernel's width that holds codes of ``bits``; for 2 bits it sums integers in blocks of at least 32."""
    if bits == 2 and block >= 32:
        return 2
    return 4 if bits <= 4 else 8
