"""Markers in the graph of the file that a network was read from: what is not quantized stays as it was."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from halfstep.export.counterparts import Counterparts
from halfstep.export.editing import drop_unused, replace
from halfstep.export.marks import DOMAIN, MARKER, bias_marker
from halfstep.formats import Integer
from halfstep.granularity import PerGroup
from halfstep.graph.operators import WEIGHTED, describe
from halfstep.graph.placement import Layer, Site
from halfstep.model import QuantizedModel
from halfstep.onnx_in.linear import LINEAR
from halfstep.onnx_in.origin import Origin
from halfstep.onnx_in.table import Node

#: Activations, which make of a tensor one of the same shape.
_SAME_SHAPE = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid", "Tanh"})
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
        return self.file.onnx

    def floating(self) -> ir.Model:
        """The graph without markers."""
        self._open(False)
        self._write_parameters(set(), {})
        self._drop_norms()
        return self.file.onnx

    def finish(self) -> None:
        """Give the nodes their own names back, after the lowering, and drop what nothing reads any more.

        Those without one keep what they are read as: by it the runtime's kernels are known as theirs.
        """
        for node, name in self.file.renamed.items():
            node.name = name
        self._ask_codes_for_shapes()
        self.file.calls.restore()
        drop_unused(self.graph)

    def _open(self, narrow: bool) -> None:
        self.file = Counterparts(self.model, self.origin, narrow)
        self.graph = self.file.graph
        self.written: dict[tuple[str, bool], ir.Value] = {}  # by the parameter, and whether it is transposed

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

    def _narrow(self) -> bool:
        """Whether the file needs a version that has codes of 4 and 16 bits; those of 5 to 7 bits are stored in 8."""
        formats = [(site.format, site.granularity) for site in self.model.placement.sites]
        return any(
            not isinstance(fmt, Integer) or not 4 < fmt.bits <= 8 or isinstance(granularity, PerGroup)
            for fmt, granularity in formats
        )

    def _mark_activation(self, site: Site) -> None:
        count = 0
        for position in site.positions:
            markers: dict[ir.Value, ir.Value] = {}
            for value, node, index in self.file.edges(position.value, position.readers, site, position.tied):
                if value not in markers:
                    markers[value] = self._marker(site.name, value, count)
                    count += 1
                if node is None:
                    self.graph.outputs[index] = markers[value]
                    _swap_names(value, markers[value])
                    continue
                node.replace_input_with(index, markers[value])
                inner = node.graph is not self.graph
                if (
                    inner
                    and value.name in self.file.values
                    and value.producer()
                    and not value.is_graph_output()
                ):
                    _swap_names(value, markers[value])  # the body stays as it was, to the letter

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

    def _write_parameters(self, quantized: set[str], layers: dict[str, Layer]) -> None:
        """Every parameter as it is now, with markers on those that are quantized."""
        for node in self.file.fx_nodes:
            op, step = describe(node), self.file.step_of.get(node)
            if node.op != "call_function" or step is None:
                continue
            weights = [n for n in (op.weight, op.bias) if n is not None] if op is not None else []
            if op is not None and op.kind in WEIGHTED and step.op_type in {*_OPERANDS, LINEAR, "Gather"}:
                self._write_layer(node, step, quantized, layers.get(self.file.names[node]))
            for operand in node.all_input_nodes:
                if operand.op == "get_attr" and operand not in weights:
                    self._write_in_place(str(operand.target))

    def _write_layer(self, node: fx.Node, step: Node, quantized: set[str], layer: Layer | None) -> None:
        op = describe(node)
        assert op is not None
        parts = [self.file.nodes[part.name] for part in step.parts or (step,)]
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
        kept = {step.name for node, step in self.file.step_of.items() if node.op == "call_function"}
        for step in self.origin.steps.values():
            if step.op_type != "BatchNormalization" or step.name in kept:
                continue
            node = self.file.nodes[step.name]
            source = node.inputs[0]
            assert source is not None
            replace(self.graph, node.outputs[0], source)
            self.graph.remove(node, safe=True)


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
