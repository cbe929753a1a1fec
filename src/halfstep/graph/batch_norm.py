"""Batch norms that become part of the conv or linear layer before them."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from halfstep.graph.captured import Captured
from halfstep.graph.operators import parameter, store, trainable
from halfstep.graph.unfold import FoldedNorm

aten = torch.ops.aten

CONVOLUTIONS = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv3d.default,
        aten.conv1d.padding,
        aten.conv2d.padding,
        aten.conv3d.padding,
    }
)


TRANSPOSED = frozenset(
    {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}
)


def fold_batch_norm(captured: Captured) -> list[FoldedNorm]:
    """Fold batch norms into the conv or linear before them, in float64.

    ``W' = W * g / sqrt(var + eps)`` per output channel, ``b' = beta + (b - mean) * g / sqrt(var + eps)``; with no
    affine g = 1 and beta = 0, with no conv bias b = 0. A conv whose output is also read elsewhere keeps its batch
    norm. A weight used by several layers is folded into a copy of its own for each different batch norm.

    Returns:
        A record of every layer and batch norm that became one.
    """
    records: list[FoldedNorm] = []
    folded: dict[tuple[str, ...], tuple[fx.Node, fx.Node]] = {}
    for node in list(captured.graph.nodes):
        if node.target is not aten._native_batch_norm_legit_no_training.default:
            continue
        source = node.args[0]
        if not _can_fold(source) or set(node.users) - {u for u in node.users if _is_first_item(u)}:
            continue
        record = _fold_one(captured, source, node, folded)
        records += [record] if record else []
    return records


def _can_fold(source: Any) -> bool:
    if not isinstance(source, fx.Node) or len(source.users) != 1:
        return False
    if source.target is aten.linear.default:
        if source.meta["val"].dim() != 2:  # batch norm works on dimension 1, linear's outputs lie on the last
            return False
    elif source.target not in CONVOLUTIONS | TRANSPOSED:
        return False
    weight = source.args[1]
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def _node(argument: object) -> fx.Node | None:
    return argument if isinstance(argument, fx.Node) else None


def _groups(transposed: fx.Node) -> int:
    """The groups of a transposed conv: (input, weight, bias, stride, padding, output_padding, groups, dilation)."""
    groups = transposed.args[6] if len(transposed.args) > 6 else 1
    assert isinstance(groups, int)
    return groups


def _is_first_item(user: fx.Node) -> bool:
    return user.target is operator.getitem and user.args[1:] == (0,)


def _fold_one(
    captured: Captured, source: fx.Node, norm: fx.Node, folded: dict[tuple[str, ...], tuple[fx.Node, fx.Node]]
) -> FoldedNorm | None:
    """Fold ``norm`` into ``source``; None if the same two were folded before, for another use of them."""
    gain, shift, mean_node, variance = (_node(argument) for argument in norm.args[1:5])
    epsilon = norm.args[6]
    graph, module = captured.graph, captured.module
    weight_node, bias_node = _node(source.args[1]), _node(source.args[2]) if len(source.args) > 2 else None
    assert weight_node is not None
    assert isinstance(epsilon, float)
    parts = (weight_node, bias_node, gain, shift, mean_node, variance)
    key = (*(str(part.target) if part is not None else "" for part in parts), str(epsilon))
    record = None
    if key not in folded:
        weight = parameter(module, weight_node)
        bias, g, b, mu, var = (
            parameter(module, part).double() if part is not None else None
            for part in (bias_node, gain, shift, mean_node, variance)
        )
        assert mean_node is not None and mu is not None and var is not None
        factor = (var + epsilon).rsqrt()
        if g is not None:
            factor = factor * g
        transposed = source.target in TRANSPOSED
        shape = [1] * weight.dim()
        groups = _groups(source) if transposed else 1
        if transposed:  # weight is (in, out / groups, ...): channel c of group k meets rows of group k only
            per_row = factor.view(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1)
            scale = per_row.reshape(weight.shape[0], -1, *shape[2:])
        else:
            scale = factor.view(-1, *shape[1:])
        new_bias = -mu * factor if bias is None else (bias - mu) * factor
        if b is not None:
            new_bias = new_bias + b
        stem = str(weight_node.target).rpartition(".")[0]
        new_weight = (weight.double() * scale).to(weight.dtype)
        with graph.inserting_before(source):
            folded[key] = (
                store(
                    captured,
                    str(weight_node.target),
                    new_weight,
                    weight_node,
                    requires_grad=trainable(module, weight_node),
                ),
                store(
                    captured,
                    f"{stem}.bias" if stem else "bias",
                    new_bias.to(weight.dtype),
                    bias_node,
                    requires_grad=trainable(module, shift or bias_node or weight_node),
                ),
            )
        weight_name, bias_name = (str(node.target) for node in folded[key])
        record = FoldedNorm(
            weight=weight_name,
            bias=bias_name,
            source_weight=str(weight_node.target),
            shift=str(shift.target) if shift is not None else None,
            mean=str(mean_node.target),
            factor=scale,
            channels=factor,
            offset=-mu if bias is None else bias - mu,
        )
    new_weight_node, new_bias_node = folded[key]
    source.args = (source.args[0], new_weight_node, new_bias_node, *source.args[3:])
    for user in list(norm.users):
        user.replace_all_uses_with(source)
        graph.erase_node(user)
    graph.erase_node(norm)
    return record
