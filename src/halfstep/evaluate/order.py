"""Labelled batches in a random order of their examples, without a copy of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree


class Shuffled:
    """The examples of a list of batches, drawn in an order of our own.

    Args:
        batches: ``(inputs, labels)`` pairs whose leaves are tensors with the batch in their first dimension.
        seed: of the order.
    """

    def __init__(self, batches: Sequence[tuple[Any, Any]], seed: int = 0) -> None:
        self.batches = batches
        sizes = torch.tensor([len(pytree.tree_leaves(batch)[0]) for batch in batches])
        self._ends = sizes.cumsum(0)
        self._size = int(sizes.max())
        self.count = int(self._ends[-1])
        #: The place of each drawn example in the data as given, (n,).
        self.order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))

    def drawn(self, start: int = 0) -> Iterator[tuple[Any, Any]]:
        """Batches of the examples from the ``start``-th drawn one on, as large as the given ones."""
        for places in self.order[start:].split(self._size):
            owners = torch.searchsorted(self._ends, places, right=True)
            parts, positions = [], []
            for owner in owners.unique().tolist():
                members = (owners == owner).nonzero().flatten()
                begin = int(self._ends[owner - 1]) if owner else 0
                rows = places[members] - begin
                parts.append(
                    pytree.tree_map(lambda leaf, rows=rows: leaf[rows.to(leaf.device)], self.batches[owner])
                )
                positions.append(members)
            back = torch.cat(positions).argsort()
            yield pytree.tree_map(
                lambda *leaves, back=back: torch.cat(leaves)[back.to(leaves[0].device)], *parts
            )


def cannot_shuffle(labelled: object) -> str:
    """Why the examples of ``labelled`` cannot be picked one by one and put together anew; empty if they can.

    They can in a list of batches of tensors that differ in nothing but how many examples they hold.
    """
    if not isinstance(labelled, (list, tuple)) or not labelled:
        return "the data are no list of batches"
    kinds = []
    for batch in labelled:
        leaves, structure = pytree.tree_flatten(batch)
        if not leaves or not all(isinstance(leaf, torch.Tensor) and leaf.dim() for leaf in leaves):
            return "the batches hold something else than tensors of examples"
        if len({len(leaf) for leaf in leaves}) > 1:
            return "the tensors of a batch differ in their first dimension"
        kinds.append((structure, [(leaf.dtype, tuple(leaf.shape[1:])) for leaf in leaves]))
    for index, kind in enumerate(kinds):
        if kind != kinds[0]:
            return f"batch {index} has examples of another shape or dtype than batch 0, as padding batch by batch makes"
    return ""
