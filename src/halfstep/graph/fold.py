"""Passes that make the captured graph smaller, or fit for kernels, without changing what it computes.

Weights that the model computes from its parameters, and operators that it computes twice.

Activations split into the parts that a runtime has integer kernels for.

ReLUs that overwrite what they read: no second tensor is written for a value that nobody else sees.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx, nn

from halfstep.graph.batch_norm import fold_batch_norm
from halfstep.graph.capture import unchanged
from halfstep.graph.captured import Captured
from halfstep.graph.operators import WEIGHTED, describe, is_spatial_mean, parameter, store
from halfstep.graph.out_of_place import KEPT
from halfstep.graph.unfold import tensors

aten = torch.ops.aten

#: Nodes that hand their first argument on as it is.
IDENTITIES = frozenset(
    {
        aten.alias.default,
        aten.clone.default,
        aten.detach.default,
        aten.detach_.default,
        aten.dropout.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.lift_fresh_copy.default,
        aten.contiguous.default,
    }
)

VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})

#: Run-time assertions that torch.export leaves in the graph; their shapes were checked at capture.
ASSERTIONS = frozenset(
    {
        aten._assert_tensor_metadata.default,
        aten._assert_scalar.default,
        aten._assert_async.msg,
        aten.sym_constrain_range_for_size.default,
        aten.sym_constrain_range.default,
    }
)


def fold(captured: Captured) -> Captured:
    """Remove identities and dropout, store computed weights, fold every batch norm right behind a conv or linear.

    The graph is changed in place and returned; its outputs stay equal up to float rounding (see
    :data:`halfstep.graph.capture.TOLERANCE`).
    """
    with unchanged(captured, "folding batch norm"):
        remove_identities(captured.graph)
        linear_layers(captured.graph)
        merge_repeated(captured.graph)
        fold_weights(captured)
        keep_pooled_axes(captured.graph)
        one_head(captured.graph)
        before = tensors(captured.module)
        captured.folded += fold_batch_norm(captured)
        clean(captured)
    after, weights = tensors(captured.module), {norm.source_weight for norm in captured.folded}
    for name, tensor in before.items():
        if after.get(name) is not tensor and name not in weights:
            captured.originals[name] = tensor.detach()
    return captured


def remove_identities(graph: fx.Graph) -> None:
    """Bypass :data:`IDENTITIES`, no-op dtype casts and :data:`ASSERTIONS`.

    A copy may be what made its input contiguous, so views of it become reshapes, which do not care.
    """
    for node in list(graph.nodes):
        if node.target in VIEWS:
            node.target = aten.reshape.default
        if node.target in ASSERTIONS:
            graph.erase_node(node)
        elif node.target in IDENTITIES or _is_noop_cast(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def linear_layers(graph: fx.Graph) -> None:
    """``addmm(b, x, W)`` of parameters b and W, as GPT-2's layers are written, becomes a linear layer.

    Its weight is W transposed, which :func:`.fold_weights` then stores: runtimes have an integer kernel with a bias for
    that, and none for a product whose bias is added behind it.
    """
    for node in list(graph.nodes):
        if node.target is not aten.addmm.default or node.kwargs:
            continue
        bias, x, weight = node.args
        if not all(isinstance(each, fx.Node) and each.op == "get_attr" for each in (bias, weight)):
            continue
        with graph.inserting_before(node):
            turned = graph.call_function(aten.t.default, (weight,))
            layer = graph.call_function(aten.linear.default, (x, turned, bias))
        turned.meta = {**node.meta, "val": weight.meta["val"].t()}
        layer.meta = dict(node.meta)
        node.replace_all_uses_with(layer)
        graph.erase_node(node)


def keep_pooled_axes(graph: fx.Graph) -> None:
    """A mean over the spatial axes becomes a mean that keeps them, and a flatten.

    The mean alone is a global pool, which runtimes have integer kernels for; the flatten only moves codes about.
    """
    for node in list(graph.nodes):
        if (
            node.target is not aten.mean.dim
            or not is_spatial_mean(node)
            or (len(node.args) > 2 and node.args[2])
        ):
            continue
        source, axes = node.args[:2]
        with graph.inserting_before(node):
            pooled = graph.call_function(aten.mean.dim, (source, axes, True), dict(node.kwargs))
            flat = graph.call_function(aten.flatten.using_ints, (pooled, 1))
        value = node.meta["val"]
        kept = value.reshape(*value.shape, *[1] * len(axes))
        pooled.meta = {**node.meta, "val": kept}
        flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat)
        graph.erase_node(node)


def one_head(graph: fx.Graph) -> None:
    """Attention over (batch, tokens, channels), without a dimension of heads, gets one of size 1 for the time being.

    ONNX's translation, and what follows attention's channels, know (batch, heads, tokens, channels) alone.
    """
    heads = -3
    for node in list(graph.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or node.meta["val"].dim() != 3:
            continue
        with graph.inserting_before(node):
            for operand in dict.fromkeys(node.all_input_nodes):  # queries, keys, values and a mask
                wide, rank = operand, operand.meta["val"].dim()
                # Without a batch it is the same for each example: queries that are learned, a mask, which broadcasts.
                wanted = 4 if operand in node.args[:3] else 2
                for place in [heads] if rank == 3 else [0] * (wanted - rank):
                    value = wide.meta["val"].unsqueeze(place)
                    wide = graph.call_function(aten.unsqueeze.default, (wide, place))
                    wide.meta = {**node.meta, "val": value}
                node.replace_input_with(operand, wide)
        with graph.inserting_after(node):
            narrow = graph.call_function(aten.squeeze.dim, (node, heads))
        narrow.meta = dict(node.meta)
        node.meta["val"] = node.meta["val"].unsqueeze(heads)
        node.replace_all_uses_with(narrow, delete_user_cb=lambda user, own=narrow: user is not own)


def _is_noop_cast(node: fx.Node) -> bool:
    if node.target not in (aten._to_copy.default, aten.to.dtype):
        return False
    source, value = node.args[0], node.meta.get("val")
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(before, torch.Tensor) or not isinstance(value, torch.Tensor):
        return False
    return before.dtype == value.dtype and before.device == value.device


def clean(captured: Captured) -> None:
    """Drop dead nodes and the parameters, buffers and submodules that nothing reads any more."""
    graph, module = captured.graph, captured.module
    graph.eliminate_dead_code()
    used = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    for name, owner in list(module.named_modules()):
        prefix = f"{name}." if name else ""
        for table in (owner._parameters, owner._buffers):
            for key in list(table):
                if prefix + key not in used:
                    del table[key]
    _drop_empty(module)
    graph.lint()


def _drop_empty(module: nn.Module) -> bool:
    for name, child in list(module._modules.items()):
        if isinstance(child, fx.GraphModule):  # the body of a branch
            continue
        if child is None or _drop_empty(child):
            del module._modules[name]
    return not (module._modules or module._parameters or module._buffers)


def fold_weights(captured: Captured) -> None:
    """A weight or bias that is computed from parameters alone (weight norm, say) becomes a parameter of its own.

    It is called after the layer that reads it: ``conv.weight`` for the conv at ``conv``.
    """
    for node in list(captured.graph.nodes):
        op = describe(node)
        if op is None or op.kind not in WEIGHTED:
            continue
        for index, leaf in ((WEIGHTED[op.kind], "weight"), (2, "bias")):
            source = node.args[index] if index < len(node.args) else None
            if not isinstance(source, fx.Node) or source.op != "call_function" or not _constant(source):
                continue
            stack = list(node.meta.get("nn_module_stack", {}).values())
            path = stack[-1][0].split("@")[0] if stack else ""
            with torch.no_grad(), captured.graph.inserting_before(node):
                value = _value(captured.module, source)
                assert isinstance(value, torch.Tensor)
                folded = store(captured, f"{path}.{leaf}" if path else leaf, value, None)
            node.args = (*node.args[:index], folded, *node.args[index + 1 :])


def _constant(node: fx.Node) -> bool:
    inputs = node.all_input_nodes
    return node.op == "get_attr" or (
        node.op == "call_function" and bool(inputs) and all(map(_constant, inputs))
    )


def _value(module: nn.Module, node: fx.Node) -> Any:
    if node.op == "get_attr":
        return parameter(module, node)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _value(module, source))
    operation: Any = node.target
    return operation(*args, **kwargs)


def merge_repeated(graph: fx.Graph) -> None:
    """An operator applied twice to the same values is computed once.

    Runtimes merge such operators by themselves, and then find two quantizers behind one result.
    """
    seen: dict[tuple[object, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr" and (node.op != "call_function" or describe(node) is None):
            continue
        key = (node.op, node.target, repr(node.args), repr(node.kwargs))  # a node's repr is its unique name
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


#: Kinds that are their input times a gate of it, with the gate.
GATES = {"silu": aten.sigmoid.default, "hardswish": aten.hardsigmoid.default}


def decompose(captured: Captured, kinds: Collection[str]) -> Captured:
    """Write ``x * sigmoid(x)`` for SiLU and ``x * hardsigmoid(x)`` for HardSwish.

    The graph is changed in place and returned; its outputs stay equal up to float rounding.

    Args:
        captured: a captured, folded graph.
        kinds: which of :data:`GATES` to split; others are left alone.
    """
    graph = captured.graph
    found = [(node, op) for node in graph.nodes if (op := describe(node)) is not None]
    split = [(node, op) for node, op in found if op.kind in kinds and op.kind in GATES]
    if not split:
        return captured
    with unchanged(captured, "splitting activations"):
        for node, op in split:
            source = op.inputs[0]
            with graph.inserting_before(node):
                gate = graph.call_function(GATES[op.kind], (source,))
                product = graph.call_function(aten.mul.Tensor, (source, gate))
            # Two nodes of one module: each is named after its kind in it.
            stack = {key: (path, "halfstep.Gate") for key, (path, _) in node.meta["nn_module_stack"].items()}
            gate.meta = product.meta = {**node.meta, "nn_module_stack": stack}
            product.meta = dict(gate.meta)
            node.replace_all_uses_with(product)
            graph.erase_node(node)
        graph.lint()
    return captured


#: Kinds that make a tensor of their own and whose gradients do not need it.
MAKERS = frozenset({"conv", "conv_transpose", "linear", "add"})


def overwrite(graph: fx.Graph) -> fx.Graph:
    """Let every ReLU work in place that alone reads the result of one of :data:`MAKERS`.

    Quantizers may do so, too, where they alone read what an operator has made anew; they do without gradients.

    The graph is changed in place and returned. It computes the same, forwards and backwards.
    """
    for node in graph.nodes:
        if node.target is aten.relu.default and _made_for(node, node.args[0]):
            node.target = aten.relu_.default
        elif node.op == "call_module" and _made_anew(node.args[0]) and set(node.args[0].users) == {node}:
            node.kwargs = {"overwrite": True}
    return graph


def _made_anew(value: fx.Node) -> bool:
    """Whether nothing shares the memory of a value, as far as nothing but its readers was told of it."""
    return value.target in KEPT or value.target is aten.relu_.default


def read_late(graph: fx.Graph) -> fx.Graph:
    """Let parameters be read, and what is made of them alone be computed, right before their first reader.

    Else every quantized weight would be alive from the beginning of a pass. The graph is changed in place and returned.
    """
    fixed: set[fx.Node] = set()
    for node in graph.nodes:
        sources = node.all_input_nodes
        made = node.op in ("call_function", "call_module") and bool(sources)
        if node.op == "get_attr" or (made and fixed.issuperset(sources)):
            fixed.add(node)
    for node in reversed([node for node in graph.nodes if node in fixed and node.users]):
        min(node.users).prepend(node)
    graph.lint()
    return graph


def _made_for(reader: fx.Node, value: fx.Node) -> bool:
    op = describe(value)
    return op is not None and op.kind in MAKERS and set(value.users) == {reader}
