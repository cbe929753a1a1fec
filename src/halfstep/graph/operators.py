"""What a node of the ATen graph is: in the words of the deployment tables, by parameter, sign, place and name.

A *kind* is a word such as ``"conv"`` or ``"add"``: what a runtime has (or lacks) an integer kernel for. Everything
that decides about quantization reads kinds; only this file knows ATen's names.

Reading and replacing the parameters that a graph's ``get_attr`` nodes name.

Which values can never be negative, by what computes them.

The first and the last of a network's layers.

Readable names for nodes: the module path in the user's model, and the operation where the path alone is not one.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn

from halfstep.graph.captured import Captured

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


def attends_to_all(attention: fx.Node) -> bool:
    """Whether a scaled dot-product attention is one by itself, not part of a whole, and leaves no keys out."""
    named = (attention.kwargs.get(name) for name in ("attn_mask", "dropout_p", "is_causal"))
    return WHOLE not in attention.meta and not any(attention.args[3:]) and not any(named)


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


def parameter(module: nn.Module, node: fx.Node) -> torch.Tensor:
    """The tensor that a ``get_attr`` node reads, detached."""
    owner, _, name = str(node.target).rpartition(".")
    tensor = getattr(module.get_submodule(owner), name)
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach()


def trainable(module: nn.Module, node: fx.Node) -> bool:
    """Whether the tensor that a ``get_attr`` node reads is a parameter that the user lets train."""
    owner, _, name = str(node.target).rpartition(".")
    return bool(getattr(module.get_submodule(owner), name).requires_grad)


def store(
    captured: Captured, wanted: str, value: torch.Tensor, old: fx.Node | None, requires_grad: bool = True
) -> fx.Node:
    """Store ``value`` under ``wanted`` and return a new ``get_attr`` node for it, at the graph's insertion point.

    Where ``wanted`` is read by any node but ``old`` with its one user, a number is appended instead: what another
    layer reads is never overwritten. Where no module holds tensors there (nodes of a file are called as they like), the
    dots are no borders of modules.
    """
    graph, module = captured.graph, captured.module
    try:
        module.get_submodule(wanted.rpartition(".")[0])
    except AttributeError:
        wanted = wanted.replace(".", "_")
    readers: list[fx.Node] = [n for n in graph.nodes if n.op == "get_attr" and n.target == wanted]
    taken = any(node is not old or len(node.users) > 1 for node in readers)
    name, count = wanted, 1
    while taken or (name != wanted and _exists(module, name)):
        taken, count = False, count + 1
        name = f"{wanted}_{count}"
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    for table in (owner._parameters, owner._buffers):
        table.pop(leaf, None)
    if hasattr(owner, leaf):  # a plain attribute, such as ``bias = None``
        delattr(owner, leaf)
    owner.register_parameter(leaf, nn.Parameter(value.contiguous(), requires_grad=requires_grad))
    node = graph.get_attr(name)
    node.meta["val"] = value
    return node


def _exists(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return hasattr(module.get_submodule(owner), leaf)


#: Kinds whose results are never negative.
NONNEGATIVE = frozenset({"relu", "sigmoid", "hardsigmoid", "softmax"})

#: Kinds whose results are never negative where none of their inputs is.
KEEPING = frozenset(
    {
        "add",
        "mul",
        "concat",
        "max_pool",
        "average_pool",
        "global_average_pool",
        "mean",
        "reshape",
        "transpose",
        "slice",
        "expand",
        "split",
        "item",
        "resize_nearest",
        "resize_linear",
    }
)


def nonnegative(value: fx.Node, operators: Mapping[fx.Node, Operator]) -> bool:
    """Whether ``value`` can never be negative; False where the graph alone does not tell.

    Args:
        value: a node.
        operators: what the graph's nodes are.
    """
    op = operators.get(value)
    if op is None:
        return False
    if op.kind == "clip":
        return _lower_bound(value) >= 0 or all(nonnegative(source, operators) for source in op.inputs)
    if op.kind in KEEPING:
        factors = [argument for argument in value.all_input_nodes if argument.op == "get_attr"]
        constants = [a for a in value.args[:2] if isinstance(a, (int, float)) and a < 0]
        settled = not factors and (op.kind not in ("add", "mul") or not constants)
        return settled and all(nonnegative(source, operators) for source in op.inputs)
    return op.kind in NONNEGATIVE


def _lower_bound(clip: fx.Node) -> float:
    """The constant lower bound of a clip; minus infinity where there is none."""
    if clip.target is aten.relu6.default:
        return 0.0
    default = -1.0 if clip.target is aten.hardtanh.default else None
    bound = clip.args[1] if len(clip.args) > 1 else clip.kwargs.get("min", default)
    return float(bound) if isinstance(bound, (int, float)) else float("-inf")


def ends(graph: fx.Graph, layers: Collection[fx.Node]) -> set[fx.Node]:
    """The layers that no other layer stands before, and those that none stands behind.

    A network with several inputs or heads has several of them.

    Args:
        graph: topologically ordered, as fx graphs are.
        layers: its weighted operators.
    """
    behind: set[fx.Node] = set()  # nodes that some layer stands before
    for node in graph.nodes:
        if any(source in behind or source in layers for source in node.all_input_nodes):
            behind.add(node)
    before: set[fx.Node] = set()  # nodes that some layer stands behind
    for node in reversed(graph.nodes):
        if any(user in before or user in layers for user in node.users):
            before.add(node)
    return {node for node in layers if node not in behind or node not in before}


#: The module that stands for a node of an ONNX file.
ONNX_NODE = "halfstep.onnx_in.network.Call"


def readable_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """A unique name for every placeholder and call of ``graph``.

    A node of a leaf module of torch (``nn.Conv2d``), or of what stands for a node of an ONNX file, is called by the
    module's path, ``layer1.0.conv1``; any other by the path of the module whose code calls it and its kind,
    ``layer1.0.add``. A second call of the same gets ``:2`` and so on.
    """
    names: dict[fx.Node, str] = {}
    count: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
        elif node.op == "call_function":
            name = _name(node)
        else:
            continue
        count[name] = count.get(name, 0) + 1
        names[node] = name if count[name] == 1 else f"{name}:{count[name]}"
    return names


def _name(node: fx.Node) -> str:
    op = describe(node)
    kind = op.kind if op else node.name
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return kind
    path, owner = stack[-1]
    leaf = isinstance(owner, str) and (owner.startswith("torch.nn.modules.") or owner == ONNX_NODE)
    path = path.split("@")[0]  # torch marks the second call of a shared module by "@1"
    if owner == ONNX_NODE and any(_path(user) == path for user in node.users):
        return f"{path}.{kind}"  # what the node makes has its name, what it makes that of has not
    if leaf and path and "container" not in owner and "MultiheadAttention" not in owner:
        return str(path)
    return f"{path}.{kind}" if path else kind


def _path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).split("@")[0] if stack else ""
