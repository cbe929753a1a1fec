"""Operators that run along axes: sums, extremes, softmax, order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.onnx_in.table import Node, axes, number, operator, plain, tensor, unsupported


def _prod(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    for dim in sorted((d % x.dim() for d in dims), reverse=True):
        x = torch.prod(x, dim, keepdim=keep)
    return x


def _sum(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.sum(x, dims, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, dims: list[int], keep: bool) -> Tensor:
    return torch.mean(x, dims, keepdim=keep)


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": _mean,
    "ReduceSum": _sum,
    "ReduceMax": lambda x, dims, keep: _extreme(torch.amax, x, dims, keep),
    "ReduceMin": lambda x, dims, keep: _extreme(torch.amin, x, dims, keep),
    "ReduceProd": _prod,
    "ReduceL1": lambda x, dims, keep: _sum(x.abs(), dims, keep),
    "ReduceL2": lambda x, dims, keep: _sum(x * x, dims, keep).sqrt(),
    "ReduceSumSquare": lambda x, dims, keep: _sum(x * x, dims, keep),
    "ReduceLogSum": lambda x, dims, keep: _sum(x, dims, keep).log(),
    "ReduceLogSumExp": lambda x, dims, keep: torch.logsumexp(x, dims, keepdim=keep),
}


def _extreme(function: Callable[..., Tensor], x: Tensor, dims: list[int], keep: bool) -> Tensor:
    if x.dtype is torch.bool:
        return function(x.to(torch.uint8), dims, keepdim=keep).bool()
    return function(x, dims, keepdim=keep)


@operator(*_REDUCTIONS)
def reduction(node: Node, x: Any, given: Any = None) -> Tensor:
    """Over the axes given, or all."""
    x = tensor(x)
    dims = axes(node, given)
    if not dims:
        if node.get("noop_with_empty_axes", 0):
            return _REDUCTIONS[node.op_type](x[None], [0], False)
        dims = list(range(x.dim()))
    if not x.dim():
        return _REDUCTIONS[node.op_type](x[None], [0], False)
    return _REDUCTIONS[node.op_type](x, dims, bool(node.get("keepdims", 1)))


@operator("ArgMax", "ArgMin")
def extreme(node: Node, x: Tensor) -> Tensor:
    """Where the extreme is, the first of equal ones."""
    function = torch.argmax if node.op_type == "ArgMax" else torch.argmin
    axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
    if node.get("select_last_index", 0):
        return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)
    return function(x, axis, keepdim=keep)


@operator("Softmax")
def softmax(node: Node, x: Tensor) -> Tensor:
    """Along one axis."""
    return torch.softmax(x, node.get("axis", -1))


@operator("LogSoftmax")
def log_softmax(node: Node, x: Tensor) -> Tensor:
    """Along one axis."""
    return torch.log_softmax(x, node.get("axis", -1))


@operator("Hardmax")
def hardmax(node: Node, x: Tensor) -> Tensor:
    """1 at the first largest, else 0."""
    axis = node.get("axis", -1)
    best = torch.argmax(x, axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, best, 1.0)


@operator("CumSum")
def cumulative_sum(node: Node, x: Tensor, axis: Any) -> Tensor:
    """Of all before, oneself included or not, from either end."""
    dim, reverse = number(axis, "axis"), node.get("reverse", 0)
    total = (x.flip(dim) if reverse else x).cumsum(dim, dtype=x.dtype)
    total = total.flip(dim) if reverse else total
    return total - x if node.get("exclusive", 0) else total


@operator("TopK")
def top(node: Node, x: Tensor, count: Any = None) -> tuple[Tensor, Tensor]:
    """The largest or smallest, and where they are, of equal ones the first."""
    k = node.get("k") if count is None else number(count, "count")
    dim = node.get("axis", -1)
    values, places = torch.sort(x, dim=dim, descending=bool(node.get("largest", 1)), stable=True)
    return values.narrow(dim, 0, k), places.narrow(dim, 0, k)


@operator("LpNormalization")
def lp_normalization(node: Node, x: Tensor) -> Tensor:
    """Divided by its norm along an axis."""
    p, axis = node.get("p", 2), node.get("axis", -1)
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


@operator("MeanVarianceNormalization")
def mean_variance(node: Node, x: Tensor) -> Tensor:
    """Mean 0 and variance 1 over axes."""
    dims = list(node.get("axes", (0, 2, 3)))
    centred = x - x.mean(dims, keepdim=True)
    return centred / ((centred * centred).mean(dims, keepdim=True).sqrt() + 1e-9)


@operator("LRN")
def local_response(node: Node, x: Tensor) -> Tensor:
    """Divided by a power of the squares of neighbouring channels."""
    size = node.get("size")
    if size % 2 == 0:
        raise unsupported(f"LRN over an even number of channels ({size})")
    return F.local_response_norm(
        x, size, node.get("alpha", 1e-4), node.get("beta", 0.75), node.get("bias", 1.0)
    )


plain({"Det": torch.linalg.det})
