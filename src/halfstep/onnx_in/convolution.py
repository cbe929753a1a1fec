"""Convolutions, pooling, resizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.onnx_in.table import Node, ints, operator, tensor, unsupported

_CONVS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
_MAX_POOLS = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN_POOLS = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def _window(
    node: Node, x: Tensor, kernel: Sequence[int]
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, and the padding before and behind."""
    rank = len(kernel)
    if rank not in _CONVS:
        raise unsupported(f"an input of {rank} spatial axes")
    strides = list(node.get("strides") or [1] * rank)
    dilations = list(node.get("dilations") or [1] * rank)
    auto = node.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = []
        for size, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
            totals.append(max(0, (-(-int(size) // s) - 1) * s + (k - 1) * d + 1 - int(size)))
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        before, after = (small, large) if auto == "SAME_UPPER" else (large, small)
    else:
        pads = list(node.get("pads") or [0] * 2 * rank) if auto == "NOTSET" else [0] * 2 * rank
        before, after = pads[:rank], pads[rank:]
    return strides, dilations, before, after


def _padded(x: Tensor, before: list[int], after: list[int]) -> tuple[Tensor, list[int]]:
    """The input, padded by what the two ends differ in, and the padding that both have."""
    if before == after:
        return x, before
    flat = [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]
    return F.pad(x, flat), [0] * len(before)


@operator("Conv")
def conv(node: Node, x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """Convolution of one to three axes."""
    weight = tensor(weight)
    strides, dilations, before, after = _window(node, x, weight.shape[2:])
    x, pads = _padded(x, before, after)
    return _CONVS[len(strides)](x, weight, tensor(bias), strides, pads, dilations, node.get("group", 1))


@operator("ConvTranspose")
def conv_transpose(node: Node, x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    """Its transpose; what the two ends are cut by may differ."""
    weight = tensor(weight)
    kernel = list(weight.shape[2:])
    strides, dilations, before, after = _window(node, x, kernel)
    rank = len(kernel)
    extra = list(node.get("output_padding") or [0] * rank)
    full = [
        (int(n) - 1) * s + (k - 1) * d + 1 + e
        for n, s, k, d, e in zip(x.shape[2:], strides, kernel, dilations, extra, strict=True)
    ]
    auto, wanted = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if wanted is None and auto in ("SAME_UPPER", "SAME_LOWER"):
        wanted = [int(n) * s for n, s in zip(x.shape[2:], strides, strict=True)]
    if wanted is not None:
        totals = [f - int(w) for f, w in zip(full, list(wanted)[-rank:], strict=True)]
        small = [max(t, 0) // 2 for t in totals]
        large = [t - s for t, s in zip(totals, small, strict=True)]
        before, after = (small, large) if auto == "SAME_UPPER" or min(totals) < 0 else (large, small)
    function, group = _TRANSPOSED[rank], node.get("group", 1)
    if (
        before == after
        and min(before) >= 0
        and all(e < max(s, d) for e, s, d in zip(extra, strides, dilations, strict=True))
    ):
        return function(x, weight, tensor(bias), strides, before, extra, group, dilations)
    y = function(x, weight, tensor(bias), strides, 0, 0, group, dilations)
    flat = [
        amount for b, a, e in reversed(list(zip(before, after, extra, strict=True))) for amount in (-b, e - a)
    ]
    if bias is not None and any(amount > 0 for amount in flat):
        raise unsupported("ConvTranspose with a bias and more padding of the output than its kernel covers")
    return F.pad(y, flat)


@operator("MaxPool")
def max_pool(node: Node, x: Tensor) -> Any:
    """The largest in windows, and where it is if that is wanted."""
    kernel = list(node.get("kernel_shape"))
    strides, dilations, before, after = _window(node, x, kernel)
    ceil, pool = bool(node.get("ceil_mode", 0)), _MAX_POOLS[len(kernel)]
    if node.wanted(1):
        if before != after or node.get("storage_order", 0):
            raise unsupported("MaxPool with indices, and other padding at either end or indices by columns,")
        y, places = pool(x, kernel, strides, before, dilations, ceil, return_indices=True)
        plane = math.prod(x.shape[2:])  # torch counts in each plane
        planes = torch.arange(x.shape[0] * x.shape[1]).reshape([*x.shape[:2], *[1] * len(kernel)])
        return y, places + planes * plane
    integer = not x.is_floating_point()
    if before != after or integer or any(2 * b > k for b, k in zip(before, kernel, strict=True)):
        low: float = torch.iinfo(x.dtype).min if integer else -math.inf
        flat = [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]
        y = F.pad(x, flat, value=low)
        return pool(y.float() if integer else y, kernel, strides, 0, dilations, ceil).to(x.dtype)
    return pool(x, kernel, strides, before, dilations, ceil)


@operator("AveragePool")
def average_pool(node: Node, x: Tensor) -> Tensor:
    """The mean of windows, with or without what was padded."""
    kernel = list(node.get("kernel_shape"))
    strides, dilations, before, after = _window(node, x, kernel)
    pool, ceil = _MEAN_POOLS[len(kernel)], bool(node.get("ceil_mode", 0))
    include = bool(node.get("count_include_pad", 0))
    if any(d != 1 for d in dilations):
        if ceil:
            raise unsupported("AveragePool with dilations and ceil_mode")
        window = torch.ones([1, 1, *kernel], dtype=x.dtype)
        ones = F.pad(torch.ones_like(x[:1, :1]), _flat(before, after), value=float(include))
        y = F.pad(x, _flat(before, after)).flatten(0, 1)[:, None]
        total, count = (_CONVS[len(kernel)](v, window, None, strides, 0, dilations) for v in (y, ones))
        return total.reshape([*x.shape[:2], *total.shape[2:]]) / count
    if before == after and all(2 * b <= k for b, k in zip(before, kernel, strict=True)):
        return pool(x, kernel, strides, before, ceil, include)
    y, _ = _padded(x, before, after) if before != after else (F.pad(x, _flat(before, after)), None)
    if include and not ceil:
        return pool(y, kernel, strides, 0, ceil, True)
    ones = torch.ones_like(x[:1, :1])
    ones = F.pad(ones, _flat(before, after), value=1.0 if include else 0.0)
    return pool(y, kernel, strides, 0, ceil, True) / pool(ones, kernel, strides, 0, ceil, True)


def _flat(before: list[int], after: list[int]) -> list[int]:
    return [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]


@operator("GlobalAveragePool")
def global_average_pool(_: Node, x: Tensor) -> Tensor:
    """The mean of each channel."""
    rank = x.dim() - 2
    return _ADAPTIVE[rank](x, 1) if rank in _ADAPTIVE else x.mean(list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(_: Node, x: Tensor) -> Tensor:
    """The largest of each channel."""
    return torch.amax(x, list(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool")
def global_norm(node: Node, x: Tensor) -> Tensor:
    """The norm of each channel."""
    return torch.linalg.vector_norm(x, node.get("p", 2), list(range(2, x.dim())), keepdim=True)


@operator("GridSample")
def grid_sample(node: Node, x: Tensor, grid: Tensor) -> Tensor:
    """Values at places of a grid."""
    mode = {
        "linear": "bilinear",
        "bilinear": "bilinear",
        "nearest": "nearest",
        "cubic": "bicubic",
        "bicubic": "bicubic",
    }
    return F.grid_sample(
        x,
        grid,
        mode[node.get("mode", "linear")],
        node.get("padding_mode", "zeros"),
        bool(node.get("align_corners", 0)),
    )


@operator("Resize", "Upsample")
def resize(node: Node, x: Tensor, *rest: Any) -> Tensor:
    """To other sizes, axis by axis; the common cases by torch's own operators."""
    roi, scales, sizes = _asked(node, rest)
    rank, mode = x.dim(), node.get("mode", "nearest")
    dims = [d % rank for d in node.get("axes", range(rank))]
    way = node.get(
        "coordinate_transformation_mode", "asymmetric" if node.op_type == "Upsample" else "half_pixel"
    )
    if roi is not None and way == "tf_crop_and_resize":
        raise unsupported("Resize with tf_crop_and_resize")
    own = [int(x.shape[d]) if d else x.shape[d] for d in dims]
    if sizes is not None:
        sizes, scales = _kept_aspect(node, own, sizes)
    else:
        assert scales is not None
        sizes = [
            size if scale == 1.0 else math.floor(int(size) * scale)
            for size, scale in zip(own, scales, strict=True)
        ]
    moved = [
        (d, int(size), scale)
        for d, size, scale, old in zip(dims, sizes, scales, own, strict=True)
        if scale != 1.0 or (d and size != old)
    ]
    if not moved:
        return x
    if (found := _by_torch(node, x, moved, way, mode)) is not None:
        return found
    for d, size, scale in moved:
        places, weights = _taps(node, int(x.shape[d]), size, scale, way, mode)
        shape = [-1] + [1] * (rank - 1 - d)
        parts = [
            x.index_select(d, torch.from_numpy(places[:, k])) * torch.from_numpy(weights[:, k]).reshape(shape)
            for k in range(places.shape[1])
        ]
        x = sum(parts[1:], parts[0])
    return x


def _asked(node: Node, rest: tuple[Any, ...]) -> tuple[Any, list[float] | None, list[Any] | None]:
    if node.op_type == "Upsample" or node.version < 11:
        scales = node.get("scales") if not rest else rest[0]
        return None, [float(s) for s in np.asarray(scales).reshape(-1)], None
    roi, scales, sizes = (*rest, None, None, None)[:3]
    if sizes is not None:
        return roi, None, ints(sizes, "sizes")
    if not isinstance(scales, np.ndarray):
        raise unsupported("Resize by scales that are computed")
    return roi, [float(s) for s in scales.reshape(-1)], None


def _kept_aspect(node: Node, own: list[Any], sizes: list[Any]) -> tuple[list[Any], list[float]]:
    policy = node.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        scales = [
            1.0 if not isinstance(size, int) or not isinstance(old, int) else size / old
            for size, old in zip(sizes, own, strict=True)
        ]
        return sizes, scales
    ratios = [size / old for size, old in zip(sizes, own, strict=True)]
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    return [math.floor(scale * old + 0.5) for old in own], [scale] * len(own)


def _by_torch(
    node: Node, x: Tensor, moved: list[tuple[int, int, float]], way: str, mode: str
) -> Tensor | None:
    """The cases that torch computes in the same way."""
    spatial = list(range(2, x.dim()))
    if x.dim() != 4 or not {d for d, _, _ in moved} <= set(spatial) or node.get("antialias", 0):
        return None
    by_axis = {d: (size, scale) for d, size, scale in moved}
    size = [by_axis.get(d, (int(x.shape[d]), 1.0))[0] for d in spatial]
    exact = all(int(x.shape[d]) * by_axis[d][1] == by_axis[d][0] for d in by_axis)
    if (
        mode == "nearest"
        and way == "asymmetric"
        and node.get("nearest_mode", "round_prefer_floor") == "floor"
        and exact
    ):
        return F.interpolate(x, size=size, mode="nearest")
    if node.op_type == "Upsample" and mode == "nearest" and exact:
        return F.interpolate(x, size=size, mode="nearest")
    names = {"linear": "bilinear", "cubic": "bicubic"}
    if (
        mode not in names
        or node.get("exclude_outside", 0)
        or (mode == "cubic" and node.get("cubic_coeff_a", -0.75) != -0.75)
    ):
        return None
    if exact and way == "align_corners":
        return F.interpolate(x, size=size, mode=names[mode], align_corners=True)
    if exact and (way == "half_pixel" or (way == "pytorch_half_pixel" and min(size) > 1)):
        return F.interpolate(x, size=size, mode=names[mode], align_corners=False)
    return None


def _taps(node: Node, old: int, new: int, scale: float, way: str, mode: str) -> tuple[np.ndarray, np.ndarray]:
    """For each of the ``new`` places along an axis, which old ones it is made of, and their weights."""
    to = np.arange(new, dtype=np.float64)
    length = old * scale
    if way == "align_corners":
        at = to * (old - 1) / (length - 1) if length > 1 else np.zeros(new)
    elif way == "asymmetric":
        at = to / scale
    elif way == "half_pixel" or (way == "pytorch_half_pixel" and new > 1):
        at = (to + 0.5) / scale - 0.5
    elif way == "half_pixel_symmetric":
        at = old / 2 * (1 - new / length) + (to + 0.5) / scale - 0.5
    elif way == "pytorch_half_pixel":
        at = np.zeros(new)
    else:
        raise unsupported(f"Resize with {way!r}")
    stretch = min(scale, 1.0) if node.get("antialias", 0) else 1.0
    if mode == "nearest":
        rounding = node.get("nearest_mode", "round_prefer_floor")
        if node.op_type == "Upsample":
            rounding = "floor"
        round_to: dict[str, Callable[[np.ndarray], np.ndarray]] = {
            "floor": np.floor,
            "ceil": np.ceil,
            "round_prefer_floor": lambda v: np.ceil(v - 0.5),
            "round_prefer_ceil": lambda v: np.floor(v + 0.5),
        }
        places = round_to[rounding](at)[:, None]
        weights = np.ones_like(places)
    else:
        reach = (1 if mode == "linear" else 2) / stretch
        count = 2 * math.ceil(reach)
        places = np.floor(at)[:, None] + np.arange(1 - count // 2, count // 2 + 1)
        distance = np.abs(at[:, None] - places) * stretch
        weights = (
            np.maximum(0, 1 - distance)
            if mode == "linear"
            else _cubic(distance, node.get("cubic_coeff_a", -0.75))
        )
        if node.get("exclude_outside", 0):
            weights = np.where((places < 0) | (places >= old), 0.0, weights)
        weights = weights / weights.sum(1, keepdims=True)
    return np.clip(places, 0, old - 1).astype(np.int64), weights.astype(np.float32)


def _cubic(t: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel (1981)."""
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))
