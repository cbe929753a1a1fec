"""Where a network comes from: the file, and what of it each module and parameter stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from halfstep.graph.operators import WHOLE, describe
from halfstep.onnx_in.attention import ATTEND
from halfstep.onnx_in.table import Node
from halfstep.targets import Target

if TYPE_CHECKING:
    from halfstep.onnx_in.reader import OnnxGraph

#: Nodes that are split in the file where they are split in the captured graph: a gate and its product, a mean over all
#: pixels and the flattening behind it.
SPLIT = frozenset({"HardSwish", "Swish", "QuickGelu", "ReduceMean"})
#: The kind of what the file has quantized itself.
QUANTIZED = "quantized"
#: A kind that targets pass codes through.
MOVED = "slice"
#: What whole nodes are in the words of the deployment tables, where there is one.
_KINDS = {
    ATTEND: "attention",
    "MultiHeadAttention": "attention",
    "LayerNormalization": "layer_norm",
    "SkipLayerNormalization": "layer_norm",
    "EmbedLayerNormalization": "layer_norm",
    "BiasGelu": "gelu",
    "FastGelu": "gelu",
}


@dataclass(frozen=True)
class Origin:
    """A file that a network was read from.

    Attributes:
        source: what it says.
        steps: the nodes that are executed, by the path of their module, in order.
        tensors: names of stored tensors by the path of their parameter or buffer.
    """

    source: OnnxGraph
    steps: Mapping[str, Node]
    tensors: Mapping[str, str]

    def step(self, node: fx.Node) -> Node | None:
        """The node of the file that a captured one is part of; None for inputs and parameters."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return self.steps.get(stack[-1][0].split("@")[0]) if stack else None

    def keep_whole(self, graph: fx.Graph, target: Target) -> None:
        """Let each node of the file that is captured as several be one operator, so that no quantizer lies within.

        Not so where several only move codes about, where a conv pads its input or ends in what is absorbed, and where
        the file's node is split as the captured one is (:data:`SPLIT`). What reads the file's own quantizers is whole
        too: it is taken as it is.
        """
        dequantized = {
            name
            for step in self.steps.values()
            if step.op_type == "DequantizeLinear"
            for name in step.outputs
        }
        parts: dict[str, list[fx.Node]] = {}
        for node in graph.nodes:
            step = self.step(node)
            if step is not None and (op := describe(node)) is not None and op.kind != "item":
                parts.setdefault(step.name, []).append(node)
        for step in self.steps.values():
            nodes = parts.get(step.name, [])
            kinds = {op.kind for node in nodes if (op := describe(node)) is not None}
            conv = step.op_type in ("Conv", "FusedConv") and kinds <= {"conv", "pad"} | target.absorbed
            for node in nodes if conv else ():
                if (op := describe(node)) is not None and op.kind == "pad":
                    node.meta[WHOLE] = MOVED  # with what 0 is in codes, by the conv itself
            split = step.op_type in SPLIT and len(nodes) == 2
            taken = not step.island and not dequantized.isdisjoint(step.inputs)
            if not (step.island or taken) and (len(nodes) < 2 or conv or split or kinds <= target.passes):
                continue
            kind = QUANTIZED if taken else _KINDS.get(step.op_type, step.op_type.lower())
            for node in graph.nodes:
                if node.op == "call_function" and self.step(node) is step:
                    inside = node in nodes and all(self.step(user) is step for user in node.users)
                    node.meta[WHOLE] = "" if inside else kind

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        """Itself: nothing in it changes."""
        return self
