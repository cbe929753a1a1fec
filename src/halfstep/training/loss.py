"""The user's loss, checked."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from halfstep.errors import HalfstepError, TrainingError
from halfstep.training.options import Training


def outputs_loss(training: Training, outputs: Any, labels: Any) -> torch.Tensor:
    """The user's loss, checked; 0 without one.

    Raises:
        TrainingError: if it raises, is no scalar tensor, or does not depend on the outputs.
    """
    if training.loss is None:
        return torch.zeros(())
    try:
        loss = training.loss(outputs, labels)
    except HalfstepError:
        raise
    except Exception as error:
        raise TrainingError(f"loss(outputs, labels) raised {type(error).__name__}: {error}") from error
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TrainingError(
            f"loss(outputs, labels) gave {got}, needed a tensor of one number, such as a mean"
        )
    if not loss.requires_grad:
        raise TrainingError(
            "loss(outputs, labels) does not depend on the outputs, or detaches them (.detach(), .item(), argmax): it "
            "has no gradient"
        )
    return loss.reshape(())


def check_dependence(loss: torch.Tensor, outputs: Any) -> None:
    """Raise unless ``loss``, which has a gradient, has one by the outputs.

    Raises:
        TrainingError: if it has not.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    answers = [tensor for tensor in tensors if tensor.requires_grad]
    slopes = torch.autograd.grad(loss, answers, retain_graph=True, allow_unused=True) if answers else ()
    if all(slope is None for slope in slopes):
        raise TrainingError(
            "loss(outputs, labels) does not depend on the outputs: it has no gradient by any of them; compute it from "
            "the model's outputs"
        )
