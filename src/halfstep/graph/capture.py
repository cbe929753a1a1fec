"""From a user's module to one functional ATen graph, checked against the module it came from."""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from halfstep.errors import ArgumentError, CaptureError, DataError
from halfstep.graph.float32 import HandedOver, hand_over, in_float32, model_in_float32, other_types
from halfstep.graph.inputs import ModelInputs, Outputs, batch_size, call_arguments
from halfstep.graph.pipeline import ModulePart, Pipeline, joined_batches, parts_of
from halfstep.graph.shapes import BATCH, Axes, Dynamic, Names, axes_of, batch_of, input_names, named
from halfstep.graph.tracing import (
    PREFIX,
    batched_inputs,
    bind,
    explain,
    export_program,
    unrooted,
    where,
    words,
)
from halfstep.graph.unfold import FoldedNorm, tensors
from halfstep.identity import Identity
from halfstep.quiet import quiet

#: Captured and original outputs may differ by this much, relative in the L2 norm. Captured graphs run the same
#: kernels, so the slack is for folded constants only.
TOLERANCE = 1e-5


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


def capture(
    model: nn.Module, example_inputs: ModelInputs, dynamic: Dynamic | None = None, taken_over: bool = False
) -> Captured:
    """Capture ``model`` in evaluation mode with a dynamic batch dimension, and others that may vary.

    The model is copied first and never mutated, unless it is taken over. The graph's outputs are compared
    with the model's on the example inputs, on a batch one larger, and on inputs that are shorter in what else
    varies. A model in half precision or float64 is converted to float32 before it is traced; what was handed
    over is kept beside it, since that is what its scores are compared with.

    Args:
        model: any module that :func:`torch.export.export` can trace.
        example_inputs: a tensor, a tuple or a dict of inputs with a batch of at least 2. The first dimension of the
            first tensor is the batch, unless ``dynamic`` names another one ``"batch"``. That of another tensor is if it
            has the same size and must have (as far as the tracing and a trial show), or is the first dimension of an
            output.
        dynamic: what else may vary: names by input and dimension, ``{"ids": {1: "tokens"}, "mask": {1: "tokens"}}``, or
            another example whose sizes differ where they may. Dimensions of one name have one size.
        taken_over: whether nobody else has the model, and its parameters become those of what is captured.

    Raises:
        ArgumentError: if ``dynamic`` names an input or a dimension that is not there, or one name for two sizes.
        CaptureError: if the model's code fixes a size that was to vary (the message names the module and line), if a
            parameter is not finite, the batch is smaller than 2, the model cannot be run in the
            precision that it has or traced (the message names the module and line at fault), keeps state between
            calls, or answers differently from its own graph.
    """
    _check_kind(model)
    check_parameters(model)
    own = (model if taken_over else copied(model)).eval()
    args, kwargs = call_arguments(example_inputs)
    flat, in_spec = pytree.tree_flatten((args, kwargs))
    given = named(dynamic, input_names(own, args, kwargs), flat, in_spec)
    size = batch_of(flat, given)[0]
    if size < 2:
        raise CaptureError(
            f"example_inputs: got a batch of {size}, needed at least 2, because torch.export takes a dimension of "
            "size 1 as fixed; repeat the example, for instance x.repeat(2, 1, 1, 1)"
        )
    handed_over = None
    if types := other_types(own):
        try:
            handed_over = hand_over(own, types, args, kwargs)
        except Exception as error:
            raise CaptureError(
                f"the model cannot be run in {words(types)}, as it was handed over: {where(own, error)}; hand over "
                "model.float() to have it compared with itself in float32"
            ) from error
        own, (args, kwargs) = model_in_float32(own, types), in_float32((args, kwargs), types)
    flat = pytree.tree_leaves((args, kwargs))
    program, traced, tensors_read = export_program(own, args, kwargs, in_spec, given, types)
    if program.graph_signature.buffers_to_mutate:
        changed = (name.removeprefix(PREFIX) for name in program.graph_signature.buffers_to_mutate.values())
        names = ", ".join(map(repr, changed))
        raise CaptureError(
            f"model {type(model).__name__} changes its buffers {names} in evaluation mode; a quantized graph keeps "
            "no state between calls: return the state as an output and pass it as an input"
        )
    out_spec = program.call_spec.out_spec
    assert out_spec is not None
    graph, module, fixed = unrooted(traced, tensors_read)
    originals, graph_names = _not_read(own, graph)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    axes = axes_of(program, inputs, given)
    sizes = [given] if any(given) else []
    content = Identity(str(graph), sorted(tensors(module).items()), types, *sizes).digest
    batch_axes = batched_inputs(graph, module, flat, axes, given)
    captured = Captured(
        graph,
        module,
        in_spec,
        Outputs(out_spec, fixed),
        (args, kwargs),
        batch_axes,
        axes,
        originals=originals,
        names=graph_names,
        content=content,
        handed_over=handed_over,
        source=model,
        given=given,
    )
    check_equal(captured, own)
    if any(given):
        _check_shorter(captured, own)
    if handed_over is not None:
        captured.notes = (_said_of(handed_over, captured),)
    return captured


def _check_kind(model: nn.Module) -> None:
    """Raise for modules that are no float network written in Python, or have layers that no file can hold."""
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"model {name} is TorchScript, which torch.export does not trace; hand over the module that it was made "
            "from, or the path of an ONNX file, which torch.onnx.export(model, ..., dynamo=False) writes"
        )
    for path, module in model.named_modules():
        if isinstance(module, nn.LSTM) and module.proj_size:
            raise CaptureError(
                f"module {path!r} is an LSTM with projections (proj_size={module.proj_size}), which ONNX has no "
                "operator for; train it with proj_size=0, or hand over the part of the network without it"
            )
        if re.match(r"torch\.ao\.nn\.(\w+\.)*quantized\.", f"{type(module).__module__}."):
            raise CaptureError(
                f"model {name} is quantized already: {path!r} is a {type(module).__module__}.{type(module).__name__}; "
                "hand over the float model that it was made from"
            )


def copied(model: nn.Module) -> nn.Module:
    """A copy of a module that shares nothing with it.

    Tensors that a module computed and keeps, as the weights of :mod:`torch.nn.utils.prune` and of the older
    ``weight_norm`` and ``spectral_norm``, which are made anew at each call, are copied without the history of their
    gradients, with which torch refuses to.

    Raises:
        CaptureError: if it cannot be copied, with the reason.
    """
    kept = (value for module in model.modules() for value in (*vars(module).values(), *module.buffers(False)))
    computed = [value for value in kept if isinstance(value, torch.Tensor) and not value.is_leaf]
    try:
        with quiet():  # graphs that torch exported warn of torch's own code
            return copy.deepcopy(model, {id(value): value.detach().clone() for value in computed})
    except Exception as error:
        raise CaptureError(
            f"model {type(model).__name__} cannot be copied with copy.deepcopy: {error}; detach stored tensors and "
            "drop hooks or handles that cannot be copied"
        ) from error


def _said_of(handed_over: HandedOver, captured: Captured) -> str:
    """What there is to know of a model that was converted, with how far that takes its answers to the example."""
    args, kwargs = captured.example_inputs
    with torch.no_grad():
        theirs, ours = (_float_outputs(model(*args, **kwargs)) for model in (handed_over, captured))
    errors = [relative_error(a.to(b.dtype), b) for a, b in zip(theirs, ours, strict=True)]
    away = f"{max(errors):.1e} (relative)" if all(map(math.isfinite, errors)) else "more than any number"
    return (
        f"The model is handed over in {words(handed_over.types)} and computed in torch.float32 from here on, which "
        "exported files take and return; scores are compared with those of the model as it was handed over"
        + (f", whose outputs on the example inputs are {away} from those in float32" if errors else "")
    )


def _not_read(model: nn.Module, graph: fx.Graph) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What the model's state dict has and the graph does not read, and which name the graph has for each name.

    A tensor with several names in the model is read under one of them.
    """
    live = {str(node.target) for node in graph.nodes if node.op == "get_attr" and node.users}
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in sorted(state.items(), key=lambda item: item[0] not in live):
        first.setdefault(id(tensor), name)
    names = {name: first[id(tensor)] for name, tensor in state.items()}
    return {name: state[name].detach() for name in names.values() if name not in live}, names


def check_equal(captured: Captured, model: nn.Module) -> None:
    """Raise unless the graph answers as ``model`` does, on the example and on a batch one larger.

    Raises:
        CaptureError: naming the output, the relative error, and whether the model agrees with itself.
    """
    flat = pytree.tree_leaves(captured.example_inputs)
    longer = [
        x if axis is None else torch.cat([x, x.narrow(axis, 0, 1)], axis)
        for x, axis in zip(flat, captured.batch_axes, strict=True)
    ]
    for leaves in (flat, longer):
        try:
            wanted = _answers(model, leaves, captured.in_spec)
        except Exception as failure:
            raise CaptureError(explain(model, failure, leaves, captured.types)) from failure
        _hold(captured, model, leaves, wanted)


def _check_shorter(captured: Captured, model: nn.Module) -> None:
    """The same for inputs that are shorter in what may vary beside the batch: by one, or half as long, or a quarter.

    Models that cannot take the one (an image whose sides are no multiples of four) may take the other.
    """
    flat = pytree.tree_leaves(captured.example_inputs)
    inputs = [node for node in captured.graph.nodes if node.op == "placeholder"]
    for divisor in (1, 2, 4):
        leaves = list(flat)
        for index, node in enumerate(inputs):
            value = node.meta.get("val")
            for dimension, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
                if str(size) in captured.axes.names and captured.axes.name(size) != BATCH:
                    longest = flat[index].shape[dimension]
                    length = max(1, longest - 1 if divisor == 1 else longest // divisor)
                    leaves[index] = leaves[index].narrow(dimension, 0, length)
        try:
            wanted = _answers(model, leaves, captured.in_spec)
        except Exception:  # the model's own limits; the graph has them too
            continue
        _hold(captured, model, leaves, wanted)
        return


def _answers(model: Any, leaves: Sequence[Any], spec: pytree.TreeSpec) -> list[torch.Tensor]:
    """What a model answers to inputs, which stay as they are even where it writes into its own."""
    own = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(own, spec)
    with torch.no_grad():
        return _float_outputs(model(*args, **kwargs))


def _hold(
    captured: Captured, model: nn.Module, leaves: Sequence[Any], wanted: Sequence[torch.Tensor]
) -> None:
    """Raise unless the graph answers these inputs as ``wanted``."""
    got = _answers(captured, leaves, captured.in_spec)
    for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
        error = relative_error(a, b)
        if error <= TOLERANCE:
            continue
        again = _answers(model, leaves, captured.in_spec)[index]
        cause = (
            "the model answers differently when asked twice (randomness in evaluation mode?)"
            if relative_error(again, b) > TOLERANCE
            else "the captured graph computes something else; please report the model's architecture"
        )
        raise CaptureError(
            f"output {index} of the captured graph differs from the model's by {error:.1e} (relative), "
            f"allowed {TOLERANCE:.0e}: {cause}"
        )


@contextmanager
def unchanged(captured: Captured, what: str) -> Iterator[None]:
    """Raise unless the block leaves the graph's outputs on the example as they were, to :data:`TOLERANCE`.

    Raises:
        CaptureError: naming ``what`` was done and by how much which output changed.
    """
    args, kwargs = captured.example_inputs
    with torch.no_grad():
        before = _float_outputs(captured(*args, **kwargs))
        yield
        after = _float_outputs(captured(*args, **kwargs))
    for index, (got, wanted) in enumerate(zip(after, before, strict=True)):
        if (error := relative_error(got, wanted)) > TOLERANCE:
            raise CaptureError(
                f"{what} changed output {index} by {error:.1e} (relative), allowed {TOLERANCE:.0e}; the network "
                "amplifies float rounding: check for batch norms with a running variance near 0"
            )


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """``|got - wanted| / |wanted|`` in the L2 norm, in float64; 0 where both are equal, NaN and inf included."""
    if got.shape != wanted.shape:
        return float("inf")
    if torch.equal(got, wanted) or torch.allclose(got, wanted, rtol=0, atol=0, equal_nan=True):
        return 0.0
    got, wanted = got.detach(), wanted.detach()
    difference = torch.linalg.vector_norm(got.double() - wanted.double())
    return float(difference / torch.linalg.vector_norm(wanted.double()).clamp_min(1e-30))


def _float_outputs(outputs: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


def check_parameters(model: nn.Module) -> None:
    """See that every parameter is finite, and what norms have averaged is a number.

    Raises:
        CaptureError: naming the first that is not.
    """
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise CaptureError(
                f"parameter {name!r}: {bad} of {tensor.numel()} values are NaN or infinite; load a checkpoint whose "
                "weights are finite"
            )
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var") and buffer.isnan().any():
            raise CaptureError(
                f"buffer {name!r}: {int(buffer.isnan().sum())} of {buffer.numel()} values are NaN, as NaN in the "
                "training data leave them; load a checkpoint from before, or pass clean data in train mode"
            )
