"""Undoing the fold of batch norms, so that trained weights go back to the user's own module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from halfstep.errors import ArgumentError


@dataclass(frozen=True)
class FoldedNorm:
    """A batch norm that became part of one layer; every name is a parameter or buffer, None where there is none.

    Attributes:
        weight: the layer's folded weight in the graph.
        bias: its folded bias in the graph.
        source_weight: the weight in the user's model.
        shift: the batch norm's bias.
        mean: its running mean.
        factor: gain / sqrt(variance + epsilon) of every channel, float64, shaped to multiply the weight.
        channels: the same, (channels,).
        offset: what the layer's own bias and the mean add before the gain, (bias - mean), float64, (channels,).
    """

    weight: str
    bias: str
    source_weight: str
    shift: str | None
    mean: str
    factor: torch.Tensor
    channels: torch.Tensor
    offset: torch.Tensor


def unfold(
    module: nn.Module,
    folded: Sequence[FoldedNorm],
    originals: Mapping[str, torch.Tensor],
    names: Mapping[str, str],
) -> dict[str, torch.Tensor]:
    """The user's state dict with the weights that ``module`` has now.

    Folding made ``W' = W * f`` and ``b' = shift + (b - mean) * f`` with ``f = gain / sqrt(variance + epsilon)``. Gain,
    statistics and the layer's own bias stay, so ``W = W' / f`` and ``shift = b' - (b - mean) * f``. A batch norm
    without parameters takes the bias as a running mean: ``mean = b - b' / f``.

    Args:
        module: the folded graph's root.
        folded: what was folded.
        originals: tensors of the user's model that are not in the graph, by their names there.
        names: from every name of the user's state dict to the one that the graph has for it.

    Raises:
        ArgumentError: naming the parameter, if the user's module cannot express the weights.
    """
    live = {name: tensor.detach() for name, tensor in tensors(module).items()}
    ours = {name for norm in folded for name in (norm.weight, norm.bias)}
    known = set(names.values()) | ours
    for name, _ in module.named_parameters():
        if name not in known and not name.startswith("quantizers."):
            raise ArgumentError(
                f"parameter {name!r} is not in the user's module: the graph was rewritten, and its float weights do "
                "not fit there any more; use state_dict() and a QuantizedModel instead"
            )
    values: dict[str, torch.Tensor] = {**live, **originals}
    set_by: dict[str, torch.Tensor] = {}
    for norm in folded:
        for name, value in _unfolded(norm, live, originals):
            if name in set_by and not torch.allclose(set_by[name], value, rtol=1e-5, atol=1e-7):
                raise ArgumentError(
                    f"parameter {name!r} is shared in the user's module, but its copies, each with a batch norm of its "
                    "own, were trained apart"
                )
            set_by[name] = value
    values.update(set_by)
    return {name: values[graph_name].clone() for name, graph_name in names.items()}


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, shared ones under each of their names."""
    return {
        **dict(module.named_buffers(remove_duplicate=False)),
        **dict(module.named_parameters(remove_duplicate=False)),
    }


def _unfolded(
    norm: FoldedNorm, live: Mapping[str, torch.Tensor], originals: Mapping[str, torch.Tensor]
) -> list[tuple[str, torch.Tensor]]:
    weight, bias = live[norm.weight], live[norm.bias].double()
    factor, channels, offset = (
        tensor.to(bias.device) for tensor in (norm.factor, norm.channels, norm.offset)
    )
    dead = (channels == 0).nonzero().flatten().tolist()
    if dead and bool((weight.double() * (factor == 0) != 0).any()):
        raise ArgumentError(
            f"parameter {norm.source_weight!r}: batch norm multiplies channels {dead[:5]} by 0, so the user's module "
            "cannot express the weights that they have now"
        )
    source = (weight.double() / torch.where(factor == 0, 1.0, factor)).to(weight.dtype)
    found = [(norm.source_weight, source)]
    if norm.shift is not None:
        found.append((norm.shift, (bias - offset * channels).to(weight.dtype)))
    else:
        mean = originals[norm.mean].to(bias.device).double()
        found.append((norm.mean, (offset + mean - bias / channels).to(weight.dtype)))
    return found
