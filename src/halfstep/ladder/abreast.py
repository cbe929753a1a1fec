"""Batches through a model side by side, as many as memory has room for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import fx

from halfstep.graph.inputs import ModelInputs
from halfstep.graph.shapes import Axes, hint, varies
from halfstep.model import QuantizedModel
from halfstep.side_by_side import side_by_side

Result = TypeVar("Result")

#: Activations that batches which run at once may hold together, beside the first one's.
HELD_BYTES = 512 * 2**20
#: Of the largest activation so many are alive at a time: what an operator reads and writes, and what a skip keeps.
ALIVE = 4


def abreast(
    model: QuantizedModel,
    work: Callable[[int, ModelInputs], Result],
    batches: Iterable[ModelInputs],
    ordered: bool = False,
) -> Iterator[Result]:
    """What ``work`` makes of each batch and its number, in order.

    Args:
        model: what ``work`` runs; on an accelerator, which is shared anyway, one batch runs at a time.
        work: may be called from several threads at once.
        batches: taken as they are needed; a batch may be taken before ``work`` has ended with the ones before.
        ordered: one batch at a time, for what depends on the order.
    """
    numbered = enumerate(batches)
    first = next(numbered, None)
    if first is None:
        return
    workers = 1 if ordered else _room(model, model.captured.batch_size(first[1]))
    yield from side_by_side(lambda item: work(*item), itertools.chain([first], numbered), workers)


def _room(model: QuantizedModel, size: int) -> int:
    """How many batches of ``size`` may run at once."""
    if model.device.type != "cpu":
        return 1
    largest = max((example_bytes(node, model.captured.axes) for node in model.graph.nodes), default=0)
    return 1 + HELD_BYTES // max(1, ALIVE * largest * size)


def example_bytes(node: fx.Node, axes: Axes) -> int:
    """Bytes of a node's value for one example, with what varies beside the batch as large as in the traced example."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 0
    batch = axes.batch_axis(value)
    if batch is None and value.dim() and varies(value.shape[0]):  # a product of the batch and other sizes
        batch = 0
    return (
        math.prod(hint(size) for axis, size in enumerate(value.shape) if axis != batch) * value.element_size()
    )
