"""Tables of few bits whose rows are looked up: ONNX Runtime's GatherBlockQuantized, which dequantizes only the rows."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from halfstep.export.containers import packed_initializer
from halfstep.export.editing import MICROSOFT, add, initializer
from halfstep.export.product import Product
from halfstep.formats import Integer


def look_up_rows(graph: ir.Graph, product: Product) -> bool:
    """Make a GatherBlockQuantized of a Gather of rows, if its table holds integers of 8 bits at most."""
    format, node = product.site.format, product.node
    if node.op_type != "Gather" or product.operand != 0 or node.attributes.get_int("axis", 0) != 0:
        return False
    if not (product.packed and isinstance(format, Integer) and format.bits <= 8 and not format.mid_rise):
        return False
    rows = product.rows()
    block = rows.block() if rows is not None else None
    if rows is None or block is None:
        return False
    bits = 4 if format.bits <= 4 else 8
    name = product.site.name
    codes, zero_point = rows.unsigned(bits, format.signed)
    if bits == 4:
        table = packed_initializer(graph, f"{name}_quantized", codes, signed=False)
        zero = packed_initializer(graph, f"{name}_zero_point", zero_point, signed=False)
    else:
        table = initializer(graph, f"{name}_quantized", codes.numpy().astype(np.uint8))
        zero = initializer(graph, f"{name}_zero_point", zero_point.numpy().astype(np.uint8))
    scale = initializer(graph, f"{name}_scale", rows.scale.numpy().astype(np.float32))
    result = add(
        graph,
        node,
        "GatherBlockQuantized",
        [table, node.inputs[1], scale, zero],
        f"{product.layer}/GatherBlockQuantized",
        domain=MICROSOFT,
        bits=bits,
        block_size=block,
        gather_axis=0,
        quantize_axis=1,
    )
    product.becomes(graph, result)
    return True
