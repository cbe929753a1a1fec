"""The graph of the file that a network was read from beside the captured one: which node is computed in which.

Each node of the captured graph knows the module that it was traced from, which stands for a node of the file. So an
edge of the placement is found among that node's inputs, and a parameter among the tensors that it reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir
import torch
from torch import fx

from halfstep.errors import ExportError
from halfstep.export.calls import Calls
from halfstep.export.trace import known_as
from halfstep.graph.operators import readable_names
from halfstep.graph.placement import Site
from halfstep.graph.shapes import varies
from halfstep.graph.tracing import plain
from halfstep.model import QuantizedModel
from halfstep.onnx_in.network import arguments
from halfstep.onnx_in.origin import SPLIT, Origin
from halfstep.onnx_in.reader import bodies, convert, graph_of
from halfstep.onnx_in.table import DTYPES, Node

aten = torch.ops.aten

#: The version of ONNX's operators that has codes of 4 and 16 bits, and ranges of groups.
NARROW = 21
#: The version of the file format that has them.
NARROW_FORMAT = 10
#: The format from which on stored tensors need not be inputs too, whose values a caller might replace.
OWN_VALUES_FORMAT = 4
#: Types in ONNX's words.
_TYPES = {dtype: ir.DataType(number) for number, dtype in DTYPES.items()}
#: Nodes that hand on what they are given.
_PASSING = frozenset({"Identity", "Dropout", "Cast", "CastLike", "BatchNormalization"})
#: Activations that are their input times a gate of it, with the gate's operator and attributes.
_GATED = {
    "HardSwish": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "Swish": ("Sigmoid", {}),
    "QuickGelu": ("Sigmoid", {}),
}


class Counterparts:
    """The graph of the file of a network, opened anew, and the captured one.

    Args:
        model: whose network was read from a file.
        origin: the file.
        narrow: whether the file needs a version that has codes of 4 and 16 bits.

    Attributes:
        onnx: the file, to be changed.
        graph: its graph.
        fx_nodes: those of the captured graph, in order.
        names: readable ones, of these.
        renamed: the file's own names of its nodes, which are called as in traced graphs meanwhile.
        calls: the file's functions, which are inlined.
        nodes: the file's, by the names that they were read by.
        step_of: the file's node as it was read, of each captured one.
        values: the captured node that makes each of the file's tensors.
    """

    def __init__(self, model: QuantizedModel, origin: Origin, narrow: bool) -> None:
        self.model, self.origin = model, origin
        self.fx_nodes = list(model.graph.nodes)
        self.names = readable_names(model.graph)
        source = self.origin.source
        message = source.message
        if narrow and max((e.version for e in message.opset_import if not e.domain), default=1) < NARROW:
            message = convert(message, source.path, source.opset)
        self.onnx = graph_of(message, source.path)
        self.onnx.ir_version = max(self.onnx.ir_version, NARROW_FORMAT if narrow else OWN_VALUES_FORMAT)
        self.graph = self.onnx.graph
        self.graph.inputs[:] = [value for value in self.graph.inputs if not value.is_initializer()]
        self.renamed = {node: node.name for node in self.graph}
        self.calls = Calls(self.onnx, message)
        self.nodes = self._find_nodes(source.nodes)
        for name, node in self.nodes.items():  # as in traced graphs, while it is lowered
            own = self.renamed[node]
            self.renamed[node] = own if own and plain(own) == own else name
            node.name = f"{name}/{node.op_type}"
        self.step_of = {node: step for node in self.fx_nodes if (step := self.origin.step(node)) is not None}
        self.pieces: dict[fx.Node, tuple[ir.Node, ...]] = {}
        self.values = self._find_values()
        self.inside = {node: list(_within(node)) for node in self.graph if bodies(node)}
        every = [*self.graph, *(inner for nodes in self.inside.values() for inner in nodes)]
        self.reads = {
            node: [None if value is None else value.name for value in node.inputs] for node in every
        }

    def _find_nodes(self, nodes: Sequence[Node]) -> dict[str, ir.Node]:
        """The file's nodes by the names that they were read by: found by what they make, which is unique."""
        makers = {value.name: node for node in self.graph for value in node.outputs if value.name}
        return {node.name: makers[name] for node in nodes for name in node.outputs if name in makers}

    def _find_values(self) -> dict[str, fx.Node]:
        """The captured node that makes each of the file's tensors."""
        made = dict(
            zip(self._input_names(), (n for n in self.fx_nodes if n.op == "placeholder"), strict=True)
        )
        by_step: dict[str, list[fx.Node]] = {}
        for node, step in self.step_of.items():
            if node.op == "call_function":
                by_step.setdefault(step.name, []).append(node)
        same: dict[object, Node] = {}
        known = {value.name: value for node in self.graph for value in node.outputs}
        for step in self.origin.steps.values():
            own = by_step.get(step.name, [])
            sources = [made[name] for name in step.inputs if name in made]
            key = (
                step.op_type,
                step.domain,
                repr(sorted(step.attributes.items())),
                *(made.get(n, n) for n in step.inputs),
            )
            if own:
                made.update(_outputs(step, own))
                same.setdefault(key, step)
            elif key in same:
                # Computed once for both, so whoever reads this one reads the other from here on.
                for name, other in zip(step.outputs, same[key].outputs, strict=False):
                    if name and other in made:
                        made[name] = made[other]
                        if not known[name].is_graph_output():
                            ir.convenience.replace_all_uses_with(known[name], known[other])
            elif step.op_type in _PASSING and sources and step.outputs[0]:
                made[step.outputs[0]] = sources[0]
            if len(own) == 2 and step.op_type in SPLIT:
                made.update(self._split(step, *own))
        known = {value.name: value for node in self.graph for value in node.outputs}  # a split made others
        axes = known_as(
            self.model.captured.axes, self.graph.inputs, [made[str(v.name)] for v in self.graph.inputs]
        )
        for name, node in made.items():
            value, shape = known.get(name), node.meta.get("val")
            if value is not None and isinstance(shape, torch.Tensor):
                if value.is_graph_output() and value.shape is not None:
                    continue  # dimensions keep the names that they are known by
                if value.type is None and shape.dtype in _TYPES:
                    value.type = ir.TensorType(_TYPES[shape.dtype])
                if value.type is not None:
                    value.shape = ir.Shape([axes.name(s) if varies(s) else int(s) for s in shape.shape])
        return made

    def _input_names(self) -> list[str]:
        """The file's inputs in the order of the placeholders."""
        args, kwargs = self.model.captured.example_inputs
        inputs = [value.name for value in self.origin.source.inputs]
        by_argument = dict(zip(arguments(tuple(inputs)), inputs, strict=True))
        names = [*inputs[: len(args)], *(by_argument.get(name, name) for name in kwargs)]
        values = {value.name: value for value in self.graph.inputs}
        if names != inputs:  # the runtime is given tensors in their order
            self.graph.inputs[:] = [values[name] for name in names]
        return names

    def _split(self, step: Node, first: fx.Node, second: fx.Node) -> dict[str, fx.Node]:
        """Two nodes of the file for one that is two in the captured graph."""
        old = self.nodes[step.name]
        source, result = old.inputs[0], old.outputs[0]
        before, behind = (self.names[node] for node in (first, second))
        if step.op_type == "ReduceMean":
            nodes = [ir.node("GlobalAveragePool", [source], name=f"{before}/GlobalAveragePool")]
            nodes.append(ir.node("Flatten", [nodes[0].outputs[0]], name=f"{behind}/Flatten"))
        else:
            op_type, attributes = _GATED[step.op_type]
            nodes = [ir.node(op_type, [source], attributes, name=f"{before}/{op_type}")]
            nodes.append(ir.node("Mul", [source, nodes[0].outputs[0]], name=f"{behind}/Mul"))
        between, made = (node.outputs[0] for node in nodes)
        between.name, between.type = nodes[0].name, ir.TensorType(ir.DataType.FLOAT)
        made.type, made.shape = result.type, result.shape
        name = result.name
        self.graph.insert_before(old, nodes)
        ir.convenience.replace_all_uses_with(result, made, replace_graph_outputs=True)
        self.graph.remove(old, safe=True)
        made.name = name
        self.pieces[first], self.pieces[second] = (nodes[0],), (nodes[1],)
        return {str(between.name): first}

    def edges(
        self, value: fx.Node, readers: Iterable[fx.Node], site: Site, tied: bool
    ) -> Iterator[tuple[ir.Value, ir.Node | None, int]]:
        """Where readers of a captured value read it in the file: the tensor, the node, and which of its inputs."""
        for reader in readers:
            found = list(self._reading(value, reader))
            step = self.step_of.get(reader)
            if not found and not tied and value.target in (aten.pad.default, aten.constant_pad_nd.default):
                source = value.args[0]  # a conv pads by itself, with what 0 is in codes
                assert isinstance(source, fx.Node)
                found = list(self._reading(source, reader))
            if not found and step is not None and step is self.step_of.get(value):
                continue  # codes are moved about within one node, which reads and makes them
            if not found:
                raise ExportError(
                    f"site {site.name!r}: node {step.name if step else 'output'!r} of {self.origin.source.path.name} "
                    "does not read what it quantizes; leave the layer that reads it in float, and report it"
                )
            yield from found

    def _reading(self, value: fx.Node, reader: fx.Node) -> Iterator[tuple[ir.Value, ir.Node | None, int]]:
        if reader.op == "output":
            declared = self.origin.source.outputs
            for index, (output, said) in enumerate(zip(self.graph.outputs, declared, strict=True)):
                if self.values.get(said.name) is value:
                    yield output, None, index
            return
        for node in self._nodes_of(reader):
            for index, name in enumerate(self.reads.get(node, ())):
                operand = node.inputs[index]
                if name is not None and operand is not None and self.values.get(name) is value:
                    yield operand, node, index

    def _nodes_of(self, reader: fx.Node) -> tuple[ir.Node, ...]:
        """The file's nodes that a captured one is computed in."""
        if reader in self.pieces:
            return self.pieces[reader]
        step = self.step_of.get(reader)
        nodes = () if step is None else tuple(self.nodes[part.name] for part in step.parts or (step,))
        return (*nodes, *(inner for node in nodes for inner in self.inside.get(node, ())))


def _within(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes in the bodies of a node, and in theirs."""
    for body in bodies(node):
        for inner in body:
            yield inner
            yield from _within(inner)


def _outputs(step: Node, nodes: list[fx.Node]) -> dict[str, fx.Node]:
    """Which of the captured nodes of a step makes each of its outputs."""
    wanted = [name for name in step.outputs if name]
    read = [node for node in nodes if any(user not in nodes for user in node.users)]
    if len(wanted) == 1 and read:
        return {wanted[0]: read[-1]}
    if (
        all(node.target is not None and str(node.target).endswith("getitem") for node in read)
        or step.op_type == "Split"
    ):
        items = {
            node.args[1]: node for node in nodes if len(node.args) == 2 and isinstance(node.args[1], int)
        }
        return {name: items[i] for i, name in enumerate(step.outputs) if name and i in items}
    return dict(zip(wanted, read, strict=False)) if len(wanted) == len(read) else {}
