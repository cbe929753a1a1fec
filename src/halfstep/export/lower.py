"""The lowering: an ONNX graph with markers becomes one that runtimes fuse into integer kernels.

HardSigmoid on codes, without a kernel of its own.

Each pass changes the graph in place and does one thing. What a runtime fuses is told in the table of its target and
in the comments here; every rule was checked on the optimised graph of the runtime, not inferred.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from halfstep.bias_shift import SMALLEST
from halfstep.errors import ExportError, RefusedError
from halfstep.export.editing import (
    add,
    constant,
    drop_unused,
    initializer,
    is_constant,
    producer,
    replace,
    scale_of,
)
from halfstep.export.marks import MARKER, SCOPES, bias_marker, marker_name, markers
from halfstep.export.products import lower_products
from halfstep.export.storage import container
from halfstep.fake_quantize import FakeQuantize
from halfstep.granularity import PerChannel
from halfstep.model import QuantizedModel


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


def lower(onnx_model: ir.Model, model: QuantizedModel) -> None:
    """Run every pass that the target asks for, in order.

    Args:
        onnx_model: with markers at its sites; its layers are called ``layer/operator``.
        model: whose sites they are.
    """
    graph, wanted = onnx_model.graph, model.target.lowering
    pool_globally(graph)
    quantize_biases(graph, model)
    lower_products(onnx_model, model)
    quantize_activations(graph, model)
    absorb_clips(graph)
    if wanted.detached_clips:
        detach_clips(graph)
    if wanted.saturated_gates:
        saturate_gates(graph)
    if wanted.full_rank_bias:
        shape_biases(graph)
    if wanted.added_bias:
        add_biases(graph)
    if wanted.turned_floats:
        quantize_turned(graph)
    if wanted.guarded_floats:
        protect_float_layers(graph)
    drop_unused(graph)


def rename(graph: ir.Graph) -> None:
    """Name nodes and their results after the user's modules, and drop the exporter's metadata."""
    used: dict[str, int] = {}
    outputs = {id(value) for value in graph.outputs}
    for node in graph:
        scopes = node.metadata_props.get(SCOPES, "[]")
        node.metadata_props.clear()
        parts = [part.strip(" '\"") for part in scopes.strip("[]").split(",")]
        stem = parts[0] if parts and parts[0] else "constant"
        name = f"{stem}/{node.op_type}"
        used[name] = used.get(name, 0) + 1
        node.name = name if used[name] == 1 else f"{name}:{used[name]}"
        for index, value in enumerate(node.outputs):
            value.metadata_props.clear()
            if id(value) not in outputs:
                value.name = node.name if len(node.outputs) == 1 else f"{node.name}.{index}"


def pool_globally(graph: ir.Graph) -> None:
    """A ReduceMean over all spatial axes becomes the GlobalAveragePool that runtimes have an integer kernel for."""
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2 or not node.attributes.get_int("keepdims", 1):
            continue
        source, axes = node.inputs[0], constant(node.inputs[1])
        if source is None or axes is None or source.shape is None:
            continue
        rank = len(source.shape)
        if rank < 3 or {int(a) % rank for a in axes.reshape(-1)} != set(range(2, rank)):
            continue
        name = (node.name or "mean").replace("ReduceMean", "GlobalAveragePool")
        result = node.outputs[0]
        pooled = add(graph, node, "GlobalAveragePool", [source], name, result.shape, source.dtype)
        replace(graph, result, pooled)
        graph.remove(node, safe=True)


def quantize_activations(graph: ir.Graph, model: QuantizedModel) -> None:
    """Markers on activations become QuantizeLinear and DequantizeLinear.

    A format narrower than its container is clipped first: QuantizeLinear saturates at the container's ends only.
    """
    for node in markers(graph):
        site = model.sites[marker_name(node)]
        source = node.inputs[0]
        assert source is not None
        box = container(site.format, site.name)
        scale = initializer(graph, f"{site.name}_scale", site.scale.detach().cpu().numpy().astype(np.float32))
        zero = box.initializer(graph, f"{site.name}_zero_point", site.zero_point.detach().cpu().numpy())
        if not box.exact(site.format):
            source = _clip(graph, node, source, site)
        float_type, shape = node.outputs[0].type, node.outputs[0].shape
        name = node.name or site.name
        axis: dict[str, Any] = (
            {"axis": site.granularity.axis} if isinstance(site.granularity, PerChannel) else {}
        )
        codes = add(
            graph,
            node,
            "QuantizeLinear",
            [source, scale, zero],
            name.replace(MARKER, "QuantizeLinear"),
            shape,
            box.dtype,
            **axis,
        )
        floats = name.replace(MARKER, "DequantizeLinear")
        result = add(graph, node, "DequantizeLinear", [codes, scale, zero], floats, shape, **axis)
        result.type = float_type
        replace(graph, node.outputs[0], result)
        graph.remove(node, safe=True)


def _clip(graph: ir.Graph, node: ir.Node, source: ir.Value, site: FakeQuantize) -> ir.Value:
    low, high = (bound.detach().cpu().numpy().astype(np.float32) for bound in site.range())
    if low.ndim:
        raise ExportError(
            f"site {site.name!r}: activations in {site.format} per channel cannot be written to ONNX, which clips "
            "per tensor; use 4, 8 or 16 bits, or one scale per tensor"
        )
    bounds = [
        initializer(graph, f"{site.name}_{end}", value) for end, value in (("low", low), ("high", high))
    ]
    return add(graph, node, "Clip", [source, *bounds], f"{node.name}/Clip", source.shape, source.dtype)


def absorb_clips(graph: ir.Graph) -> None:
    """Remove a Relu or Clip whose bounds quantize to the ends of the QuantizeLinear that alone reads it.

    Saturation then does the same work, and the kernel before sees its QuantizeLinear directly, as it must.
    """
    for node in reversed(list(graph)):
        if node.op_type not in ("Relu", "Clip"):
            continue
        users = list(node.outputs[0].uses())
        if len(users) != 1 or users[0].node.op_type != "QuantizeLinear" or node.outputs[0] in graph.outputs:
            continue
        scale, zero_point = (constant(value) for value in users[0].node.inputs[1:3])
        bounds = _clip_bounds(node)
        if scale is None or zero_point is None or scale.ndim or bounds is None:
            continue
        ends = np.iinfo(zero_point.dtype)
        codes = np.rint(np.asarray(bounds, np.float32) / scale) + np.float32(zero_point)
        if codes[0] <= ends.min and codes[1] >= ends.max:
            source = node.inputs[0]
            assert source is not None
            replace(graph, node.outputs[0], source)
            graph.remove(node, safe=True)


def detach_clips(graph: ir.Graph) -> None:
    """A Relu or Clip behind a quantized Gemm or MatMul that no QuantizeLinear absorbed becomes a Max and a Min.

    ONNX Runtime takes a Relu into the Gemm before it looks for integer kernels, and waits for a QuantizeLinear behind a
    Clip, behind a MatMul also behind a Relu: what is in front of either would stay float.
    """
    for node in list(graph):
        if node.op_type not in ("Gemm", "MatMul") or any(
            scale_of(value) is None for value in node.inputs[:2]
        ):
            continue
        for clip, _ in list(node.outputs[0].uses()):
            bounds = _clip_bounds(clip)
            if bounds is None or clip.graph is not graph:  # what lies in the body of an If stays as it is
                continue
            value = node.outputs[0]
            for op_type, bound in zip(("Max", "Min"), bounds, strict=True):
                if np.isfinite(bound):
                    name = f"{str(clip.name).removesuffix(f'/{clip.op_type}')}/{op_type}"
                    limit = initializer(graph, f"{name}_limit", np.asarray(bound, np.float32))
                    shape = clip.outputs[0].shape
                    value = add(graph, clip, op_type, [value, limit], name, shape, ir.DataType.FLOAT)
            replace(graph, clip.outputs[0], value)
            graph.remove(clip, safe=True)


def _clip_bounds(node: ir.Node) -> list[float] | None:
    """Between what a Relu or Clip keeps values; None of other nodes, and where a bound is computed."""
    if node.op_type == "Relu":
        return [0.0, np.inf]
    if node.op_type != "Clip":
        return None
    bounds = [-np.inf, np.inf]
    for index, value in enumerate(node.inputs[1:3]):
        if value is not None:
            known = constant(value)
            if known is None:
                return None
            bounds[index] = float(known)
    return bounds


def quantize_biases(graph: ir.Graph, model: QuantizedModel) -> None:
    """Markers on biases become int32 initializers with a DequantizeLinear: kernels add them to their sums of codes."""
    layers = {bias_marker(name): name for name in model.shifts}
    biases = {layer.name: layer.operator.bias for layer in model.layers}
    for node in markers(graph):
        layer = layers.get(marker_name(node))
        if layer is None:
            continue
        (reader,) = (user for user, _ in node.outputs[0].uses())
        steps, bias = model.shifts[layer].steps, biases[layer]
        assert steps is not None and bias is not None
        corrected = model.shifts[layer].corrected(model.weight(str(bias.target)).detach())
        codes, scale = (x.cpu().numpy() for x in (steps.codes(corrected), steps.size()))
        if np.abs(codes).max(initial=0.0) >= 2**31:
            raise RefusedError(
                f"layer {layer!r}: a bias of {float(corrected.abs().max()):.3g} does not fit 32 bits at the scale "
                f"{scale.min():.3g} of its products; calibrate again, which widens such a weight's range"
            )
        replace(graph, node.outputs[0], _dequantized_bias(graph, reader, codes.astype(np.int32), scale))
        graph.remove(node, safe=True)


def protect_float_layers(graph: ir.Graph) -> None:
    """Keep float layers float where quantizers stand on both sides of them.

    ONNX Runtime quantizes the float weight of a Conv or Gemm between a DequantizeLinear and a QuantizeLinear on its
    own, per tensor, unless the bias is no constant. So its bias is stored as int32 with a scale of its own, fine
    enough to lose nothing that float32 holds.
    """
    for node in list(graph):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm") or scale_of(node.inputs[0]) is None:
            continue
        weight = node.inputs[1]
        if weight is None or not is_constant(weight) or scale_of(weight) is not None:
            continue
        bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
        if bias is None:
            assert weight.shape is not None
            groups = node.attributes.get_int("group", 1) if node.op_type == "ConvTranspose" else 1
            bias = np.zeros(weight.shape.numpy()[_output_axis(node)] * groups, np.float32)
        largest = float(np.abs(bias).max(initial=0.0))
        scale = np.asarray(max(largest / (2**31 - 256), SMALLEST), np.float32) if largest else np.float32(1.0)
        codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64))
        value = _dequantized_bias(graph, node, codes, np.asarray(scale))
        if len(node.inputs) < 3:
            node.resize_inputs(3)
        node.replace_input_with(2, value)


def _output_axis(node: ir.Node) -> int:
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", 0) else 1
    return 1 if node.op_type == "ConvTranspose" else 0


def _dequantized_bias(graph: ir.Graph, node: ir.Node, codes: np.ndarray, scale: np.ndarray) -> ir.Value:
    """The result of a new DequantizeLinear of a bias's codes, in front of the layer that adds it."""
    name = f"{node.name}/bias"
    inputs = [
        initializer(graph, f"{name}_quantized", codes.astype(np.int32)),
        initializer(graph, f"{name}_scale", scale),
    ]
    axis: dict[str, Any] = {"axis": 0} if scale.ndim else {}
    return add(
        graph,
        node,
        "DequantizeLinear",
        inputs,
        f"{name}/DequantizeLinear",
        codes.shape,
        ir.DataType.FLOAT,
        **axis,
    )


def shape_biases(graph: ir.Graph) -> None:
    """A bias added to a MatMul of fixed shape gets the product's rank.

    ONNX Runtime turns MatMul + Add of a 1-D bias into Reshape + Gemm before it looks for integer kernels, and the
    Gemm then stays float; with a bias of shape (1, ..., 1, N) it does not. Where a dimension is dynamic it does not
    either, and a 1-D bias can be taken into the GELU or LayerNorm behind it.
    """
    for node in list(graph):
        if node.op_type != "Add" or producer(node.inputs[0], "MatMul") is None:
            continue
        product, bias = node.inputs[0], node.inputs[1]
        values = constant(bias)
        matmul = producer(product, "MatMul")
        assert product is not None and bias is not None and matmul is not None
        if values is None or values.ndim != 1 or product.shape is None or scale_of(matmul.inputs[1]) is None:
            continue
        if not product.shape.is_static():
            continue
        rank = len(product.shape)
        shaped = initializer(
            graph, f"{bias.name}_rank{rank}", values.reshape((1,) * (rank - 1) + values.shape)
        )
        node.replace_input_with(1, shaped)


def add_biases(graph: ir.Graph) -> None:
    """Beside recurrent layers a conv's constant bias becomes an Add behind the conv, where a quantizer reads the conv.

    OpenVINO 2026.4 parts a conv from its bias itself. Where it also reads the conv's shape, as it does for the batch of
    a recurrent layer's state, and a quantizer is behind, the bias that it parted is lost on its way into the quantizer;
    one that is an Add in the file is not. Elsewhere biases stay: one that is an Add in front of reshapes is what it
    computes wrongly (a patch embedding's, 39 dB).
    """
    if not any(node.op_type in ("GRU", "LSTM", "RNN") for node in graph):
        return
    for node in list(graph):
        if node.op_type not in ("Conv", "ConvTranspose") or len(node.inputs) < 3:
            continue
        bias, weight, result = constant(node.inputs[2]), node.inputs[1], node.outputs[0]
        quantized = any(reader.op_type == "QuantizeLinear" for reader in result.consumers())
        if not quantized or bias is None or weight is None or weight.shape is None:
            continue
        name = f"{node.name}/bias"
        shaped = initializer(graph, name, bias.reshape(1, -1, *(1,) * (len(weight.shape) - 2)))
        total = ir.node("Add", [shaped, shaped], name=f"{name}/Add")
        total.outputs[0].shape, total.outputs[0].type, total.outputs[0].name = (
            result.shape,
            result.type,
            total.name,
        )
        graph.insert_after(node, total)
        replace(graph, result, total.outputs[0])
        total.replace_input_with(0, result)
        node.resize_inputs(2)


def quantize_turned(graph: ir.Graph) -> None:
    """The quantizer of attention's keys goes behind the Transpose that the exporter puts between two Reshapes.

    Its scale is one for the tensor, so the codes are the same. OpenVINO turns bytes in more time than floats.
    """
    for turn in list(graph):
        before = producer(turn.inputs[0], "Reshape") if turn.op_type == "Transpose" else None
        readers = turn.outputs[0].consumers()
        if before is None or len(readers) != 1 or readers[0].op_type != "Reshape":
            continue
        marks = _quantizer(before.inputs[0])
        if marks is None:
            continue
        for reader in marks[1].outputs[0].consumers():
            if reader is before or reader.op_type == "Shape":
                reader.replace_input_with(0, marks[0].inputs[0])
        # In front of a further Reshape there are the same codes, and they need be made once.
        reshape = producer(marks[0].inputs[0], "Reshape")
        above = None if reshape is None else _quantizer(reshape.inputs[0])
        if reshape is not None and above is not None and above[1].inputs[1] is marks[1].inputs[1]:
            reshape.replace_input_with(0, above[0].inputs[0])
        last, users = readers[0], list(readers[0].outputs[0].uses())
        for mark in marks:
            node = ir.node(mark.op_type, [last.outputs[0], *mark.inputs[1:]])
            node.name = node.outputs[0].name = f"{readers[0].name}/{mark.op_type}"
            node.outputs[0].shape, node.outputs[0].type = readers[0].outputs[0].shape, mark.outputs[0].type
            graph.insert_after(last, node)
            last = node
        for user, index in users:
            user.replace_input_with(index, last.outputs[0])


def _quantizer(value: ir.Value | None) -> tuple[ir.Node, ir.Node] | None:
    """The QuantizeLinear and the DequantizeLinear that make ``value``, if they have one scale for the tensor."""
    dequantize, scale = producer(value, "DequantizeLinear"), scale_of(value)
    quantize = None if dequantize is None else producer(dequantize.inputs[0], "QuantizeLinear")
    if dequantize is None or quantize is None or scale is None or scale.ndim:
        return None
    return quantize, dequantize
