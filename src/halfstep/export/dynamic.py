"""Activations with ranges computed at run time: DynamicQuantizeLinear, and the integer products that follow it.

ONNX Runtime fuses DynamicQuantizeLinear, MatMulInteger, the scaling and the bias to DynamicQuantizeMatMul, or, where
several products read one activation, to MatMulIntegerToFloat.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from halfstep.export.containers import container
from halfstep.export.editing import add, initializer, replace
from halfstep.export.product import Product
from halfstep.export.stored import stored_codes
from halfstep.export.trace import MARKER
from halfstep.formats import Integer
from halfstep.granularity import PerTensor


def multiply_at_run_time(graph: ir.Graph, product: Product) -> bool:
    """Make integers of both factors, if the activation has one range and the weight one for each output at most."""
    site, activation = product.site, product.activation
    if activation is None or not activation.dynamic or not isinstance(activation.granularity, PerTensor):
        return False
    rows = product.rows() if product.is_matrix and isinstance(site.format, Integer) else None
    if rows is None or site.format.bits > 8 or rows.scale.shape[1] > 1 or _has_offset(site.format):
        return False
    assert product.marker is not None
    node, name, layer = product.node, f"{site.name}_transposed", product.layer
    codes, scale, zero_point = _quantized_at_run_time(graph, product.marker)
    box = container(site.format, site.name)
    weight = stored_codes(graph, node, f"{name}_quantized", rows.codes.T.contiguous(), site.format.bits, box)
    weight_zero = box.initializer(graph, f"{name}_zero_point", rows.zero_point[:, 0].numpy())
    weight_scale = initializer(graph, f"{name}_scale", rows.scale[:, 0].numpy().astype(np.float32))
    shape = node.outputs[0].shape
    integers = add(
        graph,
        node,
        "MatMulInteger",
        [codes, weight, zero_point, weight_zero],
        f"{layer}/MatMulInteger",
        shape,
        ir.DataType.INT32,
    )
    floats = add(
        graph, node, "Cast", [integers], f"{layer}/Cast", shape, ir.DataType.FLOAT, to=int(ir.DataType.FLOAT)
    )
    scales = add(graph, node, "Mul", [scale, weight_scale], f"{layer}/scales")
    result = add(graph, node, "Mul", [floats, scales], f"{layer}/Mul", shape, ir.DataType.FLOAT)
    if product.bias is not None:
        result = add(graph, node, "Add", [result, product.bias], f"{layer}/Add", shape, ir.DataType.FLOAT)
    product.becomes(graph, result)
    return True


def quantize_at_run_time(graph: ir.Graph, marker: ir.Node) -> None:
    """Replace a marker whose range is computed at run time, for readers that take floats."""
    name = (marker.name or "").replace(MARKER, "DequantizeLinear")
    codes = list(_quantized_at_run_time(graph, marker))
    result = add(graph, marker, "DequantizeLinear", codes, name, marker.outputs[0].shape, ir.DataType.FLOAT)
    replace(graph, marker.outputs[0], result)
    graph.remove(marker, safe=True)


def _quantized_at_run_time(graph: ir.Graph, marker: ir.Node) -> tuple[ir.Value, ...]:
    """Codes, scale and zero point of a marker's activation; made once."""
    name = (marker.name or "").replace(MARKER, "DynamicQuantizeLinear")
    source = marker.inputs[0]
    assert source is not None
    for user, _ in source.uses():
        if user.name == name:
            return tuple(user.outputs)
    node = ir.node("DynamicQuantizeLinear", [source], num_outputs=3, name=name)
    endings = (("codes", ir.DataType.UINT8), ("scale", ir.DataType.FLOAT), ("zero_point", ir.DataType.UINT8))
    for value, (ending, dtype) in zip(node.outputs, endings, strict=True):
        value.name, value.dtype = f"{name}.{ending}", dtype
        value.shape = source.shape if ending == "codes" else ir.Shape(())
    graph.insert_before(marker, node)
    return tuple(node.outputs)


def _has_offset(format: object) -> bool:
    return isinstance(format, Integer) and format.mid_rise
