"""Distillation: the float model's answers as the target of the quantized one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfstep.errors import TrainingError
from halfstep.evaluate import logits_of


@dataclass(frozen=True)
class Distillation:
    """The divergence of the quantized model's class probabilities from the float model's, added to the loss.

    ``weight * T^2 * KL(softmax(float / T) || softmax(quantized / T))``, the mean over examples (and positions); T^2
    keeps gradients of the same size for every temperature. It costs the float model's forward pass at every step.

    Attributes:
        weight: beside the user's loss, which has weight 1.
        temperature: above 1 the small logits count for more.
        axis: of the classes in the logits: the last of (batch, classes) or (batch, positions, classes), 1 for maps.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network".
    """

    weight: float = 1.0
    temperature: float = 2.0
    axis: int = -1

    def __post_init__(self) -> None:
        for name in ("weight", "temperature"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise TrainingError(f"Distillation: {name} is {value}, needed a number above 0")

    def loss(self, outputs: Any, teacher_outputs: Any) -> torch.Tensor:
        """The divergence of ``outputs`` from ``teacher_outputs``, of which the first float tensors are the logits.

        >>> logits = torch.tensor([[1.0, 2.0]])
        >>> Distillation().loss(logits, logits)
        tensor(0.)
        """
        ours, theirs = (
            logits_of(logits).float().div(self.temperature).log_softmax(self.axis)
            for logits in (outputs, teacher_outputs)
        )
        divergence = nn.functional.kl_div(ours, theirs, reduction="none", log_target=True).sum(self.axis)
        return self.weight * self.temperature**2 * divergence.mean()
