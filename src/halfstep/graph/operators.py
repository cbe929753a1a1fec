"""What a node of the ATen graph is, in the words of the deployment tables.

A *kind* is a word such as ``"conv"`` or ``"add"``: what a runtime has (or lacks) an integer kernel for. Everything
that decides about quantization reads kinds; only this file knows ATen's names.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

aten = torch.ops.aten

_KINDS: dict[object, str] = {
    aten.conv1d.default: "conv",
    aten.conv2d.default: "conv",
    aten.conv3d.default: "conv",
    aten.conv1d.padding: "conv",
    aten.conv2d.padding: "conv",
    aten.conv3d.padding: "conv",
    aten.conv_transpose1d.default: "conv_transpose",
    aten.conv_transpose2d.input: "conv_transpose",
    aten.conv_transpose3d.input: "conv_transpose",
    aten.linear.default: "linear",
    aten.matmul.default: "matmul",
    aten.bmm.default: "matmul",
    aten.mm.default: "matmul",
    aten.embedding.default: "embedding",
    aten.add.Tensor: "add",
    aten.mul.Tensor: "mul",
    aten.sub.Tensor: "sub",
    aten.div.Tensor: "div",
    aten.cat.default: "concat",
    aten.relu.default: "relu",
    aten.relu6.default: "clip",
    aten.hardtanh.default: "clip",
    aten.clamp.default: "clip",
    aten.clamp_min.default: "clip",
    aten.leaky_relu.default: "leaky_relu",
    aten.sigmoid.default: "sigmoid",
    aten.softmax.int: "softmax",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.gelu.default: "gelu",
    aten.tanh.default: "tanh",
    aten.layer_norm.default: "layer_norm",
    aten.scaled_dot_product_attention.default: "attention",
    aten.max_pool1d.default: "max_pool",
    aten.max_pool2d.default: "max_pool",
    aten.max_pool3d.default: "max_pool",
    aten.avg_pool1d.default: "average_pool",
    aten.avg_pool2d.default: "average_pool",
    aten.avg_pool3d.default: "average_pool",
    aten.upsample_nearest2d.vec: "resize_nearest",
    aten.upsample_bilinear2d.vec: "resize_linear",
    aten.pad.default: "pad",
    aten.constant_pad_nd.default: "pad",
    aten.reshape.default: "reshape",
    aten.flatten.using_ints: "reshape",
    aten.unsqueeze.default: "reshape",
    aten.squeeze.default: "reshape",
    aten.squeeze.dim: "reshape",
    aten.squeeze.dims: "reshape",
    aten.permute.default: "transpose",
    aten.transpose.int: "transpose",
    aten.t.default: "transpose",
    aten.slice.Tensor: "slice",
    aten.select.int: "slice",
    aten.expand.default: "expand",
    aten.unbind.int: "split",
    aten.split.Tensor: "split",
    aten.split_with_sizes.default: "split",
    aten.chunk.default: "split",
    aten._native_batch_norm_legit_no_training.default: "batch_norm",
    operator.getitem: "item",
}

_GLOBAL_POOLS = frozenset(
    {aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default}
)

#: Kinds that read a weight (when it is a parameter), and which argument it is.
WEIGHTED = {"conv": 1, "conv_transpose": 1, "linear": 1, "matmul": 1, "embedding": 0}


#: In a node's ``meta``: it is part of an operator that is computed as a whole, whose kind this is where its result is
#: read from outside, and empty inside of it.
WHOLE = "whole"


@dataclass(frozen=True)
class Operator:
    """A node as the deployment tables see it.

    Attributes:
        node: the node itself.
        kind: the table's word for it; ATen's name where no table has one.
        inputs: the activations it reads (float tensors that are no parameters), once each, in order.
        weight: the ``get_attr`` node of its weight, if it has one.
        bias: the ``get_attr`` node of its bias, if it has one.
    """

    node: fx.Node
    kind: str
    inputs: tuple[fx.Node, ...]
    weight: fx.Node | None = None
    bias: fx.Node | None = None


def describe(node: fx.Node) -> Operator | None:
    """The operator that ``node`` is; None for placeholders, parameters, outputs and integer arithmetic.

    Of several that are one whole (see :data:`WHOLE`) only what is read from outside is one, without a weight.
    """
    if node.op != "call_function" or not _is_float(node) or node.meta.get(WHOLE) == "":
        return None
    kind = node.meta.get(WHOLE) or _kind(node)
    weight = bias = None
    if kind in WEIGHTED:
        weight = _constant(node.args[WEIGHTED[kind]])
        biased = kind not in ("matmul", "embedding") and len(node.args) > 2
        bias = _constant(node.args[2]) if biased else None
    activations = dict.fromkeys(n for n in node.all_input_nodes if _is_float(n) and n.op != "get_attr")
    return Operator(node, kind, tuple(activations), weight, bias)


def constant_operands(node: fx.Node) -> bool:
    """Whether an add or mul takes a number or a parameter beside its activation."""
    return sum(isinstance(a, fx.Node) and a.op != "get_attr" and _is_float(a) for a in node.args[:2]) < 2


def weight_axis(op: Operator) -> int:
    """The axis of the weight's output channels."""
    if op.kind == "conv_transpose":
        return 1
    return -1 if op.kind == "matmul" else 0


def input_axis(op: Operator) -> int:
    """The axis of the weight along which products are summed (the first of them), or along a table's rows."""
    if op.kind == "conv_transpose":
        return 0
    return -2 if op.kind == "matmul" else 1


def is_depthwise(op: Operator) -> bool:
    """Whether a conv makes each of its output channels of one input channel, and of each input channel one."""
    if op.kind != "conv" or op.weight is None:
        return False
    outputs, inputs = op.weight.meta["val"].shape[:2]
    return bool(inputs == 1 and outputs == op.inputs[0].meta["val"].shape[1])


def _kind(node: fx.Node) -> str:
    if node.target in _GLOBAL_POOLS:
        size = node.args[1]
        ones = size == 1 or (isinstance(size, (list, tuple)) and all(s == 1 for s in size))
        return "global_average_pool" if ones else "adaptive_average_pool"
    if node.target is aten.mean.dim:
        return "global_average_pool" if is_spatial_mean(node) else "mean"
    name = getattr(node.target, "_schema", None)
    return _KINDS.get(node.target, name.name.removeprefix("aten::") if name else str(node.target))


def is_spatial_mean(node: fx.Node) -> bool:
    """Whether a mean runs over all axes but the batch and the channels."""
    source, dims = node.args[0], node.args[1]
    if not isinstance(source, fx.Node) or not isinstance(dims, (list, tuple)):
        return False
    rank = source.meta["val"].dim()
    return rank >= 3 and {d % rank for d in dims if isinstance(d, int)} == set(range(2, rank))


def _is_float(node: fx.Node) -> bool:
    """Whether a node makes float32, which is what is quantized; other float types stay as the code has them."""
    value = node.meta.get("val")
    if isinstance(value, (list, tuple)):
        value = value[0] if value else None
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def _constant(argument: object) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) and argument.op == "get_attr" else None
