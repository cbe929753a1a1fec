"""Several modules as one network: captured side by side, and told apart again where each is called by itself.

An encoder and the decoder that is called in a loop around it cannot be one graph: how often is up to the caller. But
two graphs without a common value are one as well, with one list of layers, and everything that ranks, calibrates and
exports a network takes it as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from halfstep.errors import ArgumentError, DataError, named
from halfstep.graph.inputs import ModelInputs, Outputs, batch_size, call_arguments


class Pipeline(nn.Module):
    """Modules by name: takes the inputs of each as an argument of that name, returns a dict of what they return.

    Args:
        modules: by names that Python takes for names.

    Raises:
        ArgumentError: naming the one that is no module, or whose name will not do.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        if not modules:
            raise ArgumentError("model: got an empty dict, needed modules by name, {'encoder': encoder, ...}")
        for name, module in modules.items():
            if not isinstance(module, nn.Module):
                raise ArgumentError(
                    f"model {name!r}: got {type(module).__name__}, needed a torch.nn.Module (hs.from_onnx(path) makes "
                    "one of a file)"
                )
            if not (isinstance(name, str) and name.isidentifier()) or hasattr(self, name):
                raise ArgumentError(
                    f"model: got a module called {name!r}, needed a name such as 'encoder', which torch.nn.Module has "
                    "no attribute of"
                )
            self.add_module(name, module)

    @property
    def forward(self) -> Callable[..., dict[str, Any]]:  # type: ignore[override]
        """A function whose signature has the modules' names, which files name their inputs after."""
        modules = dict(self.named_children())

        def forward(**inputs: ModelInputs) -> dict[str, Any]:
            found = {}
            for name, module in modules.items():
                args, kwargs = call_arguments(inputs[name])
                found[name] = module(*args, **kwargs)
            return found

        keywords = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in modules]
        forward.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
        return forward


@dataclass(frozen=True)
class ModulePart:
    """What one module of a :class:`Pipeline` has of its graph.

    Attributes:
        inputs: places of its inputs among the graph's placeholders.
        in_spec: how the ``(args, kwargs)`` of a call of the module flatten to them.
        outputs: places of its values among those that the graph returns.
        out_spec: how they are put together to what the module returns.
        bare: the example inputs are a tensor by itself.
    """

    inputs: tuple[int, ...]
    in_spec: pytree.TreeSpec
    outputs: tuple[int, ...]
    out_spec: Outputs
    bare: bool

    def flatten(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The values of the module's inputs for the arguments of a call.

        Raises:
            DataError: if they have another structure than the example inputs.
        """
        example_args, example_kwargs = pytree.tree_unflatten(list(self.inputs), self.in_spec)
        if set(kwargs) == set(example_kwargs):  # in whatever order
            kwargs = {key: kwargs[key] for key in example_kwargs}
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != self.in_spec:
            raise DataError(
                f"module {name!r}: got {len(args)} positional arguments and keywords {sorted(kwargs)}, needed "
                f"{len(example_args)} positional and keywords {sorted(example_kwargs)}, as in its example_inputs"
            )
        return flat

    def model_inputs(self, flat: Sequence[Any]) -> ModelInputs:
        """The module's inputs as the example has them, from their values."""
        args, kwargs = pytree.tree_unflatten(list(flat), self.in_spec)
        inputs: ModelInputs = args[0] if self.bare else kwargs or args
        return inputs


def parts_of(in_spec: pytree.TreeSpec, out_spec: Outputs) -> dict[str, ModulePart]:
    """The parts of a captured :class:`Pipeline`, by the modules' names."""
    _, given = pytree.tree_unflatten(list(range(in_spec.num_leaves)), in_spec)
    returned = pytree.tree_unflatten(list(range(out_spec.spec.num_leaves)), out_spec.spec)
    computed = [place for place in range(out_spec.spec.num_leaves) if place not in out_spec.fixed]
    found = {}
    for name, tree in given.items():
        bare = isinstance(tree, int)
        arguments = ((tree,), {}) if bare else call_arguments(tree)
        inputs, own_in = pytree.tree_flatten(arguments)
        places, own_out = pytree.tree_flatten(returned[name])
        fixed = {
            index: out_spec.fixed[place] for index, place in enumerate(places) if place in out_spec.fixed
        }
        outputs = tuple(computed.index(place) for place in places if place not in out_spec.fixed)
        found[name] = ModulePart(tuple(inputs), own_in, outputs, Outputs(own_out, fixed), bare)
    return found


def joined_example(modules: Iterable[str], example_inputs: Any) -> dict[str, ModelInputs]:
    """The example inputs of a :class:`Pipeline`, in the order of its modules.

    Raises:
        ArgumentError: if one is missing, too many, or has another batch than the first.
    """
    names = list(modules)
    _check_names("example_inputs", names, example_inputs)
    sizes = {name: batch_size(example_inputs[name]) for name in names}
    if len({*sizes.values()}) > 1:
        listed = ", ".join(f"{size} for {name!r}" for name, size in sizes.items())
        raise ArgumentError(f"example_inputs: got batches of {listed}, needed the same size for every module")
    # Copies: tracing takes the sizes of one tensor that two modules are given for the same size.
    return {
        name: pytree.tree_map_only(torch.Tensor, torch.clone, _plain(example_inputs[name])) for name in names
    }


def joined_batches(
    parts: Mapping[str, ModulePart],
    batch_axes: Sequence[int | None],
    batches: Mapping[str, Iterable[ModelInputs]],
) -> Iterator[dict[str, ModelInputs]]:
    """Batches of a :class:`Pipeline` from those of its modules, each of which is seen to its end.

    Batches are cut where those of another module end, so that all have the same number of examples. A module with fewer
    examples starts over; those of an iterator are kept for that.

    Args:
        parts: of the modules.
        batch_axes: which dimension of each placeholder is the batch.
        batches: inputs by module.

    Raises:
        ArgumentError: if a module has no data, or data are given for what is none.
        DataError: if there is no example of a module, or one has another structure than its example inputs.
    """
    _check_names("calibration", list(parts), batches)
    streams = {
        name: _Stream(name, part, [batch_axes[place] for place in part.inputs], batches[name])
        for name, part in parts.items()
    }
    while True:
        for stream in streams.values():
            stream.refill()
        if all(stream.ended for stream in streams.values()):
            return
        count = min(stream.left for stream in streams.values())
        yield {name: stream.take(count) for name, stream in streams.items()}


class _Stream:
    """The examples of one module, over and over.

    Attributes:
        left: examples of the batch at hand that were not taken yet.
        ended: whether every example was taken.
    """

    def __init__(
        self, name: str, part: ModulePart, axes: Sequence[int | None], batches: Iterable[ModelInputs]
    ) -> None:
        self._name, self._part, self._axes = name, part, axes
        self._source, self._batches = batches, iter(batches)
        self._kept: list[ModelInputs] = []
        self._flat: list[Any] = []
        self.left, self.ended = 0, False

    def refill(self) -> None:
        """See that there is a batch at hand."""
        while not self.left:
            inputs = next(self._batches, None)
            if inputs is None:
                again = self._kept if isinstance(self._source, Iterator) else self._source
                self.ended, self._batches = True, iter(again)
                inputs = next(self._batches, None)
            elif isinstance(self._source, Iterator) and not self.ended:
                inputs = pytree.tree_map_only(torch.Tensor, torch.clone, inputs)
                self._kept.append(inputs)
            if inputs is None:
                raise DataError(
                    f"calibration {self._name!r}: got no batch, needed at least one (a generator can be used only once)"
                )
            with named(f"calibration {self._name!r}"):
                self._flat = self._part.flatten(self._name, *call_arguments(inputs))
            sizes = [x.shape[d] for x, d in zip(self._flat, self._axes, strict=True) if d is not None]
            self._start, self.left = 0, sizes[0] if sizes else 1

    def take(self, count: int) -> ModelInputs:
        """The next examples of the batch at hand, as views; what has no batch stays whole."""
        flat = [
            x if axis is None else x.narrow(axis, self._start, count)
            for x, axis in zip(self._flat, self._axes, strict=True)
        ]
        self._start, self.left = self._start + count, self.left - count
        return self._part.model_inputs(flat)


def _check_names(what: str, names: Sequence[str], given: Any) -> None:
    """Raise unless ``given`` is a dict with something for every module and nothing else."""
    if not isinstance(given, Mapping):
        raise ArgumentError(
            f"{what}: got {type(given).__name__}, needed a dict by the modules' names, {', '.join(map(repr, names))}"
        )
    for name in [*names, *given]:
        if name not in given or name not in names:
            problem = "nothing for" if name in names else "something for the unknown"
            raise ArgumentError(
                f"{what}: got {problem} module {name!r}, needed one entry for each of {', '.join(map(repr, names))}"
            )


def _plain(inputs: ModelInputs) -> ModelInputs:
    """A tensor as it is, a sequence as a tuple, a mapping as a dict."""
    args, kwargs = call_arguments(inputs)
    return inputs if isinstance(inputs, torch.Tensor) else kwargs or args
