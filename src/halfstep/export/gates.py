"""HardSigmoid on codes, without a kernel of its own."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from halfstep.export.editing import add, constant, initializer, producer


def saturate_gates(graph: ir.Graph) -> None:
    """A HardSigmoid between quantizers becomes an Add.

    ``clip(alpha * x + beta, 0, 1)`` is a sum whose QuantizeLinear clips: its codes end at 0 and at most at 1. The
    factor costs nothing: the same codes are dequantized by ``alpha * scale``, and the runtime's integer Add reads
    them as they are.
    """
    for node in list(graph):
        if node.op_type != "HardSigmoid":
            continue
        dequantize = producer(node.inputs[0], "DequantizeLinear")
        users = list(node.outputs[0].uses())
        if dequantize is None or len(users) != 1 or users[0].node.op_type != "QuantizeLinear":
            continue
        scale, zero_point = (constant(value) for value in dequantize.inputs[1:3])
        if scale is None or zero_point is None or scale.ndim or not _saturates(users[0].node):
            continue
        alpha = node.attributes.get_float("alpha", 0.2)
        beta = node.attributes.get_float("beta", 0.5)
        name, shape = str(node.name), node.outputs[0].shape
        shrunk = initializer(graph, f"{name}/scale", np.asarray(scale * np.float32(alpha), np.float32))
        one = initializer(graph, f"{name}/one", np.ones((1,), zero_point.dtype))
        nought = initializer(graph, f"{name}/nought", np.zeros((), zero_point.dtype))
        offset = initializer(graph, f"{name}/offset", np.asarray(beta, np.float32))
        codes = dequantize.inputs[0]
        product = add(
            graph,
            node,
            "DequantizeLinear",
            [codes, shrunk, dequantize.inputs[2]],
            f"{name}/DequantizeLinear",
            shape,
            ir.DataType.FLOAT,
        )
        shift = add(
            graph,
            node,
            "DequantizeLinear",
            [one, offset, nought],
            f"{name}/offset/DequantizeLinear",
            [1],
            ir.DataType.FLOAT,
        )
        total = add(graph, node, "Add", [product, shift], f"{name}/Add", shape, ir.DataType.FLOAT)
        users[0].node.replace_input_with(0, total)
        graph.remove(node, safe=True)


def _saturates(quantize: ir.Node) -> bool:
    """Whether the codes of a QuantizeLinear end at 0, and at most at 1."""
    scale, zero_point = (constant(value) for value in quantize.inputs[1:3])
    if scale is None or zero_point is None or scale.ndim:
        return False
    ends = np.iinfo(zero_point.dtype)
    bounds = np.rint(np.asarray([0.0, 1.0], np.float32) / scale) + np.float32(zero_point)
    return bool(bounds[0] <= ends.min and bounds[1] >= ends.max)
