"""From a graph with sites to an ONNX graph with a marker operator at each of them.

torch's own exporter translates every operator; ours is the one marker, which the lowering then replaces. This file
is the only one that speaks to torch's exporter.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from halfstep.errors import ExportError
from halfstep.export.editing import initializer
from halfstep.export.marks import Marks, marker_translation
from halfstep.export.program import program_of, to_onnx
from halfstep.export.recurrent import RNN
from halfstep.graph.layer_precision import LayerPrecision
from halfstep.graph.operators import readable_names
from halfstep.graph.place import place
from halfstep.graph.placement import Placement, copied
from halfstep.graph.recurrences import recurrences_whole
from halfstep.graph.shapes import Axes
from halfstep.graph.tracing import PREFIX, rooted
from halfstep.identity import Identity
from halfstep.model import QuantizedModel
from halfstep.quiet import quiet

OPSET = 21


@dataclass(frozen=True)
class _Translation:
    """A network with markers as torch translates it, and the digest of what it was made from."""

    network: str
    marks: Marks
    program: torch.onnx.ONNXProgram


#: The last translation of each model.
_known: WeakKeyDictionary[QuantizedModel, _Translation] = WeakKeyDictionary()


def foresee(model: QuantizedModel, choices: Iterable[LayerPrecision]) -> None:
    """Translate the network so that no further translation is needed with its layers at any of ``choices``.

    Raises:
        ExportError: if an operator has no translation to ONNX, with torch's words.
    """
    placements = [place(model.graph, model.target, model.recipe, choice) for choice in choices]
    stored = {bias.layer for placement in placements for bias in placement.biases}
    _translated(model, placements, stored.union(_biases(model)))


def trace(model: QuantizedModel, quantized: bool) -> ir.Model:
    """The network as ONNX, opset 21, with a dynamic batch and what else may vary.

    The exporter takes seconds, so the float network is the quantized one without its markers, and a network that has
    not changed is not translated again.

    Args:
        model: the network; its parameters are read as they are.
        quantized: put a marker on every position of every site (its ``name`` attribute says which); otherwise the
            plain float network.

    Raises:
        ExportError: if an operator has no translation to ONNX, with torch's words.
    """
    biases = _biases(model)
    translation = _translated(model, [model.placement], set(biases), quantized)
    program = translation.program
    found = program.model.clone()
    values = {layer: _shifted(found.graph, model, layer) for layer in biases if quantized}
    if translation.marks.settle(found.graph, model.placement.sites if quantized else (), values):
        program = torch.onnx.ONNXProgram(found, program.exported_program)
        with quiet():
            program.optimize()
        found = program.model
    inputs = _inputs(model)
    names = [str(node.target) for node in inputs]
    _name(found.graph, names, model.captured.out_spec.names(names))
    _name_sizes(found.graph, [node.meta["val"].shape for node in inputs], model.captured.axes)
    return found


def _inputs(model: QuantizedModel) -> list[fx.Node]:
    nodes = (node for node in model.graph.nodes if node.op == "placeholder")
    return [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]


def _biases(model: QuantizedModel) -> list[str]:
    """The layers that read another bias than the float one: in steps, or shifted."""
    return [layer for layer, bias in model.shifts.items() if bias.steps is not None or bool(bias.shift.any())]


def _shifted(graph: ir.Graph, model: QuantizedModel, layer: str) -> ir.Value | None:
    """A layer's shifted bias as a constant of its own; None where it is stored in steps, as the lowering writes it."""
    if model.shifts[layer].steps is not None:
        return None
    (bias,) = (found.operator.bias for found in model.layers if found.name == layer)
    assert bias is not None
    name = f"{bias.target}_of_{layer.replace('.', '_').replace(':', '_')}"
    shifted = model.shifts[layer].corrected(model.weight(str(bias.target)).detach())
    return initializer(graph, name, shifted.cpu().numpy())


def _translated(
    model: QuantizedModel, placements: Sequence[Placement], biases: Collection[str], marked: bool = True
) -> _Translation:
    """The network with markers, as torch translates it: the one that is known if it serves.

    Args:
        model: the network.
        placements: that it is to serve.
        biases: the layers whose biases need a marker.
        marked: whether the markers matter.

    Raises:
        ExportError: if an operator has no translation to ONNX, with torch's words.
    """
    tensors = {str(node.target) for node in model.graph.find_nodes(op="get_attr")}
    read = [(name, attrgetter(name)(model.captured.module)) for name in sorted(tensors)]
    network = Identity(model.graph.python_code("self").src, read, OPSET).digest
    known = _known.get(model)
    serves = known is not None and (not marked or all(known.marks.cover(p, biases) for p in placements))
    if known is not None and known.network == network and serves:
        return known
    marks = Marks.of(placements, biases)
    copy = copied(model.graph)
    for original, name in readable_names(model.graph).items():
        # The exporter writes this stack into the metadata of every node that it makes.
        copy.copies[original].meta["nn_module_stack"] = {"": (name, "halfstep.Layer")}
    marks.insert(copy, model.layers)
    module = rooted(copy.graph, model.captured.module).eval()
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with quiet(), recurrences_whole():
            module.cpu()
            program = to_onnx(
                program_of(module), OPSET, {torch.ops.halfstep.site.default: marker_translation(), **RNN}
            )
            _mask_wholly(program.model.graph)
    except Exception as error:
        raise ExportError(f"torch cannot translate the network to ONNX: {_cause(error, model)}") from error
    finally:
        module.to(device)
    _known[model] = translation = _Translation(network, marks, program)
    return translation


def _mask_wholly(graph: ir.Graph) -> None:
    """Let attention answer 0 to a query whose mask leaves it nothing to look at, as torch's does.

    To that end torch's translation replaces NaN behind the softmax by 0; but it masks with the least finite number, and
    the softmax of nothing else is no NaN but the mean over all keys. Here it masks with minus infinity.
    """
    for node in graph:
        softmax = _made_by(node, 0, "Softmax") if node.op_type == "IsNaN" else None
        scores = None if softmax is None else _made_by(softmax, 0, "Add")
        mask = None if scores is None else _made_by(scores, 1, "Where")
        value = None if mask is None else mask.inputs[2]
        least = None if value is None else ir.convenience.get_const_tensor(value)
        if mask is None or least is None or least.size != 1:
            continue
        array = least.numpy()
        if array.item() == np.finfo(array.dtype).min:
            tensor = ir.tensor(np.full_like(array, -np.inf), name=f"{mask.name}_masked")
            masked = ir.val(tensor.name, const_value=tensor)
            graph.register_initializer(masked)
            mask.replace_input_with(2, masked)


def _made_by(node: ir.Node, index: int, op_type: str) -> ir.Node | None:
    """What made an input of a node, if that is an operator of this type."""
    value = node.inputs[index]
    maker = None if value is None else value.producer()
    return maker if maker is not None and maker.op_type == op_type else None


def _name(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Name the inputs and outputs, and the parameters as the user's model does."""
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, name in zip(values, names, strict=True):
            value.name = name
    for name, value in list(graph.initializers.items()):
        own = name.removeprefix(PREFIX)
        if own not in graph.initializers:
            value.name = own


def _name_sizes(graph: ir.Graph, traced: Sequence[Sequence[Any]], axes: Axes) -> None:
    """Call the sizes that vary as the user does; torch's exporter has symbols of its own for them."""
    names: dict[str, str] = {}
    for value, sizes in zip(graph.inputs, traced, strict=True):
        for symbol, size in zip(value.shape or (), sizes, strict=True):
            if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None:
                names.setdefault(symbol.value, axes.name(size))

    def renamed(size: int | ir.SymbolicDim) -> int | str | None:
        if isinstance(size, int) or size.value is None:
            return size if isinstance(size, int) else None
        return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), size.value)

    for value in [*graph.inputs, *(value for node in graph.all_nodes() for value in node.outputs)]:
        if value.shape:
            value.shape = ir.Shape(map(renamed, value.shape))


def known_as(axes: Axes, inputs: Sequence[ir.Value], traced: Sequence[fx.Node]) -> Axes:
    """``axes`` with the names that a file's inputs have for sizes, where they have any.

    Args:
        axes: of the captured graph.
        inputs: of the file.
        traced: the placeholders for them, in their order.
    """
    own = {
        str(size): declared.value
        for value, node in zip(inputs, traced, strict=True)
        for declared, size in zip(value.shape or (), node.meta["val"].shape, strict=True)
        if isinstance(declared, ir.SymbolicDim) and declared.value is not None
    }
    return replace(axes, names={**axes.names, **own})


def _cause(error: BaseException, model: QuantizedModel) -> str:
    """What stopped the translation; for an operator that ONNX has not, where it is and what to do."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    operator = re.search(r"No ONNX function found for <OpOverload\(op='(\w+)\.(\w+)'", text)
    if operator is None and "4D query, key, and value" not in text:
        return text
    wanted = "scaled_dot_product_attention" if operator is None else operator[2]
    names = readable_names(model.graph).items()
    places = [
        name
        for node, name in names
        if wanted in str(node.target) and (operator is not None or node.meta["val"].dim() != 4)
    ]
    where = f" (at {', '.join(map(repr, places[:3]))})" if places else ""
    if operator is None:
        return (
            f"attention{where} takes values of (batch, heads, tokens, channels) or (batch, tokens, channels); reshape "
            "what comes before these into one batch"
        )
    return (
        f"ONNX has no operator for {operator[1]}.{operator[2]}{where}; compute it from other operators, or quantize "
        "the part of the network without it"
    )
