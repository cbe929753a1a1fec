"""Shape arithmetic on the host: the few operators that shapes go through between a Shape and a Reshape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from halfstep.onnx_in.table import Node, axes, ints

#: ONNX's numbers of the integer types, in all of which shapes are computed alike.
_INTEGERS = frozenset({2, 3, 4, 5, 6, 7, 12, 13})


def _squeeze(node: Node, x: np.ndarray, given: Any = None) -> np.ndarray:
    dims = axes(node, given)
    return (
        x.reshape(())
        if x.size == 1 and dims is None
        else np.squeeze(x, None if dims is None else tuple(dims))
    )


def _unsqueeze(node: Node, x: np.ndarray, given: Any = None) -> np.ndarray:
    return np.expand_dims(x, tuple(axes(node, given) or ()))


def _gather(node: Node, x: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return _array(np.take(x, indices.astype(np.int64), node.get("axis", 0)))


def _slice(
    node: Node, x: np.ndarray, starts: Any = None, ends: Any = None, given: Any = None, steps: Any = None
) -> Any:
    first = ints(node.get("starts") if starts is None else starts, "starts")
    last = ints(node.get("ends") if ends is None else ends, "ends")
    dims = axes(node, given) or range(len(first))
    strides = [1] * len(first) if steps is None else ints(steps, "steps")
    for start, end, dim, step in zip(first, last, dims, strides, strict=True):
        x = x[(slice(None),) * (dim % x.ndim) + (slice(start, end, step),)]
    return x


def _cast(node: Node, x: np.ndarray) -> np.ndarray | None:
    return x if node.get("to") in _INTEGERS else None


def _where(_: Node, condition: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return _array(np.where(condition.astype(bool), a.astype(object), b.astype(object)))


def _equal(_: Node, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    pairs = np.broadcast_arrays(a.astype(object), b.astype(object))
    flat = [_same(x, y) for x, y in zip(*(pair.reshape(-1) for pair in pairs), strict=True)]
    return np.asarray(flat, bool).reshape(pairs[0].shape)


def _same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal; a symbol never equals -1 or 0, which stand for other things."""
    if isinstance(b, torch.SymInt) and not isinstance(a, torch.SymInt):
        a, b = b, a
    if isinstance(a, torch.SymInt) and not isinstance(b, torch.SymInt) and b <= 0:
        return False
    return bool(a == b)


def _split(node: Node, x: np.ndarray, given: Any = None) -> tuple[np.ndarray, ...]:
    sizes = node.get("split") if given is None else ints(given, "sizes")
    if sizes is None:
        return tuple(np.array_split(x, len(node.outputs)))
    return tuple(np.split(x, np.cumsum(sizes)[:-1]))


def _filled(node: Node, sizes: np.ndarray) -> np.ndarray | None:
    """Numbers for shape arithmetic only: a tensor of sizes that may vary is one of the network's."""
    counts = ints(sizes, "sizes")
    value = node.get("value")
    if value is None or len(counts) > 1 or any(isinstance(count, torch.SymInt) for count in counts):
        return None
    array = np.asarray(value)
    return np.full(counts, array.reshape(-1)[0]) if array.dtype.kind == "i" else None


def _product(node: Node, x: np.ndarray, *_: Any) -> np.ndarray:
    total: Any = 1
    for each in x.reshape(-1):
        total = total * each
    result = np.empty((1,) * x.ndim if node.get("keepdims", 1) else (), object)
    result[...] = total
    return result


_HOST: dict[str, Callable[..., Any]] = {
    "Add": lambda _, a, b: _array(a.astype(object) + b.astype(object)),
    "Cast": _cast,
    "Concat": lambda node, *xs: np.concatenate([x.astype(object) for x in xs], node.get("axis")),
    "ConstantOfShape": _filled,
    "Div": lambda _, a, b: _array(a.astype(object) // b.astype(object)),
    "Equal": _equal,
    "Gather": _gather,
    "Identity": lambda _, x: x,
    "Mod": lambda _, a, b: _array(a.astype(object) % b.astype(object)),
    "Mul": lambda _, a, b: _array(a.astype(object) * b.astype(object)),
    "ReduceProd": _product,
    "Reshape": lambda _, x, sizes: x.reshape([int(size) for size in ints(sizes, "sizes")]),
    "Shape": lambda _, x: np.asarray(x.shape, np.int64),
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": lambda _, a, b: _array(a.astype(object) - b.astype(object)),
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}


def on_host(node: Node, inputs: tuple[Any, ...]) -> Any:
    """What a node makes of host arrays, on the host; None where it is to be computed with tensors."""
    if node.domain or node.op_type not in _HOST:
        return None
    given = [x for x in inputs if x is not None]
    if not given or not all(isinstance(x, np.ndarray) and x.dtype.kind in "iubO" for x in given):
        return None
    return _HOST[node.op_type](node, *inputs)


def _array(x: Any) -> np.ndarray:
    """Of what numpy may have unpacked to a single object."""
    if isinstance(x, np.ndarray):
        return x
    result = np.empty((), object)
    result[()] = x
    return result
