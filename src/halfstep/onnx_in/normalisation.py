"""Normalisations with a gain and a shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from halfstep.onnx_in.table import Node, operator, tensor, unsupported


@operator("BatchNormalization")
def batch_norm(node: Node, x: Tensor, scale: Any, shift: Any, mean: Any, variance: Any) -> Tensor:
    """By stored statistics."""
    if node.get("training_mode", 0) or any(map(node.wanted, (1, 2, 3, 4))):
        raise unsupported("BatchNormalization that computes its statistics, as in training,")
    weight, bias, centre, spread = map(tensor, (scale, shift, mean, variance))
    return F.batch_norm(x, centre, spread, weight, bias, False, 0.0, node.get("epsilon", 1e-5))


@operator("LayerNormalization")
def layer_norm(node: Node, x: Tensor, scale: Any, shift: Any = None) -> Any:
    """Over the axes from one on, and the statistics where they are wanted."""
    axis = node.get("axis", -1) % x.dim()
    shape = [int(size) for size in x.shape[axis:]]
    weight, bias = (_of_shape(tensor(p), shape) for p in (scale, shift))
    epsilon = node.get("epsilon", 1e-5)
    y = F.layer_norm(x, shape, weight, bias, epsilon)
    if not any(map(node.wanted, (1, 2))):
        return y
    dims = list(range(axis, x.dim()))
    mean = x.mean(dims, keepdim=True)
    return y, mean, torch.rsqrt((x - mean).square().mean(dims, keepdim=True) + epsilon)


@operator("RMSNormalization", "SimplifiedLayerNormalization")
def rms_norm(node: Node, x: Tensor, scale: Any) -> Tensor:
    """By the root of the mean square over the axes from one on."""
    axis = node.get("axis", -1) % x.dim()
    dims = list(range(axis, x.dim()))
    power = x.float().square().mean(dims, keepdim=True)
    return (x.float() * torch.rsqrt(power + node.get("epsilon", 1e-5))).to(x.dtype) * tensor(scale)


@operator("InstanceNormalization")
def instance_norm(node: Node, x: Tensor, scale: Any, shift: Any) -> Tensor:
    """Over the pixels of each channel."""
    return F.instance_norm(x, None, None, tensor(scale), tensor(shift), True, 0.0, node.get("epsilon", 1e-5))


@operator("GroupNormalization")
def group_norm(node: Node, x: Tensor, scale: Any, shift: Any) -> Tensor:
    """Over groups of channels; before version 21 gains and shifts are of groups."""
    groups, weight, bias = node.get("num_groups"), tensor(scale), tensor(shift)
    channels = int(x.shape[1])
    if weight.shape[0] != channels:
        weight, bias = (p.repeat_interleave(channels // groups) for p in (weight, bias))
    return F.group_norm(x, groups, weight, bias, node.get("epsilon", 1e-5))


def _of_shape(x: Tensor | None, shape: list[int]) -> Tensor | None:
    return x if x is None or list(x.shape) == shape else x.expand(shape)
