"""Operators that move elements about: shapes, slices, gathers, pads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.onnx_in.table import DTYPES, Node, axes, host, ints, number, operator, tensor


@operator("Shape")
def shape(node: Node, x: Any) -> np.ndarray:
    """The sizes, on the host."""
    sizes = list(x.shape)[slice(node.get("start", 0), node.get("end"))]
    result = np.empty(len(sizes), object)
    result[:] = sizes
    return result


@operator("Size")
def size(_: Node, x: Any) -> np.ndarray:
    """How many elements there are, on the host."""
    result = np.empty((), object)
    count: Any = 1
    for each in x.shape:
        count = count * each
    result[()] = count
    return result


@operator("Reshape")
def reshape(node: Node, x: Any, sizes: Any) -> Tensor:
    """To other sizes: 0 keeps one, -1 is the rest."""
    x, wanted = tensor(x), ints(sizes, "sizes")
    if not node.get("allowzero", 0):
        wanted = [x.shape[i] if isinstance(s, int) and s == 0 else s for i, s in enumerate(wanted)]
    return x.reshape(wanted)


@operator("Flatten")
def flatten(node: Node, x: Tensor) -> Tensor:
    """To two axes."""
    axis = node.get("axis", 1)
    axis += x.dim() if axis < 0 else 0
    if axis == 1 and x.dim() > 1:
        return torch.flatten(x, 1)
    first: Any = 1
    for each in x.shape[:axis]:
        first = first * each
    return x.reshape(first, -1) if x.numel() else x.reshape(first, int(np.prod(x.shape[axis:])))


@operator("Transpose")
def transpose(node: Node, x: Tensor) -> Tensor:
    """Axes in another order."""
    return tensor(x).permute(*node.get("perm", range(x.ndim - 1, -1, -1)))


@operator("Squeeze")
def squeeze(node: Node, x: Any, given: Any = None) -> Tensor:
    """Without axes of size 1."""
    dims = axes(node, given)
    x = tensor(x)
    if dims is None:
        dims = [i for i, s in enumerate(x.shape) if isinstance(s, int) and s == 1]
    return torch.squeeze(x, dims) if dims else x


@operator("Unsqueeze")
def unsqueeze(node: Node, x: Any, given: Any = None) -> Tensor:
    """With new axes of size 1."""
    dims, x = axes(node, given) or [], tensor(x)
    rank = x.dim() + len(dims)
    for dim in sorted(d % rank for d in dims):
        x = x.unsqueeze(dim)
    return x


@operator("Concat")
def concat(node: Node, *xs: Any) -> Tensor:
    """One behind the other."""
    return torch.cat([tensor(x) for x in xs], node.get("axis"))


@operator("Split")
def split(node: Node, x: Tensor, given: Any = None) -> tuple[Tensor, ...]:
    """Into parts of given sizes, or equal ones, of which the last may be smaller."""
    x, axis = tensor(x), node.get("axis", 0)
    sizes = node.get("split") if given is None else ints(given, "sizes")
    if sizes is None:
        count = node.get("num_outputs", len(node.outputs))
        whole = int(x.shape[axis])
        most = -(-whole // count)
        sizes = [min(most, max(0, whole - i * most)) for i in range(count)]
    return tuple(torch.split(x, list(sizes), axis))


@operator("Slice")
def cut(
    node: Node, x: Any, starts: Any = None, ends: Any = None, given: Any = None, steps: Any = None
) -> Tensor:
    """Ranges along axes; a negative step runs backwards."""
    x = tensor(x)
    first = ints(node.get("starts") if starts is None else starts, "starts")
    last = ints(node.get("ends") if ends is None else ends, "ends")
    dims = axes(node, given) or range(len(first))
    strides = [1] * len(first) if steps is None else ints(steps, "steps")
    for start, end, dim, step in zip(first, last, dims, strides, strict=True):
        if step > 0:
            # Indexing would cut the axes before it too, and tracing make one of what several nodes cut there.
            x = torch.ops.aten.slice.Tensor(x, dim % x.dim(), start, end, step)
        elif start >= 2**31 - 1 or (start == -1 and end < -(2**30) and step == -1):
            x = x.flip(dim)
        else:
            kept = range(*slice(start, end, step).indices(int(x.shape[dim])))
            x = x.index_select(dim, torch.tensor(list(kept), dtype=torch.int64))
    return x


@operator("Gather")
def gather(node: Node, x: Any, indices: Any) -> Tensor:
    """Rows of a table, or slices along another axis."""
    axis = node.get("axis", 0)
    if 0 in node.constant and not host(x) and x.dim() == 2 and axis == 0 and not host(indices):
        return F.embedding(indices, x)
    x = tensor(x)
    axis %= x.dim()
    if host(indices) and indices.ndim == 0:
        return x.select(axis, number(indices, "index"))
    return x[(slice(None),) * axis + (tensor(indices).long(),)]


def _positive(indices: Any, size: Any) -> Tensor:
    indices = tensor(indices).long()
    return torch.where(indices < 0, indices + size, indices)


@operator("GatherElements")
def gather_elements(node: Node, x: Tensor, indices: Any) -> Tensor:
    """Elements along an axis, each from a place of its own."""
    axis = node.get("axis", 0)
    return torch.gather(tensor(x), axis, _positive(indices, x.shape[axis]))


@operator("GatherND")
def gather_nd(node: Node, x: Any, indices: Any) -> Tensor:
    """Slices at places that have several coordinates."""
    x, places, batched = tensor(x), tensor(indices).long(), node.get("batch_dims", 0)
    grids = []
    for axis in range(batched):
        shape = [1] * (places.dim() - 1)
        shape[axis] = places.shape[axis]
        grids.append(torch.arange(places.shape[axis]).reshape(shape))
    return x[(*grids, *places.unbind(-1))]


@operator("ScatterElements", "Scatter")
def scatter_elements(node: Node, x: Any, indices: Any, updates: Any) -> Tensor:
    """Elements along an axis replaced, or summed up."""
    x, axis, how = tensor(x), node.get("axis", 0), node.get("reduction", "none")
    places, values = _positive(indices, x.shape[axis]), tensor(updates)
    if how == "none":
        return x.scatter(axis, places, values)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return x.scatter_reduce(axis, places, values, names[how])


@operator("ScatterND")
def scatter_nd(node: Node, x: Any, indices: Any, updates: Any) -> Tensor:
    """Slices at places that have several coordinates replaced, or summed up."""
    x, how, values = tensor(x), node.get("reduction", "none"), tensor(updates)
    places = tuple(tensor(indices).long().unbind(-1))
    if how in ("none", "add"):
        return x.index_put(places, values, accumulate=how == "add")
    rows = torch.zeros_like(places[0])
    for place, size in zip(places, x.shape, strict=False):
        rows = rows * size + torch.where(place < 0, place + size, place)
    flat = x.reshape(-1, *x.shape[len(places) :])  # (places, slice)
    parts = values.reshape(-1, *flat.shape[1:])
    rows = rows.reshape([-1] + [1] * (parts.dim() - 1)).expand_as(parts)
    names = {"mul": "prod", "max": "amax", "min": "amin"}
    return flat.scatter_reduce(0, rows, parts, names[how]).reshape(x.shape)


@operator("Expand")
def expand(_: Node, x: Any, sizes: Any) -> Tensor:
    """To sizes that it can be broadcast to; a size of 1 keeps the own one."""
    x, wanted = tensor(x), ints(sizes, "sizes")
    own = [1] * (len(wanted) - x.dim()) + list(x.shape)
    wanted = [1] * (len(own) - len(wanted)) + wanted
    return x.expand([w if isinstance(s, int) and s == 1 else s for s, w in zip(own, wanted, strict=True)])


@operator("Tile")
def tile(_: Node, x: Any, repeats: Any) -> Tensor:
    """Repeated along axes."""
    return tensor(x).repeat(*ints(repeats, "repeats"))


@operator("Pad")
def pad(node: Node, x: Tensor, pads: Any = None, value: Any = None, given: Any = None) -> Tensor:
    """With a constant, a reflection, the edge, or the other end."""
    x, mode = tensor(x), node.get("mode", "constant")
    amounts = ints(node.get("pads") if pads is None else pads, "pads")
    dims = [d % x.dim() for d in (range(x.dim()) if given is None else ints(given, "axes"))]
    around = {d: (amounts[i], amounts[i + len(dims)]) for i, d in enumerate(dims)}
    fill = node.get("value", 0.0) if value is None else number(value, "value")
    if mode == "constant":
        flat = [amount for d in reversed(range(x.dim())) for amount in around.get(d, (0, 0))]
        return F.pad(x, flat, "constant", fill)
    spatial = {d: around[d] for d in around if any(around[d])}
    name = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode]
    if (
        3 <= x.dim() <= 5
        and all(d >= 2 for d in spatial)
        and all(a >= 0 for p in spatial.values() for a in p)
    ):
        flat = [amount for d in reversed(range(2, x.dim())) for amount in spatial.get(d, (0, 0))]
        return F.pad(x, flat, name)
    for d, (before, after) in spatial.items():
        kept = np.pad(np.arange(int(x.shape[d])), (max(before, 0), max(after, 0)), mode=mode)
        kept = kept[max(0, -before) : len(kept) - max(0, -after)]
        x = x.index_select(d, torch.from_numpy(kept))
    return x


@operator("CenterCropPad")
def centre(node: Node, x: Tensor, sizes: Any) -> Tensor:
    """Cropped or padded to sizes, around the centre."""
    for d, wanted in zip(node.get("axes", range(x.dim())), ints(sizes, "sizes"), strict=True):
        more = int(wanted) - int(x.shape[d])
        before = abs(more) // 2
        if more < 0:
            x = x.narrow(d, before, int(wanted))
        elif more:
            flat = [0, 0] * (x.dim() - 1 - d % x.dim()) + [before, more - before]
            x = F.pad(x, flat)
    return x


@operator("ConstantOfShape")
def filled(node: Node, sizes: Any) -> Tensor:
    """One number everywhere."""
    value = node.get("value")
    value = np.zeros(1, np.float32) if value is None else np.asarray(value)
    dtype = torch.from_numpy(value.copy()).dtype
    return torch.full(tuple(ints(sizes, "sizes")), value.reshape(-1)[0].item(), dtype=dtype)


@operator("Range")
def counted(_: Node, start: Any, limit: Any, step: Any) -> Tensor:
    """Numbers at equal distances."""
    first, last, by = (number(x, name) for x, name in ((start, "start"), (limit, "limit"), (step, "step")))
    dtype = next((tensor(x).dtype for x in (start, limit, step) if x.dtype != object), torch.int64)
    return torch.arange(first, last, by, dtype=dtype)


@operator("Trilu")
def triangle(node: Node, x: Tensor, diagonal: Any = None) -> Tensor:
    """The upper or lower triangle, else 0."""
    k = 0 if diagonal is None else number(diagonal, "diagonal")
    return torch.triu(tensor(x), k) if node.get("upper", 1) else torch.tril(tensor(x), k)


@operator("EyeLike")
def eye(node: Node, x: Any) -> Tensor:
    """1 on a diagonal."""
    x = tensor(x)
    dtype = DTYPES[node.get("dtype")] if node.get("dtype") else x.dtype
    rows, columns = torch.arange(x.shape[0])[:, None], torch.arange(x.shape[1])[None]
    return (columns - rows == node.get("k", 0)).to(dtype)


@operator("OneHot")
def one_hot(node: Node, indices: Any, depth: Any, values: Any) -> Tensor:
    """The second value at an index along a new axis, else the first."""
    count, places, pair = int(number(depth, "depth")), tensor(indices).long(), tensor(values)
    places = torch.where(places < 0, places + count, places)
    axis = node.get("axis", -1) % (places.dim() + 1)
    steps = torch.arange(count).reshape([-1] + [1] * (places.dim() - axis))
    return torch.where(places.unsqueeze(axis) == steps, pair[1], pair[0])


@operator("DepthToSpace")
def depth_to_space(node: Node, x: Tensor) -> Tensor:
    """Channels become pixels, by depth first or by column and row first."""
    b, (n, c, h, w) = node.get("blocksize"), x.shape
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, b)
    return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


@operator("SpaceToDepth")
def space_to_depth(node: Node, x: Tensor) -> Tensor:
    """Pixels become channels."""
    b, (n, c, h, w) = node.get("blocksize"), x.shape
    if node.get("mode", "DCR") == "CRD":
        return F.pixel_unshuffle(x, b)
    return (
        x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)
    )


@operator("ReverseSequence")
def reverse(node: Node, x: Tensor, lengths: Any) -> Tensor:
    """The first elements of each example backwards."""
    batch, time = node.get("batch_axis", 1), node.get("time_axis", 0)
    x = x.movedim((batch, time), (0, 1))
    steps, ends = torch.arange(x.shape[1])[None], tensor(lengths).long()[:, None]
    places = torch.where(steps < ends, ends - 1 - steps, steps)
    rows = torch.arange(x.shape[0])[:, None]
    return x[rows, places].movedim((0, 1), (batch, time))
