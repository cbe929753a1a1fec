"""Products with quantized weights: which kernel each of them gets, and how.

Activations with ranges computed at run time: DynamicQuantizeLinear, and the integer products that follow it.

ONNX Runtime fuses DynamicQuantizeLinear, MatMulInteger, the scaling and the bias to DynamicQuantizeMatMul, or, where
several products read one activation, to MatMulIntegerToFloat.

Tables of few bits whose rows are looked up: ONNX Runtime's GatherBlockQuantized, which dequantizes only the rows.

Weights of few bits in groups: ONNX Runtime's MatMulNBits.

Its ``accuracy_level`` is part of the arithmetic, so it is written into the file: at 1 activations stay float; at 4,
which the runtime picks by itself when it fuses DequantizeLinear and MatMul, each row of the activations is rounded to
8 bits in the weight's blocks. The latter is what :class:`.RunTimeQuantize` simulates per group, and is used only then.

A product of activations with a fixed range by integer weights per tensor or per channel gets a DequantizeLinear. Every
weight is tried on the table below, kernel by kernel; the last one takes all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from halfstep.export.editing import (
    MICROSOFT,
    add,
    drop_unused,
    existing,
    initializer,
    replace,
)
from halfstep.export.marks import MARKER, is_marker, marker_name, markers
from halfstep.export.product import Product
from halfstep.export.storage import container, pack, packed_initializer, stored_codes, unpack_at_load
from halfstep.formats import Integer
from halfstep.granularity import PerChannel, PerGroup, PerTensor
from halfstep.model import QuantizedModel


def dequantize(graph: ir.Graph, product: Product) -> bool:
    """Let the product read a DequantizeLinear of the weight's codes, if that is what the runtime wants.

    A Transpose of the weight is done here, on the codes: runtimes look for the initializer right behind the
    DequantizeLinear.
    """
    site, target, permutation = product.site, product.target, product.permutation
    format, granularity = site.format, site.granularity
    if not isinstance(format, Integer) or format.mid_rise:
        return False
    fixed = product.activation is not None and not product.activation.dynamic
    if target.packed and (not fixed or isinstance(granularity, PerGroup)):
        return False
    node, name = product.node, product.name
    # ONNX Runtime makes a product in groups of it, which rounds the activation to 8 bits, where it has no kernel.
    wide = product.activation is not None and not target.executes(product.activation.format)
    if target.packed and wide and node.op_type == "MatMul":
        return False
    weight = existing(graph, f"{name}/DequantizeLinear")
    if weight is None:
        box = container(format, site.name)
        scale, zero_point = site.scale.detach().cpu(), site.zero_point.detach().cpu()
        codes = product.codes().permute(permutation)
        attributes: dict[str, Any] = {}
        if isinstance(granularity, PerChannel | PerGroup):
            attributes["axis"] = permutation.index(granularity.axis % len(permutation))
        if isinstance(granularity, PerGroup):
            attributes["block_size"] = granularity.size
            scale, zero_point = scale.permute(permutation), zero_point.permute(permutation)
        if not target.packed and format.bits <= 4 and isinstance(granularity, PerGroup):
            # Runtimes that take weights in groups know them by ONNX's own 4-bit type.
            stored, zero = (
                packed_initializer(graph, f"{name}_{ending}", tensor, signed=box.low < 0)
                for ending, tensor in (("quantized", codes), ("zero_point", zero_point))
            )
        else:
            stretch = target.stretch(format)
            scale, zero_point = scale / stretch, zero_point * stretch
            bits = format.bits if target.packed else 8
            stored = stored_codes(graph, node, f"{name}_quantized", codes, bits, box, stretch)
            # Written out even where it is 0: without it onnxruntime leaves a Gemm in float.
            zero = box.initializer(graph, f"{name}_zero_point", zero_point.numpy())
        step = initializer(graph, f"{name}_scale", scale.numpy().astype(np.float32))
        weight = add(
            graph,
            node,
            "DequantizeLinear",
            [stored, step, zero],
            f"{name}/DequantizeLinear",
            codes.shape,
            ir.DataType.FLOAT,
            **attributes,
        )
    node.replace_input_with(product.operand, weight)
    return True


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


def look_up_rows(graph: ir.Graph, product: Product) -> bool:
    """Make a GatherBlockQuantized of a Gather of rows, if its table holds integers of 8 bits at most."""
    format, node = product.site.format, product.node
    if node.op_type != "Gather" or product.operand != 0 or node.attributes.get_int("axis", 0) != 0:
        return False
    if not (
        product.target.packed and isinstance(format, Integer) and format.bits <= 8 and not format.mid_rise
    ):
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


FLOAT_SUMS, INTEGER_SUMS = 1, 4

#: Widths that the kernel multiplies in float without losing to plain float. It unpacks 2 and 8 bits anew in every call,
#: at a fifth of float's speed for small batches.
FAST_IN_FLOAT = (3, 4)


def multiply_in_groups(graph: ir.Graph, product: Product) -> bool:
    """Make a MatMulNBits of the product, if it is one of integers in groups that the kernel takes."""
    format, activation = product.site.format, product.activation
    if not (
        product.target.packed and product.is_matrix and isinstance(format, Integer) and not format.mid_rise
    ):
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
    # What the kernel never reads.
    codes = torch.nn.functional.pad(codes, (0, groups * block - codes.shape[1]))
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


#: Each takes a product over if it has a kernel for it, and says whether it did.
_KERNELS: tuple[Callable[[ir.Graph, Product], bool], ...] = (
    dequantize,
    look_up_rows,
    multiply_at_run_time,
    multiply_in_groups,
    unpack_at_load,
)


def lower_products(onnx_model: ir.Model, model: QuantizedModel) -> None:
    """Lower every product, and the activations with ranges at run time."""
    graph = onnx_model.graph
    for product in list(find_products(graph, model)):
        next(kernel for kernel in _KERNELS if kernel(graph, product))
    drop_unused(graph)  # markers that no product reads any more, and transposes of weights
    for node in markers(graph):
        if model.sites[marker_name(node)].dynamic:
            quantize_at_run_time(graph, node)
    if any(node.domain == MICROSOFT for node in graph):
        onnx_model.opset_imports[MICROSOFT] = 1


def find_products(graph: ir.Graph, model: QuantizedModel) -> Iterator[Product]:
    """Every node that reads a weight behind a marker, directly or through a Transpose."""
    weights = {site.name for site in model.placement.sites if site.is_weight}
    for node in graph:
        for index, operand in enumerate(node.inputs):
            marker, permutation = _marker(operand)
            if marker is None or marker.inputs[0] is None or not marker.inputs[0].is_initializer():
                continue
            if (name := marker_name(marker)) not in weights:  # an activation that depends on no input
                continue
            tensor = model.weight(name).detach().cpu()
            activation = node.inputs[0].producer() if index == 1 and node.inputs[0] is not None else None
            if node.op_type != "Transpose" or permutation is not None:
                yield Product(
                    node,
                    index,
                    model.sites[name],
                    tensor,
                    permutation or tuple(range(tensor.dim())),
                    activation if is_marker(activation) else None,
                    model.sites[marker_name(activation)] if activation and is_marker(activation) else None,
                    model.target,
                )


def _marker(operand: ir.Value | None) -> tuple[ir.Node | None, tuple[int, ...] | None]:
    node = operand.producer() if operand is not None else None
    permutation = None
    if node is not None and node.op_type == "Transpose" and node.inputs[0] is not None:
        permutation = tuple(node.attributes.get_ints("perm"))
        node = node.inputs[0].producer()
    return (node, permutation) if is_marker(node) else (None, None)
