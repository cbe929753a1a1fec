"""Islands: nodes whose operator is not in the table are run by ONNX Runtime, and have no gradient.

An island is one call in the captured graph, however much its node holds (the bodies of an If, say). In the file it
stays as it was.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from halfstep.errors import CaptureError, TrainingError
from halfstep.onnx_in.table import DTYPES, Node

#: Types of tensors and their shapes by name; a dimension is a number, a name, or None.
Types = Mapping[str, tuple[int, tuple[int | str | None, ...] | None]]


@dataclass(frozen=True)
class Island:
    """A node by itself.

    Attributes:
        name: the node's.
        model: a file with that node alone, for ONNX Runtime.
        inputs: shapes of what it reads, in order.
        outputs: types and shapes of what it makes, in order.
    """

    name: str
    model: bytes
    inputs: tuple[tuple[int | str | None, ...] | None, ...]
    outputs: tuple[tuple[torch.dtype, tuple[int | str | None, ...]], ...]

    @property
    def key(self) -> str:
        """The same for the same node in every process."""
        return hashlib.blake2b(self.model, digest_size=8).hexdigest()

    @functools.cached_property
    def session(self) -> Any:
        """ONNX Runtime with the node."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])


#: By their keys: what the captured graph calls them by.
_KNOWN: dict[str, Island] = {}


@torch.library.custom_op("halfstep::island", mutates_args=())
def island(inputs: list[Tensor], key: str) -> list[Tensor]:
    """What ONNX Runtime makes of the inputs."""
    found = _KNOWN[key]
    names = [value.name for value in found.session.get_inputs()]
    arrays = [x.detach().cpu().contiguous().numpy() for x in inputs]
    made = found.session.run(None, dict(zip(names, arrays, strict=True)))
    device = inputs[0].device if inputs else torch.device("cpu")
    return [torch.from_numpy(np.array(array, order="C")).to(device) for array in made]


@island.register_fake
def _(inputs: list[Tensor], key: str) -> list[Tensor]:
    found = _KNOWN[key]
    sizes: dict[str, Any] = {}
    for x, shape in zip(inputs, found.inputs, strict=True):
        named = zip(shape or (), x.shape, strict=False)
        sizes.update({name: size for name, size in named if isinstance(name, str)})
    unknown = torch.library.get_ctx().new_dynamic_size
    return [
        torch.empty(
            [s if isinstance(s, int) else sizes[s] if s in sizes else unknown() for s in shape], dtype=dtype
        )
        for dtype, shape in found.outputs
    ]


island.register_autograd(lambda context, *gradients: (None, None))


def make_island(
    node: Node, stored: Mapping[str, onnx.TensorProto], types: Types, message: onnx.ModelProto
) -> str:
    """Keep a node by itself; the key to call it by.

    Args:
        node: with its message, which reads what its bodies read too.
        stored: tensors of the file that it may read.
        types: of all other tensors.
        message: of the file, whose versions and functions it needs.

    Raises:
        CaptureError: naming it, if what it reads or makes is no tensor of a known type and number of dimensions.
    """
    given = [name for name in node.inputs if name and name not in stored]
    wanted = [name for name in node.outputs if name]
    for name in (*given, *wanted):
        dtype, shape = types.get(name, (0, None))
        if dtype not in DTYPES or shape is None:
            raise CaptureError(
                f"node {node.name!r}: its operator is not known: {node.kind}; it cannot be left to onnxruntime as an "
                f"island either, since the type or shape of {name!r} is not known; take the part of the network "
                "without it"
            )
    graph = onnx.helper.make_graph(
        [onnx.NodeProto.FromString(node.message)],
        "island",
        [onnx.helper.make_tensor_value_info(name, *types[name]) for name in given],
        [onnx.helper.make_tensor_value_info(name, *types[name]) for name in wanted],
        [stored[name] for name in dict.fromkeys(node.inputs) if name in stored],
    )
    model = onnx.helper.make_model(
        graph,
        opset_imports=message.opset_import,
        functions=list(message.functions),
        ir_version=message.ir_version,
    )
    shapes = tuple(types[name][1] for name in given)
    outputs = tuple((DTYPES[types[name][0]], types[name][1] or ()) for name in wanted)
    found = Island(node.name, model.SerializeToString(deterministic=True), shapes, outputs)
    _KNOWN[found.key] = found
    return found.key


def run(node: Node, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The outputs of an island's node for those of its inputs that are not stored."""
    made = iter(torch.ops.halfstep.island.default(list(inputs), node.island))
    return tuple(next(made) if name else None for name in node.outputs)


def types_of(message: onnx.ModelProto, wanted: Collection[str]) -> Types:
    """Types and shapes of a file's tensors: as far as onnx can tell, and by ONNX Runtime's script where it cannot.

    Args:
        message: of the file.
        wanted: names of tensors for which the script is asked: it knows what loops carry along, and takes its time.
    """
    try:
        graph = onnx.shape_inference.infer_shapes(message).graph
    except (onnx.shape_inference.InferenceError, ValueError):  # the runtime says what is wrong
        graph = message.graph
    found = _declared(graph)
    if any(found.get(name, (0, None))[1] is None for name in wanted):
        from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

        with suppress(Exception):  # of many kinds: what it cannot tell is said of the node
            # What its infer_shapes does, but for a file in the working directory of what it cannot tell.
            script, complete = (
                SymbolicShapeInference(2**31 - 1, True, False, 0),
                False,
            )  # merging sizes by itself
            script._preprocess(message)
            while script.run_:
                complete = script._infer_impl()
            script._update_output_from_vi()
            found |= _declared(script.out_mp_.graph) if complete else {}
    return found


def _declared(graph: onnx.GraphProto) -> dict[str, tuple[int, tuple[int | str | None, ...] | None]]:
    found: dict[str, tuple[int, tuple[int | str | None, ...] | None]] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        if value.type.HasField("tensor_type"):
            sizes = (d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim)
            found[value.name] = kind.elem_type, tuple(sizes) if kind.HasField("shape") else None
    return found


def check_no_island(graph: fx.Graph, training: set[str]) -> None:
    """Raise where parameters that train reach the outputs through islands alone.

    Args:
        graph: a captured one.
        training: names of the parameters that train.

    Raises:
        TrainingError: naming the island and a parameter.
    """
    seen: set[fx.Node] = set()
    open_nodes = [node for node in graph.nodes if node.op == "output"]
    while open_nodes:
        node = open_nodes.pop()
        if node not in seen:
            seen.add(node)
            open_nodes += [] if _is_island(node) else node.all_input_nodes
    for node in graph.nodes:
        if _is_island(node):
            for source in _before(node):
                if source.op == "get_attr" and source not in seen and str(source.target) in training:
                    raise TrainingError(
                        f"node {_KNOWN[node.args[1]].name!r} is run by onnxruntime and has no gradient, so "
                        f"{str(source.target)!r} before it cannot be trained; let it not train "
                        "(requires_grad_(False) on the parameters of hs.from_onnx(...) before it), or leave the last "
                        "rung out"
                    )


def _is_island(node: fx.Node) -> bool:
    return node.target is torch.ops.halfstep.island.default


def _before(node: fx.Node) -> Iterator[fx.Node]:
    seen, open_nodes = {node}, [node]
    while open_nodes:
        for source in open_nodes.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                open_nodes.append(source)
                yield source
