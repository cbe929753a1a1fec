"""Markers in the graph of the file that a network was read from: what is not quantized stays as it was.

Each node of the captured graph knows the module that it was traced from, which stands for a node of the file. So an
edge of the placement is found among that node's inputs, and a parameter among the tensors that it reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from halfstep.errors import ExportError
from halfstep.export.calls import Calls
from halfstep.export.editing import drop_unused, replace
from halfstep.export.marks import DOMAIN, MARKER, bias_marker
from halfstep.export.trace import known_as
from halfstep.formats import Integer
from halfstep.granularity import PerGroup
from halfstep.graph.operators import WEIGHTED, describe, readable_names
from halfstep.graph.placement import Layer, Site
from halfstep.graph.shapes import varies
from halfstep.model import QuantizedModel
from halfstep.onnx_in.linear import LINEAR
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
#: Activations, which make of a tensor one of the same shape.
_SAME_SHAPE = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh"})
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
#: Where nodes have weights and biases.
_OPERANDS = {
    "Conv": (1, 2),
    "FusedConv": (1, 2),
    "ConvTranspose": (1, 2),
    "Gemm": (1, 2),
    "MatMul": (1, None),
}


class Original:
    """The graph of the file of a network, with its parameters as they are now.

    Args:
        model: whose network was read from a file.
        origin: the file.
    """

    def __init__(self, model: QuantizedModel, origin: Origin) -> None:
        self.model, self.origin = model, origin
        self.fx_nodes = list(model.graph.nodes)
        self.names = readable_names(model.graph)

    @classmethod
    def of(cls, model: QuantizedModel) -> Original | None:
        """The one of a model; None if it was not read from a file, or is computed in another precision."""
        origin = model.captured.origin
        if not isinstance(origin, Origin) or model.captured.handed_over is not None:
            return None
        return cls(model, origin)

    def marked(self) -> ir.Model:
        """The graph with a marker on every position of every site, as a traced one has them.

        Raises:
            ExportError: naming a site inside of one of the file's nodes.
        """
        placement = self.model.placement
        self._open(self._narrow())
        for site in placement.sites:
            if not site.is_weight:
                self._mark_activation(site)
        weights = {site.name for site in placement.sites if site.is_weight}
        self._write_parameters(weights, {layer.name: layer for layer in self.model.layers})
        self._drop_norms()
        return self.onnx

    def floating(self) -> ir.Model:
        """The graph without markers."""
        self._open(False)
        self._write_parameters(set(), {})
        self._drop_norms()
        return self.onnx

    def finish(self) -> None:
        """Give the nodes their own names back, after the lowering, and drop what nothing reads any more.

        Those without one keep what they are read as: by it the runtime's kernels are known as theirs.
        """
        for node, name in self.renamed.items():
            node.name = name
        self._ask_codes_for_shapes()
        self.calls.restore()
        drop_unused(self.graph)

    def _ask_codes_for_shapes(self) -> None:
        """Let what asks for the shape of a quantized tensor ask its codes.

        A runtime fuses an operator with the QuantizeLinear behind it only where nothing else reads the floats between.
        """
        before: set[ir.Node] = set()
        for node in self.graph:
            before.add(node)
            value = node.inputs[0] if node.op_type in ("Shape", "Size") and not node.domain else None
            while value is not None:
                readers = value.consumers()
                codes = next((user for user in readers if user.op_type == "QuantizeLinear"), None)
                if codes is None:
                    alike = (
                        user.outputs[0] for user in readers if user.op_type in _SAME_SHAPE and not user.domain
                    )
                    value = next(alike, None)
                    continue
                node.replace_input_with(0, codes.outputs[0])
                if codes not in before:
                    self.graph.remove(node)
                    self.graph.insert_after(codes, node)
                break

    # the file's graph and the captured one

    def _narrow(self) -> bool:
        """Whether the file needs a version that has codes of 4 and 16 bits; those of 5 to 7 bits are stored in 8."""
        formats = [(site.format, site.granularity) for site in self.model.placement.sites]
        return any(
            not isinstance(fmt, Integer) or not 4 < fmt.bits <= 8 or isinstance(granularity, PerGroup)
            for fmt, granularity in formats
        )

    def _open(self, narrow: bool) -> None:
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
        self.written: dict[tuple[str, bool], ir.Value] = {}
        self.nodes = self._find_nodes(source.nodes)
        for name, node in self.nodes.items():  # as in traced graphs, while it is lowered
            self.renamed[node] = self.renamed[node] or name
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

    # sites

    def _mark_activation(self, site: Site) -> None:
        count = 0
        for position in site.positions:
            markers: dict[ir.Value, ir.Value] = {}
            for value, node, index in self._edges(position.value, position.readers, site, position.tied):
                if value not in markers:
                    markers[value] = self._marker(site.name, value, count)
                    count += 1
                if node is None:
                    self.graph.outputs[index] = markers[value]
                    _swap_names(value, markers[value])
                    continue
                node.replace_input_with(index, markers[value])
                inner = node.graph is not self.graph
                if inner and value.name in self.values and value.producer() and not value.is_graph_output():
                    _swap_names(value, markers[value])  # the body stays as it was, to the letter

    def _edges(
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

    def _marker(self, name: str, value: ir.Value, count: int = 0) -> ir.Value:
        """The result of a new marker on a value, right behind what makes it."""
        suffix = f":{count + 1}" if count else ""
        node = ir.node(MARKER, [value], {"name": name}, domain=DOMAIN, name=f"{name}/{MARKER}{suffix}")
        result = node.outputs[0]
        result.name, result.shape = node.name, value.shape
        result.type = value.type or ir.TensorType(ir.DataType.FLOAT)
        if (maker := value.producer()) is not None:
            self.graph.insert_after(maker, node)
        else:
            self.graph.insert_before(self.graph[0], node)
        return result

    # parameters

    def _write_parameters(self, quantized: set[str], layers: dict[str, Layer]) -> None:
        """Every parameter as it is now, with markers on those that are quantized."""
        for node in self.fx_nodes:
            op, step = describe(node), self.step_of.get(node)
            if node.op != "call_function" or step is None:
                continue
            weights = [n for n in (op.weight, op.bias) if n is not None] if op is not None else []
            if op is not None and op.kind in WEIGHTED and step.op_type in {*_OPERANDS, LINEAR, "Gather"}:
                self._write_layer(node, step, quantized, layers.get(self.names[node]))
            for operand in node.all_input_nodes:
                if operand.op == "get_attr" and operand not in weights:
                    self._write_in_place(str(operand.target))

    def _write_layer(self, node: fx.Node, step: Node, quantized: set[str], layer: Layer | None) -> None:
        op = describe(node)
        assert op is not None
        parts = [self.nodes[part.name] for part in step.parts or (step,)]
        first, last = parts[0], parts[-1]
        if op.weight is not None:
            place = 0 if step.op_type == "Gather" else 1
            self._write_weight(str(op.weight.target), first, place, bool(step.get("turned")), quantized)
        if op.bias is None:
            return
        target, place = str(op.bias.target), 2
        if first is not last:
            place = next(
                i for i, value in enumerate(last.inputs) if value is None or value.producer() is not first
            )
        shift = None if layer is None else self.model.shifts.get(layer.name)
        bias = self.model.weight(target).detach().cpu()
        if shift is None or (shift.steps is None and not bool(shift.shift.any())):
            self._write_weight(target, last, place, False, set())
        elif shift.steps is None:
            assert layer is not None
            corrected = shift.corrected(self.model.weight(target).detach()).cpu()
            _set_input(last, place, self._initializer(f"{layer.name}/bias", corrected))
        else:
            assert layer is not None
            value = self._initializer(f"{layer.name}/bias", bias)
            _set_input(last, place, self._marker(bias_marker(layer.name), value))

    def _write_weight(
        self, target: str, node: ir.Node, index: int, turned: bool, quantized: set[str]
    ) -> None:
        """Let a node read a parameter: in the file's tensor if it fits, else in a new one."""
        tensor = self.model.weight(target).detach().cpu()
        if target not in quantized:
            stored = self.origin.tensors.get(target)
            current = node.inputs[index] if index < len(node.inputs) else None
            array = (tensor.t() if turned else tensor).contiguous()
            if stored is not None and current is not None and current.is_initializer():
                _store(current, array)
            else:
                key = (target, turned)
                if key not in self.written:
                    self.written[key] = self._initializer(target, array)
                _set_input(node, index, self.written[key])
            return
        key = (target, False)
        if key not in self.written:
            self.written[key] = self._marker(target, self._initializer(f"{target}/float", tensor))
        value = self.written[key]
        if turned and (target, True) not in self.written:
            transposed = ir.node("Transpose", [value], {"perm": [1, 0]}, name=f"{target}/Transpose")
            transposed.outputs[0].name = transposed.name
            transposed.outputs[0].type, transposed.outputs[0].shape = value.type, ir.Shape(tensor.t().shape)
            maker = value.producer()
            assert maker is not None
            self.graph.insert_after(maker, transposed)
            self.written[target, True] = transposed.outputs[0]
        _set_input(node, index, self.written[target, turned])

    def _write_in_place(self, target: str) -> None:
        """A parameter that is no weight of a layer: a gain, a table, a constant; left alone where nothing changed."""
        name = self.origin.tensors.get(target)
        if name is None or not isinstance(tensor := self.model.weight(target), torch.nn.Parameter):
            return
        array = tensor.detach().cpu()
        stored = self.graph.initializers.get(name)
        if stored is not None:
            _store(stored, array)
            return
        made = next((v for node in self.graph for v in node.outputs if v.name == name), None)
        if made is not None:  # computed from stored tensors, which are no longer what it is computed from
            ir.convenience.replace_all_uses_with(made, self._initializer(f"{name}/stored", array))

    def _initializer(self, name: str, tensor: torch.Tensor) -> ir.Value:
        while name in self.graph.initializers:
            name += ":2"
        content = ir.tensor(tensor.contiguous().numpy(), name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(content.dtype), const_value=content
        )
        self.graph.register_initializer(value)
        return value

    def _drop_norms(self) -> None:
        """Take out the batch norms that are in the weights before them."""
        kept = {step.name for node, step in self.step_of.items() if node.op == "call_function"}
        for step in self.origin.steps.values():
            if step.op_type != "BatchNormalization" or step.name in kept:
                continue
            node = self.nodes[step.name]
            source = node.inputs[0]
            assert source is not None
            replace(self.graph, node.outputs[0], source)
            self.graph.remove(node, safe=True)


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


def _set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _store(value: ir.Value, tensor: torch.Tensor) -> None:
    """Other content for a stored tensor; the same is left as it lies there."""
    old = value.const_value
    if (
        old is not None
        and tuple(old.shape) == tuple(tensor.shape)
        and np.array_equal(old.numpy(), tensor.numpy())
    ):
        return
    value.const_value = ir.tensor(tensor.contiguous().numpy(), name=value.name)
    value.shape = ir.Shape(tensor.shape)


def _swap_names(old: ir.Value, new: ir.Value) -> None:
    """Let a new value have the name of an output, and the old one another."""
    name, old.name = old.name, f"{old.name}_float"
    new.name = name
