"""Tracing a module with torch.export, and what the trace says of its inputs."""

from __future__ import annotations

import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from halfstep.errors import CaptureError
from halfstep.graph.explain import explain, fixed_at
from halfstep.graph.inputs import move
from halfstep.graph.rooted import Rooted, bind
from halfstep.graph.shapes import BATCH, Axes, Names, batch_of, by_name, varies
from halfstep.graph.unfold import tensors


def export_program(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    in_spec: pytree.TreeSpec,
    given: Sequence[Names],
    types: tuple[torch.dtype, ...],
) -> torch.export.ExportedProgram:
    """What torch traces, functional, with dimensions that vary.

    Args:
        model: in float32 and evaluation mode.
        args: positional example inputs.
        kwargs: the others.
        in_spec: how both flatten.
        given: the dimensions that the user lets vary, one dict an input.
        types: that the model was converted from.

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
        return torch.export.export(Rooted(model), args, kwargs, dynamic_shapes=shapes)

    try:
        with quiet():
            # An empty table functionalises and keeps conv, linear, softmax ... whole.
            functional: torch.export.ExportedProgram = trace().run_decompositions({})
            return functional
    except Exception as error:
        fixed = re.search(
            r"L\['(\w+)'\]\S*\.size\(\)\[(\d+)\] as dynamic but your code specialized it .*\((\d+)\)",
            str(error),
        )
        if fixed is None:
            raise CaptureError(explain(model, error, leaves, types)) from error
        name, dimension, number = fixed.groups()
        place = fixed_at(trace, model, int(number))
        what = (
            "the batch size"
            if dimension == "0"
            else f"dimension {dimension} of input {name!r}, which is to vary,"
        )
        raise CaptureError(
            f"the model's code fixes {what} at the example's {number}{f': {place}' if place else ''}; take it from "
            f"{name}.shape[{dimension}] there" + ("" if dimension == "0" else ", or leave it out of dynamic")
        ) from error


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
