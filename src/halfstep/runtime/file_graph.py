"""An ONNX file as a graph: its nodes, what makes and reads their tensors, and what is stored, wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halfstep.errors import ExportError

if TYPE_CHECKING:
    import onnx

#: What files that we translate ourselves say made them.
OURS = "halfstep"

#: Bytes of tensors from which they go beside the file, or cannot be handed over in one piece: a protocol buffer ends at
#: 2 GiB, with all that is in it.
LARGEST_MESSAGE = 1_900_000_000


def load(path: str | Path, weights: bool) -> onnx.ModelProto:
    """The file, with or without weights that lie beside it.

    Raises:
        ExportError: if it is no ONNX file.
    """
    import onnx

    try:
        return onnx.load(str(path), load_external_data=weights)
    except Exception as error:  # protobuf's own errors share no base with OSError
        raise ExportError(f"{path}: cannot be read as ONNX: {error}") from error


def layer_name(node: onnx.NodeProto, producer: str) -> str:
    """What a node is called in messages: in files of our own, whose nodes are ``layer/operator``, by its layer.

    In all others, and in files that we quantized in their own graph, by its whole name, or by what it makes.

    Args:
        node: with outputs.
        producer: what its file calls the tool that made it.
    """
    stem = node.name.rpartition("/")[0] if producer == OURS else ""
    return stem or node.name or node.output[0]


class FileGraph:
    """The nodes of a file, or of the body of an If, Loop or Scan in it.

    Args:
        graph: of the file or body; values of tensors may lie beside the file.
        opset: of ONNX's own operators.
        folder: where the file is.
        outer: the graph around a body, whose tensors it sees.
        producer: what the file calls the tool that made it.
    """

    def __init__(
        self,
        graph: onnx.GraphProto,
        opset: int,
        folder: Path,
        outer: FileGraph | None = None,
        producer: str = "",
    ) -> None:
        self.nodes = list(graph.node)
        self.opset, self.folder, self.producer = opset, folder, producer
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.stored |= {
            node.output[0]: found for node in self.nodes if (found := _constant(node)) is not None
        }
        made = {name: node for node in self.nodes for name in node.output if name}
        self.makers: dict[str, onnx.NodeProto] = {**(outer.makers if outer else {}), **made}
        self.tensors: dict[str, onnx.TensorProto] = {**(outer.tensors if outer else {}), **self.stored}
        self.bodies = [
            FileGraph(body, opset, folder, self, producer)
            for node in self.nodes
            for attribute in node.attribute
            for body in ([attribute.g] if attribute.HasField("g") else attribute.graphs)
        ]

    @classmethod
    def read(cls, path: str | Path) -> FileGraph:
        """The graph of a file.

        Raises:
            ExportError: if it is no ONNX file.
        """
        model = load(path, weights=False)
        opset = max((entry.version for entry in model.opset_import if not entry.domain), default=1)
        return cls(model.graph, opset, Path(path).parent, producer=model.producer_name)

    def every(self) -> Iterator[FileGraph]:
        """This graph and all bodies within it."""
        yield self
        for body in self.bodies:
            yield from body.every()

    @cached_property
    def quantizers(self) -> list[onnx.NodeProto]:
        """Every QuantizeLinear and DequantizeLinear."""
        return [node for node in self.nodes if node.op_type in ("QuantizeLinear", "DequantizeLinear")]

    @cached_property
    def biases(self) -> frozenset[str]:
        """Tensors that are the bias of a layer."""
        layers = ("Conv", "ConvTranspose", "Gemm")
        return frozenset(node.input[2] for node in self.nodes if node.op_type in layers and node.input[2:])

    def readers(self, name: str) -> list[onnx.NodeProto]:
        """The nodes that read a tensor, in bodies too."""
        return self._readers.get(name, [])

    @cached_property
    def _readers(self) -> dict[str, list[onnx.NodeProto]]:
        found: dict[str, list[onnx.NodeProto]] = {}
        for graph in self.every():
            for node in graph.nodes:
                for name in node.input:
                    found.setdefault(name, []).append(node)
        return found

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a tensor that is stored in the file or beside it; None if it is not.

        Raises:
            ExportError: if it lies beside the file, and is not there.
        """
        from onnx import numpy_helper

        if name not in self.tensors:
            return None
        try:
            return numpy_helper.to_array(self.tensors[name], base_dir=str(self.folder))
        except Exception as error:  # the checker's error shares no base with OSError
            raise ExportError(
                f"tensor {name!r}: its values cannot be read from beside the file: {error}; copy them along with it"
            ) from error

    def code_type(self, node: onnx.NodeProto) -> str:
        """The type of the codes of a quantizer, in ONNX's words and small letters."""
        import onnx

        said = next((a.i for a in node.attribute if a.name == "output_dtype"), 0)
        maker = self.makers.get(node.input[0])
        if len(node.input) > 2 and node.input[2] in self.tensors:
            dtype = self.tensors[node.input[2]].data_type
        elif node.op_type == "QuantizeLinear" and said:
            dtype = said
        elif node.op_type == "DequantizeLinear" and node.input[0] in self.tensors:
            dtype = self.tensors[node.input[0]].data_type
        elif node.op_type == "DequantizeLinear" and maker is not None and maker.op_type == "QuantizeLinear":
            return self.code_type(maker)
        else:
            dtype = onnx.TensorProto.UINT8  # what ONNX takes where nothing is said
        return str(onnx.TensorProto.DataType.Name(dtype)).lower()

    def weight(self, node: onnx.NodeProto) -> onnx.TensorProto | None:
        """The tensor of the file that a quantizer works on, as floats or as codes; None if it is computed."""
        maker = self.makers.get(node.input[0])
        if maker is not None and maker.op_type == "QuantizeLinear" and node.input[0] not in self.tensors:
            return self.tensors.get(maker.input[0])
        return self.tensors.get(node.input[0])


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The tensor that a Constant makes, in whatever way it is written; None for text and sparse ones."""
    import onnx

    if node.op_type != "Constant":
        return None
    for attribute in node.attribute:
        if attribute.name == "value":
            tensor: onnx.TensorProto = attribute.t
            return tensor
        numbers = {
            "value_float": (attribute.f, np.float32),
            "value_floats": (attribute.floats, np.float32),
            "value_int": (attribute.i, np.int64),
            "value_ints": (attribute.ints, np.int64),
        }
        if attribute.name in numbers:
            value, dtype = numbers[attribute.name]
            return onnx.numpy_helper.from_array(np.asarray(value, dtype), node.output[0])
    return None
