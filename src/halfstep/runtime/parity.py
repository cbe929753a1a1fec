"""Does the deployed file answer as the simulation does?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from halfstep.errors import DataError
from halfstep.graph.inputs import ModelInputs, call_arguments


@dataclass(frozen=True)
class Parity:
    """How far two models agree.

    Attributes:
        top1: share of examples (positions, where outputs have more than two dimensions) with the same argmax over
            the last axis of the first output; NaN if that axis has size 1.
        sqnr: signal to noise of the outputs in dB, 10 log10(sum y^2 / sum (y - y')^2), over all float outputs.
        examples: how many decisions ``top1`` is the share of.
    """

    top1: float
    sqnr: float
    examples: int


def compare(
    reference: Callable[..., Any], other: Callable[..., Any], batches: Iterable[ModelInputs]
) -> Parity:
    """Run both models on every batch and compare their outputs.

    Raises:
        DataError: if there is no batch, or the outputs hold no floating-point tensor.
    """
    signal = noise = 0.0
    same = decisions = 0
    for inputs in batches:
        args, kwargs = call_arguments(inputs)
        with torch.no_grad():
            wanted, got = (float_tensors(model(*args, **kwargs)) for model in (reference, other))
        if not wanted:
            raise DataError(
                "parity: the outputs hold no floating-point tensor to compare; let the model return its logits, beside "
                "its decisions or instead of them"
            )
        for a, b in zip(wanted, got, strict=True):
            a, b = a.cpu().double(), b.cpu().double()
            signal += float((a * a).sum())
            noise += float(((a - b) ** 2).sum())
        first, second = wanted[0].cpu(), got[0].cpu()
        if first.dim() >= 2 and first.shape[-1] > 1:
            equal = first.argmax(-1) == second.argmax(-1)
            same += int(equal.sum())
            decisions += equal.numel()
    if signal == noise == 0.0 and decisions == 0:
        raise DataError("parity: no batches to compare on; give at least one")
    return Parity(same / decisions if decisions else math.nan, _decibels(signal, noise), decisions)


def signal_to_noise(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """``10 log10(sum y^2 / sum (y - y')^2)`` in dB; infinite where both are equal."""
    return _decibels(float((wanted * wanted).sum()), float(((wanted - got) ** 2).sum()))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return -math.inf if noise == math.inf else 10 * math.log10(max(signal, 1e-300) / noise)


def float_tensors(outputs: Any) -> list[torch.Tensor]:
    """Every floating-point tensor in a model's outputs."""
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
