"""Positions of a batch that only fill it up: they are left out of what is observed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from halfstep.errors import ArgumentError, DataError
from halfstep.fake_quantize import OBSERVED
from halfstep.graph.captured import Captured
from halfstep.graph.placement import Site
from halfstep.graph.shapes import varies

#: The name of an input that is not 0 where there is something, (batch, length); or a function of the model's arguments
#: that answers such a tensor.
Mask = str | Callable[..., Tensor]


@dataclass(frozen=True)
class Padding:
    """Which positions of a batch are real.

    Attributes:
        captured: the network, one of whose inputs has the dimensions of the mask.
        mask: as the user gave it.
        like: the place of that input among the placeholders.
    """

    captured: Captured
    mask: Mask
    like: int

    @contextmanager
    def left_out(self, flat: Sequence[Any], places: Mapping[str, Places]) -> Iterator[None]:
        """Let quantizers observe no padding of a batch in this thread.

        Args:
            flat: the values of the graph's placeholders.
            places: where the tensors of sites have the mask's dimensions.

        Raises:
            DataError: if the mask has another shape than the input that it belongs to.
        """
        kept = self._kept(flat)

        def select(site: str, x: Tensor) -> Tensor | None:
            return None if site not in places else places[site].of(kept, x.dim())

        token = OBSERVED.set(select)
        try:
            yield
        finally:
            OBSERVED.reset(token)

    def places(self, sites: Sequence[Site]) -> dict[str, Places]:
        """Where the tensors of ``sites`` have the mask's dimensions, by name; those that have not are left out."""
        value = self._inputs[self.like].meta["val"]
        sizes = value.shape[0].node.expr, value.shape[1].node.expr
        found = {
            site.name: Places.within(site.positions[0].value, *sizes) for site in sites if not site.is_weight
        }
        return {name: places for name, places in found.items() if places is not None}

    @property
    def _inputs(self) -> list[fx.Node]:
        return [node for node in self.captured.graph.nodes if node.op == "placeholder"]

    def _kept(self, flat: Sequence[Any]) -> Tensor:
        if isinstance(self.mask, str):
            mask = flat[self.like]
        else:
            args, kwargs = pytree.tree_unflatten(list(flat), self.captured.in_spec)
            mask = self.mask(*args, **kwargs)
        shape = tuple(flat[self.like].shape[:2])
        if not isinstance(mask, Tensor) or tuple(mask.shape) != shape:
            got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise DataError(f"padding: got {got}, needed a mask of shape {shape}, as the inputs have")
        return mask != 0


@dataclass(frozen=True)
class Places:
    """Which dimensions of a tensor are the batch, the padded length (twice for attention's weights), or both in one."""

    batch: int | None
    lengths: tuple[int, ...]
    both: int | None

    @classmethod
    def within(cls, node: fx.Node, batch: Any, length: Any) -> Places | None:
        """Those of a traced value; None if no padding can be told in it."""
        value = node.meta.get("val")
        shape = value.shape if isinstance(value, Tensor) else ()
        sizes = [size.node.expr if isinstance(size, torch.SymInt) else None for size in shape]
        both = next((place for place, size in enumerate(sizes) if size == batch * length), None)
        lengths = tuple(place for place, size in enumerate(sizes) if size == length)
        first = next((place for place, size in enumerate(sizes) if size == batch), None)
        return cls(first, lengths, both) if both is not None or (lengths and first is not None) else None

    def of(self, kept: Tensor, dimensions: int) -> Tensor:
        """The mask (batch, length) in the tensor's dimensions, to be broadcast."""
        if self.both is not None:
            return kept.reshape(_shape(dimensions, {self.both: kept.numel()}))
        assert self.batch is not None
        whole = torch.ones(1, dtype=torch.bool, device=kept.device)
        for length in self.lengths:
            rows = kept if self.batch < length else kept.T
            whole = whole & rows.reshape(
                _shape(dimensions, {self.batch: kept.shape[0], length: kept.shape[1]})
            )
        return whole


def _shape(dimensions: int, sizes: Mapping[int, int]) -> list[int]:
    return [sizes.get(place, 1) for place in range(dimensions)]


def find_padding(captured: Captured, mask: Mask) -> Padding:
    """The padding of a network's inputs.

    Raises:
        ArgumentError: if there is no such input, the mask is no (batch, length), or one of both cannot vary.
    """
    inputs = [node for node in captured.graph.nodes if node.op == "placeholder"]
    names = [str(node.target) for node in inputs]
    args, kwargs = captured.example_inputs
    flat = pytree.tree_leaves((args, kwargs))
    if isinstance(mask, str):
        if mask not in names:
            raise ArgumentError(
                f"padding: got {mask!r}, needed one of {', '.join(map(repr, names))}, or a function"
            )
        like, example = names.index(mask), flat[names.index(mask)]
    else:
        example = mask(*args, **kwargs)
        shape = getattr(example, "shape", None)
        fitting = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.shape[:2] == shape]
        if not fitting:
            raise ArgumentError(
                f"padding: the function answers {type(example).__name__ if shape is None else tuple(shape)} for the "
                "example inputs, needed (batch, length) as one of them begins"
            )
        like = fitting[0]
    if not isinstance(example, Tensor) or example.dim() != 2:
        raise ArgumentError(f"padding: {mask!r} is no (batch, length)")
    if not all(map(varies, inputs[like].meta["val"].shape[:2])):
        raise ArgumentError(
            f"padding: the length of input {names[like]!r} is fixed, so it cannot be told from other sizes; name it: "
            f"dynamic={{{names[like]!r}: {{1: 'length'}}}}"
        )
    return Padding(captured, mask, like)
