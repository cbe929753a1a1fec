"""A training on several ranks of a run: each takes a part of every batch, and all take the step of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from halfstep.distributed import Share
from halfstep.errors import TrainingError
from halfstep.fake_quantize import FakeQuantize
from halfstep.graph.inputs import ModelInputs
from halfstep.model import QuantizedModel

Item = TypeVar("Item")


class Averaging:
    """Gradients and losses over a batch of which every rank has a part; of one rank that has all of it, its own.

    A rank's loss counts with its share of the examples. So the sum of the ranks' gradients is the gradient of a loss
    that is a mean over examples, and a training ends where that of one process does, but for the last bits of sums.
    Parameters stay equal on all ranks, since all take the same step.

    Args:
        share: of the ranks that train.
        model: that is trained.
    """

    def __init__(self, share: Share, model: QuantizedModel) -> None:
        self.share, self.model = share, model
        self.weight = 1.0  # of this rank's part in the batch
        self._of_activations = [
            module
            for site in model.placement.sites
            if not site.is_weight
            for module in [model.sites[site.name]]
        ]

    def part(self, inputs: ModelInputs, labels: Any) -> tuple[ModelInputs, Any] | None:
        """This rank's examples of a batch, neighbours; None where there are fewer examples than ranks and none is left.

        Raises:
            TrainingError: if the labels cannot be divided.
        """
        rank, size = self.share.rank, self.share.size
        if size == 1:
            return inputs, labels
        count = self.model.captured.batch_size(inputs)
        start, stop = count * rank // size, count * (rank + 1) // size
        self.weight = (stop - start) / count
        if start == stop:
            return None
        return self.model.captured.examples(inputs, start, stop), _rows(labels, start, stop, count, size)

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """What one rank may fail at: it raises, and the others end with it instead of waiting for it."""
        try:
            yield
        except Exception:
            self._any(True)
            raise
        if self._any(False):
            self.share.meet()  # raises that rank's error on rank 0, which ends the call for the others

    def _any(self, failed: bool) -> bool:
        flag = torch.tensor([float(failed)])
        self.share.add_up(flag, "agreements")
        return not failed and bool(flag > 0)

    def items(self, items: Iterator[Item]) -> Iterator[Item]:
        """``items``, on all ranks or, where one cannot get its next one, on none."""
        while True:
            with self.agreed():
                item = next(items, None)
            if item is None:
                return
            yield item

    def mean(self, loss: float) -> float:
        """The loss of the whole batch."""
        if self.share.size == 1:
            return loss
        total = torch.tensor([loss * self.weight], dtype=torch.float64)
        self.share.add_up(total, "losses of steps")
        return float(total)

    def gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Make every gradient that of the whole batch."""
        if self.share.size == 1:
            return
        # What balances the gradient of an activation's scale counts a rank's elements, not the whole batch's.
        for module in self._of_activations:
            for parameter in balanced(module):
                if parameter.grad is not None:
                    parameter.grad *= self.weight**0.5
        known = torch.tensor([float(parameter.grad is not None) for parameter in parameters])
        parts = [
            parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            for parameter in parameters
        ]
        flat = torch.cat([*(part.flatten().float() for part in parts), known.to(parts[0].device)])
        self.share.add_up(flat, "gradients")
        somewhere = flat[-len(parameters) :].tolist()
        start = 0
        for parameter, known_somewhere in zip(parameters, somewhere, strict=True):
            if known_somewhere:  # what no rank has a gradient for is not moved at all
                gradient = flat[start : start + parameter.numel()].view_as(parameter)
                parameter.grad = gradient.to(parameter.dtype)
            start += parameter.numel()


def balanced(module: FakeQuantize) -> list[nn.Parameter]:
    """The learned numbers of a quantizer whose gradients are divided by the root of how many elements share them."""
    found = (module.growth, module.zero) if module.gradient.balanced else ()
    return [parameter for parameter in found if parameter is not None]


def _rows(labels: Any, start: int, stop: int, count: int, size: int) -> Any:
    """The labels of some examples.

    Raises:
        TrainingError: if that cannot be told.
    """
    if labels is None:
        return None
    leaves, structure = pytree.tree_flatten(labels)
    if all(isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count for leaf in leaves):
        return pytree.tree_unflatten([leaf[start:stop] for leaf in leaves], structure)
    if isinstance(labels, list) and len(labels) == count:
        return labels[start:stop]
    shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in leaves]
    raise TrainingError(
        f"its labels cannot be divided among {size} ranks: got {shapes[:3]} for {count} examples, needed tensors whose "
        "first dimension is the batch, or a list with an item for each example; or train on one rank"
    )
