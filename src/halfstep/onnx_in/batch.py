"""The batch of a file that fixes it: made one of any size where the graph allows that, and ONNX Runtime confirms it.

Exporters fix the batch unless told otherwise, and write its size into the constants that tensors are reshaped by. A
network is captured, calibrated and trained with batches, so these constants are replaced. Whether what comes out is the
same network is not argued but tried: ONNX Runtime answers for a batch what it answers for its parts with the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch

from halfstep.errors import CaptureError, DataError
from halfstep.onnx_in.gate import OUTPUTS, parting, run_message
from halfstep.onnx_in.reader import OnnxGraph, understood

#: What the dimension is called in the file.
BATCH = "batch"
#: Recurrent layers, whose states before the first step have the batch in their second dimension.
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})


def fixed_batch(source: OnnxGraph) -> int | None:
    """The size of the first input's first dimension, if the file fixes it."""
    shape = source.inputs[0].shape if source.inputs else None
    return shape[0] if shape and isinstance(shape[0], int) else None


def with_any_batch(source: OnnxGraph, inputs: Mapping[str, torch.Tensor]) -> OnnxGraph:
    """The same network for batches of any size.

    Args:
        source: with a fixed batch.
        inputs: by name, with one batch or several one after the other.

    Raises:
        CaptureError: in the runtime's words, if the graph holds the size in a way that cannot be replaced.
        DataError: if the inputs are no whole number of batches.
    """
    size = fixed_batch(source)
    assert size is not None
    first = source.inputs[0].name
    alike = {value.name for value in source.inputs if value.shape and value.shape[0] == size}
    reason = ""
    for names in (alike, {first}) if alike != {first} else (alike,):
        batches = _batches(inputs, names, size)
        once = {name: x[:size] if name in names else x for name, x in batches.items()}
        try:
            known = {name: x.numpy() for name, x in once.items()}
            known |= run_message(source.given, source.path, once, every=True)
        except Exception as error:  # the runtime's own errors share no base
            reason = f"onnxruntime cannot run it on these inputs: {_line(error)}"
            continue
        message = _freed(source, names, size, known)
        if not (reason := _otherwise(source, message, batches, names)):
            note = f"The file fixes its batch at {size}; it is read, and written, with a batch of any size"
            return understood(message, source.path, (*source.notes, note))
    raise CaptureError(
        f"{source.path}: its batch is fixed at {size} and cannot be made one of any size, which calibration and "
        f"training need: {reason}; export it with a dynamic batch (dynamic_axes or dynamic_shapes of torch.onnx.export)"
    )


def _batches(inputs: Mapping[str, torch.Tensor], names: set[str], size: int) -> dict[str, torch.Tensor]:
    """Two batches, or all those that were given; a second one is made from the first by moving its values along."""
    found = dict(inputs)
    for name in names:
        x = inputs[name]
        if not len(x) or len(x) % size:
            raise DataError(
                f"input {name!r}: got a batch of {len(x)}, needed a multiple of {size}, the file's own"
            )
        found[name] = torch.cat([x, x.roll(1, -1)]) if len(x) == size else x
    return found


def _otherwise(
    source: OnnxGraph, message: onnx.ModelProto, inputs: Mapping[str, torch.Tensor], names: set[str]
) -> str:
    """Why a message is not the same network for several batches as the file is for one after the other; else empty."""
    size = fixed_batch(source)
    assert size is not None
    count = len(inputs[source.inputs[0].name])
    try:
        single = [
            run_message(
                source.given,
                source.path,
                {name: x[start : start + size] if name in names else x for name, x in inputs.items()},
            )
            for start in range(0, count, size)
        ]
    except Exception as error:  # the runtime's own errors share no base
        return f"onnxruntime cannot run it on these inputs: {_line(error)}"
    try:
        together = run_message(message, source.path, inputs)
    except Exception as error:
        return f"onnxruntime says: {_line(error)}"
    for name, ours in together.items():
        parts = [each[name] for each in single]
        if not ours.ndim:
            return f"output {name!r} is one number, which says nothing of a batch"
        if found := parting(ours, np.concatenate(parts), OUTPUTS):
            return f"output {name!r} of {count // size} batches at once is another than theirs: {found}"
    return ""


def _freed(source: OnnxGraph, names: set[str], size: int, known: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A message whose inputs, and what depends on them, have a first dimension of any size.

    Args:
        source: the file.
        names: of the inputs with the batch.
        size: of the batch.
        known: what the nodes of the file make of one.
    """
    message = onnx.ModelProto()
    message.CopyFrom(source.given)
    graph = message.graph
    depending = _depending(graph, names)
    for value in (*graph.input, *graph.output):
        sizes = value.type.tensor_type.shape.dim
        if value.name in depending and sizes and sizes[0].dim_value:
            sizes[0].Clear()
            sizes[0].dim_param = BATCH
    kept = [value for value in graph.value_info if value.name not in depending]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    work = _Freeing(graph, depending, size, known, source.path.parent)
    nodes = [each for node in graph.node for each in work.free(node)]
    del graph.node[:]
    graph.node.extend(nodes)
    return message


class _Freeing:
    """Nodes without the size of the batch in the constants that they read."""

    def __init__(
        self,
        graph: onnx.GraphProto,
        depending: set[str],
        size: int,
        known: Mapping[str, np.ndarray],
        folder: Path,
    ) -> None:
        self.graph, self.depending, self.size, self.known = graph, depending, size, known
        self.folder = folder
        self.varying = _depending(graph, {value.name for value in graph.input})
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.new: dict[tuple[str, tuple[float, ...]], str] = {}

    def free(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """A node that may have been changed, behind others that it needs."""
        before: list[onnx.NodeProto] = []
        if node.domain in ("", "ai.onnx") and not self.depending.isdisjoint(node.input):
            if node.op_type in ("Reshape", "Expand") and len(node.input) > 1:
                self._shape(node)
            elif node.op_type == "Resize" and len(node.input) == 4:
                self._sizes(node)
            elif node.op_type in _RECURRENT:
                for index in (5, 6):  # the states before the first step, which are 0 where none are given
                    state = self._constant(node.input[index]) if len(node.input) > index else None
                    if state is not None and not state.any():
                        node.input[index] = ""
            elif node.op_type == "Concat":
                before = self._repeated(node)
        return [*before, node]

    def _shape(self, node: onnx.NodeProto) -> None:
        """What is reshaped keeps all sizes but the first; what is expanded already has its batch."""
        shape, made = self._constant(node.input[1]), self.known.get(node.output[0])
        if shape is None or made is None or not shape.size or shape[0] == -1:
            return
        if node.op_type == "Expand":
            if shape[0] == self.size and node.input[0] in self.depending:
                self._put(node, 1, np.array([1, *shape[1:]], np.int64))
        elif shape[0] != 0 and made.size:
            self._put(node, 1, np.array([-1, *made.shape[1:]], np.int64))

    def _sizes(self, node: onnx.NodeProto) -> None:
        """Sizes as scales, where these lead to the same sizes exactly."""
        sizes, made = self._constant(node.input[3]), self.known.get(node.output[0])
        source = self.known.get(node.input[0])
        if sizes is None or made is None or source is None or any(a.name == "axes" for a in node.attribute):
            return
        scales = (sizes / np.array(source.shape)).astype(np.float32)
        if np.array_equal(np.floor(scales * np.array(source.shape, np.float32)), sizes):
            scales[0] = 1
            self._put(node, 2, scales)
            del node.input[3:]

    def _repeated(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Nodes that repeat what is put beside a batch (the token of a class, say) for each of its examples."""
        source = next(name for name in node.input if name in self.depending)
        axis = next(a.i for a in node.attribute if a.name == "axis")
        made: list[onnx.NodeProto] = []
        for index, name in enumerate(node.input):
            value = None if name in self.depending else self._constant(name)
            if value is None or not value.ndim or len(value) != self.size or axis in (0, -value.ndim):
                continue
            own = f"{node.name or node.output[0]}:{index}"
            one = self._store(name, value[:1])
            ones = self._store(f"{own}:ones", np.ones(value.ndim - 1, np.int64))
            zero = self._store(f"{own}:zero", np.zeros(1, np.int64))
            for op_type, inputs in (
                ("Shape", [source]),
                ("Gather", [f"{own}:Shape", zero]),
                ("Concat", [f"{own}:Gather", ones]),
                ("Expand", [one, f"{own}:Concat"]),
            ):
                output = f"{own}:{op_type}"
                made.append(onnx.helper.make_node(op_type, inputs, [output], name=output))
            made[-2].attribute.append(onnx.helper.make_attribute("axis", 0))
            node.input[index] = made[-1].output[0]
        return made

    def _constant(self, name: str) -> np.ndarray | None:
        """A tensor that does not depend on any input, by its name."""
        tensor = self.stored.get(name)
        if tensor is None:
            return None if name in self.varying else self.known.get(name)
        return np.asarray(onnx.numpy_helper.to_array(tensor, str(self.folder)))

    def _put(self, node: onnx.NodeProto, index: int, value: np.ndarray) -> None:
        node.input[index] = self._store(node.input[index] or f"{node.name}:{index}", value)

    def _store(self, name: str, value: np.ndarray) -> str:
        """A tensor for another of that name, which others may read as it is."""
        key = (name, tuple(value.reshape(-1).tolist()))
        if key not in self.new:
            self.new[key] = f"{name}:any_batch" + (f":{len(self.new)}" if self.new else "")
            self.graph.initializer.append(onnx.numpy_helper.from_array(value, self.new[key]))
        return self.new[key]


def _depending(graph: onnx.GraphProto, names: set[str]) -> set[str]:
    """The tensors that are computed from some inputs."""
    found = set(names)
    for node in graph.node:
        if not found.isdisjoint(_reads(node)):
            found.update(filter(None, node.output))
    return found


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, the nodes in its bodies too."""
    yield from node.input
    for attribute in node.attribute:
        bodies: Sequence[onnx.GraphProto] = [
            *([attribute.g] if attribute.HasField("g") else []),
            *attribute.graphs,
        ]
        for body in bodies:
            for inner in body.node:
                yield from _reads(inner)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
