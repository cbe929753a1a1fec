"""An ONNX graph as a module: a child for each of its nodes, parameters under the names that they have in the file."""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from halfstep.errors import CaptureError, DataError, named
from halfstep.graph.tracing import plain, put
from halfstep.onnx_in import (  # noqa: F401 - each fills the table with its family of operators
    attention,
    convolution,
    elementwise,
    islands,
    linear,
    microsoft,
    normalisation,
    recurrent,
    reductions,
    shape,
)
from halfstep.onnx_in.origin import Origin
from halfstep.onnx_in.patterns import fuse
from halfstep.onnx_in.reader import OnnxGraph, array
from halfstep.onnx_in.symbolic import on_host
from halfstep.onnx_in.table import TABLE, Node, host, tensor

#: Inputs that are trained where they are stored: weights, biases, gains and shifts.
_TRAINED: dict[str, frozenset[int]] = {
    "Conv": frozenset({1, 2}),
    "FusedConv": frozenset({1, 2}),
    "ConvTranspose": frozenset({1, 2}),
    "Gemm": frozenset({1, 2}),
    "FusedGemm": frozenset({1, 2}),
    "Linear": frozenset({1, 2}),
    "MatMul": frozenset({0, 1}),
    "FusedMatMul": frozenset({0, 1}),
    "Gather": frozenset({0}),
    "PRelu": frozenset({1}),
    "BatchNormalization": frozenset({1, 2}),
    "LayerNormalization": frozenset({1, 2}),
    "RMSNormalization": frozenset({1}),
    "SimplifiedLayerNormalization": frozenset({1}),
    "SkipLayerNormalization": frozenset({2, 3, 4}),
    "SkipSimplifiedLayerNormalization": frozenset({2, 3}),
    "EmbedLayerNormalization": frozenset({2, 3, 4, 5, 6}),
    "InstanceNormalization": frozenset({1, 2}),
    "GroupNormalization": frozenset({1, 2}),
    "LSTM": frozenset({1, 2, 3}),
    "GRU": frozenset({1, 2, 3}),
    "RNN": frozenset({1, 2, 3}),
    "Attention": frozenset({1, 2}),
    "BiasGelu": frozenset({1}),
    "FastGelu": frozenset({1}),
}
#: Operators that are layers where their weight, which is this one of their inputs, is stored.
_WEIGHTS = {
    **dict.fromkeys(("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "Linear", "MatMul"), 1),
    "FusedMatMul": 1,
    "Gather": 0,
}
#: Stored tensors that stand as tensors in the graph whatever their size.
_TENSORS = {**_TRAINED, "BatchNormalization": frozenset({1, 2, 3, 4})}
#: Stored tensors that stay on the host whatever their type: scales of sizes.
_HOSTED = {"Resize": frozenset({1, 2}), "Upsample": frozenset({1})}
#: An add or a product by a stored tensor with one axis is a bias or a gain.
_VECTORS = frozenset({"Add", "Mul", "Sub", "Div"})
#: Stored integers of at most so many elements stay on the host, where shapes are computed.
SMALL = 1024


class Call(nn.Module):
    """A node of the file."""

    def __init__(self, node: Node) -> None:
        super().__init__()
        self.node = node

    def forward(self, *inputs: Any) -> Any:
        """What the node makes of its inputs.

        Raises:
            CaptureError: naming the node.
        """
        return evaluate(self.node, inputs)


def evaluate(node: Node, inputs: tuple[Any, ...]) -> Any:
    """What a node makes of its inputs, tensors or host arrays.

    Raises:
        CaptureError: naming the node, if it cannot be computed.
    """
    with named(f"node {node.name!r} ({node.kind})"):
        if node.island:
            return islands.run(
                node, [tensor(x) for i, x in enumerate(inputs) if node.inputs[i] and i not in node.constant]
            )
        if (found := on_host(node, inputs)) is not None:
            return found
        return TABLE[node.domain, node.op_type](node, *inputs)


def computed(node: Node, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """All outputs of a node for values, outside of a trace.

    Raises:
        CaptureError: naming the node, also where torch refuses what it is given.
    """
    try:
        with torch.no_grad():
            made = evaluate(node, inputs)
    except (RuntimeError, IndexError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise CaptureError(
            f"node {node.name!r} ({node.kind}): cannot be computed: {str(error).strip().splitlines()[0][:200]}; look "
            "whether its inputs and attributes fit each other"
        ) from error
    return made if isinstance(made, tuple) else (made,)


class OnnxNetwork(nn.Module):
    """The network of an ONNX file, which takes its inputs in order or by name, and returns its outputs.

    Parameters carry the names of the file's tensors, layers those of its nodes. An only output is returned as it is,
    several as a dict by their names.

    Attributes:
        source: what the file says.
        nodes: what is executed, in order: stored tensors are computed as far as they go, and some neighbours are one.
        input_names: in the file.
        output_names: in the file.
        origin: what exports of this network are written into.
    """

    def __init__(self, source: OnnxGraph) -> None:
        super().__init__()
        self.source = source
        self.input_names = tuple(value.name for value in source.inputs)
        self.output_names = tuple(value.name for value in source.outputs)
        self.nodes, stored = fuse(*_fold(source), self.output_names)
        self._hosted: dict[str, np.ndarray] = {}
        self._places: dict[str, str] = {}
        self._keep(stored)
        self._steps = [(node, _attach(self, node.name, Call(node))) for node in self.nodes]
        self._last = _last_uses(self.nodes, self.output_names)
        tensors = {place: name for name, place in self._places.items()}
        self.origin = Origin(source, {place: node for node, place in self._steps}, tensors)

    def _keep(self, stored: Mapping[str, np.ndarray]) -> None:
        """Stored tensors as parameters, buffers, or on the host."""
        readers: dict[str, list[tuple[str, int]]] = {name: [] for name in stored}
        for node in self.nodes:
            for index, name in enumerate(node.inputs):
                if name in readers:
                    readers[name].append((node.op_type, index))
        for name, value in stored.items():
            if not readers[name] and name not in self.output_names:
                continue
            as_tensor = any(index in _TENSORS.get(op, ()) for op, index in readers[name])
            small = value.size == 1 if value.dtype.kind == "f" else value.size <= SMALL and value.ndim <= 1
            small |= any(index in _HOSTED.get(op, ()) for op, index in readers[name])
            if small and not as_tensor:
                self._hosted[name] = value
                continue
            content = torch.from_numpy(np.array(value, order="C"))
            trained = content.is_floating_point() and any(
                index in _TRAINED.get(op, ())
                or (op in _VECTORS and max(value.shape, default=1) == value.size)
                for op, index in readers[name]
            )
            if trained and bool(torch.isfinite(content).all()):
                self._places[name] = _attach(self, name, nn.Parameter(content))
            else:
                self._places[name] = _attach(self, name, content)

    @property
    def layer_names(self) -> list[str]:
        """The nodes with weights, in order: what layers of the quantized network are called."""
        return [
            place
            for place, node in self.origin.steps.items()
            if (index := _WEIGHTS.get(node.op_type)) is not None
            and node.inputs[index] in self._places
            and self.stored(node.inputs[index]).is_floating_point()
        ]

    def is_stored(self, name: str) -> bool:
        """Whether a tensor of the file does not depend on its inputs."""
        return name in self._hosted or name in self._places

    def stored(self, name: str) -> Any:
        """A tensor that does not depend on the inputs: a parameter, a buffer, or a host array."""
        if name in self._hosted:
            return self._hosted[name]
        owner, _, leaf = self._places[name].rpartition(".")
        return getattr(self.get_submodule(owner), leaf)

    def compute(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """All that the nodes make, by name, given the inputs; used once and dropped when nothing needs it any more."""
        known = dict(values)
        for (node, place), last in zip(self._steps, self._last, strict=True):
            inputs = (
                None if not name else known[name] if name in known else self.stored(name)
                for name in node.inputs
            )
            made = self.get_submodule(place)(*inputs)
            results = made if isinstance(made, tuple) else (made,)
            known.update((name, value) for name, value in zip(node.outputs, results, strict=False) if name)
            for name in last:
                known.pop(name, None)
        return known

    def run(self, *args: Any) -> Any:
        """The outputs for the inputs in order."""
        known = self.compute(inputs_by_name(self.source, args, {}))
        found = [known[name] if name in known else self.stored(name) for name in self.output_names]
        outputs = [tensor(value) for value in found]
        if len(outputs) == 1:
            return outputs[0]
        return dict(zip(self.output_names, outputs, strict=True))

    def extra_repr(self) -> str:
        """The file, and what it takes and returns."""
        return f"{self.source.path}: {', '.join(self.input_names)} -> {', '.join(self.output_names)}"


def inputs_by_name(source: OnnxGraph, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names of the file's inputs.

    Raises:
        DataError: if there are others.
    """
    names = tuple(value.name for value in source.inputs)
    by_argument = dict(zip(arguments(names), names, strict=True))
    named_inputs = {by_argument.get(name, name): value for name, value in kwargs.items()}
    given = {**dict(zip(names, args, strict=False)), **named_inputs}
    if len(args) > len(names) or set(given) != set(names):
        got = [f"{len(args)} in order"] * bool(args) + sorted(map(repr, named_inputs))
        raise DataError(
            f"{source.path.name}: got the inputs {', '.join(got) or 'none'}, needed {', '.join(map(repr, names))}"
        )
    return given


def make_network(source: OnnxGraph) -> OnnxNetwork:
    """The module of a graph, whose ``forward`` has a parameter for each input.

    Raises:
        CaptureError: naming the first node whose operator is not in the table, or that has attributes it has not.
    """

    names = ", ".join(arguments(tuple(value.name for value in source.inputs)))
    namespace: dict[str, Any] = {}
    # Torch reads its parameters' names.
    exec(f"def forward(self, {names}):\n    return self.run({names})", namespace)
    own = type(
        "OnnxNetwork",
        (OnnxNetwork,),
        {"forward": namespace["forward"], "__module__": __name__, "__doc__": OnnxNetwork.__doc__},
    )
    network: OnnxNetwork = own(source)
    return network.eval()


def arguments(names: tuple[str, ...]) -> list[str]:
    """Names of arguments for the inputs of a file: theirs, where Python can have them.

    >>> arguments(("x", "images:0", "class"))
    ['x', 'images_0', 'class_']
    """
    found: list[str] = []
    for name in names:
        safe = "".join(c if f"_{c}".isidentifier() else "_" for c in name) or "input"
        safe = f"_{safe}" if safe[0].isdigit() else safe
        safe = f"{safe}_" if keyword.iskeyword(safe) or safe == "self" else safe
        while safe in found:
            safe += "_"
        found.append(safe)
    return found


def _with_islands(source: OnnxGraph) -> tuple[Node, ...]:
    """The nodes, with those whose operator is not in the table as islands.

    Raises:
        CaptureError: for the first that cannot be one.
    """
    strange = [node for node in source.nodes if (node.domain, node.op_type) not in TABLE]
    if not strange:
        return source.nodes
    read = {name for node in strange for name in node.inputs}
    made = {name for node in strange for name in node.outputs}
    types = islands.types_of(source.message, (read | made) - {""} - source.stored.keys())
    stored = {name: ir.to_proto(value) for name, value in source.stored.items() if name in read}
    keys = {node.name: islands.make_island(node, stored, types, source.message) for node in strange}
    return tuple(
        replace(node, island=keys[node.name]) if node.name in keys else node for node in source.nodes
    )


def _fold(source: OnnxGraph) -> tuple[tuple[Node, ...], dict[str, np.ndarray]]:
    """The nodes that depend on inputs, and all that is stored or computed from stored tensors alone."""
    stored = {name: array(value) for name, value in source.stored.items()}
    kept: list[Node] = []
    random = {"RandomNormal", "RandomUniform"}
    for node in _with_islands(source):
        inputs = [name for name in node.inputs if name]
        if node.island or node.op_type in random or not all(name in stored for name in inputs):
            constant = (
                node.constant
                if node.island
                else frozenset(i for i, n in enumerate(node.inputs) if n in stored)
            )
            kept.append(replace(node, constant=constant))
            continue
        made = computed(node, tuple(stored.get(name) for name in node.inputs))
        for name, value in zip(node.outputs, made, strict=False):
            if name:
                found = value if host(value) else value.numpy()
                stored[name] = found.astype(np.int64) if found.dtype == object else found
    return tuple(kept), stored


def _last_uses(nodes: tuple[Node, ...], outputs: tuple[str, ...]) -> list[list[str]]:
    """For each node the values that nothing needs after it."""
    seen = set(outputs)
    found: list[list[str]] = []
    for node in reversed(nodes):
        now = [name for name in dict.fromkeys((*node.inputs, *node.outputs)) if name and name not in seen]
        seen.update(now)
        found.append(now)
    return found[::-1]


def _attach(root: nn.Module, name: str, value: Tensor | nn.Module) -> str:
    """Keep a value below ``root`` under its dotted name, in modules made for it; returns the place that it got.

    A name that torch cannot have (with empty parts, or quotes) or that is taken gets underscores.
    """
    *path, leaf = [part or "_" for part in plain(name).split(".")]
    owner = root
    for i, part in enumerate(path):
        while (
            part in owner._parameters
            or part in owner._buffers
            or (part not in owner._modules and hasattr(owner, part))
        ):
            part += "_"
        path[i] = part
        owner = owner._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    if (
        isinstance(value, nn.Module)
        and isinstance(found := owner._modules.get(leaf), nn.Module)
        and type(found) is nn.Module
    ):
        value._modules.update(found._modules)  # what lies below a node of this name
        value._parameters.update(found._parameters)
        value._buffers.update(found._buffers)
        owner._modules[leaf] = value
        return ".".join([*path, leaf])
    while leaf in owner._modules or hasattr(owner, leaf):
        leaf += "_"
    put(owner, leaf, value)
    return ".".join([*path, leaf])
