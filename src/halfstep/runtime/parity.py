"""Does the deployed file answer as the simulation does?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch.utils import _pytree as pytree

from halfstep.errors import DataError
from halfstep.evaluate import class_axis
from halfstep.graph.inputs import ModelInputs, call_arguments

#: What models that return integers alone, such as classes, must reach, where rounding may tip a few: the share that is
#: equal.
MINIMUM_EQUAL = 0.5


@dataclass(frozen=True)
class Parity:
    """How far two models agree.

    Attributes:
        top1: share of the same answers: the same largest of the first float output's classes, which are its last axis
            (in maps of four dimensions and more its second one); of a model that returns integers alone, the same
            integer in its first output. None where there is no such answer: a single class, or outputs that are no
            classes.
        sqnr: signal to noise of the outputs in dB, 10 log10(sum y^2 / sum (y - y')^2), over all float outputs; inf if
            they are equal, NaN if one of them is NaN. None of a model that returns integers alone.
        examples: how many answers ``top1`` is the share of; 0 where it is None.
        equal: whether all outputs are equal to the last bit.
    """

    top1: float | None
    sqnr: float | None
    examples: int
    equal: bool = False

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """From plain data, where infinity and NaN have become None."""
        return cls(data["top1"], data["sqnr"], data["examples"], data.get("equal", False))

    def reaches(self, least: float) -> bool:
        """Whether they agree to so many dB, which NaN never does; of integers alone, to :data:`MINIMUM_EQUAL`."""
        if self.sqnr is None:
            return self.top1 is None or self.top1 >= MINIMUM_EQUAL
        return self.sqnr >= least

    def rows(self) -> list[tuple[str, str]]:
        """What there is to show of it, name and figure."""
        rows = []
        if self.top1 is not None:
            rows.append(("same answer as the simulation", f"{self.top1:.2%} of {self.examples:,}"))
        if self.equal or self.sqnr is not None:
            noise = "equal to the last bit" if self.equal else f"{self.sqnr:.1f} dB"
            rows.append(("outputs against the simulation's", noise))
        return rows


def compare(
    reference: Callable[..., Any],
    other: Callable[..., Any],
    batches: Iterable[ModelInputs],
    classes: bool = True,
) -> Parity:
    """Run both models on every batch and compare their outputs.

    Args:
        reference: gives the signal.
        other: gives the noise.
        batches: of model inputs.
        classes: whether the first float output may be taken for scores of classes, the largest being the answer.

    Raises:
        DataError: if there is no batch, or a model returns no tensor.
    """
    signal = noise = 0.0
    same = decisions = floats = 0
    equal = True
    for inputs in batches:
        args, kwargs = call_arguments(inputs)
        with torch.no_grad():
            wanted, got = (
                [tensor.cpu() for tensor in tensors_in(model(*args, **kwargs))]
                for model in (reference, other)
            )
        if not wanted:
            raise DataError("parity: the model returns no tensor, so there is nothing to compare")
        equal &= all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
        scores, others = float_tensors(wanted), float_tensors(got)
        floats += len(scores)
        signal, noise = signal + power(scores), noise + error_power(scores, others)
        axis = class_axis(scores[0].shape) if scores else None
        if axis is not None and classes:
            answers = scores[0].argmax(axis) == others[0].argmax(axis)
        elif not scores:
            answers = wanted[0] == got[0]
        else:
            continue
        same, decisions = same + int(answers.sum()), decisions + answers.numel()
    if not (floats or decisions):
        raise DataError("parity: no batches to compare on; give at least one")
    return Parity(
        same / decisions if decisions else None,
        decibels(signal, noise) if floats else None,
        decisions,
        equal,
    )


def signal_to_noise(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """``10 log10(sum y^2 / sum (y - y')^2)`` in dB; infinite where both are equal, NaN where one of them is."""
    return decibels(float((wanted * wanted).sum()), float(((wanted - got) ** 2).sum()))


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise); inf without noise, -inf with infinite noise or noise alone, NaN if the noise is.

    >>> decibels(100.0, 1.0)
    20.0
    """
    if math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if 0 < signal < math.inf > noise else -math.inf


def compared(outputs: Any) -> list[torch.Tensor]:
    """What is compared of a model's outputs: the float tensors, or where there are none, all others."""
    return float_tensors(outputs) or tensors_in(outputs)


def power(wanted: Iterable[torch.Tensor]) -> float:
    """The signal in outputs: the sum of squares, of integers how many there are."""
    return sum(
        float(a.detach().double().square().sum()) if a.is_floating_point() else a.numel() for a in wanted
    )


def error_power(wanted: Iterable[torch.Tensor], got: Iterable[torch.Tensor]) -> float:
    """The noise in outputs: the sum of squared differences, of integers how many differ."""
    return sum(
        float((a.double() - b.double()).detach().square().sum())
        if a.is_floating_point()
        else float((a != b).sum())
        for a, b in zip(wanted, got, strict=True)
    )


def float_tensors(outputs: Any) -> list[torch.Tensor]:
    """Every floating-point tensor in a model's outputs."""
    return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]


def tensors_in(outputs: Any) -> list[torch.Tensor]:
    """Every tensor in a model's outputs."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
