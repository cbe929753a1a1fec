"""Where a training went wrong: the first range, activation or gradient that is not finite."""

from __future__ import annotations

from collections.abc import Callable

import torch

from halfstep.errors import HalfstepError
from halfstep.fake_quantize import FakeQuantize
from halfstep.graph.inputs import ModelInputs, tensors_of
from halfstep.model import QuantizedModel


def first_bad_value(
    model: QuantizedModel, inputs: ModelInputs, enter: Callable[[ModelInputs], object]
) -> str:
    """Name what is first not finite on the way from ``inputs`` to what ``enter``, a function through it, answers."""
    if not all(map(_finite, tensors_of(inputs))):
        return "the batch's inputs are not finite"
    for name, module in model.sites.items():
        if not _finite(module.scale) or not bool((module.scale > 0).all()):
            return f"the range of site {name!r} went first"
    found: list[str] = []

    def look(module: FakeQuantize, args: tuple[torch.Tensor, ...]) -> None:
        if not _finite(args[0]):
            found.append(module.name)

    hooks = [module.register_forward_pre_hook(look) for module in model.sites.values()]
    try:
        with torch.no_grad():
            enter(inputs)
    except HalfstepError as error:
        return str(error)
    finally:
        for hook in hooks:
            hook.remove()
    return f"the values at site {found[0]!r} went first" if found else "all ranges and activations are finite"


def first_bad_gradient(model: QuantizedModel) -> str:
    """Name the first parameter, in the order of the backward pass, whose gradient is not finite."""
    order = [
        str(source.target)
        for node in model.graph.nodes
        for source in node.all_input_nodes
        if source.op == "get_attr"
    ]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name in reversed(order):
        if name in gradients and not _finite(gradients[name]):
            return f"the gradient of {name!r} went first"
    for name, gradient in gradients.items():
        if not _finite(gradient):
            return f"the gradient of {name!r} went first"
    return "the gradients' norm overflows"


def _finite(tensor: torch.Tensor | None) -> bool:
    return tensor is None or not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
