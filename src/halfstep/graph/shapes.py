"""Which dimensions of a network's inputs may vary, under which names, and how far."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from halfstep.errors import ArgumentError, CaptureError, DataError
from halfstep.graph.inputs import ModelInputs, call_arguments, path_name

#: ``{"ids": {0: "batch", 1: "tokens"}}``, or a second example whose sizes differ where they may.
Dynamic = Mapping[str, Mapping[int, str]] | ModelInputs
BATCH = "batch"
Names = dict[int, str]  # of the dimensions of one input that vary


@dataclass
class Axes:
    """The sizes of a traced graph that vary.

    Attributes:
        names: of torch's symbols, as they stand in the shapes of traced values; the batch is ``"batch"`` unless the
            user named it.
        limits: the least and the largest size of each name for which the code was traced; at least 1, and infinity.

    >>> axes = Axes({"s23": "batch", "s27": "tokens"}, {"tokens": (1, 512)})
    >>> axes.shape((torch.empty(2, 3).shape))
    '(2, 3)'
    """

    names: dict[str, str] = field(default_factory=dict)
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)

    def name(self, size: int | torch.SymInt) -> str:
        """What a traced size is called: its number, a name, or an expression of names."""
        if not varies(size):
            return str(int(size))
        return re.sub(r"\bs\d+\b", lambda found: self.names.get(found[0], BATCH), str(size))

    def batch_axis(self, value: Any) -> int | None:
        """Which dimension of a traced value is the batch; None for what has none, or has it in a product of sizes.

        The first one, where several have its size; a size that varies and has no name counts as the batch too.
        """
        for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            symbol = str(size)
            if varies(size) and re.fullmatch(r"s\d+", symbol) and self.names.get(symbol, BATCH) == BATCH:
                return axis
        return None

    def sizes(self, placeholders: Sequence[fx.Node], flat: Sequence[Any]) -> dict[str, int]:
        """The sizes that vary beside the batch, by name, as they are in the tensors of ``flat``."""
        found: dict[str, int] = {}
        for node, value in zip(placeholders, flat, strict=True):
            traced = node.meta.get("val")
            for axis, size in enumerate(traced.shape if isinstance(traced, torch.Tensor) else ()):
                name = self.names.get(str(size), BATCH)
                if varies(size) and name != BATCH:
                    found[name] = value.shape[axis]
        return found

    def shape(self, sizes: Sequence[int | torch.SymInt]) -> str:
        """A traced shape in words."""
        return f"({', '.join(map(self.name, sizes))}{',' if len(sizes) == 1 else ''})"

    def check(self, placeholders: Sequence[fx.Node], flat: Sequence[Any]) -> None:
        """Raise unless the tensors of ``flat`` have the sizes that the graph was traced for.

        Raises:
            DataError: naming the input, its shape, what was needed, and the input that a size must agree with.
        """
        seen: dict[str, tuple[int, str]] = {}
        for node, value in zip(placeholders, flat, strict=True):
            traced = node.meta.get("val")
            if not isinstance(traced, torch.Tensor):
                continue
            got, needed = list(value.shape), list(traced.shape)
            what = f"input {node.target!r}: got shape {tuple(got)}, needed {self.shape(needed)}"
            if len(got) != len(needed):
                raise DataError(what)
            for size, wanted in zip(got, needed, strict=True):
                if not varies(wanted):
                    if size != wanted:
                        raise DataError(what)
                    continue
                name = self.name(wanted)
                least, most = self.limits.get(name, (1, math.inf))
                if not least <= size <= most:
                    bound = f"at most {most:g}" if size > most else f"at least {least:g}"
                    raise DataError(f"{what} with {name} {bound}, for which the model's code was traced")
                first, where = seen.setdefault(str(wanted), (size, str(node.target)))
                if size != first and name in self.names.values():
                    raise DataError(f"{what} with {name} = {first} as in input {where!r}")


def varies(size: int | torch.SymInt) -> bool:
    """Whether a dimension of a traced tensor may have any size."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def hint(size: int | torch.SymInt) -> int:
    """A traced size as it was in the example that was traced."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def named(
    dynamic: Dynamic | None, names: Sequence[str], flat: Sequence[Any], spec: pytree.TreeSpec
) -> list[Names]:
    """The dimensions that the user lets vary, one dict an input.

    Args:
        dynamic: names by input and dimension; or another example, whose sizes differ where they may. Then dimension 0
            is the batch, and dimensions that have the same two sizes share the name ``INPUT_DIMENSION`` of the first.
        names: of the inputs.
        flat: the example inputs.
        spec: how they nest.

    Raises:
        ArgumentError: naming the input or dimension that is not there.
    """
    if dynamic is None:
        return [{} for _ in flat]
    if isinstance(dynamic, Mapping) and all(isinstance(value, Mapping) for value in dynamic.values()):
        return _by_input(dynamic, names, flat)
    others, other_spec = pytree.tree_flatten(call_arguments(dynamic))
    if other_spec != spec:
        raise ArgumentError(
            "dynamic: got an example of another structure than example_inputs, needed the same inputs in other sizes"
        )
    return _by_example(names, flat, others)


def batch_of(flat: Sequence[Any], given: Sequence[Names]) -> tuple[int, list[int]]:
    """The size of the batch in example inputs, and the dimension of each input that is the batch if any is.

    That is the one which the user names ``"batch"``, or else the first. The size is that of the first input with such a
    name; without one, of the first tensor.

    Raises:
        DataError: if there is no tensor, or the first one has no dimension.
    """
    tensors = [x for x in flat if isinstance(x, torch.Tensor)]
    if not tensors or tensors[0].dim() == 0:
        raise DataError("model inputs: needed at least one tensor whose first dimension is the batch")
    named = [next((d for d, name in names.items() if name == BATCH), None) for names in given]
    sizes = [x.shape[axis] for x, axis in zip(flat, named, strict=True) if axis is not None]
    return (sizes or [tensors[0].shape[0]])[0], [axis or 0 for axis in named]


def _by_input(
    dynamic: Mapping[str, Mapping[int, str]], names: Sequence[str], flat: Sequence[Any]
) -> list[Names]:
    found: list[Names] = [{} for _ in flat]
    for name, dimensions in dynamic.items():
        if name not in names:
            raise ArgumentError(f"dynamic: got input {name!r}, needed one of {', '.join(map(repr, names))}")
        index = names.index(name)
        rank = flat[index].dim() if isinstance(flat[index], torch.Tensor) else 0
        for dimension, called in dimensions.items():
            if not isinstance(dimension, int) or not -rank <= dimension < rank:
                raise ArgumentError(
                    f"dynamic, input {name!r}: got dimension {dimension!r}, needed 0 to {rank - 1}, as the example has"
                    if rank
                    else f"dynamic: input {name!r} is no tensor with dimensions"
                )
            if not isinstance(called, str) or not re.fullmatch(r"[A-Za-z_]\w*", called):
                raise ArgumentError(
                    f"dynamic, input {name!r}, dimension {dimension}: got {called!r}, needed a name such as 'tokens'"
                )
            found[index][dimension % rank] = called
    for called in {name for each in found for name in each.values()}:
        sizes = {
            flat[i].shape[d]: names[i]
            for i, each in enumerate(found)
            for d, name in each.items()
            if name == called
        }
        if len(sizes) > 1:
            both = " and ".join(f"{size} in {name!r}" for size, name in sizes.items())
            raise ArgumentError(f"dynamic: {called!r} is one size, but the example inputs have {both}")
        if min(sizes) < 2:
            raise ArgumentError(
                f"dynamic: {called!r} is {min(sizes)} in the example inputs, needed at least 2, because tracing takes "
                "a dimension of size 1 as fixed"
            )
    return found


def _by_example(names: Sequence[str], flat: Sequence[Any], others: Sequence[Any]) -> list[Names]:
    found: list[Names] = []
    pairs: dict[tuple[int, int], str] = {}
    for name, one, other in zip(names, flat, others, strict=True):
        found.append({})
        if not isinstance(one, torch.Tensor):
            continue
        if not isinstance(other, torch.Tensor) or one.dim() != other.dim():
            raise ArgumentError(f"dynamic, input {name!r}: got an example with another number of dimensions")
        for dimension, sizes in enumerate(zip(one.shape, other.shape, strict=True)):
            if sizes[0] != sizes[1] and dimension:
                found[-1][dimension] = pairs.setdefault(sizes, f"{name}_{dimension}")
                if min(sizes) < 2:
                    raise ArgumentError(
                        f"dynamic, input {name!r}, dimension {dimension}: got sizes {sizes[0]} and {sizes[1]}, needed "
                        "at least 2 in both, because tracing takes a dimension of size 1 as fixed"
                    )
    return found


def axes_of(
    program: torch.export.ExportedProgram, placeholders: Sequence[fx.Node], given: Sequence[Names]
) -> Axes:
    """What the tracing made of the sizes that may vary: their names and limits.

    Raises:
        CaptureError: if the code needs two sizes to agree that were named apart.
    """
    axes = Axes()
    for node, names in zip(placeholders, given, strict=True):
        value = node.meta.get("val")
        for dimension, name in names.items():
            symbol = str(value.shape[dimension]) if isinstance(value, torch.Tensor) else ""
            if re.fullmatch(r"s\d+", symbol) is None:
                continue
            if axes.names.setdefault(symbol, name) != name:
                raise CaptureError(
                    f"dynamic: {axes.names[symbol]!r} and {name!r} (dimension {dimension} of input {node.target!r}) "
                    "always have the same size in this model; give them one name"
                )
    for symbol, bounds in program.range_constraints.items():
        called = axes.names.get(str(symbol))
        if called is not None:
            least, most = float(bounds.lower), float(bounds.upper)
            # Tracing never sees sizes of 0 and 1; it says no more of the least size than that.
            axes.limits[called] = (least if least > 2 else 1, most if most < 2**40 else math.inf)
    return axes


def input_names(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """What the file will call the inputs: the arguments' names, with the keys below them."""
    numbers = pytree.tree_unflatten(
        list(range(len(pytree.tree_leaves((args, kwargs))))), pytree.tree_structure((args, kwargs))
    )
    named_numbers = by_name(model, *numbers)
    names: dict[int, str] = {}
    for path, number in pytree.tree_flatten_with_path(named_numbers)[0]:
        names[number] = path_name(path)
    return [names[number] for number in sorted(names)]


def by_name(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What is given for each input as one tree, by the names of the arguments of the model's ``forward``."""
    parameters = inspect.signature(model.forward).parameters
    names = list(parameters)
    shapes: dict[str, Any] = {}
    for index, shape in enumerate(args):
        if index < len(names) and parameters[names[index]].kind is inspect.Parameter.VAR_POSITIONAL:
            shapes[names[index]] = tuple(args[index:])
            break
        if index >= len(names):
            raise CaptureError(
                f"example_inputs: got {len(args)} positional inputs, but {type(model).__name__}.forward takes "
                f"{len(names)}"
            )
        shapes[names[index]] = shape
    variadic = [n for n, p in parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD]
    for name, shape in kwargs.items():
        if name in parameters:
            shapes[name] = shape
        elif variadic:
            shapes.setdefault(variadic[0], {})[name] = shape
        else:
            raise CaptureError(
                f"example_inputs: {type(model).__name__}.forward takes no argument {name!r}; it takes "
                f"{', '.join(names)}"
            )
    return shapes
