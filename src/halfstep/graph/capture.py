"""From a user's module to one functional ATen graph, checked against the module it came from."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import os
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from halfstep.errors import CaptureError, DataError
from halfstep.graph.inputs import ModelInputs, batch_size, call_arguments
from halfstep.graph.unfold import FoldedNorm, tensors
from halfstep.identity import Identity

#: Captured and original outputs may differ by this much, relative in the L2 norm. Captured graphs run the same
#: kernels, so the slack is for folded constants only.
TOLERANCE = 1e-5


_OURS_AND_TORCHS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


@dataclass
class Captured:
    """A network as one functional ATen graph.

    Attributes:
        module: graph module over flat tensors: takes the placeholders, returns a tuple. Its parameters carry
            the names they have in the user's model, and each node's ``meta["nn_module_stack"]`` its module path.
        in_spec: how ``(args, kwargs)`` flatten to the placeholders.
        out_spec: how the tuple of outputs is put together to what the user's model returns.
        example_inputs: ``(args, kwargs)`` that the graph was traced with, batch of at least 2.
        batched: for each placeholder, whether its first dimension is the (dynamic) batch.
        folded: the batch norms that are no longer in the graph, one record for each layer they were folded into.
        originals: the user's parameters and buffers that are not in the graph, by name; weights that a batch norm was
            folded into are not kept twice.
        names: from every name of the user's state dict to the one that the graph, or ``originals``, has for it.
        content: a digest of the network as it was captured: its graph, and every parameter, buffer and constant.
    """

    module: fx.GraphModule
    in_spec: pytree.TreeSpec
    out_spec: pytree.TreeSpec
    example_inputs: tuple[tuple[Any, ...], dict[str, Any]]
    batched: tuple[bool, ...]
    notes: list[str] = field(default_factory=list)
    folded: list[FoldedNorm] = field(default_factory=list)
    originals: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    content: str = ""

    def check_inputs(self, flat: Sequence[Any]) -> None:
        """Raise unless ``flat`` are tensors of the example's types and shapes, but for the batch's size.

        Raises:
            DataError: naming the input, what was got and what is needed.
        """
        placeholders = [node for node in self.module.graph.nodes if node.op == "placeholder"]
        for node, value, batched in zip(placeholders, flat, self.batched, strict=True):
            wanted = node.meta.get("val")
            if not isinstance(wanted, torch.Tensor):
                continue
            if not isinstance(value, torch.Tensor):
                raise DataError(f"input {node.target!r}: got {type(value).__name__}, needed a tensor")
            got, needed = list(value.shape), list(wanted.shape)
            fixed = slice(1, None) if batched else slice(None)
            if len(got) != len(needed) or any(a != b for a, b in zip(got[fixed], needed[fixed], strict=True)):
                sizes = ["batch" if batched else str(needed[0]), *map(str, needed[1:])] if needed else []
                raise DataError(f"input {node.target!r}: got shape {tuple(got)}, needed ({', '.join(sizes)})")
            if value.dtype != wanted.dtype:
                raise DataError(f"input {node.target!r}: got {value.dtype}, needed {wanted.dtype}")

    def examples(self, inputs: ModelInputs, start: int, stop: int) -> ModelInputs:
        """Examples ``start`` to ``stop`` of a batch of model inputs, as views; what has no batch stays whole."""
        return self.select(inputs, slice(start, stop))

    def select(self, inputs: ModelInputs, which: slice | torch.Tensor) -> ModelInputs:
        """Some examples of a batch of model inputs, by a slice or by their indices; what has no batch stays whole."""
        args, kwargs = call_arguments(inputs)
        flat, spec = pytree.tree_flatten((args, kwargs))
        flat = [x[which] if batched else x for x, batched in zip(flat, self.batched, strict=True)]
        if isinstance(inputs, torch.Tensor):
            (tensor,) = flat
            assert isinstance(tensor, torch.Tensor)
            return tensor
        part: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(flat, spec)
        return part[1] or part[0]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph as the user's model would be run."""
        flat, _ = pytree.tree_flatten((args, kwargs))
        return pytree.tree_unflatten(self.module(*flat), self.out_spec)


def capture(model: nn.Module, example_inputs: ModelInputs) -> Captured:
    """Capture ``model`` in evaluation mode with a dynamic batch dimension.

    The model is copied first and never mutated. The graph's outputs are compared with the model's on the example
    inputs, and on a batch one larger.

    Args:
        model: any module that :func:`torch.export.export` can trace.
        example_inputs: a tensor, a tuple or a dict of inputs with a batch of at least 2. Every tensor whose first
            dimension has the batch's size is taken as batched.

    Raises:
        CaptureError: if a parameter is not finite, the batch is smaller than 2, the model cannot be traced (the
            message names the module and line at fault), keeps state between calls, or answers differently from
            its own graph.
    """
    _check_finite(model)
    size = batch_size(example_inputs)
    if size < 2:
        raise CaptureError(
            f"example_inputs: got a batch of {size}, needed at least 2, because torch.export takes a dimension of "
            "size 1 as fixed; repeat the example, for instance x.repeat(2, 1, 1, 1)"
        )
    try:
        own = copy.deepcopy(model).eval()
    except Exception as error:
        raise CaptureError(
            f"model {type(model).__name__} cannot be copied with copy.deepcopy: {error}; detach stored tensors and "
            "drop hooks or handles that cannot be copied"
        ) from error

    args, kwargs = call_arguments(example_inputs)
    flat, in_spec = pytree.tree_flatten((args, kwargs))
    batched = tuple(isinstance(x, torch.Tensor) and x.dim() > 0 and x.shape[0] == size for x in flat)
    program = _export(own, args, kwargs, in_spec, batched)
    if program.graph_signature.buffers_to_mutate:
        names = ", ".join(map(repr, program.graph_signature.buffers_to_mutate.values()))
        raise CaptureError(
            f"model {type(model).__name__} changes its buffers {names} in evaluation mode; a quantized graph keeps "
            "no state between calls: return the state as an output and pass it as an input"
        )
    module = program.module(check_guards=False)
    out_spec = program.call_spec.out_spec
    assert isinstance(module, fx.GraphModule) and out_spec is not None
    module.graph.set_codegen(fx.graph.CodeGen())
    module = fx.GraphModule(
        module, module.graph
    )  # without torch's hooks, which check for the user's signature
    originals, graph_names = _not_in_graph(own, module)
    content = Identity(str(module.graph), sorted(tensors(module).items())).digest
    captured = Captured(
        module,
        in_spec,
        out_spec,
        (args, kwargs),
        batched,
        originals=originals,
        names=graph_names,
        content=content,
    )
    check_equal(captured, own)
    return captured


def _not_in_graph(model: nn.Module, graph: fx.GraphModule) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What the model's state dict has and the graph has not, and which of the graph's names stands for each name.

    A tensor with several names in the model has one in the graph.
    """
    live = tensors(graph)
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
    args, kwargs = captured.example_inputs
    flat, spec = pytree.tree_flatten((args, kwargs))
    longer = [
        torch.cat([x, x[:1]]) if batched else x for x, batched in zip(flat, captured.batched, strict=True)
    ]
    for leaves in (flat, longer):
        call_args, call_kwargs = pytree.tree_unflatten(leaves, spec)
        with torch.no_grad():
            wanted = _float_outputs(model(*call_args, **call_kwargs))
            got = _float_outputs(captured(*call_args, **call_kwargs))
            for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
                error = relative_error(a, b)
                if error <= TOLERANCE:
                    continue
                again = _float_outputs(model(*call_args, **call_kwargs))[index]
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


def _check_finite(model: nn.Module) -> None:
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise CaptureError(
                f"parameter {name!r}: {bad} of {tensor.numel()} values are NaN or infinite; load a checkpoint whose "
                "weights are finite"
            )


def _export(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    in_spec: pytree.TreeSpec,
    batched: tuple[bool, ...],
) -> torch.export.ExportedProgram:
    dynamic = [{0: torch.export.Dim.DYNAMIC} if b else None for b in batched]
    shapes_args, shapes_kwargs = pytree.tree_unflatten(dynamic, in_spec)
    # torch wants one tree; keyword arguments go by their names, positional ones by the signature's.
    shapes = _by_name(model, shapes_args, shapes_kwargs)
    try:
        with quiet():
            program = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
            # An empty table functionalises and keeps conv, linear, softmax ... whole.
            functional: torch.export.ExportedProgram = program.run_decompositions({})
            return functional
    except Exception as error:
        raise CaptureError(_explain(model, error)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's own deprecations and graph dumps off the user's terminal; errors are explained instead."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _by_name(model: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
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


def _explain(model: nn.Module, error: Exception) -> str:
    """Which module and line stopped the tracing, in one sentence, and what to try."""
    paths = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
    where = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
        file = code.co_filename
        if id(owner) in paths and isinstance(owner, nn.Module) and not file.startswith(_OURS_AND_TORCHS):
            where = f"module {paths[id(owner)]!r}, {file}:{line}: "
    kind = type(error).__name__
    text = str(error).strip().splitlines()
    first = text[0] if text else kind
    if "DataDependent" in kind or "data-dependent" in str(error):
        advice = (
            "the path taken depends on the values of a tensor, which a fixed graph cannot express: replace the "
            "`if`/`while` by torch.where or masking, or capture the submodule without it"
        )
    elif "Constraint" in kind or "specialized" in str(error) or "Dim.DYNAMIC" in str(error):
        advice = (
            "the code fixes the batch size (for instance a reshape or loop that uses a Python number for it): "
            "take it from x.shape[0] instead"
        )
    else:
        advice = (
            "try torch.export.export(model.eval(), example_inputs) alone to see torch's own account; rewriting the "
            "line with plain tensor operations usually helps"
        )
    return f"the model cannot be captured: {where}{first} ({kind}); {advice}"
