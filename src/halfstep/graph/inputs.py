"""Model inputs: a tensor, a tuple or a dict, flattened to the tensors of a graph's placeholders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from halfstep.errors import DataError

ModelInputs = torch.Tensor | Sequence[Any] | Mapping[str, Any]


def call_arguments(inputs: ModelInputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments that ``inputs`` stands for.

    A tensor is the one positional argument, a tuple or list the positional arguments, a dict the keyword
    arguments.

    Raises:
        DataError: for anything else.

    >>> call_arguments({"x": 1})
    ((), {'x': 1})
    """
    if isinstance(inputs, torch.Tensor):
        return (inputs,), {}
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    raise DataError(
        f"model inputs: got {type(inputs).__name__}, needed a tensor, a tuple of tensors (positional arguments) "
        "or a dict of tensors (keyword arguments)"
    )


def path_name(path: Iterable[Any]) -> str:
    """What a value in a nest of tuples and dicts is called: its keys, from the outside in."""
    return "_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def tensors_of(inputs: ModelInputs) -> list[torch.Tensor]:
    """All tensors in ``inputs``, in the order of the graph's placeholders."""
    return [leaf for leaf in pytree.tree_leaves(call_arguments(inputs)) if isinstance(leaf, torch.Tensor)]


def batch_size(inputs: ModelInputs) -> int:
    """The size of the first dimension of the first tensor.

    Raises:
        DataError: if there is no tensor, or the first one has no dimension.
    """
    tensors = tensors_of(inputs)
    if not tensors or tensors[0].dim() == 0:
        raise DataError("model inputs: needed at least one tensor whose first dimension is the batch")
    return tensors[0].shape[0]


def move(inputs: Any, device: torch.device) -> Any:
    """``inputs`` with every tensor on ``device``."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
