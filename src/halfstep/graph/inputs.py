"""Model inputs and outputs: what a user passes and gets, as the tensors of a graph.

Model inputs: a tensor, a tuple or a dict, flattened to the tensors of a graph's placeholders.

Model outputs: the values that a graph computes, put together to what the user's model returns.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
    """What a value in a nest of tuples, dicts and records is called: its keys, from the outside in."""

    def name(key: Any) -> Any:
        return next((getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)), key)

    return "_".join(str(name(key)) for key in path)


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


@dataclass(frozen=True)
class Outputs:
    """How the values of a graph become what the user's model returns.

    Attributes:
        spec: the structure of all that is returned.
        fixed: what of it no graph computes, by its place among the leaves: None, numbers, text.

    >>> spec = pytree.tree_structure({"logits": 0, "loss": 0})
    >>> Outputs(spec, {1: None}).restore(["the logits"])
    {'logits': 'the logits', 'loss': None}
    """

    spec: pytree.TreeSpec
    fixed: Mapping[int, Any]

    def restore(self, values: Sequence[Any]) -> Any:
        """What the user's model returns, from the graph's values in their order."""
        return pytree.tree_unflatten(self._leaves(values), self.spec)

    def names(self, taken: Collection[str] = ()) -> list[str]:
        """A name for each value: ``output``, the keys of a dict or record, or ``output_0`` and so on.

        Args:
            taken: names that must not be used again; ``output_`` is put in front of what would be one.
        """
        found: list[str] = []
        places = pytree.tree_unflatten(list(range(self.spec.num_leaves)), self.spec)
        for path, place in pytree.tree_flatten_with_path(places)[0]:
            if place in self.fixed:
                continue
            name = path_name(path)
            name = "output" if self.spec.num_leaves == 1 else name
            name = f"output_{name}" if name[:1].isdigit() else name
            while name in taken or name in found:
                name = f"output_{name}"
            found.append(name)
        return found

    def _leaves(self, values: Sequence[Any]) -> list[Any]:
        leaves = list(values)
        for index in sorted(self.fixed):
            leaves.insert(index, self.fixed[index])
        return leaves
