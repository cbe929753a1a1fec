"""From a graph with sites to an ONNX graph with a marker operator at each of them.

torch's own exporter translates every operator; ours is the one marker, which the lowering then replaces. This file
is the only one that speaks to torch's exporter.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import fx

from halfstep.errors import ExportError
from halfstep.export.program import program_of, to_onnx
from halfstep.graph.operators import readable_names
from halfstep.graph.placement import Position, Site, insert
from halfstep.graph.recurrences import recurrences_whole
from halfstep.graph.shapes import Axes
from halfstep.graph.tracing import PREFIX, quiet, rooted
from halfstep.identity import Identity
from halfstep.model import QuantizedModel

OPSET = 21
DOMAIN = "halfstep"
MARKER = "Site"


@torch.library.custom_op("halfstep::site", mutates_args=())
def _site(x: torch.Tensor, name: str) -> torch.Tensor:
    return x.clone()


@_site.register_fake
def _(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.empty_like(x)


@cache
def _marker() -> Any:
    """The marker as an onnxscript operator; its schema is registered once a process, in our own domain."""
    from onnxscript import values

    schema = onnx.defs.OpSchema
    onnx.defs.register_schema(
        schema(
            MARKER,
            DOMAIN,
            1,
            inputs=[schema.FormalParameter("x", "T")],
            outputs=[schema.FormalParameter("y", "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(double)"], "any float")],
            attributes=[
                schema.Attribute("name", onnx.defs.OpSchema.AttrType.STRING, "the site", required=True)
            ],
        )
    )
    domain = values.Opset(DOMAIN, 1)

    def translate(x: Any, name: str) -> Any:
        return domain.Site(x, name=name)

    return translate


#: The last translation of each model, with markers, and what it was made from.
_known: WeakKeyDictionary[QuantizedModel, tuple[str, torch.onnx.ONNXProgram]] = WeakKeyDictionary()


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
    program = _translated(model, quantized)
    found = program.model.clone()
    if not quantized:
        for node in [node for node in found.graph.all_nodes() if node.domain == DOMAIN]:
            (source,) = node.inputs
            assert source is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], source, replace_graph_outputs=True)
            assert node.graph is not None
            node.graph.remove(node, safe=True)
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


def _translated(model: QuantizedModel, corrected: bool) -> torch.onnx.ONNXProgram:
    """The network with markers, as torch translates it.

    Args:
        model: the network.
        corrected: whether biases have their shifts; those that are stored in steps have a marker in either case.

    Raises:
        ExportError: if an operator has no translation to ONNX, with torch's words.
    """

    def mark(graph: fx.Graph, value: fx.Node, site: Site, _: Position) -> fx.Node:
        node = graph.call_function(torch.ops.halfstep.site.default, (value, site.name))
        node.meta = {**value.meta, "nn_module_stack": {"": (site.name, "halfstep.Site")}}
        return node

    inserted = insert(model.graph, model.placement, mark, tied=True)
    for original, name in readable_names(model.graph).items():
        # The exporter writes this stack into the metadata of every node that it makes.
        inserted.copies[original].meta["nn_module_stack"] = {"": (name, "halfstep.Layer")}
    module = rooted(inserted.graph, model.captured.module).eval()
    _mark_biases(module, model, inserted.copies, corrected)
    read = [
        (node.target, operator.attrgetter(node.target)(module))
        for node in module.graph.find_nodes(op="get_attr")
    ]
    key = Identity(module.code, read, OPSET).digest
    known, translated = _known.get(model, ("", None))
    if translated is not None and known == key:
        return translated
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with quiet(), recurrences_whole():
            module.cpu()
            program = to_onnx(program_of(module), OPSET, {torch.ops.halfstep.site.default: _marker()})
            _mask_wholly(program.model.graph)
    except Exception as error:
        raise ExportError(f"torch cannot translate the network to ONNX: {_cause(error, model)}") from error
    finally:
        module.to(device)
    _known[model] = key, program
    return program


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


def _mark_biases(
    module: fx.GraphModule, model: QuantizedModel, copies: dict[fx.Node, fx.Node], corrected: bool
) -> None:
    """Let quantized layers read their biases as they are simulated.

    Those that are stored in steps get a marker that carries their layer's name; those that are only shifted become
    constants of their own.
    """
    for layer in model.layers:
        shift = model.shifts.get(layer.name)
        if shift is None or (shift.steps is None and not (corrected and bool(shift.shift.any()))):
            continue
        node = copies[layer.operator.node]
        old = node.args[2]
        assert isinstance(old, fx.Node)
        with module.graph.inserting_before(node):
            if shift.steps is not None:
                marker = torch.ops.halfstep.site.default
                new = module.graph.call_function(marker, (old, bias_marker(layer.name)))
                stack = {"": (bias_marker(layer.name), "halfstep.Site")}
                new.meta = {**old.meta, "nn_module_stack": stack}
            else:
                owner, _, leaf = str(old.target).rpartition(".")
                name = f"{leaf}_of_{layer.name.replace('.', '_').replace(':', '_')}"
                bias = layer.operator.bias
                assert bias is not None
                shifted = shift.corrected(model.weight(str(bias.target)).detach())
                module.get_submodule(owner).register_buffer(name, shifted)
                new = module.graph.get_attr(f"{owner}.{name}" if owner else name)
                new.meta = dict(old.meta)
        node.update_arg(2, new)
    module.graph.eliminate_dead_code()
    module.recompile()


def bias_marker(layer: str) -> str:
    """What the marker on a layer's bias is called; no site's name ends so."""
    return f"{layer}:bias"


def _cause(error: BaseException, model: QuantizedModel) -> str:
    """What stopped the translation; for an operator that ONNX has not, where it is and what to do."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    operator = re.search(r"No ONNX function found for <OpOverload\(op='(\w+)\.(\w+)'", text)
    if operator is None:
        return text
    names = readable_names(model.graph).items()
    places = [name for node, name in names if operator[2] in str(node.target)]
    where = f" (at {', '.join(map(repr, places[:3]))})" if places else ""
    return (
        f"ONNX has no operator for {operator[1]}.{operator[2]}{where}; compute it from other operators, or quantize "
        "the part of the network without it"
    )
