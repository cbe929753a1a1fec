"""Model outputs: the values that a graph computes, put together to what the user's model returns."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils import _pytree as pytree

from halfstep.graph.inputs import path_name


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
