"""From a user's module to one functional ATen graph, checked against the module it came from."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from halfstep.errors import CaptureError
from halfstep.graph.captured import Captured
from halfstep.graph.float32 import HandedOver, hand_over, in_float32, model_in_float32, other_types
from halfstep.graph.inputs import ModelInputs, Outputs, call_arguments
from halfstep.graph.shapes import BATCH, Dynamic, axes_of, batch_of, input_names, named
from halfstep.graph.tracing import (
    PREFIX,
    batched_inputs,
    explain,
    export_program,
    plain,
    unrooted,
    where,
    words,
)
from halfstep.graph.unfold import tensors
from halfstep.identity import Identity
from halfstep.quiet import quiet

#: Captured and original outputs may differ by this much, relative in the L2 norm. Captured graphs run the same
#: kernels, so the slack is for folded constants only.
TOLERANCE = 1e-5


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
    _check_names(model)
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


def _check_names(model: nn.Module) -> None:
    """Torch writes names into the code that it generates as they are: those with quotes would be code themselves."""
    state = (name for own in (model.named_parameters(), model.named_buffers()) for name, _ in own)
    for name in (*(name for name, _ in model.named_modules()), *state):
        if plain(name) != name:
            raise CaptureError(
                f"the model's {name!r}: has a quote, a backslash or a control character in its name, which torch's "
                "traced code cannot hold; rename it"
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
