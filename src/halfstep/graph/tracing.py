"""Tracing a module with torch.export: below a root of our own, and why where it cannot be done.

Tracing a module with torch.export, and what the trace says of its inputs.

Networks one level below a root of our own, where none of their names can be one of torch's.

``fx.GraphModule`` keeps ``graph``, ``code``, ``recompile`` ... beside a network's own parameters and layers, which may
be called so too. What torch is handed therefore has one child, the network; what we keep has its names as they are.

Why a model cannot be captured: which module and line stopped the tracing, and what to try.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
import re
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from halfstep.errors import CaptureError
from halfstep.graph.inputs import move
from halfstep.graph.out_of_place import out_of_place
from halfstep.graph.recurrences import recurrences_whole
from halfstep.graph.shapes import BATCH, Axes, Names, batch_of, by_name, varies
from halfstep.graph.unfold import tensors
from halfstep.quiet import quiet


def export_program(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    in_spec: pytree.TreeSpec,
    given: Sequence[Names],
    types: tuple[torch.dtype, ...],
) -> tuple[torch.export.ExportedProgram, fx.Graph, fx.GraphModule]:
    """What torch traces, functional, with dimensions that vary.

    Args:
        model: in float32 and evaluation mode.
        args: positional example inputs.
        kwargs: the others.
        in_spec: how both flatten.
        given: the dimensions that the user lets vary, one dict an input.
        types: that the model was converted from.

    Returns:
        The program, its graph, and what holds the tensors that this reads.

    Raises:
        CaptureError: naming the module and line that cannot be traced, or that fix a size which must vary.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    size, batches = batch_of(leaves, given)
    hints: list[dict[int, Any] | None] = []
    for leaf, names, axis in zip(leaves, given, batches, strict=True):
        hint: dict[int, Any] = dict.fromkeys(names, torch.export.Dim.DYNAMIC)
        if isinstance(leaf, torch.Tensor) and leaf.dim() and axis not in names and leaf.shape[0] == size:
            # The batch must vary; what only happens to have its size may turn out to be fixed.
            hint[0] = torch.export.Dim.AUTO if any(hints) else torch.export.Dim.DYNAMIC
        hints.append(hint or None)
    shapes_args, shapes_kwargs = pytree.tree_unflatten(hints, in_spec)
    # torch wants one tree; keyword arguments go by their names, positional ones by the signature's.
    shapes = by_name(model, shapes_args, shapes_kwargs)

    def trace() -> torch.export.ExportedProgram:
        with recurrences_whole():
            return torch.export.export(Rooted(model), args, kwargs, dynamic_shapes=shapes)

    try:
        with quiet():
            program = trace()
            module = _module_of(program)
            graph = out_of_place(module.graph)
            if graph is None:
                with recurrences_whole():
                    # An empty table functionalises and keeps conv, linear, softmax ... whole.
                    program = program.run_decompositions({})
                module = _module_of(program)
                graph = module.graph
            return program, graph, module
    except Exception as error:
        fixed = re.search(
            r"L\['(\w+)'\]\S*\.size\(\)\[(\d+)\] as dynamic but your code specialized it .*\((\d+)\)",
            str(error),
        )
        if fixed is None:
            runs = _runs(model, args, kwargs)
            raise CaptureError(explain(model, error, leaves, types, runs)) from error
        name, dimension, number = fixed.groups()
        place = fixed_at(trace, model, int(number))
        what = (
            "the batch size"
            if dimension == "0"
            else f"dimension {dimension} of input {name!r}, which is to vary,"
        )
        advice = f"take it from {name}.shape[{dimension}] there"
        if GENERATED in place:
            advice = (
                "that code was generated when the module was exported, for this size: export it anew with "
                f"dynamic_shapes={{{name!r}: {{{dimension}: torch.export.Dim.DYNAMIC}}}}, or hand over the module that "
                "it was made from"
            )
        raise CaptureError(
            f"the model's code fixes {what} at the example's {number}{f': {place}' if place else ''}; {advice}"
            + ("" if dimension == "0" else ", or leave it out of dynamic")
        ) from error


#: The file, in words, of the code of a :class:`torch.fx.GraphModule`.
GENERATED = "<eval_with_key>"


def _module_of(program: torch.export.ExportedProgram) -> fx.GraphModule:
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    return module


def batched_inputs(
    graph: fx.Graph, module: nn.Module, flat: Sequence[Any], axes: Axes, given: Sequence[Names]
) -> tuple[int | None, ...]:
    """For each placeholder, which dimension is the batch: the one named so, or the first; None if it has none.

    The tracing gives sizes that must be equal one symbol, and those that may differ one each: that of a table of which
    the code takes the mean, say. A symbol is a batch if it is the first input's, or the first dimension of an output
    (of two towers side by side), or if the graph fails where the others are larger and it is not: what indices tie
    together the tracing does not see.
    """

    def symbol_of(node: Any, axis: int = 0) -> str:
        value = node.meta.get("val") if isinstance(node, fx.Node) else None
        if not isinstance(value, torch.Tensor) or not value.dim() or not varies(value.shape[axis]):
            return ""
        symbol = str(value.shape[axis])
        return symbol if axes.names.get(symbol, BATCH) == BATCH else ""

    places = batch_of(flat, given)[1]
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    sizes = [symbol_of(node, axis) for node, axis in zip(inputs, places, strict=True)]
    (end,) = (node for node in graph.nodes if node.op == "output")
    named = {size for size, names in zip(sizes, given, strict=True) if BATCH in names.values()}
    batches = (named or {next(filter(None, sizes), "")}) | set(map(symbol_of, end.args[0])) - {""}
    free = dict.fromkeys(size for size in sizes if size and size not in batches)
    if free and any(tensor.device.type != "cpu" for tensor in tensors(module).values()):
        module = copy.deepcopy(module).cpu()  # an index out of bounds would end all work on the device
    for size in free:
        longer = [
            torch.cat([x, x.narrow(axis, 0, 1)], axis).cpu()
            if own and own != size
            else move(x, torch.device("cpu"))
            for x, own, axis in zip(flat, sizes, places, strict=True)
        ]
        try:
            with torch.no_grad():
                bind(graph, module)(*longer)
        except Exception:
            batches.add(size)
    return tuple(axis if size and size in batches else None for size, axis in zip(sizes, places, strict=True))


CHILD = "model"


PREFIX = f"{CHILD}."


class Rooted(nn.Module):
    """A module whose one child is ``model``, with the signature of ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(CHILD, model)

        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        self.forward = forward


def unrooted(traced: fx.Graph, module: nn.Module) -> tuple[fx.Graph, nn.Module, dict[int, Any]]:
    """What was traced from a :class:`Rooted`, with names of tensors and module paths that are the network's own.

    Nodes are named anew, by what they call and in their order: torch numbers them by what it had tried meanwhile. What
    the network's code writes into its inputs the graph computes, but the inputs stay as they are.

    Args:
        traced: the graph.
        module: the tensors that it reads.

    Returns:
        The graph, which returns only what it computes; the tensors that it reads, in plain modules; and what the
        network returns beside, by its place among the outputs.
    """
    graph, root = fx.Graph(), nn.Module()
    fixed: dict[int, Any] = {}
    copies: dict[fx.Node, fx.Node] = {}
    for node in traced.nodes:
        if node.op == "output":
            fixed = {place: x for place, x in enumerate(node.args[0]) if not isinstance(x, fx.Node)}
            graph.output(tuple(copies[x] for x in node.args[0] if isinstance(x, fx.Node)))
        elif node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder":
            continue
        elif node.op == "get_attr":
            target = str(node.target)
            name = target.removeprefix(PREFIX)  # constants of the code lie beside the network
            _place(root, name, functools.reduce(getattr, target.split("."), module))
            copies[node] = graph.get_attr(name)
            copies[node].meta = dict(node.meta)
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = graph.create_node(node.op, node.target, args, kwargs, _called(node), node.type)
            copies[node].meta = dict(node.meta)
            stack = copies[node].meta.get("nn_module_stack")
            if stack is not None:
                copies[node].meta["nn_module_stack"] = _own_stack(stack)
    return graph, root, fixed


def _called(node: fx.Node) -> str:
    """What a node is called, but for a number: an input as it is, a call by its operator."""
    if node.op == "placeholder" or not isinstance(node.target, torch._ops.OpOverload):
        return node.name if node.op == "placeholder" else str(getattr(node.target, "__name__", node.target))
    return str(node.target.overloadpacket.__name__)


def _own_stack(stack: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Without the root and what torch makes up for sizes, and with paths from the network on."""
    own = ((key, path, owner) for key, (path, owner) in stack.items() if f"{path}.".startswith(PREFIX))
    return {key: (path[len(PREFIX) :], owner) for key, path, owner in own}


def rooted(graph: fx.Graph, module: nn.Module) -> fx.GraphModule:
    """What torch can be handed: ``graph`` over the tensors of ``module``, all below a root.

    Args:
        graph: reads tensors of ``module`` by their names; changed so that it reads them below the root.
        module: left as it is.
    """
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = PREFIX + str(node.target)
        elif node.op == "placeholder":
            # Names that mean something else to the code that fx writes are numbered there.
            node.target = node.name
    root = nn.Module()
    root.add_module(CHILD, module)
    return fx.GraphModule(root, graph)


def _place(root: nn.Module, name: str, value: torch.Tensor | nn.Module) -> None:
    """Keep a tensor (or the body of a branch) under its dotted name, in modules made for it; any name will do."""
    *path, leaf = name.split(".")
    for part in path:
        root = root._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    put(root, leaf, value)


def put(owner: nn.Module, leaf: str, value: torch.Tensor | nn.Module) -> None:
    """Keep a tensor or a module in ``owner`` under a name, which torch's own attributes may have too."""
    if isinstance(value, nn.Module):
        owner._modules[leaf] = value
    elif isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value


def plain(name: str) -> str:
    """A name that can be written into generated code between quotes, as torch does with what is no name of Python's.

    >>> plain('conv "1"')
    'conv _1_'
    """
    return "".join(c if c.isprintable() and c not in "\"'\\" else "_" for c in name)


def bind(graph: fx.Graph, module: nn.Module) -> Callable[..., Any]:
    """``graph`` as a function of the values of its placeholders, in order, over the tensors of ``module``."""
    targets = {node: node.target for node in graph.nodes if node.op == "placeholder"}
    try:
        for (
            node
        ) in targets:  # an argument may be called ``torch`` or ``getattr``, which the code needs itself
            node.target = node.name
        code = graph.python_code("self")
    finally:
        for node, target in targets.items():
            node.target = target
    namespace = dict(code.globals)
    exec(compile(code.src, "<halfstep graph>", "exec"), namespace)
    return types.MethodType(namespace["forward"], module)


_OURS_AND_TORCHS = (os.path.dirname(torch.__file__), os.path.dirname(os.path.dirname(__file__)))


#: What torch's messages about operands of different types have in common.
_TYPES_DIFFER = re.compile(r"dtype|type \(|Half|BFloat16|Double")


def where(model: nn.Module, error: Exception) -> str:
    """The user's module and line at which ``error`` was raised, where that is known, and its first line."""
    found = _places(model, traceback.walk_tb(error.__traceback__))
    kind = type(error).__name__
    text = str(error).strip().splitlines()
    return f"{found[-1] + ': ' if found else ''}{text[0] if text else kind} ({kind})"


def fixed_at(trace: Callable[[], Any], model: nn.Module, size: int) -> str:
    """The user's module and line that made a dimension of this ``size`` the number that it is in the example.

    Torch tells it only while it traces, so the model is traced once more.

    Returns:
        The place, or nothing where torch decided it by itself.
    """
    places: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if re.match(rf"set_replacement s\d+ = {size}\b", record.getMessage()):
                places.extend(_places(model, traceback.walk_stack(None))[:1])

    log = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = log.handlers, log.level, log.propagate
    log.handlers, log.propagate = [Listener()], False
    log.setLevel(logging.INFO)
    try:
        trace()
    except Exception:  # the same as before: only the place is wanted
        return places[0] if places else ""
    finally:
        log.handlers, level, log.propagate = before
        log.setLevel(level)
    return ""


def _places(model: nn.Module, frames: Iterable[tuple[FrameType, int]]) -> list[str]:
    """Those frames that run a method of a module of the user's, in words."""
    paths = {id(module): name or type(model).__name__ for name, module in model.named_modules()}
    found = []
    for frame, line in frames:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
        file = code.co_filename
        if id(owner) in paths and isinstance(owner, nn.Module) and not file.startswith(_OURS_AND_TORCHS):
            found.append(f"module {paths[id(owner)]!r}, {file}:{line}")
    return found


def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a model takes inputs at all."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception:
        return False
    return True


def explain(
    model: nn.Module,
    error: Exception,
    inputs: Sequence[Any],
    converted: Sequence[torch.dtype] = (),
    runs: bool = True,
) -> str:
    """Which module and line stopped the tracing, in one sentence, and what to try.

    Args:
        model: that was traced.
        error: that ended it.
        inputs: that it was traced with.
        converted: the types that were converted to float32 before.
        runs: whether the model takes these inputs where it is not traced.
    """
    kind = type(error).__name__
    odd = [x.dtype for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()]
    odd = [dtype for dtype in odd if dtype is not torch.float32]
    if converted and _TYPES_DIFFER.search(str(error)):
        advice = (
            f"its {words(converted)} was converted to torch.float32 before: code that names a type, such as "
            "x.to(torch.float16), must take that of what it computes with: x.to(self.weight.dtype)"
        )
    elif odd and "dtype" in str(error):
        advice = f"example_inputs hold a {odd[0]}, the model's parameters are torch.float32: convert it with x.float()"
    elif not runs:
        advice = (
            "the model itself fails on example_inputs: give what model(...) takes, in its sizes and types"
        )
    elif "not a known type" in str(error):
        advice = (
            "return a tuple or dict instead, leave it out (use_cache=False of transformers), or let torch know the "
            "class: torch.export.register_dataclass(cls) of a dataclass"
        )
    elif any(
        isinstance(value, nn.utils.rnn.PackedSequence)
        for frame, _ in traceback.walk_tb(error.__traceback__)
        for value in frame.f_locals.values()
    ):
        advice = (
            "packed sequences are cut by the values of the lengths, which a fixed graph cannot express: give the "
            "recurrent layer the padded batch, and take what belongs to each length afterwards, such as "
            "output[torch.arange(len(output)), lengths - 1]"
        )
    elif "DataDependent" in kind or "data-dependent" in str(error):
        advice = (
            "the path taken depends on the values of a tensor, which a fixed graph cannot express: replace the "
            "`if`/`while` by torch.where or masking, or capture the submodule without it"
        )
    elif "Constraint" in kind or "Dim.DYNAMIC" in str(error):
        advice = (
            "the code holds for some sizes only of a dimension that varies: give it padded inputs, leave the dimension "
            "out of dynamic, or make the code hold for all sizes"
        )
    else:
        advice = (
            "try torch.export.export(model.eval(), example_inputs) alone to see torch's own account; rewriting the "
            "line with plain tensor operations usually helps"
        )
    return f"the model cannot be captured: {where(model, error)}; {advice}"


def words(types: Sequence[torch.dtype]) -> str:
    """Types in words.

    >>> words([torch.bfloat16, torch.float16])
    'torch.bfloat16 and torch.float16'
    """
    return " and ".join(map(str, types))
