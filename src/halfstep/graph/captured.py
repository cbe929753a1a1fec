"""A captured network: its graph, the parameters that it reads, and how inputs and outputs nest."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from halfstep.errors import ArgumentError, DataError
from halfstep.graph.float32 import HandedOver, in_float32
from halfstep.graph.inputs import ModelInputs, Outputs, batch_size, call_arguments
from halfstep.graph.pipeline import ModulePart, Pipeline, joined_batches, parts_of
from halfstep.graph.shapes import Axes, Names
from halfstep.graph.tracing import bind
from halfstep.graph.unfold import FoldedNorm


@dataclass
class Captured:
    """A network as one functional ATen graph.

    Attributes:
        graph: over flat values: takes the placeholders, returns a tuple. Each node's ``meta["nn_module_stack"]`` has
            its module path in the user's model.
        module: the parameters and buffers that the graph reads, under the names they have in the user's model.
        in_spec: how ``(args, kwargs)`` flatten to the placeholders.
        out_spec: how the tuple of the graph's values is put together to what the user's model returns.
        example_inputs: ``(args, kwargs)`` that the graph was traced with, batch of at least 2.
        batch_axes: for each placeholder, which of its dimensions is the (dynamic) batch; None if it has none.
        axes: the sizes that vary beside the batch, by name.
        folded: the batch norms that are no longer in the graph, one record for each layer they were folded into.
        originals: the user's parameters and buffers that are not in the graph, by name; weights that a batch norm was
            folded into are not kept twice.
        names: from every name of the user's state dict to the one that the graph, or ``originals``, has for it.
        content: a digest of the network as it was captured: its graph, and every parameter, buffer and constant.
        handed_over: the user's model where it is not in float32, as the graph is; None where it is.
        notes: what is to be said of it, one sentence each.
        origin: the file that the user's model was read from, if it was; exports are written into it.
        read_in: the types of that file that give way to float32.
        source: the user's module itself, for other ways into it.
        given: the names of the sizes that the user lets vary, one dict an input.
        entries: other ways into it that were traced, see :func:`halfstep.training.entry.entered`.
    """

    graph: fx.Graph
    module: nn.Module
    in_spec: pytree.TreeSpec
    out_spec: Outputs
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]]
    batch_axes: tuple[int | None, ...]
    axes: Axes = field(default_factory=Axes)
    folded: list[FoldedNorm] = field(default_factory=list)
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    content: str = ""
    handed_over: HandedOver | None = None
    notes: tuple[str, ...] = ()
    origin: object = None
    read_in: tuple[torch.dtype, ...] = ()
    source: nn.Module | None = None
    given: Sequence[Names] = ()
    entries: dict[int, Any] = field(default_factory=dict)

    @property
    def types(self) -> tuple[torch.dtype, ...]:
        """The types that parameters and inputs of the user's may have beside float32, in which all is computed here."""
        return self.read_in if self.handed_over is None else self.handed_over.types

    @property
    def batched(self) -> tuple[bool, ...]:
        """For each placeholder, whether it has a batch."""
        return tuple(axis is not None for axis in self.batch_axes)

    def batch_size(self, inputs: ModelInputs) -> int:
        """How many examples a batch of model inputs has.

        Raises:
            DataError: if there is no tensor with a batch.
        """
        leaves = pytree.tree_leaves(call_arguments(inputs))
        for leaf, axis in zip(leaves, self.batch_axes, strict=False):
            if axis is not None and isinstance(leaf, torch.Tensor) and leaf.dim() > axis:
                return leaf.shape[axis]
        return batch_size(inputs)

    @functools.cached_property
    def parts(self) -> dict[str, ModulePart]:
        """What each module has of the graph, by name, where they were given as a dict; else empty."""
        return parts_of(self.in_spec, self.out_spec) if isinstance(self.source, Pipeline) else {}

    def batches(
        self, given: Iterable[ModelInputs] | Mapping[str, Iterable[ModelInputs]]
    ) -> Iterable[ModelInputs]:
        """Batches of inputs of the network; those of several modules joined, as a list where all are lists.

        Raises:
            ArgumentError: if something is given for what is no module, or nothing for one.
            DataError: if there is no example of a module.
        """
        if not isinstance(given, Mapping):
            return given
        if not self.parts:
            raise ArgumentError(
                "calibration: got a dict, needed an iterable of batches: [batch] if it is the inputs of one"
            )
        joined = joined_batches(self.parts, self.batch_axes, given)
        return list(joined) if all(isinstance(each, (list, tuple)) for each in given.values()) else joined

    def batch_axis(self, node: fx.Node) -> int | None:
        """Which dimension of a node's value is the batch; None if none is, or it is in a product of sizes."""
        return self.axes.batch_axis(node.meta.get("val"))

    @property
    def output_axes(self) -> tuple[int | None, ...]:
        """For each value that the graph returns, which of its dimensions is the batch."""
        (end,) = (node for node in self.graph.nodes if node.op == "output")
        return tuple(map(self.batch_axis, end.args[0]))

    def check_inputs(self, flat: Sequence[Any], places: Sequence[int] | None = None) -> None:
        """Raise unless ``flat`` are tensors of the example's types and shapes, but for sizes that may vary.

        Args:
            flat: values of the placeholders.
            places: which placeholders they are for; None for all.

        Raises:
            DataError: naming the input, what was got and what is needed.
        """
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        placeholders = placeholders if places is None else [placeholders[place] for place in places]
        for node, value in zip(placeholders, flat, strict=True):
            if isinstance(node.meta.get("val"), torch.Tensor) and not isinstance(value, torch.Tensor):
                raise DataError(f"input {node.target!r}: got {type(value).__name__}, needed a tensor")
        self.axes.check(placeholders, flat)
        for node, value in zip(placeholders, flat, strict=True):
            wanted = node.meta.get("val")
            if isinstance(wanted, torch.Tensor) and value.dtype != wanted.dtype:
                others = "".join(f" or {dtype}" for dtype in self.types if wanted.is_floating_point())
                raise DataError(
                    f"input {node.target!r}: got {value.dtype}, needed {wanted.dtype}{others} as in example_inputs; "
                    f"convert it with .to({wanted.dtype})"
                )

    def examples(self, inputs: ModelInputs, start: int, stop: int) -> ModelInputs:
        """Examples ``start`` to ``stop`` of a batch of model inputs, as views; what has no batch stays whole."""
        return self.select(inputs, slice(start, stop))

    def select(self, inputs: ModelInputs, which: slice | torch.Tensor) -> ModelInputs:
        """Some examples of a batch of model inputs, by a slice or by their indices; what has no batch stays whole."""
        args, kwargs = call_arguments(inputs)
        flat, spec = pytree.tree_flatten((args, kwargs))
        flat = [
            x if axis is None else x[(*[slice(None)] * axis, which)]
            for x, axis in zip(flat, self.batch_axes, strict=True)
        ]
        if isinstance(inputs, torch.Tensor):
            (tensor,) = flat
            assert isinstance(tensor, torch.Tensor)
            return tensor
        part: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(flat, spec)
        return part[1] or part[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph as the user's model would be run."""
        flat, _ = pytree.tree_flatten((args, kwargs))
        return self.out_spec.restore(bind(self.graph, self.module)(*in_float32(flat, self.types)))
