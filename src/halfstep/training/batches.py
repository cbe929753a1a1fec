"""What a training is fed and how it is watched: batches, the loss, and where it went wrong.

Labelled batches, checked, in the same order again for a run that goes on.

The user's loss, checked.

Where a training went wrong: the first range, activation or gradient that is not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils import _pytree as pytree

from halfstep.errors import DataError, HalfstepError, TrainingError, named
from halfstep.fake_quantize import FakeQuantize
from halfstep.graph.inputs import ModelInputs, tensors_of
from halfstep.model import QuantizedModel
from halfstep.training.checkpoint import seed_everything
from halfstep.training.options import Training


class Batches:
    """The batches of a training, epoch by epoch.

    Args:
        training: whose ``labelled`` to iterate. Without a length its batches are counted by iterating once.

    Raises:
        DataError: if there are none, or ``labelled`` cannot be iterated.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        check_iterable(training.labelled)
        self.count = _count(training.labelled)
        if not self.count:
            raise DataError("training data: got no batch, needed at least one (inputs, labels) pair")

    def epoch(
        self, epoch: int, skip: int = 0, resume: Callable[[Any], None] = lambda last: None
    ) -> Iterator[tuple[int, ModelInputs, Any]]:
        """Index, inputs and labels of every batch of an epoch after the first ``skip``.

        The seed is set first, so that shuffling and augmentation by torch, numpy or Python repeat themselves.

        Args:
            epoch: its number, from 0.
            skip: batches that an earlier run has used; they are fetched again and dropped.
            resume: called with the last dropped batch before the first used one.

        Raises:
            DataError: naming the batch, if it is no pair, its labels are missing, or the data have run dry.
        """
        seed_everything(self.training.seed + epoch)
        items = iter(self.training.labelled)
        index, last = -1, None
        for index, last in enumerate(islice(items, skip)):  # noqa: B007 - what is left of the loop is used
            pass
        if skip:
            resume(last)
        for index, item in enumerate(items, start=skip):
            with named(f"training batch {index}"):
                inputs, labels = pair(item, self.training)
            yield index, inputs, labels
        if index + 1 < self.count:
            raise DataError(
                f"training data: got {index + 1} batches in epoch {epoch + 1}, needed {self.count}; give data that can "
                "be iterated again, such as a list or a DataLoader"
            )


def check_iterable(labelled: Any) -> None:
    """Raise unless data can be iterated.

    Raises:
        DataError: saying what they are.
    """
    if not (isinstance(labelled, Iterable) or hasattr(labelled, "__getitem__")):
        raise DataError(
            f"training data: got {type(labelled).__name__}, needed an iterable of (inputs, labels) pairs, such as a "
            "list or a DataLoader"
        )


def pair(item: Any, training: Training) -> tuple[ModelInputs, Any]:
    """The inputs and labels that a batch is.

    Raises:
        DataError: if it is no pair, or its labels are missing.
    """
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        raise DataError(
            f"got {type(item).__name__}, needed a pair (inputs, labels); to train without labels give (inputs, None) "
            "and loss=None"
        )
    inputs, labels = item
    if labels is None and training.loss is not None:
        raise DataError(
            "its labels are None, but the loss needs them; give labels, or loss=None to train on distillation alone"
        )
    return inputs, labels


def _count(data: Iterable[Any]) -> int:
    """How many batches there are; counted where the data do not know, as a DataLoader of an IterableDataset."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in data)


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
