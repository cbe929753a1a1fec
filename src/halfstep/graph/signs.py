"""Which values can never be negative, by what computes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from halfstep.graph.operators import Operator

aten = torch.ops.aten

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
