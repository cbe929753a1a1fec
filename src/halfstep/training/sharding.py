"""A model sharded over ranks, by torch's FSDP2, for a training loop of one's own.

What is sharded are the weights, their gradients and what an optimizer keeps of them. The captured network is one
graph, and no module's own ``forward`` is called for a part of it, so weights are gathered all at once for a pass.
Ranges are few numbers and stay whole on every rank: the quantizers see whole weights, and are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from halfstep.errors import ArgumentError
from halfstep.model import QuantizedModel
from halfstep.training.averaging import balanced

#: Marks a parameter whose gradients are averaged.
AVERAGED = "halfstep_averaged"


def shard(model: QuantizedModel, mesh: Any = None, **options: Any) -> QuantizedModel:
    """Shard the weights of ``model`` over the ranks of ``torch.distributed``, in place, by FSDP2's ``fully_shard``.

    Between steps every rank holds its part of each weight, of its gradient, and of what the optimizer keeps of it; for
    a forward and backward pass the weights are gathered. Each rank gives the model its part of a batch, all of one
    size, and gradients are those of the mean over all, of learned ranges too: a step is that of one process with the
    whole batch, but for the rounding of sums.

    Args:
        model: calibrated, the same on every rank; its ranges may be learned before or after (``site.learn()``).
        mesh: a device mesh of torch; None for all ranks.
        options: of ``torch.distributed.fsdp.fully_shard``, such as ``mp_policy`` or ``reshard_after_forward``.

    Returns:
        The model. :func:`whole_state_dict` gathers what was trained.

    Raises:
        ArgumentError: ``torch.distributed`` is not initialised, or the model is sharded already.

    >>> q = hs.shard(q)  # doctest: +SKIP
    >>> optimizer = torch.optim.AdamW(q.parameters(), 1e-4)  # doctest: +SKIP
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        raise ArgumentError(
            "shard: torch.distributed is not initialised; call torch.distributed.init_process_group, as programs "
            "started by torchrun do"
        )
    if sharded(model):
        raise ArgumentError("shard: the model is sharded already; shard it once, after hs.calibrate")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = mesh or init_device_mesh(model.device.type, (distributed.get_world_size(),))
    ranges = {parameter for site in model.sites.values() for parameter in site.parameters()}
    fully_shard(model, mesh=mesh, ignored_params=ranges, **options)
    watch = _Ranges(model, mesh)
    model.register_forward_pre_hook(lambda module, args: watch.look())
    return model


def whole_state_dict(model: QuantizedModel) -> dict[str, Tensor]:
    """The state dict of a sharded model with whole tensors, on every rank; all of them call this.

    ``load_state_dict`` of a model that was prepared in the same way takes it, to be scored and exported.
    """
    return {name: _whole(tensor) for name, tensor in model.state_dict().items()}


def sharded(model: nn.Module) -> bool:
    """Whether a parameter of ``model`` is spread over ranks."""
    return any(_is_spread(parameter) for parameter in model.parameters())


class _Ranges:
    """Averages the gradients of learned ranges, which every rank holds whole."""

    def __init__(self, model: QuantizedModel, mesh: Any) -> None:
        self.model, self.ranks, self.size = model, mesh.get_group(0), mesh.size(0)
        self.weights = {site.name for site in model.placement.sites if site.is_weight}

    def look(self) -> None:
        """Look for those that are learned since the last pass."""
        if not torch.is_grad_enabled():
            return
        for name, module in self.model.sites.items():
            counted = [] if name in self.weights else [id(parameter) for parameter in balanced(module)]
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad and not hasattr(parameter, AVERAGED):
                    setattr(parameter, AVERAGED, True)
                    # Of an activation a rank counts its own elements, not those of the whole batch.
                    factor = self.size**-0.5 if id(parameter) in counted else 1.0
                    parameter.register_hook(self._mean(factor))

    def _mean(self, factor: float) -> Callable[[Tensor], Tensor]:
        def mean(gradient: Tensor) -> Tensor:
            total = gradient.clone()
            distributed.all_reduce(total, group=self.ranks)
            return total.mul_(factor / self.size)

        return mean


def _is_spread(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if _is_spread(tensor) else tensor
