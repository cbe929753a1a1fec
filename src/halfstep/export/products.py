"""Products with quantized weights that are no plain integer ones: which kernel each of them gets.

What is left to QuantizeLinear/DequantizeLinear is a product of activations with a fixed range by integer weights per
tensor or per channel. Every other weight is tried on the table below, kernel by kernel; the last one takes all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from halfstep.export.dynamic import multiply_at_run_time, quantize_at_run_time
from halfstep.export.editing import MICROSOFT, drop_unused, is_marker, marker_name, markers
from halfstep.export.embedding import look_up_rows
from halfstep.export.grouped import multiply_in_groups
from halfstep.export.product import Product
from halfstep.export.unpacked import unpack_at_load
from halfstep.formats import Integer
from halfstep.granularity import PerGroup
from halfstep.model import QuantizedModel

#: Each takes a product over if it has a kernel for it, and says whether it did.
_KERNELS: tuple[Callable[[ir.Graph, Product], bool], ...] = (
    look_up_rows,
    multiply_at_run_time,
    multiply_in_groups,
    unpack_at_load,
)


def lower_products(onnx_model: ir.Model, model: QuantizedModel) -> None:
    """Lower every product that is no plain integer one, and the activations with ranges at run time."""
    graph = onnx_model.graph
    for product in list(find_products(graph, model)):
        if not _is_plain(product):
            next(kernel for kernel in _KERNELS if kernel(graph, product))
    drop_unused(graph)  # markers that no product reads any more, and transposes of weights
    for node in markers(graph):
        if model.sites[marker_name(node)].dynamic:
            quantize_at_run_time(graph, node)
    if any(node.domain == MICROSOFT for node in graph):
        onnx_model.opset_imports[MICROSOFT] = 1


def find_products(graph: ir.Graph, model: QuantizedModel) -> Iterator[Product]:
    """Every node that reads a weight behind a marker, directly or through a Transpose."""
    for node in graph:
        for index, operand in enumerate(node.inputs):
            marker, permutation = _marker(operand)
            if marker is None or marker.inputs[0] is None or not marker.inputs[0].is_initializer():
                continue
            name = marker_name(marker)
            tensor = model.weight(name).detach().cpu()
            activation = node.inputs[0].producer() if index == 1 and node.inputs[0] is not None else None
            if node.op_type != "Transpose":
                yield Product(
                    node,
                    index,
                    model.sites[name],
                    tensor,
                    permutation or tuple(range(tensor.dim())),
                    activation if is_marker(activation) else None,
                    model.sites[marker_name(activation)] if activation and is_marker(activation) else None,
                    model.target.packed,
                )


def _marker(operand: ir.Value | None) -> tuple[ir.Node | None, tuple[int, ...] | None]:
    node = operand.producer() if operand is not None else None
    permutation = None
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        permutation = tuple(node.attributes.get_ints("perm"))
        node = node.inputs[0].producer()
    return (node, permutation) if is_marker(node) else (None, None)


def _is_plain(product: Product) -> bool:
    """Whether a DequantizeLinear of the weight is what the runtime wants."""
    if not isinstance(product.site.format, Integer) or product.site.format.mid_rise:
        return False
    if not product.packed:
        return True
    fixed = product.activation is not None and not product.activation.dynamic
    return fixed and not isinstance(product.site.granularity, PerGroup)
