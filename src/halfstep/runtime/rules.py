"""Rules that a runtime has for files, for runtimes that are not here to judge them themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halfstep.runtime.sites import load

if TYPE_CHECKING:
    import onnx


class FileGraph:
    """A file's nodes with what makes and what reads each of their tensors."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.opset = max((entry.version for entry in model.opset_import if not entry.domain), default=1)
        self.makers = {name: node for node in self.nodes for name in node.output if name}
        self.tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in self.nodes:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    self.tensors[node.output[0]] = attribute.t

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
        """The nodes that read a tensor."""
        return self._readers.get(name, [])

    @cached_property
    def _readers(self) -> dict[str, list[onnx.NodeProto]]:
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a tensor that is stored in the file."""
        from onnx import numpy_helper

        return numpy_helper.to_array(self.tensors[name]) if name in self.tensors else None

    def code_type(self, node: onnx.NodeProto) -> str:
        """The type of the codes of a quantizer, in ONNX's words and small letters."""
        import onnx

        if len(node.input) > 2 and node.input[2] in self.tensors:
            dtype = self.tensors[node.input[2]].data_type
        elif node.input[0] in self.tensors:
            dtype = self.tensors[node.input[0]].data_type
        else:
            dtype = onnx.TensorProto.UINT8  # what ONNX takes where nothing is said
        return str(onnx.TensorProto.DataType.Name(dtype)).lower()

    def is_weight(self, node: onnx.NodeProto) -> bool:
        """Whether a quantizer works on a tensor that is stored in the file, as floats or as codes."""
        maker = self.makers.get(node.input[0])
        through = maker is not None and maker.op_type == "QuantizeLinear" and maker.input[0] in self.tensors
        return node.input[0] in self.tensors or through


@dataclass(frozen=True)
class Rule:
    """One thing that a runtime asks of a file.

    Attributes:
        name: of the rule.
        refused: a file that breaks it cannot be loaded (True), or runs slower than it could (False).
        reason: why the runtime asks it.
        cure: what to do.
        breaches: the names of the places that break it.
    """

    name: str
    refused: bool
    reason: str
    cure: str
    breaches: Callable[[FileGraph], Iterator[str]]


@dataclass(frozen=True)
class Finding:
    """A rule that a file breaks, and where."""

    rule: Rule
    places: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.places[:3]) + (" ..." if len(self.places) > 3 else "")
        verdict = "refused" if self.rule.refused else "slower"
        places = f"{len(self.places)} place{'s' if len(self.places) > 1 else ''}"
        return f"{verdict}, {self.rule.name}, {places} ({shown}): {self.rule.reason}; {self.rule.cure}"


def lint(path: str | Path, rules: Iterable[Rule]) -> tuple[Finding, ...]:
    """Hold a file to rules; one finding for every rule that it breaks.

    Raises:
        ExportError: if it is no ONNX file.
    """
    graph = FileGraph(load(path, weights=False))
    found = ((rule, tuple(dict.fromkeys(rule.breaches(graph)))) for rule in rules)
    return tuple(Finding(rule, places) for rule, places in found if places)
