"""Room for biases: kernels hold them as int32 in steps of scale_x * scale_w."""

from __future__ import annotations

import torch

from halfstep.formats import Integer
from halfstep.graph.placement import Layer
from halfstep.model import QuantizedModel

#: A bias must stay below this many steps of its layer's products: int32, with room for the products themselves.
BIAS_STEPS = 2**30


def widen_for_bias(model: QuantizedModel, layer: Layer) -> None:
    """Widen the weight's range in channels whose bias would not fit 32 bits.

    Where batch norm all but switched a channel off, its folded weight is tiny beside its bias, and those steps too
    fine.
    """
    op = layer.operator
    if (
        not model.target.lowering.integer_bias
        or layer.reason
        or op.weight is None
        or op.bias is None
        or len(layer.sites) < 2
    ):
        return
    weight, activation = model.sites[str(op.weight.target)], model.sites[layer.sites[0]]
    if activation.dynamic or activation.scale.dim():
        return
    if not isinstance(weight.format, Integer) or weight.scale.dim() > 1:
        return
    bias = model.weight(str(op.bias.target)).detach().abs()
    needed = bias / (activation.scale * BIAS_STEPS)
    if weight.scale.dim() == 0:
        needed = needed.max()
    if needed.shape == weight.scale.shape:
        weight.scale.copy_(torch.maximum(weight.scale, needed.to(weight.scale.dtype)))
