"""Room for biases: kernels hold them as int32 in steps of what their codes multiply to."""

from __future__ import annotations

import torch

from halfstep.graph.placement import Layer
from halfstep.model import QuantizedModel

#: A bias must stay below this many steps: int32, with room for the products that it is added to.
BIAS_STEPS = 2**30


def widen_for_bias(model: QuantizedModel, layer: Layer) -> None:
    """Widen the weight's range in channels whose bias would not fit 32 bits.

    Where batch norm all but switched a channel off, its folded weight is tiny beside its bias, and those steps too
    fine.
    """
    shift, op = model.shifts.get(layer.name), layer.operator
    if shift is None or shift.steps is None or op.bias is None:
        return
    scale, activation = shift.steps.weight.scale, shift.steps.activation.scale
    bias = shift.corrected(model.weight(str(op.bias.target)).detach()).abs()
    needed = bias * shift.steps.stretch / (activation * BIAS_STEPS)
    if scale.dim() == 0:
        needed = needed.max()
    scale.copy_(torch.maximum(scale, needed.to(scale.dtype)))
